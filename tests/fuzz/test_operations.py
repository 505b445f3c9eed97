"""Every operation on random shapes, strides, dtypes and offsets: the compiled library against plain PyTorch.

FMKERNELS_FUZZ_ROUNDS sets their number. Under a sanitizer (tools/sanitize.sh) the same calls also show every access
outside the tensors, and everything undefined.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from layouts import DTYPES, leading, shape, tensor
from torch import Tensor

import fmkernels as fm
from fmkernels.ops.step_control.op import Clock, Count, Rules, new_state, step_control

ROUNDS = int(os.environ.get("FMKERNELS_FUZZ_ROUNDS", "40"))
IMPLS = ("auto", "native")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 6e-3}


def operands(rng: random.Random, size: tuple[int, ...], dtype: torch.dtype, most: int) -> list[Any]:
    """Tensors, the first one always, and noise."""
    count = rng.choice((1, 2, 2, 2, 3, 4, 5, most))
    given: list[Any] = [tensor(rng, size, dtype) for _ in range(min(count, most))]
    for i in range(1, len(given)):
        if rng.random() < 0.3:
            seed = torch.tensor(rng.getrandbits(62))
            given[i] = fm.Noise(seed, rng.choice((0, 1, 2**62)), rng.choice((0, 1, 5, 2**30)))
    return given


def close(got: Tensor, want: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """As close as numbers of `dtype` are; `scale`: how large the terms are that both are sums of."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_combine(number: int) -> None:
    rng = random.Random(number)
    size, dtype = shape(rng), rng.choice(DTYPES)
    given = operands(rng, size, dtype, 17)
    coefficients = [leading(rng, size, dtype) for _ in given]
    options: dict[str, Any] = {}
    if size and rng.random() < 0.3:
        options["atol"], options["rtol"] = rng.choice((0.5, 1.0)), rng.choice((0.0, 0.1))
        if rng.random() < 0.7:
            options["error_coefficients"] = [leading(rng, size, dtype) for _ in given]
    want = fm.combine(given, coefficients, **options, impl="reference")
    for impl in IMPLS:
        into: dict[str, Any] = {}
        if rng.random() < 0.3:
            into["out"] = tensor(rng, size, dtype)
            if any(n > 1 and s == 0 for n, s in zip(size, into["out"].stride(), strict=True)):
                del into["out"]  # elements that share memory
        got = fm.combine(given, coefficients, **options, **into, impl=impl)
        pairs = zip(got, want, strict=True) if options else [(got, want)]
        for a, b in pairs:
            close(a, b, dtype, 10.0)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_regression_loss(number: int) -> None:
    rng = random.Random(1000 + number)
    size, pred_dtype = shape(rng), rng.choice(DTYPES)
    dtype = rng.choice((pred_dtype, torch.float32, torch.float64))
    given = operands(rng, size, dtype, 3)
    coefficients = [leading(rng, size, torch.promote_types(dtype, pred_dtype)) for _ in given]
    options: dict[str, Any] = {
        "kind": rng.choice(("squared", "huber", "pseudo_huber", "l1")),
        "delta": rng.choice((0.1, 1.0, 3.0)),
        "reduction": rng.choice(("mean", "sum", "none") if size else ("mean", "sum")),
    }
    if rng.random() < 0.4:
        options["weight"] = leading(rng, size, torch.float64 if torch.float64 in (dtype, pred_dtype) else torch.float32)
    if rng.random() < 0.5:
        kept = size[: rng.choice((0, 1, 2, len(size)))]
        options["mask"] = tensor(rng, kept, torch.float32) > -0.4
    pred = tensor(rng, size, pred_dtype)

    def evaluate(impl: str) -> tuple[Tensor, Tensor]:
        leaf = pred.detach().requires_grad_()
        loss = fm.regression_loss(leaf, given, coefficients, **options, impl=impl)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    want = evaluate("reference")
    noise = any(isinstance(k, fm.Noise) for k in given)
    # implementations agree on float32 normals to 2e-6, whatever reads them
    exact = dtype is torch.float64 or (pred_dtype is torch.float64 and not noise)
    for impl in IMPLS:
        loss, grad = evaluate(impl)
        assert loss.dtype == want[0].dtype
        close(loss.double(), want[0].double(), torch.float64 if exact else torch.float32, 1.0 + loss.numel())
        if options["kind"] != "l1" and not noise:  # its slope jumps
            close(grad, want[1], pred_dtype, 1.0 + float(want[1].abs().max()) if grad.numel() else 1.0)


