"""Cases of `regression_loss`: read by tests, benchmarks and docs. Each gives the loss and the gradient of
pred."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...testing import BENCH_SHAPES, Case, Inputs, fresh_noise, generator, random_tensor
from .kinds import KINDS
from .op import REDUCTIONS, regression_loss

MASKS = ("", "sample", "token", "element")
WEIGHTS = ("", "number", "sample", "token")
_KEPT = {"sample": 1, "token": 2}


def _call(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    """The loss, and the gradient for a grad_output that is 1 for the means, another number for "sum", a ramp for
    "none"."""
    pred = inputs["pred"].detach().requires_grad_()
    loss = regression_loss(**{**inputs, "pred": pred}, impl=impl)
    factor = {"mean": 1.0, "weighted_mean": 1.0, "sum": 0.75}.get(inputs.get("reduction", "mean"))
    if factor is None:
        ramp = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64, device=loss.device)
        grad_output = ramp.to(loss.dtype)
    else:
        grad_output = torch.full_like(loss, factor)
    (grad,) = torch.autograd.grad(loss, pred, grad_output)
    return loss.detach(), grad


def _mask(kind: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Boolean, about a third masked out; "all_out" masks everything, "sample_out" the whole first sample, "scalar" is
    one True for all."""
    if kind == "scalar":
        return torch.ones((), dtype=torch.bool, device=rng.device)
    if kind in ("all_out", "sample_out"):
        mask = torch.ones(shape, dtype=torch.bool, device=rng.device)
        mask[: 1 if kind == "sample_out" else None] = False
        return mask
    size = shape[: _KEPT.get(kind, len(shape))]
    return torch.rand(size, generator=rng, device=rng.device) > 0.35


