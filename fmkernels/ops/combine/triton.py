"""`combine` in Triton: one pass over the tensors, and a second small kernel for the norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _memory
from .._operands import TENSOR, compute_dtype, in_one_order
from .._triton import WARPS, block_of, device_of, entry, operand, rounded, table, terms


@triton.jit
def _kernel(
    out, like, pointers, streams, offsets, stores, coefs, covered, strides, values, e_coefs, e_covered, e_strides,
    e_values, partials, atol, rtol, group, tiles,
    NOISE: tl.constexpr, ALIGNED: tl.constexpr, STORED: tl.constexpr, GIVEN: tl.constexpr, UNIFORM: tl.constexpr,
    E_GIVEN: tl.constexpr, E_UNIFORM: tl.constexpr, NORM: tl.constexpr, ERROR: tl.constexpr, LEAVE: tl.constexpr,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    inner = program % tiles * BLOCK
    base = program // tiles * group + inner
    i = base + tl.arange(0, BLOCK)
    inside = inner + tl.arange(0, BLOCK) < group
    if DOUBLE:
        y = tl.zeros((BLOCK,), tl.float64)
        error = tl.zeros((BLOCK,), tl.float64)
        first = tl.zeros((BLOCK,), tl.float64)
    else:
        y = tl.zeros((BLOCK,), tl.float32)
        error = tl.zeros((BLOCK,), tl.float32)
        first = tl.zeros((BLOCK,), tl.float32)
    leave = False
    if LEAVE:  # in place with one shared coefficient: nothing to do where that is 1
        leave = tl.load(coefs[0]) == 1.0
    if not leave:
        for k in tl.static_range(len(pointers)):
            value = operand(
                pointers[k], streams[k], offsets[k], stores[k], i, base, inside, like, BLOCK, NOISE[k], ALIGNED[k],
                STORED[k], DOUBLE,
            ).to(y.dtype)  # fmt: skip
            if GIVEN[k]:
                y += entry(coefs[k], covered[k], strides[k], base, BLOCK, UNIFORM[k], inside) * value
            else:
                y += values[k] * value
            if ERROR:
                if E_GIVEN[k]:
                    error += entry(e_coefs[k], e_covered[k], e_strides[k], base, BLOCK, E_UNIFORM[k], inside) * value
                else:
                    error += e_values[k] * value
            if NORM and k == 0:
                first = value
        tl.store(out + i, rounded(y, out.dtype.element_ty), mask=inside)
        if NORM:
            e = error if ERROR else y
            a, b = tl.abs(first), tl.abs(y)
            larger = tl.where((a > b) | (a != a), a, b)  # keeps a NaN of either
            ratio = e / (atol + rtol * larger)
            tl.store(partials + program, tl.sum(tl.where(inside, ratio * ratio, 0.0), axis=0))


@triton.jit
def _finish(partials, norm, tiles, group, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), partials.dtype.element_ty)
    for start in range(0, tiles, BLOCK):
        j = start + tl.arange(0, BLOCK)
        total += tl.load(partials + sample * tiles + j, mask=j < tiles, other=0.0)
    tl.store(norm + sample, tl.sqrt(tl.sum(total, axis=0) / group))


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
    y = _memory.empty_like(data) if out is None else out
    stores = [
        _memory.empty(data.shape, data.dtype, data.device) if store_noise and s != TENSOR else None for s in streams
    ]
    results = [y, *(z for z in stores if z is not None)]
    groups = data.shape[0] if want_norm else 1
    norm = torch.zeros(groups, dtype=dtype, device=data.device)
    if want_norm:
        results.append(norm)
    elements = data.numel()
    if elements == 0:
        return results

    plain = [t for t, s in zip(tensors, streams, strict=True) if s == TENSOR]
    *plain, target = in_one_order([*plain, y], [*coefs, *error_coefs], len(plain) < len(tensors))
    rest = iter(plain)
    operands = [next(rest) if s == TENSOR else t for t, s in zip(tensors, streams, strict=True)]
    group = elements // groups
    block = block_of(group)
    tiles = triton.cdiv(group, block)
    t = terms(operands, streams, offsets, stores, group)
    c = table(coefs, values, elements, group, block, data, dtype)
    e = table(error_coefs, error_values, elements, group, block, data, dtype) if error_values else c
    partials = torch.empty(groups * tiles if want_norm else 0, dtype=dtype, device=data.device)
    leave = len(operands) == 1 and target.data_ptr() == operands[0].data_ptr() and c.given[0] and coefs[0] is not None
    leave = leave and coefs[0].numel() == 1 and not want_norm  # type: ignore[union-attr]
    with device_of(data):
        _kernel[(groups * tiles,)](
            target, data, t.pointers, t.streams, t.offsets, t.stores, c.pointers, c.covered, c.strides, c.values,
            e.pointers, e.covered, e.strides, e.values, partials, atol, rtol, group, tiles,
            t.noise, t.aligned, t.stored, c.given, c.uniform, e.given, e.uniform, want_norm, bool(error_values), leave,
            dtype == torch.float64, block, num_warps=WARPS,
        )  # fmt: skip
        if want_norm:
            _finish[(groups,)](partials, norm, tiles, group, 256, num_warps=WARPS)
    if target is not y:
        y.copy_(target)
    return results
