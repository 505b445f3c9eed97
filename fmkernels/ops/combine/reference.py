"""`combine` in plain PyTorch: the oracle, and what vmap, jvp and double backward run on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...random import normals
from .._operands import TENSOR, compute_dtype, expand_leading
from ..library import sum_trailing


def weighted_sum(
    values: Sequence[Tensor], coefs: Sequence[Tensor | None], numbers: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """sum_i c_i k_i in the compute dtype."""
    total = torch.zeros((), dtype=dtype, device=values[0].device)
    for i, (value, coef, number) in enumerate(zip(values, coefs, numbers, strict=True)):
        term = value.to(dtype) * (number if coef is None else expand_leading(coef, value))
        total = total + term if i else term
    return total


def materialise(
    tensors: Sequence[Tensor], streams: Sequence[int], offsets: Sequence[int], data: Tensor
) -> list[Tensor]:
    """Operands with noise drawn in the data's dtype."""
    return [
        tensor if stream == TENSOR else normals(tensor, stream, offset, data.numel(), data.dtype).reshape(data.shape)
        for tensor, stream, offset in zip(tensors, streams, offsets, strict=True)
    ]


def error_norm(error: Tensor, first: Tensor, y: Tensor, atol: float, rtol: float) -> Tensor:
    """Per sample, the root mean square of error / (atol + rtol max(|first|, |y|))."""
    scale = atol + rtol * torch.maximum(first.abs(), y.abs())
    square = (error / scale).square()
    return (sum_trailing(square, 1) / max(math.prod(square.shape[1:]), 1)).sqrt()


def run(
    tensors: Sequence[Tensor],
    streams: Sequence[int],
    offsets: Sequence[int],
    coefs: Sequence[Tensor | None],
    values: Sequence[float],
    error_coefs: Sequence[Tensor | None],
    error_values: Sequence[float],
    atol: float,
    rtol: float,
    want_norm: bool,
    store_noise: bool,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Returns [y, *noise drawn (if stored), norm (if wanted)]; y is ``out`` where that is given."""
    data = tensors[0]
    dtype = compute_dtype(data)
    operands = materialise(tensors, streams, offsets, data)
    total = weighted_sum(operands, coefs, values, dtype)
    y = total.to(data.dtype)
    results = [y]
    if store_noise:
        results += [operand for operand, stream in zip(operands, streams, strict=True) if stream != TENSOR]
    if want_norm:
        error = weighted_sum(operands, error_coefs, error_values, dtype) if error_values else total
        results.append(error_norm(error, data.to(dtype), total, atol, rtol))
    if out is not None:
        results[0] = out.copy_(y)
    return results
