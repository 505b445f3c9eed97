"""What the loss is divided by: counts of what is unmasked, given counts, sums of weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fmkernels as fm

IMPLS = ["auto", "native", "reference"]


def problem(shape: tuple[int, ...] = (6, 5, 3)) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(shape), torch.randn(shape), torch.rand(shape[0]) + 0.1, torch.rand(shape[:2]) > 0.4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [True, False])
def test_a_scalar_mask_masks_each_sample(impl: str, value: bool) -> None:
    """Also with reduction="none", where each sample is divided by its own elements, not by the batch's."""
    pred, x_1, _, _ = problem()
    pred.requires_grad_()
    for reduction in ("none", "mean", "sum", "weighted_mean"):
        found = []
        for mask in (torch.tensor(value), torch.full((6,), value)):
            loss = fm.regression_loss(pred, [x_1], [1.0], mask=mask, reduction=reduction, impl=impl)
            found.append((loss.detach(), torch.autograd.grad(loss.sum(), pred)[0]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        if value and reduction == "none":
            torch.testing.assert_close(found[0][0], (pred - x_1).square().mean((1, 2)).detach())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", ["none", "scalar", "sample", "token", "element"])
@pytest.mark.parametrize("weighted", ["none", "number", "scalar", "sample", "token"])
def test_weighted_mean_divides_by_the_unmasked_elements_weights(weighted: str, masked: str, impl: str) -> None:
    pred, x_1, sample, token = problem()
    mask = {
        "none": None,
        "scalar": torch.tensor(True),
        "sample": sample > 0.5,
        "token": token,
        "element": torch.rand(pred.shape) > 0.5,
    }[masked]
    weight = {
        "none": None,
        "number": 3.0,
        "scalar": torch.tensor(0.3),
        "sample": sample,
        "token": sample[:, None] * (1 + token),
    }[weighted]
    w = 1.0 if weight is None else weight
    w = w.reshape(w.shape + (1,) * (3 - w.dim())) if isinstance(w, Tensor) else w
    kept = 1.0 if mask is None else mask.reshape(mask.shape + (1,) * (3 - mask.dim()))
    factor = (torch.ones_like(pred) * w * kept).double()
    want = (factor * (pred - x_1).square()).sum() / factor.sum()
    leaf = pred.clone().requires_grad_()
    loss = fm.regression_loss(leaf, [x_1], [1.0], weight=weight, mask=mask, reduction="weighted_mean", impl=impl)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0.0)
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(grad.double(), 2 * factor * (pred - x_1) / factor.sum(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_weighted_mean_of_nothing_is_zero_with_a_zero_gradient(impl: str) -> None:
    pred, x_1, sample, _ = problem()
    for weight, mask in ((torch.zeros(6), None), (sample, torch.zeros(6, dtype=torch.bool)), (0.0, None)):
        leaf = pred.clone().requires_grad_()
        loss = fm.regression_loss(leaf, [x_1], [1.0], weight=weight, mask=mask, reduction="weighted_mean", impl=impl)
        assert loss == 0.0
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], torch.zeros_like(leaf))


def test_weighted_mean_is_differentiable_in_a_learnt_weight() -> None:
    pred, x_1, sample, token = (x.double() if x.is_floating_point() else x for x in problem())
    sample.requires_grad_()

    def function(weight: Tensor) -> Tensor:
        return fm.regression_loss(pred, [x_1], [1.0], weight=weight, mask=token, reduction="weighted_mean")

    assert torch.autograd.gradcheck(function, [sample])
    nothing = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(function(nothing), nothing)
    assert grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["int", "float", "tensor", "one-element", "float tensor"])
def test_the_parts_of_a_batch_add_to_the_whole(kind: str, impl: str) -> None:
    """Micro-batches (or ranks) of unequal masks, each given the whole's count: the sum is the whole's mean."""
    pred, x_1, sample, token = problem()
    total = int(token.sum()) * 3
    count = {
        "int": total,
        "float": float(total),
        "tensor": torch.tensor(total),
        "one-element": torch.tensor([total]),
        "float tensor": torch.tensor(float(total), dtype=torch.float64),
    }[kind]
    whole = pred.clone().requires_grad_()
    want = fm.regression_loss(whole, [x_1], [1.0], weight=sample, mask=token, impl=impl)
    want.backward()
    parts, losses = pred.clone().requires_grad_(), []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        loss = fm.regression_loss(
            parts[rows], [x_1[rows]], [1.0], weight=sample[rows], mask=token[rows], count=count, impl=impl
        )
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(sum(losses), want.detach())
    torch.testing.assert_close(parts.grad, whole.grad)


def test_a_count_of_nothing_is_a_loss_of_nothing() -> None:
    pred, x_1, _, _ = problem()
    mask = torch.zeros(6, dtype=torch.bool)
    assert fm.regression_loss(pred, [x_1], [1.0], mask=mask, count=torch.tensor(0)) == 0.0


def test_cfm_loss_takes_count_and_weighted_mean() -> None:
    _, x_1, _, token = problem()
    batch = fm.paths.CondOT().sample(x_1, t=torch.rand(6))
    pred = torch.randn(6, 5, 3)
    plain = fm.cfm_loss(pred, batch, mask=token, reduction="sum", weight="min_snr")
    torch.testing.assert_close(fm.cfm_loss(pred, batch, mask=token, weight="min_snr", count=40), plain / 40)
    weights = fm.weightings.resolve("min_snr", batch.path, batch.t)
    total = (weights[:, None] * token).sum() * 3
    got = fm.cfm_loss(pred, batch, mask=token, weight="min_snr", reduction="weighted_mean")
    torch.testing.assert_close(got, plain / total)
