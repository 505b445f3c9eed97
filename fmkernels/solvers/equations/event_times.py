"""`fm.odeint_event`: the time of an event as a differentiable number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .events import Crossing, EventFn
from .odeint import odeint
from .packed import Field, Packed, State


def odeint_event(
    func: Field,
    y0: State,
    t0: Tensor | float,
    *,
    event_fn: EventFn,
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    r"""The time of an event and the solution there, both with gradients: torchdiffeq's ``odeint_event``.

    The event time tau solves c(tau, y(tau)) = 0, so by the implicit function theorem (Chen, Amos, Nickel 2021,
    "Learning neural event functions for ODEs")

    .. math:: d\tau = -\frac{\partial_y c \, dy + \partial_\theta c \, d\theta}
        {\partial_t c + \partial_y c \cdot f(\tau, y)}, \qquad dy(\tau) = dy + f(\tau, y) \, d\tau,

    with dy at the fixed time tau, as the solver gives it, and theta what event_fn itself depends on.

    Args:
        func, y0: as in :func:`fmkernels.odeint`.
        t0: initial time, a number or a tensor of one element.
        event_fn: (t, y) to a tensor of any shape; the event is the first sign change of one of its values.
        reverse_time: solve towards smaller times.
        odeint_interface: :func:`fmkernels.odeint` or :func:`fmkernels.odeint_adjoint`.
        kwargs: of ``odeint_interface``. Methods of fixed steps need options={"step_size": ...}.

    Returns:
        (event_t, solution): a 0-dim tensor, and (2, \*y0.shape), the states at t0 and at the event; a tuple of such for
        a tuple y0.

    Raises:
        RuntimeError: the solve came to its end without an event.
    """
    packed = Packed(func, y0)
    if not isinstance(t0, Tensor):
        t0 = torch.tensor(float(t0), dtype=packed.y0.dtype, device=packed.y0.device)
    t0 = t0.reshape(-1)
    t = torch.cat([t0, t0.detach() + (-1.0 if reverse_time else 1.0)])
    event_t, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    event_t = event_t.detach()
    if not torch.is_grad_enabled():
        return event_t, solution
    parts = (solution,) if isinstance(solution, Tensor) else solution
    last = tuple(part[-1] for part in parts)
    y = packed.pack(last if packed.is_tuple else last[0])
    crossing = Crossing(packed, event_fn, t0[0].detach().double())
    value = crossing(event_t, y)
    if not value.requires_grad and not y.requires_grad:
        return event_t, solution
    speed, rate = _rate(packed, crossing, event_t, y.detach())
    # event_t's value stays as it is, and its gradient comes in
    event_t = event_t - ((value - value.detach()) / rate).to(event_t.dtype)
    y = y + speed * (event_t - event_t.detach()).to(y.dtype)
    ends = packed.unpack(y)
    ends = (ends,) if isinstance(ends, Tensor) else ends
    joined = tuple(torch.cat([part[:-1], end[None]]) for part, end in zip(parts, ends, strict=True))
    return event_t, joined if packed.is_tuple else joined[0]


def _rate(packed: Packed, crossing: Crossing, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """dy/dt, and the total derivative of the event function in time."""
    with torch.no_grad():
        speed = packed.field(t.to(y.dtype), y)
    with torch.enable_grad():
        inputs = (t.detach().requires_grad_(), y.detach().requires_grad_())
        value = crossing(*inputs)
        grads = torch.autograd.grad(value, inputs, allow_unused=True) if value.requires_grad else (None, None)
    rate = torch.zeros((), dtype=y.dtype, device=y.device)
    if grads[0] is not None:
        rate = rate + grads[0].to(y.dtype)
    if grads[1] is not None:
        rate = rate + (grads[1] * speed).sum()
    return speed, torch.where(rate == 0.0, 1e-12, rate)
