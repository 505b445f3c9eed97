"""Counter-based noise: seeds, noise that is not stored, and Philox in plain PyTorch.

Element i of a stream is word i % 4 of the Philox4x32-10 block i / 4 with key = seed and counter = (block, stream)
(Salmon et al. 2011). Words, and so everything made from them, depend on (seed, stream, i) alone: not on the
implementation, the device, the tiling, or the dtype. Normals come from Box-Muller; they are computed in float32
(float64 for float64 data) from the same float32 uniforms and then rounded to the data's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from . import _torch
from ._checks import check_device, check_generator, check_int, check_same_device, check_tensor, type_error, value_error

MASK = 0xFFFFFFFF
MAX_STREAM = 2**63 - 1
MAX_ELEMENTS = 2**62  # of a stream: half of what an index holds, so that no kernel's arithmetic overflows


def draw_seed(device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed: a 0-dim int64 tensor on the device (torch's default one if None), drawn from torch's generator.

    Nothing waits for the device; ``torch.manual_seed`` rules all noise, and a captured CUDA graph draws a new seed at
    each replay.
    """
    if generator is not None and torch.compiler.is_compiling():
        number = _torch.remember_generator(generator)
        return torch.ops.fmkernels.draw_seed(number, generator.device if device is None else device)
    if generator is not None:
        check_generator("generator", generator, device)
    if device is not None and not isinstance(device, torch.device):
        device = check_device("device", device)
    return torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=device)


def as_seed(seed: Tensor | int | None, device: torch.device | None, generator: torch.Generator | None = None) -> Tensor:
    """The seed as a one-element int64 tensor: given as such (its device rules where none is), as an int, or drawn."""
    if seed is None:
        return draw_seed(device, generator)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise type_error("generator", "a torch.Generator", generator)
        raise ValueError("seed, generator: expected at most one of them, got both")
    if isinstance(seed, Tensor):
        check_tensor("seed", seed)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise value_error("seed", "an int64 tensor with one element", seed)
        if device is not None and (seed.device.type != device.type or device.index not in (None, seed.device.index)):
            raise value_error("seed", f"a tensor on {device}", seed)
        return seed
    check_int("seed", seed, high=None)
    if not -(2**63) <= seed < 2**64:
        raise value_error("seed", "an int that fits into 64 bits", seed)
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


@final
class Noise:
    """Standard normal noise that is not stored: drawn inside each kernel that reads it, the same at every read.

    Stands for a tensor of the data's shape whose element i is the normal number ``row_offset * row + i`` of
    ``stream`` under ``seed``, ``row`` being the number of elements of a sample (an index of the first dimension).

    Args:
        seed: int64 tensor with one element on the data's device (see :func:`draw_seed`). Its value now counts: a copy
            is kept, on the device, so that what becomes of the tensor later changes no noise.
        stream: int from 0 to 2^63 - 1; streams of one seed are independent.
        row_offset: int >= 0; the index of the first sample in the whole batch, so that the shards of a batch draw
            together what the whole batch would.
    """

    __slots__ = ("row_offset", "seed", "stream")

    def __init__(self, seed: Tensor, stream: int = 0, row_offset: int = 0) -> None:
        check_tensor("seed", seed)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise value_error("seed", "an int64 tensor with one element", seed)
        with torch.inference_mode(False):  # a training step may use what was made in inference mode
            seed = seed.detach().clone()
        self._set(seed, stream, row_offset)

    def _set(self, seed: Tensor, stream: int, row_offset: int) -> None:
        check_int("stream", stream, low=0, high=MAX_STREAM)
        check_int("row_offset", row_offset, low=0, high=MAX_ELEMENTS)
        self.seed, self.stream, self.row_offset = seed, stream, row_offset

    @classmethod
    def _of(cls, seed: Tensor, stream: int, row_offset: int) -> Noise:
        """Noise of a seed that nobody else writes to."""
        noise = cls.__new__(cls)
        noise._set(seed, stream, row_offset)
        return noise

    def __repr__(self) -> str:
        return f"Noise(seed={self.seed!r}, stream={self.stream}, row_offset={self.row_offset})"

    def offset(self, data: Tensor) -> int:
        """The index of the first element within the stream for data of this shape."""
        return first_element(self.row_offset, data.shape)


