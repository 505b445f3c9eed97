"""Adaptive and fixed-grid solves on random states and networks: the compiled engine against single operations."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from layouts import lay_out, shape
from torch import Tensor

import fmkernels as fm

ROUNDS = int(os.environ.get("FMKERNELS_FUZZ_ROUNDS", "40")) // 4 + 1


class Network:
    """dy/dt = -rate y. Its outputs lie in any layout, in one buffer, or are no ordinary tensors."""

    def __init__(self, rng: random.Random, *more: str) -> None:
        self.rng, self.kind = rng, rng.choice(("plain", "laid out", "negative", "subclass", *more))
        self.buffer: Tensor | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        k = -1.5 * y
        if self.kind == "laid out":
            copy = lay_out(self.rng, k)
            return copy if torch.equal(copy, k) else k
        if self.kind == "static":
            if self.buffer is None or self.buffer.shape != k.shape:
                self.buffer = torch.empty_like(k)
            return self.buffer.copy_(k)
        if self.kind == "negative" and k.dtype in (torch.float32, torch.float64):
            return torch.complex(torch.zeros_like(k), -k).conj().imag
        if self.kind == "subclass":
            return torch.nn.Parameter(k, requires_grad=False)
        return k


@pytest.mark.parametrize("number", range(ROUNDS))
def test_adaptive_solves(number: int) -> None:
    rng = random.Random(number)
    size = shape(rng, 1, 4000)
    dtype = rng.choice((torch.float32, torch.float64))
    y = lay_out(rng, torch.rand(size, generator=torch.Generator().manual_seed(number), dtype=dtype))
    times = torch.linspace(0.0, 1.0, rng.choice((2, 3, 6)), dtype=dtype)
    method = rng.choice(("dopri5", "bosh3", "adaptive_heun", "tsit5", "dopri8"))
    tolerance = 1e-4
    ys = fm.odeint(Network(rng, "static"), y, times, method=method, rtol=tolerance, atol=tolerance)
    want = y * torch.exp(-1.5 * times).reshape(-1, *[1] * y.dim())
    torch.testing.assert_close(ys, want, rtol=0, atol=5e-3)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_fixed_grid_sampling(number: int) -> None:
    rng = random.Random(500 + number)
    size = shape(rng, 1, 4000) or (3,)
    if 0 in size:
        size = (2, 3)
    x = lay_out(rng, torch.rand(size, generator=torch.Generator().manual_seed(number)))
    network = Network(rng)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return network(t, x)

    options: dict[str, Any] = {"method": rng.choice(("euler", "midpoint", "heun2", "rk4", "ab2")), "steps": 20}
    got, *_ = fm.sample(model, x, **options)
    torch.testing.assert_close(got, x * 0.22313016, rtol=0, atol=0.03)
