"""`fm.odeint`: torchdiffeq's interface on fused solvers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import gt, lt
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import check_number, check_output, type_error, value_error
from ..paths import CondOT
from . import methods
from .adaptive import AdaptiveOptions, AdaptiveResult, AdaptiveStep, Status, solve_adaptive
from .dense import DenseBuilder, Replay, value_of
from .options import STEP_CONTROL, step_control_arguments
from .packed import Field, Packed, State
from .program import Builder, Method, Number
from .run import Buffers, Run, coefficients_of, time_rows
from .runge_kutta import MAX_ORDER, AdamsBashforth, AdamsMoulton
from .tableaus import Tableau

# torchdiffeq's names where they differ from ours. Its rk4 is the 3/8 rule.
_NAMES: dict[str, Any] = {
    "rk4": "rk4_38",
    "explicit_adams": AdamsBashforth(4),
    "implicit_adams": AdamsMoulton(4),
    "fixed_adams": AdamsMoulton(4),
}
_FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "checkpoint", "max_order", "reversible")
_ADAPTIVE_OPTIONS = (*STEP_CONTROL, "step_t", "jump_t", "per_sample", "checkpoint")
_IGNORED_OPTIONS = ("dtype", "norm", "perturb", "max_iters")  # torchdiffeq's, without a meaning here
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def check_times(t: Any, y0: Tensor) -> Tensor:
    """Times as torchdiffeq takes them: (T,) and strictly monotone."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise type_error("t", "a floating tensor", t)
    if t.dim() != 1 or t.shape[0] == 0:
        raise value_error("t", "times of shape (T,), T >= 1", t)
    times = t.detach().tolist()
    monotone = all(map(lt, times, times[1:])) or all(map(gt, times, times[1:]))  # a NaN is neither
    if not (monotone and math.isfinite(times[0]) and math.isfinite(times[-1])):
        raise value_error("t", "finite, strictly increasing or decreasing times", t)
    return t


def odeint(
    func: Field,
    y0: State,
    t: Tensor,
    *,
    rtol: float | Sequence[float] = 1e-7,
    atol: float | Sequence[float] = 1e-9,
    method: Any = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
) -> Any:
    r"""Solves dy/dt = func(t, y), y(t[0]) = y0, at the times t: torchdiffeq's ``odeint``.

    Gradients flow through the solve to y0, t and what func uses (discretise, then optimise). An adaptive solve finds
    its steps without recording them and takes the accepted ones again for the gradient.

    Args:
        func: (t, y) to dy/dt of y's shape and dtype; t is 0-dim, in y0's dtype.
        y0: a tensor of any shape, or a tuple of tensors; floating or complex.
        t: (T,) strictly increasing or decreasing; best on the CPU, as its values are read once before the solve.
        rtol, atol: tolerances of adaptive methods: numbers, or a number for each tensor of a tuple.
        method: adaptive: "dopri5" (default), "tsit5", "dopri8", "bosh3", "fehlberg", "fehlberg2", "adaptive_heun" (or
            "heun_euler"); fixed grid: any of :func:`fmkernels.sample`'s. As in torchdiffeq "rk4" is the 3/8 rule here,
            and "explicit_adams", "implicit_adams" are of order 4. Implicit, for stiff fields of
            small states (:func:`fmkernels.solvers.implicit.solve_implicit`): "implicit_euler", "implicit_midpoint",
            "trapezoid", "sdirk2", "sdirk3"; with step control "trbdf2", "kvaerno3", "kencarp4".
        options: adaptive: first_step, min_step, max_step, max_num_steps, safety, ifactor, dfactor, norm, step_t,
            jump_t as in torchdiffeq; controller, an object of :mod:`fmkernels.solvers.controllers`; per_sample=True
            controls the step of each index of dimension 0 by itself, func's t being (B,). Fixed: step_size or
            grid_constructor, interp ("linear" or "cubic"), max_order of Adams methods, reversible (see
            :mod:`fmkernels.solvers.reversible`). Both: checkpoint=True computes the solve again in the backward pass,
            in sqrt(steps) segments.
        event_fn: stops where event_fn(t, y) changes its sign: see :func:`fmkernels.odeint_event`.

    Returns:
        (T, \*y0.shape), or a tuple of such; with ``event_fn`` (event time, solution at t[0] and there).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value, or an output of func unlike y.
    """
    if not callable(func):
        raise type_error("func", "a callable func(t, y)", func)
    packed = Packed(func, y0)
    t = check_times(t, packed.y0)
    options = dict(options or {})
    method = "dopri5" if method is None else method
    if event_fn is not None:
        from .events import solve_event  # uses odeint

        event_t, ys = solve_event(packed, t, event_fn, rtol=rtol, atol=atol, method=method, options=options)
        return event_t, packed.unpack(ys, lead=1)
    return packed.unpack(solve(packed, t, rtol, atol, method, options), lead=1)


