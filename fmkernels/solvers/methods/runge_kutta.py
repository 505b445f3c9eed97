"""Explicit Runge-Kutta and linear multistep methods on a fixed grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from ..programs.builder import Builder
from ..programs.expressions import Expr, Number
from .tableaus import Tableau


@final
@dataclass(frozen=True)
class RungeKutta:
    """A tableau on a fixed grid: one network call a stage.

    Args:
        tableau: of any explicit method.
    """

    tableau: Tableau

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def used(self) -> int:
        """Stages that the solution uses: the derivative at the new state is the next step's first."""
        return max(i + 1 for i, b in enumerate(self.tableau.b) if b != 0.0)

    def __call__(self, builder: Builder) -> None:
        for step in builder.steps():
            builder.advance(self.step(builder, step.t, step.u, builder.model(builder.x, step.t)))

    def step(self, builder: Builder, t: Number, u: Number, v: Expr) -> Expr:
        """The state at u from the current state at t and its velocity v."""
        x, h, tableau = builder.x, u - t, self.tableau
        ks = [v]
        for c, row in zip(tableau.c[1 : self.used], tableau.a[1 : self.used], strict=True):
            # exact at the ends, where schedules may be singular
            time = t if c == 0.0 else u if c == 1.0 else t + c * h
            ks.append(builder.model(combination(x, h, row, ks), time))
        return combination(x, h, tableau.b, ks)


def combination(x: Expr, h: Number, weights: Sequence[Number], ks: list[Expr]) -> Expr:
    """x + h sum_i w_i k_i; weights beyond the last k are 0."""
    for weight, k in zip(weights, ks, strict=False):
        if not (isinstance(weight, float) and weight == 0.0):
            x = x + (h * weight) * k
    return x
