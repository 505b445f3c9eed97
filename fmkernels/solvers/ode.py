"""`fm.odeint`: torchdiffeq's interface on fused solvers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_number, type_error, value_error
from ..paths import CondOT
from . import methods
from .adaptive import AdaptiveOptions, AdaptiveStep, Status, solve_adaptive
from .controllers import Controller, IController
from .dense import DenseBuilder, Replay
from .packed import Field, Packed, State
from .program import Builder, Number, as_grid
from .run import Buffers, Run, coefficients_of, time_rows
from .runge_kutta import AdamsBashforth, AdamsMoulton
from .tableaus import Tableau

# torchdiffeq's names where they differ from ours. Its rk4 is the 3/8 rule.
_NAMES: dict[str, Any] = {
    "rk4": "rk4_38",
    "explicit_adams": AdamsBashforth(4),
    "implicit_adams": AdamsMoulton(4),
    "fixed_adams": AdamsMoulton(4),
}
_FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "checkpoint", "max_order")
_ADAPTIVE_OPTIONS = (
    "first_step",
    "min_step",
    "max_step",
    "max_num_steps",
    "safety",
    "ifactor",
    "dfactor",
    "controller",
    "norm",
    "step_t",
    "jump_t",
    "per_sample",
    "checkpoint",
)
_IGNORED_OPTIONS = ("dtype", "perturb", "max_iters")  # torchdiffeq's, without a meaning here


def check_times(t: Any, y0: Tensor) -> Tensor:
    """Times as torchdiffeq takes them: (T,) and strictly monotone."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise type_error("t", "a floating tensor", t)
    if t.dim() != 1 or t.shape[0] == 0:
        raise value_error("t", "times of shape (T,), T >= 1", t)
    try:
        as_grid(t)
    except ValueError:
        raise value_error("t", "finite, strictly increasing or decreasing times", t) from None
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
            and "explicit_adams", "implicit_adams" are of order 4. Implicit: "implicit_euler", "trapezoid", "sdirk2".
        options: adaptive: first_step, min_step, max_step, max_num_steps, safety, ifactor, dfactor, norm, step_t,
            jump_t as in torchdiffeq; controller, an object of :mod:`fmkernels.solvers.controllers`; per_sample=True
            controls the step of each index of dimension 0 by itself, func's t being (B,). Fixed: step_size or
            grid_constructor, interp ("linear" or "cubic"). Both: checkpoint=True computes the solve again in the
            backward pass, in sqrt(steps) segments.
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

        return solve_event(packed, t, event_fn, rtol=rtol, atol=atol, method=method, options=options)
    tableau = methods.adaptive_tableau(method) if isinstance(method, str) else None
    if tableau is not None:
        check_options(method, options, _ADAPTIVE_OPTIONS)
        ys = _adaptive(packed, t, tableau, rtol, atol, options)
    elif isinstance(method, str) and method in methods.IMPLICIT:
        from .implicit import solve_implicit

        ys = solve_implicit(packed.field, packed.y0, t, method, options)
    else:
        check_options(method, options, _FIXED_OPTIONS)
        ys = _fixed(packed, t, _NAMES.get(method, method) if isinstance(method, str) else method, options)
    return packed.unpack(ys, lead=1)


def check_options(method: Any, options: dict[str, Any], known: Sequence[str]) -> None:
    unknown = [name for name in options if name not in known and name not in _IGNORED_OPTIONS]
    if unknown:
        warnings.warn(f"options: method {method!r} has no {', '.join(map(repr, unknown))}", stacklevel=3)


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
        span = float(last) - float(first)
        count = max(1, math.ceil(abs(span) / size - 1e-9))
        signed = math.copysign(size, span)
        return [first, *(first + signed * i for i in range(1, count)), last]
    if constructor is not None:
        grid = constructor(packed.func, packed.unpack(packed.y0), t)
        if not isinstance(grid, Tensor) or bool(grid[0] != t[0]) or bool(grid[-1] != t[-1]):
            raise value_error("grid_constructor", "times from t[0] to t[-1]", grid)
        return numbers_of(check_times(grid, packed.y0))
    return None