@pytest.mark.parametrize("number", range(ROUNDS // 20 + 1))
def test_large_outputs(number: int) -> None:
    """Beyond 24 MiB they are written past the caches, 64 bytes at a time, from wherever they begin."""
    rng = random.Random(number)
    size = rng.choice(((6_300_007,), (3, 2_100_011), (7, 9, 100_003)))
    x, y = (tensor(rng, size, torch.float32) for _ in range(2))
    coefficients = [leading(rng, size, torch.float32) for _ in range(2)]
    want = fm.combine([x, y], coefficients, impl="reference")
    close(fm.combine([x, y], coefficients), want, torch.float32, 10.0)
    buffer = torch.empty(x.numel() + 16)
    for begin in (0, rng.randint(1, 15)):
        out = buffer[begin:][: x.numel()].view(size)
        guard = torch.cat([buffer[:begin], buffer[begin + x.numel() :]]).clone()
        close(fm.combine([x, y], coefficients, out=out), want, torch.float32, 10.0)
        rest = torch.cat([buffer[:begin], buffer[begin + x.numel() :]])
        assert torch.equal(rest.view(torch.int32), guard.view(torch.int32))
    pred = tensor(rng, size, torch.float32).detach().requires_grad_()
    for impl in ("native", "reference"):
        loss = fm.regression_loss(pred, [x, y], coefficients, reduction="sum", impl=impl)
        (grad,) = torch.autograd.grad(loss, pred)
        close(grad, 2.0 * (pred.detach() - want), torch.float32, 10.0)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_interpolate(number: int) -> None:
    rng = random.Random(2000 + number)
    size, dtype = shape(rng), rng.choice(DTYPES)
    x_1 = tensor(rng, size, dtype)
    drawn = fm.Noise(torch.tensor(number), 3, rng.choice((0, 7)))
    options = {
        "x_0": drawn if rng.random() < 0.5 else tensor(rng, size, dtype),
        "alpha": leading(rng, size, dtype),
        "sigma": leading(rng, size, dtype),
        "store_noise": rng.random() < 0.5,
    }
    if rng.random() < 0.3:
        options["gamma"], options["z"] = leading(rng, size, dtype), fm.Noise(torch.tensor(number), 4)
    want = fm.interpolate(x_1, **options, impl="reference")
    for impl in IMPLS:
        got = fm.interpolate(x_1, **options, impl=impl)
        for a, b in zip(got, want, strict=True):
            if isinstance(b, Tensor):
                close(a, b, dtype, 10.0)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_row_dots(number: int) -> None:
    rng = random.Random(3000 + number)
    size, dtype = shape(rng, 1), rng.choice(DTYPES)
    if not size:
        size = (4,)
    tensors = [tensor(rng, size, dtype) for _ in range(rng.randint(1, 6))]
    indices = range(-1, len(tensors))
    pairs = [(rng.choice(indices), rng.choice(indices)) for _ in range(rng.randint(1, 16))]
    want = fm.row_dots(tensors, pairs, impl="reference")
    for impl in IMPLS:
        got = fm.row_dots(tensors, pairs, impl=impl)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        close(got, want, wide, 1.0 + float(want.abs().max()) if want.numel() else 1.0)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_random(number: int) -> None:
    rng = random.Random(4000 + number)
    size, dtype = shape(rng), rng.choice(DTYPES)
    place = {"seed": rng.getrandbits(64), "stream": rng.getrandbits(62), "row_offset": rng.choice((0, 3, 2**33))}
    for draw, options in ((fm.randn, {"dtype": dtype}), (fm.rand, {"dtype": dtype}), (fm.random_words, {})):
        want = draw(size, **place, **options, impl="reference")
        got = draw(size, **place, **options, impl="native")
        if draw is fm.randn:
            close(got, want, dtype)
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_step_control(number: int) -> None:
    rng = random.Random(5000 + number)
    rows, stages, wanted_times = rng.choice((1, 2, 7, 300)), rng.randint(2, 8), rng.randint(0, 5)
    dtype, time_dtype = rng.choice((torch.float32, torch.float64)), rng.choice(DTYPES)
    generator = torch.Generator().manual_seed(number)
    start, error = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    rules = Rules((-0.3, 0.1, 0.0), 0.9, 10.0, 0.2, 1.0, 0.0, 10.0, 1000, rng.random() < 0.5, (0.0,) * stages)
    wanted = None
    if wanted_times:
        wanted = (
            torch.rand(1 if rng.random() < 0.5 else rows, wanted_times, generator=generator).double().sort(1).values
        )
        wanted = wanted.expand(rows, -1)
    results = []
    for impl in ("reference", "native"):
        clock, count = new_state(start, start + 1.0)
        clock[Clock.H] = 0.1
        step = torch.zeros(rows, dtype=dtype)
        times = torch.zeros(stages, rows, dtype=time_dtype)
        norm = (error * 2.0).to(dtype)
        step_control(clock, count, step, times, norm, rules, wanted, start=number % 3 == 0, impl=impl)
        results.append((clock, count, step, times))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert (results[1][1][Count.NEXT_OUTPUT] <= wanted_times).all()
