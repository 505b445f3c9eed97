"""The fused loss's gradient: of any order, never written to once handed out, and where float16 ends."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import fmkernels as fm

KINDS = ["squared", "huber", "pseudo_huber", "l1"]
SHAPES = [(5, 2), (3, 4, 2), (1 << 19, 3)]  # the last is beyond what is called without Python's checks


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def options(which: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(1)
    if which == "plain":
        return {}
    mask = torch.rand(shape[:2], generator=generator) > 0.3
    weight = torch.rand(shape[:1], generator=generator, dtype=dtype) + 0.5
    return {"mask": mask, "weight": weight, "reduction": which}


@pytest.mark.parametrize("impl", ["auto", "native"])
@pytest.mark.parametrize("which", ["plain", "mean", "sum", "none", "weighted_mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_right(kind: str, which: str, impl: str) -> None:
    pred, x_1, x_0 = problem((3, 2, 2), torch.float64)
    given = options(which, (3, 2, 2), torch.float64)

    def function(pred):
        return fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0], kind=kind, delta=0.7, impl=impl, **given)

    assert gradcheck(function, [pred.requires_grad_()])
    assert gradgradcheck(function, [pred])


@pytest.mark.parametrize("which", ["plain", "mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_derivatives_up_to_the_third_are_the_references(kind: str, which: str, dtype: torch.dtype) -> None:
    pred, x_1, x_0 = problem((64, 5, 3), dtype)
    given = options(which, (64, 5, 3), torch.float64 if dtype == torch.float64 else torch.float32)
    found = []
    for impl in ("auto", "reference"):
        leaf = pred.clone().requires_grad_()
        loss = fm.regression_loss(leaf * 1.5, [x_1, x_0], [1.0, -1.0], kind=kind, delta=0.7, impl=impl, **given)
        orders = [loss.square().sum()]
        for _ in range(3):
            (grad,) = torch.autograd.grad(orders[-1], leaf, create_graph=True)
            orders.append((grad.to(x_1.dtype) * x_0).sum())
        found.append([grad.detach(), *orders])
    # sums of some 1000 terms of both signs, differentiated up to three times
    tolerance = {torch.float64: 2e-13, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("through", ["cfm_loss", "combine", "interpolate", "row_dots"])
def test_create_graph_needs_no_choice_of_implementation(through: str) -> None:
    """A gradient penalty: the derivative of a squared gradient with respect to a weight."""
    x_1, x_0, _ = problem((6, 3), torch.float64)
    t = torch.linspace(0.0, 1.0, 6, dtype=torch.float64)
    path = fm.paths.CondOT()

    def penalty(w: Tensor, impl: str) -> Tensor:
        x = (x_1 * w).tanh()
        if through == "cfm_loss":
            value = fm.cfm_loss(x, x_1=x_1, x_0=x_0, t=t, path=path, impl=impl)
        elif through == "combine":
            value = fm.combine([x * x, x_0], [t * w[0], 0.5], impl=impl).square().mean()
        elif through == "interpolate":
            value = fm.interpolate(x, x_0, alpha=t * w[0], sigma=1 - t, impl=impl).x_t.square().mean()
        else:
            value = fm.row_dots([x, x_0], [(0, 0), (0, 1)], impl=impl).square().mean()
        (grad,) = torch.autograd.grad(value, w, create_graph=True)
        return grad.square().sum()

    w = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(penalty(w, "reference"), w)[0]
    assert want.abs().min() > 0
    assert_rounded(torch.autograd.grad(penalty(w, "auto"), w)[0], want, 40, size=want.abs().max())


@pytest.mark.host
def test_pred_changed_in_place_after_the_loss_is_told_not_differentiated() -> None:
    weight, x_1, _ = problem((5, 2))
    weight.requires_grad_()
    pred = weight * 1.0
    loss = fm.regression_loss(pred, [x_1], [1.0])
    pred.mul_(2.0)
    torch.testing.assert_close(torch.autograd.grad(loss, weight, retain_graph=True)[0], (weight - x_1) / 5)
    with pytest.raises(RuntimeError, match="regression_loss: pred was changed in place"):
        torch.autograd.grad(loss, weight, create_graph=True)


@pytest.mark.parametrize("shape", SHAPES, ids=["small", "rows", "large"])
@pytest.mark.parametrize("which", ["plain", "none"])
def test_gradients_that_were_handed_out_never_change(shape: tuple[int, ...], which: str) -> None:
    pred, x_1, x_0 = problem(shape)
    pred.requires_grad_()
    given = options(which, shape, torch.float32)
    loss = fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0], **given).sum()
    want = torch.autograd.grad(loss, pred, retain_graph=True)[0].clone()
    kept = []
    for factor, retain in ((1.0, True), (2.0, True), (1.0, True), (0.5, True), (4.0, False)):
        (grad,) = torch.autograd.grad(loss * factor, pred, retain_graph=retain)
        assert not grad.requires_grad
        kept.append((factor, grad))
    for factor, grad in kept:
        torch.testing.assert_close(grad, factor * want, rtol=1e-6, atol=1e-12)
    assert len({grad.data_ptr() for _, grad in kept}) == len(kept)


@pytest.mark.parametrize("which", ["plain", "none"])
def test_what_a_user_does_to_a_gradient_stays_with_him(which: str) -> None:
    pred, x_1, x_0 = problem((5, 2))
    pred.requires_grad_()
    loss = fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0], **options(which, (5, 2), torch.float32)).sum()
    (first,) = torch.autograd.grad(loss, pred, retain_graph=True)
    want = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, pred)[0], want)


@pytest.mark.parametrize("which", ["plain", "none"])
def test_saved_tensors_that_hooks_hold_never_change(which: str) -> None:
    pred, x_1, x_0 = problem((5, 2))
    pred.requires_grad_()
    seen = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0], **options(which, (5, 2), torch.float32)).sum()
    torch.autograd.grad(3.0 * loss, pred)
    assert seen
    for tensor, copy in seen:
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("which", ["plain", "none"])
def test_gradients_accumulate_over_backward_passes(which: str) -> None:
    pred, x_1, x_0 = problem((5, 2))
    pred.requires_grad_()
    loss = fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0], **options(which, (5, 2), torch.float32)).sum()
    loss.backward(retain_graph=True)
    first = pred.grad
    want = first.clone()
    (2.0 * loss).backward(retain_graph=True)
    (0.5 * loss).backward()
    torch.testing.assert_close(pred.grad, 3.5 * want)


@pytest.mark.parametrize("kind", ["expanded", "strided", "view", "float64", "negative"])
def test_grad_output_of_any_form(kind: str) -> None:
    pred, x_1, x_0 = problem((6, 4))
    pred.requires_grad_()
    given = {
        "expanded": torch.tensor(0.7).expand(6),
        "strided": torch.rand(12)[::2],
        "view": torch.rand(2, 6)[1],
        "float64": torch.rand(6, dtype=torch.float64).float(),
        "negative": torch.complex(torch.zeros(6), torch.rand(6)).conj().imag,
    }[kind]
    assert kind != "negative" or given.is_neg()
    for retain in (True, False):
        leaf = pred.detach().clone().requires_grad_()
        loss = fm.regression_loss(leaf, [x_1, x_0], [1.0, -1.0], reduction="none")
        (grad,) = torch.autograd.grad(loss, leaf, given, retain_graph=retain)
        want = 2 * (leaf - x_1 + x_0).detach() / 4 * given.clone().resolve_neg()[:, None]
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("mode", ["backward", "graph", "compile", "retained"])
@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (4, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_masked_out_has_the_gradient_0_whatever_comes_in(dtype, shape, impl: str, mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pred, x_1, x_0 = problem((4, 3, 2), dtype)
    mask = torch.rand(shape, generator=generator) > 0.5 if shape else torch.tensor(False)
    out = ~mask.reshape(shape + (1,) * (3 - len(shape))).expand(4, 3, 2)
    assert out.any()
    if mode == "compile" and (impl != "auto" or dtype is not torch.float32):
        return  # one way in all
    for kind, reduction in itertools.product(("squared", "pseudo_huber"), ("mean", "none", "sum")):
        leaf = pred.clone().requires_grad_()

        def loss(leaf, kind=kind, reduction=reduction):
            return fm.regression_loss(
                leaf, [x_1, x_0], [1.0, -1.0], mask=mask, reduction=reduction, kind=kind, impl=impl
            )

        value = (torch.compile(loss, backend="aot_eager") if mode == "compile" else loss)(leaf)
        (want,) = torch.autograd.grad(loss(leaf).sum(), leaf)
        for bad in (float("inf"), float("nan"), 2.0):  # twice at least, and at last of a graph that is not kept
            given = {"create_graph": True} if mode == "graph" else {"retain_graph": mode == "retained" or bad != 2.0}
            (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, bad), **given)
            assert (grad[out] == 0).all()
            if bad == 2.0:
                torch.testing.assert_close(grad, 2 * want)
            for _ in range(2 if mode == "graph" else 0):
                grad = torch.autograd.grad(grad.float().square().sum(), leaf, create_graph=True)[0]
                assert (grad[out] == 0).all()


def test_batches_of_gradients_with_a_graph() -> None:
    pred, x_1, x_0 = problem((6, 4), torch.float64)
    pred.requires_grad_()
    for reduction in ("none", "mean"):
        loss = fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0], reduction=reduction, kind="pseudo_huber")
        vectors = torch.rand(3, *loss.shape, dtype=torch.float64)
        (batched,) = torch.autograd.grad(loss, pred, vectors, is_grads_batched=True, create_graph=True)
        for one, vector in zip(batched, vectors, strict=True):
            (single,) = torch.autograd.grad(loss, pred, vector, create_graph=True)
            torch.testing.assert_close(one, single)
            torch.testing.assert_close(
                *(torch.autograd.grad(g.sum(), pred, retain_graph=True)[0] for g in (one, single))
            )


def test_vmap_of_a_backward_pass() -> None:
    """torch.func.vmap over autograd.grad of a loss that was made outside."""
    pred, x_1, x_0 = problem((6, 4))
    pred.requires_grad_()
    loss = fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0], reduction="none")
    rows = torch.func.vmap(lambda v: torch.autograd.grad(loss, pred, v, retain_graph=True)[0])(torch.eye(6))
    for i, row in enumerate(rows):
        assert row[i].abs().sum() > 0
        assert row.abs().sum() == row[i].abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_under_fake_tensors(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        pred = torch.empty(8, 3, dtype=dtype, requires_grad=True)
        x_1 = torch.empty(8, 3, dtype=dtype)
        for reduction in ("mean", "none"):
            loss = fm.regression_loss(pred, [x_1], [1.0], reduction=reduction)
            (grad,) = torch.autograd.grad(loss.sum() * 2.0, pred)
            assert (grad.shape, grad.dtype) == (pred.shape, dtype)
    pred, x_1, _ = problem((8, 3))  # and nothing of it stays
    loss = fm.regression_loss(pred.requires_grad_(), [x_1], [1.0])
    torch.testing.assert_close(torch.autograd.grad(loss, pred)[0], 2 * (pred - x_1).detach() / 24)


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_float16_gradients_end_where_eagers_do(kind: str, reduction: str, impl: str) -> None:
    """Large weights times residuals exceed 65504 before the division by N or a loss scale brings them back."""
    pred, x_1, _ = problem((256, 8), torch.float16)
    x_1 = x_1.float() * 3e4  # data of another dtype may lie beyond float16 itself
    weight = torch.logspace(-6, 5, 256)
    for factor in (1.0, 2.0**-14, 2.0**10):
        found = []
        for fused in (True, False):
            leaf = pred.clone().requires_grad_()
            if fused:
                loss = fm.regression_loss(
                    leaf, [x_1], [1.0], weight=weight, kind=kind, reduction=reduction, impl=impl
                ).sum()
            else:
                d = leaf.float() - x_1
                rho = {
                    "squared": d.square(),
                    "huber": torch.nn.functional.huber_loss(leaf.float(), x_1, reduction="none"),
                    "pseudo_huber": torch.sqrt(d.square() + 1.0) - 1.0,
                    "l1": d.abs(),
                }[kind]
                each = weight[:, None] * rho
                loss = {"mean": each.mean(), "none": each.mean(1).sum(), "sum": each.sum()}[reduction]
            found.append(torch.autograd.grad(loss * factor, leaf)[0])
        assert found[0].dtype == torch.float16
        assert torch.equal(found[0].isfinite(), found[1].isfinite())
        torch.testing.assert_close(*found, rtol=2e-3, atol=2e-7)


def test_float16_training_steps_with_a_gradient_scaler() -> None:
    """What the scaler sees is finite from the first step on with weights as min-SNR has them at low noise."""
    pred, x_1, _ = problem((512, 16), torch.float16)
    pred.requires_grad_()
    loss = fm.regression_loss(pred, [x_1], [1.0], weight=torch.full((512,), 5e4))
    (grad,) = torch.autograd.grad(loss * 2.0, pred)
    want = 2 * 2.0 * 5e4 * (pred.detach().double() - x_1.double()) / pred.numel()
    assert grad.isfinite().all()
    torch.testing.assert_close(grad.double(), want, rtol=1e-3, atol=1e-3)


def is_freed(run: Callable[[Tensor], Tensor]) -> bool:
    """Whether a prediction is gone while the loss, which run has differentiated, is held."""
    pred = torch.randn(4, 8) * torch.ones((), requires_grad=True)
    gone = weakref.ref(pred)
    loss = run(pred)
    assert loss.requires_grad
    del pred
    gc.collect()
    return gone() is None


@pytest.mark.parametrize("kind", ["squared", "huber", "pseudo_huber", "l1"])
@pytest.mark.parametrize("given", [{}, {"weight": torch.ones(4)}, {"mask": torch.tensor(True)}, {"impl": "reference"}])
def test_a_loss_that_is_held_keeps_no_prediction_after_backward(kind: str, given: dict) -> None:
    def loss_of(pred: Tensor) -> Tensor:
        return fm.regression_loss(pred, [torch.zeros(4, 8)], [1.0], kind=kind, **given)

    def once(pred: Tensor) -> Tensor:
        loss = loss_of(pred)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        return loss

    def twice(pred: Tensor) -> Tensor:
        loss = loss_of(pred)
        (first,) = torch.autograd.grad(loss, pred, retain_graph=True)
        assert torch.equal(first, *torch.autograd.grad(loss, pred))
        return loss

    def curved(pred: Tensor) -> Tensor:
        loss = loss_of(pred)
        (gradient,) = torch.autograd.grad(loss, pred, create_graph=True)
        (gradient.sum() + loss).backward()
        return loss

    assert is_freed(once)
    assert is_freed(twice)
    assert is_freed(curved)


def test_hooks_see_all_that_a_small_loss_keeps() -> None:
    """As torch.autograd.graph.save_on_cpu needs: what is packed away is held nowhere else."""
    pred = torch.randn(4, 8) * torch.ones((), requires_grad=True)
    gone = weakref.ref(pred)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy):
        loss = fm.regression_loss(pred, [torch.zeros(4, 8)], [1.0])
    want = 2 * pred.detach() / 32
    got = []
    pred.register_hook(got.append)
    del pred
    gc.collect()
    assert gone() is None
    loss.backward()
    assert torch.equal(got[0], want)