def solve(packed: Packed, t: Tensor, rtol: Any, atol: Any, method: Any, options: dict[str, Any]) -> Tensor:
    """The packed states at the times t."""
    tableau = methods.adaptive_tableau(method) if isinstance(method, str) else None
    if tableau is not None:
        check_options(packed, method, options, adaptive=True)
        return _adaptive(packed, t, tableau, rtol, atol, options)
    if isinstance(method, str) and method in methods.IMPLICIT:
        from .implicit import option_names, solve_implicit

        _warn_unknown(method, options, option_names(method, options))
        _per_sample(packed, options)
        tolerances = {"rtol": packed.tolerance("rtol", rtol), "atol": packed.tolerance("atol", atol)}
        norm = packed.norm(options.get("norm"))
        return solve_implicit(packed.field, packed.y0, t, method, options, **tolerances, norm=norm)
    check_options(packed, method, options, adaptive=False)
    return _fixed(packed, t, named_method(method, options), options)


def check_options(packed: Packed, method: Any, options: dict[str, Any], *, adaptive: bool) -> None:
    """Warns of options and callbacks that the method does not have."""
    _warn_unknown(method, options, _ADAPTIVE_OPTIONS if adaptive else _FIXED_OPTIONS)
    if not adaptive:
        unused = [name for name in CALLBACKS[1:] if getattr(packed.func, name, None) is not None]
        if unused:
            warnings.warn(f"func: method {method!r} does not call {', '.join(unused)}", stacklevel=4)


def _warn_unknown(method: Any, options: dict[str, Any], known: Sequence[str]) -> None:
    unknown = [name for name in options if name not in known and name not in _IGNORED_OPTIONS]
    if unknown:
        warnings.warn(f"options: method {method!r} has no {', '.join(map(repr, unknown))}", stacklevel=5)


def named_method(method: Any, options: dict[str, Any]) -> Method:
    """A method of fixed steps by its name in torchdiffeq or here, or as it is given."""
    order = options.get("max_order")
    if order is not None and isinstance(method, str) and "adams" in method:
        order = min(int(order), MAX_ORDER)
        return AdamsBashforth(order) if method == "explicit_adams" else AdamsMoulton(max(order, 2))
    return methods.resolve(_NAMES.get(method, method) if isinstance(method, str) else method)


# ---------------------------------------------------------------------- fixed grids


def numbers_of(t: Tensor) -> list[Number]:
    """Times as numbers, or as float64 tensors where they need a gradient."""
    if t.requires_grad and torch.is_grad_enabled():
        return list(t.double().unbind(0))
    return t.detach().double().tolist()


def _grid(packed: Packed, t: Tensor, options: dict[str, Any]) -> list[Number] | None:
    """The grid of a fixed method where it is not t itself."""
    size, constructor = options.get("step_size"), options.get("grid_constructor")
    if size is not None and constructor is not None:
        raise ValueError("step_size, grid_constructor: expected at most one of them, got both")
    if t.shape[0] == 1:
        return None
    if size is not None:
        size = float(size)
        check_number("step_size", size, above=0.0)
        first, *_, last = numbers_of(t)
        span = value_of(last) - value_of(first)
        count = max(1, math.ceil(abs(span) / size - 1e-9))
        signed = math.copysign(size, span)
        return [first, *(first + signed * i for i in range(1, count)), last]
    if constructor is not None:
        grid = constructor(packed.func, packed.unpack(packed.y0), t)
        if not isinstance(grid, Tensor) or bool(grid[0] != t[0]) or bool(grid[-1] != t[-1]):
            raise value_error("grid_constructor", "times from t[0] to t[-1]", grid)
        return numbers_of(check_times(grid, packed.y0))
    return None


def new_run(packed: Packed, builder: Builder, method: Method, **kwargs: Any) -> Run:
    """A run of a method on a builder's grid from the packed state."""
    y0 = packed.y0
    program = builder.plan(method)
    dtype = torch.float64 if y0.dtype == torch.float64 else torch.float32
    if y0.dtype in (torch.float16, torch.bfloat16):
        dtype = y0.dtype
    func = packed.func if packed.plain and packed.limits is None else packed.field
    calls = {"": lambda y, t: func(t, y)}
    times, coefficients = time_rows(program, y0, dtype, "scalar"), coefficients_of(program, y0)
    run = Run(program, calls, y0, times, coefficients, **kwargs)
    run.function_name = "func"
    return run


