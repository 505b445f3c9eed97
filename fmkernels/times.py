r"""Times for training, and the resolution shift that training and inference share.

A sampler draws float32 times in [0, 1], t = 0 being noise. Papers that run the other way (Stable Diffusion 3, pi0: 1 is
noise) are turned here: their time is the noise level 1 - t.

Times come from the Philox streams that all noise here comes from: element i of the whole batch is a function of the
seed and of i, so that shards and micro-batches draw together, by ``row_offset``, what the whole batch would.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ._checks import (
    as_length,
    check_bool,
    check_device,
    check_float_tensor,
    check_int,
    check_number,
    type_error,
    value_error,
)
from .ops.random import kinds
from .ops.random.op import draw
from .random import as_seed

Device = torch.device | str | None
Shape = int | Sequence[int]
Function = Callable[..., Tensor]

# Streams 0 and 1 of a seed are the noises of path.sample (fmkernels.ops.interpolate); times begin here.
TIME_STREAM = 2


def _shape(shape: Shape) -> tuple[int, ...]:
    if isinstance(shape, (int, torch.SymInt, np.integer)) and not isinstance(shape, bool):
        shape = (shape,)  # type: ignore[assignment]
    elif not isinstance(shape, Sequence) or isinstance(shape, str):
        raise type_error("shape", "an int or a sequence of ints", shape)
    sizes = tuple([as_length("shape", size) for size in shape])
    if not torch.compiler.is_compiling():  # there a size may be symbolic
        for size in sizes:
            check_int("shape", size, low=0, high=2**48)
    return sizes


def check_row_offset(row_offset: int, shape: Sequence[int]) -> None:
    """A row from which all of a shape's elements have a number that fits into 63 bits."""
    if torch.compiler.is_compiling():  # there a size may be symbolic
        check_int("row_offset", row_offset)
    else:
        check_int("row_offset", row_offset, low=0, high=2**62 // max(math.prod(shape[1:]), 1) - sum(shape[:1]))


# PyTorch's vectorised functions differ in the last bit from those that it takes for what is left over, so that a time
# would depend on its place in the call: logarithms, powers and sigmoids are taken in float64, and rounded once.


def _uniform(shape: tuple[int, ...], seed: Tensor, row_offset: int, stream: int = TIME_STREAM) -> Tensor:
    return draw(shape, kinds.UNIFORM, seed, stream, row_offset, torch.float32)


def _normal(shape: tuple[int, ...], seed: Tensor, row_offset: int, stream: int = TIME_STREAM) -> Tensor:
    return draw(shape, kinds.NORMAL, seed, stream, row_offset, torch.float32)


class Sampler:
    """A law of times. One of your own is a subclass with a method ``draw``; any function of (shape, device=,
    generator=) serves too where nothing is sharded."""

    def draw(self, shape: tuple[int, ...], seed: Tensor, row_offset: int) -> Tensor:
        """Float32 times of a shape on the seed's device, the first being row ``row_offset`` of the whole batch's."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method draw(shape, seed, row_offset), got none")

    def __call__(
        self,
        shape: Shape,
        device: Device = None,
        generator: torch.Generator | None = None,
        *,
        seed: Tensor | int | None = None,
        row_offset: int = 0,
    ) -> Tensor:
        """Draws times.

        Args:
            shape: an int or ints; its first dimension is that of samples.
            device: the times' device; torch's default one, or the seed's, if None.
            generator: torch.Generator from which the seed comes; excludes ``seed``.
            seed: int64 tensor with one element, or an int.
            row_offset: int >= 0, the index of the first sample within the whole batch.

        Returns:
            Float32 times in [0, 1].
        """
        sizes = _shape(shape)
        check_row_offset(row_offset, sizes)
        place = None if device is None else check_device("device", device)
        return self.draw(sizes, as_seed(seed, place, generator), row_offset)


def draw_times(
    name: str,
    sampler: Any,
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | None,
    seed: Tensor | int | None,
    row_offset: int,
) -> Tensor:
    """Times of a sampler or of a function, checked; ``name`` is the caller's for it."""
    if isinstance(sampler, Sampler):
        times = sampler(shape, device, generator, seed=seed, row_offset=row_offset)
    elif not callable(sampler) or isinstance(sampler, type):
        raise type_error(name, "one of fm.times, or a function of (shape, device=, generator=)", sampler)
    elif seed is None and row_offset == 0:
        if not _takes(sampler, "device", "generator"):
            raise type_error(name, "one of fm.times, or a function of (shape, device=, generator=)", sampler)
        times = sampler(shape, device=device, generator=generator)
    else:
        # a generator's draws depend on how many were made before: only the function itself can tell rows apart
        if not _takes(sampler, "seed", "row_offset"):
            raise value_error(
                name,
                "one of fm.times, or a function with arguments seed and row_offset, where one is given or the data is "
                "a DTensor",
                sampler,
            )
        source = {"generator": generator} if seed is None else {"seed": seed}
        times = sampler(shape, device=device, row_offset=row_offset, **source)
    if not isinstance(times, Tensor):
        raise type_error(f"{name}(shape)", "a tensor", times)
    check_float_tensor(f"{name}(shape)", times)
    if times.shape != torch.Size(shape):
        raise value_error(f"{name}(shape)", f"times of the shape that was asked for, {tuple(shape)}", times)
    if times.device != device:
        raise value_error(f"{name}(shape)", f"times on {device}", times)
    return times


def _takes(function: Function, *names: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return set(names) <= set(parameters) or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


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
        """s = e^mu: diffusers' dynamic shifting, e^mu / (e^mu + 1/sigma - 1); mu from -80 to 80."""
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
        (max_seq_len, max_shift), as in diffusers' Flux pipeline; mu and both shifts from -80 to 80."""
        for name, value in (
            ("seq_len", seq_len),
            ("base_seq_len", base_seq_len),
            ("max_seq_len", max_seq_len),
        ):
            check_int(name, value, low=1, high=2**53)
        for name, shift in (("base_shift", base_shift), ("max_shift", max_shift)):
            check_number(name, shift, low=-80.0, high=80.0)
        if max_seq_len == base_seq_len:
            raise value_error("max_seq_len", f"another length than base_seq_len, {base_seq_len}", max_seq_len)
        slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
        return Shift.dynamic(base_shift + slope * (seq_len - base_seq_len))


@final
@dataclass(frozen=True)
class Shifted(Sampler):
    """Times of a sampler, shifted.

    Args:
        sampler: any time sampler.
        shift: a :class:`Shift`; use the same for the inference grid.
    """

    sampler: Sampler | Function
    shift: Shift

    def __post_init__(self) -> None:
        if not callable(self.sampler) or isinstance(self.sampler, type):
            raise type_error("sampler", "a time sampler", self.sampler)
        if not isinstance(self.shift, Shift):
            raise type_error("shift", "a Shift", self.shift)

    def __call__(
        self,
        shape: Shape,
        device: Device = None,
        generator: torch.Generator | None = None,
        *,
        seed: Tensor | int | None = None,
        row_offset: int = 0,
    ) -> Tensor:
        if isinstance(self.sampler, Sampler):
            return self.shift(self.sampler(shape, device, generator, seed=seed, row_offset=row_offset))
        check_row_offset(row_offset, _shape(shape))
        place = torch.empty((), device=None if device is None else check_device("device", device)).device
        return self.shift(draw_times("sampler", self.sampler, _shape(shape), place, generator, seed, row_offset))

    def draw(self, shape: tuple[int, ...], seed: Tensor, row_offset: int) -> Tensor:
        return self(shape, seed=seed, row_offset=row_offset)


@final
@dataclass(frozen=True)
class Uniform(Sampler):
    """Uniform times in [low, high).

    Args:
        low, high: 0 <= low < high <= 1, with a float32 number in [low, high).
        stratified: one time in each of n equal intervals of [low, high), in random order over the elements: (p(i) +
            u_i) / n, which lowers the variance of a batch's loss.
        size: the number of samples of the whole batch, of which a call draws those from its ``row_offset`` on, so that
            shards share the strata; None takes the call's own number. Only beside ``stratified``.
    """

    low: float = 0.0
    high: float = 1.0
    stratified: bool = False
    size: int | None = None

    def __post_init__(self) -> None:
        check_number("low", self.low, low=0.0, high=1.0)
        check_number("high", self.high, above=self.low, high=1.0)
        check_bool("stratified", self.stratified)
        if self.size is not None:
            check_int("size", self.size, low=1, high=None)
            if not self.stratified:
                raise value_error("size", "None but beside stratified=True", self.size)
        first, last = _float32_from(self.low), _float32_below(self.high)
        if first > last:
            raise value_error("high", f"a bound with a float32 number in [{self.low}, high)", self.high)
        object.__setattr__(self, "_ends", (first, last))

    def draw(self, shape: tuple[int, ...], seed: Tensor, row_offset: int) -> Tensor:
        u = _uniform(shape, seed, row_offset)
        if self.stratified:
            return self._stratified(u, seed, row_offset)
        if (self.low, self.high) == (0.0, 1.0):
            return u
        # rounding may reach beyond either end
        return (self.low + (self.high - self.low) * u).clamp(*self._ends)  # type: ignore[attr-defined]

    def _stratified(self, u: Tensor, seed: Tensor, row_offset: int) -> Tensor:
        row = math.prod(u.shape[1:])
        count, first = u.numel(), row_offset * row
        whole = count if self.size is None else self.size * row
        if self.size is None and row_offset > 0:
            raise value_error(
                "row_offset",
                "0 for stratified times, or Uniform(size=...) for the strata of the whole batch",
                row_offset,
            )
        if self.size is not None and first + count > whole:
            raise value_error("size", f"at least the {row_offset + u.shape[0]} samples that are drawn", self.size)
        # a permutation of the whole batch's strata that each shard makes for itself
        words = draw((whole,), kinds.WORDS, seed, TIME_STREAM + 1, 0, torch.int64)
        stratum = torch.argsort(words, stable=True)[first : first + count].reshape(u.shape).double()
        width = (self.high - self.low) / max(whole, 1)
        low, high = self.low + width * stratum, self.low + width * (stratum + 1.0)
        t = torch.minimum(self.low + width * (stratum + u.double()), high).to(torch.float32)
        # rounding may reach a neighbouring stratum, and the end
        t = torch.where(t.double() < low, torch.nextafter(t, torch.ones_like(t)), t)
        t = torch.where(t.double() >= high, torch.nextafter(t, torch.zeros_like(t)), t)
        return t.clamp(*self._ends)  # type: ignore[attr-defined]


def _float32_from(value: float) -> float:
    """The least float32 number that is not below a value in [0, 1]."""
    number = np.float32(value)
    return float(number if float(number) >= value else np.nextafter(number, np.float32(2.0)))


def _float32_below(value: float) -> float:
    """The largest float32 number below a value in (0, 1]."""
    number = np.float32(value)
    return float(number if float(number) < value else np.nextafter(number, np.float32(-1.0)))


@final
@dataclass(frozen=True)
class LogitNormal(Sampler):
    """1 - sigmoid(mean + std z): the noise level is logit-normal (Esser et al. 2024, eq. 19). A positive mean favours
    noise.

    diffusers' ``compute_density_for_timestep_sampling`` draws with its ``logit_mean`` a place among timesteps that
    descend from noise to data, so that there a positive mean favours data: its times are those of
    ``LogitNormal(-logit_mean, logit_std)``.

    Args:
        mean, std: of the noise level's logit; std > 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_number("mean", self.mean)
        check_number("std", self.std, above=0.0)

    def draw(self, shape: tuple[int, ...], seed: Tensor, row_offset: int) -> Tensor:
        return torch.sigmoid(-(self.mean + self.std * _normal(shape, seed, row_offset).double())).float()


@final
@dataclass(frozen=True)
class Mode(Sampler):
    """t = u + scale (cos^2(pi u / 2) - 1 + u), the noise level being 1 - t: sampling with a heavy middle (Esser et al.
    2024, eq. 20, with 1 - u in the place of u).

    Args:
        scale: -1 <= scale <= 2 / (pi - 2), where the map is monotone.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        check_number("scale", self.scale, low=-1.0, high=2.0 / (math.pi - 2.0))

    def draw(self, shape: tuple[int, ...], seed: Tensor, row_offset: int) -> Tensor:
        u = _uniform(shape, seed, row_offset)
        return (u + self.scale * (torch.cos(0.5 * math.pi * u).square() - 1.0 + u)).clamp(0.0, 1.0)


@final
@dataclass(frozen=True)
class CosMap(Sampler):
    """t = 1 / (tan(pi u / 2) + 1): times whose log SNR is that of the cosine schedule (Esser et al. 2024, eq. 21).

    The law is symmetric about 1/2.
    """

    def draw(self, shape: tuple[int, ...], seed: Tensor, row_offset: int) -> Tensor:
        angle = 0.5 * math.pi * _uniform(shape, seed, row_offset)
        # cos / (sin + cos) has no pole
        return torch.cos(angle) / (torch.sin(angle) + torch.cos(angle))


@final
@dataclass(frozen=True)
class UShaped(Sampler):
    """Density proportional to cosh(a (2t - 1)), favouring both ends.

    Lee et al. 2024, "Improving the training of rectified flows", section 4.1: e^(au) + e^(-au) on [-1, 1].

    Drawn by inversion: t = 1/2 + asinh((2u - 1) sinh a) / (2a).

    Args:
        a: > 0 and at most 80 (sinh a must be a float32); the larger, the more weight at the ends.
    """

    a: float = 4.0

    def __post_init__(self) -> None:
        check_number("a", self.a, above=0.0, high=80.0)

    def draw(self, shape: tuple[int, ...], seed: Tensor, row_offset: int) -> Tensor:
        u = _uniform(shape, seed, row_offset)
        return (0.5 + torch.asinh((2.0 * u - 1.0) * math.sinh(self.a)) / (2.0 * self.a)).clamp(0.0, 1.0)


@final
@dataclass(frozen=True)
class Beta(Sampler):
    """t = 1 - (offset + scale beta) with beta ~ Beta(a, b): by default pi0's times.

    Black et al. 2024, appendix B; openpi draws the noise level 0.999 Beta(1.5, 1) + 0.001.

    Drawn by inversion where b = 1, else from two gamma variates.

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

    def draw(self, shape: tuple[int, ...], seed: Tensor, row_offset: int) -> Tensor:
        if self.b == 1.0:  # the law's distribution function is x^a
            beta = (1.0 - _uniform(shape, seed, row_offset)).double() ** (1.0 / self.a)
        else:  # x / (x + y), by logarithms: gammas of small parameters underflow
            x, y = _log_gammas((self.a, self.b), shape, seed, row_offset)
            beta = torch.sigmoid(x - y)
        return (1.0 - (self.offset + self.scale * beta)).clamp(0.0, 1.0).float()


_ATTEMPTS = 8


def _log_gammas(parameters: tuple[float, ...], shape: tuple[int, ...], seed: Tensor, row_offset: int) -> list[Tensor]:
    """Logarithms of gamma variates, one tensor for each parameter.

    Marsaglia and Tsang 2000, "A simple method for generating gamma variables", with a fixed number of attempts, so that
    an element's variate depends on its place alone; each attempt succeeds with 95 % or more, and where all fail (once
    in 10^10) the law's mode is taken. Parameters below 1 are raised by 1 and their variate multiplied by u^(1/a).
    """
    sizes = (*shape, len(parameters), _ATTEMPTS)
    normals = _normal(sizes, seed, row_offset).double().unbind(-2)
    uniforms = torch.log((1.0 - _uniform(sizes, seed, row_offset, TIME_STREAM + 1)).double()).unbind(-2)
    boosts = (1.0 - _uniform((*shape, len(parameters)), seed, row_offset, TIME_STREAM + 2)).double().log().unbind(-1)
    results = []
    for a, z, log_u, boost in zip(parameters, normals, uniforms, boosts, strict=True):
        d = (a + 1.0 if a < 1.0 else a) - 1.0 / 3.0
        v = 1.0 + z / math.sqrt(9.0 * d)
        log_v = 3.0 * torch.log(v.clamp(min=torch.finfo(torch.float32).tiny))
        accepted = (v > 0.0) & (log_u < 0.5 * z.square() + d * (1.0 - v**3 + log_v))
        first = accepted.int().argmax(-1, keepdim=True)
        value = math.log(d) + torch.where(accepted.any(-1), log_v.gather(-1, first).squeeze(-1), 0.0)
        results.append(value + boost / a if a < 1.0 else value)
    return results
