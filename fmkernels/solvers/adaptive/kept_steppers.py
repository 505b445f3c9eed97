"""Steppers of small CPU solves, kept for the next solve of the same kind: making one costs more than its steps."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

from ...ops.step_control.op import Clock
from ..methods.tableaus import Tableau
from .native_stepper import runs_natively
from .rows import Batch, Problem, without_function
from .stepper import Stepper

MAX_ELEMENTS = 1 << 14
MAX_KEPT = 16


class Kept(NamedTuple):
    """A stepper with its batch, and the control as it was at the start of the interval."""

    stepper: Stepper
    batch: Batch
    interval: tuple[float, float]
    clock: Tensor
    tableau: Tableau  # alive, as it is kept under its id


_KEPT: dict[Hashable, Kept] = {}


def key_of(problem: Problem, y0: Tensor, rows: int) -> Hashable:
    """What a stepper was made for, or None where none is kept."""
    if not (y0.is_cpu and 0 < y0.numel() <= MAX_ELEMENTS and y0.is_contiguous() and runs_natively(problem, y0)):
        return None
    numbers = (problem.rules, problem.atol, problem.rtol, problem.shared, problem.scalar_time, problem.time_dtype)
    return (id(problem.tableau), *numbers, problem.impl, y0.shape, y0.dtype, rows)


def take(key: Hashable, problem: Problem, y0: Tensor, interval: tuple[float, float], kwargs: dict) -> Kept | None:
    """A kept stepper, at the start of a new solve; it is kept no more until :func:`put`."""
    kept = None if key is None else _KEPT.pop(key, None)
    if kept is None:
        return None
    stepper, batch, before, clock, tableau = kept
    if before != interval:
        clock[Clock.T] = clock[Clock.T_FROM] = interval[0]
        clock[Clock.T_END] = interval[1]
    batch.clock.copy_(clock)
    batch.count.zero_()
    batch.y.copy_(y0)
    batch.kwargs = kwargs
    stepper.problem, stepper.running = problem, None
    return Kept(stepper, batch, interval, clock, tableau)


def put(key: Hashable, kept: Kept) -> None:
    """Keeps a stepper, without the function that it solved for."""
    if len(_KEPT) >= MAX_KEPT:
        _KEPT.pop(next(iter(_KEPT)), None)
    kept.batch.kwargs = {}
    kept.stepper.problem = without_function(kept.stepper.problem)
    _KEPT[key] = kept
