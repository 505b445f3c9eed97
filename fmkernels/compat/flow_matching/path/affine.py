"""Affine paths with flow_matching's names, sampled and converted by the fused kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .scheduler import CondOTScheduler, Scheduler, path_of


@dataclass
class PathSample:
    """A sample of a path.

    Attributes:
        x_1, x_0: target and source, (B, ...).
        t: times, (B,).
        x_t: the point, (B, ...).
        dx_t: its velocity given x_0 and x_1, (B, ...).
    """

    x_1: Tensor = field(metadata={"help": "target samples X_1 (batch_size, ...)."})
    x_0: Tensor = field(metadata={"help": "source samples X_0 (batch_size, ...)."})
    t: Tensor = field(metadata={"help": "time samples t (batch_size, ...)."})
    x_t: Tensor = field(metadata={"help": "samples x_t ~ p_t(X_t), shape (batch_size, ...)."})
    dx_t: Tensor = field(metadata={"help": "conditional target dX_t, shape: (batch_size, ...)."})


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


class AffineProbPath(ProbPath):
    r""":math:`x_t = \alpha_t x_1 + \sigma_t x_0` (Lipman et al. 2024, section 4.8).

    Conversions take t as a number's tensor (), one for each sample (B,), or anything that broadcasts to x_t from there,
    and are finite at both ends; see :func:`fmkernels.convert`.

    Args:
        scheduler: a scheduler of :mod:`fmkernels.compat.flow_matching.path.scheduler`, or one's own.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """The point x_t and its velocity, of the dtype of x_0, x_1 and t together.

        Args:
            x_0, x_1: source and target, (B, ...).
            t: times (B,).

        Raises:
            AssertionError: t is not (B,).
        """
        self.assert_sample_shape(x_0, x_1, t)
        dtype = torch.promote_types(torch.promote_types(x_0.dtype, x_1.dtype), t.dtype)
        batch = path_of(self.scheduler).sample(x_1.to(dtype), x_0.to(dtype), t)
        return PathSample(x_1=x_1, x_0=x_0, t=t, x_t=batch.x_t, dx_t=batch.target("velocity"))

    def target_to_velocity(self, x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity of a prediction of x_1."""
        return self._convert(x_1, x_t, t, "x_1", "velocity")

    def epsilon_to_velocity(self, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity of a prediction of x_0."""
        return self._convert(epsilon, x_t, t, "x_0", "velocity")

    def velocity_to_target(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_1 of a velocity."""
        return self._convert(velocity, x_t, t, "velocity", "x_1")

    def epsilon_to_target(self, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_1 of a prediction of x_0."""
        return self._convert(epsilon, x_t, t, "x_0", "x_1")

    def velocity_to_epsilon(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 of a velocity."""
        return self._convert(velocity, x_t, t, "velocity", "x_0")

    def target_to_epsilon(self, x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 of a prediction of x_1."""
        return self._convert(x_1, x_t, t, "x_1", "x_0")

    def _convert(self, prediction: Tensor, x_t: Tensor, t: Tensor, source: str, target: str) -> Tensor:
        return path_of(self.scheduler).convert(prediction, x_t, leading(t), source, target)


def leading(t: Tensor) -> Tensor:
    """Times that broadcast to a state from its first dimension on, as a leading part of its shape: (B, 1, 1) is (B,)."""
    while t.dim() > 0 and t.shape[-1] == 1:
        t = t.squeeze(-1)
    return t


class CondOTProbPath(AffineProbPath):
    """Straight lines: x_t = t x_1 + (1 - t) x_0."""

    def __init__(self) -> None:
        super().__init__(CondOTScheduler())
