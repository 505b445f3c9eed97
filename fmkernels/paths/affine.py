"""Affine Gaussian paths: x_t = alpha_t x_1 + sigma_t x_0."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from .._checks import check_number, value_error
from ..ops._operands import Affine, Coefficient
from .derivatives import SMALL, power, root
from .path import Path
from .schedule import Kernel, half_pi, one_minus_exp, promoted, promoted_times


@final
class CondOT(Path):
    """alpha = t, sigma = 1 - t: straight lines, rectified flow (Liu et al. 2022; Lipman et al. 2022, sigma_min = 0)."""

    _exact = True

    def alpha(self, t: Tensor) -> Tensor | float:
        return t

    def sigma(self, t: Tensor) -> Tensor | float:
        return 1.0 - t

    def interpolation_coefficients(self, t: Tensor) -> tuple[Coefficient, Coefficient, Coefficient | None]:
        if type(self) is not CondOT or vars(self):  # which may have formulas of its own
            return super().interpolation_coefficients(t)
        return t, Affine(1.0, -1.0, t), None

    def d_alpha(self, t: Tensor) -> Tensor | float:
        return 1.0

    def d_sigma(self, t: Tensor) -> Tensor | float:
        return -1.0

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(0.5 * promoted("log_snr", log_snr))


@final
class OptimalTransport(Path):
    """alpha = t, sigma = 1 - (1 - sigma_min) t (Lipman et al. 2022, eq. 20).

    Args:
        sigma_min: the standard deviation left at t = 1, in [0, 1).
    """

    _exact = True

    def __init__(self, sigma_min: float = 1e-4) -> None:
        check_number("sigma_min", sigma_min, low=0.0)
        if sigma_min >= 1.0:
            raise value_error("sigma_min", "a number < 1", sigma_min)
        self.sigma_min = float(sigma_min)

    def alpha(self, t: Tensor) -> Tensor | float:
        return t

    def sigma(self, t: Tensor) -> Tensor | float:
        # (1 - t) + sigma_min t: exact at both ends, where 1 - (1 - sigma_min) t loses sigma_min's digits
        return (1.0 - t) + self.sigma_min * t

    def d_alpha(self, t: Tensor) -> Tensor | float:
        return 1.0

    def d_sigma(self, t: Tensor) -> Tensor | float:
        return self.sigma_min - 1.0

    def _kernel(self) -> Kernel | None:
        sigma_min = self.sigma_min
        return Kernel(5, sigma_min, 0.0, (None, None, 1.0, sigma_min - 1.0)) if type(sigma_min) is float else None

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        ratio = torch.exp(-0.5 * promoted("log_snr", log_snr))  # sigma / alpha
        return (1.0 / (1.0 + ratio - self.sigma_min)).clamp(0.0, 1.0)


@final
class Polynomial(Path):
    """alpha = t^n, sigma = 1 - t^n (Lipman et al. 2024, "Flow matching guide and code").

    Args:
        n: the exponent, >= 1.
    """

    _exact = True

    def __init__(self, n: float) -> None:
        check_number("n", n, low=1.0)
        self.n = float(n)

    def alpha(self, t: Tensor) -> Tensor | float:
        return power(t, self.n)

    def sigma(self, t: Tensor) -> Tensor | float:
        # 1 - t^n without the cancellation next to t = 1; the logarithm there alone, as at 0 it has no derivative
        late = t > 0.5
        near_1 = one_minus_exp(-self.n * torch.log(torch.where(late, t, 1.0)))
        return torch.where(late, near_1, 1.0 - torch.where(late, 0.5, t) ** self.n)

    def d_alpha(self, t: Tensor) -> Tensor | float:
        return self.n * power(t, self.n - 1.0)

    def d_sigma(self, t: Tensor) -> Tensor | float:
        return -self.n * power(t, self.n - 1.0)

    def _kernel(self) -> Kernel | None:
        return Kernel(3, self.n) if type(self.n) is float else None

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(0.5 * promoted("log_snr", log_snr)) ** (1.0 / self.n)


@final
class Cosine(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2) (Albergo & Vanden-Eijnden 2022, trigonometric)."""

    _exact = True

    def alpha(self, t: Tensor) -> Tensor | float:
        return torch.sin(half_pi(t))

    def sigma(self, t: Tensor) -> Tensor | float:
        return torch.sin(half_pi(1.0 - t))  # cos, and exactly 0 at t = 1

    def d_alpha(self, t: Tensor) -> Tensor | float:
        return (0.5 * math.pi) * torch.sin(half_pi(1.0 - t))

    def d_sigma(self, t: Tensor) -> Tensor | float:
        return (-0.5 * math.pi) * torch.sin(half_pi(t))

    def _kernel(self) -> Kernel | None:
        return Kernel(1)

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        return torch.atan(torch.exp(0.5 * promoted("log_snr", log_snr))) * (2.0 / math.pi)


