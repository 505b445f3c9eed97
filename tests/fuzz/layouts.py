"""Random shapes and layouts: tensors of the same values in every kind of memory that torch has for them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# around the kernels' own limits: vectors, segments of 32, small groups of 256, tiles of 1024
LENGTHS = (1, 1, 2, 3, 5, 7, 8, 16, 31, 32, 33, 64, 100, 255, 256, 257, 1000, 1023, 1024, 1025, 1500)


def shape(rng: random.Random, least: int = 0, most_elements: int = 60_000) -> tuple[int, ...]:
    """Of up to four dimensions, now and then with a dimension of size 0."""
    sizes = [rng.choice(LENGTHS) for _ in range(rng.choice((least, 1, 1, 2, 2, 2, 3, 4)))]
    while True:
        elements = 1
        for size in sizes:
            elements *= size
        if elements <= most_elements:
            break
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[largest] = (sizes[largest] + 1) // 2
    if sizes and rng.random() < 0.05:
        sizes[rng.randrange(len(sizes))] = 0
    return tuple(sizes)


def lay_out(rng: random.Random, x: Tensor) -> Tensor:
    """The same values in other memory: an offset, gaps, another order of dimensions, any stride where the size is 1."""
    kind = rng.choice(("same", "same", "same", "offset", "gaps", "permuted", "channels_last", "broadcast", "size 1"))
    if kind == "offset":
        out = x.new_empty(x.numel() + 3)[rng.randint(1, 3) :][: x.numel()].view(x.shape)
    elif kind == "gaps" and x.dim():
        out = x.new_empty((*x.shape[:-1], 2 * x.shape[-1] + 1))[..., 1::2]
    elif kind == "permuted" and x.dim():
        order = list(range(x.dim()))
        rng.shuffle(order)
        out = x.new_empty([x.shape[i] for i in order]).permute([order.index(i) for i in range(x.dim())])
    elif kind == "channels_last" and x.dim() == 4:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    elif kind == "broadcast" and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)  # other values, the same for all samples
    else:
        out = torch.empty_like(x)
    out = out.copy_(x)
    if kind == "size 1" and 1 in x.shape:
        strides = [rng.randrange(2000) if n == 1 else s for n, s in zip(out.shape, out.stride(), strict=True)]
        out = out.as_strided(out.shape, strides, out.storage_offset())
    return out


def tensor(rng: random.Random, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return lay_out(rng, torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))


def leading(rng: random.Random, size: tuple[int, ...], dtype: torch.dtype) -> Tensor | float:
    """A coefficient: a number, or a tensor whose shape is a leading part of the data's."""
    if rng.random() < 0.3:
        return rng.uniform(-2.0, 2.0)
    kept = size[: rng.choice((0, 1, 1, 1, 2, len(size)))]
    wide = torch.float64 if dtype is torch.float64 else rng.choice((torch.float32, torch.float32, torch.float64))
    return tensor(rng, kept, wide)
