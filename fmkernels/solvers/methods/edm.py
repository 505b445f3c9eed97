r"""Solvers in the noise level :math:`\rho = \sigma / \alpha` of EDM, with churn and with restarts, on any affine path.

A state is noised back from t to an earlier time s by :math:`x_s = a x + \sqrt{\sigma_s^2 - a^2 \sigma_t^2} z`,
:math:`a = \alpha_s / \alpha_t`, which keeps the marginals of every path.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from ..._checks import check_bool, check_int, check_number, is_infinite, type_error
from ..programs.builder import Builder
from ..programs.expressions import Expr, Number, either
from . import noise_levels as ei
from .noise_levels import Level
from .own_steps import OwnSteps


def _step(builder: Builder, x: Expr, t: Level, u: Level, heun: bool) -> Expr:
    """Euler's or Heun's step of d(x / alpha) = E d rho; Euler's from pure noise and to pure data."""
    p = ei.predict(builder, x, t)
    x = ei.moved(p, u)
    weight = np.where(u.sigma == 0.0, 0.0, 0.5 * u.alpha * ei.difference(u.ratio, t.ratio))[()]
    if not heun or not np.any(weight):
        return x
    return x + weight * (ei.predict(builder, x, u).x_0 - p.x_0)


def _noised_back(x: Expr, t: Level, to: Level, s_noise: float, z: Expr) -> Expr:
    """The state with the noise of an earlier level; as it is where the levels are the same."""
    same = np.equal(to.t, t.t)
    a: Number = np.where(same, 1.0, to.alpha / np.where(same, 1.0, t.alpha))[()]
    deviation = np.where(same, 0.0, np.sqrt(np.maximum(to.sigma**2 - (a * t.sigma) ** 2, 0.0)))[()]
    return ei.noisy(a * x, s_noise * deviation, z)


def _level_where(builder: Builder, condition: Number, log_ratio: Number, other: Level) -> Level:
    """The level that has a lambda where the condition holds, elsewhere the other."""
    found = ei.level_at(builder.path, np.broadcast_to(log_ratio, np.shape(condition)).copy()[()])
    if np.all(condition):
        return found
    return ei.level(builder.path, np.where(condition, found.t, other.t)[()])


