"""Steppers of small CPU solves, kept for the next solve of the same kind: making one costs more than its steps."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..._cache import Cache
from ...ops.step_control.op import Clock
from .native_stepper import runs_natively
from .rows import Batch, Problem, without_function
from .stepper import Stepper

MAX_ELEMENTS = 1 << 14


class Kept(NamedTuple):
    """A stepper with its batch, and the control as it was at the start of the interval."""

    stepper: Stepper
    batch: Batch
    interval: tuple[float, float]
    clock: Tensor

    @property
    def kept_bytes(self) -> int:
        y, stages = self.batch.y, self.stepper.problem.tableau.stages
        return 16_384 + (stages + 4) * y.numel() * y.element_size() + 8 * (stages + 40) * self.batch.rows


_STEPPERS: Cache[Kept] = Cache("stepper")


def key_of(problem: Problem, y0: Tensor, rows: int) -> Hashable | None:
    """What a stepper was made for, or None where none is kept."""
    if not (
        _native.on_host(y0) and 0 < y0.numel() <= MAX_ELEMENTS and y0.is_contiguous() and runs_natively(problem, y0)
    ):
        return None
    if torch.is_inference_mode_enabled():  # its tensors could not be written to later
        return None
    numbers = (problem.rules, problem.atol, problem.rtol, problem.shared, problem.scalar_time, problem.time_dtype)
    return (problem.tableau.cache_key, *numbers, problem.impl, y0.shape, y0.dtype, rows)


def take(
    key: Hashable | None, problem: Problem, y0: Tensor, interval: tuple[float, float], kwargs: dict[str, Any]
) -> Kept | None:
    """A kept stepper, at the start of a new solve; it is kept no more until :func:`put`."""
    kept = _STEPPERS.pop(key)
    if kept is None:
        return None
    stepper, batch, before, clock = kept
    if before != interval:
        clock[Clock.T] = clock[Clock.T_FROM] = interval[0]
        clock[Clock.T_END] = interval[1]
    batch.clock.copy_(clock)
    batch.count.zero_()
    batch.y.copy_(y0)
    batch.kwargs = kwargs
    stepper.problem, stepper.running = problem, None
    return Kept(stepper, batch, interval, clock)


def put(key: Hashable, kept: Kept) -> None:
    """Keeps a stepper, without the function that it solved for."""
    kept.batch.kwargs = {}
    kept.stepper.problem = without_function(kept.stepper.problem)
    _STEPPERS.keep(key, kept)
