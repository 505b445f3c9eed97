"""What the tests of the flow and diffusion solvers share: running a method, grids, networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fmkernels as fm
from fmkernels.paths import VP, CondOT
from fmkernels.solvers.programs.builder import Builder
from fmkernels.solvers.programs.run import Run
from fmkernels.solvers.programs.tables import GivenNumbers, coefficients_of

SEED = 12345
TWO_PATHS = pytest.mark.parametrize("path", [CondOT(), VP()], ids=repr)


def program_of(method, grid, path, prediction="velocity"):
    builder = Builder(list(grid), path, prediction)
    method(builder)
    return builder.program()


def execute(program, model, x_0, noises=None, row_offset=0):
    times = [torch.from_numpy(np.broadcast_to(np.asarray(t), x_0.shape[:1]).copy()) for t in program.times]
    seed = torch.tensor(SEED)
    numbers = GivenNumbers(program, times, coefficients_of(program, x_0))
    run = Run(program, {"": model}, x_0, numbers, seed, row_offset=row_offset, reuse=True)
    if noises is not None:
        run.noises = noises
    run.all()
    return run.result.clone()


def solve(method, grid, path, model, x_0, prediction="velocity", **options):
    return execute(program_of(method, grid, path, prediction), model, x_0, **options)


def even(start, end, steps):
    return [float(t) for t in np.linspace(start, end, steps + 1)]


def uneven(start, end, steps):
    """Smoothly graded, so that first steps of low order do not hide a method's own."""
    return [float(start + (end - start) * s * s * (1.5 - 0.5 * s)) for s in np.linspace(0.0, 1.0, steps + 1)]


def level(path, t):
    time = torch.tensor(t, dtype=torch.float64)
    return float(path.coefficients(time).alpha_t), float(path.coefficients(time).sigma_t)


def noise(x, stream):
    return fm.randn(x.shape, seed=SEED, stream=stream, dtype=x.dtype)


def states(count=9):
    return torch.linspace(-2.0, 2.0, count, dtype=torch.float64)[:, None]


def network(x, t):
    """Any smooth velocity."""
    t = t[:, None]
    return torch.tanh(1.3 * x - 2.0 * t) + 0.5 * torch.cos(3.0 * t) * x


def data_network(x, t):
    """Any smooth data prediction."""
    return torch.tanh(x + t[:, None]) + 0.2 * x * torch.sin(2.0 * t[:, None])


def at(model, x, t):
    return model(x, torch.full(x.shape[:1], t, dtype=x.dtype))
