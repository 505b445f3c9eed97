"""The log-density of a Gaussian step, from the noise that it drew."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._checks import value_error
from ...ops._operands import compute_dtype, expand_leading
from ...ops.library import sum_trailing
from ...ops.row_dots.op import row_dots
from ..programs.builder import Builder
from ..programs.draws import Draw, Transform
from ..programs.expressions import Expr, Number
from ..programs.program import operation

REDUCTIONS = ("sum", "mean", "none")


class StepDensity(NamedTuple):
    """A step's log-density, (B,) or of the state's shape, and how many degrees of freedom its noise has, (B,)."""

    log_prob: Tensor
    degrees: Tensor


def reciprocal(std: Tensor) -> Tensor:
    """1 / std, and 0 where there is no noise."""
    return torch.where(std > 0.0, 1.0 / torch.where(std > 0.0, std, 1.0), 0.0)


def log_density(
    z: Tensor, std: Tensor, transform: Transform | None, reduction: str, name: str = "log_prob"
) -> StepDensity:
    """The log-density of the noise std z, of which z is standard normal on the subspace of a transform.

    Args:
        z: float32 or float64; 0 outside of the subspace.
        std: float64, of a leading shape of z's. Where it is 0 there is no density, and what z is there counts nothing.
        name: of the argument that says ``reduction``, in its error.
    """
    noisy = std > 0.0
    # log(std sqrt(2 pi)) for one degree of freedom
    each = torch.where(noisy, torch.log(torch.where(noisy, std, 1.0)) + 0.5 * math.log(2.0 * math.pi), 0.0)
    degrees = _degrees(z, std.dim(), transform, reduction, name)
    counts = degrees * expand_leading(noisy, degrees) if degrees.dim() > std.dim() > 0 else degrees * noisy
    if reduction == "none":
        elements = expand_leading((counts > 0).to(z.dtype), z)
        log_prob = elements * (-0.5 * z * z - expand_leading(each.to(z.dtype), z))
    else:
        if std.dim() > 1:
            z = z * expand_leading(noisy.to(z.dtype), z)
        squares = row_dots([z], [(0, 0)])[:, 0]
        log_prob = -0.5 * (squares if std.dim() > 1 else squares * noisy.to(z.dtype))
        log_prob = log_prob - _per_sample(counts * each).to(z.dtype)
    count = _per_sample(counts)
    if reduction == "mean":
        log_prob = log_prob / count.clamp(min=1).to(z.dtype)
    return StepDensity(log_prob, count)


def _degrees(z: Tensor, dims: int, transform: Transform | None, reduction: str, name: str) -> Tensor:
    """Degrees of freedom, of the leading shape of so many dimensions, or of one where all samples are alike."""
    dims = max(dims, 1)
    if transform is None:
        return z.new_full(z.shape[:dims], math.prod(z.shape[dims:]), dtype=torch.int64)
    if not callable(getattr(transform, "degrees", None)):
        raise value_error("noise_transform", "one with a method degrees(z) where log-densities are wanted", transform)
    degrees: Tensor = transform.degrees(z)  # type: ignore[attr-defined]
    if degrees.dim() < dims:
        raise value_error("noise_transform", "a mask where the noise differs between a sample's tokens", transform)
    if reduction == "none":
        if degrees.dim() == 1 and z.dim() > 1:
            raise value_error(name, "'sum' or 'mean' with noise whose elements depend on each other", reduction)
        return degrees
    return sum_trailing(degrees, dims)


def _per_sample(values: Tensor) -> Tensor:
    return sum_trailing(values, 1) if values.dim() > 1 else values


@operation
def _density(std: float, reduction: int, draw: Draw) -> tuple[Tensor, ...]:
    z = draw.tensor()
    return log_density(z, z.new_full((), std, dtype=torch.float64), draw.transform, REDUCTIONS[reduction])


@dataclass(eq=False)
class _Density:
    """The same where the deviations differ between samples or tokens."""

    std: np.ndarray
    reduction: int
    gives_new_tensors = True

    def __call__(self, draw: Draw) -> tuple[Tensor, ...]:
        z = draw.tensor()
        std = torch.from_numpy(self.std).to(z.device, torch.float64, non_blocking=True)
        return log_density(z, std, draw.transform, REDUCTIONS[self.reduction])


@operation
def _none(reduction: int, x: Tensor) -> tuple[Tensor, ...]:
    return no_noise(x, REDUCTIONS[reduction])


def no_noise(x: Tensor, reduction: str) -> StepDensity:
    """The density of steps without noise: 0, of no degrees of freedom."""
    shape = x.shape if reduction == "none" else x.shape[:1]
    return StepDensity(x.new_zeros(shape, dtype=compute_dtype(x)), x.new_zeros(x.shape[:1], dtype=torch.int64))


def report(builder: Builder, noise: Expr, std: Number, reduction: str) -> None:
    """Outputs the log-density of a step's noise std z, z being the noise."""
    kind = REDUCTIONS.index(reduction)
    if not np.any(std):
        results = builder.compute(_none(kind), [builder.x], 2)
    else:
        work = _density(float(std), kind) if np.ndim(std) == 0 else _Density(np.asarray(std), kind)
        results = builder.compute(work, [noise], 2)
    for name, result in zip(("log_prob", "log_prob_count"), results, strict=True):
        builder.output(name, result)