def run_program(packed: Packed, builder: Builder, method: Method, options: dict[str, Any], trajectory: bool) -> Tensor:
    """Runs a method on a builder's grid: the trajectory, or y0 and the extra outputs."""
    y0, grid, gradient = packed.y0, builder.grid, torch.is_grad_enabled()
    states = [y0]
    steps = len(grid) - 1
    kept = None
    if trajectory and not gradient:
        kept = y0.new_empty((steps + 1, *y0.shape))
        kept[0].copy_(y0)
    callback = None if isinstance(method, Replay) else getattr(packed.func, CALLBACKS[0], None)

    def tell(number: int, state: Tensor) -> None:
        if callback is not None and number < steps:
            start, end = (torch.as_tensor(t, dtype=y0.dtype, device=y0.device) for t in grid[number : number + 2])
            callback(start, packed.unpack(state if gradient else state.clone()), end - start)

    def on_step(number: int, state: Tensor) -> None:
        if gradient and trajectory:
            states.append(state)
        tell(number + 1, state)

    watched = callback is not None or (gradient and trajectory)
    buffers = None if gradient else Buffers()
    run = new_run(packed, builder, method, buffers=buffers, trajectory=kept, on_step=on_step if watched else None)
    tell(0, y0)
    if options.get("checkpoint") and gradient:
        run.checkpointed(max(1, round(steps**0.5)))
    else:
        run.all()
    if not trajectory:
        return torch.stack([y0, *run.extras().get("ys", [])])
    return torch.stack(states) if kept is None else kept


def interp_of(options: dict[str, Any]) -> str:
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise value_error("interp", "'linear' or 'cubic'", interp)
    return str(interp)


def _fixed(packed: Packed, t: Tensor, method: Method, options: dict[str, Any]) -> Tensor:
    interp = interp_of(options)
    if options.get("reversible"):
        from .reversible import odeint_reversible

        return odeint_reversible(packed, t, method, options)
    grid = _grid(packed, t, options)
    if grid is None:
        return run_program(packed, Builder(numbers_of(t), CondOT()), method, options, trajectory=True)
    return run_program(packed, DenseBuilder(grid, numbers_of(t), interp), method, options, trajectory=False)


# ---------------------------------------------------------------------- adaptive steps


def _per_sample(packed: Packed, options: dict[str, Any]) -> bool:
    per_sample = bool(options.get("per_sample", False))
    if per_sample and packed.is_tuple:
        raise value_error("options: per_sample", "a tensor y0, whose dimension 0 is the batch", packed.shapes)
    return per_sample


def adaptive_options(packed: Packed, rtol: Any, atol: Any, options: dict[str, Any], record: bool) -> AdaptiveOptions:
    """The options in the engine's words."""
    per_sample = _per_sample(packed, options)
    return AdaptiveOptions(
        **step_control_arguments(options),
        rtol=packed.tolerance("rtol", rtol),
        atol=packed.tolerance("atol", atol),
        shared=not per_sample,
        compact=False,  # func may hold what belongs to the samples
        force_min_step=True,
        time_shape="batch" if per_sample else "scalar",
        time_dtype=packed.y0.dtype,
        record=record,
    )


class Segment(NamedTuple):
    """A part of an adaptive solve between times at which a step must end; ``limits`` of the times that func sees."""

    start: float
    end: float
    limits: tuple[float, float] | None


def segments(options: dict[str, Any], first: float, last: float, dtype: torch.dtype) -> list[Segment]:
    """The parts of a solve from first to last that step_t and jump_t make, where the step control begins anew.

    func never sees the time of a jump itself, but the next one of the dtype on the side where the solver is.
    """
    low, high = min(first, last), max(first, last)
    points: dict[float, bool] = {}
    for name in ("step_t", "jump_t"):
        given = options.get(name)
        if given is not None:
            points.update((x, name == "jump_t") for x in torch.as_tensor(given).double().reshape(-1).tolist())
    inner = sorted((x for x in points if low < x < high), reverse=last < first)
    info = torch.finfo(dtype)

    def beside(time: float, towards: float) -> float:
        if not points.get(time, False) or time in (first, last):
            return time
        return time + math.copysign(max(abs(time) * info.eps, info.tiny), towards - time)

    parts = []
    for start, end in pairwise([first, *inner, last]):
        limits = sorted((beside(start, end), beside(end, start)))
        plain = limits == sorted((start, end))
        parts.append(Segment(start, end, None if plain else (limits[0], limits[1])))
    return parts


def watcher(packed: Packed) -> Callable[[AdaptiveStep], None] | None:
    """torchdiffeq's callbacks, which are attributes of func."""
    callbacks = [getattr(packed.func, name, None) for name in CALLBACKS]
    if not any(callbacks):
        return None
    on_try, on_accept, on_reject = callbacks

    def watch(step: AdaptiveStep) -> None:
        # copies: what the step shows is written again
        t, h = (x[0].clone() if x.shape[0] == 1 else x.clone() for x in (step.t, step.h))
        judged = on_accept if bool(step.accepted.all()) else on_reject
        for callback in (on_try, judged):
            if callback is not None:
                callback(t, packed.unpack(step.y.clone()), h)

    return watch


