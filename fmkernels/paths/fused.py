"""The built-in schedules at many times in one launch, where nobody differentiates or traces them.

csrc/schedule has the formulas of :mod:`fmkernels.paths.affine` once more, for one time; python/schedule.cpp takes what
is plain (a contiguous tensor of times without a gradient, numbers as parameters) and leaves the rest to them.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor

from .. import _dispatch
from ..ops._operands import Coefficient
from ..random import first_element
from .schedule import Kernel, Schedule

ALPHA, SIGMA, D_ALPHA, D_SIGMA = range(4)
_FORMULAS = frozenset(
    ("alpha", "sigma", "d_alpha", "d_sigma", "integral", "d_integral", "gamma", "d_gamma", "interpolation_coefficients")
)
# The compiled library takes no more of a CPU's numbers in one call.
_MOST = 1 << 20


@final
class Table(NamedTuple):
    """A schedule's values at times, and what they were made of."""

    kernel: Kernel
    t: Tensor
    version: int | None  # of t; None: inference tensors, whose changes nobody counts and autograd does not save
    values: Tensor  # (4, *t.shape)

    def row(self, place: int) -> Coefficient:
        number = self.kernel.numbers[place]
        return self.values.select(0, place) if number is None else number

    def interpolation(self) -> tuple[Coefficient, Coefficient, None]:
        return self.row(ALPHA), self.row(SIGMA), None

    def fits(self, kernel: Kernel, t: Tensor) -> bool:
        if self.t is not t or t.requires_grad:  # a gradient asked for since is of the formulas
            return False
        return self.version is not None and self.version == t._version and self.kernel == kernel


def _table(kernel: Kernel, t: Tensor, values: Tensor) -> Table:
    return Table(kernel, t, None if values.is_inference() or t.is_inference() else t._version, values)


def _kernel_of(schedule: Schedule) -> Kernel | None:
    """A subclass of one of ours has formulas of its own, and so has an object that was given some."""
    ours = "_kernel" in vars(type(schedule)) and _FORMULAS.isdisjoint(vars(schedule))
    return schedule._kernel() if ours else None


def at(schedule: Schedule, t: Tensor, impl: str) -> Table | None:
    """The table at given times, or None where their own formulas must do."""
    kernel = _kernel_of(schedule)
    if kernel is None or (library := _dispatch.plain_library(impl)) is None:
        return None
    values = library.schedule_plain(t, kernel.code, kernel.a, kernel.b)
    if values is None and t.is_cpu and t.numel() > _MOST and t.is_contiguous():  # the same numbers as those of shards
        parts = [library.schedule_plain(part, kernel.code, kernel.a, kernel.b) for part in t.view(-1).split(_MOST)]
        if all(part is not None for part in parts):
            values = torch.cat(parts, 1).view(4, *t.shape)
    return None if values is None else _table(kernel, t, values)


def draw(
    schedule: Schedule,
    shape: tuple[int, ...],
    seed: Tensor,
    stream: int,
    row_offset: int,
    dtype: torch.dtype,
    impl: str,
) -> Table | None:
    """The same at uniform times, drawn as :func:`fmkernels.rand` draws float32 ones."""
    kernel = _kernel_of(schedule)
    if kernel is None or (library := _dispatch.plain_library(impl)) is None:
        return None
    offset = first_element(row_offset, shape) if row_offset else 0
    drawn = library.drawn_schedule_plain(shape, seed, stream, offset, dtype, kernel.code, kernel.a, kernel.b)
    return None if drawn is None else _table(kernel, *drawn)


def derivatives(
    schedule: Schedule, t: Tensor, known: Table | None, impl: str
) -> tuple[Coefficient, Coefficient] | None:
    """(d alpha / dt, d sigma / dt), from a table that is there already if it is of this schedule and these times."""
    kernel = _kernel_of(schedule)
    if kernel is None or _dispatch.plain_library(impl) is None:
        return None
    d_alpha, d_sigma = kernel.numbers[D_ALPHA], kernel.numbers[D_SIGMA]
    if d_alpha is not None and d_sigma is not None:
        return d_alpha, d_sigma
    table = known if known is not None and known.fits(kernel, t) else at(schedule, t, impl)
    return None if table is None else (table.row(D_ALPHA), table.row(D_SIGMA))
