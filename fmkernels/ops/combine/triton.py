"""`combine` in Triton: one pass over the tensors, and a second small kernel for the norm of more than one tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _memory
from .._operands import TENSOR, compute_dtype, in_one_order
from .._triton import (
    BY_GROUP,
    BY_TILE,
    ELEMENT_TYPE,
    NUMBER,
    SHARED,
    WARPS,
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


@triton.jit(
    # streams, offsets and numbers change from call to call: 0, 1 and multiples of 16 are no kernels of their own
    do_not_specialize=["streams", "offsets", "covered", "numbers", "e_covered", "e_numbers", "atol", "rtol"]
)
def _kernel(
    out, pointers, streams, offsets, stores, coefs, covered, strides, numbers, e_coefs, e_covered, e_strides, e_numbers,
    norm, partials, atol, rtol, group, tiles,
    DTYPE: tl.constexpr, NOISE: tl.constexpr, ALIGNED: tl.constexpr, STORED: tl.constexpr, MODES: tl.constexpr,
    E_MODES: tl.constexpr, NORM: tl.constexpr, ERROR: tl.constexpr, LEAVE: tl.constexpr, ONE_GROUP: tl.constexpr,
    ONE_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    DOUBLE: tl.constexpr = DTYPE == tl.float64  # noqa: SIM300
    program, sample, base, inside = tile(group, tiles, BLOCK, ONE_GROUP)
    if DOUBLE:
        y = tl.zeros((BLOCK,), tl.float64)
    else:
        y = tl.zeros((BLOCK,), tl.float32)
    error = y
    first = y
    leave = False
    if LEAVE:  # in place with one coefficient for the tile: nothing to read or write where that is 1
        leave = entry(coefs[0], covered[0], strides[0], program, sample, base, inside, BLOCK, MODES[0]) == 1.0
    if not leave:
        for k in tl.static_range(len(pointers)):
            value = operand(
                pointers[k], streams[k], offsets[k], stores[k], base, inside, BLOCK, DTYPE, NOISE[k], ALIGNED[k],
                STORED[k],
            ).to(y.dtype)  # fmt: skip
            y = add_term(
                y, value, coefs[k], covered[k], strides[k], numbers[k], program, sample, base, inside, BLOCK, MODES[k],
                DOUBLE,
            )  # fmt: skip
            if ERROR:
                error = add_term(
                    error, value, e_coefs[k], e_covered[k], e_strides[k], e_numbers[k], program, sample, base, inside,
                    BLOCK, E_MODES[k], DOUBLE,
                )  # fmt: skip
            if NORM and k == 0:
                first = value
        tl.store(out + base + tl.arange(0, BLOCK), rounded(y, DTYPE), mask=inside)
        if NORM:
            e = error if ERROR else y
            a, b = tl.abs(first), tl.abs(y)
            larger = tl.where((a > b) | (a != a), a, b)  # keeps a NaN of either
            ratio = e / (number(atol, DOUBLE) + number(rtol, DOUBLE) * larger)
            total = tl.sum(tl.where(inside, ratio * ratio, 0.0), axis=0)
            if ONE_TILE:
                tl.store(norm + sample, tl.sqrt(total / group))
            else:
                tl.store(partials + program, total)


@triton.jit
def _finish(partials, norm, tiles, group, SUM_BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    tl.store(norm + sample, tl.sqrt(ordered_sum(partials, sample, tiles, SUM_BLOCK) / group))


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
    elements = data.numel()
    groups = data.shape[0] if want_norm else 1
    if want_norm:
        results.append(torch.empty(groups, dtype=dtype, device=data.device))
    if elements == 0:
        if want_norm:
            results[-1].zero_()
        return results

    plain = [t for t, s in zip(tensors, streams, strict=True) if s == TENSOR]
    *plain, target = in_one_order([*plain, y], [*coefs, *error_coefs], len(plain) < len(tensors))
    rest = iter(plain)
    operands = [next(rest) if s == TENSOR else t for t, s in zip(tensors, streams, strict=True)]
    tiling = plan(elements, groups)
    t = terms(operands, streams, offsets, stores, tiling)
    c = table(coefs, values, data, dtype, tiling)
    e = table(error_coefs, error_values, data, dtype, tiling) if error_values else c
    lone_in_place = len(operands) == 1 and not want_norm and target.data_ptr() == operands[0].data_ptr()
    if lone_in_place and c.modes[0] == NUMBER.value and values[0] == 1.0:
        return results
    leave = lone_in_place and c.modes[0] in (SHARED.value, BY_TILE.value, BY_GROUP.value)
    one_tile = tiling.tiles == 1
    norm = results[-1] if want_norm else y
    partials = norm if one_tile or not want_norm else torch.empty(groups * tiling.tiles, dtype=dtype, device=y.device)
    with device_of(data):
        _kernel[(groups * tiling.tiles,)](
            target, t.pointers, t.streams, t.offsets, t.stores, c.pointers, c.covered, c.strides, c.numbers,
            e.pointers, e.covered, e.strides, e.numbers, norm, partials, number_argument(atol, dtype),
            number_argument(rtol, dtype), tiling.group, tiling.tiles, ELEMENT_TYPE[data.dtype], t.noise, t.aligned,
            t.stored, c.modes, e.modes, want_norm, bool(error_values), leave, groups == 1, one_tile, tiling.block,
            num_warps=WARPS,
        )  # fmt: skip
        if want_norm and not one_tile:
            _finish[(groups,)](
                partials, norm, tiling.tiles, tiling.group, tiling.sum_block, num_warps=tiling.sum_warps
            )  # fmt: skip
    if target is not y:
        y.copy_(target)
    return results
