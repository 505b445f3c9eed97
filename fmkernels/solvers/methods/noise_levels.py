r"""What the flow and diffusion solvers share: noise levels of a grid, predictions, and exponential integrators.

On an affine path :math:`x_t = \alpha x_1 + \sigma x_0` a prediction of :math:`x_1` and :math:`x_0` at one time gives
the state at any other, :math:`x_u = \alpha_u x_1 + \sigma_u x_0`: exact while the prediction does not change, and
finite at both ends of every path. That is the first-order step of all these solvers (DDIM, DPM-Solver++ 1, UniP-1,
DEIS-0; on the optimal-transport path Euler). Higher orders add the change of the prediction over the step, a
polynomial through earlier ones in some variable s, integrated against the solver's weight: with Newton's divided
differences f the step gains :math:`\sum_{k \ge 1} f[s_0, .., s_k] \int w(s) \prod_{j<k} (s - s_j) ds`. A node at
infinity (pure noise, where :math:`\lambda = \log(\alpha / \sigma)` is) has zero differences, so that the order falls
by itself, for each sample of a grid of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..._checks import tensor_of, value_error
from ...paths import Path
from ...paths.schedule import at, tensor_at
from ..programs.builder import Builder
from ..programs.expressions import ZERO, Expr, Number, as_number, at_index
from .own_steps import Node


class Level(NamedTuple):
    """A time's place on the path; ``log_ratio`` is lambda = log(alpha / sigma), infinite at pure noise and data."""

    t: Number
    alpha: Number
    sigma: Number
    log_ratio: Number

    @property
    def ratio(self) -> Number:
        """sigma / alpha, the noise level of the variance-exploding form x / alpha; infinite at pure noise."""
        with np.errstate(divide="ignore"):
            return np.divide(self.sigma, self.alpha)


def level(path: Path, t: Number) -> Level:
    """The level of a time, or those of an array of times."""
    times = tensor_of(t, torch.float64)
    if at(path, "gamma", times) is not None:
        raise value_error("path", "one without a gamma term, for a method that uses its noise levels", path)
    alpha, sigma = tensor_at(path, "alpha", times), tensor_at(path, "sigma", times)
    return Level(t, *(as_number(value, "path") for value in (alpha, sigma, 0.5 * path.log_snr(times))))


def level_at(path: Path, log_ratio: Number) -> Level:
    """The level that has a lambda, or the path's end beyond its range."""
    return level(path, as_number(path.log_snr_inverse(2.0 * tensor_of(log_ratio, torch.float64)), "path"))


def levels(builder: Builder, *, to_data: bool = False) -> Iterator[tuple[Level, Level]]:
    """The levels at both ends of each of the builder's steps.

    Args:
        to_data: the method adds noise, so that its grid must lead from noise to data.
    """
    if len(builder.grid) < 2:
        return
    times = np.asarray(builder.grid, dtype=np.float64)
    if to_data and not (np.diff(times, axis=0) >= 0.0).all():
        raise value_error("time_grid", "increasing times, from noise to data, for a method that adds noise", times)
    _, alpha, sigma, log_ratio = level(builder.path, times)
    for step in builder.steps():
        i = step.number
        yield (
            Level(step.t, *(at_index(values, i) for values in (alpha, sigma, log_ratio))),
            Level(step.u, *(at_index(values, i + 1) for values in (alpha, sigma, log_ratio))),
        )


class Prediction(NamedTuple):
    """The data and the noise that the network sees in the state x at a level: x = alpha x_1 + sigma x_0."""

    x: Expr
    level: Level
    x_1: Expr
    x_0: Expr


def predict(builder: Builder, x: Expr, at: Level) -> Prediction:
    """One call of the network."""
    x = builder.keep(x)
    v = builder.model(x, at.t)
    return Prediction(x, at, builder.convert(x, v, at.t, "x_1"), builder.convert(x, v, at.t, "x_0"))


def moved(p: Prediction, to: Level, kept: Number = 1.0) -> Expr:
    """The first-order step to a level; ``kept`` is the share of the predicted noise in the noise there."""
    return to.alpha * p.x_1 + (to.sigma * kept) * p.x_0


def fresh(kept: Number) -> Number:
    """The share of fresh noise beside a kept one, for the same variance."""
    return np.sqrt(np.maximum((1.0 - kept) * (1.0 + kept), 0.0))


def noisy(x: Expr, deviation: Number, z: Expr) -> Expr:
    """x + deviation z; noise that nobody needs is not drawn."""
    return x + deviation * z if np.any(deviation) else x


def width(t: Level, u: Level) -> Number:
    """The step in lambda; infinite from pure noise and to pure data, 0 from either to itself."""
    with np.errstate(invalid="ignore"):
        return np.where(np.equal(u.log_ratio, t.log_ratio), 0.0, u.log_ratio - t.log_ratio)[()]


def decay(rate: float, h: Number) -> Number:
    """exp(-rate h), 1 for rate 0 also at infinite h."""
    return np.exp(-rate * h) if rate else 1.0


def or_zero(value: Number) -> Number:
    """The value where it is finite."""
    return np.where(np.isfinite(value), value, 0.0)[()]


