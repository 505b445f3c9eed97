"""The loss's penalties where squares overflow or vanish: value and slope against their formulas in a scaled form."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor

import fmkernels as fm

EXTREMES = {torch.float32: (2e-38, 1e-30, 1e-19, 1.0, 1e19, 1e30, 1e38), torch.float64: (1e-300, 1.0, 1e160, 1e300)}
CASES = [(dtype, impl) for dtype in EXTREMES for impl in ("native", "reference")]


def pseudo_huber(d: float, delta: float) -> tuple[float, float]:
    """sqrt(d^2 + delta^2) - delta and its derivative, in float64, scaled so that no square leaves the range."""
    root = math.hypot(d, delta)
    return d * (d / root) / (1.0 + delta / root), d / root


def loss_and_slope(d: Tensor, delta: float, impl: str) -> tuple[Tensor, Tensor]:
    """The sum of rho(d) over each row, and rho'(d)."""
    pred = d.clone().requires_grad_()
    options = {"weight": float(d.shape[1]), "reduction": "none", "kind": "pseudo_huber", "delta": delta, "impl": impl}
    loss = fm.regression_loss(pred, [torch.zeros_like(d)], [1.0], **options)
    (slope,) = torch.autograd.grad(loss.sum(), pred)
    return loss.detach(), slope


@pytest.mark.parametrize("inner", [1, 300])  # element by element and row by row
@pytest.mark.parametrize(("dtype", "impl"), CASES)
def test_pseudo_huber_neither_overflows_nor_loses_small_values(dtype: torch.dtype, impl: str, inner: int) -> None:
    values = torch.tensor(EXTREMES[dtype], dtype=dtype)
    d = torch.cat([values, -values, torch.zeros(1, dtype=dtype)])
    for delta in EXTREMES[dtype]:
        delta = torch.tensor(delta, dtype=dtype).item()
        residual = torch.zeros(len(d), inner, dtype=dtype)
        residual[:, 0] = d
        loss, slope = loss_and_slope(residual, delta, impl)
        want = torch.tensor([pseudo_huber(x, delta) for x in d.tolist()], dtype=torch.float64)
        tiny = torch.finfo(dtype).tiny  # below, a float has fewer bits than the tolerance asks for
        torch.testing.assert_close(loss.double(), want[:, 0], rtol=1e-5, atol=2 * tiny)
        torch.testing.assert_close(slope[:, 0].double(), want[:, 1], rtol=1e-5, atol=2 * tiny)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize(("delta", "slope"), [(1e-60, 1.0), (1e60, 0.0)])
def test_pseudo_huber_with_a_bend_outside_float32_tends_to_its_limits(delta: float, slope: float, impl: str) -> None:
    """|d| for a small one, 0 for a large one; never NaN, also at d = 0."""
    d = torch.tensor([-2.0, 0.0, 3.0])
    loss, slopes = loss_and_slope(d[:, None].contiguous(), delta, impl)
    torch.testing.assert_close(loss, slope * d.abs())
    torch.testing.assert_close(slopes[:, 0], slope * d.sign())


def test_pseudo_huber_has_its_second_derivative_everywhere() -> None:
    d = torch.tensor([-3.0, -0.7, 0.0, 0.2, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    delta = 0.7
    loss = fm.regression_loss(
        d, [torch.zeros(6, dtype=torch.float64)], [1.0], reduction="sum", kind="pseudo_huber", delta=delta,
        impl="reference",
    )  # fmt: skip
    (slope,) = torch.autograd.grad(loss, d, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), d)
    want = delta**2 / (d.detach() ** 2 + delta**2) ** 1.5
    assert_rounded(curvature, want, 16, size=want.max())  # formed as a difference


def second_derivatives(d: torch.Tensor, kind: str, delta: float, impl: str, **given) -> torch.Tensor:
    pred, zero = d.clone().requires_grad_(), torch.zeros_like(d)
    loss = fm.regression_loss(
        pred * 1.0, [zero, zero], [1.0, -1.0], reduction="sum", kind=kind, delta=delta, impl=impl, **given
    )
    (slope,) = torch.autograd.grad(loss, pred, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.float().sum(), pred)
    return curvature


@pytest.mark.parametrize("rows", [16, 1 << 15])  # the second is beyond what is called without Python's checks
@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_derivatives_of_half_precision_are_right_to_its_own(dtype: torch.dtype, impl: str, rows: int) -> None:
    d = torch.linspace(-1.0, 1.0, rows * 8).reshape(rows, 8).to(dtype)
    weight = torch.linspace(0.3, 2.0, rows)
    exact, w = d.double(), weight.double()[:, None]
    for delta in (0.01, 0.1, 1.0):
        got = second_derivatives(d, "pseudo_huber", delta, impl, weight=weight)
        want = w * delta**2 / (exact**2 + delta**2) ** 1.5
        # float32's own in the reference, which differentiates the quotient
        atol = 1e-6 if impl == "auto" else 1e-5
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=atol)
    for delta in (0.777, 0.5):
        got = second_derivatives(d, "huber", delta, impl, weight=weight)
        want = torch.where(exact.abs() <= float(torch.tensor(delta)), w, 0.0)
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=0)


