"""Schedules in one launch (fmkernels/paths/fused.py): the numbers of their own formulas, and when these must do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels import paths
from fmkernels.paths import fused
from fmkernels.paths.schedule import Schedule, at

PATHS = [
    fm.paths.OptimalTransport(),
    fm.paths.OptimalTransport(0.3),
    fm.paths.Polynomial(1.0),
    fm.paths.Polynomial(1.5),
    fm.paths.Polynomial(6.0),
    fm.paths.Cosine(),
    fm.paths.LinearVP(),
    fm.paths.VP(),
    fm.paths.VP(0.5, 0.5),
    fm.paths.VE(),
]
NAMES = ("alpha", "sigma", "d_alpha", "d_sigma")


def times(dtype: torch.dtype) -> Tensor:
    tiny = torch.finfo(dtype).tiny
    special = [0.0, tiny / 8, tiny, 1e-30, 1e-8, 1e-4, 0.1, 0.5, 0.9, 1.0 - 1e-6, 1.0]
    ends = [torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)).item(), float("nan")]
    return torch.cat([torch.tensor(special + ends, dtype=dtype), torch.rand(300, dtype=dtype)])


def formulas(path: Schedule, t: Tensor) -> list[Tensor]:
    return [value.expand(t.shape) for name in NAMES for value in [torch.as_tensor(at(path, name, t), dtype=t.dtype)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_numbers_are_the_formulas(path: Schedule, dtype: torch.dtype) -> None:
    t = times(dtype)
    table = fused.at(path, t, "auto")
    assert table is not None
    exact = formulas(path, t.double())
    # exponents up to 10, and powers, multiply the rounding of their arguments
    rtol = 64 * torch.finfo(dtype).eps
    for place, (name, plain, wanted) in enumerate(zip(NAMES, formulas(path, t), exact, strict=True)):
        got = torch.as_tensor(table.row(place), dtype=dtype).expand(t.shape)
        assert torch.equal(got.isnan(), plain.isnan()), name
        # next to the ends the formulas are off by more, as 1 - t is what it is
        limit = rtol * wanted.abs() + 2 * (plain.double() - wanted).abs()
        assert ((got.double() - wanted).abs() <= limit)[~wanted.isnan()].all(), name
    for place, end in ((fused.SIGMA, 1.0), (fused.ALPHA, 0.0)):
        value = formulas(path, torch.tensor([end], dtype=dtype))[place]
        assert torch.equal(torch.as_tensor(table.row(place), dtype=dtype).expand(t.shape)[t == end], value), end


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_step_is_that_of_the_formulas(path: Schedule, dtype: torch.dtype) -> None:
    x_1, pred = torch.randn(64, 6).to(dtype), torch.randn(64, 6).to(dtype).requires_grad_()
    seed = torch.tensor(5)
    got, want = (path.sample(x_1, seed=seed, impl=impl) for impl in ("auto", "reference"))
    assert got._table is not None
    assert want._table is None
    assert torch.equal(got.t, want.t)
    tolerance = {torch.float32: 2e-6, torch.float64: 2e-14, torch.bfloat16: 1e-2}[dtype]
    scale = 1.0 + want.x_t.abs().max().item()
    torch.testing.assert_close(got.x_t, want.x_t, atol=tolerance * scale, rtol=tolerance)
    losses = [fm.cfm_loss(pred, batch, impl=impl) for batch, impl in ((got, "auto"), (want, "reference"))]
    torch.testing.assert_close(*losses, atol=0.0, rtol=10 * tolerance)
    torch.testing.assert_close(
        fm.cfm_loss(pred, x_1=x_1, x_0=got.x_0, t=got.t, path=path), losses[0], atol=0.0, rtol=10 * tolerance
    )


def test_shards_draw_what_the_whole_does() -> None:
    path, seed, x_1 = fm.paths.VP(), torch.tensor(9), torch.randn(12, 3)
    whole = path.sample(x_1, seed=seed)
    for first in (0, 5, 7):
        part = path.sample(x_1[first:], seed=seed, row_offset=first)
        assert torch.equal(part.t, whole.t[first:])
        assert torch.equal(part.x_t, whole.x_t[first:])
    assert torch.equal(whole.t, fm.rand(12, seed=seed, stream=2))


def in_place(batch: fm.paths.Batch) -> None:
    if batch.t.is_inference():  # else the loss refuses it
        batch.t.mul_(0.5)


def replaced(batch: fm.paths.Batch) -> None:
    batch.t = batch.t * 0.5


def other_path(batch: fm.paths.Batch) -> None:
    batch.path = fm.paths.VP(0.5, 4.0)


def parameter(batch: fm.paths.Batch) -> None:
    batch.path.beta_max = 4.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", [in_place, replaced, other_path, parameter])
@pytest.mark.parametrize("inference", [False, True])
def test_the_loss_reads_the_batch_as_it_is(change: Callable[[fm.paths.Batch], None], inference: bool) -> None:
    with torch.inference_mode(inference):
        batch = fm.paths.VP().sample(torch.randn(8, 2))
        pred = torch.randn(8, 2)
        change(batch)
        want = fm.cfm_loss(pred, x_1=batch.x_1, x_0=batch.x_0, t=batch.t.clone(), path=batch.path, impl="reference")
        torch.testing.assert_close(fm.cfm_loss(pred, batch), want)


def test_what_is_differentiated_or_learned_goes_through_the_formulas() -> None:
    x_1 = torch.randn(8, 2)
    t = torch.rand(8, requires_grad=True)
    (grad,) = torch.autograd.grad(fm.paths.VP().sample(x_1, torch.zeros(8, 2), t).x_t.sum(), t)
    assert grad.abs().sum() > 0
    path = fm.paths.VP()
    path.beta_max = torch.tensor(9.0, requires_grad=True)  # type: ignore[assignment]
    batch = path.sample(x_1)
    assert batch._table is None
    assert batch.x_t.requires_grad
    slope = torch.func.vmap(torch.func.grad(lambda t, x: fm.paths.VP().sample(x, x, t).x_t.sum()))(t.detach(), x_1)
    assert slope.abs().sum() > 0


class Squared(paths.VP):
    """A noise schedule of its own, by what VP computes its formulas from."""

    def integral(self, t: Tensor) -> Tensor:
        return 3.0 * (1 - t) ** 2

    def d_integral(self, t: Tensor) -> Tensor:
        return -6.0 * (1 - t)


class Sine(paths.Cosine):
    def sigma(self, t: Tensor) -> Tensor:
        return 1 - torch.sin(0.5 * math.pi * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.cos(0.5 * math.pi * t)


@pytest.mark.parametrize("path", [Squared(), Sine()], ids=["integral", "sigma"])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_subclass_has_its_own_formulas(path: paths.Path, drawn: bool) -> None:
    x_1, x_0 = torch.ones(4, 3, dtype=torch.float64), torch.full((4, 3), 2.0, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    batch = path.sample(x_1, x_0, seed=1) if drawn else path.sample(x_1, x_0, t)
    a, s, da, ds = (f(batch.t)[:, None] for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    torch.testing.assert_close(batch.x_t, a * x_1 + s * x_0, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(batch.target(), da * x_1 + ds * x_0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", [paths.Cosine(), paths.VP(), paths.Polynomial(3.0), paths.VE()], ids=repr)
def test_a_gradient_asked_for_after_sampling(path: paths.Path) -> None:
    x_1, x_0, pred = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    t = 0.1 + 0.8 * torch.rand(4, dtype=torch.float64)
    batch = path.sample(x_1, x_0, t)
    batch.t.requires_grad_()
    (got,) = torch.autograd.grad(fm.cfm_loss(pred, batch), batch.t)
    leaf = t.detach().clone().requires_grad_()
    d_alpha, d_sigma = (torch.as_tensor(value).expand(4)[:, None] for value in (path.d_alpha(leaf), path.d_sigma(leaf)))
    target = d_alpha * x_1 + d_sigma * x_0
    (want,) = torch.autograd.grad((pred - target).square().mean(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0.0)


def test_an_object_with_a_formula_of_its_own() -> None:
    path = paths.Cosine()
    path.sigma = lambda t: 1 - t
    t = torch.tensor([0.2, 0.5, 0.8])
    batch = path.sample(torch.zeros(3, 1), torch.ones(3, 1), t)
    torch.testing.assert_close(batch.x_t[:, 0], 1 - t)


@pytest.mark.parametrize("path", [paths.Cosine(), paths.VP(), paths.VE()], ids=repr)
def test_more_times_than_one_call_takes(path: paths.Path) -> None:
    whole = path.sample(torch.ones((1 << 20) + 2, 1), seed=9)
    half = (1 << 19) + 1
    parts = [path.sample(torch.ones(half, 1), seed=9, row_offset=offset) for offset in (0, half)]
    assert torch.equal(torch.cat([part.x_t for part in parts]), whole.x_t)
    assert torch.equal(torch.cat([part.target() for part in parts]), whole.target())


class Late(paths.CondOT):
    def sigma(self, t: Tensor) -> Tensor:
        return (1 - t) ** 2


def test_a_straight_path_with_a_formula_of_its_own() -> None:
    t = torch.tensor([0.2, 0.5, 0.8])
    for path, want in ((Late(), (1 - t) ** 2), (paths.CondOT(), 1 - t)):
        batch = path.sample(torch.zeros(3, 1), torch.ones(3, 1), t)
        torch.testing.assert_close(batch.x_t[:, 0], want)


def test_a_batch_of_inference_mode_trains() -> None:
    x_1, x_0, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    with torch.inference_mode():
        inside = paths.Cosine().sample(x_1, x_0, t)
    pred = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    batches = (inside, paths.Cosine().sample(x_1, x_0, t))
    grads = [torch.autograd.grad(fm.cfm_loss(pred, batch, kind="huber"), pred)[0] for batch in batches]
    assert torch.equal(*grads)
