r"""Sampling by stochastic differential equations with the marginals of a path.

For any w(t) >= 0,

.. math:: dx = (v + w s)\,dt + \sqrt{2 w}\,dW

has the marginals of the flow dx = v dt (Ma et al. 2024, "SiT", eq. 5; Albergo et al. 2023). For a Gaussian source the
score is linear in the velocity of the same network call, :math:`s = -\hat x_0 / \sigma`, and so is every step here:
x' = a x + b v + c z with numbers that are known before the solve. Against time (noising) the sign of w s turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from ..._checks import check_choice, check_number, value_error
from ...paths import Path
from ...paths.targets import conversion_coefficients
from ..programs.builder import Builder
from ..programs.expressions import ZERO, Expr, Number, as_number, grid_of
from .noise_levels import noisy
from .own_steps import OwnSteps
from .sde_coefficients import Diffusion, over_sigma, renewed, resolve
from .step_density import REDUCTIONS, report

METHODS = ("euler", "heun", "exponential")
LAST_STEPS = ("none", "mean", "tweedie", "euler")


class Transition(NamedTuple):
    """A step to N(x_coefficient x + v_coefficient v, std^2), v being the velocity: float64, of the times' shape."""

    x_coefficient: Tensor
    v_coefficient: Tensor
    std: Tensor


class _Increment(NamedTuple):
    """The drift times the step, p x + q v, and the variance of its noise: w at one time, over one step.

    ``strength`` is what the drift takes from the noise in the state beside the flow, in the same step.
    """

    p: Tensor
    q: Tensor
    variance: Tensor
    strength: Tensor


