"""What follows the control of a step, row by row: the accepted rows move on, requested times get their states.

In plain PyTorch, for any device; csrc/step_control has the same for the CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .op import Clock, Count


def expand_rows(values: Tensor, data: Tensor) -> Tensor:
    """A value a row, viewed so that it broadcasts against data; one row stands for all of it."""
    return values.reshape(values.shape[:1] + (1,) * (data.dim() - 1)) if data.dim() else values.reshape(())


def copy_rows(mask: Tensor, source: Tensor, target: Tensor) -> None:
    """target[r] = source[r] where the mask is set; elsewhere source may hold anything."""
    torch.where(expand_rows(mask, target), source, target, out=target)


def dense_weights(theta: Tensor, h: Tensor, polynomials: Sequence[Sequence[float]]) -> list[Tensor]:
    """h b_i(theta) for each stage, b_i given by its coefficients of theta, theta^2, ...; float64."""
    weights = []
    for polynomial in polynomials:
        weight = torch.zeros_like(theta)
        for coefficient in reversed(polynomial):
            weight = (weight + coefficient) * theta
        weights.append(h * weight)
    return weights


def dense_output(
    clock: Tensor,
    count: Tensor,
    y: Tensor,
    y1: Tensor,
    stages: Sequence[Tensor],
    polynomials: Sequence[Sequence[float]],
    wanted: Tensor,
    ids: Tensor | None,
    out: Tensor,
) -> None:
    """out[j, ids[r]] = the state of row r at its time number j, for all times within the step that it has just taken.

    Args:
        y, y1: states at the step's beginning and end.
        polynomials: tableau.interpolant.
        wanted: float64 (R, T), monotone along each row in its direction; those of one row may stand for all.
        ids: int64 (R,), the place of row r in ``out``; None: r.
        out: (T, B, ...).
    """
    times = wanted.t()
    h, t = clock[Clock.H_TAKEN], clock[Clock.T]
    number = torch.arange(times.shape[0], device=times.device)[:, None]
    due = (number >= count[Count.FIRST_OUTPUT]) & (number < count[Count.NEXT_OUTPUT])
    theta = torch.where(due, (times - clock[Clock.T_FROM]) / h, 0.0)
    dtype = torch.float64 if y.dtype is torch.float64 else torch.float32
    value = y.to(dtype)[None]
    for weight, k in zip(dense_weights(theta, h, polynomials), stages, strict=True):
        # a stage that is not used may hold anything
        value = value + weight.to(dtype).reshape(weight.shape + (1,) * (y.dim() - 1)) * k.to(dtype)
    mask = due.reshape(due.shape + (1,) * (y.dim() - 1))
    at_end = (due & (times == t)).reshape(mask.shape)
    value = torch.where(at_end, y1, value.to(y.dtype))
    if ids is None:
        torch.where(mask, value, out, out=out)
    else:
        out.index_copy_(1, ids, torch.where(mask, value, out.index_select(1, ids)))
