"""Solvers as an expert writes them by hand in plain PyTorch: the rival without a library, and the check of ours.

A loop takes velocity(x, t) with t of shape (), the state, and float times of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fmkernels.solvers.methods.tableaus import TABLEAUS

Velocity = Callable[[Tensor, Tensor], Tensor]
Loop = Callable[[Velocity, Tensor, Sequence[float]], Tensor]


def _times(x: Tensor, times: Sequence[float]) -> Tensor:
    return torch.tensor(times, dtype=x.dtype, device=x.device)


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    x, ts = x.clone(), _times(x, times)
    for i, (t, u) in enumerate(pairwise(times)):
        x.add_(velocity(x, ts[i]), alpha=u - t)
    return x


def midpoint(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    x, ts, middles = x.clone(), _times(x, times), _times(x, [(t + u) / 2 for t, u in pairwise(times)])
    for i, (t, u) in enumerate(pairwise(times)):
        h = u - t
        x.add_(velocity(torch.add(x, velocity(x, ts[i]), alpha=h / 2), middles[i]), alpha=h)
    return x


def heun2(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    x, ts = x.clone(), _times(x, times)
    for i, (t, u) in enumerate(pairwise(times)):
        h = u - t
        k = velocity(x, ts[i])
        x.add_(k + velocity(torch.add(x, k, alpha=h), ts[i + 1]), alpha=h / 2)
    return x


def rk4(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    x, ts, middles = x.clone(), _times(x, times), _times(x, [(t + u) / 2 for t, u in pairwise(times)])
    for i, (t, u) in enumerate(pairwise(times)):
        h = u - t
        k1 = velocity(x, ts[i])
        k2 = velocity(torch.add(x, k1, alpha=h / 2), middles[i])
        k3 = velocity(torch.add(x, k2, alpha=h / 2), middles[i])
        k4 = velocity(torch.add(x, k3, alpha=h), ts[i + 1])
        x.add_((k1 + k4).add_(k2 + k3, alpha=2.0), alpha=h / 6)
    return x


def rk4_38(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    x, ts = x.clone(), _times(x, times)
    inner = _times(x, [t + (u - t) * c for t, u in pairwise(times) for c in (1 / 3, 2 / 3)])
    for i, (t, u) in enumerate(pairwise(times)):
        h = u - t
        k1 = velocity(x, ts[i])
        k2 = velocity(torch.add(x, k1, alpha=h / 3), inner[2 * i])
        k3 = velocity(torch.add(x, torch.sub(k2, k1, alpha=1 / 3), alpha=h), inner[2 * i + 1])
        k4 = velocity(torch.add(x, (k1 - k2).add_(k3), alpha=h), ts[i + 1])
        x.add_((k1 + k4).add_(k2 + k3, alpha=3.0), alpha=h / 8)
    return x


def ab2(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    x, ts, last, h_last = x.clone(), _times(x, times), None, 1.0
    for i, (t, u) in enumerate(pairwise(times)):
        k, h = velocity(x, ts[i]), u - t
        r = h / h_last
        if last is None:
            x.add_(k, alpha=h)
        else:
            x.add_(k, alpha=h * (1 + r / 2)).add_(last, alpha=-h * r / 2)
        last, h_last = k, h
    return x


def dpmpp_2m(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """DPM-Solver++ (2M) on the straight path, in the prediction of the data."""
    ts, last, h_last = _times(x, times), None, math.inf
    for i, (t, u) in enumerate(pairwise(times)):
        data = torch.add(x, velocity(x, ts[i]), alpha=1 - t)
        mixed, share = data, (1 - u) / (1 - t)
        if u < 1 and t > 0:
            h = math.log(u / (1 - u)) - math.log(t / (1 - t))
            if last is not None and h_last < math.inf:
                mixed = torch.add(data, data - last, alpha=h / (2 * h_last))
            h_last = h
        x = (share * x).add_(mixed, alpha=u - t * share)
        last = data
    return x


LOOPS: dict[str, Loop] = {loop.__name__: loop for loop in (euler, midpoint, heun2, rk4, rk4_38, ab2, dpmpp_2m)}


def dopri5(velocity: Velocity, x: Tensor, tolerance: float) -> Tensor:
    """From 0 to 1 with one step size for the whole batch, the error's norm read by the host at each step."""
    table = TABLEAUS["dopri5"]
    assert table is not None
    assert table.error is not None

    def norm(value: Tensor, scale: Tensor) -> float:
        return float((value / scale).square().mean().sqrt())

    def at(time: float) -> Tensor:
        return torch.full((), time, dtype=x.dtype, device=x.device)

    t, first = 0.0, velocity(x, at(0.0))
    scale = tolerance + tolerance * x.abs()
    d0, d1 = norm(x, scale), norm(first, scale)
    h = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
    d2 = norm(velocity(x + h * first, at(h)) - first, scale) / h
    h = min(100 * h, (0.01 / max(d1, d2, 1e-15)) ** 0.2)
    while t < 1.0:
        h = min(h, 1.0 - t)
        ks, y = [first], x
        for c, row in zip(table.c[1:], table.a[1:], strict=True):
            y = x
            for a, k in zip(row, ks, strict=True):
                y = y if a == 0.0 else torch.add(y, k, alpha=h * a)
            ks.append(velocity(y, at(t + c * h)))
        off = (h * table.error[0]) * ks[0]
        for e, k in zip(table.error[1:], ks[1:], strict=True):
            off = off if e == 0.0 else torch.add(off, k, alpha=h * e)
        error = norm(off, tolerance + tolerance * torch.maximum(x.abs(), y.abs()))
        if error <= 1.0:
            t = 1.0 if h >= 1.0 - t else t + h
            x, first = y, ks[-1]
        h *= min(10.0, max(0.9 * max(error, 1e-10) ** -0.2, 0.2))
    return x
