r"""Implicit Runge-Kutta methods as data: a new method is one entry here.

A step from t to t + h solves for the stages :math:`k_i = f(t + c_i h, y + h \sum_j a_{ij} k_j)`, one after another
where a is lower triangular (diagonally implicit methods), else all together, and takes
:math:`y' = y + h \sum_i b_i k_i`, with the error estimate :math:`h \sum_i e_i k_i`, e = b - b_hat, where an embedded
method is there. c_i is the sum of row i of a. All numbers are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

Row = tuple[float, ...]


@final
@dataclass(frozen=True)
class ImplicitTableau:
    """A Butcher tableau.

    Args:
        name: what ``method=`` calls it.
        order: of the solution that is carried on.
        a: row i has i + 1 entries, the last one its diagonal element (0 there makes the stage explicit); or all rows
            have as many entries as there are stages.
        b: weights of the solution.
        error: b minus the weights of the embedded solution, or None for a method without step control.
        source: where the numbers come from.
    """

    name: str
    order: int
    a: tuple[Row, ...]
    b: Row
    error: Row | None = None
    source: str = ""

    def __post_init__(self) -> None:
        lengths, stages = [len(row) for row in self.a], len(self.b)
        if lengths not in ([i + 1 for i in range(stages)], [stages] * stages):
            raise ValueError(
                f"a, b: expected a lower triangular or square a with a row for each weight in {self.name!r}"
            )

    @cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of the stages that are solved together, one block after another."""
        numbers = range(len(self.b))
        return (tuple(numbers),) if len(self.a[0]) > 1 else tuple((i,) for i in numbers)

    @cached_property
    def c(self) -> Row:
        return tuple(1.0 if abs(sum(row) - 1.0) < 1e-12 else sum(row, 0.0) for row in self.a)

    @property
    def stiffly_accurate(self) -> bool:
        """Whether the last stage's state is the solution; an A-stable method of which this holds is L-stable where its
        a is regular."""
        return self.a[-1] == self.b

    @property
    def first_same_as_last(self) -> bool:
        """Whether the first stage is the derivative at the last step's end, which its last stage has found."""
        return self.stiffly_accurate and self.a[0] == (0.0,) and self.c[-1] == 1.0

    @cached_property
    def error_order(self) -> int:
        """p of the error estimate O(h^p): the least one with sum_i e_i c_i^(p - 1) != 0."""
        moments = (
            abs(sum(e * c**n for e, c in zip(self.error or (), self.c, strict=True))) for n in range(self.order + 2)
        )
        return next(n + 1 for n, moment in enumerate(moments) if moment > 1e-10)


def _pair(name: str, order: int, a: tuple[Row, ...], embedded: Row, source: str) -> ImplicitTableau:
    """A stiffly accurate method with an embedded one."""
    error = tuple(x - y for x, y in zip(a[-1], embedded, strict=True))
    return ImplicitTableau(name, order, a, a[-1], error=error, source=source)


def _sdirk2() -> ImplicitTableau:
    g = 1.0 - math.sqrt(0.5)
    return ImplicitTableau(
        "sdirk2", 2, ((g,), (1.0 - g, g)), (1.0 - g, g), source="Alexander 1977, the L-stable method of two stages"
    )


# The root of g^3 - 3 g^2 + 3 g / 2 - 1 / 6 in (1/6, 1/2).
_G3 = 0.43586652150845899942


def _sdirk3() -> ImplicitTableau:
    g = _G3
    b = (-1.5 * g * g + 4.0 * g - 0.25, 1.5 * g * g - 5.0 * g + 1.25, g)
    return ImplicitTableau(
        "sdirk3", 3, ((g,), ((1.0 - g) / 2.0, g), b), b, source="Alexander 1977, the L-stable method of three stages"
    )


def _trbdf2() -> ImplicitTableau:
    d, w = 1.0 - math.sqrt(0.5), math.sqrt(2.0) / 4.0
    return _pair(
        "trbdf2",
        2,
        ((0.0,), (d, d), (w, w, d)),
        ((1.0 - w) / 3.0, (3.0 * w + 1.0) / 3.0, d / 3.0),
        "Bank et al. 1985, with the embedded third-order method of Hosea and Shampine 1996",
    )


