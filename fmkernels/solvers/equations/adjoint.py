r"""The continuous adjoint: gradients of a solve from a second one, backwards in time, in memory constant in the steps.

With :math:`\dot y = f(t, y, \theta)` and a loss L of the states, :math:`a = \partial L / \partial y(t)` solves (Chen,
Rubanova, Bettencourt, Duvenaud 2018, "Neural ordinary differential equations")

.. math:: \dot a = -a^\top \partial_y f, \qquad
    \frac{dL}{d\theta} = \int a^\top \partial_\theta f \, dt, \qquad
    \frac{dL}{dt_i} = \frac{\partial L}{\partial y(t_i)} \cdot f(t_i, y(t_i)).

y is solved again, backwards, beside a; at each output time it is set to the forward solution, and a jumps by that
output's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import tensor_of, type_error, warn
from ..._gradients import Autocast, check_apart, first_derivatives_only, present_autocast
from ..._torch import untraced
from ..methods import registry as methods
from .callbacks import CALLBACKS
from .events import EventFn, event_time, solve_event
from .odeint import odeint
from .options import Settings, check_func, check_times, refuse_transforms, settings_of
from .packed import Field, Packed, State
from .solves import solve

Norm = Callable[[Any], Tensor]
# Options of a forward solve that have no meaning for the backward one.
_FORWARD_ONLY = ("norm", "per_sample", "checkpoint", "reversible")


@dataclass(frozen=True, eq=False)
class _Problem:
    packed: Packed
    event_fn: EventFn | None
    forward: Settings
    backward: Settings


class _Adjoint(torch.autograd.Function):
    """(event time, packed states at the times t) of (problem, y0, t, *parameters)."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, y0: Tensor, t: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        packed, ahead = problem.packed.part(y0.detach()), problem.forward
        ctx.problem, ctx.autocast = problem, present_autocast(y0.device)
        if problem.event_fn is None:
            event_t, ys = t.new_zeros(()), solve(packed, t.detach(), ahead)
        else:
            event_t, ys = solve_event(packed, t.detach(), problem.event_fn, ahead)
        ctx.adjoint_options = problem.backward.options  # which torchdiffeq's own tests read and change
        ctx.save_for_backward(t, event_t, ys, *params)
        ctx.mark_non_differentiable(event_t)
        return event_t, ys

    @staticmethod
    @first_derivatives_only("odeint_adjoint")
    def backward(ctx: Any, _: Tensor, grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        problem: _Problem = ctx.problem
        t, event_t, ys, *params = ctx.saved_tensors
        with_event, with_times = problem.event_fn is not None, ctx.needs_input_grad[2]
        times = torch.stack([t[0], event_t]) if with_event else t
        field, back = problem.packed.field, problem.backward
        dynamics = _Dynamics(problem.packed, params, with_times, ctx.autocast)
        # of times, the state, its gradient, and parameters
        state = [ys.new_zeros(()), ys[-1], grad_ys[-1], *(torch.zeros_like(_real(p)) for p in params)]
        grad_t = torch.zeros_like(t)
        for i in range(times.shape[0] - 1, 0, -1):
            if with_times:
                effect = (field(times[i].to(ys.dtype), ys[i]) * grad_ys[i]).sum()
                state[0] = state[0] - effect
                if not with_event:
                    grad_t[i] = effect
            if bool(times[i] != times[i - 1]):  # an event may be at the start
                solution = odeint(
                    dynamics,
                    tuple(state),
                    times[i - 1 : i + 1].flip(0),
                    rtol=back.rtol,
                    atol=back.atol,
                    method=back.method,
                    options=back.options,
                )
                state = [part[1] for part in solution]
            state[1] = ys[i - 1]
            state[2] = state[2] + grad_ys[i - 1]
        grad_t[0] = state[0]
        grads = (
            (torch.view_as_complex(grad.clone()) if p.is_complex() else grad).to(p.dtype)
            for grad, p in zip(state[3:], params, strict=True)
        )
        return None, state[2].to(ys.dtype), grad_t if with_times else None, *grads


def _real(p: Tensor) -> Tensor:
    p = p.detach()
    return torch.view_as_real(p.resolve_conj().resolve_neg()) if p.is_complex() else p


class _Dynamics:
    """The right-hand side of (gradient of t, y, gradient of y, gradients of the parameters)."""

    def __init__(self, packed: Packed, params: Sequence[Tensor], with_times: bool, autocast: Autocast) -> None:
        self.packed, self.params, self.with_times, self.autocast = packed, tuple(params), with_times, autocast
        for name in CALLBACKS:
            callback = getattr(packed.func, f"{name}_adjoint", None)
            if callback is not None:
                setattr(self, name, callback)

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        packed = self.packed
        dtype = packed.y0.dtype  # that of the whole may be wider
        with torch.enable_grad():
            time = t.detach().to(dtype).requires_grad_(self.with_times)
            y = state[1].detach().to(dtype).requires_grad_()
            with self.autocast():
                value = packed.field(time, y)
            inputs = [y, *self.params, *([time] if self.with_times else [])]
            grads: Sequence[Tensor | None] = [None] * len(inputs)
            if value.requires_grad:
                weight = -state[2].to(dtype)
                # what parameters are made from may be shared between calls
                grads = torch.autograd.grad(value, inputs, weight, allow_unused=True, retain_graph=True)
        found = [torch.zeros_like(_real(x)) if g is None else _real(g) for x, g in zip(inputs, grads, strict=True)]
        of_time = found.pop() if self.with_times else torch.zeros_like(t)
        return of_time.to(t.dtype), value.detach(), *found


def _root_mean_square(x: Tensor) -> Tensor:
    return x.abs().square().mean().sqrt()


def _norm(packed: Packed, options: dict[str, Any], given: Any) -> Norm:
    """The error norm of the backward solve's state.

    The largest of: the gradient of t, the forward solve's norm of y and of its gradient, and, unless "seminorm"
    (Kidger, Chen, Lyons 2021), the root mean squares of the parameters' gradients. A user's norm takes the state as a
    tuple, in which y and its gradient are as many tensors as y0.
    """
    inner = packed.norm(options.get("norm")) or _root_mean_square

    def standard(state: tuple[Tensor, ...]) -> Tensor:
        t, y, grad_y, *grads = state
        values = [t.abs(), inner(y).abs(), inner(grad_y).abs()]
        if given != "seminorm":
            values += [_root_mean_square(grad) for grad in grads if grad.numel()]
        return torch.stack([value.to(t.dtype) for value in values]).max()

    def users(state: tuple[Tensor, ...]) -> Tensor:
        t, y, grad_y, *grads = state
        parts: list[Tensor] = []
        for x in (packed.unpack(y), packed.unpack(grad_y)):
            parts += [x] if isinstance(x, Tensor) else x
        return given((t, *parts, *grads))  # type: ignore[no-any-return]

    return users if callable(given) else standard


@untraced
def odeint_adjoint(
    func: Field,
    y0: State,
    t: Tensor,
    *,
    rtol: float | Sequence[float] = 1e-7,
    atol: float | Sequence[float] = 1e-9,
    method: Any = None,
    options: dict[str, Any] | None = None,
    event_fn: EventFn | None = None,
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: Any = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    r""":func:`fmkernels.odeint` with gradients by the continuous adjoint: torchdiffeq's ``odeint_adjoint``.

    .. math:: \dot a = -a^\top \partial_y f(t, y), \qquad dL/d\theta = \int a^\top \partial_\theta f \, dt

    is solved backwards from one output time to the one before (Chen et al. 2018). Memory does not grow with the steps;
    the gradient is as accurate as the two solves are, no more. It flows to y0, t and ``adjoint_params``, once: a second
    differentiation is an error.

    Args:
        func, y0, t, rtol, atol, method, options: as in :func:`fmkernels.odeint`.
        event_fn: as there.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: of the backward solve; by default those of the
            forward one (of tolerances for each tensor of a tuple the smallest). ``adjoint_options`` must be given where
            ``options`` are and the method differs. Its "norm" is by default the largest of those of t's gradient, y,
            y's gradient and the parameters' gradients; "seminorm" leaves out the last; a function takes their tuple.
        adjoint_params: tensors to which gradients flow, each once; those of the module func, if None.

    Returns:
        (T, \*y0.shape), or a tuple of such; with ``event_fn`` (event time, solution at t[0] and there).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; func is no module and no
            ``adjoint_params`` are given.
    """
    check_func(func)
    packed, forward = Packed(func, y0), settings_of(rtol, atol, method, options)
    given_back = settings_of(adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, prefix="adjoint_")
    t = check_times(t)
    for name, tolerance in (
        ("rtol", rtol),
        ("atol", atol),
        ("adjoint_rtol", adjoint_rtol),
        ("adjoint_atol", adjoint_atol),
    ):
        if tolerance is not None or not name.startswith("adjoint"):
            packed.tolerance(name, tolerance)
    if isinstance(adjoint_method, str):
        try:
            methods.find(adjoint_method, methods.ODEINT)
        except ValueError as error:
            raise ValueError(f"adjoint_{error}") from None
    if adjoint_params is None:
        if not isinstance(func, nn.Module):
            raise ValueError(
                "adjoint_params: expected tensors where func is not an nn.Module (an empty tuple if it has none), got "
                "None"
            )
        adjoint_params = _parameters(func)
    if adjoint_options is None and options is not None and adjoint_method not in (None, method):
        raise ValueError("adjoint_options: expected a dict beside options where adjoint_method is another, got None")
    given = _tensors(adjoint_params)
    params = tuple(p for p in given if p.requires_grad)
    check_apart("adjoint_params", params)
    back = {k: v for k, v in forward.options.items() if k not in _FORWARD_ONLY}
    back = back if adjoint_options is None else given_back.options
    if callable(back.get("norm")) and len(params) < len(given):
        warn("adjoint_params: those without gradient are left out of the adjoint norm's tuple")
    back["norm"] = _norm(packed, forward.options, back.get("norm"))
    problem = _Problem(
        packed,
        event_fn,
        forward,
        Settings(
            _smallest(rtol) if adjoint_rtol is None else adjoint_rtol,
            _smallest(atol) if adjoint_atol is None else adjoint_atol,
            method if adjoint_method is None else adjoint_method,
            back,
        ),
    )
    refuse_transforms(problem.forward.method, "the adjoint is a backward pass of autograd's")
    event_t, ys = _Adjoint.apply(problem, packed.y0, t, *params)  # type: ignore[no-untyped-call]
    solution = packed.unpack(ys, lead=1)
    if event_fn is None:
        return solution
    return event_time(packed, event_fn, t[0], event_t.detach(), ys[-1]), solution


def _tensors(params: Any) -> tuple[Tensor, ...]:
    if isinstance(params, Tensor):
        raise type_error("adjoint_params", "a sequence of tensors", params)
    try:
        given = tuple(params)
    except TypeError:
        raise type_error("adjoint_params", "a sequence of tensors", params) from None
    for i, p in enumerate(given):
        if not isinstance(p, Tensor):
            raise type_error(f"adjoint_params[{i}]", "a tensor", p)
    return tuple({id(p): p for p in given}.values())  # the gradient of one that is given twice would count twice


def _smallest(tolerance: Any) -> float:
    return float(tensor_of(tolerance, torch.float64).min())


def _parameters(module: nn.Module) -> list[Tensor]:
    """A module's parameters; a replica of DataParallel has them as plain tensors."""
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    return [x for m in module.modules() for x in vars(m).values() if isinstance(x, Tensor) and x.requires_grad]


__all__ = ["odeint_adjoint"]
