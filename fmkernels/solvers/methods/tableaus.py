r"""Explicit Runge-Kutta methods as data: a new method is one entry here, and every solver and test picks it up.

A step from t to t + h takes the stages :math:`k_i = f(t + c_i h, y + h \sum_j a_{ij} k_j)` to
:math:`y' = y + h \sum_i b_i k_i`, with the error estimate :math:`h \sum_i e_i k_i`, e = b - b_hat, where an embedded
method is there. c_i is the sum of row i of a. All numbers are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

from ..._keys import HashedKey, attributes, key_of

Row = tuple[float, ...]


@final
@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau.

    Args:
        name: what ``method=`` calls it.
        order: of the solution that is carried on.
        a: strictly lower triangular; row 0 is ().
        b: weights of the solution.
        error: b minus the weights of the embedded solution; its name then means step control. None: only fixed steps.
        middle: weights of the adaptive() form's stages for y(t + h/2), for a quartic interpolant; None gives the cubic
            Hermite one.
        polynomials: row i holds the coefficients of theta, theta^2, ... in stage i's weight of the interpolant
            y(t + theta h); None derives them from ``middle``.
        source: where the numbers come from.
    """

    name: str
    order: int
    a: tuple[Row, ...]
    b: Row
    error: Row | None = None
    middle: Row | None = None
    polynomials: tuple[Row, ...] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if any(len(row) != i for i, row in enumerate(self.a)) or len(self.b) != len(self.a):
            raise ValueError(
                f"a, b: expected a strictly lower triangular a with a row for each weight in {self.name!r}"
            )

    @cached_property
    def cache_key(self) -> HashedKey:
        """All of its numbers, see :mod:`fmkernels._keys`."""
        return HashedKey(tuple(key_of(value) for name, value in sorted(attributes(self).items())))

    @property
    def stages(self) -> int:
        return len(self.b)

    @cached_property
    def c(self) -> Row:
        return tuple(1.0 if abs(sum(row) - 1.0) < 1e-9 else sum(row, 0.0) for row in self.a)

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is the derivative at the new state, so that the next step begins with it."""
        return self.stages > 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0.0

    def adaptive(self) -> Tableau:
        """The same method with the derivative at the new state as last stage, as step control and dense output use."""
        return self if self.first_same_as_last else self._extended

    @cached_property
    def columns(self) -> list[list[int]]:
        """For each stage but the first, the earlier stages that it uses; last, those of the solution and its error."""
        error = self.error or (0.0,) * self.stages
        used = [[j for j, weight in enumerate(row) if weight != 0.0] for row in self.a[1:]]
        return [*used, [j for j in range(self.stages) if self.b[j] != 0.0 or error[j] != 0.0]]

    @cached_property
    def weights(self) -> list[list[float]]:
        """The weights in the places of ``columns``; last, those of the error."""
        *stages, last = self.columns
        error = self.error or (0.0,) * self.stages
        rows = [[row[j] for j in used] for row, used in zip(self.a[1:], stages, strict=True)]
        return [*rows, [self.b[j] for j in last], [error[j] for j in last]]

    @cached_property
    def _extended(self) -> Tableau:
        error = None if self.error is None else (*self.error, 0.0)
        return replace(self, a=(*self.a, self.b), b=(*self.b, 0.0), error=error)

    @cached_property
    def interpolant(self) -> tuple[Row, ...]:
        """Row i: coefficients of theta, theta^2, ... in b_i(theta), y(t + theta h) = y + h sum_i b_i(theta) k_i.

        Of a tableau whose last stage is the derivative at the new state: the quartic through both ends, their
        derivatives and the middle (Shampine 1986), or the cubic Hermite polynomial through the ends.
        """
        if self.polynomials is not None:
            return self.polynomials
        if not self.first_same_as_last:
            raise ValueError(f"interpolant: expected the adaptive() form of {self.name!r}")
        last = self.stages - 1
        rows: list[Row] = []
        for i, b in enumerate(self.b):
            f0, f1 = float(i == 0), float(i == last)
            if self.middle is None:
                rows.append((f0, 3 * b - 2 * f0 - f1, -2 * b + f0 + f1))
            else:
                m = self.middle[i]
                rows.append(
                    (
                        f0,
                        -4 * f0 + f1 - 5 * b + 16 * m,
                        5 * f0 - 3 * f1 + 14 * b - 32 * m,
                        2 * (f1 - f0) - 8 * b + 16 * m,
                    )
                )
        return tuple(rows)


def _difference(b: Row, embedded: Row) -> Row:
    return tuple(x - y for x, y in zip(b, embedded, strict=True))


_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
_DOPRI5 = Tableau(
    "dopri5",
    5,
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5_B[:-1],
    ),
    _DOPRI5_B,
    error=_difference(_DOPRI5_B, (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)),
    middle=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
    source="Dormand and Prince 1980; the middle from Shampine 1986",
)
_TSIT5_B = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
    0.0,
)


def _tsit5_polynomials() -> tuple[Row, ...]:
    def product(scale: float, *factors: Row) -> Row:
        """The product of polynomials, each as coefficients of 1, t, t^2, ...; without its constant term, which is 0."""
        result = [scale]
        for factor in factors:
            result = [
                sum(result[i] * factor[n - i] for i in range(len(result)) if 0 <= n - i < len(factor))
                for n in range(len(result) + len(factor) - 1)
            ]
        return tuple(result[1:])

    square = (0.0, 0.0, 1.0)
    return (
        product(
            -1.0530884977290216,
            (0.0, 1.0),
            (-1.3299890189751412, 1.0),
            (0.7139816917074209, -1.4364028541716351, 1.0),
        ),
        product(0.1017, square, (1.2949852507374631, -2.1966568338249754, 1.0)),
        product(2.490627285651252793, square, (1.57803468208092486, -2.38535645472061657, 1.0)),
        product(-16.54810288924490272, square, (-1.21712927295533244, 1.0), (-0.61620406037800089, 1.0)),
        product(47.37952196281928122, square, (-1.203071208372362603, 1.0), (-0.658047292653547382, 1.0)),
        product(-34.87065786149660974, square, (-1.2, 1.0), (-0.666666666666666667, 1.0)),
        product(2.5, square, (-1.0, 1.0), (-0.6, 1.0)),
    )


_TSIT5 = Tableau(
    "tsit5",
    5,
    (
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.02826905039406838),
        _TSIT5_B[:-1],
    ),
    _TSIT5_B,
    error=(
        0.00178001105222577714,
        0.0008164344596567469,
        -0.007880878010261995,
        0.1447110071732629,
        -0.5823571654525552,
        0.45808210592918697,
        -1 / 66,
    ),
    polynomials=_tsit5_polynomials(),
    source="Tsitouras 2011, the error's last sign corrected",
)
_DOPRI8_B = (
    14005451 / 335480064,
    0.0,
    0.0,
    0.0,
    0.0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
)
_DOPRI8 = Tableau(
    "dopri8",
    8,
    (
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (
            29443841 / 614563906,
            0.0,
            0.0,
            77736538 / 692538347,
            -28693883 / 1125000000,
            23124283 / 1800000000,
        ),
        (
            16016141 / 946692911,
            0.0,
            0.0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0.0,
            0.0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0.0,
            0.0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0.0,
            0.0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0.0,
            0.0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0.0,
            0.0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0.0,
        ),
    ),
    _DOPRI8_B,
    error=_difference(
        _DOPRI8_B,
        (
            13451932 / 455176623,
            0.0,
            0.0,
            0.0,
            0.0,
            -808719846 / 976000145,
            1757004468 / 5645159321,
            656045339 / 265891186,
            -3867574721 / 1518517206,
            465885868 / 322736535,
            53011238 / 667516719,
            2 / 45,
            0.0,
        ),
    ),
    middle=(
        0.04103130360739393,
        0.0,
        0.0,
        0.0,
        0.0,
        0.05100562801991382,
        0.2388930677412202,
        0.3096870143996103,
        -0.2172325471755352,
        0.07833405679331928,
        -0.0018614369715579948,
        0.007072844202678841,
        0.00690847373200576,
        -0.013838404349047373,
    ),
    source="Prince and Dormand 1981, 8(7)13M; the middle from the interpolant of order 6 of its authors at 1/2",
)
TABLEAUS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        Tableau("euler", 1, ((),), (1.0,), source="Euler 1768"),
        Tableau("midpoint", 2, ((), (0.5,)), (0.0, 1.0), source="Runge 1895"),
        Tableau("heun2", 2, ((), (1.0,)), (0.5, 0.5), source="Heun 1900"),
        Tableau(
            "heun_euler",
            2,
            ((), (1.0,)),
            (0.5, 0.5),
            error=(-0.5, 0.5),
            source="Heun 1900, with Euler's method embedded",
        ),
        Tableau("ralston", 2, ((), (2 / 3,)), (0.25, 0.75), source="Ralston 1962"),
        Tableau("heun3", 3, ((), (1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), source="Heun 1900"),
        Tableau(
            "bosh3",
            3,
            ((), (0.5,), (0.0, 0.75), (2 / 9, 1 / 3, 4 / 9)),
            (2 / 9, 1 / 3, 4 / 9, 0.0),
            error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
            source="Bogacki and Shampine 1989",
        ),
        Tableau("rk4", 4, ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), source="Kutta 1901"),
        Tableau(
            "rk4_38",
            4,
            ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
            (1 / 8, 3 / 8, 3 / 8, 1 / 8),
            source="Kutta 1901, the 3/8 rule",
        ),
        Tableau(
            "fehlberg",
            5,
            (
                (),
                (1 / 4,),
                (3 / 32, 9 / 32),
                (1932 / 2197, -7200 / 2197, 7296 / 2197),
                (439 / 216, -8.0, 3680 / 513, -845 / 4104),
                (-8 / 27, 2.0, -3544 / 2565, 1859 / 4104, -11 / 40),
            ),
            (16 / 135, 0.0, 6656 / 12825, 28561 / 56430, -9 / 50, 2 / 55),
            error=(
                16 / 135 - 25 / 216,
                0.0,
                6656 / 12825 - 1408 / 2565,
                28561 / 56430 - 2197 / 4104,
                -9 / 50 + 1 / 5,
                2 / 55,
            ),
            source="Fehlberg 1969, RKF 4(5), carrying the fifth-order solution on",
        ),
        Tableau(
            "fehlberg2",
            2,
            ((), (0.5,), (1 / 256, 255 / 256)),
            (1 / 512, 255 / 256, 1 / 512),
            error=(-1 / 512, 0.0, 1 / 512),
            source="Fehlberg 1969, RKF 1(2), carrying the second-order solution on",
        ),
        _DOPRI5,
        _TSIT5,
        _DOPRI8,
    )
}