def _kvaerno3() -> ImplicitTableau:
    g = _G3
    third = ((-4.0 * g * g + 6.0 * g - 1.0) / (4.0 * g), (1.0 - 2.0 * g) / (4.0 * g), g)
    last = (
        (6.0 * g - 1.0) / (12.0 * g),
        -1.0 / ((24.0 * g - 12.0) * g),
        (-6.0 * g * g + 6.0 * g - 1.0) / (6.0 * g - 3.0),
        g,
    )
    return _pair("kvaerno3", 3, ((0.0,), (g, g), third, last), (*third, 0.0), "Kvaerno 2004, ESDIRK 3/2 (A)")


def _kencarp4() -> ImplicitTableau:
    g = 0.25
    return _pair(
        "kencarp4",
        4,
        (
            (0.0,),
            (g, g),
            (8611 / 62500, -1743 / 31250, g),
            (5012029 / 34652500, -654441 / 2922500, 174375 / 388108, g),
            (15267082809 / 155376265600, -71443401 / 120774400, 730878875 / 902184768, 2285395 / 8070912, g),
            (82889 / 524892, 0.0, 15625 / 83664, 69875 / 102672, -2260 / 8211, g),
        ),
        (
            4586570599 / 29645900160,
            0.0,
            178811875 / 945068544,
            814220225 / 1159782912,
            -3700637 / 11593932,
            61727 / 225920,
        ),
        "Kennedy and Carpenter 2003, ESDIRK 4(3)6L[2]SA",
    )


def _gauss4() -> ImplicitTableau:
    r = math.sqrt(3.0) / 6.0
    return ImplicitTableau(
        "gl4", 4, ((0.25, 0.25 - r), (0.25 + r, 0.25)), (0.5, 0.5), source="Gauss's method of two stages"
    )


def _gauss6() -> ImplicitTableau:
    r = math.sqrt(15.0)
    return ImplicitTableau(
        "gl6",
        6,
        (
            (5 / 36, 2 / 9 - r / 15, 5 / 36 - r / 30),
            (5 / 36 + r / 24, 2 / 9, 5 / 36 - r / 24),
            (5 / 36 + r / 30, 2 / 9 + r / 15, 5 / 36),
        ),
        (5 / 18, 4 / 9, 5 / 18),
        source="Gauss's method of three stages (Kuntzmann 1961, Butcher 1964)",
    )


def _radau3() -> ImplicitTableau:
    return ImplicitTableau(
        "radauIIA3",
        3,
        ((5 / 12, -1 / 12), (3 / 4, 1 / 4)),
        (3 / 4, 1 / 4),
        source="Radau IIA of two stages (Ehle 1969)",
    )


def _radau5() -> ImplicitTableau:
    r = math.sqrt(6.0)
    last = (4 / 9 - r / 36, 4 / 9 + r / 36, 1 / 9)
    return ImplicitTableau(
        "radauIIA5",
        5,
        (
            (11 / 45 - 7 * r / 360, 37 / 225 - 169 * r / 1800, -2 / 225 + r / 75),
            (37 / 225 + 169 * r / 1800, 11 / 45 + 7 * r / 360, -2 / 225 - r / 75),
            last,
        ),
        last,
        source="Radau IIA of three stages (Ehle 1969; Hairer and Wanner 1996, IV.5)",
    )


IMPLICIT_TABLEAUS: dict[str, ImplicitTableau] = {
    tableau.name: tableau
    for tableau in (
        ImplicitTableau("implicit_euler", 1, ((1.0,),), (1.0,), source="Euler's method backward"),
        ImplicitTableau("implicit_midpoint", 2, ((0.5,),), (1.0,), source="Gauss's method of one stage"),
        ImplicitTableau("trapezoid", 2, ((0.0,), (0.5, 0.5)), (0.5, 0.5), source="Crank and Nicolson 1947"),
        _gauss4(),
        _gauss6(),
        _radau3(),
        _radau5(),
        _sdirk2(),
        _sdirk3(),
        _trbdf2(),
        _kvaerno3(),
        _kencarp4(),
    )
}
IMPLICIT: tuple[str, ...] = tuple(IMPLICIT_TABLEAUS)
