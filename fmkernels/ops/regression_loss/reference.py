"""`regression_loss` in plain PyTorch: the oracle, differentiable in every argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...random import normals
from .._operands import TENSOR, compute_dtype, expand_leading
from ..combine.reference import weighted_sum
from ..library import sum_trailing
from .kinds import KINDS, bend
from .schema import gradient_dtype


def penalty(d: Tensor, kind: int, delta: float) -> Tensor:
    """rho(d), elementwise. Each branch is given what is finite there: the other's derivative counts 0 times, or NaN."""
    if kind == KINDS["squared"]:
        return d.square()
    if kind == KINDS["huber"]:
        outside = d.abs() > delta  # a NaN is not, and stays one
        return torch.where(outside, delta * (d.abs() - 0.5 * delta), 0.5 * torch.where(outside, 0.0, d).square())
    if kind == KINDS["pseudo_huber"]:
        infinite = d.isinf()
        return torch.where(infinite, d.abs(), _pseudo_huber(torch.where(infinite, 0.0, d), delta))
    nan = d.isnan()
    return torch.where(nan, d * torch.where(nan, d.detach(), 0.0), d.abs())  # abs has the derivative 0 there


def _pseudo_huber(d: Tensor, delta: float) -> Tensor:
    """sqrt(d^2 + delta^2) - delta without the cancellation next to 0.

    d and delta are measured by the larger of the two, on which the result does not depend, so that no square overflows
    and not both vanish. The derivatives are those of the root, which are products: a quotient's are differences.
    """
    unit = d.detach().abs().clamp(min=delta)
    x, b = d / unit, delta / unit
    root = torch.sqrt(x.square() + b.square())
    size = 0.5 * unit * root  # of which twice the range is left
    return (d * (x / (root + b))).detach() + 2.0 * (size - size.detach())


def residual(
    pred: Tensor,
    tensors: Sequence[Tensor],
    streams: Sequence[int],
    offsets: Sequence[int],
    coefs: Sequence[Tensor | None],
    values: Sequence[float],
    noise_dtype: torch.dtype,
) -> Tensor:
    """pred - target, in the compute dtype."""
    operands = [
        tensor if stream == TENSOR else normals(tensor, stream, offset, pred.numel(), noise_dtype).reshape(pred.shape)
        for tensor, stream, offset in zip(tensors, streams, offsets, strict=True)
    ]
    dtype = compute_dtype(pred, *operands)
    return pred.to(dtype) - weighted_sum(operands, coefs, values, dtype)


def loss(
    pred: Tensor,
    tensors: Sequence[Tensor],
    streams: Sequence[int],
    offsets: Sequence[int],
    coefs: Sequence[Tensor | None],
    values: Sequence[float],
    noise_dtype: torch.dtype,
    weight: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    mask: Tensor | None,
    kind: int,
    delta: float,
    per_sample: bool,
) -> Tensor:
    """scale * sum over elements (of a sample, or all) of mask weight rho(pred - target), in the compute dtype."""
    kept = None if mask is None else expand_leading(mask, pred)
    if mask is not None and kept is not None:  # what is masked out is 0 times NaN for the derivatives of its factors
        tensors = [
            x if stream != TENSOR else torch.where(kept, x, 0.0) for x, stream in zip(tensors, streams, strict=True)
        ]
        coefs = [None if c is None else torch.where(_used(mask, c), c, 0.0) for c in coefs]
    d = residual(pred, tensors, streams, offsets, coefs, values, noise_dtype)
    if kept is not None:
        d = torch.where(kept, d, 0.0)  # before rho, so that neither value nor derivative sees what is masked out
    rho = penalty(d, kind, bend(delta, d.dtype))
    if weight is not None:
        w = expand_leading(weight, pred)
        rho = rho * (w if kept is None else torch.where(kept, w, 0.0))
    total = sum_trailing(rho, 1) if per_sample else rho.sum()
    if scale is None and total.dim() == 0:  # of a 0-dim tensor times a number forward mode makes float64
        return (total[None] * scale_value)[0]
    return total * (scale_value if scale is None else scale)


def _used(mask: Tensor, coefficient: Tensor) -> Tensor:
    """Where a coefficient multiplies anything that the mask keeps."""
    if mask.dim() <= coefficient.dim():
        return expand_leading(mask, coefficient)
    return mask.flatten(coefficient.dim()).any(-1)


def run(pred: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    """(loss, gradient w.r.t. pred), the gradient by autograd; the signature of every implementation."""
    *rest, need_grad = args
    with torch.enable_grad():
        leaf = pred.detach().to(gradient_dtype(pred) if need_grad else pred.dtype).requires_grad_(bool(need_grad))
        value = loss(leaf, *rest)  # type: ignore[arg-type]
        if not need_grad:
            return value.detach(), pred.new_empty(0)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]
