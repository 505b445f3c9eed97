"""Solutions at times between a solver's own: outputs of fixed grids, and adaptive solves taken again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._keys import NoKey
from ...ops.combine.op import combine
from ...paths import CondOT
from ..methods.runge_kutta import combination, inside, take_stages
from ..methods.tableaus import Tableau
from ..programs.builder import Builder, grid_key
from ..programs.expressions import ZERO, Expr, Number
from ..programs.tables import accumulator


def value_of(time: Number) -> float:
    """A time as a float, without its gradient."""
    return float(time.detach()) if isinstance(time, Tensor) else float(time)


def between(time: Number, start: Number, end: Number) -> bool:
    """Whether a time lies from start to end, in either direction."""
    return (value_of(time) - value_of(start)) * (value_of(time) - value_of(end)) <= 0.0


def at_step_end(time: Number, end: Number) -> bool:
    """Whether a time is a step's end itself. One with a gradient of its own only meets it: it can move away."""
    return value_of(time) == value_of(end) and (time is end or not isinstance(time, Tensor))


def hermite_weights(s: Number, h: Number) -> tuple[Number, Number, Number, Number]:
    """Weights of y0, y1, f0, f1 in the cubic Hermite polynomial at the share s of a step of size h."""
    r = 1.0 - s
    return (1.0 + 2.0 * s) * r * r, s * s * (3.0 - 2.0 * s), s * r * r * h, -s * s * r * h


def linear_or_hermite(
    y0: Tensor, y1: Tensor, slopes: Sequence[Tensor] | None, start: Number, end: Number, time: Number
) -> Tensor:
    """The state at a time within a step: on the line, or with the slopes at both ends on the Hermite polynomial."""
    s = (time - start) / (end - start)
    weights: list[Any]
    if slopes is None:
        operands, weights = [y0, y1], [1.0 - s, s]
    else:
        operands, weights = [y0, y1, *slopes], list(hermite_weights(s, end - start))
    return combine(operands, [w.to(accumulator(y0)) if isinstance(w, Tensor) else w for w in weights])


class GridBuilder(Builder):
    """A builder for a right-hand side.

    Args:
        perturb: the state's dtype, where the ends of a step are evaluated inside the step, at the dtype's next number;
            None leaves them where they are.
    """

    def __init__(self, grid: Sequence[Number], perturb: torch.dtype | None = None) -> None:
        super().__init__(grid, CondOT())
        self.perturb = perturb

    def _settings(self) -> Hashable:
        return self.perturb

    def evaluate_all(self, x: Expr, t: Number, branch: str, count: int, prediction: str | None = None) -> list[Expr]:
        if self.perturb is not None:
            _, *ends = self.step
            for start, end in (ends, ends[::-1]):
                if value_of(t) == value_of(start):
                    t = inside(t, end, self.perturb)
                    break
        return super().evaluate_all(x, t, branch, count, prediction)


class DenseBuilder(GridBuilder):
    """A builder that also puts out the state at given times between the grid's.

    Args:
        wanted: times in the grid's order, the first one the grid's.
        interp: "linear" or "cubic" (Hermite, with one more network call where the next step does not make it).
    """

    def __init__(
        self, grid: Sequence[Number], wanted: Sequence[Number], interp: str, perturb: torch.dtype | None = None
    ) -> None:
        super().__init__(grid, perturb)
        self.wanted, self.interp, self.reached = list(wanted), interp, 1
        self._values: dict[tuple[int, float, int], list[Expr]] = {}

    def _settings(self) -> Hashable:
        wanted = grid_key(self.wanted)
        if wanted is None:
            raise NoKey
        return self.perturb, self.interp, wanted

    def evaluate_all(self, x: Expr, t: Number, branch: str, count: int, prediction: str | None = None) -> list[Expr]:
        # a perturbed time belongs to its step
        key = (self.register(x), value_of(t), 0 if self.perturb is None else self.step.number)
        if key not in self._values:
            self._values[key] = super().evaluate_all(x, t, branch, count, prediction)
        return self._values[key]

    def advance(self, x: Expr) -> Expr:
        before = self.x
        after = super().advance(x)
        _, t, u = self.step
        while self.reached < len(self.wanted) and between(self.wanted[self.reached], self.grid[0], u):
            time = self.wanted[self.reached]
            self.output("ys", after if at_step_end(time, u) else self._between(before, after, t, u, time))
            self.reached += 1
        return after

    def _between(self, before: Expr, after: Expr, t: Number, u: Number, time: Number) -> Expr:
        s = (time - t) / (u - t)
        if self.interp == "linear":
            return before * (1.0 - s) + after * s
        f0, f1 = self.model(before, t), self.model(after, u)
        terms = zip(hermite_weights(s, u - t), (before, after, f0, f1), strict=True)
        return sum((x * weight for weight, x in terms), ZERO)


class Replay:
    """Takes the accepted steps of an adaptive solve again, for its gradient, with its interpolated outputs.

    Args:
        tableau: in its adaptive form.
        wanted: the output times; tensors where they need a gradient.
        rows: whether the grid's times are arrays, one time a sample; then steps of size 0 follow a sample's last one.
    """

    def __init__(self, tableau: Tableau, wanted: Sequence[Number], rows: bool = False) -> None:
        self.tableau, self.wanted, self.rows = tableau, list(wanted), rows

    def __call__(self, builder: Builder) -> None:
        tableau, k0 = self.tableau, None
        outputs: list[Expr] = [ZERO for _ in self.wanted]
        reached = [np.zeros_like(builder.grid[0], dtype=bool) for _ in self.wanted] if self.rows else []
        number = 1
        for step in builder.steps():
            x, h = builder.x, step.u - step.t

            def state(row: Sequence[float], ks: list[Expr], x: Expr = x, h: Number = h) -> Expr:
                return builder.keep(combination(x, h, row, ks))

            ks, y = take_stages(tableau, step.t, step.u, state, builder.model, first=k0)
            after = builder.advance(y)  # the last stage's state is the new one
            k0 = ks[-1]
            if self.rows:
                for j in range(1, len(self.wanted)):
                    outputs[j] = self._masked(builder, outputs[j], reached[j], self.wanted[j], x, h, step.t, step.u, ks)
                continue
            while number < len(self.wanted) and between(self.wanted[number], builder.grid[0], step.u):
                time = self.wanted[number]
                at_end = at_step_end(time, step.u)
                outputs[number] = after if at_end else self._interpolated(x, h, (time - step.t) / h, ks)
                number += 1
        for out in outputs[1:]:
            builder.output("ys", out)

    def _interpolated(self, x: Expr, h: Number, theta: Number, ks: list[Expr]) -> Expr:
        weights = []
        for row in self.tableau.interpolant:
            weight: Number = 0.0
            for coefficient in reversed(row):
                weight = (weight + coefficient) * theta
            weights.append(weight)
        return combination(x, h, weights, ks)

    def _masked(
        self,
        builder: Builder,
        output: Expr,
        reached: np.ndarray,
        time: Number,
        x: Expr,
        h: Number,
        t: Number,
        u: Number,
        ks: list[Expr],
    ) -> Expr:
        """The output with the samples that reach its time in this step."""
        now = np.asarray((time - t) * (time - u) <= 0.0) & np.not_equal(h, 0.0) & ~reached
        if not now.any():
            return output
        reached |= now
        theta = np.where(now, (time - t) / np.where(h == 0.0, 1.0, h), 0.0)
        here = self._interpolated(x, h, theta, ks) * now.astype(np.float64)
        return builder.keep(output + here)
