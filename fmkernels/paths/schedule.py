"""Schedules: alpha_t, sigma_t and gamma_t of x_t = alpha_t x_1 + sigma_t x_0 (+ gamma_t z), and what they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_float_tensor, type_error
from .._dispatch import transform_active
from ..ops._operands import Coefficient

# Below this, a standard deviation or a distance from an end of the path counts as this: quotients by it stay finite in
# float32 and bfloat16 (1e-4 squared is 1e-8, and float32 resolves t next to 1 to 6e-8). The schedules themselves are
# exact; only quantities whose limit is infinite (a score at sigma = 0, a derivative of sqrt(1 - t)) are held here.
SMALL = 1e-4


def as_tensor(value: Tensor | float, t: Tensor) -> Tensor:
    """A schedule's value as a tensor of t's shape."""
    if isinstance(value, Tensor):
        return value if value.shape == t.shape else value.expand(t.shape)
    return torch.full_like(t, value)


def promoted(t: Tensor | float) -> Tensor:
    """Times as float32, or float64 where they are that."""
    if not isinstance(t, Tensor):
        if isinstance(t, bool) or not isinstance(t, (int, float)):
            raise type_error("t", "a tensor or a number", t)
        return torch.tensor(float(t), dtype=torch.float32)
    check_float_tensor("t", t)
    return t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float32)


class Coefficients(NamedTuple):
    """A schedule at given times: tensors of t's shape; the gamma entries are None for a path without that term."""

    alpha_t: Tensor
    sigma_t: Tensor
    d_alpha_t: Tensor
    d_sigma_t: Tensor
    gamma_t: Tensor | None = None
    d_gamma_t: Tensor | None = None


def derivative(function: Callable[[Tensor], Tensor | float], t: Tensor) -> Tensor:
    """d function / d t for a function that acts on each time alone, by automatic differentiation."""
    if torch.compiler.is_compiling() or transform_active():
        # autograd.grad can be neither traced nor transformed; forward mode can, at five times the cost in plain calls
        return torch.func.jvp(lambda times: as_tensor(function(times), times), (t,), (torch.ones_like(t),))[1]
    # inference mode would record nothing and make every derivative 0, enable_grad notwithstanding
    with torch.inference_mode(False), torch.enable_grad():
        leaf = (t.clone() if t.is_inference() else t.detach()).requires_grad_()
        value = as_tensor(function(leaf), leaf)
        if not value.requires_grad:  # a constant
            return torch.zeros_like(t)
        (result,) = torch.autograd.grad(value.sum(), leaf)
    return result


class Schedule:
    """What a path is made of: alpha and sigma, their derivatives, and gamma for a path with noise of its own.

    Targets, batches and weightings read a schedule; a schedule of your own is a subclass of :class:`Path`, which also
    samples and converts.
    """

    def alpha(self, t: Tensor) -> Tensor | float:
        """The coefficient of x_1."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method alpha(t), got none")

    def sigma(self, t: Tensor) -> Tensor | float:
        """The coefficient of x_0."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method sigma(t), got none")

    def d_alpha(self, t: Tensor) -> Tensor | float:
        """The derivative of alpha; by autograd unless a subclass gives a closed form."""
        return derivative(self.alpha, t)

    def d_sigma(self, t: Tensor) -> Tensor | float:
        """The derivative of sigma; by autograd unless a subclass gives a closed form."""
        return derivative(self.sigma, t)

    def gamma(self, t: Tensor) -> Tensor | float | None:
        """The coefficient of z, or None for no such term."""
        return None

    def d_gamma(self, t: Tensor) -> Tensor | float | None:
        """The derivative of gamma."""
        if self.gamma(t) is None:
            return None
        return derivative(self.gamma, t)  # type: ignore[arg-type]  # not None at other times either

    def __repr__(self) -> str:
        parameters = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({parameters})"

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """alpha, sigma, their derivatives and, for a bridge, gamma and its derivative, at times t.

        Args:
            t: times in [0, 1], any shape; float16 and bfloat16 are promoted to float32.

        Returns:
            Coefficients: tensors of t's shape, float32 (float64 for float64 t), finite also at 0 and 1.
        """
        t = promoted(t)
        gamma, d_gamma = self.gamma(t), self.d_gamma(t)
        return Coefficients(
            as_tensor(self.alpha(t), t),
            as_tensor(self.sigma(t), t),
            as_tensor(self.d_alpha(t), t),
            as_tensor(self.d_sigma(t), t),
            None if gamma is None else as_tensor(gamma, t),
            None if d_gamma is None else as_tensor(d_gamma, t),
        )

    def interpolation_coefficients(self, t: Tensor) -> tuple[Coefficient, Coefficient, Coefficient | None]:
        """(alpha, sigma, gamma) as the kernels take them: constants stay numbers."""
        return self.alpha(t), self.sigma(t), self.gamma(t)

    def log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha^2 / sigma^2); infinite where sigma (or alpha) is 0."""
        t = promoted(t)
        return 2.0 * (torch.log(as_tensor(self.alpha(t), t)) - torch.log(as_tensor(self.sigma(t), t)))

    def snr(self, t: Tensor | float) -> Tensor:
        """The signal-to-noise ratio alpha^2 / sigma^2 (Kingma et al. 2021, eq. 3); infinite where sigma is 0."""
        t = promoted(t)
        return (as_tensor(self.alpha(t), t) / as_tensor(self.sigma(t), t)).square()

    def snr_inverse(self, snr: Tensor) -> Tensor:
        """The time at which the signal-to-noise ratio has a value; the ends' times beyond their ratios.

        Closed form where a schedule has one, else bisection on log SNR, which must increase: 60 fixed steps on the
        device, without a host sync.
        """
        check_float_tensor("snr", snr)
        return self.log_snr_inverse(torch.log(promoted(snr)))

    def log_snr_inverse(self, log_snr: Tensor) -> Tensor:
        """The time at which log SNR has a value; see :meth:`snr_inverse`."""
        check_float_tensor("log_snr", log_snr)
        wanted = promoted(log_snr)
        low = torch.zeros_like(wanted, dtype=torch.float64)
        high = torch.ones_like(low)
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = self.log_snr(middle) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (0.5 * (low + high)).to(wanted.dtype)


def one_minus_exp(x: Tensor) -> Tensor:
    """1 - e^(-x) for x >= 0 without cancellation, by its series below 0.1.

    torch.expm1 alone would do in eager mode; torch.compile's CPU backend forms exp(x) - 1 for it.
    """
    small = x.clamp(max=0.1)
    series = torch.zeros_like(small)
    for n in range(9, 1, -1):  # x (1 - x/2 (1 - x/3 (...)))
        series = small / n * (1.0 - series)
    return torch.where(x < 0.1, small * (1.0 - series), 1.0 - torch.exp(-x))


def half_pi(t: Tensor) -> Tensor:
    return (0.5 * math.pi) * t
