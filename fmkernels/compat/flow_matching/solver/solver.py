"""What all solvers are."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Solver(ABC, nn.Module):
    """What samples a model."""

    @abstractmethod
    def sample(self, x_0: Tensor | None = None) -> Tensor:
        """Samples."""


__all__ = ["Solver"]
