"""Triton device functions that the operations share: noise, coefficients, penalties; and what their launchers share.

The formulas are those of csrc/common (philox.h, normal.h, penalty.h), the noise bit for bit. Tiles run over the flat
index of dense tensors; a tile lies within one group of a reduction. Block sizes are fixed: 1024 elements with 4 warps
give each thread 8 consecutive elements, 128 bits of a 16-bit dtype and twice that of float32. Not tuned on a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._operands import TENSOR, evenly_spaced, lookups

BLOCK = 1024
WARPS = 4


# Triton's interpreter (3.9) cuts float32 to bfloat16 instead of rounding to nearest even, as compiled code does.
_CUTS_BFLOAT16 = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """The value in a pointer's element type, rounded to nearest even."""
    if _CUTS_BFLOAT16 and dtype == tl.bfloat16:
        single = value.to(tl.float32)
        bits = single.to(tl.int32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        result = tl.where(single == single, even, single).to(dtype)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def philox(seed, block, stream):
    """The four words of Philox4x32-10 for int64 block numbers, as uint32."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    wide = tl.zeros_like(block) + stream  # a small stream arrives as an int32, which has no bits to shift
    c2, c3 = wide.to(tl.uint32), (wide >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def open_uniform(word):
    """(0, 1]: (word + 1/2) / 2^32 from the word rounded to float32."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def log_positive(x):
    """log x for normal positive float32 x, 2 ulp also next to 1."""
    shifted = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = 7.0376836292e-2
    p = p * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    f2 = f * f
    return f + (p * f * f2 + e * -2.12194440e-4 - 0.5 * f2) + e * 0.693359375


@triton.jit
def cos_sin_turns(u):
    """cos(2 pi u) and sin(2 pi u) for float32 u in [0, 1]."""
    q = (u * 4.0 + 0.5).to(tl.int32)
    r = (u - q.to(tl.float32) * 0.25) * 6.2831853072
    r2 = r * r
    s = -1.9515295891e-4
    s = s * r2 + 8.3321608736e-3
    s = s * r2 - 1.6666654611e-1
    s = s * r2 * r + r
    c = 2.443315711809948e-5
    c = c * r2 - 1.388731625493765e-3
    c = c * r2 + 4.166664568298827e-2
    c = c * r2 * r2 - 0.5 * r2 + 1.0
    swap = (q & 1) != 0
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    return tl.where(((q + 1) & 2) != 0, -cosine, cosine), tl.where((q & 2) != 0, -sine, sine)


@triton.jit
def box_muller(a, b, DOUBLE: tl.constexpr):
    """Two words to two normals, float32 or float64."""
    u, v = open_uniform(a), open_uniform(b)
    if DOUBLE:
        radius = tl.sqrt(-2.0 * tl.log(u.to(tl.float64)))
        angle = v.to(tl.float64) * 6.283185307179586
        z0, z1 = radius * tl.cos(angle), radius * tl.sin(angle)
    else:
        radius = tl.sqrt(-2.0 * log_positive(u))
        c, s = cos_sin_turns(v)
        z0, z1 = radius * c, radius * s
    return z0, z1


@triton.jit
def in_order(x0, x1, x2, x3):
    """Four values for each block, as a flat tile in the order of elements."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def chosen_word(lane, w0, w1, w2, w3):
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def words(seed, stream, first, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Words first .. first + BLOCK - 1 of a stream; ALIGNED where first is a multiple of 4."""
    if ALIGNED:
        w0, w1, w2, w3 = philox(seed, first // 4 + tl.arange(0, BLOCK // 4), stream)
        result = in_order(w0, w1, w2, w3)
    else:
        i = first + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = philox(seed, i // 4, stream)
        result = chosen_word(i % 4, w0, w1, w2, w3)
    return result


@triton.jit
def normals(seed, stream, first, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, DOUBLE: tl.constexpr):
    """Normals first .. first + BLOCK - 1 of a stream; four from each Philox call where ALIGNED."""
    if ALIGNED:
        w0, w1, w2, w3 = philox(seed, first // 4 + tl.arange(0, BLOCK // 4), stream)
        z0, z1 = box_muller(w0, w1, DOUBLE)
        z2, z3 = box_muller(w2, w3, DOUBLE)
        result = in_order(z0, z1, z2, z3)
    else:
        i = first + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = philox(seed, i // 4, stream)
        lane = i % 4
        z0, z1 = box_muller(tl.where(lane < 2, w0, w2), tl.where(lane < 2, w1, w3), DOUBLE)
        result = tl.where(lane % 2 == 0, z0, z1)
    return result


@triton.jit
def entry(pointer, covered, stride, base, BLOCK: tl.constexpr, UNIFORM: tl.constexpr, inside):
    """A coefficient at elements base .. base + BLOCK - 1: one load where the whole tile has one entry."""
    if UNIFORM:
        result = tl.load(pointer + base // covered * stride)
    else:
        result = tl.load(pointer + (base + tl.arange(0, BLOCK)) // covered * stride, mask=inside, other=0.0)
    return result


@triton.jit
def operand(
    pointer, stream, offset, store, i, base, inside, like,
    BLOCK: tl.constexpr, NOISE: tl.constexpr, ALIGNED: tl.constexpr,
    STORE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """An operand's tile: loaded, or drawn, rounded to the data's dtype (that of ``like``) and stored."""
    if NOISE:
        value = rounded(normals(tl.load(pointer), stream, offset + base, BLOCK, ALIGNED, DOUBLE), like.dtype.element_ty)
        if STORE:
            tl.store(store + i, value, mask=inside)
    else:
        value = tl.load(pointer + i, mask=inside, other=0.0)
    return value


@triton.jit
def penalty(d, delta, KIND: tl.constexpr):
    """rho(d) and its derivative; the codes of regression_loss/kinds.py."""
    if KIND == 0:
        value, slope = d * d, d + d
    elif KIND == 1:
        size = tl.abs(d)
        value = tl.where(size <= delta, 0.5 * d * d, delta * (size - 0.5 * delta))
        slope = tl.where(size <= delta, d, tl.where(d < 0, -delta, tl.where(d > 0, delta, d)))
    elif KIND == 2:
        root = tl.sqrt(d * d + delta * delta)
        value, slope = d * d / (root + delta), d / root
    else:
        one = tl.zeros_like(d) + 1.0
        value, slope = tl.abs(d), tl.where(d < 0, -one, tl.where(d > 0, one, d))
    return value, slope


class Terms(NamedTuple):
    """Operands and coefficients as kernels take them: tuples, one entry an operand."""

    pointers: tuple[Tensor, ...]
    streams: tuple[int, ...]
    offsets: tuple[int, ...]
    stores: tuple[Tensor, ...]
    noise: tuple[bool, ...]
    aligned: tuple[bool, ...]
    stored: tuple[bool, ...]


class Table(NamedTuple):
    """Coefficients as kernels take them."""

    pointers: tuple[Tensor, ...]
    covered: tuple[int, ...]
    strides: tuple[int, ...]
    values: tuple[float, ...]
    given: tuple[bool, ...]
    uniform: tuple[bool, ...]


def terms(
    operands: Sequence[Tensor],
    streams: Sequence[int],
    offsets: Sequence[int],
    stores: Sequence[Tensor | None],
    group: int,
) -> Terms:
    noise = tuple(s != TENSOR for s in streams)
    return Terms(
        tuple(operands),
        tuple(max(s, 0) for s in streams),
        tuple(offsets),
        tuple(operands[0] if z is None else z for z in stores),
        noise,
        # every tile begins at a multiple of 4 of the stream
        tuple(offset % 4 == 0 and group % 4 == 0 for offset in offsets),
        tuple(z is not None for z in stores),
    )


def table(
    coefs: Sequence[Tensor | None],
    values: Sequence[float],
    elements: int,
    group: int,
    block: int,
    like: Tensor,
    dtype: torch.dtype,
) -> Table:
    """Coefficients; in float64 numbers become tensors, since kernels take numbers as float32."""
    if dtype == torch.float64:
        coefs = [
            torch.full((), v, dtype=dtype, device=like.device) if c is None else c
            for c, v in zip(coefs, values, strict=True)
        ]
    spaced = evenly_spaced(coefs)
    found = lookups(spaced, values, elements, 1)
    return Table(
        tuple(like if c is None else c for c in spaced),
        tuple(covered for _, covered, _, _ in found),
        tuple(stride for _, _, stride, _ in found),
        tuple(float(v) for v in values),
        tuple(c is not None for c in spaced),
        tuple(
            c is not None and (c.dim() == 0 or (covered % block == 0 and (group % block == 0 or group == elements)))
            for c, (_, covered, _, _) in zip(spaced, found, strict=True)
        ),
    )


def device_of(tensor: Tensor) -> Any:
    """Triton launches on the current device; kernels belong on the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def block_of(group: int) -> int:
    """Elements of a tile: no more than a group's next power of two."""
    return min(BLOCK, max(16, triton.next_power_of_2(group)))
