"""Flows, networks and data that the tests of divergences and log-densities share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

DTYPE = torch.float64
SHAPES = [(5,), (4, 2), (3, 2, 4, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expand(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(t.shape + (1,) * (x.dim() - t.dim()))


def normal_flow(mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact velocity of the optimal-transport path from N(0, 1) to N(mean, std^2), samples being independent.

    x_t = t x_1 + (1 - t) x_0 has mean t m and variance w = t^2 s^2 + (1 - t)^2;
    E[x_1 - x_0 | x_t] = m + (t s^2 - (1 - t)) / w (x_t - t m).
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = expand(t, x)
        variance = t**2 * std**2 + (1.0 - t) ** 2
        return mean + (t * std**2 - (1.0 - t)) / variance * (x - t * mean)

    return velocity


class Network(nn.Module):
    """A small network on any shape, with a full Jacobian that depends on the time."""

    def __init__(self, dims: int, hidden: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(dims + 1, hidden), nn.SiLU(), nn.Linear(hidden, dims)).to(DTYPE)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        column = t.expand(x.shape[0]).to(x.dtype)[:, None]
        return self.net(torch.cat([flat, column], 1)).reshape(x.shape)


def network(shape: tuple[int, ...], **options: int) -> Network:
    return Network(math.prod(shape[1:]), **options)


def field(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: model(x, t)


def jacobians(model: nn.Module, x: Tensor, t: float) -> Tensor:
    """(B, D, D)"""
    time = torch.tensor(t, dtype=x.dtype)
    rows = [torch.func.jacrev(lambda one: model(one[None], time)[0])(one) for one in x]
    dims = math.prod(x.shape[1:])
    return torch.stack(rows).reshape(x.shape[0], dims, dims).detach()


def data(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=DTYPE)
