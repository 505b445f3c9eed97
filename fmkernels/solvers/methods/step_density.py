"""The log-density of a Gaussian step, from the noise that it drew."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops._operands import compute_dtype
from ...ops.library import sum_trailing
from ...ops.row_dots.op import row_dots
from ..programs.builder import Builder
from ..programs.expressions import Expr, Number, as_number


def _reciprocal(std: Tensor) -> Tensor:
    """1 / std, and 0 where there is no noise."""
    return torch.where(std > 0.0, 1.0 / torch.where(std > 0.0, std, 1.0), 0.0)


def _normaliser(std: Tensor) -> Tensor:
    """log(std sqrt(2 pi)) for one element, and 0 where there is no noise."""
    return torch.where(std > 0.0, torch.log(torch.where(std > 0.0, std, 1.0)) + 0.5 * math.log(2.0 * math.pi), 0.0)


def _per_sample(normaliser: float | Tensor, data: Tensor) -> float | Tensor:
    """The normaliser of leading shape, summed over a sample's elements: a number, or (B,)."""
    dims = normaliser.dim() if isinstance(normaliser, Tensor) else 0
    inner = math.prod(data.shape[max(dims, 1) :])
    return inner * (sum_trailing(normaliser, 1) if isinstance(normaliser, Tensor) and dims > 1 else normaliser)


def _log_density(z: Tensor, normaliser: float | Tensor) -> Tensor:
    """-sum z^2 / 2 - normaliser for each sample, (B,)."""
    return -0.5 * row_dots([z], [(0, 0)])[:, 0] - _per_sample(normaliser, z)


@dataclass(eq=False)
class _LogDensity:
    """The function of a program that turns a step's noise into its log-density."""

    normaliser: Number
    tensors: dict[Any, Tensor] = field(default_factory=dict)

    def __call__(self, z: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.normaliser, float):
            return (_log_density(z, self.normaliser),)
        key = (z.device, compute_dtype(z))
        if key not in self.tensors:  # copied to the device once: never within a captured graph
            self.tensors[key] = torch.as_tensor(self.normaliser).to(*key)
        return (_log_density(z, self.tensors[key]),)


def _no_noise(x: Tensor) -> tuple[Tensor, ...]:
    return (x.new_zeros(x.shape[:1], dtype=compute_dtype(x)),)


def _report(builder: Builder, x: Expr, mean: Expr, std: Number) -> None:
    """Outputs the log-density of the new state x."""
    if np.any(std):
        noise = torch.as_tensor(std, dtype=torch.float64)
        z = as_number(_reciprocal(noise)) * (x - mean)
        (log_prob,) = builder.compute(_LogDensity(as_number(_normaliser(noise))), [z], 1)
    else:
        (log_prob,) = builder.compute(_no_noise, [x], 1)
    builder.output("log_prob", log_prob)
