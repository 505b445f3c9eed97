"""Adams methods on any grid, from the integrals of the interpolating polynomial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ..._checks import check_int
from ..programs.builder import Builder
from ..programs.expressions import Expr, Number
from .runge_kutta import RungeKutta
from .tableaus import TABLEAUS


def lagrange_integrals(nodes: list[Number], t: Number, u: Number) -> list[Number]:
    """The integrals over [t, u] of the Lagrange polynomials of the nodes: weights of a multistep method.

    In the variable s = (time - t) / (u - t), so that they are well scaled on any grid.
    """
    h = u - t
    s = [(node - t) / h for node in nodes]
    weights = []
    for i, own in enumerate(s):
        # coefficients of the polynomial, from the constant on
        polynomial: list[Number] = [1.0]
        for j, other in enumerate(s):
            if j != i:
                scale = 1.0 / (own - other)
                polynomial = [
                    ((polynomial[n - 1] if n else 0.0) - (other * polynomial[n] if n < len(polynomial) else 0.0))
                    * scale
                    for n in range(len(polynomial) + 1)
                ]
        weights.append(h * sum(p / (n + 1) for n, p in enumerate(polynomial)))
    return weights


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
