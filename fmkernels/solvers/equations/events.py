"""Solves that end at an event: the time at which a function of time and state first changes its sign."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._checks import as_state, check_function, check_has_values, type_error, value_error
from ..._gradients import first_derivatives_only
from ...ops.step_control.op import Status
from ..adaptive.stepper import AdaptiveStep
from ..implicit.solve import ImplicitStep, Watch, is_adaptive, option_names, solve_implicit
from ..methods import registry as methods
from ..methods.runge_kutta import RungeKutta
from ..methods.tableaus import Tableau
from ..programs.builder import Method
from ..programs.expressions import Number
from ..programs.ownership import reading
from .callbacks import Callbacks
from .controlled import Control
from .fixed import new_run, numbers_of, run_program
from .options import (
    ADAPTIVE_OPTIONS,
    FIXED_OPTIONS,
    Settings,
    check_options,
    interp_of,
    named_method,
    refuse_transforms,
    segments,
    step_size_of,
)
from .outputs import DenseBuilder, GridBuilder, linear_or_hermite, value_of
from .packed import Packed

EventFn = Callable[[Tensor, Any], Tensor]
# Steps of a fixed grid without an event before the search gives up, as in torchdiffeq.
MAX_STEPS = 20_000
_FIRST_CHUNK = 64


class Crossing:
    """Events as one number: positive before the first of them changes its sign.

    Each value of event_fn(t, y) is taken with its initial sign; their smallest is the number.
    """

    def __init__(self, packed: Packed, event_fn: EventFn, t0: Tensor) -> None:
        # the state is the solve's
        self._read = reading("event_fn", lambda t, y: event_fn(t, packed.unpack(y)), time_first=True)
        with torch.no_grad():
            self.signs = self._values(t0, packed.y0).sign()

    def _values(self, t: Tensor, y: Tensor) -> Tensor:
        values = self._read(y, t)
        if not isinstance(values, Tensor) or values.numel() == 0 or not values.is_floating_point():
            raise type_error("event_fn", "a floating tensor of at least one value from event_fn(t, y)", values)
        if bool(values.isnan().any()):
            raise ValueError(f"event_fn: expected numbers, got NaN at t = {float(t):.6g}")
        return values

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return (self._values(t, y) * self.signs).min()

    @torch.no_grad()
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


class Search:
    """What solvers of all kinds look for.

    Attributes:
        tolerance: of the event time.
        first, direction: the initial time, and +-1.
        start: the initial time with its gradient.
    """

    def __init__(self, packed: Packed, t: Tensor, event_fn: EventFn, settings: Settings) -> None:
        self.packed, self.t, self.settings = packed, t, settings
        self.crossing = Crossing(packed, event_fn, t[0].detach().double())
        atol = packed.tolerance("atol", settings.atol)
        self.tolerance = float(atol.min()) if isinstance(atol, Tensor) else atol
        self.first = value_of(t[0])
        self.direction = math.copysign(1.0, value_of(t[1]) - self.first)
        self.start: Number = numbers_of(t)[0]

    def at_start(self) -> bool:
        return not self.crossing.before(self.first, self.packed.y0)

    def within(self, state: Callable[[float], Tensor], start: float, end: float) -> float:
        """The event time in a step at whose end it is over."""
        return self.crossing.bisect(state, start, end, self.tolerance)


def solve_event(packed: Packed, t: Tensor, event_fn: EventFn, settings: Settings) -> tuple[Tensor, Tensor]:
    """``odeint`` with an event.

    Args:
        packed: state and right-hand side.
        t: (2,), the initial time and any later one in the direction of the solve.
        event_fn: (t, y) to a tensor; the solve ends where the first of its values changes its sign.
        settings: the event time is found to the smallest atol.

    Returns:
        (event_t, ys): a 0-dim tensor of t's dtype, without gradient, and the packed states (2, ...) at t[0] and there.

    Raises:
        ValueError: event_fn is NaN.
        RuntimeError: the solve came to its end without an event.
    """
    check_function("event_fn", event_fn, "a function event_fn(t, y)")
    check_has_values("y0", packed.y0)
    if t.shape[0] != 2:
        raise value_error("t", "shape (2,) with event_fn: the initial time and one that shows the direction", t)
    method, options = settings.method, settings.options
    if options.get("per_sample") or options.get("reversible"):
        raise value_error("options", "neither per_sample nor reversible with event_fn", options)
    refuse_transforms(method, "the event is found by values that they hide")
    search = Search(packed, t, event_fn, settings)
    if search.at_start():
        return t[0].detach().clone(), torch.stack([packed.y0, packed.y0])
    tableau = methods.adaptive_tableau(method, methods.ODEINT)
    kind = methods.find(method, methods.ODEINT).kind if isinstance(method, str) else "fixed"
    if tableau is not None:
        event_t, ys = _controlled(search, tableau)
    elif kind == "implicit":
        event_t, ys = _implicit(search)
    elif kind == "scipy":
        raise value_error("method", "one of ours with event_fn", method)
    else:
        event_t, ys = _fixed(search, named_method(method, options))
    return torch.tensor(event_t, dtype=t.dtype, device=t.device), ys


class _EventTime(torch.autograd.Function):
    """The time at which an event function, whose total derivative in time is ``rate``, has the value of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, event_t: Tensor, rate: Tensor) -> Tensor:
        out = event_t.clone()
        ctx.save_for_backward(rate, out)
        ctx.dtype = value.dtype
        return out

    @staticmethod
    @first_derivatives_only("the time of an event")  # how the rate depends on everything is not recorded
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rate, _ = ctx.saved_tensors
        return (-grad / rate).to(ctx.dtype), None, None


