"""Solves on a grid that is known before: a method's program, run over the packed state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..._checks import value_error
from ..._torch import is_transformed, transform_active
from ...paths import CondOT
from ..methods.reversible import Scheme, coupling_of, solve_reversible, tableau_of
from ..programs.builder import Builder, Method
from ..programs.expressions import Number
from ..programs.ownership import ordinary_memory, reading
from ..programs.run import Run
from ..programs.tables import numbers_for
from .callbacks import Callbacks
from .options import check_times, interp_of, refuse_transforms, step_size_of
from .outputs import DenseBuilder, GridBuilder, value_of
from .packed import Field, Packed


def numbers_of(t: Tensor) -> list[Number]:
    """Times as numbers, or as float64 tensors where they need a gradient."""
    if (t.requires_grad and torch.is_grad_enabled()) or (transform_active() and is_transformed(t)):
        return list(t.double().unbind(0))
    return t.detach().double().tolist()


def _grid(packed: Packed, t: Tensor, options: dict[str, Any]) -> list[Number] | None:
    """The grid of a fixed method where it is not t itself."""
    size, constructor = step_size_of(options), options.get("grid_constructor")
    if size is not None and constructor is not None:
        raise ValueError("step_size, grid_constructor: expected at most one of them, got both")
    if t.shape[0] == 1:
        return None
    if size is not None:
        first, *_, last = numbers_of(t)
        span = value_of(last) - value_of(first)
        count = max(1, math.ceil(abs(span) / size - 1e-9))
        signed = math.copysign(size, span)
        return [first, *(first + signed * i for i in range(1, count)), last]
    if constructor is not None:
        grid = constructor(packed.func, packed.unpack(packed.y0), t)
        if not isinstance(grid, Tensor) or bool(grid[0] != t[0]) or bool(grid[-1] != t[-1]):
            raise value_error("grid_constructor", "times from t[0] to t[-1]", grid)
        return numbers_of(check_times(grid))
    return None


def new_run(packed: Packed, builder: Builder, method: Method, *, call: Field | None = None, **kwargs: Any) -> Run:
    """A run of a method on a builder's grid from the packed state; ``call`` in the place of its right-hand side."""
    y0 = packed.y0
    program = builder.plan(method)
    calls = {"": packed.reading if call is None else reading("func", call, time_first=True)}
    numbers = numbers_for(program, y0, y0.dtype, "scalar", keep=not torch.is_grad_enabled())
    run = Run(program, calls, y0, numbers, **kwargs)
    run.function_name = "func"
    return run


def run_program(
    packed: Packed,
    builder: Builder,
    method: Method,
    options: dict[str, Any],
    *,
    trajectory: bool,
    told: bool = False,
) -> Tensor:
    """Runs a method on a builder's grid: the trajectory, or y0 and the extra outputs; callbacks may be ``told``."""
    y0, grid, gradient = packed.y0, builder.grid, torch.is_grad_enabled()
    states = [y0]
    steps = len(grid) - 1
    kept = None
    gathered = trajectory and (gradient or transform_active())  # what transforms hide may not fit into a buffer
    if trajectory and not gathered:
        with ordinary_memory():
            kept = y0.new_empty((steps + 1, *y0.shape))
        kept[0].copy_(y0)
    callbacks = None if told else Callbacks(packed) or None

    def tell(number: int, state: Tensor) -> None:
        if callbacks is not None and number < steps:
            start, end = (torch.as_tensor(t, dtype=y0.dtype, device=y0.device) for t in grid[number : number + 2])
            callbacks.tried(start, state, end - start)

    def on_step(number: int, state: Tensor) -> None:
        if gathered:
            states.append(state if gradient else state.clone())
        tell(number + 1, state)

    watched = callbacks is not None or gathered
    run = new_run(
        packed, builder, method, reuse=not gradient, lends=True, trajectory=kept, on_step=on_step if watched else None
    )
    tell(0, y0)
    if options.get("checkpoint") and gradient:
        if transform_active():  # a backward pass would compute again what has left its transforms
            raise value_error("options: checkpoint", "False within torch.func's transforms and forward mode", True)
        run.checkpointed(max(1, round(steps**0.5)))
    else:
        run.all()
    if not trajectory:
        return torch.stack([y0, *run.extras().get("ys", [])])
    return torch.stack(states) if run.trajectory is None else run.trajectory


def solve_fixed(packed: Packed, t: Tensor, method: Method, options: dict[str, Any]) -> Tensor:
    """The packed states at the times t."""
    interp, perturb = interp_of(options), bool(options.get("perturb"))
    if options.get("reversible"):
        refuse_transforms(method, "reversible solves have gradients by autograd alone")
        return _reversible(packed, t, method, options)
    grid = _grid(packed, t, options)
    if grid is None:
        builder = GridBuilder(numbers_of(t), packed.y0.dtype) if perturb else Builder(numbers_of(t), CondOT())
        return run_program(packed, builder, method, options, trajectory=True)
    dense = DenseBuilder(grid, numbers_of(t), interp, packed.y0.dtype if perturb else None)
    return run_program(packed, dense, method, options, trajectory=False)


def _reversible(packed: Packed, t: Tensor, method: Any, options: Mapping[str, Any]) -> Tensor:
    """With ``options={"reversible": True}``, or a number as lambda.

    ``step_size`` bounds the steps, of which each interval of t has equal ones: all output times are on the grid.
    """
    if options.get("grid_constructor") is not None or options.get("interp", "linear") != "linear":
        raise value_error("options", "step_size and no interpolation where the solve is reversible", dict(options))
    if options.get("perturb") or options.get("checkpoint"):
        raise value_error("options", "neither perturb nor checkpoint where the solve is reversible", dict(options))
    scheme_times, kept = [t[:1].double()], [0]
    size = step_size_of(options)
    for start, end in pairwise(t.double().unbind(0)):
        span = abs(value_of(end) - value_of(start))
        count = 1 if size is None else max(1, math.ceil(span / size - 1e-9))
        shares = torch.arange(1, count + 1, dtype=torch.float64, device=t.device) / count
        scheme_times.append(start + shares * (end - start))
        kept.append(kept[-1] + count)
    y0 = packed.y0
    # 0-dim times of any device serve as coefficients on the state's
    times = torch.cat(scheme_times).to(y0.device)
    coupling = coupling_of(options["reversible"])
    scheme = Scheme(packed.call, tableau_of(method), kept, coupling, lambda x: x.to(y0.dtype))
    return solve_reversible(scheme, y0, times, modules=[packed.func])