def test_bfloat16_residuals_next_to_the_bend_are_on_their_side_of_it() -> None:
    """Rounded to bfloat16, the slopes of all of these are one number."""
    x_1 = torch.tensor([[0.0], [1e-3], [-1e-3], [2e-3]])
    pred = torch.ones(4, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = fm.regression_loss(
        pred, [x_1], [1.0], reduction="sum", kind="huber", delta=1.0, weight=torch.full((4,), 3.0)
    )
    (slope,) = torch.autograd.grad(loss, pred, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), pred)
    assert curvature.flatten().tolist() == [3.0, 3.0, 0.0, 3.0]


def test_bfloat16_third_derivatives_where_nan_is_masked_out_and_noise_is_drawn() -> None:
    d = torch.tensor([[0.3, float("nan")], [-0.1, 0.02]], dtype=torch.bfloat16)
    mask = ~d.isnan()
    found = []
    for impl in ("auto", "reference"):
        pred = d.clone().requires_grad_()
        noise = fm.Noise(torch.tensor(3))
        loss = fm.regression_loss(pred, [noise], [0.1], kind="pseudo_huber", delta=0.2, mask=mask, impl=impl)
        for _ in range(2):
            (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
            loss = grad.float().sum()
        found.append(torch.autograd.grad(loss, pred)[0])
    assert found[0][0, 1] == 0
    torch.testing.assert_close(*found, rtol=1e-2, atol=0)


@pytest.mark.parametrize("form", ["small", "mask", "wide", "half", "second"])
@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
@pytest.mark.parametrize("kind", ["squared", "huber", "pseudo_huber", "l1"])
def test_residuals_that_are_not_finite_are_their_limits(kind: str, impl: str, form: str) -> None:
    """An infinite residual costs infinitely and pulls as the limit does; a NaN is seen in both."""
    delta, w = 0.5, 2.0
    dtype = torch.bfloat16 if form == "half" else torch.float32
    for value in (math.inf, -math.inf, math.nan):
        pred = torch.full((3, 600 if form == "wide" else 4), 0.25, dtype=dtype)
        pred[0, 1] = value
        pred.requires_grad_()
        mask = {"mask": torch.ones(pred.shape) > 0} if form == "mask" else {}
        weight = torch.tensor([w, 1.0, 1.0])
        options = {"kind": kind, "delta": delta, "weight": weight, "reduction": "none", "impl": impl, **mask}
        losses = fm.regression_loss(pred, [torch.zeros_like(pred)], [1.0], **options)
        options["reduction"] = "sum"
        total = fm.regression_loss(pred, [torch.zeros_like(pred)], [1.0], **options)
        (slope,) = torch.autograd.grad(total, pred, create_graph=form == "second")
        limit = {"squared": 2.0 * value, "huber": math.copysign(delta, value)}.get(kind, math.copysign(1.0, value))
        want = torch.tensor(math.nan if math.isnan(value) else w * limit, dtype=dtype)
        torch.testing.assert_close(slope[0, 1].detach(), want, rtol=0, atol=0, equal_nan=True)
        assert slope.isfinite().sum() == slope.numel() - (not math.isfinite(want.item()))
        size = torch.tensor(abs(value))
        torch.testing.assert_close(torch.stack((losses[0], total)), size.expand(2), equal_nan=True)
        assert losses[1:].isfinite().all()
        if form == "second":
            (curvature,) = torch.autograd.grad(slope.sum(), pred)
            rest = {"squared": 2.0 * w, "huber": w if math.isnan(value) else 0.0}.get(kind, 0.0)
            if kind == "pseudo_huber" and math.isnan(value):
                rest = math.nan
            torch.testing.assert_close(curvature[0, 1], torch.tensor(rest), rtol=0, atol=0, equal_nan=True)
            assert curvature[1:].isfinite().all()


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
@pytest.mark.parametrize("kind", ["huber", "pseudo_huber", "l1"])
def test_an_infinite_incoming_gradient_or_weight_keeps_its_sign(kind: str, impl: str) -> None:
    for residual in (0.25, 3.0, -3.0, math.inf, -math.inf):
        for given in ("gradient", "weight"):
            pred = torch.full((1, 4), residual, requires_grad=True)
            weight = {"weight": torch.tensor([math.inf])} if given == "weight" else {}
            loss = fm.regression_loss(pred, [torch.zeros(1, 4)], [1.0], kind=kind, reduction="sum", impl=impl, **weight)
            incoming = torch.tensor(math.inf if given == "gradient" else 1.0)
            (slope,) = torch.autograd.grad(loss, pred, incoming)
            assert slope.tolist() == [[math.copysign(math.inf, residual)] * 4]


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_pseudo_huber_at_the_largest_number_with_the_largest_bend(impl: str) -> None:
    largest = torch.finfo(torch.float32).max
    loss, slope = loss_and_slope(torch.full((2, 1), largest), largest, impl)
    torch.testing.assert_close(loss, torch.full((2,), largest * (math.sqrt(2.0) - 1.0)))
    torch.testing.assert_close(slope, torch.full((2, 1), math.sqrt(0.5)))