@final
@dataclass(frozen=True)
class SDE:
    r"""A marginal-preserving SDE and its integrator; itself a method, so that ``method=fm.SDE(...)`` samples with it.

    ============= ===== ========================================================================== ==============
    method        calls a step                                                                       order
    ============= ===== ========================================================================== ==============
    euler         1     Euler-Maruyama: x + h (v + w s) + sqrt(2 w h) z                              weak 1, strong 1
    heun          2     the drift's trapezoidal rule, with the Euler step as its predictor and one   weak 2, strong 1
                        noise for both: of the mean variance (w + w') h where data outweighs noise,
                        before that of the variance that keeps the state's for a fixed data
                        prediction, so that w may begin at infinity
    exponential   1     alpha' x_1 + sigma' (e^-L x_0 + sqrt(1 - e^-2L) z), L the integral of        weak 1, strong 1
                        w / sigma^2: exact for a fixed data prediction, stable at any step;
                        stochastic DDIM (Song et al. 2021), DDPM for "sbdm", DDIM for scale 0
    ============= ===== ========================================================================== ==============

    (Strong order 1 as the noise is additive. "euler" begins with a lower one where w is infinite at t = 0, as for
    "flow_grpo", and "exponential" ends with one where w is not 0 at t = 1, as for "constant".) Per step w is limited to
    sigma^2 / h in the explicit methods, where a step renews all noise: more is unstable, and any w has the right
    marginals. So each choice is finite from t = 0 to t = 1, also those whose w (SBDM) or w / sigma^2 (constant) is not.
    "exponential" needs no limit, but at small steps its error is the largest of the three: too little variance, at
    first order.

    The source must be Gaussian and the path without a gamma term, unless scale is 0.

    Args:
        diffusion: w(t): "constant", "sigma", "sbdm", "linear", "decreasing", "increasing-decreasing", "flow_grpo", an
            instance of :mod:`fmkernels.solvers.methods.sde_coefficients`, or a callable of the time, a float64 tensor.
        scale: a factor of w, >= 0. With 0 "euler" and "heun" are the ODE methods of these names, and no noise is drawn
            (the last step being "none" or "mean").
        last_step: of a step that ends at the path's end, t = 1: "mean": without its noise; "none": like the others;
            "tweedie": to the data prediction; "euler": an Euler step of the ODE (SiT, appendix). A grid that ends
            before has none.
        last_step_size: length of the last step: the times before it are stretched or shrunk to make place; None leaves
            the grid as it is.
        method: see above.
        log_prob: also report the log-density of each step's new state given the old one: "sum" (or True) over a
            sample's elements, "mean", divided by how many of them get noise (Flow-GRPO's), or "none", of each element.
            0 for a step, or token, without noise. Of the noise as it was drawn, in float32 (float64 for float64
            states): exact for the state before it is rounded to the states' dtype, see
            :func:`fmkernels.sde_step_log_prob`. Not for "heun", whose transition is not Gaussian.

    Raises:
        TypeError, ValueError: an argument that is none of these.
    """

    diffusion: str | Diffusion | Callable[[Tensor], Tensor | float] = "sigma"
    scale: float = 1.0
    last_step: str = "mean"
    last_step_size: float | None = None
    method: str = "euler"
    log_prob: bool | str = False

    def __post_init__(self) -> None:
        resolve(self.diffusion)
        check_number("scale", self.scale, low=0.0)
        check_choice("last_step", self.last_step, LAST_STEPS)
        check_choice("method", self.method, METHODS)
        if self.last_step_size is not None:
            check_number("last_step_size", self.last_step_size, above=0.0)
        if not isinstance(self.log_prob, bool):
            check_choice("log_prob", self.log_prob, REDUCTIONS)
        if self.log_prob and self.method == "heun":
            raise value_error("log_prob", "False for method 'heun', whose steps are not Gaussian", self.log_prob)

    @property
    def order(self) -> int:
        """The weak order."""
        return 2 if self.method == "heun" else 1

    # ------------------------------------------------------------------ coefficients

    def transition(self, path: Path, t: Tensor, t_next: Tensor) -> Transition:
        """The Gaussian step of "euler" or "exponential" from times t to times t_next, in the velocity.

        A step to t_next = 1 is the ``last_step``; one without time leaves the state.

        Args:
            t, t_next: tensors of one shape.
        """
        t, t_next = t.double(), t_next.double()
        if self.method == "exponential":
            step = self._exponential(path, t, t_next)
        else:
            p, q, variance, _ = self._increment(path, t, t_next, t)
            step = Transition(1.0 + p, q, variance.sqrt())
        a, b = self._ends(path, t, t_next, step.x_coefficient, step.v_coefficient)
        still, noiseless = t == t_next, self.is_last(t, t_next)
        return Transition(
            torch.where(still, 1.0, a),
            torch.where(still, 0.0, b),
            torch.where(still | noiseless, 0.0, step.std),
        )

    def is_last(self, t: Tensor, t_next: Tensor) -> Tensor:
        """Whether steps end the path in a way of their own, which has no noise."""
        return (t_next == 1.0) & (t != t_next) & (self.last_step != "none")

    def _ends(self, path: Path, t: Tensor, u: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients of x and v with those of the last steps in their places."""
        last = self.is_last(t, u)
        if self.last_step == "tweedie":
            data = conversion_coefficients(path, t, "velocity", "x_1")
            return torch.where(last, data[0], a), torch.where(last, data[1], b)
        if self.last_step == "euler":
            return torch.where(last, 1.0, a), torch.where(last, u - t, b)
        return a, b

    def _increment(self, path: Path, t: Tensor, u: Tensor, at: Tensor) -> _Increment:
        """h (v + w s) of the step from t to u with w and the conversion at one of its ends."""
        h = u - t
        sigma_t, sigma_u = path.coefficients(t).sigma_t, path.coefficients(u).sigma_t
        # |h| w / sigma, limited
        strength = torch.zeros_like(h)
        if self.scale == 0.0:  # the flow alone, on any path
            return _Increment(strength, h, strength, strength)
        free = h.abs() * self.scale * over_sigma(resolve(self.diffusion), path, at, t + u - at)
        strength = torch.where(h == 0.0, 0.0, torch.minimum(free, torch.maximum(sigma_t, sigma_u)))
        a, b = conversion_coefficients(path, at, "velocity", "x_0")
        return _Increment(-strength * a, h - strength * b, 2.0 * strength * path.coefficients(at).sigma_t, strength)

    def _exponential(self, path: Path, t: Tensor, u: Tensor) -> Transition:
        lost = torch.zeros_like(t)
        if self.scale > 0.0:
            lost = self.scale * renewed(resolve(self.diffusion), path, t, u)
        alpha, sigma = path.coefficients(u)[:2]
        kept = sigma * torch.exp(-lost)
        a_1, b_1 = conversion_coefficients(path, t, "velocity", "x_1")
        a_0, b_0 = conversion_coefficients(path, t, "velocity", "x_0")
        std = sigma * torch.sqrt(-torch.expm1(-2.0 * lost))
        return Transition(alpha * a_1 + kept * a_0, alpha * b_1 + kept * b_0, std)

    def times(self, grid: list[Number]) -> list[Number]:
        """The grid with each sample's own last step of the wanted size: idempotent."""
        size, own = self.last_step_size, OwnSteps(grid)
        if size is None or self.last_step == "none" or len(grid) < 3:
            return grid
        times = np.asarray(grid)
        first, end = times[0], times[-1]
        several = np.greater(own.total, 1)
        if not (np.logical_not(several) | (np.abs(end - first) > size)).all():
            raise value_error("last_step_size", "less than the whole time", size)
        left = np.stack(np.broadcast_arrays(*own.left, np.zeros_like(first, dtype=np.int64)))
        last = np.max(times, axis=0, where=left == 1, initial=-np.inf)
        before = end - np.sign(end - first) * size
        factor = (before - first) / np.where(several, last - first, 1.0)
        stretched = np.where(left == 1, before, first + factor * (times - first))
        times = np.where(several & (left > 0), stretched, times)
        times[0] = first
        return grid_of(times)

    # ------------------------------------------------------------------ the method

    def __call__(self, builder: Builder) -> None:
        if self.scale > 0.0 and builder.path.gamma(torch.zeros((), device="cpu")) is not None:
            raise value_error("path", "a path without a gamma term: its velocity does not give the score", builder.path)
        builder.grid = self.times(builder.grid)
        times = torch.from_numpy(np.asarray(builder.grid, dtype=np.float64))
        take = (_heun if self.method == "heun" else _gaussian)(self, builder, times[:-1], times[1:])
        for step in builder.steps():
            take(step.number)


# Takes step i.
_Take = Callable[[int], None]


def _gaussian(sde: SDE, builder: Builder, t: Tensor, u: Tensor) -> _Take:
    table = _numbers(*sde.transition(builder.path, t, u))

    def take(i: int) -> None:
        a, b, std = table[i]
        x = builder.x
        mean = a * x + b * builder.model(x, builder.step.t)
        z = builder.noise()
        builder.advance(noisy(mean, std, z))
        if sde.log_prob:
            report(builder, z, std, "sum" if sde.log_prob is True else str(sde.log_prob))

    return take


def _heun(sde: SDE, builder: Builder, t: Tensor, u: Tensor) -> _Take:
    path = builder.path
    first, second = (sde._increment(path, t, u, at) for at in (t, u))
    last = sde.is_last(t, u)
    # tweedie and euler take the predictor as it is
    alone = last & (sde.last_step in ("tweedie", "euler"))
    a, b = sde._ends(path, t, u, 1.0 + first.p, first.q)
    std = torch.where(last, 0.0, _heun_deviation(path, t, u, first, second))
    std_t = torch.where(last, 0.0, first.variance.sqrt())
    weight = torch.where(alone, 0.0, 0.5)
    table = _numbers(a - 1.0, b, second.p, second.q, std_t, std, weight)

    def take(i: int) -> None:
        p, q, p_u, q_u, std_t, std, weight = table[i]
        z = builder.noise()
        builder.advance(
            heun_step(
                builder,
                lambda x: p * x + q * builder.model(x, builder.step.t),
                lambda x: p_u * x + q_u * builder.model(x, builder.step.u),
                builder.x,
                noisy(ZERO, std_t, z),
                noisy(ZERO, std, z),
                weight,
            )
        )

    return take


def _heun_deviation(path: Path, t: Tensor, u: Tensor, first: _Increment, second: _Increment) -> Tensor:
    """The standard deviation of a Heun step's noise."""
    (_, sigma_t, _, d_sigma_t), (alpha_u, sigma_u, _, d_sigma_u) = (path.coefficients(s)[:4] for s in (t, u))

    def kept(first_strength: Tensor, second_strength: Tensor) -> Tensor:
        """The noise that the rule keeps for a fixed data prediction, of which the state's is sigma_t."""
        increment = (u - t) * d_sigma_t - first_strength
        rate = ((u - t) * d_sigma_u - second_strength) / sigma_u
        return sigma_t + 0.5 * increment + 0.5 * rate * (sigma_t + increment)

    none = torch.zeros_like(t)
    missing = kept(none, none).square() - kept(first.strength, second.strength).square()
    # the noise of the predictor comes back through the second evaluation
    returned = 0.5 * ((u - t) * d_sigma_u - second.strength) / sigma_u * first.variance.sqrt()
    mean = (0.5 * (first.variance + second.variance)).sqrt()
    return torch.where(sigma_u >= alpha_u, missing.clamp(min=0.0).sqrt() - returned, mean)


def heun_step(
    builder: Builder,
    first: Callable[[Expr], Expr],
    second: Callable[[Expr], Expr],
    x: Expr,
    predictor_noise: Expr,
    noise: Expr,
    weight: Number = 0.5,
) -> Expr:
    """x + (d + d') / 2 + noise, d the increment at x and d' that at the predictor x + d + predictor_noise.

    Args:
        weight: of d'; 0 takes no second evaluation.
    """
    increment = first(x)
    if not np.any(weight):
        return x + increment + noise
    predictor = builder.keep(x + increment + predictor_noise)
    return x + (1.0 - weight) * increment + weight * second(predictor) + noise


def _numbers(*columns: Tensor) -> list[tuple[Number, ...]]:
    """For each step, its coefficients."""
    return [tuple(as_number(column[i], "sde") for column in columns) for i in range(columns[0].shape[0])]
