"""The random operation in Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _memory
from .._triton import BLOCK, WARPS, device_of, normals, rounded, words
from . import kinds

_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@triton.jit
def _kernel(
    out, seed, stream, offset, count, KIND: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i = base + tl.arange(0, BLOCK)
    if KIND == 2:
        value = normals(tl.load(seed), stream, offset + base, BLOCK, ALIGNED, DOUBLE)
    else:
        word = words(tl.load(seed), stream, offset + base, BLOCK, ALIGNED)
        if KIND == 0:
            value = word.to(tl.int64)
        elif DOUBLE:
            value = word.to(tl.float64) * 2.3283064365386963e-10
        else:
            value = (word >> (32 - BITS)).to(tl.float32) * (1.0 / (1 << BITS))
    tl.store(out + i, rounded(value, out.dtype.element_ty), mask=i < count)


def run(size: Sequence[int], seed: Tensor, kind: int, stream: int, offset: int, dtype: torch.dtype) -> Tensor:
    out = _memory.empty(torch.Size(size), dtype, seed.device)
    count = math.prod(size)
    if count:
        double = dtype == torch.float64
        with device_of(out):
            _kernel[(triton.cdiv(count, BLOCK),)](
                out, seed, stream, offset, count, kind, _BITS.get(dtype, 32) if kind == kinds.UNIFORM else 32,
                offset % 4 == 0, double, BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return out