def first_element(row_offset: int, shape: Sequence[int]) -> int:
    """The index within a stream of the first element of data of this shape, whose first row is ``row_offset``."""
    offset = row_offset * math.prod(shape[1:])
    if row_offset and not torch.compiler.is_compiling() and offset + math.prod(shape) > MAX_ELEMENTS:
        rows = f"one with which rows of shape {tuple(shape[1:])} end before element 2^62 of the stream"
        raise value_error("row_offset", rows, row_offset)
    return offset


def check_noise(name: str, noise: Any, data_name: str, data: Tensor) -> None:
    if not isinstance(noise, Noise):
        raise type_error(name, "a tensor or fm.Noise", noise)
    if not torch.compiler.is_compiling() and min(noise.stream, noise.row_offset) < 0:
        raise value_error(name, "noise with a stream and a row_offset >= 0", noise)
    if noise.seed.dtype is not torch.int64 or noise.seed.numel() != 1:
        raise value_error(f"{name}.seed", "an int64 tensor with one element", noise.seed)
    check_same_device(f"{name}.seed", noise.seed, data_name, data)


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    product = b * a  # wraps in int64; the low 64 bits are those of the unsigned product
    return (product >> 32) & MASK, product & MASK


def philox_words(seed: Tensor, stream: int, offset: int, count: int) -> Tensor:
    """Words offset .. offset + count - 1 of a stream, as int64 in [0, 2^32), in plain PyTorch."""
    first, last = offset // 4, (offset + count + 3) // 4
    block = torch.arange(first, last, dtype=torch.int64, device=seed.device)
    key = seed.reshape(())
    k0, k1 = key & MASK, (key >> 32) & MASK
    c0, c1 = block & MASK, (block >> 32) & MASK
    c2 = torch.full_like(block, stream & MASK)
    c3 = torch.full_like(block, (stream >> 32) & MASK)
    for _ in range(10):
        h0, l0 = _mulhilo(0xD2511F53, c0)
        h1, l1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    words = torch.stack((c0, c1, c2, c3), dim=-1).reshape(-1)
    return words.narrow(0, offset - 4 * first, count)


def normals(seed: Tensor, stream: int, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """Normals offset .. offset + count - 1 of a stream, in plain PyTorch: float64 Box-Muller, rounded to dtype.

    float16 and bfloat16 are rounded from the float32 value, as the kernels do.
    """
    lead = offset % 4  # Box-Muller takes words in pairs: start at a block, drop what comes before
    words = philox_words(seed, stream, offset - lead, (lead + count + 3) // 4 * 4)
    uniform = words.to(torch.float32) * 2.0**-32 + 2.0**-33
    a, b = uniform.to(torch.float64).reshape(-1, 2).unbind(-1)
    radius, angle = torch.sqrt(-2.0 * torch.log(a)), (2.0 * math.pi) * b
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).reshape(-1)
    z = z.narrow(0, lead, count)
    return z if dtype == torch.float64 else z.to(torch.float32).to(dtype)


# Of the 32 random bits, how many make a uniform: no more than the significand holds, so that 1 is never reached.
_UNIFORM_BITS = {torch.float64: 32, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def uniforms(seed: Tensor, stream: int, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """Uniforms offset .. offset + count - 1 of a stream in [0, 1), in plain PyTorch."""
    bits = _UNIFORM_BITS[dtype]
    words = philox_words(seed, stream, offset, count) >> (32 - bits)
    return (words.to(torch.float64) * 2.0**-bits).to(dtype)


def noise_like(noise: Noise, data: Tensor) -> Tensor:
    """The noise as a tensor of data's shape and dtype, in plain PyTorch (the oracle of every kernel)."""
    return normals(noise.seed, noise.stream, noise.offset(data), data.numel(), data.dtype).reshape(data.shape)
