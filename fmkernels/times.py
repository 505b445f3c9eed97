r"""Times for training, and the resolution shift that training and inference share.

A sampler is a function (shape, device=None, generator=None) to float32 times in [0, 1], t = 0 being noise. Papers that
run the other way (Stable Diffusion 3, pi0: 1 is noise) are turned here: their time is the noise level 1 - t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ._checks import check_float_tensor, check_int, check_number, type_error, value_error

Device = torch.device | str | None
Shape = int | Sequence[int]
Sampler = Callable[..., Tensor]


def _shape(shape: Shape) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) and not isinstance(shape, bool) else shape
    if not isinstance(sizes, Sequence):
        raise type_error("shape", "an int or a sequence of ints", shape)
    for size in sizes:
        check_int("shape", size, low=0)
    return tuple(sizes)


def _rand(shape: Shape, device: Device, generator: torch.Generator | None) -> Tensor:
    return torch.rand(_shape(shape), dtype=torch.float32, device=device, generator=generator)


@final
@dataclass(frozen=True)
class Shift:
    """The resolution shift of noise levels, sigma' = s sigma / (1 + (s - 1) sigma) with sigma = 1 - t.

    Esser et al. 2024, eq. 23. s > 1 moves times towards noise. One object serves training (:class:`Shifted`) and
    inference grids.

    Args:
        shift: s > 0; 1 changes nothing.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        check_number("shift", self.shift, above=0.0)

    def __call__(self, t: Tensor) -> Tensor:
        """Shifted times, of t's shape and dtype; 0 stays 0 and 1 stays 1."""
        check_float_tensor("t", t)
        return t / (t + self.shift * (1.0 - t))

    def inverse(self, t: Tensor) -> Tensor:
        """The times that shift to t."""
        check_float_tensor("t", t)
        return self.shift * t / (1.0 - t + self.shift * t)

    @staticmethod
    def dynamic(mu: float) -> Shift:
        """s = e^mu: diffusers' dynamic shifting, e^mu / (e^mu + 1/sigma - 1)."""
        check_number("mu", mu, low=-80.0, high=80.0)
        return Shift(math.exp(mu))

    @staticmethod
    def for_resolution(
        seq_len: int,
        base_seq_len: int = 256,
        max_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
    ) -> Shift:
        """The shift for an image of ``seq_len`` tokens: mu on the line through (base_seq_len, base_shift) and
        (max_seq_len, max_shift), as in diffusers' Flux pipeline."""
        for name, value in (
            ("seq_len", seq_len),
            ("base_seq_len", base_seq_len),
            ("max_seq_len", max_seq_len),
        ):
            check_int(name, value, low=1)
        if max_seq_len == base_seq_len:
            raise value_error("max_seq_len", f"another length than base_seq_len, {base_seq_len}", max_seq_len)
        slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
        return Shift.dynamic(base_shift + slope * (seq_len - base_seq_len))


@final
@dataclass(frozen=True)
class Shifted:
    """Times of a sampler, shifted.

    Args:
        sampler: any time sampler.
        shift: a :class:`Shift`; use the same for the inference grid.
    """

    sampler: Sampler
    shift: Shift

    def __post_init__(self) -> None:
        if not callable(self.sampler):
            raise type_error("sampler", "a time sampler", self.sampler)
        if not isinstance(self.shift, Shift):
            raise type_error("shift", "a Shift", self.shift)

    def __call__(self, shape: Shape, device: Device = None, generator: torch.Generator | None = None) -> Tensor:
        return self.shift(self.sampler(shape, device=device, generator=generator))


@final
@dataclass(frozen=True)
class Uniform:
    """Uniform times in [low, high).

    Args:
        low, high: 0 <= low < high <= 1.
        stratified: one time in each of n equal intervals, in random order over the elements: (p(i) + u_i) / n, which
            lowers the variance of a batch's loss.
    """

    low: float = 0.0
    high: float = 1.0
    stratified: bool = False

    def __post_init__(self) -> None:
        check_number("low", self.low, low=0.0)
        check_number("high", self.high, above=self.low, high=1.0)

    def __call__(self, shape: Shape, device: Device = None, generator: torch.Generator | None = None) -> Tensor:
        u = _rand(shape, device, generator)
        if self.stratified and u.numel():
            n = u.numel()
            order = torch.randperm(n, device=device, generator=generator).reshape(u.shape)
            # rounding may reach the next stratum's edge, and 1 in the last one
            u = ((order + u) / n).clamp(max=1.0 - 2.0**-24)
        return u if (self.low, self.high) == (0.0, 1.0) else self.low + (self.high - self.low) * u


