r"""Noise for samples that live in a subspace: padded sequences, clouds of points whose centre is fixed.

A transform maps standard normal noise z to P z, P an orthogonal projection (:math:`P^2 = P = P^T`), so that an SDE
whose velocity stays in the subspace stays there, with the law that it has in all of space, projected. The log-density
of a step is that on the subspace,

.. math:: \log p = -\tfrac{1}{2} \|P z\|^2 - d \log(\sqrt{2 \pi}\, \mathrm{std})

with d, its degrees of freedom, in the place of the number of elements. Any function of z that is such a projection
serves; one whose densities are wanted has a method ``degrees(z)`` that says d for each sample, (B,), or for each of
more leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..._checks import check_int, check_tensor, leading_shape, type_error, value_error


def _checked_mask(mask: Any) -> None:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise type_error("mask", "a bool tensor, true where there is something", mask)
    if mask.dim() == 0:
        raise value_error("mask", "at least one dimension, of samples", mask)


def _beside(mask: Tensor, z: Tensor) -> Tensor:
    leading_shape("mask", mask, "z", z)
    return mask.reshape((*mask.shape, *(1,) * (z.dim() - mask.dim())))


@final
@dataclass(frozen=True, eq=False)
class MaskedNoise:
    """No noise on padding: z where the mask is true, else 0.

    Args:
        mask: bool, of a leading part of the states' shape, e.g. (B, T); true where there is something.

    Raises:
        TypeError, ValueError: it is not that.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        _checked_mask(self.mask)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.where(_beside(self.mask, z), z, 0.0)

    def degrees(self, z: Tensor) -> Tensor:
        """For each entry of the mask its elements, or 0."""
        leading_shape("mask", self.mask, "z", z)
        return self.mask * math.prod(z.shape[self.mask.dim() :])


@final
@dataclass(frozen=True, eq=False)
class ZeroMeanNoise:
    r"""Noise with a fixed centre of mass: :math:`z_i - \frac{1}{n} \sum_j z_j` over the points of a sample.

    For states (B, N, ...) of N points, which have (n - 1) times the elements of a point as degrees of freedom.

    Args:
        mask: bool, (B, N), true for the n points of a sample, others getting no noise; None for all.
        dim: of the points, >= 1, where there is no mask.
    """

    mask: Tensor | None = None
    dim: int = 1

    def __post_init__(self) -> None:
        check_int("dim", self.dim, low=1)
        if self.mask is not None:
            _checked_mask(self.mask)
            if self.mask.dim() != 2 or self.dim != 1:
                raise value_error("mask", "shape (B, N) beside states (B, N, ...)", self.mask)

    def __call__(self, z: Tensor) -> Tensor:
        if z.dim() <= self.dim:
            raise value_error("dim", f"a dimension of the states, whose shape is {tuple(z.shape)}", self.dim)
        if self.mask is None:
            return z - z.mean(self.dim, keepdim=True)
        mask = _beside(self.mask, z)
        kept = torch.where(mask, z, 0.0)
        mean = kept.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return torch.where(mask, z - mean, 0.0)

    def degrees(self, z: Tensor) -> Tensor:
        """For each sample."""
        if self.mask is None:
            points = z.new_full(z.shape[:1], z.shape[self.dim], dtype=torch.int64)
            size = math.prod(z.shape[1:]) // max(z.shape[self.dim], 1)
        else:
            points, size = self.mask.sum(1), math.prod(z.shape[2:])
        return (points - 1).clamp(min=0) * size
