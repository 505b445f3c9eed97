"""Cases of `row_dots`: read by tests, benchmarks and docs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...testing import BENCH_SHAPES, Case, Inputs, generator, random_tensor
from .op import row_dots

Pairs = tuple[tuple[int, int], ...]

# What guidance needs of two network outputs: both norms and the inner product.
PROJECTION: Pairs = ((0, 0), (0, 1), (1, 1))


def _call(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    return (row_dots(**inputs, impl=impl),)


def every_pair(count: int) -> Pairs:
    """All pairs of ``count`` tensors and ones, up to the most that a call takes."""
    return tuple((i, j) for i in range(-1, count) for j in range(i, count))[:16]


def _case(
    name: str,
    shape: tuple[int, ...],
    count: int = 2,
    pairs: Pairs = PROJECTION,
    *,
    layouts: tuple[str, ...] = ("contiguous",),
    variant: str = "",
    tag: str = "test",
) -> Case:
    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        rng = generator(device, seed)
        tensors = [random_tensor(shape, dtype, rng, layouts[i % len(layouts)]) for i in range(count)]
        return {"tensors": tensors, "pairs": pairs}

    return Case(
        name=name,
        shape=shape,
        make=make,
        call=_call,
        tensors_moved=count,
        flops_per_element=2 * len(pairs),
        variant=variant,
        tags=frozenset({tag}),
    )


CASES: tuple[Case, ...] = (
    *(_case(f"tensors_{count}", (3, 35), count, every_pair(count)) for count in range(1, 7)),
    *(_case(f"tensors_{count}_long", (2, 5000), count, every_pair(count)) for count in range(1, 7)),
    *(_case(f"inner_{inner}", (257, inner)) for inner in (1, 2, 3, 4, 5, 8, 16, 31, 64, 255)),
    _case("vector", (37,)),
    _case("one_element", (1,)),
    _case("one_row", (1, 70001)),
    _case("empty_rows", (0, 5)),
    _case("empty_inner", (4, 0, 3)),
    _case("sums", (5, 33), 2, ((0, -1), (-1, 1), (-1, -1))),
    _case("repeated", (5, 33), 2, ((0, 1), (1, 0), (0, 1))),
    _case("unused", (5, 33), 3, ((0, 2),)),
    _case("many_short_rows", (5003, 3)),
    _case("tile", (9, 1024)),
    _case("beyond_a_tile", (9, 1025)),
    _case("long_rows", (3, 9001)),
    _case("longest_rows", (2, 70001), 3, ((0, 0), (1, 2), (2, -1))),
    *(
        _case(layout, (4, 5, 3, 6), layouts=(layout,))
        for layout in ("strided", "transposed", "channels_last", "unaligned", "expanded")
    ),
    _case("mixed_layouts", (4, 5, 3, 6), 4, every_pair(4), layouts=("channels_last", "contiguous", "strided")),
    _case("unaligned_long", (3, 4, 1500), layouts=("unaligned", "contiguous")),
    *(
        _case(f"bench-{'x'.join(map(str, shape))}", shape, variant="pairs=3", tag="bench")
        for shape in ((16, 2), *BENCH_SHAPES)
    ),
)
