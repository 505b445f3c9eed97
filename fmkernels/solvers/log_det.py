"""Log-determinants of fixed-grid programs: which weight each evaluation's divergence has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .._checks import value_error
from ..paths import CondOT
from .program import Builder, Compute, EndStep, Evaluate, Method, Number, Program


def log_det_weights(program: Program) -> list[Number]:
    """The weight of each evaluation's divergence in the log-determinant of a program's map.

    Raises:
        ValueError: a step is not x' = x + sum_i c_i v_i (an exponential integrator, noise, a nonlinear step).
    """
    contents: dict[int, dict[int, Number]] = {0: {0: 1.0}}
    state = 0
    order: list[int] = []
    weights: dict[int, Number] = {}
    for instruction in program.instructions:
        if isinstance(instruction, Evaluate):
            if len(instruction.results) != 1:
                raise _not_a_sum("several outputs in one call of the model")
            (result,) = instruction.results
            order.append(result)
            contents[result] = {result: 1.0}
            weights[result] = 0.0
        elif isinstance(instruction, Compute):
            raise _not_a_sum("a step that is not linear")
        elif isinstance(instruction, EndStep):
            for base, coefficient in contents[instruction.state].items():
                if base in weights:
                    weights[base] = weights[base] + coefficient
                elif not np.allclose(coefficient, 1.0 if base == state else 0.0, rtol=0.0, atol=1e-9):
                    raise _not_a_sum(f"{coefficient} times a state")
            state = instruction.state
            contents[state] = {state: 1.0}
        else:
            total: dict[int, Number] = {}
            for source, coefficient in zip(instruction.sources, instruction.coefficients, strict=True):
                if source < 0:
                    raise _not_a_sum("noise")
                for base, inner in contents[source].items():
                    total[base] = total.get(base, 0.0) + coefficient * inner
            contents[instruction.result] = total
    return [weights[result] for result in order]


def _not_a_sum(found: str) -> ValueError:
    return ValueError(
        "method: expected one whose steps are x + sum_i c_i v_i (Runge-Kutta or Adams methods), as log-densities need, "
        f"got one with {found}"
    )


def weight_table(program: Program, like: Tensor) -> Tensor:
    """(evaluations,) or (evaluations, B) weights on the divergences' device."""
    key = ("log_det", like.device, like.dtype)
    if key not in program.cache:
        numbers = np.asarray(np.broadcast_arrays(*log_det_weights(program)), np.float64)
        if numbers.ndim > 2:
            raise value_error("time_grid", "times of the whole batch or of each sample", numbers.shape)
        program.cache[key] = torch.from_numpy(numbers).to(like.dtype).to(like.device)
    return program.cache[key]


@lru_cache(maxsize=32)
def _plan(method: Method, grid: tuple[float, ...]) -> Program:
    return _build(method, list(grid))


def _build(method: Method, grid: Sequence[Number]) -> Program:
    builder = Builder(grid, CondOT())
    method(builder)
    return builder.program()


def plan(method: Method, grid: list[Number]) -> Program:
    """The program of a method for a velocity on a grid; the same object for the same hashable arguments."""
    if not all(isinstance(t, float) for t in grid) or type(method).__hash__ is None:
        return _build(method, grid)
    return _plan(method, tuple(grid))  # type: ignore[arg-type]