def event_time(packed: Packed, event_fn: EventFn, t0: Tensor, event_t: Tensor, y: Tensor) -> Tensor:
    """The event time with its gradient, by the implicit function theorem: see :func:`fmkernels.odeint_event`.

    Args:
        event_t: without gradient.
        y: the packed state there, as a function of what the gradient is wanted of.
    """
    if not torch.is_grad_enabled():
        return event_t
    crossing = Crossing(packed, event_fn, t0.detach().double())
    value = crossing(event_t, y)
    if not value.requires_grad:
        return event_t
    rate = _rate(packed, crossing, event_t, y.detach())
    return _EventTime.apply(value, event_t, rate)  # type: ignore[no-untyped-call, no-any-return]


def _rate(packed: Packed, crossing: Crossing, t: Tensor, y: Tensor) -> Tensor:
    """The total derivative of the event function in time."""
    with torch.no_grad():
        speed = packed.field(t.to(y.dtype).clone(), y)
    with torch.enable_grad():
        inputs = (t.detach().requires_grad_(), y.detach().requires_grad_())
        value = crossing(*inputs)
        grads = torch.autograd.grad(value, inputs, allow_unused=True) if value.requires_grad else (None, None)
    rate = torch.zeros((), dtype=y.dtype, device=y.device)
    if grads[0] is not None:
        rate = rate + grads[0].to(y.dtype)
    if grads[1] is not None:
        rate = rate + (grads[1] * speed).sum()
    return torch.where(rate == 0.0, 1e-12, rate)


def _no_event(t: float) -> RuntimeError:
    return RuntimeError(f"event_fn: expected a sign change, the solve ended at t={t!r}")


# ---------------------------------------------------------------------- controlled steps


