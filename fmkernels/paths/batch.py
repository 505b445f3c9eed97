"""Sampling a probability path: noise, time and x_t in one pass, and what the loss needs, without the target."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from .._checks import (
    check_bool,
    check_device,
    check_float_tensor,
    check_int,
    check_like,
    check_number,
    leading_shape,
    type_error,
    value_error,
)
from .._torch import assert_while_running, compiling, constant_while_compiling
from ..ops._operands import Coefficient, Operand
from ..ops._sharded import common_seed, is_sharded
from ..ops.combine.op import combine
from ..ops.interpolate.op import X_0_STREAM, Z_STREAM, interpolate
from ..ops.random import kinds
from ..ops.random.op import draw
from ..random import Noise, as_seed, check_noise
from ..times import TIME_STREAM, Sampler, check_row_offset, draw_times
from . import fused, targets
from .derivatives import filled
from .schedule import Schedule

TimeSampler = Sampler | Callable[..., Tensor]


def stores_noise(dtype: torch.dtype, architecture: int | None) -> bool:
    """Whether drawn noise is written out for the loss by default, or drawn again there.

    On a CPU benchmarks/results show storing to be faster (implementations native-stored and native-redrawn). On CUDA
    devices it is not measured; by the model of docs/performance.md drawing again is, but for half precision from sm_100
    on, whose memory is faster. It keeps one tensor less.

    Args:
        architecture: of a CUDA device, 90 for sm_90; None for a CPU.
    """
    return architecture is None or (architecture >= 100 and dtype.itemsize == 2)


@constant_while_compiling
@functools.cache
def _stores_noise_on(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return stores_noise(dtype, 10 * major + minor)


@final
class Batch:
    """A sample of a probability path: what a training step feeds to the model and to :func:`fmkernels.cfm_loss`.

    It holds the tensors that it was made of, not copies. The loss reads them again: it raises a RuntimeError where one
    was written to meanwhile, as autograd does (not what torch.compile traces).

    Attributes:
        x_t: the point on the path, of x_1's shape and dtype.
        t: times, float32 (float64 for float64 data), (B,) or the shape that was given; 0 is noise, 1 is data.
        x_1: the data.
        path: the path that was sampled.
        source: x_0 as a tensor, or as :class:`fmkernels.Noise` where it was drawn and not stored.
        bridge: the noise z of a path with a gamma term, likewise; else None.
    """

    __slots__ = ("_table", "_versions", "bridge", "path", "source", "t", "x_1", "x_t")

    def __init__(
        self, x_t: Tensor, t: Tensor, x_1: Tensor, path: Schedule, source: Operand, bridge: Operand | None = None
    ) -> None:
        check_float_tensor("x_1", x_1)
        if x_1.dim() == 0:
            raise value_error("x_1", "at least one dimension, of samples", x_1)
        check_like("x_t", x_t, "x_1", x_1)
        check_float_tensor("t", t)
        if not isinstance(path, Schedule):
            raise type_error("path", "a path of fm.paths", path)
        for name, operand in (("source", source), ("bridge", bridge)):
            if isinstance(operand, Tensor):
                check_like(name, operand, "x_1", x_1)
            elif operand is not None or name == "source":
                check_noise(name, operand, "x_1", x_1)
        self.x_t, self.t, self.x_1, self.path = x_t, as_times(t, "x_1", x_1, False), x_1, path
        self.source, self.bridge = source, bridge
        self._table: fused.Table | None = None
        self._versions = self._present()

    @classmethod
    def _of(
        cls,
        x_t: Tensor,
        t: Tensor,
        x_1: Tensor,
        path: Schedule,
        source: Operand,
        bridge: Operand | None,
        table: fused.Table | None = None,
    ) -> Batch:
        """A batch of what is known to fit; ``table``: of its path at its times, for the loss."""
        batch = cls.__new__(cls)
        batch.x_t, batch.t, batch.x_1, batch.path, batch.source, batch.bridge = x_t, t, x_1, path, source, bridge
        batch._table = table
        batch._versions = batch._present()
        return batch

    def _present(self) -> tuple[int, ...] | None:
        """The versions of the tensors, which inference tensors do not have, nor those that torch.compile traces."""
        if compiling() or torch.is_inference_mode_enabled():
            return None
        source, bridge = self.source, self.bridge
        try:
            return (
                self.t._version,
                self.x_1._version,
                source._version if isinstance(source, Tensor) else 0,
                bridge._version if isinstance(bridge, Tensor) else 0,
            )
        except RuntimeError:
            return None

    def check_unwritten(self) -> None:
        """That what the batch was made of is as it was then.

        Raises:
            RuntimeError: it was written to.
        """
        if self._versions is None:
            return
        present = self._present()
        if present is not None and present != self._versions:
            changed = zip(("t", "x_1", "x_0", "z"), self._versions, present, strict=True)
            names = ", ".join(name for name, before, now in changed if before != now)
            raise RuntimeError(
                f"batch: expected {names} as it was when the path was sampled, but it was written to (an in-place "
                "operation) or replaced; the loss reads it again: clone it first"
            )

    def __getstate__(self) -> tuple[Any, ...]:
        self.check_unwritten()
        return self.x_t, self.t, self.x_1, self.path, self.source, self.bridge

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.x_t, self.t, self.x_1, self.path, self.source, self.bridge = state
        self._table = None
        self._versions = self._present()

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
        self.check_unwritten()
        _, operands, coefficients = target_terms(
            self.path, self.t, target, self.x_1, self.source, self.bridge, self._table, "auto", **parameters
        )
        return combine([self._tensor(operand) for operand in operands], coefficients)

    def __len__(self) -> int:
        """The number of samples."""
        return self.x_1.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """Some of the samples, as views: ``batch[i:j]``, a micro-batch. Noise that was not stored is drawn again as it
        was, by its place in the whole batch; it must be stored for an index that is no slice of step 1.

        Args:
            index: a slice, or a 1-D tensor of integers or booleans over the samples.
        """
        self.check_unwritten()
        if isinstance(index, Tensor):
            if index.dim() != 1 or index.is_floating_point() or index.is_complex():
                raise value_error("index", "a slice, or a 1-D tensor of integers or booleans", index)
            first = None
        elif isinstance(index, slice):
            if isinstance(index.step, int) and index.step <= 0:
                raise value_error("index", "a slice of positive step", index)
            first, _, step = index.indices(len(self))
            first = first if step == 1 else None
        else:
            raise type_error("index", "a slice, or a 1-D tensor of integers or booleans", index)

        def cut(operand: Operand) -> Operand:
            if isinstance(operand, Tensor):
                return operand[index]
            if first is None:
                raise value_error("index", "a slice of step 1, as noise was not stored (store_noise=True)", index)
            return Noise._of(operand.seed, operand.stream, operand.row_offset + first)

        source, bridge = cut(self.source), None if self.bridge is None else cut(self.bridge)
        t = self.t if self.t.dim() == 0 else self.t[index]
        return Batch._of(self.x_t[index], t, self.x_1[index], self.path, source, bridge)

    __iter__ = None  # a batch has no sample by number

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of ``size`` samples, the last one of what is left."""
        check_int("size", size, low=1, high=None)
        return [self[first : first + size] for first in range(0, len(self), size)]

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Batch:
        """The batch on a device; what is there already is shared, not copied. The path stays what it is.

        Args:
            device: where to.
            non_blocking: copy asynchronously from pinned memory.
        """
        place = check_device("device", device)
        check_bool("non_blocking", non_blocking)
        return self._map(lambda tensor: tensor.to(place, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch.utils.data.DataLoader(pin_memory=True) calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        self.check_unwritten()

        def moved(operand: Operand) -> Operand:
            if isinstance(operand, Tensor):
                return function(operand)
            return Noise._of(function(operand.seed), operand.stream, operand.row_offset)

        bridge = None if self.bridge is None else moved(self.bridge)
        tensors = function(self.x_t), function(self.t), function(self.x_1)
        return Batch._of(*tensors, self.path, moved(self.source), bridge)

    def _tensor(self, operand: Operand) -> Tensor:
        if isinstance(operand, Tensor):
            return operand
        return combine([torch.zeros_like(self.x_1), operand], [0.0, 1.0])

    def __repr__(self) -> str:
        parts = [f"{name}={_short(getattr(self, name))}" for name in ("x_t", "t", "x_1", "source", "bridge")]
        return f"Batch({', '.join(parts)}, path={self.path!r}, device={self.x_1.device})"


def _short(value: Operand | None) -> str:
    """An operand for a repr: its dtype and shape, not its numbers."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return "None" if value is None else f"Noise(stream={value.stream}, row_offset={value.row_offset})"


def target_terms(
    path: Schedule,
    t: Tensor,
    target: str,
    x_1: Operand,
    x_0: Operand | None,
    z: Operand | None,
    table: fused.Table | None = None,
    impl: str = "auto",
    **parameters: float,
) -> tuple[list[str], list[Operand], list[Coefficient]]:
    """Names, operands and coefficients of a target, leaving out the operands that its coefficients do not need."""
    names: list[str] = []
    operands: list[Operand] = []
    coefficients: list[Coefficient] = []
    plain = type(target) is str and target == "velocity" and not parameters
    known = fused.derivatives(path, t, table, impl) if plain else None
    c_1, c_0, c_z = targets.coefficients(path, t, target, **parameters) if known is None else (*known, None)
    for name, operand, coefficient in (("x_1", x_1, c_1), ("x_0", x_0, c_0), ("z", z, c_z)):
        if coefficient is None or (type(coefficient) is float and coefficient == 0.0):
            continue
        if operand is None:
            raise type_error(name, f"a tensor or fm.Noise for the target {target!r} of {path!r}", operand)
        names.append(name)
        operands.append(operand)
        coefficients.append(coefficient)
    if not operands:  # a target that is 0 throughout
        return ["x_1"], [x_1], [0.0]
    return names, operands, coefficients


def as_times(t: Tensor | float, data_name: str, data: Tensor, checks: bool, name: str = "t") -> Tensor:
    """Times as a float32 (float64 for float64 data) tensor whose shape is a leading part of the data's."""
    dtype = torch.float64 if data.dtype is torch.float64 else torch.float32
    if not isinstance(t, Tensor):
        if not torch.compiler.is_compiling():  # there a number may be symbolic: it has no value to check
            check_number(name, t, low=0.0, high=1.0)
        return filled(t, data.shape[:1], dtype, data.device)
    if t.dtype is not dtype:
        check_float_tensor(name, t)
    leading_shape(name, t, data_name, data)
    if checks:
        check_times(name, t)
    return t if t.dtype is dtype else t.to(dtype)


def check_times(name: str, t: Tensor) -> None:
    """Raises for times that are not finite or not in [0, 1]; waits for the device.

    Under torch.compile the compiled code raises a RuntimeError.
    """
    inside = ((t >= 0) & (t <= 1)).all()  # a NaN fails both
    if torch.compiler.is_compiling():
        assert_while_running(inside, f"{name}: expected finite times in [0, 1]")
    elif not bool(inside):
        raise value_error(name, "finite times in [0, 1]", t)


def sample(
    path: Schedule,
    x_1: Tensor,
    x_0: Operand | None = None,
    t: Tensor | float | None = None,
    *,
    z: Operand | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | int | None = None,
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
        generator: torch.Generator on x_1's device for all that is drawn; torch's default one if None.
        seed: in the place of a generator: an int, or an int64 tensor with one element on x_1's device (see
            :func:`fmkernels.draw_seed`). Streams 0 and 1 of it are x_0 and z, those from 2 on times.
        time_sampler: one of :mod:`fmkernels.times`, or any function (shape, device=, generator=) to times; beside
            ``seed`` or ``row_offset`` one that takes these too.
        row_offset: the index of the first sample within a larger batch: its shards, with one seed or equally seeded
            generators, draw together the noise and the times that the whole batch would.
        store_noise: write drawn noise out for the loss (True), or draw it again there (False); None takes what is
            faster: measured on CPUs, modelled for CUDA devices.
        checks: also check that t is finite and in [0, 1] (waits for the device).
        impl: "auto", "reference", "native" or "triton".

    Returns:
        Batch: x_t, t and what the loss needs.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; or a seed or a row_offset where
            nothing is drawn.
    """
    check_float_tensor("x_1", x_1)
    if x_1.dim() == 0:
        raise value_error("x_1", "at least one dimension, of samples", x_1)
    if type(row_offset) is not int or row_offset != 0:
        check_row_offset(row_offset, x_1.shape)
    if type(checks) is not bool:
        check_bool("checks", checks)
    device = x_1.device
    if store_noise is None:
        store_noise = stores_noise(x_1.dtype, None) if x_1.is_cpu else _stores_noise_on(device, x_1.dtype)
    elif type(store_noise) is not bool:
        check_bool("store_noise", store_noise)
    source = None if seed is None else as_seed(seed, device, generator)
    if source is seed and source is not None and not store_noise:
        source = source.detach().clone()  # the loss reads it again, when the caller's may hold another value
    drawn, table = t is None, None
    if t is not None:
        if time_sampler is not None:
            raise ValueError("t, time_sampler: expected at most one of them, got both")
        t = as_times(t, "x_1", x_1, checks)
    elif time_sampler is not None:
        of_times = source
        if source is None and is_sharded(x_1):  # what each rank draws alone would not be one batch
            of_times = common_seed(x_1, generator)
        rng = generator if of_times is None else None
        t = draw_times("time_sampler", time_sampler, x_1.shape[:1], device, rng, of_times, row_offset)
        t = as_times(t, "x_1", x_1, checks, "time_sampler(shape)")
    else:
        source = common_seed(x_1, generator) if source is None else source
        shape, wide = x_1.shape[:1], x_1.dtype is torch.float64
        dtype = torch.float64 if wide else torch.float32
        table = fused.draw(path, shape, source, TIME_STREAM, row_offset, dtype, impl)
        if table is not None:
            t = table.t
        else:
            t = draw(shape, kinds.UNIFORM, source, TIME_STREAM, row_offset, torch.float32)
            t = t.double() if wide else t
    table = fused.at(path, t, impl) if table is None else table
    alpha, sigma, gamma = path.interpolation_coefficients(t) if table is None else table.interpolation()
    if gamma is None and z is not None:
        raise value_error("z", f"None, as {path!r} has no gamma term", z)
    if x_0 is None or (gamma is not None and z is None):
        source = common_seed(x_1, generator) if source is None else source
        x_0 = Noise._of(source, X_0_STREAM, row_offset) if x_0 is None else x_0
        z = Noise._of(source, Z_STREAM, row_offset) if gamma is not None and z is None else z
    elif not drawn and (seed is not None or row_offset > 0):
        name, value, none = ("row_offset", row_offset, 0) if seed is None else ("seed", seed, None)
        raise value_error(name, f"{none} where nothing is drawn: x_0 and t are given", value)
    point = interpolate(
        x_1,
        x_0,
        alpha=alpha,
        sigma=sigma,
        gamma=gamma,
        z=z,
        store_noise=store_noise,
        impl=impl,
    )
    return Batch._of(point.x_t, t, x_1, path, point.x_0, point.z, table)
