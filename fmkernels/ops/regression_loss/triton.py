"""`regression_loss` in Triton: loss and gradient in one pass, and a small kernel that sums the partial losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _memory
from .._operands import TENSOR, in_one_order
from .._triton import WARPS, block_of, device_of, entry, operand, penalty, rounded, table, terms
from .op import loss_dtype


@triton.jit
def _kernel(
    pred, grad, like, pointers, streams, offsets, stores, coefs, covered, strides, values, mask, mask_covered, partials,
    delta, group, tiles,
    NOISE: tl.constexpr, ALIGNED: tl.constexpr, STORED: tl.constexpr, GIVEN: tl.constexpr, UNIFORM: tl.constexpr,
    MASKED: tl.constexpr, GRAD: tl.constexpr, SCALE_GRAD: tl.constexpr, KIND: tl.constexpr, DOUBLE: tl.constexpr,
    NOISE_DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # the last two coefficients are the weight and the scale
    count: tl.constexpr = len(pointers)
    program = tl.program_id(0).to(tl.int64)
    inner = program % tiles * BLOCK
    base = program // tiles * group + inner
    i = base + tl.arange(0, BLOCK)
    inside = inner + tl.arange(0, BLOCK) < group
    d = tl.load(pred + i, mask=inside, other=0.0)
    if DOUBLE:
        d = d.to(tl.float64)
    else:
        d = d.to(tl.float32)
    # subtracted as a whole, as the reference does: u first
    u = tl.zeros_like(d)
    for k in tl.static_range(count):
        value = operand(
            pointers[k], streams[k], offsets[k], stores[k], i, base, inside, like, BLOCK, NOISE[k], ALIGNED[k],
            STORED[k], NOISE_DOUBLE,
        ).to(d.dtype)  # fmt: skip
        if GIVEN[k]:
            u += entry(coefs[k], covered[k], strides[k], base, BLOCK, UNIFORM[k], inside) * value
        else:
            u += values[k] * value
    weight = tl.zeros_like(d) + 1.0
    if GIVEN[count]:
        weight = tl.zeros_like(d) + entry(
            coefs[count], covered[count], strides[count], base, BLOCK, UNIFORM[count], inside
        )
    kept = inside
    if MASKED:
        kept = inside & (tl.load(mask + i // mask_covered, mask=inside, other=0) != 0)
    rho, slope = penalty(d - u, tl.zeros_like(d) + delta, KIND)
    tl.store(partials + program, tl.sum(tl.where(kept, weight * rho, 0.0), axis=0))
    if GRAD:
        if SCALE_GRAD:
            if GIVEN[count + 1]:
                weight *= entry(
                    coefs[count + 1], covered[count + 1], strides[count + 1], base, BLOCK, UNIFORM[count + 1], inside
                )
            else:
                weight *= values[count + 1]
        tl.store(grad + i, rounded(tl.where(kept, weight * slope, 0.0), grad.dtype.element_ty), mask=inside)


@triton.jit
def _finish(partials, loss, scale, stride, value, tiles, GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), partials.dtype.element_ty)
    for start in range(0, tiles, BLOCK):
        j = start + tl.arange(0, BLOCK)
        total += tl.load(partials + sample * tiles + j, mask=j < tiles, other=0.0)
    result = tl.sum(total, axis=0)
    if GIVEN:
        result *= tl.load(scale + sample * stride)
    else:
        result *= value
    tl.store(loss + sample, result)


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
    dtype = loss_dtype(pred, noise_dtype)
    groups = pred.shape[0] if per_sample else 1
    loss = torch.empty(pred.shape[:1] if per_sample else (), dtype=dtype, device=pred.device)
    grad = _memory.empty_like(pred) if need_grad else pred.new_empty(0)
    elements = pred.numel()
    if elements == 0:
        return loss.zero_(), grad

    leading = [*coefs, weight, scale]
    plain = [t for t, s in zip(tensors, streams, strict=True) if s == TENSOR]
    wanted = [pred, *plain, *([grad] if need_grad else [])]
    ordered = in_one_order(wanted, leading if mask is None else [*leading, mask], len(plain) < len(tensors))
    source, target = ordered[0], ordered[-1] if need_grad else grad
    rest = iter(ordered[1:])
    operands = [next(rest) if s == TENSOR else t for t, s in zip(tensors, streams, strict=True)]
    group = elements // groups
    block = block_of(group)
    tiles = triton.cdiv(group, block)
    like = torch.empty(0, dtype=noise_dtype, device=pred.device)
    t = terms(operands, streams, offsets, [None] * len(operands), group)
    c = table(leading, [*values, 1.0, scale_value], elements, group, block, pred, dtype)
    partials = torch.empty(groups * tiles, dtype=dtype, device=pred.device)
    mask = pred if mask is None else mask.contiguous()
    masked = mask is not pred
    with device_of(pred):
        _kernel[(groups * tiles,)](
            source, target, like, t.pointers, t.streams, t.offsets, t.stores, c.pointers, c.covered, c.strides,
            c.values, mask.view(torch.uint8) if masked else mask, elements // mask.numel(), partials, delta, group,
            tiles,
            t.noise, t.aligned, t.stored, c.given, c.uniform, masked, need_grad, scale_grad, kind,
            dtype == torch.float64, noise_dtype == torch.float64, block, num_warps=WARPS,
        )  # fmt: skip
        _finish[(groups,)](
            partials, loss, c.pointers[-1], c.strides[-1], c.values[-1], tiles, c.given[-1], 256, num_warps=WARPS
        )  # fmt: skip
    if need_grad and target is not grad:
        grad.copy_(target)
    return loss, grad
