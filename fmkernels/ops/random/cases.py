"""Cases of `randn`, `rand` and `random_words`: read by tests, benchmarks and docs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...testing import Case, Inputs
from .op import rand, randn, random_words

_FUNCTIONS = {"randn": randn, "rand": rand, "words": random_words}
_BENCH_SHAPES = ((256, 2), (256, 3, 32, 32), (256, 16, 64, 64))


def _call(kind: str) -> Callable[[Inputs, str], tuple[Tensor, ...]]:
    def call(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
        options = {name: value for name, value in inputs.items() if name != "size"}
        if kind == "words":  # always int64
            del options["dtype"]
        return (_FUNCTIONS[kind](inputs["size"], **options, impl=impl),)

    return call


def _make(
    size: tuple[int, ...], seed_offset: int, options: dict[str, Any]
) -> Callable[[torch.dtype, torch.device, int], Inputs]:
    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        key = torch.tensor(seed + seed_offset, dtype=torch.int64, device=device)
        return {"size": size, "seed": key, "dtype": dtype, **options}

    return make


def _case(
    kind: str,
    name: str,
    size: tuple[int, ...],
    *,
    seed_offset: int = 0,
    variant: str = "",
    tag: str = "test",
    **options: Any,
) -> Case:
    return Case(
        name=f"{kind}-{name}",
        shape=size,
        make=_make(size, seed_offset, options),
        call=_call(kind),
        tensors_moved=1,
        flops_per_element=25 if kind == "randn" else 15,
        noise=kind == "randn",
        variant=variant,
        tags=frozenset({tag}),
    )


CASES: tuple[Case, ...] = (
    *(
        case
        for kind in _FUNCTIONS
        for case in (
            _case(kind, "zero_dim", ()),
            _case(kind, "empty", (0, 4)),
            *(_case(kind, f"count_{count}", (count,)) for count in (1, 2, 3, 4, 5, 7, 8, 33, 4099)),
            _case(kind, "odd", (3, 7, 5)),
            _case(kind, "large", (70001,)),
            _case(kind, "stream", (3, 7), stream=5),
            _case(kind, "stream_over_32_bits", (3, 7), stream=2**40 + 1),
            *(_case(kind, f"row_offset_{offset}", (4, 7), row_offset=offset) for offset in (1, 2, 3, 4)),
            _case(kind, "offset_over_32_bits", (5, 4), row_offset=2**33 + 1),
            _case(kind, "seed_negative", (3, 7), seed_offset=-(2**62)),
            _case(kind, "seed_over_32_bits", (3, 7), seed_offset=2**45 + 3),
        )
    ),
    *(_case("randn", f"bench-{'x'.join(map(str, size))}", size, tag="bench") for size in _BENCH_SHAPES),
)
