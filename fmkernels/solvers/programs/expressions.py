r"""Linear combinations of states, network outputs and noise: what a method writes down instead of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._checks import real_array, value_error

# A number for all samples, an array whose shape is a leading part of the state's, or a 0-dim float64 tensor where the
# gradient with respect to times is wanted.
Number = float | np.ndarray | Tensor


class Expr:
    """A linear combination of bases: states, network outputs and noises, by their register."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[int, Number]) -> None:
        self.terms = terms

    def __add__(self, other: Expr) -> Expr:
        terms = dict(self.terms)
        for base, coefficient in other.terms.items():
            terms[base] = _sum(terms[base], coefficient) if base in terms else coefficient
        return Expr(terms)

    def __sub__(self, other: Expr) -> Expr:
        return self + other * -1.0

    def __mul__(self, number: Number) -> Expr:
        return Expr({base: coefficient * number for base, coefficient in self.terms.items()})

    __rmul__ = __mul__
    # numpy must not take `array * expr` apart
    __array_ufunc__ = None

    def __truediv__(self, number: Number) -> Expr:
        return self * (1.0 / number)

    def __neg__(self) -> Expr:
        return self * -1.0


def _sum(a: Number, b: Number) -> Number:
    """a + b, and 0 where only their rounding is left: such a term would cost a read of its tensor."""
    total = a + b
    return 0.0 if isinstance(total, float) and abs(total) < 1e-14 * abs(float(a)) else total


ZERO = Expr({})


def chosen(mask: Any, x: Expr) -> Expr:
    """x where the mask holds, elsewhere nothing, whatever its coefficients are there."""
    return Expr({base: np.where(mask, c, 0.0) for base, c in x.terms.items()})


def either(mask: Any, x: Expr, y: Expr) -> Expr:
    """x where the mask holds, elsewhere y."""
    if isinstance(mask, bool):
        return x if mask else y
    if np.all(mask):
        return x
    return chosen(mask, x) + chosen(np.logical_not(mask), y) if np.any(mask) else y


def at_index(number: Number, i: int) -> Number:
    """Of numbers along a first dimension the i-th."""
    assert not isinstance(number, float)
    value: Number = number[i]
    return value


def as_number(value: Tensor, name: str) -> Number:
    """A coefficient on the host: a float where it is one number.

    Args:
        name: of the argument that it comes from.

    Raises:
        ValueError: it has a gradient, which would be lost.
    """
    if value.requires_grad and torch.is_grad_enabled():
        raise value_error(
            name, "values without a gradient, as the coefficients of a fixed grid are plain numbers", value
        )
    return float(value) if value.dim() == 0 else value.double().cpu().numpy()


def as_grid(
    grid: Tensor | np.ndarray | Sequence[float], *, waiting: bool = False, name: str = "time_grid", unit: float = 1.0
) -> list[Number]:
    """Times as numbers that nobody else has: finite, strictly monotone along dimension 0.

    Times within 4 units in the last place of the larger one, or of ``unit``, differ by rounding alone: they are equal.

    Args:
        waiting: whether the times of a sample or token may stay the same for a step, or for all: it then waits.
        name: of the argument that gives them.
        unit: a time of the size that times have; 0.0 where they have none.

    Raises:
        TypeError, ValueError: the times are not that.
    """
    times = real_array(name, "times: numbers in a tensor, an array or a sequence", grid)
    if times.ndim == 0 or times.shape[0] == 0:
        raise value_error(name, "at least one time along dimension 0", grid)
    if not np.isfinite(times).all():
        raise value_error(name, "finite times", grid)
    if waiting and times.ndim > 1:
        times = _settled(times, unit)
        steps = np.diff(times, axis=0)
        if not ((steps >= 0).all() or (steps <= 0).all()):
            raise value_error(name, "times of each sample or token that all go one way, or stay", grid)
        return grid_of(times)
    steps, same = np.diff(times, axis=0), _same(times[:-1], times[1:], unit)
    if same.any():
        at = np.unravel_index(int(np.argmax(same)), same.shape)
        first, second = float(times[:-1][at]), float(times[1:][at])
        raise ValueError(
            f"{name}: expected strictly monotone times, further apart than rounding errors, got {first!r} and then "
            f"{second!r}"
        )
    if not ((steps > 0).all() or (steps < 0).all()):
        raise value_error(name, "strictly monotone times", grid)
    return grid_of(times)


def grid_of(times: np.ndarray) -> list[Number]:
    """Times along dimension 0 as a grid: floats, or copies of its rows that are written to no more.

    Plans keep their grids, and hand rows of them to guidance and methods of a user's own.
    """
    if times.ndim == 1:
        return [float(t) for t in times]
    rows: list[Number] = []
    for t in times:
        own = t.copy()  # each in memory of its own: of a read-only view torch.compile makes no tensor
        if not torch.compiler.is_compiling():
            own.setflags(write=False)
        rows.append(own)
    return rows


def shape_of(grid: Sequence[Number]) -> tuple[int, ...]:
    """The shape of the times of samples or tokens; () where all have the same."""
    return tuple(getattr(grid[0], "shape", ()))


def _same(t: np.ndarray, u: np.ndarray, unit: float) -> np.ndarray:
    """Whether times differ by no more than rounding."""
    return np.asarray(np.abs(u - t) <= 4.0 * np.spacing(np.maximum(np.maximum(np.abs(t), np.abs(u)), unit)))


def _settled(times: np.ndarray, unit: float) -> np.ndarray:
    """Times of which those that rounding alone sets apart are equal; the first and the last stay as they are."""
    close = _same(times[:-1], times[1:], unit)
    if not (close & (times[1:] != times[:-1])).any():
        return times
    settled = times.copy()
    for i in range(1, len(times)):
        settled[i] = np.where(_same(settled[i - 1], times[i], unit), settled[i - 1], times[i])
    moved = settled[-1] != times[-1]
    if moved.any():  # the whole last wait is at the last time
        settled = np.where(moved & (settled == settled[-1]) & (settled != times[0]), times[-1], settled)
    return settled
