"""`fm.odeint`: torchdiffeq's interface on fused solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..._torch import untraced
from .events import event_time, solve_event
from .options import check_func, check_times, settings_of
from .packed import Field, Packed, State
from .solves import solve


@untraced
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

    Gradients flow through the solve to y0, t and what func uses, at whatever time it uses it (discretise, then
    optimise). An adaptive solve finds its steps without recording them and takes the accepted ones again for the
    gradient.

    Args:
        func: (t, y) to dy/dt of y's shape; t is 0-dim, in y0's dtype. An answer in another floating dtype, as under
            autocast, is cast to y0's. It may keep t, y and what it returns: none of them is written again.
        y0: a tensor of any shape, or a tuple of tensors; floating or complex.
        t: (T,) strictly increasing or decreasing; best on the CPU, as its values are read once before the solve.
        rtol, atol: tolerances of adaptive and implicit methods: numbers, tensors that broadcast to y0, or a sequence
            with a number for each tensor of a tuple y0 (one for a tensor).
        method: adaptive: "dopri5" (default), "tsit5", "dopri8", "bosh3", "fehlberg", "fehlberg2", "adaptive_heun" (or
            "heun_euler"); fixed grid: Runge-Kutta and Adams methods, see
            :mod:`fmkernels.solvers.methods.registry`. As in torchdiffeq "rk4" is the 3/8 rule here, and
            "explicit_adams", "implicit_adams" are of order 4. Implicit, for stiff fields of small states
            (:func:`fmkernels.solvers.implicit.solve.solve_implicit`): "implicit_euler", "implicit_midpoint",
            "trapezoid", "gl4", "gl6", "radauIIA3", "radauIIA5", "sdirk2", "sdirk3"; with step control "trbdf2",
            "kvaerno3", "kencarp4". "scipy_solver": SciPy's, without gradients, options["solver"] being "LSODA"
            (default), "RK45", "RK23", "DOP853", "Radau" or "BDF".
        options: adaptive: first_step, min_step, max_step, max_num_steps, safety, ifactor, dfactor, norm, step_t,
            jump_t as in torchdiffeq; controller, an object of :mod:`fmkernels.solvers.adaptive.controllers`;
            per_sample=True controls the step of each index of dimension 0 by itself, func's t being (B,). Fixed:
            step_size or grid_constructor, interp ("linear" or "cubic"), perturb=True (func sees the ends of a step from
            inside, at the next numbers of y0's dtype), max_order of Adams methods, reversible (see
            :mod:`fmkernels.solvers.methods.reversible`). Both: checkpoint=True computes the solve again in the backward
            pass, in sqrt(steps) segments; func is called once more for each call.
        event_fn: stops where event_fn(t, y) changes its sign: see :func:`fmkernels.odeint_event`.

    Returns:
        (T, \*y0.shape), or a tuple of such; with ``event_fn`` (event time, solution at t[0] and there): the time has
        its gradient, the solution that at a fixed time.

    Note:
        Explicit methods run within torch.func's transforms (vmap, grad, vjp, jacrev, jvp, jacfwd, hessian, nested in
        any way) and forward-mode AD, also over what func closes over. Step sizes are chosen by the values beneath the
        transforms and are constants for derivatives, which are those of the accepted steps. The entries of a vmap share
        the steps of an adaptive method: its error norm is the largest one among them, so that each entry meets the
        tolerances by itself, and one that fails ends the solve of all. With ``per_sample`` each index of dimension 0
        has steps of its own, shared in this way. Callbacks get states as func does. t may have derivatives but no
        vmap over it; tolerances and options have neither. Implicit methods, SciPy's, ``reversible`` and events raise a
        RuntimeError, ``checkpoint`` a ValueError.

    Note:
        As in torchdiffeq, func's attributes callback_step, callback_accept_step and callback_reject_step are called
        with (t, y, h) of each step: the first before it is tried, the others after it was judged, by methods with step
        control.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value, or an output of func unlike y.
    """
    check_func(func)
    packed, settings = Packed(func, y0), settings_of(rtol, atol, method, options)
    t = check_times(t)
    if event_fn is None:
        return packed.unpack(solve(packed, t, settings), lead=1)
    event_t, ys = solve_event(packed, t, event_fn, settings)
    return event_time(packed, event_fn, t[0], event_t, ys[-1]), packed.unpack(ys, lead=1)