@final
class LinearVP(Path):
    """alpha = t, sigma = sqrt(1 - t^2) (Lipman et al. 2024).

    d sigma / dt = -t / sigma has no limit at t = 1; there sigma counts as at least 1e-4.
    """

    _exact = True

    def alpha(self, t: Tensor) -> Tensor | float:
        return t

    def sigma(self, t: Tensor) -> Tensor | float:
        return root((1.0 - t) * (1.0 + t))

    def d_alpha(self, t: Tensor) -> Tensor | float:
        return 1.0

    def d_sigma(self, t: Tensor) -> Tensor | float:
        return -t / root((1.0 - t) * (1.0 + t)).clamp(min=SMALL)

    def _kernel(self) -> Kernel | None:
        return Kernel(2, numbers=(None, None, 1.0, None))

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        return torch.sqrt(torch.sigmoid(promoted("log_snr", log_snr)))


class VariancePreserving(Path):
    """alpha = e^(-T/2), sigma = sqrt(1 - e^(-T)) of an integrated noise schedule T(t) >= 0 with T(1) = 0.

    d sigma / dt has no limit at t = 1; there sigma counts as at least 1e-4.
    """

    _exact = True

    def integral(self, t: Tensor) -> Tensor:
        """T: the noise schedule integrated from the data to t."""
        raise NotImplementedError

    def d_integral(self, t: Tensor) -> Tensor:
        """Its derivative in t."""
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor | float:
        return torch.exp(-0.5 * self.integral(t))

    def sigma(self, t: Tensor) -> Tensor | float:
        return root(one_minus_exp(self.integral(t)))

    def d_alpha(self, t: Tensor) -> Tensor | float:
        return -0.5 * self.d_integral(t) * torch.exp(-0.5 * self.integral(t))

    def d_sigma(self, t: Tensor) -> Tensor | float:
        total = self.integral(t)
        sigma = root(one_minus_exp(total)).clamp(min=SMALL)
        return 0.5 * self.d_integral(t) * torch.exp(-total) / sigma

    def log_snr(self, t: Tensor | float) -> Tensor:
        total = self.integral(promoted_times(t))
        return -total - torch.log(one_minus_exp(total))


@final
class VP(VariancePreserving):
    """alpha = e^(-T/2), sigma = sqrt(1 - e^(-T)), T = (1-t)^2 (beta_max - beta_min) / 2 + (1-t) beta_min: the
    variance-preserving diffusion (Song et al. 2021, eq. 33) with time turned so that t = 1 is the data.

    d sigma / dt has no limit at t = 1; there sigma counts as at least 1e-4.

    Args:
        beta_min, beta_max: the linear noise schedule's ends, 0 < beta_min <= beta_max.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        check_number("beta_min", beta_min, above=0.0)
        check_number("beta_max", beta_max, low=beta_min)
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def integral(self, t: Tensor) -> Tensor:
        """T: the noise schedule integrated from the data to t."""
        s = 1.0 - t
        return s * (0.5 * (self.beta_max - self.beta_min) * s + self.beta_min)

    def d_integral(self, t: Tensor) -> Tensor:
        return -((self.beta_max - self.beta_min) * (1.0 - t) + self.beta_min)

    def _kernel(self) -> Kernel | None:
        plain = type(self.beta_min) is float and type(self.beta_max) is float
        return Kernel(0, self.beta_min, self.beta_max) if plain else None

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        # T = log(1 + e^-log_snr), then the quadratic for 1 - t, in the form without cancellation
        total = torch.nn.functional.softplus(-promoted("log_snr", log_snr))
        slope = self.beta_max - self.beta_min
        # beyond the end's T only the end's time is asked for, and an infinite T (SNR 0) would give inf / inf
        total = total.clamp(max=0.5 * slope + self.beta_min)
        s = 2.0 * total / (self.beta_min + torch.sqrt(self.beta_min**2 + 2.0 * slope * total))
        return (1.0 - s).clamp(0.0, 1.0)


@final
class VE(Path):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^(1-t): the variance-exploding diffusion (Song et al. 2021,
    eq. 31) with time turned so that t = 1 is the data.

    Args:
        sigma_min, sigma_max: the standard deviations at t = 1 and t = 0, 0 < sigma_min < sigma_max.
    """

    _exact = True

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        check_number("sigma_min", sigma_min, above=0.0)
        check_number("sigma_max", sigma_max, above=sigma_min)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor | float:
        return 1.0

    def sigma(self, t: Tensor) -> Tensor | float:
        return self.sigma_min * torch.exp(self._log_ratio * (1.0 - t))

    def d_alpha(self, t: Tensor) -> Tensor | float:
        return 0.0

    def d_sigma(self, t: Tensor) -> Tensor | float:
        return (-self._log_ratio * self.sigma_min) * torch.exp(self._log_ratio * (1.0 - t))

    def _kernel(self) -> Kernel | None:
        if type(self.sigma_min) is not float or type(self.sigma_max) is not float:
            return None
        return Kernel(4, self.sigma_min, self._log_ratio, (1.0, None, 0.0, None))

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        log_sigma = -0.5 * promoted("log_snr", log_snr)
        return (1.0 - (log_sigma - math.log(self.sigma_min)) / self._log_ratio).clamp(0.0, 1.0)
