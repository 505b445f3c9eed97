"""Solves that end at an event: the time at which a function of time and state first changes its sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._checks import check_number, type_error, value_error
from ...ops.step_control.op import Status
from ...paths import CondOT
from ..adaptive.options import AdaptiveOptions
from ..adaptive.solve import solve_adaptive
from ..adaptive.stepper import AdaptiveStep
from ..methods import registry as methods
from ..methods.runge_kutta import RungeKutta
from ..methods.tableaus import Tableau
from ..programs.builder import Builder, Method
from ..programs.expressions import Number
from ..programs.run import OnStep
from .options import adaptive_options, check_options, interp_of, named_method, segments
from .outputs import DenseBuilder, linear_or_hermite, value_of
from .packed import Packed
from .solves import needs_gradient, new_run, numbers_of, replayed, run_program, watcher

EventFn = Callable[[Tensor, Any], Tensor]
# Steps of a fixed grid without an event before the search gives up, as in torchdiffeq.
MAX_STEPS = 20_000
_FIRST_CHUNK = 64


class Crossing:
    """Events as one number: positive before the first of them changes its sign.

    Each value of event_fn(t, y) is taken with its initial sign; their smallest is the number.
    """

    def __init__(self, packed: Packed, event_fn: EventFn, t0: Tensor) -> None:
        self.packed, self.event_fn = packed, event_fn
        with torch.no_grad():
            self.signs = self._values(t0, packed.y0).sign()

    def _values(self, t: Tensor, y: Tensor) -> Tensor:
        values = self.event_fn(t, self.packed.unpack(y))
        if not isinstance(values, Tensor) or values.numel() == 0:
            raise type_error("event_fn", "a tensor of at least one value from event_fn(t, y)", values)
        return values

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return (self._values(t, y) * self.signs).min()

    def before(self, t: float, y: Tensor) -> bool:
        """Whether the event is still to come."""
        return bool(self(torch.tensor(t, dtype=torch.float64, device=y.device), y) > 0.0)

    def bisect(self, state: Callable[[float], Tensor], start: float, end: float, tolerance: float) -> float:
        """The event time between start, before it, and end, after it: their interval halved down to the tolerance."""
        while abs(end - start) > tolerance:
            middle = 0.5 * (start + end)
            if middle in (start, end):
                break
            if self.before(middle, state(middle)):
                start = middle
            else:
                end = middle
        return 0.5 * (start + end)


def solve_event(
    packed: Packed,
    t: Tensor,
    event_fn: EventFn,
    *,
    rtol: float | Sequence[float],
    atol: float | Sequence[float],
    method: Any,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """``odeint`` with an event.

    Args:
        packed: state and right-hand side.
        t: (2,), the initial time and any later one in the direction of the solve.
        event_fn: (t, y) to a tensor; the solve ends where the first of its values changes its sign.
        rtol, atol, method, options: of :func:`fmkernels.odeint`. The event time is found to the smallest atol.

    Returns:
        (event_t, ys): a 0-dim tensor of t's dtype, without gradient, and the packed states (2, ...) at t[0] and there.

    Raises:
        RuntimeError: the solve came to its end without an event.
    """
    if not callable(event_fn):
        raise type_error("event_fn", "a callable event_fn(t, y)", event_fn)
    if t.shape[0] != 2:
        raise value_error("t", "shape (2,) with event_fn: the initial time and one that shows the direction", t)
    if options.get("per_sample") or options.get("reversible"):
        raise value_error("options", "neither per_sample nor reversible with event_fn", options)
    crossing = Crossing(packed, event_fn, t[0].detach().double())
    tolerances = packed.tolerance("atol", atol)
    tolerance = float(tolerances.min()) if isinstance(tolerances, Tensor) else tolerances
    with torch.no_grad():
        at_start = not crossing.before(value_of(t[0]), packed.y0)
    if at_start:
        return t[0].detach().clone(), torch.stack([packed.y0, packed.y0])
    tableau = methods.adaptive_tableau(method, methods.ODEINT)
    if tableau is not None:
        event_t, ys = _adaptive(packed, t, crossing, tableau, rtol, atol, options, tolerance)
    elif isinstance(method, str) and methods.find(method, methods.ODEINT).kind == "implicit":
        raise value_error("method", "an explicit method with event_fn", method)
    else:
        event_t, ys = _fixed(packed, t, crossing, named_method(method, options), options, tolerance)
    return torch.tensor(event_t, dtype=t.dtype, device=t.device), ys


class _Search:
    """Watches an adaptive solve for the event; a true answer ends it."""

    def __init__(self, packed: Packed, crossing: Crossing, tolerance: float) -> None:
        self.crossing, self.tolerance = crossing, tolerance
        self.watch = watcher(packed)
        self.event_t: float | None = None
        self.step_end = math.inf
        self.y: Tensor | None = None

    def __call__(self, step: AdaptiveStep) -> bool:
        if self.watch is not None:
            self.watch(step)
        if not bool(step.accepted.all()):
            return False
        start, size = float(step.t[0]), float(step.h[0])
        end = start + size
        if self.crossing.before(end, step.y_new):
            return False
        self.step_end = end
        self.event_t = self.crossing.bisect(step.interpolate, start, end, self.tolerance)
        self.y = step.interpolate(self.event_t)
        return True


def _adaptive(
    packed: Packed,
    t: Tensor,
    crossing: Crossing,
    tableau: Tableau,
    rtol: Any,
    atol: Any,
    options: dict[str, Any],
    tolerance: float,
) -> tuple[float, Tensor]:
    check_options(packed, tableau.name, options, adaptive=True)
    gradient = needs_gradient(packed, t)
    engine: AdaptiveOptions = adaptive_options(packed, rtol, atol, options, record=gradient)
    first, direction = value_of(t[0]), value_of(t[1]) - value_of(t[0])
    start_time: Number = numbers_of(t)[0]
    search = _Search(packed, crossing, tolerance)
    y = packed.y0
    for segment in segments(options, first, math.copysign(math.inf, direction), packed.y0.dtype):
        here = packed.part(y, segment.limits)
        start, end = (torch.tensor(x, dtype=torch.float64) for x in (segment.start, segment.end))
        result = solve_adaptive(
            here.field,
            y.detach(),
            start,
            end,
            tableau,
            engine,
            norm=packed.norm(options.get("norm")),
            on_step=search,
        )
        engine = replace(engine, first_step=None)
        event_t = search.event_t
        if event_t is None and (not math.isfinite(segment.end) or bool((result.status != Status.SUCCESS).any())):
            raise RuntimeError(f"event_fn: expected a sign change, the solve ended at t={float(result.t[0])!r}")
        if gradient:
            last = segment.end if event_t is None else search.step_end
            wanted = [start_time, last if event_t is None else event_t]
            y = replayed(here, tableau, result.steps or [], start_time, last, wanted, options)[-1]
        else:
            y = result.y if event_t is None else search.y  # type: ignore[assignment]
        if event_t is not None:
            return event_t, torch.stack([packed.y0, y])
        start_time = segment.end
    raise AssertionError("the last segment has no end")


class _Found(Exception):
    """The event lies in the step that has just ended."""


def _fixed(
    packed: Packed, t: Tensor, crossing: Crossing, method: Method, options: dict[str, Any], tolerance: float
) -> tuple[float, Tensor]:
    check_options(packed, method, options, adaptive=False)
    size = options.get("step_size")
    if size is None or options.get("grid_constructor") is not None:
        raise value_error("options", "step_size with event_fn and a method of fixed steps", options)
    size, interp = float(size), interp_of(options)
    check_number("step_size", size, above=0.0)
    signed = math.copysign(size, value_of(t[1]) - value_of(t[0]))
    gradient = needs_gradient(packed, t)
    first: Number = numbers_of(t)[0]
    with torch.no_grad():
        number, before, after = _find_step(packed.part(packed.y0.detach()), value_of(t[0]), signed, crossing, method)
        start, end = (value_of(t[0]) + signed * n for n in (number, number + 1))
        slopes = None
        if interp == "cubic":
            times = (torch.tensor(x, dtype=packed.y0.dtype, device=packed.y0.device) for x in (start, end))
            slopes = tuple(packed.field(time, y) for time, y in zip(times, (before, after), strict=True))

        def state(time: float) -> Tensor:
            return linear_or_hermite(before, after, slopes, start, end, time)

        event_t = crossing.bisect(state, start, end, tolerance)
        y = state(event_t)
    if not gradient:
        return event_t, torch.stack([packed.y0, y])
    grid = [first, *(first + signed * n for n in range(1, number + 2))]
    builder = DenseBuilder(grid, [first, event_t], interp)
    return event_t, run_program(packed, builder, method, options, trajectory=False)


def _find_step(
    packed: Packed, first: float, signed: float, crossing: Crossing, method: Method
) -> tuple[int, Tensor, Tensor]:
    """The number of the step in which the event lies, and the states at its ends.

    The grid grows twofold at a time. Runge-Kutta methods go on from where they are; others, which have a past, begin
    anew.
    """
    done, chunk, y = 0, _FIRST_CHUNK, packed.y0
    while done < MAX_STEPS:
        begin = done if isinstance(method, RungeKutta) else 0
        states = [y if begin else packed.y0]
        place = [begin]
        last = min(done + chunk, MAX_STEPS)
        on_step = _checker(first, signed, crossing, states, place)
        builder = Builder([first + signed * n for n in range(begin, last + 1)], CondOT())
        run = new_run(packed.part(states[0]), builder, method, on_step=on_step)
        try:
            run.all()
        except _Found:
            before, after = states
            return place[0], before, after
        done, y = last, states[-1]
        chunk = max(chunk, done)
    raise RuntimeError(f"event_fn: expected a sign change within {MAX_STEPS} steps, met none")


def _checker(first: float, signed: float, crossing: Crossing, states: list[Tensor], place: list[int]) -> OnStep:
    begin = place[0]

    def on_step(number: int, state: Tensor) -> None:
        place[0] = begin + number
        if crossing.before(first + signed * (begin + number + 1), state):
            states[:] = [state]
            return
        states.append(state)
        raise _Found

    return on_step
