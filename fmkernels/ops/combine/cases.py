"""Cases of `combine`: read by tests, benchmarks and docs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...testing import Case, Inputs, fresh_noise, generator, random_tensor
from .op import combine

BENCH_OPERANDS = (2, 4, 8)
_BENCH_SHAPES = ((256, 2), (256, 4, 32, 32), (256, 16, 64, 64))


def _call(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    result = combine(**inputs, impl=impl)
    return result if isinstance(result, tuple) else (result,)


def _numbers(count: int, rng: torch.Generator) -> list[float]:
    return torch.randn(count, generator=rng, device=rng.device).tolist()


def _coefficients(kind: str, count: int, shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Any:
    """Random coefficients: "number", "row", "token", "element", "mixed" (in turn) or a "..._table".

    "constant" numbers do not depend on the seed, as in a solver's tableau (and torch.compile specialises on
    them).
    """
    if kind == "constant":
        return [1.0, *(0.5 / i for i in range(1, count))]
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    kept = {"scalar": 0, "row": 1, "token": 2, "element": len(shape)}
    base, _, table = kind.partition("_")
    if table:
        return random_tensor((*shape[: kept[base]], count), dtype, rng)
    if kind == "number":
        return _numbers(count, rng)
    cycle = ["number", "row", "scalar"] if kind == "mixed" else [kind]
    kinds = [cycle[i % len(cycle)] for i in range(count)]
    return [_numbers(1, rng)[0] if k == "number" else random_tensor(shape[: kept[k]], dtype, rng) for k in kinds]


def _make(
    shape: tuple[int, ...],
    count: int,
    kind: str,
    layouts: tuple[str, ...],
    noise: int | None,
    errors: str | None,
    out: str | None,
    options: dict[str, Any],
) -> Callable[[torch.dtype, torch.device, int], Inputs]:
    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        rng = generator(device, seed)
        operands: list[Any] = [random_tensor(shape, dtype, rng, layouts[i % len(layouts)]) for i in range(count)]
        if noise is not None:
            operands.append(fresh_noise(device, seed + 1, stream=2, row_offset=noise))
        inputs: Inputs = {"operands": operands, **options}
        inputs["coefficients"] = _coefficients(kind, len(operands), shape, dtype, rng)
        if errors is not None:
            inputs["error_coefficients"] = _coefficients(errors, len(operands), shape, dtype, rng)
        if out is not None:
            inputs["out"] = operands[0] if out == "in_place" else random_tensor(shape, dtype, rng, layouts[0])
        return inputs

    return make


def _case(
    name: str,
    shape: tuple[int, ...],
    count: int,
    kind: str = "number",
    *,
    layouts: tuple[str, ...] = ("contiguous",),
    noise: int | None = None,
    errors: str | None = None,
    out: str | None = None,
    variant: str = "",
    tag: str = "test",
    **options: Any,
) -> Case:
    return Case(
        name=name,
        shape=shape,
        make=_make(shape, count, kind, layouts, noise, errors, out, options),
        call=_call,
        tensors_moved=count + 1,
        flops_per_element=2 * count + (0 if noise is None else 25) + (8 if options else 0),
        noise=noise is not None,
        variant=variant,
        tags=frozenset({tag}),
    )


CASES: tuple[Case, ...] = (
    *(_case(f"operands_{count}", (3, 35), count, "mixed") for count in range(1, 17)),
    _case("zero_dim", (), 2),
    _case("one_element", (1,), 3),
    _case("empty_rows", (0, 5), 2, "row"),
    _case("empty_inner", (4, 0, 3), 2, "row"),
    _case("odd", (7, 13), 3, "row"),
    _case("pairs", (257, 2), 2, "row"),
    _case("many_short_rows", (5003, 3), 3, "row"),
    _case("long_rows", (3, 9001), 3, "row"),
    _case("tokens", (4, 6, 10), 3, "token"),
    _case("elements", (5, 7), 2, "element"),
    _case("scalar_table", (3, 9), 4, "scalar_table"),
    _case("row_table", (6, 33), 4, "row_table"),
    _case("token_table", (3, 5, 17), 3, "token_table"),
    *(
        _case(f"{layout}-{kind}", (4, 5, 3, 6), 2, kind, layouts=(layout,))
        for layout in ("strided", "transposed", "channels_last", "unaligned", "expanded")
        for kind in ("number", "row", "token")
    ),
    _case("mixed_layouts", (4, 5, 3, 6), 4, "row", layouts=("channels_last", "contiguous", "strided")),
    _case("noise", (5, 27), 2, "row", noise=0),
    _case("noise_row_offset", (3, 7), 1, "number", noise=5),
    _case("noise_tokens", (3, 5, 7), 2, "token", noise=0),
    _case("noise_channels_last", (2, 5, 3, 4), 1, "row", noise=0, layouts=("channels_last",)),
    _case("sixteen_and_noise", (3, 11), 16, "number", noise=0),
    _case("norm_atol", (5, 33), 3, "row", atol=0.1),
    _case("norm_rtol", (5, 33), 2, rtol=0.5),
    _case("norm_error", (5, 33), 4, "number", errors="number", atol=1e-2, rtol=1e-2),
    _case("norm_error_rows", (5, 3, 7), 3, "row", errors="row_table", atol=1e-2, rtol=1e-2),
    _case("norm_long", (2, 70001), 2, "row", errors="number", atol=1e-2, rtol=1e-2),
    _case("norm_empty", (0, 4), 2, atol=0.1),
    _case("norm_noise", (4, 9), 2, "number", noise=0, atol=0.1),
    _case("norm_channels_last", (2, 5, 3, 4), 2, "row", layouts=("channels_last",), atol=0.1),
    _case("out", (5, 13), 3, "row", out="other"),
    _case("out_strided", (5, 13), 2, "row", out="other", layouts=("strided",)),
    _case("in_place", (5, 13), 3, "row", out="in_place"),
    _case("in_place_table", (5, 13), 3, "row_table", out="in_place"),
    _case("in_place_strided", (5, 13), 2, "row", out="in_place", layouts=("strided",)),
    _case("in_place_noise", (5, 13), 1, "row", noise=0, out="in_place"),
    _case("in_place_norm", (5, 13), 3, "number", errors="number", out="in_place", atol=1e-2, rtol=1e-2),
    *(
        _case(
            f"bench-{'x'.join(map(str, shape))}-k{count}",
            shape,
            count,
            "constant",
            variant=f"K={count}",
            tag="bench",
        )
        for shape in _BENCH_SHAPES
        for count in BENCH_OPERANDS
    ),
)