def needs_gradient(packed: Packed, t: Tensor, per_sample: bool = False) -> bool:
    """Whether a gradient can be asked of the solution: found by one call of func where nothing else tells."""
    if not torch.is_grad_enabled():
        return False
    if packed.y0.requires_grad or t.requires_grad:
        return True
    if isinstance(packed.func, torch.nn.Module) and any(p.requires_grad for p in packed.func.parameters()):
        return True
    start = t[0].to(packed.y0.dtype)
    value = packed.field(start.expand(packed.y0.shape[:1]) if per_sample else start, packed.y0)
    check_output("func", value, packed.y0)
    return value.requires_grad


def _adaptive(packed: Packed, t: Tensor, tableau: Tableau, rtol: Any, atol: Any, options: dict[str, Any]) -> Tensor:
    if t.shape[0] == 1:
        return packed.y0[None].clone()
    gradient = needs_gradient(packed, t, bool(options.get("per_sample", False)))
    engine = adaptive_options(packed, rtol, atol, options, record=gradient)
    if gradient and not engine.shared and t.requires_grad:
        raise value_error("t", "times without gradient with per_sample=True", t)
    norm, watch = packed.norm(options.get("norm")), watcher(packed)
    times = numbers_of(t)
    first, last = value_of(times[0]), value_of(times[-1])
    if len(times) == 2 and not gradient and options.get("step_t") is None and options.get("jump_t") is None:
        # no time between the ends is asked for
        whole = solve_adaptive(packed.field, packed.y0, first, last, tableau, engine, norm=norm, on_step=watch)
        return torch.stack([packed.y0, _reached(whole)])
    wanted = t.detach().double().cpu()
    y, parts = packed.y0, []
    for segment in segments(options, first, last, y.dtype):
        inside = (wanted - segment.start) * (wanted - segment.end) <= 0.0
        if segment.start != first:
            inside &= wanted != segment.start
        here = packed.part(y, segment.limits)
        result = solve_adaptive(
            here.field,
            y.detach(),
            segment.start,
            segment.end,
            tableau,
            engine,
            t_eval=wanted[inside] if bool(inside.any()) else None,
            norm=norm,
            on_step=watch,
        )
        engine = replace(engine, first_step=None)
        failed = bool((result.status != Status.SUCCESS).any())
        if gradient:
            if failed:
                raise RuntimeError(
                    "odeint: expected a solve that succeeds where its gradient is wanted; see the warning"
                )
            at_first, at_last = segment.start == first, segment.end == last
            start, end = times[0] if at_first else segment.start, times[-1] if at_last else segment.end
            later = [times[i] for i in inside.nonzero()[int(at_first) :, 0].tolist()]
            marks = [start, *later] if at_last else [start, *later, end]
            ys = replayed(here, tableau, result.steps or [], start, end, marks, options)
            y = ys[-1]
            parts.append(ys[int(not at_first) : 1 + len(later)])
            continue
        y = result.y
        if result.ys is not None:
            parts.append(result.ys)
        if failed:
            break
    ys = torch.cat(parts) if len(parts) > 1 else parts[0]
    missing = t.shape[0] - ys.shape[0]
    return ys if missing == 0 else torch.cat([ys, ys.new_full((missing, *ys.shape[1:]), math.nan)])


def _reached(result: AdaptiveResult) -> Tensor:
    """The last state, NaN for what did not reach its time."""
    y, failed = result.y, result.status != Status.SUCCESS
    if not bool(failed.any()):
        return y
    return y.masked_fill(failed.reshape(failed.shape + (1,) * (y.dim() - 1)) if y.dim() else failed[0], math.nan)


def replayed(
    packed: Packed,
    tableau: Tableau,
    steps: list[tuple[Tensor, Tensor]],
    start: Number,
    end: Number,
    wanted: list[Number],
    options: dict[str, Any],
) -> Tensor:
    """The accepted steps from start to end again, recorded for the gradient: the states at the times wanted.

    Args:
        packed: with the state at start.
        wanted: from start on; tensors where they need a gradient.
    """
    rows = bool(options.get("per_sample", False))
    grid: list[Number] = [start, *(float(t) for t, _ in steps[1:]), end] if not rows else []
    if rows:  # those with fewer steps stay at their end
        grid = [np.full(packed.y0.shape[0], value_of(start))]
        for _, h in steps:
            grid.append(grid[-1] + h.cpu().numpy())
        grid[-1] = np.full_like(grid[-1], value_of(end))
    replay = Replay(tableau.adaptive(), wanted, rows=rows)
    return run_program(packed, Builder(grid, CondOT()), replay, options, trajectory=False)
