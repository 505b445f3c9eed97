"""`fm.odeint_event`: the time of an event as a differentiable number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._checks import check_function, check_has_values, check_number, type_error, value_error
from ..._torch import untraced
from .events import EventFn, event_time
from .odeint import odeint
from .options import check_func
from .packed import Field, Packed, State


@untraced
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
    check_func(func)
    check_function("event_fn", event_fn, "a function event_fn(t, y)")
    check_function("odeint_interface", odeint_interface, "fm.odeint or fm.odeint_adjoint")
    packed = Packed(func, y0)
    if not isinstance(t0, Tensor):
        check_number("t0", t0)
        # what half precision resolves is no time
        dtype = torch.promote_types(packed.y0.dtype, torch.float32)
        t0 = torch.tensor(float(t0), dtype=dtype, device=packed.y0.device)
    if not t0.is_floating_point():
        raise type_error("t0", "a number or a floating tensor", t0)
    check_has_values("t0", t0)
    if t0.numel() != 1:
        raise value_error("t0", "one number", t0)
    if not bool(t0.isfinite()):
        raise value_error("t0", "a finite time", t0)
    if not isinstance(reverse_time, bool):
        raise type_error("reverse_time", "a bool", reverse_time)
    t0 = t0.reshape(-1)
    t = torch.cat([t0, t0.detach() + (-1.0 if reverse_time else 1.0)])
    event_t, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    if not torch.is_grad_enabled():
        return event_t.detach(), solution
    parts = (solution,) if isinstance(solution, Tensor) else solution
    last = tuple(part[-1] for part in parts)
    y = packed.pack(last if packed.is_tuple else last[0])
    event_t = event_time(packed, event_fn, t0[0], event_t.detach(), y)
    if not event_t.requires_grad:
        return event_t, solution
    with torch.no_grad():
        speed = packed.field(event_t.to(y.dtype).clone(), y)  # to which the field may write
    y = y + speed * (event_t - event_t.detach()).to(y.dtype)
    ends = packed.unpack(y)
    ends = (ends,) if isinstance(ends, Tensor) else ends
    joined = tuple(torch.cat([part[:-1], end[None]]) for part, end in zip(parts, ends, strict=True))
    return event_t, joined if packed.is_tuple else joined[0]
