r"""Loss weightings w(t): factors of the squared error of a target.

A weighting is a name, an instance of one of the classes below, a tensor, or any callable that maps times to weights.
Each is finite at both ends: standard deviations that vanish at an end, and distances from the end, count there as at
least 1e-4.

Two weightings of two targets may be one loss: the squared error of x_0 is SNR times that of x_1, and on CondOT that
of the velocity is 1 / (1 - t)^2 times that of x_1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from ._checks import check_choice, check_float_tensor, check_number, own_times, type_error
from .paths.derivatives import SMALL, as_tensor, filled, nearest_end
from .paths.schedule import Schedule, divisor, promoted, tensor_at


@runtime_checkable
class Weighting(Protocol):
    """A weighting that depends on the path."""

    def weight(self, path: Schedule, t: Tensor) -> Tensor:
        """Weights of t's shape."""


Weight = None | str | Tensor | Weighting | Callable[[Tensor], Tensor]


class _Formula:
    """A weighting by a formula of the schedule."""

    def weight(self, path: Schedule, t: Tensor) -> Tensor:
        """Weights of t's shape at times t, float32 (float64 for float64 t)."""
        _check(path, t)
        return self._weight(path, promoted("t", t))

    def _weight(self, path: Schedule, t: Tensor) -> Tensor:
        raise NotImplementedError


def _check(path: Any, t: Any) -> None:
    if not isinstance(path, Schedule):
        raise type_error("path", "a path of fm.paths", path)
    check_float_tensor("t", t)


def _sigma(path: Schedule, t: Tensor) -> Tensor:
    sigma = divisor(path, "sigma", t)
    if not isinstance(sigma, Tensor) and sigma == 0.0:
        sigma = SMALL
    return as_tensor(sigma, t)


def _snr(path: Schedule, t: Tensor) -> Tensor:
    return (tensor_at(path, "alpha", t) / _sigma(path, t)).square()


_NEXT = 1e-9  # to an end, in float64, where a function of a user's own may have no value


def _unheld(path: Schedule, name: str, t: Tensor) -> Tensor:
    """A function of a schedule as it is, held only where it has no finite value."""
    value = as_tensor(getattr(path, name)(own_times(t)), t)
    return torch.where(torch.isfinite(value), value, tensor_at(path, name, t))


@final
@dataclass(frozen=True)
class SNR(_Formula):
    """alpha^2 / sigma^2. On target "x_1" this is the loss of noise prediction (Ho et al. 2020; Kingma et al. 2021)."""

    def _weight(self, path: Schedule, t: Tensor) -> Tensor:
        return _snr(path, t)


@final
@dataclass(frozen=True)
class TruncatedSNR(_Formula):
    """max(SNR, 1), for target "x_1" (Salimans & Ho 2022, section 4)."""

    def _weight(self, path: Schedule, t: Tensor) -> Tensor:
        return _snr(path, t).clamp(min=1.0)


