"""The random operation in Triton."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _memory
from .._triton import BLOCK, WARPS, device_of, normals, rounded, uniform, words
from . import kinds

# Bits of a uniform: no more than the significand holds; float64 takes the whole word.
_BITS = {torch.float64: 32, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_WORDS, _UNIFORM = tl.constexpr(kinds.WORDS), tl.constexpr(kinds.UNIFORM)


@triton.jit(do_not_specialize=["stream", "offset"])  # they change from call to call
def _kernel(
    out, seed, stream, offset, count, KIND: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    DOUBLE: tl.constexpr = out.dtype.element_ty == tl.float64
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i = base + tl.arange(0, BLOCK)
    if KIND == _WORDS:
        value = words(tl.load(seed), stream, offset + base, BLOCK, ALIGNED).to(tl.int64)
    elif KIND == _UNIFORM:
        value = uniform(words(tl.load(seed), stream, offset + base, BLOCK, ALIGNED), BITS, DOUBLE)
    else:
        value = normals(tl.load(seed), stream, offset + base, BLOCK, ALIGNED, DOUBLE)
    tl.store(out + i, rounded(value, out.dtype.element_ty), mask=i < count)


def run(size: Sequence[int], seed: Tensor, kind: int, stream: int, offset: int, dtype: torch.dtype) -> Tensor:
    out = _memory.empty(torch.Size(size), dtype, seed.device)
    count = math.prod(size)
    if count:
        with device_of(out):
            _kernel[(triton.cdiv(count, BLOCK),)](
                out, seed, stream, offset, count, kind, _BITS.get(dtype, 32), offset % 4 == 0, BLOCK,
                num_warps=WARPS,
            )  # fmt: skip
    return out
