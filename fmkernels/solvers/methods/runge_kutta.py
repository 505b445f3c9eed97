"""Explicit Runge-Kutta steps: their stages, once for all that take them, and the methods on a fixed grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor

from ..._checks import tensor_of, type_error
from ..programs.builder import Builder
from ..programs.expressions import Expr, Number
from .tableaus import Tableau

# A state, or a derivative: an expression or a tensor.
Y = TypeVar("Y", bound=Any)


def stage_time(t: Number, u: Number, c: float) -> Number:
    """t + c (u - t), and exactly t and u at the ends, where schedules may be singular."""
    return t if c == 0.0 else u if c == 1.0 else t + c * (u - t)


def inside(t: Number, u: Number, dtype: torch.dtype) -> Number:
    """The next number of the dtype after t, towards u, with t's gradient; t itself where u is t."""
    if not isinstance(t, Tensor):
        start, end = (torch.tensor(float(x), dtype=torch.float64, device="cpu") for x in (t, u))
        return float(inside(start, end, dtype))
    rounded = t.detach().to(dtype)
    end = tensor_of(u)
    towards = torch.where(end == t, rounded, torch.where(end > t, math.inf, -math.inf).to(dtype))
    return t + (torch.nextafter(rounded, towards).to(t.dtype) - t.detach())


def combination(y: Y, h: Number, weights: Sequence[Number], ks: Sequence[Y]) -> Y:
    """y + h sum_i w_i k_i; weights beyond the last k are 0."""
    for weight, k in zip(weights, ks, strict=False):
        if not (isinstance(weight, float) and weight == 0.0):
            y = y + (h * weight) * k
    return y


def take_stages(
    tableau: Tableau,
    t: Number,
    u: Number,
    state: Callable[[Sequence[float], list[Y]], Y],
    evaluate: Callable[[Y, Number], Y],
    *,
    first: Y | None = None,
    count: int | None = None,
) -> tuple[list[Y], Y]:
    """The stages of a step from t to u.

    Args:
        state: (row of the tableau's a, stages so far) to the state at which the next stage is taken.
        evaluate: (state, time) to the derivative.
        first: the derivative at the step's beginning, where it is known.
        count: of the stages; None for all.

    Returns:
        The stages k_i = f(t + c_i h, y + h sum_j a_ij k_j), and the state of the last one.
    """
    y = state((), [])
    ks = [evaluate(y, stage_time(t, u, tableau.c[0])) if first is None else first]
    for c, row in zip(tableau.c[1:count], tableau.a[1:count], strict=True):
        y = state(row, ks)
        ks.append(evaluate(y, stage_time(t, u, c)))
    return ks, y


@final
@dataclass(frozen=True)
class RungeKutta:
    """A tableau on a fixed grid: one network call a stage.

    Args:
        tableau: of any explicit method.
    """

    tableau: Tableau
    equal_steps: ClassVar[bool] = True
    """A step is a function of its two times alone, and does the same at all times."""

    def __post_init__(self) -> None:
        if not isinstance(self.tableau, Tableau):
            raise type_error("tableau", "a Tableau", self.tableau)

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
        ks, _ = take_stages(
            tableau,
            t,
            u,
            lambda row, ks: combination(x, h, row, ks),
            builder.model,
            first=v,
            count=self.used,
        )
        return combination(x, h, tableau.b, ks)