@final
@dataclass(frozen=True)
class MinSNR(_Formula):
    """min(SNR, gamma), for target "x_1" (Hang et al. 2023, section 3.4; gamma = 5). For target "x_0" divide by SNR, for
    "v" by SNR + 1: pass a callable."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, above=0.0)

    def _weight(self, path: Schedule, t: Tensor) -> Tensor:
        return _snr(path, t).clamp(max=self.gamma)


@final
@dataclass(frozen=True)
class SigmaSqrt(_Formula):
    """sigma^-2, for target "velocity" (Esser et al. 2024, Stable Diffusion 3; diffusers' ``sigma_sqrt``)."""

    def _weight(self, path: Schedule, t: Tensor) -> Tensor:
        return _sigma(path, t).square().reciprocal()


@final
@dataclass(frozen=True)
class CosMap(_Formula):
    """2 / (pi (1 - 2 sigma + 2 sigma^2)), for target "velocity" (Esser et al. 2024, section 3.1)."""

    def _weight(self, path: Schedule, t: Tensor) -> Tensor:
        sigma = tensor_at(path, "sigma", t)
        return (2.0 / math.pi) / (1.0 - 2.0 * sigma + 2.0 * sigma.square())


@final
@dataclass(frozen=True)
class Sigmoid(_Formula):
    """sigmoid(bias - log SNR), bias from -40 to 40, for target "x_0" (Kingma & Gao 2023; Hoogeboom et al. 2024, eq.
    6)."""

    bias: float = 0.0

    def __post_init__(self) -> None:
        check_number("bias", self.bias, low=-40.0, high=40.0)

    def _weight(self, path: Schedule, t: Tensor) -> Tensor:
        # sigmoid(b - log(alpha^2/sigma^2)) = e^b sigma^2 / (e^b sigma^2 + alpha^2), finite where either vanishes
        alpha, sigma = (
            tensor_at(path, "alpha", t).square(),
            tensor_at(path, "sigma", t).square() * math.exp(self.bias),
        )
        return sigma / (sigma + alpha)


@final
@dataclass(frozen=True)
class Likelihood(_Formula):
    r"""2 / g^2, for target "velocity", with g^2 = 2 sigma (sigma d alpha / alpha - d sigma). On CondOT: t / (1 - t).

    g belongs to the diffusion whose marginals the path has, so that the loss is
    :math:`\frac12 \int g^2 |s_\theta - s|^2`, the bound on the negative log-likelihood (Song et al. 2021, "Maximum
    likelihood training of score-based diffusion models", theorem 1).
    """

    def _weight(self, path: Schedule, t: Tensor) -> Tensor:
        dtype, t = t.dtype, t.double()  # alpha and its derivative may both be below float32's range
        alpha, sigma = tensor_at(path, "alpha", t), _sigma(path, t)
        d_alpha, d_sigma = tensor_at(path, "d_alpha", t), tensor_at(path, "d_sigma", t)
        if not path._exact:  # sigma d sigma, of the root of something, has a limit where d sigma has none
            with torch.no_grad():
                rough = ~torch.isfinite(as_tensor(path.d_sigma(nearest_end(t)), t))
            near = torch.where(rough, t.clamp(_NEXT, 1.0 - _NEXT), t)
            sigma = torch.where(rough, _unheld(path, "sigma", near), sigma)
            d_sigma = torch.where(rough, _unheld(path, "d_sigma", near), d_sigma)
        half = sigma * (sigma * d_alpha - alpha * d_sigma)
        # 0 where both derivatives vanish, with alpha
        return (alpha / torch.where(half > 0.0, half, SMALL * SMALL)).to(dtype)


@final
@dataclass(frozen=True)
class Data(_Formula):
    """1 / (1 - t)^2, for target "x_1": on CondOT the loss of the velocity."""

    def _weight(self, path: Schedule, t: Tensor) -> Tensor:
        return (1.0 - t).clamp(min=SMALL).square().reciprocal()


WEIGHTINGS: dict[str, Weighting | None] = {
    "uniform": None,
    "snr": SNR(),
    "truncated_snr": TruncatedSNR(),
    "min_snr": MinSNR(),
    "sigma_sqrt": SigmaSqrt(),
    "cosmap": CosMap(),
    "sigmoid": Sigmoid(),
    "likelihood": Likelihood(),
    "x_1": Data(),
}


def resolve(weight: Weight, path: Schedule, t: Tensor) -> Tensor | None:
    """The weights at times t as a tensor, or None for uniform.

    Args:
        weight: None; a name: "uniform", "snr", "truncated_snr", "min_snr", "sigma_sqrt", "cosmap", "sigmoid",
            "likelihood", "x_1"; a weighting; a tensor; or a callable of t.
        path: the path whose schedule the weighting reads.
        t: times; float16 and bfloat16 are promoted to float32. A function gets a copy.

    Raises:
        TypeError, ValueError: an unknown name, or neither of these.
    """
    _check(path, t)
    t = promoted("t", t)
    if isinstance(weight, str):
        check_choice("weight", weight, WEIGHTINGS)
        weight = WEIGHTINGS[weight]
    if weight is None or isinstance(weight, Tensor):
        return weight
    if not isinstance(weight, type):
        if isinstance(weight, Weighting) and callable(weight.weight):  # a module may hold a parameter of that name
            return weight.weight(path, t if isinstance(weight, _Formula) else own_times(t))
        if callable(weight):
            return _called(weight, t)
    raise type_error("weight", "None, a name, a weighting, a tensor or a callable of t", weight)


def _called(weight: Callable[[Tensor], Any], t: Tensor) -> Tensor:
    value = weight(own_times(t))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return filled(value, t.shape, t.dtype, t.device)
    if not isinstance(value, Tensor):
        raise type_error("weight(t)", "a tensor", value)
    return value
