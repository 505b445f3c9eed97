"""Sampling a probability path: noise, time and x_t in one pass, and what the loss needs, without the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from .._checks import check_float_tensor, check_number, leading_shape, type_error, value_error
from ..ops._operands import Coefficient, Operand
from ..ops.combine.op import combine
from ..ops.interpolate.op import interpolate
from . import targets
from .schedule import Schedule

TimeSampler = Callable[..., Tensor]

# Whether drawn noise is written out for the loss by default, or drawn again there. On a CPU benchmarks/results show
# storing to be faster (implementations native-stored and native-redrawn). On CUDA devices it is not measured; there
# drawing again moves fewer bytes and keeps one tensor less.
STORE_NOISE = {"cpu": True}


@final
class Batch:
    """A sample of a probability path: what a training step feeds to the model and to :func:`fmkernels.cfm_loss`.

    Attributes:
        x_t: the point on the path, of x_1's shape and dtype.
        t: times, float32 (float64 for float64 data), (B,) or the shape that was given; 0 is noise, 1 is data.
        x_1: the data.
        path: the path that was sampled.
        source: x_0 as a tensor, or as :class:`fmkernels.Noise` where it was drawn and not stored.
        bridge: the noise z of a path with a gamma term, likewise; else None.
    """

    __slots__ = ("bridge", "path", "source", "t", "x_1", "x_t")

    def __init__(
        self, x_t: Tensor, t: Tensor, x_1: Tensor, path: Schedule, source: Operand, bridge: Operand | None
    ) -> None:
        self.x_t, self.t, self.x_1, self.path, self.source, self.bridge = x_t, t, x_1, path, source, bridge

    @property
    def x_0(self) -> Tensor:
        """The source sample as a tensor; noise that was not stored is drawn again, the same numbers."""
        return self._tensor(self.source)

    @property
    def z(self) -> Tensor | None:
        """The noise of the gamma term as a tensor; None for a path without one."""
        return None if self.bridge is None else self._tensor(self.bridge)

    def target(self, target: str = "velocity", **parameters: float) -> Tensor:
        """The regression target as a tensor: what :func:`fmkernels.cfm_loss` compares with, without forming it."""
        _, operands, coefficients = target_terms(
            self.path, self.t, target, self.x_1, self.source, self.bridge, **parameters
        )
        if isinstance(operands[0], Tensor):
            return combine(operands, coefficients)
        return combine([self.x_1, *operands], [0.0, *coefficients])

    def _tensor(self, operand: Operand) -> Tensor:
        if isinstance(operand, Tensor):
            return operand
        return combine([torch.zeros_like(self.x_1), operand], [0.0, 1.0])

    def __repr__(self) -> str:
        return f"Batch(x_t={tuple(self.x_t.shape)} {self.x_t.dtype}, t={tuple(self.t.shape)}, path={self.path!r})"


def target_terms(
    path: Schedule,
    t: Tensor,
    target: str,
    x_1: Operand,
    x_0: Operand | None,
    z: Operand | None,
    **parameters: float,
) -> tuple[list[str], list[Operand], list[Coefficient]]:
    """Names, operands and coefficients of a target, leaving out the operands that its coefficients do not need."""
    names: list[str] = []
    operands: list[Operand] = []
    coefficients: list[Coefficient] = []
    c_1, c_0, c_z = targets.coefficients(path, t, target, **parameters)
    for name, operand, coefficient in (("x_1", x_1, c_1), ("x_0", x_0, c_0), ("z", z, c_z)):
        if coefficient is None or (type(coefficient) is float and coefficient == 0.0):
            continue
        if operand is None:
            raise type_error(name, f"a tensor or fm.Noise for the target {target!r} of {path!r}", operand)
        names.append(name)
        operands.append(operand)
        coefficients.append(coefficient)
    return names, operands, coefficients


def as_times(t: Tensor | float, data_name: str, data: Tensor, checks: bool) -> Tensor:
    """Times as a float32 (float64 for float64 data) tensor whose shape is a leading part of the data's."""
    dtype = torch.float64 if data.dtype is torch.float64 else torch.float32
    if not isinstance(t, Tensor):
        check_number("t", t, low=0.0, high=1.0)
        return torch.full(data.shape[:1], float(t), dtype=dtype, device=data.device)
    if t.dtype is not dtype:
        check_float_tensor("t", t)
    leading_shape("t", t, data_name, data)
    if checks and not bool(((t >= 0) & (t <= 1)).all()):  # a NaN fails both
        raise value_error("t", "finite times in [0, 1]", t)
    return t if t.dtype is dtype else t.to(dtype)


def sample(
    path: Schedule,
    x_1: Tensor,
    x_0: Operand | None = None,
    t: Tensor | float | None = None,
    *,
    z: Operand | None = None,
    generator: torch.Generator | None = None,
    time_sampler: TimeSampler | None = None,
    row_offset: int = 0,
    store_noise: bool | None = None,
    checks: bool = False,
    impl: str = "auto",
) -> Batch:
    r"""Samples the path: :math:`x_t = \alpha_t x_1 + \sigma_t x_0 (+ \gamma_t z)`; draws what is not given.

    Args:
        x_1: data, shape (B, ...), floating.
        x_0: source samples of x_1's shape and dtype; None draws standard normal noise in the kernel.
        t: times in [0, 1]: a number, or a tensor whose shape is a leading part of x_1's: (B,), or (B, T) for a time
            a token. None draws them: uniform, or by ``time_sampler``.
        z: the noise of a gamma term; None draws it.
        generator: torch.Generator for all that is drawn; torch's default one if None.
        time_sampler: one of :mod:`fmkernels.times`, or any function (shape, device=, generator=) to times.
        row_offset: the index of the first sample within a larger batch, for drawn noise: its shards, with one seed,
            draw what the whole batch would.
        store_noise: write drawn noise out for the loss (True), or draw it again there (False); None takes what was
            measured to be faster.
        checks: also check that t is finite and in [0, 1] (waits for the device).
        impl: "auto", "reference", "native" or "triton".

    Returns:
        Batch: x_t, t and what the loss needs.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    check_float_tensor("x_1", x_1)
    if x_1.dim() == 0:
        raise value_error("x_1", "at least one dimension, of samples", x_1)
    if t is None:
        shape = x_1.shape[:1]
        if time_sampler is None:
            t = torch.rand(shape, dtype=torch.float32, device=x_1.device, generator=generator)
        else:
            t = time_sampler(shape, device=x_1.device, generator=generator)
    elif time_sampler is not None:
        raise ValueError("t, time_sampler: expected at most one of them, got both")
    t = as_times(t, "x_1", x_1, checks)
    alpha, sigma, gamma = path.interpolation_coefficients(t)
    if gamma is None and z is not None:
        raise value_error("z", f"None, as {path!r} has no gamma term", z)
    point = interpolate(
        x_1,
        x_0,
        alpha=alpha,
        sigma=sigma,
        gamma=gamma,
        z=z,
        generator=generator,
        row_offset=row_offset,
        store_noise=STORE_NOISE.get(x_1.device.type, False) if store_noise is None else store_noise,
        impl=impl,
    )
    return Batch(point.x_t, t, x_1, path, point.x_0, point.z)
