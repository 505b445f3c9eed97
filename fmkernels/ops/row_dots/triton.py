"""`row_dots` in Triton: one pass over the tensors, and a second small kernel for rows of more than one tile."""

# Triton's language has no types of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._operands import compute_dtype, in_one_order
from .._triton import BLOCK, WARPS, device_of, ordered_sum, plan


@triton.jit(do_not_specialize=["rows", "tiles"])
def _kernel(
    out, partials, tensors, rows, inner, tiles,
    FIRST: tl.constexpr, SECOND: tl.constexpr, DOUBLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ONE_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = program if ONE_TILE else program // tiles  # in 32 bits: a 64-bit division is a call
    row = sample.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)
    if not ONE_TILE:
        column += (program - sample * tiles).to(tl.int64) * BLOCK
    inside = (row < rows)[:, None] & (column < inner)[None, :]
    i = row[:, None] * inner + column[None, :]
    values = ()
    for k in tl.static_range(len(tensors)):
        value = tl.load(tensors[k] + i, mask=inside, other=0.0).to(tl.float64 if DOUBLE else tl.float32)
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005 - Triton does not unpack tuples
    ones = tl.where(inside, 1.0, 0.0).to(tl.float64 if DOUBLE else tl.float32)
    for p in tl.static_range(len(FIRST)):
        product = ones
        if FIRST[p] >= 0 and SECOND[p] >= 0:
            product = values[FIRST[p]] * values[SECOND[p]]
        elif FIRST[p] >= 0 or SECOND[p] >= 0:
            product = values[max(FIRST[p], SECOND[p])]
        total = tl.sum(product, axis=1)
        if ONE_TILE:
            tl.store(out + row * len(FIRST) + p, total, mask=row < rows)
        else:  # a row's partial sums lie together, the pairs one after the other
            tl.store(partials + tl.num_programs(0).to(tl.int64) * p + program + tl.arange(0, ROWS), total)


@triton.jit(do_not_specialize=["tiles"])
def _finish(out, partials, tiles, SUM_BLOCK: tl.constexpr):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    pair, pairs = tl.program_id(1), tl.num_programs(1)
    tl.store(out + row * pairs + pair, ordered_sum(partials, pair * rows.to(tl.int64) + row, tiles, SUM_BLOCK))


def run(tensors: Sequence[Tensor], first: Sequence[int], second: Sequence[int]) -> Tensor:
    """Entry [b, p] is the sum over row b of tensors[first[p]] * tensors[second[p]], index -1 being ones."""
    data = tensors[0]
    dtype = compute_dtype(data)
    rows, elements, pairs = data.shape[0], data.numel(), len(first)
    out = torch.empty((rows, pairs), dtype=dtype, device=data.device)
    if elements == 0:
        return out.zero_()
    ordered = in_one_order(list(tensors), (), False)
    used = sorted({0, *first, *second} - {-1})
    place = {-1: -1, **{index: k for k, index in enumerate(used)}}
    tiling = plan(elements, rows)
    one_tile = tiling.tiles == 1
    tile_rows = max(1, BLOCK // tiling.block) if one_tile else 1
    partials = out if one_tile else torch.empty(pairs * rows * tiling.tiles, dtype=dtype, device=data.device)
    with device_of(data):
        _kernel[(triton.cdiv(rows, tile_rows) * tiling.tiles,)](
            out, partials, tuple(ordered[k] for k in used), rows, tiling.group, tiling.tiles,
            tuple(place[k] for k in first), tuple(place[k] for k in second), dtype == torch.float64, tile_rows,
            tiling.block, one_tile, num_warps=WARPS,
        )  # fmt: skip
        if not one_tile:
            _finish[(rows, pairs)](out, partials, tiling.tiles, tiling.sum_block, num_warps=tiling.sum_warps)
    return out
