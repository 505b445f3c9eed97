"""Cases of `interpolate`: read by tests, benchmarks and docs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...testing import BENCH_SHAPES, Case, Inputs, fresh_noise, generator, random_tensor
from .op import interpolate


def _call(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    return tuple(value for value in interpolate(**inputs, impl=impl) if isinstance(value, Tensor))


def _times(kind: str, shape: tuple[int, ...], dtype: torch.dtype, rng: torch.Generator) -> Any:
    """A number, or times in [0, 1] per row or token, both ends among them."""
    if kind == "number":
        return 0.3
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    t = random_tensor(shape[: 1 if kind == "row" else 2], dtype, rng, uniform=True)
    if t.numel() > 2:
        t.view(-1)[0], t.view(-1)[1] = 0.0, 1.0
    return t


def _make(
    shape: tuple[int, ...],
    kind: str,
    x_0: str,
    z: str,
    layouts: tuple[str, ...],
    seeded: bool,
    options: dict[str, Any],
) -> Callable[[torch.dtype, torch.device, int], Inputs]:
    def operand(what: str, position: int, dtype: torch.dtype, rng: torch.Generator, inputs: Inputs, seed: int) -> Any:
        if what == "noise":
            return fresh_noise(rng.device, seed + position, stream=position, row_offset=3)
        if what == "drawn":
            if seeded:
                inputs["generator"] = generator(rng.device, seed + 7)
            return None
        return random_tensor(shape, dtype, rng, layouts[position % len(layouts)])

    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        rng = generator(device, seed)
        t = _times(kind, shape, dtype, rng)
        inputs: Inputs = {"x_1": random_tensor(shape, dtype, rng, layouts[0]), **options}
        inputs |= {"alpha": t, "sigma": 1 - t, "x_0": operand(x_0, 1, dtype, rng, inputs, seed)}
        if z:
            inputs |= {"gamma": (t * (1 - t)) ** 0.5, "z": operand(z, 2, dtype, rng, inputs, seed)}
        return inputs

    return make


def _case(
    name: str,
    shape: tuple[int, ...],
    kind: str = "row",
    x_0: str = "given",
    z: str = "",
    *,
    layouts: tuple[str, ...] = ("contiguous",),
    variant: str = "",
    tag: str = "test",
    **options: Any,
) -> Case:
    """``x_0`` and ``z``: "given", "noise" (as fm.Noise) or "drawn"; z may be "" for no such term."""
    sources = [x_0, *([z] if z else [])]
    given = sources.count("given")
    drawn = len(sources) - given
    return Case(
        name=name,
        shape=shape,
        make=_make(shape, kind, x_0, z, layouts, tag == "test", options),
        call=_call,
        tensors_moved=2 + given + (drawn if options.get("store_noise") else 0),
        flops_per_element=2 * (1 + len(sources)) + 25 * drawn,
        noise=drawn > 0,
        variant=variant,
        tags=frozenset({tag}),
    )


CASES: tuple[Case, ...] = (
    _case("one_element", (1,)),
    _case("one_element_drawn", (1,), x_0="drawn"),
    _case("zero_dim", (), "number"),
    _case("empty_rows", (0, 5)),
    _case("empty_rows_drawn", (0, 5), x_0="drawn", store_noise=True),
    _case("empty_inner", (4, 0)),
    _case("odd", (7, 13)),
    _case("pairs", (257, 2)),
    _case("pairs_drawn", (257, 2), x_0="drawn"),
    _case("number", (7, 13), "number"),
    _case("tokens", (4, 6, 10), "token"),
    _case("tokens_drawn", (4, 6, 7), "token", x_0="drawn"),
    _case("long_rows", (3, 9001)),
    _case("long_rows_drawn", (3, 9001), x_0="drawn"),
    _case("noise", (5, 27), x_0="noise"),
    _case("noise_stored", (5, 27), x_0="noise", store_noise=True),
    _case("drawn", (5, 3, 9), x_0="drawn"),
    _case("drawn_stored", (5, 3, 9), x_0="drawn", store_noise=True),
    _case("drawn_row_offset", (5, 9), x_0="drawn", row_offset=11),
    _case("drawn_stored_row_offset", (5, 9), x_0="drawn", store_noise=True, row_offset=11),
    *(
        _case(f"gamma-{x_0}-{z}-{'stored' if store else 'kept'}", (6, 15), "row", x_0, z, store_noise=store)
        for x_0 in ("given", "drawn")
        for z in ("given", "drawn", "noise")
        for store in (False, True)
    ),
    _case("gamma_tokens", (3, 5, 7), "token", z="drawn"),
    *(
        _case(f"{layout}-{kind}-{x_0}", (4, 5, 3, 6), kind, x_0, layouts=(layout,))
        for layout in ("strided", "transposed", "channels_last", "unaligned", "expanded")
        for kind in ("row", "token")
        for x_0 in ("given", "drawn")
    ),
    _case("channels_last_stored", (4, 5, 3, 6), x_0="drawn", layouts=("channels_last",), store_noise=True),
    _case("mixed_layouts", (4, 5, 3, 6), layouts=("channels_last", "contiguous")),
    *(
        _case(f"bench-{'x'.join(map(str, shape))}-{x_0}", shape, x_0=x_0, variant=f"x_0 {x_0}", tag="bench")
        for shape in BENCH_SHAPES
        for x_0 in ("given", "drawn")
    ),
)
