"""A Gaussian problem with its exact velocity, fixed-grid programs on it, and their exact moments."""

from __future__ import annotations

import math

import numpy as np
import torch

from fmkernels.paths import Path
from fmkernels.solvers.programs.builder import Builder
from fmkernels.solvers.programs.expressions import as_grid
from fmkernels.solvers.programs.program import Compute, Evaluate, Program, Update
from fmkernels.solvers.programs.run import Run
from fmkernels.solvers.programs.tables import numbers_for

MEAN, STD = 1.0, 0.5


class Gaussian:
    """The exact velocity for data N(MEAN, STD^2), affine in x; counts its calls."""

    def __init__(self, path: Path) -> None:
        self.path, self.times = path, []

    def affine(self, t):
        """(p, q) of v = p + q x."""
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(t)[:4]
        variance = (alpha * STD) ** 2 + sigma**2
        q = (d_alpha * alpha * STD**2 + d_sigma * sigma) / variance
        return d_alpha * MEAN - q * alpha * MEAN, q

    def __call__(self, x, t):
        self.times.append(t)
        p, q = (c.reshape(c.shape + (1,) * (x.dim() - c.dim())).to(x.dtype) for c in self.affine(t))
        return p + q * x

    def start(self, samples: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Samples of the path's marginal at t = 0."""
        mean, std = self.marginal(0.0)
        g = torch.Generator().manual_seed(7)
        return mean + std * torch.randn(samples, 2, generator=g, dtype=dtype)

    def marginal(self, t: float) -> tuple[float, float]:
        alpha, sigma = (float(c) for c in self.path.coefficients(torch.tensor(t, dtype=torch.float64))[:2])
        return alpha * MEAN, math.hypot(alpha * STD, sigma)


def uniform(steps: int, start: float = 0.0, end: float = 1.0) -> list:
    return as_grid(np.linspace(start, end, steps + 1))


def program_of(method, grid: list, path: Path, prediction: str = "velocity") -> Program:
    builder = Builder(grid, path, prediction)
    method(builder)
    return builder.program()


def run(method, grid, path, model, x, seed=3, row_offset=0, prediction="velocity", trajectory=None) -> Run:
    program = program_of(method, grid, path, prediction)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    solve = Run(
        program,
        {"": model},
        x,
        numbers_for(program, x, dtype, "batch"),
        seed=torch.tensor(seed),
        row_offset=row_offset,
        reuse=True,
        trajectory=trajectory,
    )
    solve.all()
    return solve


def response(program: Program, affine, mean: float, std: float) -> np.ndarray:
    """The result as coefficients of 1, of the initial state's noise, and of each z; ``affine(t)`` is the drift's."""
    width = 2 + program.streams
    registers = {0: np.zeros(width)}
    registers[0][:2] = mean, std
    times = torch.tensor(program.times, dtype=torch.float64)
    p, q = (torch.as_tensor(c, dtype=torch.float64).expand_as(times).numpy() for c in affine(times))
    for instruction in program.instructions:
        if isinstance(instruction, Evaluate):
            registers[instruction.results[0]] = q[instruction.time] * registers[instruction.source]
            registers[instruction.results[0]][0] += p[instruction.time]
        elif isinstance(instruction, Update):
            total = np.zeros(width)
            for source, coefficient in zip(instruction.sources, instruction.coefficients, strict=True):
                if source >= 0:
                    total += coefficient * registers[source]
                else:
                    total[1 - source] += coefficient
            registers[instruction.result] = total
        else:
            assert not isinstance(instruction, Compute)
    return registers[program.result]


def moments(program: Program, model: Gaussian, mean: float, std: float) -> tuple[float, float]:
    """The exact mean and standard deviation of the result, the initial state being N(mean, std^2)."""
    result = response(program, model.affine, mean, std)
    return result[0], float(np.linalg.norm(result[1:]))
