"""Comparisons whose tolerance is the error budget of the arithmetic: so many roundings, of numbers of such a size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit(dtype: torch.dtype) -> float:
    """What one rounding to nearest changes at most, relative to the number: half an epsilon."""
    return torch.finfo(dtype).eps / 2


def roundings_of_sum(terms: int) -> int:
    """Of a sum in any order of lanes and stretches: the errors of its partial sums partly cancel, so that they grow as
    those of a sum by halves."""
    return math.ceil(math.log2(max(terms, 2)))


def budget(
    got: Tensor, want: Tensor, roundings: float, *, size: Tensor | float | None = None, of: torch.dtype | None = None
) -> Tensor:
    """How far elements of ``got`` may be from those of ``want``, in float64.

    That is ``roundings`` of the dtype ``of`` (that of ``got`` by default) of numbers as large as ``size`` (``want`` by
    default). Where ``got`` is narrower than ``of`` it was rounded once more, and so was ``want`` if it is narrow too.
    """
    of = of or got.dtype
    large = want.detach().double().abs()
    allowed = roundings * unit(of) * (large if size is None else torch.as_tensor(size, device=large.device).double())
    own = (unit(got.dtype) > unit(of)) * (1 + (unit(want.dtype) >= unit(got.dtype)))
    if own:
        least = torch.finfo(got.dtype).smallest_normal * unit(got.dtype)  # below it the distance of numbers stays
        allowed = allowed + own * (unit(got.dtype) * large + least)
    return allowed.expand_as(large)


def assert_rounded(
    got: Tensor, want: Tensor, roundings: float, *, size: Tensor | float | None = None, of: torch.dtype | None = None
) -> None:
    """Fails where ``got`` is further from ``want`` than :func:`budget`. Integers, and what is not finite, must be the
    same."""
    assert got.shape == want.shape
    if not got.is_floating_point():
        assert torch.equal(got, want)
        return
    a, b = got.detach().double(), want.detach().double()
    error, allowed = (a - b).abs(), budget(got, want, roundings, size=size, of=of)
    wrong = ~((error <= allowed) | (a == b) | (a.isnan() & b.isnan()))
    if bool(wrong.any()):
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are beyond {roundings} roundings: {a[wrong][0]:.17g}, "
            f"expected {b[wrong][0]:.17g} within {allowed[wrong][0]:.3g}"
        )