@final
@dataclass(frozen=True)
class EDM:
    r"""EDM's stochastic sampler (Karras et al. 2022, alg. 2) with Heun's or Euler's step.

    Where :math:`s_{tmin} \le \rho \le s_{tmax}` noise is added first, up to the level :math:`\hat\rho = (1 + \gamma)
    \rho`, :math:`\gamma = \min(s_{churn} / n, \sqrt 2 - 1)` for n steps of a sample's own (no further than the path's
    beginning), then :math:`d(x / \alpha) = E d\rho` is solved from there. Two calls a step with Heun, one in a step
    from pure noise or to pure data, which is Euler's; one with Euler.

    Args:
        s_churn: >= 0; 0 adds no noise and solves the ODE.
        s_tmin, s_tmax: noise levels sigma / alpha between which noise is added; pure noise gets none.
        s_noise: factor on added noise, 1 for exact marginals.
        heun: Heun's step.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    heun: bool = True

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_noise"):
            check_number(name, getattr(self, name), low=0.0)
        check_bool("heun", self.heun)
        if not is_infinite(self.s_tmax):
            check_number("s_tmax", self.s_tmax, low=self.s_tmin)

    def __call__(self, builder: Builder) -> None:
        steps = np.maximum(OwnSteps(builder.grid).total, 1)
        growth = np.log1p(np.minimum(self.s_churn / steps, math.sqrt(2.0) - 1.0))
        for t, u in ei.levels(builder, to_data=self.s_churn > 0.0):
            x, z = builder.x, builder.noise()
            churned = np.isfinite(t.ratio) & (t.ratio >= self.s_tmin) & (t.ratio <= self.s_tmax)
            if self.s_churn > 0.0 and np.any(churned):
                start = _level_where(builder, churned, t.log_ratio - growth, t)
                x, t = _noised_back(x, t, start, self.s_noise, z), start
            builder.advance(_step(builder, x, t, u, self.heun))


@final
@dataclass(frozen=True)
class RestartInterval:
    """Where to restart: from the noise level ``sigma_min`` (sigma / alpha) back to ``sigma_max``, in steps down again.

    Args:
        sigma_min, sigma_max: 0 < sigma_min < sigma_max.
        steps: steps of each way down, >= 1; None takes as many as a sample's own grid has there, so that a finer grid
            also makes the restarts better. With a number their error stays.
        repeats: how often, >= 0.
    """

    sigma_min: float
    sigma_max: float
    steps: int | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min, above=0.0)
        check_number("sigma_max", self.sigma_max, above=self.sigma_min)
        if self.steps is not None:
            check_int("steps", self.steps, low=1)
        check_int("repeats", self.repeats, low=0)


@final
@dataclass(frozen=True)
class Restart:
    r"""Restart sampling (Xu et al. 2023, alg. 1): an ODE solver that goes back up in noise at chosen levels.

    When the grid reaches an interval's ``sigma_min``, noise is added up to its ``sigma_max`` and the ODE solved down
    again, ``repeats`` times, with steps even in :math:`\rho^{1/7}`. The grid's step around the level is split there.
    With Heun two calls for each step of :class:`EDM`'s, for each split and each step of a restart: on a grid from
    pure noise to pure data 2 n - 2 and 2 (1 + steps repeats) for each interval; with Euler n and half of the rest.

    Args:
        intervals: of :class:`RestartInterval`, in any order.
        heun: Heun's step (as in the paper), or Euler's.
        s_noise: factor on added noise, 1 for exact marginals.
        rho: exponent of the steps' levels.
    """

    intervals: tuple[RestartInterval, ...] = (RestartInterval(0.06, 0.3, repeats=2),)
    heun: bool = True
    s_noise: float = 1.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not isinstance(self.intervals, tuple) or not all(isinstance(i, RestartInterval) for i in self.intervals):
            raise type_error("intervals", "a tuple of RestartInterval", self.intervals)
        check_bool("heun", self.heun)
        check_number("s_noise", self.s_noise, low=0.0)
        check_number("rho", self.rho, above=0.0)

    def __call__(self, builder: Builder) -> None:
        intervals = sorted(self.intervals, key=lambda interval: -interval.sigma_min)
        # each sample comes by an interval once, whenever that is: its noise there is its own
        noises = [[builder.noise() for _ in range(interval.repeats)] for interval in intervals]
        for t, u in ei.levels(builder, to_data=True):
            x, here = builder.x, t
            for interval, drawn in zip(intervals, noises, strict=True):
                low = -math.log(interval.sigma_min)
                reached = (t.log_ratio < low) & (low <= u.log_ratio)
                if drawn and np.any(reached):
                    x, here = self._restarts(builder, x, here, interval, reached, drawn)
            if np.any(here.t != u.t):
                x = _step(builder, x, here, u, self.heun)
            builder.advance(x)

    def _way_down(self, builder: Builder, interval: RestartInterval, here: Level, reached: Number) -> list[Level]:
        """The levels from the interval's upper one to its lower one; whose way is shorter stays there at its end."""
        steps: Any = interval.steps or self._steps_between(builder, interval)
        down = []
        for i in range(int(np.max(np.where(reached, steps, 1))) + 1):
            ratio = ei.power_level(interval.sigma_max, interval.sigma_min, np.minimum(i / steps, 1.0), self.rho)
            down.append(_level_where(builder, reached, -np.log(ratio), here))
        return down

    @staticmethod
    def _steps_between(builder: Builder, interval: RestartInterval) -> Any:
        """How many steps a grid takes from the interval's upper level to its lower one, those cut by them too."""
        ratios = np.asarray(ei.level(builder.path, np.asarray(builder.grid, dtype=np.float64)).ratio)
        inside = (ratios > interval.sigma_min) & (ratios < interval.sigma_max)
        moving = OwnSteps(builder.grid).moving
        if moving is not None:  # a wait has its level once
            inside[1:] &= moving
        return 1 + np.sum(inside, axis=0)

    def _restarts(
        self, builder: Builder, x: Expr, here: Level, interval: RestartInterval, reached: Number, noises: list[Expr]
    ) -> tuple[Expr, Level]:
        """The state after an interval's restarts, at its lower level; samples that did not reach it stay ``here``."""

        def way(x: Expr, start: Level, end: Level) -> Expr:
            return either(np.not_equal(start.t, end.t), _step(builder, x, start, end, self.heun), x)

        down = self._way_down(builder, interval, here, reached)
        if np.any(down[-1].t != here.t):
            x = builder.keep(way(x, here, down[-1]))
        for z in noises:
            x = builder.keep(_noised_back(x, down[-1], down[0], self.s_noise, z))
            for start, end in itertools.pairwise(down):
                x = builder.keep(way(x, start, end))
        return x, down[-1]
