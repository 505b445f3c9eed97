"""Adams methods on any grid, from the integrals of the interpolating polynomial."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, final

import numpy as np

from ..._checks import check_bool, check_int
from ..programs.builder import Builder
from ..programs.expressions import Expr, Number, either
from ..programs.program import Step
from .own_steps import Node, Past
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


def _integral(nodes: list[Node], step: Step, count: int) -> Expr:
    """That of the polynomial through so many nodes."""
    weights = lagrange_integrals([node.place for node in nodes[:count]], step.t, step.u)
    total = Expr({})
    for weight, node in zip(weights, nodes, strict=False):
        total = total + weight * node.value
    return total


# A method of order p keeps it when its first steps, which have no past, are taken by one of order p - 1.
_STARTS = {3: "midpoint", 4: "heun3", 5: "rk4"}
MAX_ORDER = 5


def _starting(past: Past) -> Any:
    """Who has a step to take and not the past for it."""
    return (past.count < past.length) & past.moving


def _start(order: int) -> RungeKutta | None:
    return RungeKutta(TABLEAUS[_STARTS[order]]) if order in _STARTS else None


@final
@dataclass(frozen=True)
class AdamsBashforth:
    """The explicit Adams method: the polynomial through the last velocities, integrated over the step.

    One network call a step, exact for the grid's own, varying steps: x + h ((1 + r/2) v - (r/2) v_previous) with
    r = h / h_previous at order 2. From order 3 on the first order - 1 steps are Runge-Kutta steps, also those of a
    sample or token that starts late: a step in which any does costs a Runge-Kutta step's calls.

    Args:
        order: 1 to 5.
    """

    order: int = 2

    def __post_init__(self) -> None:
        check_int("order", self.order, low=1, high=MAX_ORDER)

    def __call__(self, builder: Builder) -> None:
        past, start = Past(builder, self.order), _start(self.order)
        for step in builder.steps():
            v = builder.model(builder.x, step.t)
            nodes = past.add(step.t, v)
            x = builder.x + past.each(past.count, partial(_integral, nodes, step))
            if start is not None and np.any(starting := _starting(past)):
                x = either(starting | np.logical_not(past.moving), start.step(builder, step.t, step.u, v), x)
            builder.advance(x)


@final
@dataclass(frozen=True)
class AdamsMoulton:
    """Adams predictor-corrector: an explicit Adams step, then the implicit formula with the velocity found there.

    Two network calls a step (PECE). With ``reuse`` (PEC) the velocity at the prediction also serves as the next
    step's: one call a step. From order 3 on the first order - 2 steps are Runge-Kutta steps, as in
    :class:`AdamsBashforth`.

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
        past, start = Past(builder, self.order - 1), _start(self.order)
        predicted: Expr | None = None
        ahead: Expr | None = None
        for step in builder.steps():
            x = builder.x
            if self.reuse and ahead is not None and predicted is not None:
                predicted = past.hold_value(predicted, ahead)
            else:
                predicted = builder.model(x, step.t)
            nodes = past.add(step.t, predicted)
            guess = x + past.each(past.count, partial(_integral, nodes, step))
            starting = _starting(past) if start is not None else False
            begun = guess
            if start is not None and np.any(starting):
                begun = builder.keep(start.step(builder, step.t, step.u, predicted))
                if np.all(starting | np.logical_not(past.moving)):
                    builder.advance(begun)
                    ahead = None
                    continue
            ahead = builder.model(either(starting, begun, guess), step.u)
            end = x + past.each(past.count + 1, partial(_integral, [Node(step.u, ahead), *nodes], step))
            builder.advance(either(starting, begun, end))
