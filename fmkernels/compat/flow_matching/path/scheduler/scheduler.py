"""Schedulers with flow_matching's names over the schedules of :mod:`fmkernels.paths`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..... import paths
from ....._checks import check_float_tensor, type_error
from .....paths.schedule import promoted


@dataclass
class SchedulerOutput:
    """A schedule at times t; all of t's shape.

    Attributes:
        alpha_t, sigma_t: the coefficients of x_1 and x_0.
        d_alpha_t, d_sigma_t: their derivatives in t.
    """

    alpha_t: Tensor = field(metadata={"help": "alpha_t"})
    sigma_t: Tensor = field(metadata={"help": "sigma_t"})
    d_alpha_t: Tensor = field(metadata={"help": "Derivative of alpha_t."})
    d_sigma_t: Tensor = field(metadata={"help": "Derivative of sigma_t."})


class Scheduler(ABC):
    """A schedule alpha_t, sigma_t. One of your own has these two methods."""

    @abstractmethod
    def __call__(self, t: Tensor) -> SchedulerOutput:
        """The schedule at times t, of any shape."""

    @abstractmethod
    def snr_inverse(self, snr: Tensor) -> Tensor:
        """The times at which the signal-to-noise ratio alpha_t / sigma_t has a value."""


class ConvexScheduler(Scheduler):
    """alpha_t = kappa_t, sigma_t = 1 - kappa_t. One of your own has ``__call__`` and ``kappa_inverse``."""

    @abstractmethod
    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        """The times at which kappa_t has a value."""

    def snr_inverse(self, snr: Tensor) -> Tensor:
        return self.kappa_inverse(snr / (1.0 + snr))


class _Ours(Scheduler):
    """A schedule of fmkernels: in float32 at least on the way, and finite at both ends."""

    path: paths.Path

    def __call__(self, t: Tensor) -> SchedulerOutput:
        check_float_tensor("t", t)
        found = self.path.coefficients(t)
        return SchedulerOutput(*(value.to(t.dtype) for value in found[:4] if value is not None))

    def snr_inverse(self, snr: Tensor) -> Tensor:
        check_float_tensor("snr", snr)
        return self.path.snr_inverse(snr.double().square()).to(snr.dtype)  # whose ratio is of squares


class _OursConvex(_Ours, ConvexScheduler):
    power: float = 1.0

    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        """kappa^(1/n)."""
        check_float_tensor("kappa", kappa)
        return kappa if self.power == 1.0 else kappa ** (1.0 / self.power)


class CondOTScheduler(_OursConvex):
    """kappa_t = t (Lipman et al. 2022)."""

    path: paths.Path = paths.CondOT()


class PolynomialConvexScheduler(_OursConvex):
    """kappa_t = t^n.

    Args:
        n: the exponent, >= 1.

    Raises:
        AssertionError: n is no number > 0.
    """

    def __init__(self, n: float) -> None:
        if isinstance(n, bool) or not isinstance(n, (float, int)) or not n > 0:
            raise AssertionError(f"n: expected a number > 0, got {n!r} of type {type(n).__name__}")
        self.n, self.power = n, float(n)
        self.path = paths.Polynomial(n)


class VPScheduler(_Ours):
    """alpha_t = e^(-T/2), sigma_t = sqrt(1 - e^(-T)), T = (1-t)^2 (beta_max - beta_min) / 2 + (1-t) beta_min."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min, self.beta_max = beta_min, beta_max
        self.path = paths.VP(beta_min, beta_max)


class LinearVPScheduler(_Ours):
    """alpha_t = t, sigma_t = sqrt(1 - t^2)."""

    path: paths.Path = paths.LinearVP()


class CosineScheduler(_Ours):
    """alpha_t = sin(pi t / 2), sigma_t = cos(pi t / 2)."""

    path: paths.Path = paths.Cosine()


class _Path(paths.Path):
    """The schedule of a scheduler of a user's own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def alpha(self, t: Tensor) -> Tensor:
        return self.scheduler(t).alpha_t

    def sigma(self, t: Tensor) -> Tensor:
        return self.scheduler(t).sigma_t

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.scheduler(t).d_alpha_t

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.scheduler(t).d_sigma_t

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        ratio = torch.exp(0.5 * promoted("log_snr", log_snr)).clamp(max=_LARGEST)
        return self.scheduler.snr_inverse(ratio)


_LARGEST = 1e30  # of a ratio, so that r / (1 + r) is 1 at the end
_KNOWN: tuple[type[Scheduler], ...] = (
    CondOTScheduler,
    PolynomialConvexScheduler,
    VPScheduler,
    LinearVPScheduler,
    CosineScheduler,
)


def path_of(scheduler: Scheduler) -> paths.Path:
    """The path of :mod:`fmkernels.paths` that a scheduler means."""
    if type(scheduler) in _KNOWN and "__call__" not in vars(scheduler):
        return scheduler.path  # type: ignore[attr-defined, no-any-return]
    if not callable(scheduler):
        raise type_error("scheduler", "a scheduler: a call that maps t to a SchedulerOutput", scheduler)
    return _Path(scheduler)


__all__ = [
    "CondOTScheduler",
    "ConvexScheduler",
    "CosineScheduler",
    "LinearVPScheduler",
    "PolynomialConvexScheduler",
    "Scheduler",
    "SchedulerOutput",
    "VPScheduler",
]
