"""A flow's states with the integral of its divergence beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..likelihood.divergence import divergence
from ..solvers.equations.odeint import odeint


def solved_with_divergence(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    *,
    probe: Tensor | None,
    gradient: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The states of dx/dt = field(t, x) along times, (T, B, ...), and the integral of its divergence over them, (B,).

    Args:
        field: field(t, x), t being 0-dim.
        x: the state at times[0].
        times: (T,).
        probe: of Hutchinson's estimate, the same all along; None for the exact divergence.
        gradient: record gradients.
        options: of :func:`fmkernels.odeint`.
    """
    how: dict[str, Any] = {"method": "exact"} if probe is None else {"method": "hutchinson", "noise": [probe]}

    def both(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        velocity, div = divergence(field, t, state[0], gradient=gradient, **how)
        return velocity, div.to(x.dtype)

    with torch.set_grad_enabled(gradient):
        states, change = odeint(both, (x, x.new_zeros(x.shape[0])), times, **options)
    return states, change[-1]


def rademacher_like(x: Tensor) -> Tensor:
    """A probe of entries 1 and -1."""
    return torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2.0 - 1.0
