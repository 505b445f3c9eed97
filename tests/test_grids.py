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


@pytest.mark.parametrize("terminal", [0.02, 0.1])
def test_stretched_shifts_end_at_their_terminal_level(terminal: float) -> None:
    """diffusers' shift_terminal: of the levels before the appended 0, 1 - (1 - s) (1 - T) / (1 - s_last)."""
    for schedule in (fm.times.Shift(3.0), "uniform", "cosine", grids.Karras()):
        levels = 1.0 - grids.times_of(schedule, 8)
        wanted = 1.0 - (1.0 - levels[:-1]) * (1.0 - terminal) / (1.0 - levels[-2])
        times = grids.times_of(grids.Stretched(schedule, terminal), 8)
        np.testing.assert_allclose(1.0 - times, np.append(wanted, 0.0), rtol=1e-12, atol=1e-15)
        assert 1.0 - times[-2] == pytest.approx(terminal)
        assert grids.times_of(grids.Stretched(schedule, terminal), 1).tolist() == [0.0, 1.0]
    for bad in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="terminal: expected"):
            grids.Stretched("uniform", bad)
    with pytest.raises(TypeError, match="schedule: expected"):
        grids.Stretched(3.0, 0.1)


def test_a_schedule_gives_a_time_more_than_steps() -> None:
    """n times for n steps were taken as n - 1 steps."""
    x = torch.zeros(2, 2)
    for schedule in (
        lambda n: torch.linspace(0.0, 1.0, n),
        lambda n: np.linspace(0.0, 1.0, n + 2),
        lambda n: torch.tensor(0.5),
    ):
        with pytest.raises(ValueError, match="schedule: expected a function from a number of steps, here 4, to one"):
            fm.sample(field, x, steps=4, schedule=schedule)
    per_sample = lambda n: torch.linspace(0.0, 1.0, n + 1)[:, None].repeat(1, 2)  # noqa: E731
    assert fm.sample(field, x, steps=4, schedule=per_sample)[1].steps == 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, "float32"])
def test_times_are_floating(dtype) -> None:
    """Integer times were 0 at every step but the last."""
    x = torch.zeros(2, 2)
    for call in (
        lambda: fm.sample(field, x, time_dtype=dtype),
        lambda: fm.Solver(field, time_dtype=dtype),
        lambda: fm.log_prob(field, x, time_dtype=dtype),
        lambda: list(fm.sample_stream(field, list(x), capacity=2, time_dtype=dtype)),
    ):
        with pytest.raises(TypeError, match="time_dtype: expected a floating dtype"):
            call()