def run_program(packed: Packed, builder: Builder, method: Any, options: dict[str, Any], trajectory: bool) -> Any:
    """Runs a method on a builder's grid: the trajectory, or the extra outputs."""
    y0 = packed.y0
    method(builder)
    program = builder.program()
    dtype = torch.float64 if y0.dtype == torch.float64 else torch.float32
    if y0.dtype in (torch.float16, torch.bfloat16):
        dtype = y0.dtype
    gradient = torch.is_grad_enabled()
    states = [y0]
    kept = None
    if trajectory and not gradient:
        kept = y0.new_empty((program.steps + 1, *y0.shape))
        kept[0].copy_(y0)
    callback = getattr(packed.func, "callback_step", None)

    def tell(number: int, state: Tensor) -> None:
        if callback is not None and number + 1 < len(builder.grid):
            start, end = (torch.as_tensor(builder.grid[i], dtype=dtype) for i in (number, number + 1))
            callback(start, packed.unpack(state), end - start)

    def on_step(number: int, state: Tensor) -> None:
        if gradient and trajectory:
            states.append(state)
        tell(number + 1, state)

    run = Run(
        program,
        {"": lambda y, t: packed.field(t, y)},
        y0,
        time_rows(program, y0, dtype, "scalar"),
        coefficients_of(program, y0),
        buffers=None if gradient else Buffers(),
        trajectory=kept,
        on_step=on_step if callback is not None or (gradient and trajectory) else None,
    )
    tell(0, y0)
    if options.get("checkpoint") and gradient:
        run.checkpointed(max(1, round(program.steps**0.5)))
    else:
        run.all()
    if not trajectory:
        return torch.stack([y0, *run.extras().get("ys", [])])
    return torch.stack(states) if kept is None else kept


def _fixed(packed: Packed, t: Tensor, method: Any, options: dict[str, Any]) -> Tensor:
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise value_error("interp", "'linear' or 'cubic'", interp)
    resolved = methods.resolve(method)
    grid = _grid(packed, t, options)
    if grid is None:
        return run_program(packed, Builder(numbers_of(t), CondOT()), resolved, options, trajectory=True)
    return run_program(packed, DenseBuilder(grid, numbers_of(t), interp), resolved, options, trajectory=False)


# ---------------------------------------------------------------------- adaptive steps


def adaptive_options(packed: Packed, rtol: Any, atol: Any, options: dict[str, Any], record: bool) -> AdaptiveOptions:
    """The options in the engine's words."""
    per_sample = bool(options.get("per_sample", False))
    if per_sample and packed.is_tuple:
        raise value_error("options: per_sample", "a tensor y0, whose dimension 0 is the batch", packed.shapes)
    controller: Controller = options.get("controller") or IController(
        safety=float(options.get("safety", 0.9)),
        ifactor=float(options.get("ifactor", 10.0)),
        dfactor=float(options.get("dfactor", 0.2)),
    )
    return AdaptiveOptions(
        rtol=packed.tolerance("rtol", rtol),
        atol=packed.tolerance("atol", atol),
        controller=controller,
        shared=not per_sample,
        min_step=float(options.get("min_step", 0.0)),
        force_min_step=True,
        max_step=float(options.get("max_step", math.inf)),
        max_steps=min(int(options.get("max_num_steps", 2**31 - 1)), 2**31 - 1),
        time_shape="batch" if per_sample else "scalar",
        time_dtype=packed.y0.dtype,
        record=record,
    )


def restarts(options: dict[str, Any], t: Tensor) -> list[float]:
    """Where an adaptive solve must end a step and begin anew: t[0], the inner step_t and jump_t, t[-1]."""
    first, last = t.detach()[[0, -1]].tolist()
    points = set()
    for name in ("step_t", "jump_t"):
        given = options.get(name)
        if given is not None:
            points |= {float(x) for x in torch.as_tensor(given).reshape(-1)}
    inner = [x for x in points if min(first, last) < x < max(first, last)]
    return [first, *sorted(inner, reverse=last < first), last]


