"""`regression_loss` on the compiled library; serves CPU and CUDA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _native
from .._operands import TENSOR, in_one_order, lookup, row_elements
from .op import loss_dtype


def run(
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
    need_grad: bool,
    scale_grad: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient w.r.t. pred); the gradient is empty where it is not needed."""
    dtype = loss_dtype(pred, tensors, streams, noise_dtype)
    groups = pred.shape[0] if per_sample else 1
    loss = torch.empty(pred.shape[:1] if per_sample else (), dtype=dtype, device=pred.device)
    grad = torch.empty_like(pred) if need_grad else pred.new_empty(0)
    if pred.numel() == 0:
        return loss.zero_(), grad

    leading = [*coefs, weight, mask]
    plain = [t for t, s in zip(tensors, streams, strict=True) if s == TENSOR]
    ordered = in_one_order([pred, *plain, *([grad] if need_grad else [])], leading, len(plain) < len(tensors))
    source = ordered[0]
    target = ordered[-1] if need_grad else grad
    rest = iter(ordered[1:])
    operands = [next(rest) if s == TENSOR else t for t, s in zip(tensors, streams, strict=True)]

    elementwise = mask is not None and mask.dim() == pred.dim()
    inner = row_elements(pred, [*coefs, weight, None if elementwise else mask], groups)
    if mask is not None:
        mask = mask.contiguous()
    table = [lookup(c, v, pred, inner) for c, v in zip(coefs, values, strict=True)]
    table += [lookup(weight, 1.0, pred, inner), lookup(scale, scale_value, pred, inner)]
    library = _native.library()
    device = _native.DEVICE_CODE[pred.device.type]
    workspace = torch.empty(library.workspace_elements(device, pred.numel(), groups), dtype=torch.float64, device=pred.device)
    library.regression_loss(
        device,
        _native.DTYPE_CODE[pred.dtype],
        source.data_ptr(),
        target.data_ptr() if need_grad else 0,
        pred.numel() // inner,
        inner,
        _native.DTYPE_CODE[noise_dtype],
        [t.data_ptr() for t in operands],
        streams,
        offsets,
        [(0 if c.tensor is None else c.tensor.data_ptr(), c.rows_per_entry, c.stride, c.value) for c in table],
        0 if mask is None else mask.data_ptr(),
        0 if mask is None else math.prod(pred.shape[mask.dim() :]),
        kind,
        delta,
        scale_grad,
        loss.data_ptr(),
        groups,
        workspace.data_ptr(),
        _native.stream_of(pred),
    )
    if need_grad and target is not grad:
        grad.copy_(target)
    return loss, grad
