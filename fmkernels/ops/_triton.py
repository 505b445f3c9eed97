"""Triton device functions that the operations share: noise, operands and coefficient lookups; and the launch plans.

The noise is that of csrc/common (philox.h, normal.h): words and uniforms bit for bit, normals to 2e-6. Wherever a
product is added to something the fused form is asked for by name: what the compiler fuses by itself differs between
kernels and between Triton versions (3.10 stops fusing by default), and noise drawn again must be bitwise what was
drawn before.

Tiles are flat pieces of the dense tensors, each within one group of a reduction. Sizes are fixed, by reasoning, not
measured on a GPU: 1024 elements with 4 warps give a thread 8 consecutive elements, which is one 128-bit access of a
16-bit dtype and two of float32, and 16 Philox multiplications a thread that overlap with them. Nothing is tuned at the
first use, which would wait for the device.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._operands import TENSOR, evenly_spaced, lookups

BLOCK = 1024
WARPS = 4
# The last stage of a reduction runs in one program a group: its loop is a chain of loads, so wide steps for long ones.
# With 8 warps the float64 sum spills on sm_80.
SUM_SHORT, SUM_LONG, SUM_LONG_WARPS = 256, 4096, 16
ELEMENT_TYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

# How a tile finds its entries of a coefficient or mask: see `entry`.
NUMBER = tl.constexpr(0)
SHARED = tl.constexpr(1)
BY_TILE = tl.constexpr(2)
BY_GROUP = tl.constexpr(3)
BY_ELEMENT = tl.constexpr(4)
LONG_RUNS = tl.constexpr(5)
SHORT_RUNS = tl.constexpr(6)

# Triton's interpreter (3.9) cuts float32 to bfloat16 instead of rounding to nearest even, as compiled code does.
_CUTS_BFLOAT16 = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """The value in an element type, rounded to nearest even."""
    if _CUTS_BFLOAT16 and dtype == tl.bfloat16:
        single = value.to(tl.float32)
        bits = single.to(tl.int32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        result = tl.where(single == single, even, single).to(dtype)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def constant(like, value: tl.constexpr):
    """A constant in the dtype of ``like``: tl.fma (3.6) would take a bare number as float32 first."""
    return tl.full(like.shape, value, like.dtype)


@triton.jit
def philox(seed, block, stream):
    """The four words of Philox4x32-10 for int64 block numbers, as uint32."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    wide = tl.zeros_like(block) + stream  # a small stream arrives as an int32, which has no upper half
    c2, c3 = wide.to(tl.uint32), (wide >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53  # both halves from one IMAD.WIDE.U32
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)  # wide, or the interpreter warns of the overflow
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def open_uniform(word):
    """(0, 1]: (word + 1/2) / 2^32 from the word rounded to float32. The product is exact, so fusing changes nothing."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def uniform(word, BITS: tl.constexpr, DOUBLE: tl.constexpr):
    """[0, 1): the top bits of a word over 2^BITS, exactly; no more bits than the significand holds."""
    if DOUBLE:
        result = word.to(tl.float64) * 2.3283064365386963e-10
    else:
        result = (word >> (32 - BITS)).to(tl.float32) * (1.0 / (1 << BITS))
    return result


@triton.jit
def log_positive(x):
    """log x for normal positive float32 x, 2 ulp also next to 1 (Cephes' logf)."""
    shifted = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = constant(f, 7.0376836292e-2)
    p = tl.fma(p, f, constant(f, -1.1514610310e-1))
    p = tl.fma(p, f, constant(f, 1.1676998740e-1))
    p = tl.fma(p, f, constant(f, -1.2420140846e-1))
    p = tl.fma(p, f, constant(f, 1.4249322787e-1))
    p = tl.fma(p, f, constant(f, -1.6668057665e-1))
    p = tl.fma(p, f, constant(f, 2.0000714765e-1))
    p = tl.fma(p, f, constant(f, -2.4999993993e-1))
    p = tl.fma(p, f, constant(f, 3.3333331174e-1))
    f2 = f * f
    tail = tl.fma(constant(f, -0.5), f2, tl.fma(p * f, f2, e * -2.12194440e-4))
    return tl.fma(e, constant(f, 0.693359375), f + tail)


@triton.jit
def cos_sin_turns(u, DOUBLE: tl.constexpr):
    """cos(2 pi u) and sin(2 pi u) for u in [0, 1]: the quarter turn is taken off exactly, then polynomials.

    In float64 they are Taylor's, whose remainder at 1/8 of a turn is below 2e-18. libdevice's would reduce an angle of
    any size, through a table in local memory.
    """
    q = (u * 4.0 + 0.5).to(tl.int32)
    r = (u - q.to(u.dtype) * 0.25) * 6.283185307179586
    r2 = r * r
    if DOUBLE:
        s = constant(r, 1.0 / 355687428096000.0)
        s = tl.fma(s, r2, constant(r, -1.0 / 1307674368000.0))
        s = tl.fma(s, r2, constant(r, 1.0 / 6227020800.0))
        s = tl.fma(s, r2, constant(r, -1.0 / 39916800.0))
        s = tl.fma(s, r2, constant(r, 1.0 / 362880.0))
        s = tl.fma(s, r2, constant(r, -1.0 / 5040.0))
        s = tl.fma(s, r2, constant(r, 1.0 / 120.0))
        s = tl.fma(s, r2, constant(r, -1.0 / 6.0))
        c = constant(r, 1.0 / 20922789888000.0)
        c = tl.fma(c, r2, constant(r, -1.0 / 87178291200.0))
        c = tl.fma(c, r2, constant(r, 1.0 / 479001600.0))
        c = tl.fma(c, r2, constant(r, -1.0 / 3628800.0))
        c = tl.fma(c, r2, constant(r, 1.0 / 40320.0))
        c = tl.fma(c, r2, constant(r, -1.0 / 720.0))
        c = tl.fma(c, r2, constant(r, 1.0 / 24.0))
    else:
        s = constant(r, -1.9515295891e-4)
        s = tl.fma(s, r2, constant(r, 8.3321608736e-3))
        s = tl.fma(s, r2, constant(r, -1.6666654611e-1))
        c = constant(r, 2.443315711809948e-5)
        c = tl.fma(c, r2, constant(r, -1.388731625493765e-3))
        c = tl.fma(c, r2, constant(r, 4.166664568298827e-2))
    s = tl.fma(s * r2, r, r)
    c = tl.fma(c * r2, r2, -0.5 * r2) + 1.0
    swap = (q & 1) != 0
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    return tl.where(((q + 1) & 2) != 0, -cosine, cosine), tl.where((q & 2) != 0, -sine, sine)


@triton.jit
def box_muller(a, b, DOUBLE: tl.constexpr):
    """Two words to two normals, in float32 or float64 from the same float32 uniforms."""
    u, v = open_uniform(a), open_uniform(b)
    if DOUBLE:
        radius = tl.sqrt(-2.0 * tl.log(u.to(tl.float64)))
        cosine, sine = cos_sin_turns(v.to(tl.float64), DOUBLE)
    else:
        radius = tl.sqrt(-2.0 * log_positive(u))
        cosine, sine = cos_sin_turns(v, DOUBLE)
    return radius * cosine, radius * sine


@triton.jit
def in_order(x0, x1, x2, x3):
    """Four values for each block, as a flat tile in the order of elements."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def words(seed, stream, first, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Words first .. first + BLOCK - 1 of a stream; ALIGNED where first is a multiple of 4."""
    if ALIGNED:
        w0, w1, w2, w3 = philox(seed, (first >> 2) + tl.arange(0, BLOCK // 4), stream)
        result = in_order(w0, w1, w2, w3)
    else:
        i = first + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = philox(seed, i >> 2, stream)
        result = tl.where((i & 2) == 0, tl.where((i & 1) == 0, w0, w1), tl.where((i & 1) == 0, w2, w3))
    return result


@triton.jit
def normals(seed, stream, first, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, DOUBLE: tl.constexpr):
    """Normals first .. first + BLOCK - 1 of a stream; four from each Philox call where ALIGNED."""
    if ALIGNED:
        w0, w1, w2, w3 = philox(seed, (first >> 2) + tl.arange(0, BLOCK // 4), stream)
        z0, z1 = box_muller(w0, w1, DOUBLE)
        z2, z3 = box_muller(w2, w3, DOUBLE)
        result = in_order(z0, z1, z2, z3)
    else:
        i = first + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = philox(seed, i >> 2, stream)
        pair = (i & 2) == 0
        z0, z1 = box_muller(tl.where(pair, w0, w2), tl.where(pair, w1, w3), DOUBLE)
        result = tl.where((i & 1) == 0, z0, z1)
    return result


@triton.jit
def tile(group, tiles, BLOCK: tl.constexpr, ONE_GROUP: tl.constexpr):
    """This program's group, its first element, and which of its elements exist."""
    program = tl.program_id(0)
    if ONE_GROUP:
        sample = 0
        inner = program.to(tl.int64) * BLOCK
        base = inner
    else:
        sample = program // tiles  # in 32 bits: a 64-bit division is a call
        inner = (program - sample * tiles).to(tl.int64) * BLOCK
        base = sample.to(tl.int64) * group + inner
    return program, sample, base, inner + tl.arange(0, BLOCK) < group


@triton.jit
def number(value, DOUBLE: tl.constexpr):
    """A number of the launcher's `number_argument` in the compute dtype."""
    if DOUBLE:
        result = tl.cast(tl.cast(value, tl.int64), tl.float64, bitcast=True)
    else:
        result = tl.cast(value, tl.float32)
    return result


@triton.jit
def entry(pointer, covered, stride, program, sample, base, inside, BLOCK: tl.constexpr, MODE: tl.constexpr):
    """What elements base .. base + BLOCK - 1 find in a coefficient or mask: one value, or one each.

    An entry covers ``covered`` elements (tiles for BY_TILE, groups for BY_GROUP), entries lie ``stride`` apart.
    """
    if MODE == SHARED:
        result = tl.load(pointer)
    elif MODE == BY_TILE:
        result = tl.load(pointer + (program // covered).to(tl.int64) * stride)
    elif MODE == BY_GROUP:
        result = tl.load(pointer + (sample // covered).to(tl.int64) * stride)
    elif MODE == BY_ELEMENT:
        result = tl.load(pointer + (base + tl.arange(0, BLOCK)) * stride, mask=inside, other=0)
    else:
        # One division for the tile; within it, no more than a comparison or a multiplication an element.
        first = base // covered
        start = base - first * covered
        if MODE == LONG_RUNS:  # covered >= BLOCK: at most one boundary in the tile
            step = (start + tl.arange(0, BLOCK) >= covered).to(tl.int32)
        else:
            # x / covered for x < 2 BLOCK: off by 2^-20 of a quotient below 2 BLOCK / covered, which is less than
            # its distance from an integer, at least 1 / (2 covered).
            x = (start.to(tl.int32) + tl.arange(0, BLOCK)).to(tl.float32)
            step = ((x + 0.5) * (1.0 / tl.cast(covered, tl.float32))).to(tl.int32)
        result = tl.load(pointer + (first + step) * stride, mask=inside, other=0)
    return result


@triton.jit
def add_term(
    total, value, pointer, covered, stride, constant_value, program, sample, base, inside,
    BLOCK: tl.constexpr, MODE: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """total + coefficient * value."""
    if MODE == NUMBER:
        coefficient = number(constant_value, DOUBLE)
    else:
        coefficient = entry(pointer, covered, stride, program, sample, base, inside, BLOCK, MODE)
    return tl.fma(tl.zeros_like(total) + coefficient, value, total)


@triton.jit
def operand(
    pointer, stream, offset, store, base, inside,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr, NOISE: tl.constexpr, ALIGNED: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """An operand's tile: loaded, or drawn, rounded to the data's dtype and stored."""
    i = base + tl.arange(0, BLOCK)
    if NOISE:
        drawn = normals(tl.load(pointer), stream, offset + base, BLOCK, ALIGNED, DTYPE == tl.float64)  # noqa: SIM300
        value = rounded(drawn, DTYPE)
        if STORED:
            tl.store(store + i, value, mask=inside)
    else:
        value = tl.load(pointer + i, mask=inside, other=0.0)
    return value


@triton.jit
def ordered_sum(partials, sample, tiles, SUM_BLOCK: tl.constexpr):
    """The sum of a group's partial sums, in a fixed order."""
    total = tl.zeros((SUM_BLOCK,), partials.dtype.element_ty)
    for start in range(0, tiles, SUM_BLOCK):
        j = start + tl.arange(0, SUM_BLOCK)
        total += tl.load(partials + sample * tiles + j, mask=j < tiles, other=0.0)
    return tl.sum(total, axis=0)


class Plan(NamedTuple):
    """How a launch cuts its elements into tiles: ``groups`` equal groups of ``group`` elements, ``tiles`` to each."""

    elements: int
    groups: int
    group: int
    block: int
    tiles: int

    @property
    def sum_block(self) -> int:
        return SUM_SHORT if self.tiles <= SUM_SHORT else SUM_LONG

    @property
    def sum_warps(self) -> int:
        return WARPS if self.tiles <= SUM_SHORT else SUM_LONG_WARPS


def plan(elements: int, groups: int) -> Plan:
    group = elements // groups
    block = min(BLOCK, max(16, triton.next_power_of_2(group)))
    return Plan(elements, groups, group, block, triton.cdiv(group, block))


class Terms(NamedTuple):
    """Operands as kernels take them: tuples, one entry an operand; what is constexpr after what is not."""

    pointers: tuple[Tensor, ...]
    streams: tuple[int, ...]
    offsets: tuple[int, ...]
    stores: tuple[Tensor, ...]
    noise: tuple[bool, ...]
    aligned: tuple[bool, ...]
    stored: tuple[bool, ...]


def terms(
    operands: Sequence[Tensor],
    streams: Sequence[int],
    offsets: Sequence[int],
    stores: Sequence[Tensor | None],
    tiling: Plan,
) -> Terms:
    bases_aligned = tiling.groups == 1 or tiling.group % 4 == 0
    return Terms(
        tuple(operands),
        tuple(max(s, 0) for s in streams),
        tuple(offsets),
        tuple(operands[0] if z is None else z for z in stores),
        tuple(s != TENSOR for s in streams),
        tuple(bases_aligned and offset % 4 == 0 for offset in offsets),
        tuple(z is not None for z in stores),
    )


def number_argument(value: float, dtype: torch.dtype) -> float | int:
    """A number for `number`: Triton passes a float as float32, so one that stays float64 travels as its bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0] if dtype == torch.float64 else float(value)


class Table(NamedTuple):
    """Coefficients (or a mask) as kernels take them: tuples, one entry a coefficient."""

    pointers: tuple[Tensor, ...]
    covered: tuple[int, ...]
    strides: tuple[int, ...]
    numbers: tuple[float | int, ...]
    modes: tuple[int, ...]


def _lookup(entries: Tensor, covered: int, stride: int, tiling: Plan) -> tuple[int, int, int]:
    """(mode, what an entry covers in the mode's unit, stride)."""
    if entries.numel() == 1:
        return SHARED.value, 1, 0
    whole_tiles = tiling.groups == 1 or tiling.group % tiling.block == 0  # program p begins at element p * block
    if whole_tiles and covered % tiling.block == 0:
        return BY_TILE.value, covered // tiling.block, stride
    if tiling.groups > 1 and covered % tiling.group == 0:
        return BY_GROUP.value, covered // tiling.group, stride
    if covered == 1:
        return BY_ELEMENT.value, 1, stride
    return (LONG_RUNS if covered >= tiling.block else SHORT_RUNS).value, covered, stride


def table(
    entries: Sequence[Tensor | None], values: Sequence[float], like: Tensor, dtype: torch.dtype, tiling: Plan
) -> Table:
    """Coefficients of leading shape, or the numbers that stand where there is none; ``like`` is any tensor."""
    spaced = evenly_spaced(entries)
    found = [
        (NUMBER.value, 1, 0) if c is None else _lookup(c, covered, stride, tiling)
        for c, (_, covered, stride, _) in zip(spaced, lookups(spaced, values, tiling.elements, 1), strict=True)
    ]
    return Table(
        tuple(like if c is None else c for c in spaced),
        tuple(covered for _, covered, _ in found),
        tuple(stride for _, _, stride in found),
        tuple(number_argument(v, dtype) for v in values),
        tuple(mode for mode, _, _ in found),
    )


def device_of(tensor: Tensor) -> Any:
    """Triton launches on the current device; kernels belong on the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
