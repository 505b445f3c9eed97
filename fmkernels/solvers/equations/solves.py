"""Solves of a packed state: fixed grids, adaptive steps, and the accepted steps again for a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._checks import as_state, check_number, value_error
from ...ops.step_control.op import Status
from ...paths import CondOT
from ..adaptive.solve import AdaptiveResult, solve_adaptive
from ..adaptive.stepper import AdaptiveStep
from ..methods import registry as methods
from ..methods.reversible import Scheme, coupling_of, solve_reversible, tableau_of
from ..methods.tableaus import Tableau
from ..programs.builder import Builder, Method
from ..programs.expressions import Number
from ..programs.run import Run
from ..programs.tables import numbers_for
from .options import (
    CALLBACKS,
    _per_sample,
    _warn_unknown,
    adaptive_options,
    check_options,
    check_times,
    interp_of,
    named_method,
    segments,
)
from .outputs import DenseBuilder, Replay, value_of
from .packed import Packed


def solve(packed: Packed, t: Tensor, rtol: Any, atol: Any, method: Any, options: dict[str, Any]) -> Tensor:
    """The packed states at the times t."""
    tableau = methods.adaptive_tableau(method, methods.ODEINT)
    if tableau is not None:
        check_options(packed, method, options, adaptive=True)
        return _adaptive(packed, t, tableau, rtol, atol, options)
    if isinstance(method, str) and methods.find(method, methods.ODEINT).kind == "implicit":
        from ..implicit.solve import option_names, solve_implicit

        _warn_unknown(method, options, option_names(method, options))
        _per_sample(packed, options)
        rtol, atol = packed.tolerance("rtol", rtol), packed.tolerance("atol", atol)
        norm = packed.norm(options.get("norm"))
        return solve_implicit(packed.field, packed.y0, t, method, options, rtol=rtol, atol=atol, norm=norm)
    check_options(packed, method, options, adaptive=False)
    return _fixed(packed, t, named_method(method, options), options)


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
    run = Run(program, calls, y0, numbers_for(program, y0, dtype, "scalar", keep=not torch.is_grad_enabled()), **kwargs)
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
    run = new_run(packed, builder, method, reuse=not gradient, trajectory=kept, on_step=on_step if watched else None)
    tell(0, y0)
    if options.get("checkpoint") and gradient:
        run.checkpointed(max(1, round(steps**0.5)))
    else:
        run.all()
    if not trajectory:
        return torch.stack([y0, *run.extras().get("ys", [])])
    return torch.stack(states) if kept is None else kept


def _fixed(packed: Packed, t: Tensor, method: Method, options: dict[str, Any]) -> Tensor:
    interp = interp_of(options)
    if options.get("reversible"):
        return odeint_reversible(packed, t, method, options)
    grid = _grid(packed, t, options)
    if grid is None:
        return run_program(packed, Builder(numbers_of(t), CondOT()), method, options, trajectory=True)
    return run_program(packed, DenseBuilder(grid, numbers_of(t), interp), method, options, trajectory=False)


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
    value = as_state("func", value, packed.y0)
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


def odeint_reversible(packed: Packed, t: Tensor, method: Any, options: Mapping[str, Any]) -> Tensor:
    """``odeint`` with ``options={"reversible": True}``, or a number as lambda: the packed states at the times t.

    ``step_size`` bounds the steps, of which each interval of t has equal ones: all output times are on the grid.
    """
    if options.get("grid_constructor") is not None or options.get("interp", "linear") != "linear":
        raise value_error("options", "step_size and no interpolation where the solve is reversible", dict(options))
    scheme_times, kept = [t[:1].double()], [0]
    size = options.get("step_size")
    if size is not None:
        check_number("step_size", size, above=0.0)
    for start, end in pairwise(t.double().unbind(0)):
        span = abs(value_of(end) - value_of(start))
        count = 1 if size is None else max(1, math.ceil(span / float(size) - 1e-9))
        shares = torch.arange(1, count + 1, dtype=torch.float64, device=t.device) / count
        scheme_times.append(start + shares * (end - start))
        kept.append(kept[-1] + count)
    y0 = packed.y0
    # 0-dim times of any device serve as coefficients on the state's
    times = torch.cat(scheme_times).to(y0.device)
    coupling = coupling_of(options["reversible"])
    scheme = Scheme(packed.field, tableau_of(method), kept, coupling, lambda x: x.to(y0.dtype))
    return solve_reversible(scheme, y0, times, modules=[packed.func])
