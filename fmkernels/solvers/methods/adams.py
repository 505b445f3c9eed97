"""Adams methods on any grid, from the integrals of the interpolating polynomial."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import final

import numpy as np

from ..._checks import check_bool, check_int
from ..programs.builder import Builder
from ..programs.expressions import Expr, Number
from .runge_kutta import RungeKutta
from .tableaus import TABLEAUS


def lagrange_integrals(nodes: list[Number], t: Number, u: Number) -> list[Number]:
    """The integrals over [t, u] of the Lagrange polynomials of the nodes: weights of a multistep method.

    In the variable s = (time - t) / (u - t), so that they are well scaled on any grid. Samples and tokens with times of
    their own use the nodes before the first one that is where a later one is: they waited there.
    """
    h = u - t
    waits = isinstance(h, np.ndarray) and bool((h == 0.0).any() or _coincide(nodes).any())
    size = np.where(h == 0.0, 1.0, h) if waits else h
    s = [(node - t) / size for node in nodes]
    usable = _usable(s) if waits else [True] * len(s)
    weights = []
    for i, own in enumerate(s):
        # coefficients of the polynomial, from the constant on
        polynomial: list[Number] = [1.0]
        for j, other in enumerate(s):
            if j != i:
                scale = 1.0 / (np.where(usable[i] & usable[j], own - other, 1.0) if waits else own - other)
                longer = [
                    ((polynomial[n - 1] if n else 0.0) - (other * polynomial[n] if n < len(polynomial) else 0.0))
                    * scale
                    for n in range(len(polynomial) + 1)
                ]
                if waits:
                    pairs = zip(longer, [*polynomial, 0.0], strict=True)
                    longer = [np.where(usable[j], new, old) for new, old in pairs]
                polynomial = longer
        weight = h * sum(p / (n + 1) for n, p in enumerate(polynomial))
        weights.append(np.where(usable[i], weight, 0.0) if waits else weight)
    return weights


def _coincide(nodes: list[Number]) -> np.ndarray:
    return np.any([a == b for a, b in itertools.pairwise(nodes)], axis=0) if len(nodes) > 1 else np.zeros(())


def _usable(s: list[Number]) -> list[np.ndarray]:
    """Which nodes come before the first that is where the one before it is."""
    apart = [np.ones_like(s[0], dtype=bool), *(np.not_equal(a, b) for a, b in itertools.pairwise(s))]
    return list(np.logical_and.accumulate(apart))


def _integral(history: list[tuple[Number, Expr]], t: Number, u: Number) -> Expr:
    weights = lagrange_integrals([time for time, _ in history], t, u)
    total = Expr({})
    for weight, (_, v) in zip(weights, history, strict=True):
        total = total + weight * v
    return total


# A method of order p keeps it when its first steps, which have no past, are taken by one of order p - 1.
_STARTS = {3: "midpoint", 4: "heun3", 5: "rk4"}
MAX_ORDER = 5


def _start(order: int) -> RungeKutta | None:
    return RungeKutta(TABLEAUS[_STARTS[order]]) if order in _STARTS else None


@final
@dataclass(frozen=True)
class AdamsBashforth:
    """The explicit Adams method: the polynomial through the last velocities, integrated over the step.

    One network call a step, exact for the grid's own, varying steps: x + h ((1 + r/2) v - (r/2) v_previous) with
    r = h / h_previous at order 2. From order 3 on the first order - 1 steps are Runge-Kutta steps.

    Args:
        order: 1 to 5.
    """

    order: int = 2

    def __post_init__(self) -> None:
        check_int("order", self.order, low=1, high=MAX_ORDER)

    def __call__(self, builder: Builder) -> None:
        history: list[tuple[Number, Expr]] = []
        start = _start(self.order)
        for step in builder.steps():
            v = builder.model(builder.x, step.t)
            history = [(step.t, v), *history[: self.order - 1]]
            if start is not None and len(history) < self.order:
                builder.advance(start.step(builder, step.t, step.u, v))
            else:
                builder.advance(builder.x + _integral(history, step.t, step.u))


@final
@dataclass(frozen=True)
class AdamsMoulton:
    """Adams predictor-corrector: an explicit Adams step, then the implicit formula with the velocity found there.

    Two network calls a step (PECE). With ``reuse`` (PEC) the velocity at the prediction also serves as the next
    step's: one call a step.

    Args:
        order: of the corrector, 2 to 5.
        reuse: see above.
    """

    order: int = 4
    reuse: bool = False

    def __post_init__(self) -> None:
        check_int("order", self.order, low=2, high=MAX_ORDER)
        check_bool("reuse", self.reuse)

    def __call__(self, builder: Builder) -> None:
        history: list[tuple[Number, Expr]] = []
        start = _start(self.order)
        predicted: Expr | None = None
        for step in builder.steps():
            if predicted is None or not self.reuse:
                predicted = builder.model(builder.x, step.t)
            history = [(step.t, predicted), *history[: self.order - 2]]
            x = builder.x
            if start is not None and len(history) < self.order - 1:
                builder.advance(start.step(builder, step.t, step.u, predicted))
                predicted = None
            else:
                predicted = builder.model(x + _integral(history, step.t, step.u), step.u)
                builder.advance(x + _integral([(step.u, predicted), *history], step.t, step.u))
