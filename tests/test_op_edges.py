"""Where a small slip would hide: ends of ranges, lengths beside a vector's, one dtype taken for another."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_rounded, roundings_of_sum

import fmkernels as fm

IMPLS = ["auto", "native", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (seed, element) of the words 0xfffffffa, 0xfffffff7 and 10, found by search
LARGEST, LARGE, SMALLEST = (29, 7245463), (5, 8036761), (36, 6692071)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_numbers_of_the_extreme_words(dtype: torch.dtype, impl: str) -> None:
    """Rounded to nearest, the largest words would be 1."""
    bits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11, torch.float64: 32}[dtype]
    for (seed, element), word in ((LARGEST, 0xFFFFFFFA), (LARGE, 0xFFFFFFF7), (SMALLEST, 10)):
        at = {"seed": seed, "row_offset": element, "impl": impl}
        assert fm.random_words(1, **at).item() == word
        got = fm.rand(1, dtype=dtype, **at)
        assert 0.0 <= got.item() < 1.0
        assert got.item() == (word >> (32 - bits)) * 2.0**-bits
        normal = fm.randn(2, dtype=dtype, seed=seed, row_offset=element & ~1, impl=impl)
        assert normal.isfinite().all()
        assert normal.abs().max() <= 6.67


@pytest.mark.parametrize("impl", IMPLS)
def test_seeds_are_64_bits_of_either_sign(impl: str) -> None:
    for number, same in ((2**63, -(2**63)), (2**64 - 1, -1), (2**63 + 5, 5 - 2**63)):
        for draw in (fm.randn, fm.rand, fm.random_words):
            want = draw(9, seed=torch.tensor(same), impl=impl)
            assert torch.equal(draw(9, seed=number, impl=impl), want)
            assert torch.equal(draw(9, seed=same, impl=impl), want)
    words = [fm.random_words(64, seed=s, impl=impl) for s in (0, 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)]
    assert torch.stack(words).unique(dim=0).shape[0] == len(words)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "length", [1, 2, 7, 8, 15, 16, 31, 39, 40, 41, 42, 47, 48, 63, 64, 65, 127, 128, 129, 255, 257]
)
def test_mask_entries_of_every_length(length: int, impl: str) -> None:
    """An entry covers `length` elements: all of them are in or out, in the loss and in the gradient."""
    torch.manual_seed(length)
    shape = (3, 5, length)
    mask = torch.rand(3, 5) > 0.4
    mask[0, :2] = torch.tensor([True, False])
    pred, x_1 = torch.randn(shape), torch.randn(shape)
    kept = mask[..., None].expand(shape)
    pred = pred.where(kept, float("nan"))  # what leaks shows
    square = (pred - x_1).double().square().where(kept, 0.0)
    slope = 2.0 * (pred - x_1).double().where(kept, 0.0)
    counts = {"sum": torch.ones(3), "mean": kept.sum().expand(3), "none": kept.sum((1, 2)).clamp(min=1)}
    for reduction, count in counts.items():
        for weight in (None, torch.full((3, 5), 1.0)):
            leaf = pred.clone().requires_grad_()
            loss = fm.regression_loss(leaf, [x_1], [1.0], mask=mask, weight=weight, reduction=reduction, impl=impl)
            want = square.sum((1, 2)) / count if reduction == "none" else square.sum() / count[0]
            # of a difference, squared, weighted and scaled
            assert_rounded(loss, want, 5 + roundings_of_sum(kept.numel()))
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            assert torch.equal(grad != 0.0, kept & (pred != x_1))
            assert_rounded(grad, slope / count[:, None, None], 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [(8, 5), (3, 1 << 19)], ids=["small", "large"])
@pytest.mark.parametrize("data", DTYPES)
@pytest.mark.parametrize("predicted", DTYPES)
def test_noise_is_of_the_datas_dtype_whatever_the_predictions(
    predicted: torch.dtype, data: torch.dtype, size: tuple[int, int], impl: str
) -> None:
    """Drawn again, it is the noise that made x_t: float32 noise stays float32 below a float64 prediction."""
    if size[1] > 5 and (predicted, data) != (torch.float64, torch.float32):
        size = (4, 64)
    torch.manual_seed(0)
    x_1, pred = torch.randn(size).to(data), torch.randn(size).to(predicted)
    noise = fm.Noise(torch.tensor(5), 3, 2)
    stored = fm.interpolate(x_1, noise, alpha=0.0, sigma=1.0, store_noise=True, impl=impl).x_0
    assert stored.dtype == data
    drawn, given = (
        fm.regression_loss(pred, [x_1, operand], [0.5, -1.0], reduction="none", impl=impl)
        for operand in (noise, stored)
    )
    assert drawn.dtype == (torch.float64 if torch.float64 in (predicted, data) else torch.float32)
    # the same numbers, perhaps multiplied and added in one rounding here and in two there
    assert_rounded(drawn, given, 8)
    alone = fm.regression_loss(pred, [noise], [1.0], noise_dtype=data, reduction="none", impl=impl)
    want = fm.regression_loss(pred, [stored], [1.0], reduction="none", impl=impl)
    assert_rounded(alone, want, 8)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("predicted", DTYPES)
def test_targets_are_formed_in_the_widest_dtype_not_in_the_predictions(predicted: torch.dtype, impl: str) -> None:
    """float32 data beside a bfloat16 prediction: 1 + 2^-12 is not 1."""
    pred = torch.ones(4, 8).to(predicted)
    x_1 = torch.full((4, 8), 1.0 + 2.0**-12)
    loss = fm.regression_loss(pred, [x_1, torch.full((4, 8), 2.0**-14)], [1.0, 1.0], impl=impl)
    assert loss.item() == (2.0**-12 + 2.0**-14) ** 2  # powers of two: nothing is rounded


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_noise_dtype_must_be_the_operands(impl: str) -> None:
    """Also where the call is plain enough for the quickest way."""
    x, noise = torch.ones(4, 3), fm.Noise(torch.tensor(1))
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match=r"^noise_dtype: expected the dtype of operands\[0\]"):
            fm.regression_loss(x, [x, noise], [1.0, 1.0], noise_dtype=dtype, impl=impl)
    same = fm.regression_loss(x, [x, noise], [1.0, 1.0], noise_dtype=torch.float32, impl=impl)
    assert torch.equal(same, fm.regression_loss(x, [x, noise], [1.0, 1.0], impl=impl))
