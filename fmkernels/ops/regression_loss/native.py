"""`regression_loss` on the compiled library; serves CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _memory, _native
from .._operands import TENSOR, evenly_spaced, in_one_order, lookups, row_elements
from .schema import gradient_dtype, loss_dtype


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
) -> tuple[Tensor, Tensor]:
    """(loss, gradient w.r.t. pred); the gradient is empty where it is not needed."""
    dtype = loss_dtype(pred, noise_dtype)
    shape = pred.shape
    groups = shape[0] if per_sample else 1
    loss = torch.empty(shape[:1] if per_sample else (), dtype=dtype, device=pred.device)
    if need_grad:
        pred = pred.to(gradient_dtype(pred))
    grad = _memory.empty_like(pred) if need_grad else pred.new_empty(0)
    elements = pred.numel()
    if elements == 0:
        return loss.zero_(), grad

    coefs = evenly_spaced([*coefs, weight, scale])
    leading = coefs if mask is None else [*coefs, mask]
    has_noise = max(streams) > TENSOR
    plain = [t for t, s in zip(tensors, streams, strict=True) if s == TENSOR] if has_noise else tensors
    ordered = in_one_order([pred, *plain, grad] if need_grad else [pred, *plain], leading, has_noise)
    source = ordered[0]
    target = ordered[-1] if need_grad else grad
    operands: Sequence[Tensor] = ordered[1 : len(plain) + 1]
    if has_noise:
        rest = iter(operands)
        operands = [next(rest) if s == TENSOR else t for t, s in zip(tensors, streams, strict=True)]

    inner = row_elements(elements, coefs, groups)
    mask_elements = 0
    if mask is not None:
        mask = mask.contiguous()
        mask_elements = elements // mask.numel()
        if mask.dim() < pred.dim():  # rows may be as fine as the mask; an elementwise one is looked up by element
            inner = min(inner, mask_elements)
    library = _native.library()
    device = _native.DEVICE_CODE[pred.device.type]
    workspace = _native.workspace(pred, groups)
    _native.launch(
        library.regression_loss,
        pred,
        device,
        _native.DTYPE_CODE[pred.dtype],
        source.data_ptr(),
        target.data_ptr() if need_grad else 0,
        elements // inner,
        inner,
        _native.DTYPE_CODE[noise_dtype],
        [t.data_ptr() for t in operands],
        streams,
        offsets,
        lookups(coefs, [*values, 1.0, scale_value], elements, inner),
        0 if mask is None else mask.data_ptr(),
        mask_elements,
        kind,
        delta,
        True,
        loss.data_ptr(),
        groups,
        0 if workspace is None else workspace.data_ptr(),
    )
    if need_grad and target is not grad:
        grad.copy_(target)
    return loss, grad
