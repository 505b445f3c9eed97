"""`regression_loss` in Triton: loss and gradient in one pass, and a small kernel that sums the partial losses of more
than one tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _memory
from .._operands import TENSOR, entry_stride, in_one_order
from .._triton import (
    ELEMENT_TYPE,
    NUMBER,
    WARPS,
    Table,
    add_term,
    device_of,
    entry,
    number,
    number_argument,
    operand,
    ordered_sum,
    plan,
    rounded,
    table,
    terms,
    tile,
)
from .kinds import KINDS, bend
from .schema import gradient_dtype, loss_dtype

_SQUARED, _HUBER, _PSEUDO_HUBER = (tl.constexpr(KINDS[k]) for k in ("squared", "huber", "pseudo_huber"))


@triton.jit
def penalty(d, delta, KIND: tl.constexpr):
    """rho(d) and its derivative."""
    if KIND == _SQUARED:
        value, slope = d * d, d + d
    elif KIND == _HUBER:
        size = tl.abs(d)
        value = tl.where(size <= delta, 0.5 * d * d, delta * (size - 0.5 * delta))
        slope = tl.where(size <= delta, d, tl.where(d < 0, -delta, tl.where(d > 0, delta, d)))  # a NaN stays one
    elif KIND == _PSEUDO_HUBER:
        # as csrc/regression_loss/penalty.h: neither square leaves the range
        size = tl.abs(d)
        outside = size > delta  # a NaN is not, and stays one
        ratio = tl.where(outside, delta, size) / tl.where(outside, size, delta)
        size, b = tl.where(outside, 1.0, ratio), tl.where(outside, ratio, 1.0)
        x = tl.where(d < 0, -size, size)
        root = tl.sqrt(x * x + b * b)
        value, slope = d * (x / (root + b)), x / root
    else:
        value, slope = tl.abs(d), tl.where(d < 0, -1.0, tl.where(d > 0, 1.0, d))
    return value, slope


@triton.jit
def scale_of(scale, stride, scale_number, sample, GIVEN: tl.constexpr, DOUBLE: tl.constexpr):
    """The factor of a group's loss: its entry, or a number."""
    if GIVEN:
        result = tl.load(scale + sample * stride)
    else:
        result = number(scale_number, DOUBLE)
    return result


