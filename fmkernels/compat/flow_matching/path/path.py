"""What all paths are."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .path_sample import PathSample


class ProbPath(ABC):
    """What samples a path between x_0 and x_1."""

    @abstractmethod
    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """The path at times t, (B,)."""

    def assert_sample_shape(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> None:
        """That t is (B,) and x_0, x_1 have B samples.

        Raises:
            AssertionError: they have not.
        """
        if t.dim() != 1:
            raise AssertionError(f"t: expected times of shape (batch_size,), got shape {tuple(t.shape)}")
        if not t.shape[0] == x_0.shape[0] == x_1.shape[0]:
            raise AssertionError(
                "t: expected one time for each sample of x_0 and x_1, got "
                f"{t.shape[0]} for {x_0.shape[0]} and {x_1.shape[0]}"
            )


__all__ = ["ProbPath"]
