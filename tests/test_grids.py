"""Time grids of sampling: where the times of each schedule lie, and what its parameters do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fmkernels as fm
from fmkernels.solvers.sampling import grids


def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return -x


@pytest.mark.parametrize(
    "schedule",
    [*grids.SCHEDULES, fm.times.Shift(3.0), lambda n: torch.linspace(0, 1, n + 1) ** 3],
    ids=[*grids.SCHEDULES, "shift", "function"],
)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedules_run_from_noise_to_data(schedule, steps: int) -> None:
    times = grids.times_of(schedule, steps)
    assert times.shape == (steps + 1,)
    assert times[0] == 0.0
    assert times[-1] == 1.0
    assert (np.diff(times) > 0).all()
    fm.sample(field, torch.zeros(2, 2), steps=steps, schedule=schedule)


SHARE = np.linspace(0.0, 1.0, 9)  # of 8 steps


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_powers(power: float) -> None:
    np.testing.assert_allclose(grids.Power(power)(8), SHARE**power, rtol=1e-15)


def test_uniform_and_cosine() -> None:
    np.testing.assert_allclose(grids.Uniform()(8), SHARE, rtol=1e-15)
    np.testing.assert_allclose(grids.Cosine()(8), 0.5 - 0.5 * np.cos(math.pi * SHARE), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("sigma_min", [1e-4, 0.002, 0.3])
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_logarithmic_levels_reach_the_least_before_data(steps: int, sigma_min: float) -> None:
    sigma = 1.0 - grids.Log(sigma_min)(steps)
    assert sigma[0] == 1.0
    assert sigma[-2] == pytest.approx(sigma_min, rel=1e-10)
    assert sigma[-1] == 0.0
    ratios = sigma[1:-1] / sigma[:-2]
    np.testing.assert_allclose(ratios, sigma_min ** (1.0 / (steps - 1)), rtol=1e-9)


@pytest.mark.parametrize("rho", [1.0, 7.0])
@pytest.mark.parametrize(("low", "high"), [(0.002, 80.0), (0.01, 50.0)])
def test_karras_levels(low: float, high: float, rho: float) -> None:
    times = grids.Karras(low, high, rho)(10)
    levels = 1.0 / times[1:-1] - 1.0
    roots = np.linspace(high ** (1.0 / rho), low ** (1.0 / rho), 10)[1:]
    np.testing.assert_allclose(levels, roots**rho, rtol=1e-9)
    assert times[0] == 0.0
    assert times[-1] == 1.0


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifts(shift: float) -> None:
    """On noise levels s = 1 - t: shift s / (1 + (shift - 1) s), as Esser et al. 2024 (eq. 23) move them."""
    times = grids.times_of(fm.times.Shift(shift), 8)
    level = 1.0 - SHARE
    np.testing.assert_allclose(1.0 - times, shift * level / (1.0 + (shift - 1.0) * level), rtol=1e-12, atol=1e-15)