@final
@dataclass(frozen=True)
class LogitNormal:
    """1 - sigmoid(mean + std z): the noise level is logit-normal (Esser et al. 2024, eq. 19). A positive mean favours
    noise, as in diffusers' ``logit_mean``.

    Args:
        mean, std: of the noise level's logit; std > 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_number("mean", self.mean)
        check_number("std", self.std, above=0.0)

    def __call__(self, shape: Shape, device: Device = None, generator: torch.Generator | None = None) -> Tensor:
        z = torch.randn(_shape(shape), dtype=torch.float32, device=device, generator=generator)
        return torch.sigmoid(-(self.mean + self.std * z))


@final
@dataclass(frozen=True)
class Mode:
    """t = u + scale (cos^2(pi u / 2) - 1 + u), the noise level being 1 - t: sampling with a heavy middle (Esser et al.
    2024, eq. 20, with 1 - u in the place of u).

    Args:
        scale: -1 <= scale <= 2 / (pi - 2), where the map is monotone.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        check_number("scale", self.scale, low=-1.0, high=2.0 / (math.pi - 2.0))

    def __call__(self, shape: Shape, device: Device = None, generator: torch.Generator | None = None) -> Tensor:
        u = _rand(shape, device, generator)
        return (u + self.scale * (torch.cos(0.5 * math.pi * u).square() - 1.0 + u)).clamp(0.0, 1.0)


@final
@dataclass(frozen=True)
class CosMap:
    """t = 1 / (tan(pi u / 2) + 1): times whose log SNR is that of the cosine schedule (Esser et al. 2024, eq. 21).

    The law is symmetric about 1/2.
    """

    def __call__(self, shape: Shape, device: Device = None, generator: torch.Generator | None = None) -> Tensor:
        angle = 0.5 * math.pi * _rand(shape, device, generator)
        # cos / (sin + cos) has no pole
        return torch.cos(angle) / (torch.sin(angle) + torch.cos(angle))


@final
@dataclass(frozen=True)
class UShaped:
    """Density proportional to cosh(a (2t - 1)), favouring both ends.

    Lee et al. 2024, "Improving the training of rectified flows", section 4.1: e^(au) + e^(-au) on [-1, 1].

    Drawn by inversion: t = 1/2 + asinh((2u - 1) sinh a) / (2a).

    Args:
        a: > 0; the larger, the more weight at the ends.
    """

    a: float = 4.0

    def __post_init__(self) -> None:
        check_number("a", self.a, above=0.0, high=80.0)

    def __call__(self, shape: Shape, device: Device = None, generator: torch.Generator | None = None) -> Tensor:
        u = _rand(shape, device, generator)
        return (0.5 + torch.asinh((2.0 * u - 1.0) * math.sinh(self.a)) / (2.0 * self.a)).clamp(0.0, 1.0)


@final
@dataclass(frozen=True)
class Beta:
    """t = 1 - (offset + scale beta) with beta ~ Beta(a, b): by default pi0's times.

    Black et al. 2024, appendix B; openpi draws the noise level 0.999 Beta(1.5, 1) + 0.001.

    Args:
        a, b: parameters of the Beta law, > 0.
        scale, offset: of the noise level, with 0 <= offset and offset + scale <= 1.
    """

    a: float = 1.5
    b: float = 1.0
    scale: float = 0.999
    offset: float = 0.001

    def __post_init__(self) -> None:
        check_number("a", self.a, above=0.0)
        check_number("b", self.b, above=0.0)
        check_number("scale", self.scale, above=0.0, high=1.0)
        check_number("offset", self.offset, low=0.0, high=1.0 - self.scale + 1e-12)

    def __call__(self, shape: Shape, device: Device = None, generator: torch.Generator | None = None) -> Tensor:
        if self.b == 1.0:  # the law's distribution function is x^a
            draw = (1.0 - _rand(shape, device, generator)) ** (1.0 / self.a)
        else:
            sizes = _shape(shape)
            x, y = (
                torch._standard_gamma(torch.full(sizes, p, dtype=torch.float32, device=device), generator=generator)
                for p in (self.a, self.b)
            )
            draw = x / (x + y).clamp(min=torch.finfo(torch.float32).tiny)
        return (1.0 - (self.offset + self.scale * draw)).clamp(0.0, 1.0)