@triton.jit(
    # streams, offsets and numbers change from call to call: 0, 1 and multiples of 16 are no kernels of their own
    do_not_specialize=["streams", "offsets", "covered", "numbers", "mask_covered", "scale_number", "delta"]
)
def _kernel(
    pred, grad, pointers, streams, offsets, stores, coefs, covered, strides, numbers, mask, mask_covered, mask_stride,
    scale, scale_stride, scale_number, delta, loss, partials, group, tiles,
    DTYPE: tl.constexpr, NOISE: tl.constexpr, ALIGNED: tl.constexpr, STORED: tl.constexpr, MODES: tl.constexpr,
    MASK_MODE: tl.constexpr, SCALED: tl.constexpr, GRAD: tl.constexpr, KIND: tl.constexpr,
    DOUBLE: tl.constexpr, ONE_GROUP: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(pointers)  # the coefficient after the operands' is the weight
    program, sample, base, inside = tile(group, tiles, BLOCK, ONE_GROUP)
    i = base + tl.arange(0, BLOCK)
    d = tl.load(pred + i, mask=inside, other=0.0)
    if DOUBLE:
        d = d.to(tl.float64)
    else:
        d = d.to(tl.float32)
    u = tl.zeros_like(d)  # subtracted as a whole, as the reference does
    for k in tl.static_range(COUNT):
        value = operand(
            pointers[k], streams[k], offsets[k], stores[k], base, inside, BLOCK, DTYPE, NOISE[k], ALIGNED[k], STORED[k]
        ).to(d.dtype)
        u = add_term(
            u, value, coefs[k], covered[k], strides[k], numbers[k], program, sample, base, inside, BLOCK, MODES[k],
            DOUBLE,
        )  # fmt: skip
    kept = inside
    if MASK_MODE != NUMBER:
        kept = kept & (entry(mask, mask_covered, mask_stride, program, sample, base, inside, BLOCK, MASK_MODE) != 0)
    rho, slope = penalty(d - u, number(delta, DOUBLE), KIND)
    if MODES[COUNT] != NUMBER:
        weight = entry(coefs[COUNT], covered[COUNT], strides[COUNT], program, sample, base, inside, BLOCK, MODES[COUNT])
        rho, slope = weight * rho, weight * slope
    factor = scale_of(scale, scale_stride, scale_number, sample, SCALED, DOUBLE)
    if GRAD:
        slope = slope * factor
        # selected, not multiplied: what is masked out may be NaN
        tl.store(grad + i, rounded(tl.where(kept, slope, 0.0), grad.dtype.element_ty), mask=inside)
    total = tl.sum(tl.where(kept, rho, 0.0), axis=0)
    if ONE_TILE:
        tl.store(loss + sample, total * factor)
    else:
        tl.store(partials + program, total)


@triton.jit(do_not_specialize=["scale_number"])
def _finish(
    partials, loss, scale, scale_stride, scale_number, tiles,
    SCALED: tl.constexpr, DOUBLE: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    factor = scale_of(scale, scale_stride, scale_number, sample, SCALED, DOUBLE)
    tl.store(loss + sample, ordered_sum(partials, sample, tiles, SUM_BLOCK) * factor)


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
    groups = pred.shape[0] if per_sample else 1
    loss = torch.empty(pred.shape[:1] if per_sample else (), dtype=dtype, device=pred.device)
    grad = _memory.empty_like(pred, gradient_dtype(pred)) if need_grad else pred.new_empty(0)
    elements = pred.numel()
    if elements == 0:
        return loss.zero_(), grad

    leading = [*coefs, weight]
    plain = [t for t, s in zip(tensors, streams, strict=True) if s == TENSOR]
    wanted = [pred, *plain, *([grad] if need_grad else [])]
    ordered = in_one_order(wanted, leading if mask is None else [*leading, mask], len(plain) < len(tensors))
    source, target = ordered[0], ordered[-1] if need_grad else grad
    rest = iter(ordered[1:])
    operands = [next(rest) if s == TENSOR else t for t, s in zip(tensors, streams, strict=True)]
    tiling = plan(elements, groups)
    t = terms(operands, streams, offsets, [None] * len(operands), tiling)
    c = table(leading, [*values, 1.0], pred, dtype, tiling)
    m: Table = table([None if mask is None else mask.contiguous().view(torch.uint8)], [1.0], pred, dtype, tiling)
    scale_stride = 0 if scale is None else entry_stride(scale) or 0
    factor = (pred if scale is None else scale, scale_stride, number_argument(scale_value, dtype))
    delta_argument = number_argument(bend(delta, dtype), dtype)
    double = dtype == torch.float64
    one_tile = tiling.tiles == 1
    partials = loss if one_tile else torch.empty(groups * tiling.tiles, dtype=dtype, device=pred.device)
    with device_of(pred):
        _kernel[(groups * tiling.tiles,)](
            source, target, t.pointers, t.streams, t.offsets, t.stores, c.pointers, c.covered, c.strides, c.numbers,
            m.pointers[0], m.covered[0], m.strides[0], *factor, delta_argument, loss, partials,
            tiling.group, tiling.tiles, ELEMENT_TYPE[noise_dtype], t.noise, t.aligned, t.stored, c.modes, m.modes[0],
            scale is not None, need_grad, kind, double, groups == 1, one_tile, tiling.block,
            num_warps=WARPS,
        )  # fmt: skip
        if not one_tile:
            _finish[(groups,)](
                partials, loss, *factor, tiling.tiles, scale is not None, double, tiling.sum_block,
                num_warps=tiling.sum_warps,
            )  # fmt: skip
    if need_grad and target is not grad:
        grad.copy_(target)
    return loss, grad