def _make(
    shape: tuple[int, ...],
    operands: tuple[str, ...],
    coefs: str,
    mask: str,
    weight: str,
    layouts: tuple[str, ...],
    data_dtype: torch.dtype | None,
    masked_nan: bool,
    options: dict[str, Any],
) -> Callable[[torch.dtype, torch.device, int], Inputs]:
    def make(dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        rng = generator(device, seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        pred = random_tensor(shape, dtype, rng, layouts[0])
        given: list[Any] = []
        for i, operand in enumerate(operands):
            if operand == "noise":
                given.append(fresh_noise(device, seed + 1, stream=i, row_offset=2))
            else:
                given.append(random_tensor(shape, data_dtype or dtype, rng, layouts[(i + 1) % len(layouts)]))
        inputs: Inputs = {"pred": pred, "operands": given}
        inputs |= {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
        if coefs == "number":
            inputs["coefficients"] = [1.0, -1.0, 0.5][: len(given)]
        else:
            base, _, table = coefs.partition("_")
            lead = shape[: _KEPT[base]]
            drawn = random_tensor((*lead, len(given)), wide, rng)
            inputs["coefficients"] = drawn if table else list(drawn.unbind(-1))
        if mask:
            inputs["mask"] = _mask(mask, shape, rng)
        if weight:
            inputs["weight"] = (
                0.7 if weight == "number" else random_tensor(shape[: _KEPT[weight]], wide, rng, uniform=True) + 0.5
            )
        if masked_nan:
            out = ~inputs["mask"].reshape(inputs["mask"].shape + (1,) * (len(shape) - inputs["mask"].dim()))
            inputs["pred"] = pred.masked_fill(out, float("nan"))
            inputs["operands"] = [given[0].masked_fill(out, float("inf")), *given[1:]]
        return inputs

    return make


def _case(
    name: str,
    shape: tuple[int, ...],
    operands: tuple[str, ...] = ("given", "given"),
    coefs: str = "number",
    *,
    mask: str = "",
    weight: str = "",
    layouts: tuple[str, ...] = ("contiguous",),
    data_dtype: torch.dtype | None = None,
    masked_nan: bool = False,
    variant: str = "",
    tag: str = "test",
    **options: Any,
) -> Case:
    """``operands``: "given" or "noise" for each; ``coefs``: "number", "sample", "token" or a "..._table"."""
    drawn = operands.count("noise")
    return Case(
        name=name,
        shape=shape,
        make=_make(shape, operands, coefs, mask, weight, layouts, data_dtype, masked_nan, options),
        call=_call,
        tensors_moved=2 + len(operands) - drawn,
        flops_per_element=2 * len(operands) + 5 + 25 * drawn,
        noise=drawn > 0 and options.get("noise_dtype", True),
        variant=variant,
        tags=frozenset({tag}),
    )


def _options() -> list[Case]:
    """Every penalty, reduction, mask and weight together, on small tokens."""
    return [
        _case(
            f"{kind}-{reduction}-mask_{mask or 'none'}-weight_{weight or 'none'}",
            (5, 4, 7),
            mask=mask,
            weight=weight,
            kind=kind,
            reduction=reduction,
            delta=0.7,
        )
        for kind, reduction, mask, weight in itertools.product(KINDS, REDUCTIONS, MASKS, WEIGHTS)
        if reduction != "weighted_mean" or kind == "squared"  # it differs from "mean" in the divisor alone
    ]


CASES: tuple[Case, ...] = (
    *_options(),
    _case("one_element", (1,)),
    _case("zero_dim", ()),
    *(_case(f"empty_rows-{reduction}", (0, 5), reduction=reduction) for reduction in REDUCTIONS),
    *(_case(f"empty_inner-{reduction}", (4, 0), reduction=reduction) for reduction in REDUCTIONS),
    _case("odd", (7, 13), coefs="sample"),
    _case("pairs", (257, 2), coefs="sample"),
    _case("pairs_none", (257, 2), coefs="sample", reduction="none"),
    _case("many_short_rows", (5003, 3), coefs="sample", weight="sample"),
    _case("long_rows", (3, 9001), coefs="sample", weight="sample"),
    _case("long_rows_none", (3, 70001), reduction="none"),
    _case("one_operand", (6, 11), ("given",)),
    _case("three_operands", (6, 11), ("given", "given", "given"), "sample"),
    _case("table", (6, 11), coefs="sample_table"),
    _case("token_coefficients", (4, 6, 10), coefs="token", weight="token", mask="token"),
    _case("token_table", (4, 6, 7), coefs="token_table", mask="element", reduction="none"),
    *(
        _case(
            f"{layout}-{coefs}-{mask or 'none'}",
            (4, 5, 3, 6),
            coefs=coefs,
            mask=mask,
            layouts=(layout,),
            weight="sample",
        )
        for layout in ("strided", "transposed", "channels_last", "unaligned", "expanded")
        for coefs in ("sample", "token")
        for mask in ("", "token", "element")
    ),
    _case("mixed_layouts", (4, 5, 3, 6), coefs="sample", layouts=("channels_last", "contiguous", "strided")),
    *(_case(f"scalar_mask-{reduction}", (4, 9), mask="scalar", reduction=reduction) for reduction in REDUCTIONS),
    _case("count", (4, 5, 3), mask="token", weight="sample", count=17),
    _case("count_tensor", (4, 5, 3), mask="token", count=torch.tensor([17], device="cpu")),
    _case("all_masked", (4, 9), mask="all_out"),
    _case("all_masked_none", (4, 9), mask="all_out", reduction="none"),
    _case("sample_masked_none", (4, 9), mask="sample_out", reduction="none", weight="sample"),
    *(
        _case(f"masked_nan-{mask}-{reduction}", (4, 5, 6), mask=mask, reduction=reduction, masked_nan=True)
        for mask in ("sample", "token", "element", "all_out")
        for reduction in REDUCTIONS
    ),
    _case("masked_nan_huber", (4, 5, 6), mask="token", kind="huber", weight="token", masked_nan=True),
    _case("noise", (5, 27), ("given", "noise"), "sample"),
    _case("noise_alone", (5, 27), ("noise",), "sample"),
    _case("noise_twice", (5, 3, 7), ("given", "noise", "noise"), "token"),
    _case("noise_masked", (5, 3, 7), ("given", "noise"), mask="token", reduction="none"),
    _case("noise_channels_last", (2, 5, 3, 4), ("given", "noise"), "sample", layouts=("channels_last",)),
    _case("data_float32", (5, 27), coefs="sample", data_dtype=torch.float32),
    _case("data_bfloat16", (5, 27), coefs="sample", data_dtype=torch.bfloat16),
    _case("data_bfloat16_noise", (5, 27), ("given", "noise"), "sample", data_dtype=torch.bfloat16),
    _case("noise_dtype", (5, 27), ("noise",), "sample", noise_dtype=torch.float32),
    *(_case(f"bench-{'x'.join(map(str, shape))}", shape, variant="x_0 given", tag="bench") for shape in BENCH_SHAPES),
    _case("bench-64x1024x64-masked", (64, 1024, 64), mask="token", variant="x_0 given, mask (B, T)", tag="bench"),
)
