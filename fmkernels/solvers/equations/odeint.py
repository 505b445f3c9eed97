"""`fm.odeint`: torchdiffeq's interface on fused solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..._checks import type_error
from .options import check_times
from .packed import Field, Packed, State
from .solves import solve


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
            "heun_euler"); fixed grid: Runge-Kutta and Adams methods, see
            :mod:`fmkernels.solvers.methods.registry`. As in torchdiffeq "rk4" is the 3/8 rule here, and
            "explicit_adams", "implicit_adams" are of order 4. Implicit, for stiff fields of small states
            (:func:`fmkernels.solvers.implicit.solve.solve_implicit`): "implicit_euler", "implicit_midpoint",
            "trapezoid", "gl4", "gl6", "radauIIA3", "radauIIA5", "sdirk2", "sdirk3"; with step control "trbdf2",
            "kvaerno3", "kencarp4".
        options: adaptive: first_step, min_step, max_step, max_num_steps, safety, ifactor, dfactor, norm, step_t,
            jump_t as in torchdiffeq; controller, an object of :mod:`fmkernels.solvers.adaptive.controllers`;
            per_sample=True controls the step of each index of dimension 0 by itself, func's t being (B,). Fixed:
            step_size or grid_constructor, interp ("linear" or "cubic"), max_order of Adams methods, reversible (see
            :mod:`fmkernels.solvers.methods.reversible`). Both: checkpoint=True computes the solve again in the backward
            pass, in sqrt(steps) segments.
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
