r"""Time grids for sampling, from noise (t = 0) to data (t = 1).

A schedule is a function of the number of steps n to n + 1 increasing float64 times from 0 to 1, or to its own ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ..._checks import check_callable, check_int, check_number, real_array, value_error
from ..._names import Names
from ...times import Shift
from ..programs.expressions import Number, as_grid

Schedule = Callable[[int], np.ndarray]
MOST_STEPS = 2**31 - 1


@final
@dataclass(frozen=True)
class Uniform:
    """t_i = i / n."""

    def __call__(self, steps: int) -> np.ndarray:
        return np.linspace(0.0, 1.0, steps + 1)


@final
@dataclass(frozen=True)
class Power:
    """t_i = (i / n)^power: power > 1 puts steps near noise, power < 1 near data.

    Args:
        power: > 0.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        check_number("power", self.power, above=0.0)

    def __call__(self, steps: int) -> np.ndarray:
        return np.linspace(0.0, 1.0, steps + 1) ** self.power


@final
@dataclass(frozen=True)
class Cosine:
    """t_i = sin^2(pi i / (2 n)): fine steps at both ends."""

    def __call__(self, steps: int) -> np.ndarray:
        times = np.sin(0.5 * math.pi * np.linspace(0.0, 1.0, steps + 1)) ** 2
        times[-1] = 1.0
        return times


@final
@dataclass(frozen=True)
class Log:
    """Noise levels sigma = 1 - t spaced evenly in log sigma down to ``sigma_min``, then 0: fine steps near data.

    Args:
        sigma_min: 0 < sigma_min < 1, the last noise level before 0.
    """

    sigma_min: float = 0.002

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min, above=0.0, high=1.0 - 1e-9)

    def __call__(self, steps: int) -> np.ndarray:
        if steps == 0:
            return np.zeros(1)
        sigma = self.sigma_min ** np.linspace(0.0, 1.0, steps)
        return 1.0 - np.append(sigma, 0.0) if steps > 1 else np.array([0.0, 1.0])


@final
@dataclass(frozen=True)
class Karras:
    r"""Variance-exploding noise levels evenly spaced in their root (Karras et al. 2022, eq. 5).

    :math:`s_i = (s_{max}^{1/\rho} + \frac{i}{n-1} (s_{min}^{1/\rho} - s_{max}^{1/\rho}))^\rho`, met at t = 1 / (1 + s)
    (s is sigma / alpha on the optimal-transport path). The first is moved to t = 0, and t = 1 follows the last.

    Args:
        sigma_min, sigma_max: 0 < sigma_min < sigma_max.
        rho: > 0; larger puts more steps near data.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min, above=0.0)
        check_number("sigma_max", self.sigma_max, above=self.sigma_min)
        check_number("rho", self.rho, above=0.0)

    def __call__(self, steps: int) -> np.ndarray:
        if steps < 2:
            return np.linspace(0.0, 1.0, steps + 1)
        low, high = self.sigma_min ** (1.0 / self.rho), self.sigma_max ** (1.0 / self.rho)
        # the first interval begins at pure noise: its level sigma_max is moved to t = 0
        s = (high + np.linspace(0.0, 1.0, steps) * (low - high)) ** self.rho
        times = np.append(1.0 / (1.0 + s), 1.0)
        times[0] = 0.0
        return times


@final
@dataclass(frozen=True)
class Stretched:
    r"""Another schedule, stretched so that the last noise level before 0 is ``terminal`` (diffusers' "shift_terminal").

    :math:`\sigma' = 1 - (1 - \sigma) \frac{1 - T}{1 - \sigma_{last}}` for the noise levels sigma = 1 - t but the last,
    which stays 0; e.g. ``Stretched(fm.times.Shift(3.0), 0.1)``.

    Args:
        schedule: a name, an :class:`fmkernels.times.Shift`, or a function of the number of steps.
        terminal: T in (0, 1). A grid of one step has no level between.
    """

    schedule: str | Shift | Schedule
    terminal: float

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        check_number("terminal", self.terminal, above=0.0)
        if self.terminal >= 1.0:
            raise value_error("terminal", "a number < 1", self.terminal)

    def __call__(self, steps: int) -> np.ndarray:
        times = times_of(self.schedule, steps)
        if steps < 2:
            return times
        return np.append(times[:-1] * ((1.0 - self.terminal) / times[-2]), times[-1:], axis=0)


SCHEDULES: Names[Schedule] = Names(
    "schedule",
    {"uniform": Uniform(), "power": Power(), "cosine": Cosine(), "log": Log(), "karras": Karras()},
)


def check_schedule(schedule: Any) -> None:
    """That a schedule is one: a name, a shift or a function."""
    if isinstance(schedule, str):
        SCHEDULES.find(schedule)
    elif not isinstance(schedule, Shift):
        check_callable("schedule", "a name, an fm.times.Shift or a function of the number of steps", schedule)


def times_of(schedule: str | Shift | Schedule, steps: int) -> np.ndarray:
    """n + 1 times of a schedule by name, a resolution shift of even steps, or any function of n."""
    check_int("steps", steps, low=0, high=MOST_STEPS)
    if isinstance(schedule, str):
        schedule = SCHEDULES.find(schedule)
    if isinstance(schedule, Shift):
        return schedule(torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64, device="cpu")).numpy()
    check_schedule(schedule)
    times = real_array("schedule(steps)", "times: numbers in a tensor, an array or a sequence", schedule(steps))
    if times.ndim == 0 or times.shape[0] != steps + 1:
        raise value_error("schedule", f"a function from a number of steps, here {steps}, to one time more", times)
    return times


_BEYOND = 1e-6  # what rounding may put a time beyond its interval


def make_grid(
    steps: int,
    schedule: str | Shift | Schedule,
    time_grid: Tensor | np.ndarray | Sequence[float] | None,
    *,
    waiting: bool = False,
) -> list[Number]:
    """The times of a solve, within [0, 1]: given, or of a schedule.

    Args:
        waiting: a sample's or token's own times may stay the same.
    """
    if time_grid is None:
        grid = as_grid(times_of(schedule, steps), waiting=waiting, name="schedule", unit=0.0)
    else:
        grid = as_grid(time_grid, waiting=waiting)
    if any(isinstance(t, np.ndarray) and t.size == 0 for t in grid[:1]):
        return grid  # of no samples
    low, high = _range(grid[0], grid[-1])  # times are monotone
    if low < -_BEYOND or high > 1.0 + _BEYOND:
        raise ValueError(
            f"{'schedule' if time_grid is None else 'time_grid'}: expected times in [0, 1], from noise (t = 0) to data "
            f"(t = 1), got times from {low:g} to {high:g}{times_hint(low, high)}"
        )
    return grid


def _range(*times: Number) -> tuple[float, float]:
    lows, highs = zip(*((t, t) if isinstance(t, float) else (np.min(t), np.max(t)) for t in times), strict=True)
    return float(min(lows)), float(max(highs))


def times_hint(low: float, high: float) -> str:
    """What to do about times outside [0, 1]."""
    if low < 0.0 or high <= 2.0:
        return ""
    return (
        f"; for a network whose times run to {high:g}, divide them here and multiply them there: "
        f"lambda x, t: net(x, {high:g} * t)"
    )
