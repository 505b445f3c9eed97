"""Affine paths with flow_matching's names, sampled and converted by the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .path import ProbPath
from .path_sample import PathSample
from .scheduler.scheduler import CondOTScheduler, Scheduler, path_of


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
    """Times that broadcast to a state from its first dimension on, as a leading part of its shape: (B, 1) is (B,)."""
    while t.dim() > 0 and t.shape[-1] == 1:
        t = t.squeeze(-1)
    return t


class CondOTProbPath(AffineProbPath):
    """Straight lines: x_t = t x_1 + (1 - t) x_0."""

    def __init__(self) -> None:
        super().__init__(CondOTScheduler())


__all__ = ["AffineProbPath", "CondOTProbPath"]