def inverse(value: Number) -> Number:
    """1 / value where that is finite, elsewhere 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return or_zero(np.divide(1.0, value))


def difference(end: Number, start: Number) -> Number:
    """end - start where that is finite, elsewhere 0."""
    with np.errstate(invalid="ignore"):
        return or_zero(end - start)


_SERIES_TERMS = 18


def exponential_moments(h: Number, count: int) -> list[Number]:
    r"""m_n = \int_0^1 h e^{-h (1 - s)} s^n ds for n = 0, ..., count - 1: n! h phi_{n+1}(-h); 1 at h = infinity.

    0 at h = -infinity, where the integrals have no limit: a step from there is of first order.
    """
    h = np.where(np.isneginf(h), 0.0, h)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        moments = [-np.expm1(-h)]
        for n in range(1, count):
            moments.append(1.0 - n / h * moments[-1])
        # the recursion cancels at small h, where the series of m_n = h sum_j (-h)^j n! / (n + 1 + j)! has few terms
        small = np.where(np.abs(h) < 1.0, h, 0.0)
        for n in range(1, count):
            total = np.zeros_like(h)
            for j in range(_SERIES_TERMS, -1, -1):
                total = (1.0 - small * total) / (n + 1 + j)
            moments[n] = np.where(np.abs(h) < 1.0, small * total, moments[n])
    return [m[()] for m in moments]


def places(history: Sequence[Node], start: Number, end: Number) -> list[Node]:
    """The nodes in the variable that runs from 0, where the first of them is, to 1 over the step."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return [Node(np.divide(n.place - start, end - start) if i else 0.0, n.value) for i, n in enumerate(history)]


def differences(nodes: Sequence[Node]) -> list[Expr]:
    """Newton's f[s_0, s_1], f[s_0, s_1, s_2], ...; 0 from the first node on that is infinite or not apart."""
    column, found = [node.value for node in nodes], []
    usable: Number = True
    for k in range(1, len(nodes)):
        with np.errstate(invalid="ignore"):
            inverses = [inverse(nodes[i].place - nodes[i + k].place) for i in range(len(nodes) - k)]
        usable = usable & np.isfinite(nodes[k].place) & np.not_equal(nodes[k].place, nodes[k - 1].place)
        column = [(column[i] - column[i + 1]) * factor for i, factor in enumerate(inverses)]
        found.append(column[0] if np.all(usable) else column[0] * np.where(usable, 1.0, 0.0)[()])
    return found


# A step this much wider than the last one is not extrapolated over: the polynomial overshoots by more than the whole
# change, as in the last step to a small sigma (where the widths are infinite, the weights vanish by themselves).
WIDEST = 2.0


def newton_weights(nodes: Sequence[Node], moments: Sequence[Number]) -> list[Number]:
    """The integrals of (s - s_0), (s - s_0)(s - s_1), ... from those of 1, s, s^2, ...: as many as differences."""
    polynomial: list[Number] = [1.0]
    weights = []
    for node in nodes[:-1]:
        place = or_zero(node.place)
        polynomial = [
            (polynomial[n - 1] if n else 0.0) - (place * polynomial[n] if n < len(polynomial) else 0.0)
            for n in range(len(polynomial) + 1)
        ]
        weights.append(sum((c * m for c, m in zip(polynomial, moments, strict=False)), 0.0))
    return weights


def weighted(weights: Sequence[Number], terms: Sequence[Expr]) -> Expr:
    total = ZERO
    for weight, term in zip(weights, terms, strict=True):
        total = total + weight * term
    return total


def interpolated(nodes: Sequence[Node], moments: Sequence[Number], count: int) -> Expr:
    """The change of the value from that at the first node, by the polynomial through count nodes, over the step."""
    nodes = nodes[:count]
    return weighted(newton_weights(nodes, moments[:count]), differences(nodes))


_QUADRATURE = np.polynomial.legendre.leggauss(24)


def time_moments(path: Path, t: Level, u: Level, count: int) -> list[Number]:
    r"""m_n = alpha_u \int_0^1 s^n d(sigma / alpha) for a time t + s (u - t): a polynomial in time against the noise.

    By parts, so that no derivative of a schedule is needed, and with s = 1 - (1 - w)^2, as sigma may end like a root.
    """
    w = 0.5 + 0.5 * _QUADRATURE[0].reshape((-1,) + (1,) * np.ndim(t.t))
    s, weights = 1.0 - (1.0 - w) ** 2, _QUADRATURE[1].reshape(w.shape) * (1.0 - w)
    ratio = level(path, t.t + s * (u.t - t.t)).ratio
    with np.errstate(invalid="ignore"):
        first = u.sigma - u.alpha * t.ratio
        integrals = [n * np.sum(weights * s ** (n - 1) * ratio, axis=0) for n in range(1, count)]
        moments = [first, *(u.sigma - u.alpha * integral for integral in integrals)]
    return [or_zero(moment) for moment in moments]  # not finite from pure noise, whence a step is of first order


def uniform_moments(size: Number, count: int) -> list[Number]:
    r"""m_n = size \int_0^1 s^n ds."""
    return [size / (n + 1) for n in range(count)]


def power_level(high: Number, low: Number, place: Number, rho: float) -> Number:
    """The noise level sigma / alpha from high, at place 0, to low, at 1, even in the rho-th root (Karras et al. 2022,
    eq. 5)."""
    start, end = high ** (1.0 / rho), low ** (1.0 / rho)
    return (start + place * (end - start)) ** rho