class _InStep:
    """Looks at the steps of an adaptive solve for the event; a true answer ends it."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.event_t: float | None = None
        self.step_end = math.inf
        self.y: Tensor | None = None

    def __call__(self, step: AdaptiveStep) -> bool:
        if not bool(step.accepted.all()):
            return False
        start, size = float(step.t[0]), float(step.h[0])
        end = start + size
        if self.search.crossing.before(end, step.y_new.clone()):  # which the event function may keep
            return False
        self.step_end = end
        with torch.no_grad():
            self.event_t = self.search.within(step.interpolate, start, end)
            self.y = step.interpolate(self.event_t)
        return True


def _controlled(search: Search, tableau: Tableau) -> tuple[float, Tensor]:
    packed, settings = search.packed, search.settings
    check_options(packed, settings, ADAPTIVE_OPTIONS, judges=True)
    found = _InStep(search)
    control = Control.of(packed, search.t, tableau, settings)
    control.on_step = found
    start_time, y = search.start, packed.y0
    for segment in segments(settings.options, search.first, search.direction * math.inf, packed.y0.dtype):
        here = packed.part(y, segment.limits)
        result = control.part(here, segment)
        event_t = found.event_t
        if event_t is None and (not math.isfinite(segment.end) or bool((result.status != Status.SUCCESS).any())):
            raise _no_event(float(result.t[0]))
        if control.gradient:
            last = segment.end if event_t is None else found.step_end
            wanted = [start_time, last if event_t is None else event_t]
            y = control.again(here, result, start_time, last, wanted)[-1]
        else:
            y = result.y if event_t is None else found.y  # type: ignore[assignment]
        if event_t is not None:
            return event_t, torch.stack([packed.y0, y])
        start_time = segment.end
    raise AssertionError("the last segment has no end")


# ---------------------------------------------------------------------- implicit steps


class _ImplicitSearch(Watch):
    def __init__(self, search: Search, interp: str) -> None:
        self.search, self.interp = search, interp
        self.callbacks = Callbacks(search.packed)
        self.event_t: float | None = None
        self.y: Tensor | None = None
        self.last = search.first

    def before(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.callbacks.before(t, y, h)

    def again(self) -> None:
        self.callbacks.again()

    def after(self, step: ImplicitStep, h: Tensor) -> bool:
        self.callbacks.after(step, h)
        packed, start, end = self.search.packed, value_of(step.t), value_of(step.u)
        self.last = end
        shape = packed.y0.shape
        y, y_new = step.y.reshape(shape), step.y_new.reshape(shape)
        if not bool(step.accepted) or self.search.crossing.before(end, y_new):
            return False
        slopes = None
        if self.interp == "cubic":
            slopes = tuple(packed.field(t[0].to(y.dtype), x) for t, x in ((step.t, y), (step.u, y_new)))
        with torch.no_grad():
            self.event_t = self.search.within(
                lambda time: linear_or_hermite(y, y_new, slopes, start, end, time), start, end
            )
        if step.t.requires_grad:
            self.y = linear_or_hermite(y, y_new, slopes, step.t[0], step.u[0], self.event_t)
        else:
            self.y = linear_or_hermite(y, y_new, slopes, start, end, self.event_t)
        return True


def _implicit(search: Search) -> tuple[float, Tensor]:
    packed, settings = search.packed, search.settings
    method, options = settings.method, settings.options
    names = option_names(method, options)
    check_options(packed, settings, names, judges="controller" in names)
    controlled = is_adaptive(method, options)
    if not controlled:
        _needs_step_size(options)
    found = _ImplicitSearch(search, "cubic" if controlled else interp_of(options))
    end = torch.full_like(search.t[:1], search.direction * math.inf)
    solve_implicit(
        packed.field,
        packed.y0,
        torch.cat([search.t[:1], end]),
        method,
        options,
        rtol=packed.tolerance("rtol", settings.rtol),
        atol=packed.tolerance("atol", settings.atol),
        norm=packed.norm(options.get("norm")),
        watch=found,
    )
    if found.event_t is None or found.y is None:
        raise _no_event(found.last)
    return found.event_t, torch.stack([packed.y0, found.y])


# ---------------------------------------------------------------------- fixed steps


class _Found(Exception):
    """The event lies in the step that has just ended."""


def _needs_step_size(options: dict[str, Any]) -> float:
    size = step_size_of(options)
    if size is None or options.get("grid_constructor") is not None:
        raise value_error("options", "step_size with event_fn and a method of fixed steps", options)
    return size


def _fixed(search: Search, method: Method) -> tuple[float, Tensor]:
    packed, settings = search.packed, search.settings
    options = settings.options
    check_options(packed, settings, FIXED_OPTIONS, judges=False)
    interp, perturb = interp_of(options), packed.y0.dtype if options.get("perturb") else None
    signed = search.direction * _needs_step_size(options)
    steps = _Steps(search, method, signed, perturb)
    gradient = torch.is_grad_enabled() and (packed.y0.requires_grad or search.t.requires_grad)
    # with gradients enabled, the field shows whether it has one
    with torch.set_grad_enabled(torch.is_grad_enabled() and not gradient):
        number, before, after = steps.find()
        start, end = (search.first + signed * n for n in (number, number + 1))
        slopes = None
        if interp == "cubic":
            read = reading("func", steps.field, time_first=True)
            times = (torch.tensor(x, dtype=packed.y0.dtype, device=packed.y0.device) for x in (start, end))
            slopes = tuple(read(y, time) for time, y in zip(times, (before, after), strict=True))

    def state(time: float) -> Tensor:
        return linear_or_hermite(before, after, slopes, start, end, time)

    with torch.no_grad():
        event_t = search.within(state, start, end)
        y = state(event_t)
    if not (gradient or steps.gradient):
        return event_t, torch.stack([packed.y0, y])
    grid = [search.start, *(search.start + signed * n for n in range(1, number + 2))]
    builder = DenseBuilder(grid, [search.start, event_t], interp, perturb)
    return event_t, run_program(packed, builder, method, options, trajectory=False, told=True)


class _Steps:
    """Steps of a fixed size up to the one in which the event lies, without a graph.

    Attributes:
        gradient: whether an output of the field was seen to have a gradient.
    """

    def __init__(self, search: Search, method: Method, signed: float, perturb: torch.dtype | None) -> None:
        self.search, self.method, self.signed, self.perturb = search, method, signed, perturb
        self.callbacks = Callbacks(search.packed)
        self.gradient = False

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        k = as_state("func", self.search.packed.call(t, y), y)
        if k.requires_grad:
            self.gradient = True
            return k.detach()
        return k

    def find(self) -> tuple[int, Tensor, Tensor]:
        """The number of the step in which the event lies, and the states at its ends.

        The grid grows twofold at a time. Runge-Kutta methods go on from where they are; others, which have a past,
        begin anew.
        """
        search, done, chunk = self.search, 0, _FIRST_CHUNK
        first = y = search.packed.y0.detach()
        while done < MAX_STEPS:
            begin = done if isinstance(self.method, RungeKutta) else 0
            if begin == 0:
                self.callbacks.again()
                y = first
            last = min(done + chunk, MAX_STEPS)
            builder = GridBuilder([search.first + self.signed * n for n in range(begin, last + 1)], self.perturb)
            look = _Look(self, begin, y)
            run = new_run(search.packed.part(y), builder, self.method, call=self.field, on_step=look)
            self.tell(begin, y)
            try:
                run.all()
            except _Found:
                return look.number, look.before, look.after
            done, y = last, look.before
            chunk = max(chunk, done)
        raise RuntimeError(f"event_fn: expected a sign change within {MAX_STEPS} steps, met none")

    def tell(self, number: int, y: Tensor) -> None:
        if self.callbacks:
            t, h = (torch.tensor(x, dtype=y.dtype, device=y.device) for x in (self.time(number), self.signed))
            self.callbacks.tried(t, y, h)

    def time(self, number: int) -> float:
        return self.search.first + self.signed * number


class _Look:
    """Looks at the states at the ends of steps, from number ``begin`` on; keeps the last one before the event."""

    def __init__(self, steps: _Steps, begin: int, y: Tensor) -> None:
        self.steps, self.begin, self.number = steps, begin, begin
        self.before = self.after = y

    def __call__(self, number: int, state: Tensor) -> None:
        self.number = self.begin + number
        self.after = state
        if not self.steps.search.crossing.before(self.steps.time(self.number + 1), state):
            raise _Found
        self.before = state
        self.steps.tell(self.number + 1, state)
