"""The steps that are a sample's or token's own on a grid where some wait, and what a multistep method keeps of them.

What a method starts with, ends with or counts over the grid goes by these, so that a sample padded to a longer grid, at
its beginning, its end or between, is what it is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..programs.builder import Builder
from ..programs.expressions import ZERO, Expr, Number, chosen, either

Count = Any  # int, or an array of one for each sample or token


class Node(NamedTuple):
    """A value of the extrapolated quantity and its place in the variable of the polynomial."""

    place: Number
    value: Expr


class OwnSteps:
    """Which steps of a grid have time to pass, for each sample or token.

    A sample whose times all stay for a while goes on afterwards as if nothing had been. Of a token that waits while
    others of its sample move the field changes meanwhile: it starts anew.

    Attributes:
        moving: (steps, ...) whether time passes in a step; None where it does for all in every step.
        resumed: (steps, ...) whether a step is such a wait after which the past holds; None where none is.
        before: for each step how many of one's own were taken since the start.
        left: for each step how many there are from it on.
        total: of one's own steps.
    """

    def __init__(self, grid: Sequence[Number]) -> None:
        self.moving: np.ndarray | None = None
        self.resumed: np.ndarray | None = None
        steps = len(grid) - 1
        self.before: Sequence[Count] = range(steps)
        self.left: Sequence[Count] = range(steps, 0, -1)
        self.total: Count = steps
        if steps > 0 and isinstance(grid[0], np.ndarray):
            times = np.asarray(grid)
            moving = times[1:] != times[:-1]
            if not moving.all():
                self._count(moving)

    def _count(self, moving: np.ndarray) -> None:
        left = np.cumsum(moving[::-1], 0)[::-1]
        self.moving, self.total, self.left = moving, moving.sum(0), list(left)
        inner = tuple(range(2, moving.ndim))
        # a wait before all of one's steps, or after them, has nothing to hold
        waits = ~moving & ~moving.any(inner, keepdims=True) & (left > 0) & (np.cumsum(moving, 0) > 0)
        self.resumed = waits if waits.any() else None
        before = np.zeros(moving.shape, dtype=np.int64)
        for i in range(1, len(moving)):
            before[i] = np.where(moving[i - 1], before[i - 1] + 1, np.where(waits[i - 1], before[i - 1], 0))
        self.before = list(before)


class Past:
    """The last values of a multistep method, each sample's and token's from its own steps.

    Args:
        length: how many are kept.
    """

    def __init__(self, builder: Builder, length: int) -> None:
        self.builder, self.length, self.own = builder, length, OwnSteps(builder.grid)
        self.nodes: list[Node] = []

    @property
    def moving(self) -> Any:
        """Who has time to pass in the step."""
        return True if self.own.moving is None else self.own.moving[self.builder.step.number]

    @property
    def held(self) -> np.ndarray | None:
        """Who has waited in the step before, as if it had not been."""
        number, resumed = self.builder.step.number, self.own.resumed
        held = None if resumed is None or number == 0 else resumed[number - 1]
        return held if held is not None and held.any() else None

    @property
    def taken(self) -> Count:
        """How many steps there were since the start."""
        return self.own.before[self.builder.step.number]

    @property
    def count(self) -> Count:
        """How many of the nodes are one's own."""
        return _least(self.taken + 1, self.length)

    def add(self, place: Number, value: Expr) -> list[Node]:
        """The nodes with that of the step's beginning as the first."""
        older, held = self.nodes, self.held
        if held is None:
            self.nodes = [Node(place, value), *older[: self.length - 1]]
            return self.nodes
        # who has waited has that of the wait's beginning already
        kept = [self.hold(mine, node) for mine, node in zip(older[1:], older[:-1], strict=True)]
        self.nodes = [Node(place, value), *kept, *older[-1:]][: self.length]
        return self.nodes

    def hold(self, before: Node, now: Node) -> Node:
        """What it was before for who has waited in the step before, elsewhere what it is now."""
        return Node(self.hold_number(before.place, now.place), self.hold_value(before.value, now.value))

    def hold_number(self, before: Any, now: Any) -> Any:
        return now if self.held is None else np.where(self.held, before, now)

    def hold_value(self, before: Expr, now: Expr) -> Expr:
        # as one state: an expression would grow with every step of a wait
        return now if self.held is None else self.builder.keep(either(self.held, before, now))

    def each(self, count: Count, change: Callable[[int], Expr]) -> Expr:
        """For each sample and token what ``change`` of its own count gives; nothing where it waits or that is 0."""
        if isinstance(count, int):
            return change(count) if count else ZERO
        moving = np.broadcast_to(self.moving, count.shape)
        found = np.unique(count[moving & (count > 0)])
        total = ZERO
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # where others' nodes coincide
            for one in found.tolist():
                mask = moving & (count == one)
                total = total + (change(one) if mask.all() else chosen(mask, change(one)))
        return total

    def lowered(self, nodes: Sequence[Node], final: bool | str, widest: float) -> Count:
        """How many of the nodes, in the variable that is 0 and 1 at the step's ends, it may follow.

        Args:
            final: True: as many as one's own steps left; False: all; "auto": all, but in one's last step the first
                alone where that is wider than ``widest`` times the one before it.
        """
        count, left = self.count, self.own.left[self.builder.step.number]
        if final is True:
            return _least(count, left)
        if final is False or len(nodes) == 1 or not np.any(left == 1):
            return count
        with np.errstate(invalid="ignore"):
            wide = (left == 1) & (count > 1) & np.less(np.abs(nodes[1].place), 1.0 / widest)
        return _least(count, np.where(wide, 1, count))


def _least(a: Count, b: Count) -> Count:
    """The least of both: an int where it is one for all."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    least = np.minimum(a, b)
    return int(least) if least.ndim == 0 else least
