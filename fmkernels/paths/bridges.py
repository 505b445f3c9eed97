"""Bridges: a path between two given samples with noise of its own, x_t = alpha_t x_1 + sigma_t x_0 + gamma_t z."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from .._checks import check_number, type_error
from .affine import CondOT
from .derivatives import SMALL, root
from .path import Path
from .schedule import at


class _Bridge(Path):
    """The mean of another path."""

    _exact = True
    base: Path

    def alpha(self, t: Tensor) -> Tensor | float:
        return at(self.base, "alpha", t)

    def sigma(self, t: Tensor) -> Tensor | float:
        return at(self.base, "sigma", t)

    def d_alpha(self, t: Tensor) -> Tensor | float:
        return at(self.base, "d_alpha", t)

    def d_sigma(self, t: Tensor) -> Tensor | float:
        return at(self.base, "d_sigma", t)

    def log_snr(self, t: Tensor | float) -> Tensor:
        """That of the mean: x_0 counts as noise, z does not."""
        return self.base.log_snr(t)

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        return self.base.log_snr_inverse(log_snr)

    def _set(self, sigma: float, base: Path | None) -> None:
        check_number("sigma", sigma, low=0.0)
        base = CondOT() if base is None else base
        if not isinstance(base, Path) or isinstance(base, _Bridge):
            raise type_error("base", "a path without a gamma term", base)
        self._sigma, self.base = float(sigma), base

    def _arguments(self) -> dict[str, Any]:
        return {"sigma": self._sigma, "base": self.base}


@final
class ConstantBridge(_Bridge):
    """gamma = sigma, constant: torchcfm's ConditionalFlowMatcher(sigma) and, with ``base=Cosine()``, its
    VariancePreservingConditionalFlowMatcher (Tong et al. 2023, eq. 14; Albergo & Vanden-Eijnden 2022).

    Args:
        sigma: the standard deviation of the noise, >= 0.
        base: the path of the mean; CondOT if None.
    """

    def __init__(self, sigma: float, base: Path | None = None) -> None:
        self._set(sigma, base)

    def gamma(self, t: Tensor) -> Tensor | float | None:
        return self._sigma

    def d_gamma(self, t: Tensor) -> Tensor | float | None:
        return 0.0


@final
class SchrodingerBridge(_Bridge):
    """gamma = sigma sqrt(t (1-t)): the Brownian bridge between x_0 and x_1 (Tong et al. 2023, eq. 17), coupled by
    entropic optimal transport with regularisation 2 sigma^2 the Schroedinger bridge.

    d gamma / dt has no limit at the ends; there sqrt(t (1-t)) counts as at least 1e-4.

    Args:
        sigma: the standard deviation of the Brownian motion per unit time, >= 0.
        base: the path of the mean; CondOT if None.
    """

    def __init__(self, sigma: float = 1.0, base: Path | None = None) -> None:
        self._set(sigma, base)

    def gamma(self, t: Tensor) -> Tensor | float | None:
        return self._sigma * root(t * (1.0 - t)) if self._sigma != 0.0 else 0.0

    def d_gamma(self, t: Tensor) -> Tensor | float | None:
        if self._sigma == 0.0:
            return 0.0
        return (0.5 * self._sigma) * (1.0 - 2.0 * t) / root(t * (1.0 - t)).clamp(min=SMALL)
