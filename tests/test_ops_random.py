"""Differential tests: operations on random shapes, dtypes, layouts and options against the float64 reference.

Each case is drawn from its number, so a failure names itself; cases.py has the hand-picked ones.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from rounding import assert_rounded, budget, roundings_of_sum, unit

import fmkernels as fm
from fmkernels import _dispatch
from fmkernels.testing import NOISE_TOLERANCE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
IMPLS = [
    pytest.param(device, impl, id=f"{device}-{impl}")
    for device in DEVICES
    for impl in ("auto", "reference", "native", "triton")
    if _dispatch.unavailable(impl, device) is None
]


# Triton's interpreter takes milliseconds for each program, of which per-sample reductions have one a sample.
MANY = 12 if os.environ.get("TRITON_INTERPRET") == "1" else 300


def random_shape(rng: random.Random) -> tuple[int, ...]:
    kind = rng.randrange(6)
    if kind == 0:
        return (rng.choice([1, 2, 3, MANY]), rng.choice([1, 2, 3, 5]))
    if kind == 1:
        return (rng.choice([1, 2, 7]), rng.choice([31, 32, 33, 1000, 1025]))
    if kind == 2:
        return (rng.choice([1, 3]), rng.choice([1, 5]), rng.choice([1, 7, 64, 129]))
    if kind == 3:
        return (rng.choice([2, 5]), rng.choice([2, 3]), rng.choice([4, 5]), rng.choice([4, 9]))
    if kind == 4:
        return (rng.choice([1, 2, 5, 2 * MANY]),)
    return (2, 3, 2, 3, 4)


def random_layout(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The same values, in one of several layouts."""
    kind = rng.randrange(5)
    if kind == 1 and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == 2 and x.dim() >= 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 3:
        wide = torch.empty(*x.shape, 2, dtype=x.dtype, device=x.device)
        wide[..., 0] = x
        return wide[..., 0]
    return x


def random_leading(shape: tuple[int, ...], rng: random.Random, positive: bool = False) -> float | torch.Tensor:
    """A coefficient: a number, or a float32 tensor of a leading part of the shape, in one of several layouts."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.uniform(0.1 if positive else -2, 2)
    lead = shape[: rng.randint(0, min(len(shape), 2 + (rng.random() < 0.2)))]
    value = torch.rand(lead) + 0.1 if positive else torch.randn(lead)
    if kind == 1 and lead:
        wide = torch.empty(*lead, 3)
        wide[..., 1] = value
        return wide[..., 1]
    if kind == 2 and len(lead) == 1:
        return value[:1].expand(lead) if lead[0] else value
    return value


def to(value, device, dtype=None):
    return value.to(device=device, dtype=dtype) if isinstance(value, torch.Tensor) else value


def computed_in(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def combination(tensors, coefficients, sizes: bool = False) -> torch.Tensor:
    """sum_k c_k x_k in float64; with ``sizes`` the sum of the terms' sizes, which bounds what roundings change."""
    if isinstance(coefficients, torch.Tensor):  # a table
        coefficients = coefficients.unbind(-1)
    terms = [
        x.double() * (fm.ops._operands.expand_leading(c.double(), x) if isinstance(c, torch.Tensor) else c)
        for x, c in zip(tensors, coefficients, strict=True)
    ]
    return sum(term.abs() if sizes else term for term in terms)


