"""randn, rand and the raw words of the Philox streams that every kernel's noise comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _dispatch
from ..._checks import FLOATING, as_length, check_device, check_int, value_error
from ..._torch import remembered_generator
from ...random import MAX_ELEMENTS, MAX_STREAM, as_seed, draw_seed, first_element
from ..library import LIBRARY
from . import kinds, reference

LIBRARY.define(
    "random(SymInt[] size, Tensor seed, int kind, SymInt stream, SymInt offset, ScalarType dtype, str impl) -> Tensor"
)


def _random(size: Sequence[int], seed: Tensor, *args: Any) -> Tensor:
    *rest, impl = args
    return _dispatch.implementation("random", seed.device.type, impl).run(size, seed, *rest)


def _random_fake(
    size: Sequence[int], seed: Tensor, kind: int, stream: int, offset: int, dtype: Any, impl: str
) -> Tensor:
    return seed.new_empty(size, dtype=dtype)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("random", _random, _key)
torch.library.register_fake("fmkernels::random", _random_fake, lib=LIBRARY)

# random, so that two of one graph are two, and none is computed again for the backward pass
LIBRARY.define("draw_seed(int handle, Device device) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
LIBRARY.impl(
    "draw_seed", lambda handle, device: draw_seed(device, remembered_generator(handle)), "CompositeExplicitAutograd"
)
torch.library.register_fake(
    "fmkernels::draw_seed",
    lambda handle, device: torch.empty((), dtype=torch.int64, device=device),
    lib=LIBRARY,
)


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    shape = tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else size
    shape = tuple([as_length("size", length) for length in shape])
    for length in shape:
        if length < 0:
            raise value_error("size", "lengths >= 0", shape)
    if not torch.compiler.is_compiling() and math.prod(max(length, 1) for length in shape) > MAX_ELEMENTS:
        raise value_error("size", "at most 2^62 elements", shape)
    return shape


def _draw(
    size: tuple[Any, ...],
    kind: int,
    seed: Tensor | int | None,
    generator: torch.Generator | None,
    stream: int,
    row_offset: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    impl: str,
) -> Tensor:
    shape = _shape(size)
    if kind != kinds.WORDS:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
            raise value_error("dtype", f"one of {', '.join(map(str, FLOATING))}", dtype)
    check_int("stream", stream, low=0, high=MAX_STREAM)
    check_int("row_offset", row_offset, low=0)
    seed = as_seed(seed, None if device is None else check_device("device", device), generator)
    return draw(shape, kind, seed, stream, row_offset, torch.int64 if dtype is None else dtype, impl)


def draw(
    shape: Sequence[int], kind: int, seed: Tensor, stream: int, row_offset: int, dtype: torch.dtype, impl: str = "auto"
) -> Tensor:
    """randn, rand or random_words on checked arguments."""
    offset = first_element(row_offset, shape) if row_offset else 0
    if (library := _dispatch.plain_library(impl)) is not None:
        drawn = library.random_plain(shape, seed, kind, stream, offset, dtype)
        if drawn is not None:
            return drawn
    args = (shape, seed, kind, stream, offset, dtype)
    impl = _dispatch.wanted(impl)
    if impl == "reference":
        return reference.run(*args)
    return (_random if _dispatch.plain(seed) else torch.ops.fmkernels.random)(*args, impl)


def randn(
    *size: int | Sequence[int],
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
    stream: int = 0,
    row_offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Standard normal numbers from a Philox stream, the noise that the fused kernels draw.

    Element i comes from word pair i / 2 of the stream by Box-Muller:
    :math:`z = \sqrt{-2 \ln u_a} (\cos 2\pi u_b, \sin 2\pi u_b)`, u = (word + 1/2) / 2^32 in float32, |z| <= 6.77.
    All implementations and dtypes agree to 2e-6 before rounding to ``dtype``.

    Args:
        size: the shape, as ints or one sequence.
        seed: int64 tensor with one element, or an int; None draws one from ``generator`` (torch's default one).
        generator: torch.Generator on ``device``; excludes ``seed``.
        stream: int >= 0; streams of one seed are independent.
        row_offset: int >= 0: the first row of the result is row ``row_offset`` of the stream's rows.
        dtype: float32, bfloat16, float16 or float64; torch's default dtype if None.
        device: the seed's device, or torch's default device, if None.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        A contiguous tensor.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """
    return _draw(size, kinds.NORMAL, seed, generator, stream, row_offset, dtype, device, impl)


def rand(
    *size: int | Sequence[int],
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
    stream: int = 0,
    row_offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Uniform numbers in [0, 1) from a Philox stream: the top 24 bits of a word for float32 (32 for float64, 11 for
    float16, 8 for bfloat16), divided exactly, so that 1 never comes. Arguments as in :func:`randn`.

    Bit-exact in every implementation.
    """
    return _draw(size, kinds.UNIFORM, seed, generator, stream, row_offset, dtype, device, impl)


def random_words(
    *size: int | Sequence[int],
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
    stream: int = 0,
    row_offset: int = 0,
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> Tensor:
    """The 32-bit words of a Philox4x32-10 stream as int64 in [0, 2^32): element i is word i % 4 of block i / 4, the
    block with key = seed and counter = (i / 4, stream) (Salmon et al. 2011). Arguments as in :func:`randn`.

    Bit-exact in every implementation.
    """
    return _draw(size, kinds.WORDS, seed, generator, stream, row_offset, None, device, impl)
