"""A conditional field, fixed-grid solves of it with guidance, and the rules of guidance in plain PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch

from fmkernels.guidance import CFG
from fmkernels.paths import CondOT
from fmkernels.solvers.methods.registry import resolve
from fmkernels.solvers.programs.builder import Builder
from fmkernels.solvers.programs.expressions import as_grid
from fmkernels.solvers.programs.run import Run
from fmkernels.solvers.programs.tables import numbers_for

B, NULL = 3, 9
SHAPES = [(B, 5), (B, 2, 3, 4)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
GRID = [0.05, 0.2, 0.45, 0.7, 0.95]
EULER = resolve("euler")


class Model:
    """A smooth conditional field with labels (B,); counts its calls and rows."""

    def __init__(self, strength: float = 1.0) -> None:
        self.rows, self.strength = [], strength

    def __call__(self, x, t, y=None, table=None, extra=None, flag=None):
        self.rows.append(x.shape[0])
        t = t.reshape(t.shape + (1,) * (x.dim() - t.dim())).to(x.dtype)
        v = torch.sin(2.0 * x) * (0.5 + t) + 0.3 * x.flip(-1)
        if y is not None:
            y = y.reshape(-1, *(1,) * (x.dim() - 1)).to(x.dtype)
            v = v + self.strength * torch.cos(y + x + t)
        if table is not None:
            v = v + table.sum()
        if extra is not None:
            v = v + extra["shift"].reshape(-1, *(1,) * (x.dim() - 1))
        return v


def data(shape=SHAPES[0], dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=g, dtype=dtype), torch.arange(shape[0]) % 4


def solve(guidance, model, x, method=EULER, grid=GRID, path=None, prediction="velocity", buffers=True, **kwargs):
    builder = Builder(grid if isinstance(grid, list) else as_grid(grid), path or CondOT(), prediction, guidance)
    method(builder)
    program = builder.program()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    run = Run(
        program,
        guidance.calls(model, kwargs),
        x,
        numbers_for(program, x, dtype, "batch"),
        reuse=buffers,
    )
    run.all()
    return run.result


def euler(rule, x, grid=GRID):
    """rule(x, t, step number) is the velocity at t, a (B,) tensor."""
    for i, (t, u) in enumerate(itertools.pairwise(grid)):
        x = x + (u - t) * rule(x, torch.full((x.shape[0],), t, dtype=torch.float64), i)
    return x


def pair(y, model=None):
    model = model or Model()
    null = torch.full_like(y, NULL)
    return lambda x, t: (model(x, t, y=y), model(x, t, y=null))


def wide(w, x):
    return w.reshape(w.shape + (1,) * (x.dim() - w.dim()))


def std(x):
    return x.flatten(1).std(1).reshape(-1, *(1,) * (x.dim() - 1))


def dot(a, b):
    return (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.dim() - 1))


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# What each rule of c and u alone means, as a function of (c, u): the papers' formulas.
W = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)


def lin_rescale(c, v, phi):
    return phi * v * (std(c) / std(v)) + (1 - phi) * v


def zero_star(c, u, w):
    s = dot(c, u) / (dot(u, u) + 1e-8)
    return s * u + w * (c - s * u)


RULES = {
    "scale": (lambda **k: CFG(3.0, **k), lambda c, u: u + 3.0 * (c - u)),
    "int": (lambda **k: CFG(3, **k), lambda c, u: u + 3.0 * (c - u)),
    "weight": (lambda **k: CFG(2.0, convention="weight", **k), lambda c, u: (1 + 2.0) * c - 2.0 * u),
    "per sample": (lambda **k: CFG(W, **k), lambda c, u: u + wide(W, c) * (c - u)),
    "per sample weight": (
        lambda **k: CFG(W.numpy(), convention="weight", **k),
        lambda c, u: (1 + wide(W, c)) * c - wide(W, c) * u,
    ),
    "rescale": (lambda **k: CFG(3.0, rescale=0.7, **k), lambda c, u: lin_rescale(c, u + 3.0 * (c - u), 0.7)),
    "zero star": (lambda **k: CFG(3.0, zero_star=True, zero_init=0, **k), lambda c, u: zero_star(c, u, 3.0)),
    "all": (
        lambda **k: CFG(W, rescale=1.0, zero_star=True, zero_init=0, **k),
        lambda c, u: lin_rescale(c, zero_star(c, u, wide(W, c)), 1.0),
    ),
}
each_rule = pytest.mark.parametrize("rule", RULES)


class APGOracle:
    """Sadat et al. 2024, algorithm 1, on predictions."""

    def __init__(self, w, eta=0.0, threshold=0.0, momentum=0.0, base="conditional"):
        self.w, self.eta, self.threshold, self.momentum, self.base = w, eta, threshold, momentum, base
        self.average = 0.0

    def __call__(self, c, u):
        self.average = (c - u) + self.momentum * self.average
        change = self.average
        if self.threshold:
            change = change * torch.clamp(self.threshold / dot(change, change).sqrt(), max=1.0)
        unit = c / dot(c, c).sqrt()
        parallel = dot(change, unit) * unit
        change = (change - parallel) + self.eta * parallel
        return c + (self.w - 1.0) * change if self.base == "conditional" else u + self.w * change