def of_noise(operands, noise, coefficients) -> torch.Tensor | float:
    """What implementations may differ by in noise: where one rounds to a narrow dtype, to a neighbour."""
    if isinstance(coefficients, torch.Tensor):
        coefficients = coefficients.unbind(-1)
    drawn = [(z, c) for k, z, c in zip(operands, noise, coefficients, strict=True) if not isinstance(k, torch.Tensor)]
    if not drawn:
        return 0.0
    narrow = 2 * unit(drawn[0][0].dtype) if drawn[0][0].dtype.itemsize == 2 else 0.0
    sizes = [narrow * z.double().abs() + NOISE_TOLERANCE for z, _ in drawn]
    return combination(sizes, [c for _, c in drawn], sizes=True)


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("case", range(60))
@pytest.mark.parametrize(("device", "impl"), IMPLS)
def test_combine(device: str, impl: str, case: int) -> None:
    rng = random.Random(case)
    torch.manual_seed(case)
    dtype = DTYPES[case % 4]
    shape = random_shape(rng)
    count = rng.choice([1, 2, 3, 4, 5, 8, 16])
    operands = [random_layout(torch.randn(shape).to(dtype), rng).to(device) for _ in range(count)]
    if count < 16 and rng.random() < 0.4:
        operands.append(fm.Noise(torch.tensor(case * 7919 - 5, device=device), rng.randrange(3), rng.randrange(4)))
    coefficients = [random_leading(shape, rng) for _ in operands]
    if rng.random() < 0.3:
        coefficients = torch.randn(*shape[: rng.randint(0, 1)], len(operands))
    options = {}
    if rng.random() < 0.4:
        options = {"atol": 0.1, "rtol": 0.2}
        if rng.random() < 0.6:
            options["error_coefficients"] = [random_leading(shape, rng) for _ in operands]

    def move(values, dtype=None):
        if isinstance(values, torch.Tensor):
            return to(values, device, dtype)
        return [to(v, device, dtype) for v in values]

    def call(impl, operands, double_coefficients=False, **extra):
        kwargs = dict(options, **extra)
        wide = torch.float64 if double_coefficients else None
        if "error_coefficients" in kwargs:
            kwargs["error_coefficients"] = move(kwargs["error_coefficients"], wide)
        result = fm.combine(operands, move(coefficients, wide), impl=impl, **kwargs)
        return result if isinstance(result, tuple) else (result, None)

    y, norm = call(impl, operands)
    # the oracle: noise in the data's dtype, everything else in float64
    noise = [k if isinstance(k, torch.Tensor) else fm.random.noise_like(k, operands[0]) for k in operands]
    want, want_norm = call("reference", [k.double() for k in noise], True)
    assert y.dtype == dtype
    assert y.shape == shape
    if impl != "reference":
        assert y.stride() == torch.empty_like(operands[0]).stride()
    # a coefficient, its product and a sum for each operand
    wide, roundings = computed_in(dtype), len(operands) + 2
    moved = move(coefficients)
    allowed = budget(y, want, roundings, size=combination(noise, moved, sizes=True), of=wide)
    assert ((y.double() - want).abs() <= allowed + of_noise(operands, noise, moved)).all()
    if norm is not None:
        errors = move(options.get("error_coefficients", coefficients))
        scale = 0.1 + 0.2 * torch.maximum(noise[0].double().abs(), want.abs())
        change = roundings * unit(wide) * combination(noise, errors, sizes=True) + of_noise(operands, noise, errors)
        change = (change / scale).reshape(shape[0], -1).square().mean(1).sqrt()
        # the quotient by the scale, its square, the sum and the root
        relative = (4 + roundings_of_sum(y[0].numel())) * unit(wide)
        assert ((norm.double() - want_norm).abs() <= change + relative * want_norm).all()
    again, _ = call(impl, operands)
    assert torch.equal(y, again), "two calls differ"

    if not any(not isinstance(k, torch.Tensor) for k in operands):
        target = operands[0].clone(memory_format=torch.preserve_format)
        in_place, _ = call(impl, [target, *operands[1:]], out=target)
        assert in_place is target
        assert torch.equal(in_place, y)