def watcher(packed: Packed) -> Callable[[AdaptiveStep], None] | None:
    """torchdiffeq's callbacks, which are attributes of func."""
    names = ("callback_step", "callback_accept_step", "callback_reject_step")
    callbacks = [getattr(packed.func, name, None) for name in names]
    if not any(callbacks):
        return None
    on_try, on_accept, on_reject = callbacks

    def watch(step: AdaptiveStep) -> None:
        t, h = (x[0] if x.shape[0] == 1 else x for x in (step.t, step.h))
        judged = on_accept if bool(step.accepted.all()) else on_reject
        for callback in (on_try, judged):
            if callback is not None:
                callback(t, packed.unpack(step.y), h)

    return watch


def needs_gradient(packed: Packed, t: Tensor) -> bool:
    """Whether a gradient can be asked of the solution: found by one call of func where nothing else tells."""
    if not torch.is_grad_enabled():
        return False
    if packed.y0.requires_grad or t.requires_grad:
        return True
    if isinstance(packed.func, torch.nn.Module) and any(p.requires_grad for p in packed.func.parameters()):
        return True
    return packed.field(t[0].to(packed.y0.dtype), packed.y0).requires_grad


def _adaptive(packed: Packed, t: Tensor, tableau: Tableau, rtol: Any, atol: Any, options: dict[str, Any]) -> Tensor:
    if t.shape[0] == 1:
        return packed.y0[None].clone()
    gradient = needs_gradient(packed, t)
    engine = adaptive_options(packed, rtol, atol, options, record=gradient)
    if options.get("first_step") is not None:
        engine = replace(engine, first_step=abs(float(options["first_step"])))
    first, last = t.detach()[[0, -1]].tolist()
    y = packed.y0.detach()
    parts: list[Any] = []
    steps: list[tuple[Tensor, Tensor]] = []
    points, wanted = restarts(options, t), t.detach().double().cpu()
    for start, end in pairwise(points):
        inside = (wanted - start) * (wanted - end) <= 0.0
        if start != first:
            inside &= wanted != start
        result = solve_adaptive(
            packed.field,
            y,
            start,
            end,
            tableau,
            engine,
            t_eval=wanted[inside],
            norm=packed.norm(options.get("norm")),
            on_step=watcher(packed),
        )
        y = result.y
        parts.append(result.ys)
        steps += result.steps or []
    ys = torch.cat(parts) if len(parts) > 1 else parts[0]
    if not gradient:
        return ys
    if bool((result.status != Status.SUCCESS).any()):
        raise RuntimeError("odeint: expected a solve that succeeds where its gradient is wanted; see the warning")
    return _replayed(packed, t, tableau.adaptive(), steps, (first, last), engine.shared, options)


def _replayed(
    packed: Packed,
    t: Tensor,
    tableau: Tableau,
    steps: list[tuple[Tensor, Tensor]],
    ends: tuple[float, float],
    shared: bool,
    options: dict[str, Any],
) -> Tensor:
    """The accepted steps again, recorded for the gradient."""
    times = numbers_of(t)
    if not shared:
        # rows with fewer steps stay at their end
        if t.requires_grad:
            raise value_error("t", "times without gradient with per_sample=True", t)
        grid: list[Number] = [np.full(packed.y0.shape[0], ends[0])]
        for _, h in steps:
            grid.append(grid[-1] + h.cpu().numpy())
        grid[-1] = np.full_like(grid[-1], ends[1])
        return run_program(
            packed, Builder(grid, CondOT()), Replay(tableau, times, rows=True), options, trajectory=False
        )
    grid = [times[0], *(float(start) for start, _ in steps[1:]), times[-1]]
    builder = Builder(grid, CondOT())
    return run_program(packed, builder, Replay(tableau, times), options, trajectory=False)