@pytest.mark.parametrize("case", range(120))
@pytest.mark.parametrize(("device", "impl"), IMPLS)
def test_regression_loss(device: str, impl: str, case: int) -> None:
    rng = random.Random(1000 + case)
    torch.manual_seed(case)
    dtype = DTYPES[case % 4]
    pred_dtype = rng.choice([dtype, dtype, *DTYPES])
    shape = random_shape(rng)
    pred = random_layout(torch.randn(shape).to(pred_dtype), rng).to(device)
    operands = [random_layout(torch.randn(shape).to(dtype), rng).to(device) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.4:
        operands[-1] = fm.Noise(torch.tensor(case * 31 + 1, device=device), 1, rng.randrange(3))
    coefficients = [to(random_leading(shape, rng), device) for _ in operands]
    options = {
        "reduction": rng.choice(["mean", "sum", "none"]),
        "kind": rng.choice(["squared", "huber", "pseudo_huber", "l1"]),
        "delta": rng.choice([0.1, 1.0, 3.0]),
        "noise_dtype": dtype,
    }
    if rng.random() < 0.5:
        options["weight"] = to(random_leading(shape, rng, positive=True), device)
    mask = None
    if rng.random() < 0.6:
        mask = torch.rand(shape[: rng.choice([1, min(2, len(shape)), len(shape)])], device=device) < rng.choice(
            [0, 0.5, 0.9]
        )
        hidden = ~fm.ops._operands.expand_leading(mask, pred).expand(shape)
        pred = pred.clone(memory_format=torch.preserve_format)
        pred[hidden] = float("nan")
        options["mask"] = mask

    def run(impl, pred, operands, coefficients, **extra):
        leaf = pred.detach().requires_grad_()
        loss = fm.regression_loss(leaf, operands, coefficients, impl=impl, **{**options, **extra})
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), grad

    loss, grad = run(impl, pred, operands, coefficients)
    assert loss.dtype == (torch.float64 if torch.float64 in (dtype, pred_dtype) else torch.float32)
    assert grad.dtype == pred_dtype
    assert grad.shape == shape
    if impl != "reference":
        strides = zip(shape, grad.stride(), torch.empty_like(pred).stride(), strict=True)
        assert all(size == 1 or mine == wanted for size, mine, wanted in strides)  # of one entry nobody steps
    noise = [k if isinstance(k, torch.Tensor) else fm.random.noise_like(k, pred.to(dtype)) for k in operands]
    extra = {"noise_dtype": torch.float64}
    if "weight" in options:
        extra["weight"] = double(options["weight"])
    want, want_grad = run(
        "reference", pred.double(), [k.double() for k in noise], [double(c) for c in coefficients], **extra
    )
    # what roundings change of the residual, relative to it: the gradient changes by as much, the loss by their product
    wide = computed_in(dtype, pred_dtype)
    residual = (pred.double() - combination(noise, coefficients)).nan_to_num(1.0)
    sizes = (pred.double().abs() + combination(noise, coefficients, sizes=True)).nan_to_num(0.0)
    change = (len(operands) + 3) * unit(wide) * sizes + of_noise(operands, noise, coefficients)
    by_element = want_grad.abs() * change
    by_element = by_element.reshape(shape[0], -1).sum(1) if options["reduction"] == "none" else by_element.sum()
    # weight, rho, scale and sum
    relative = (8 + roundings_of_sum(pred.numel())) * unit(wide)
    assert ((loss.double() - want).abs() <= by_element + relative * want).all()
    allowed = budget(grad, want_grad, 8, of=wide) + want_grad.abs() * change / residual.abs()
    if pred_dtype.itemsize == 2:  # rounded once more when it is multiplied by the loss's gradient
        allowed = allowed + unit(pred_dtype) * want_grad.abs()
    # at 0 the derivative of l1 jumps: rounding of the residual shows there
    wrong = (grad.double() - want_grad).abs() > allowed
    assert wrong.sum() <= (1 if options["kind"] == "l1" else 0), (grad.double() - want_grad)[wrong]
    if mask is not None:
        assert (grad[hidden] == 0).all()
    again, grad_again = run(impl, pred, operands, coefficients)
    assert torch.equal(loss, again)
    assert torch.equal(grad, grad_again)
    with torch.no_grad():
        forward_only = fm.regression_loss(pred, operands, coefficients, impl=impl, **options)
    assert_rounded(forward_only, loss, roundings_of_sum(pred.numel()))


@pytest.mark.parametrize("length", [np.int64(3), np.uint8(3)])
def test_lengths_may_be_numpys_integers(length) -> None:
    want = fm.randn(3, 2, seed=1)
    assert torch.equal(fm.randn(length, 2, seed=1), want)
    assert torch.equal(fm.randn((length, np.int32(2)), seed=1), want)
    assert fm.rand(length, seed=1).shape == fm.random_words([length], seed=1).shape == (3,)
    sampler = fm.times.Uniform()
    assert torch.equal(sampler(length, seed=1), sampler(3, seed=1))
    assert sampler((length, 2), seed=1).shape == (3, 2)


@pytest.mark.parametrize("length", [True, np.True_, 3.0, np.float64(3), "3", None, torch.tensor(3)])
def test_lengths_that_are_no_int_are_told(length) -> None:
    for draw in (lambda: fm.randn(2, length), lambda: fm.times.Uniform()((2, length))):
        with pytest.raises(TypeError, match=r"(size|shape): expected ints, got"):
            draw()
