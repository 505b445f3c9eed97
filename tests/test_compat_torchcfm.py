"""torchcfm's matchers: to the last bit what its formulas say under the same seeds, and, not strict, the fused paths."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rounding import assert_rounded
from torch import Tensor

from fmkernels import compat
from fmkernels.compat.torchcfm import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    OTPlanSampler,
    SchrodingerBridgeConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
    VariancePreservingConditionalFlowMatcher,
    pad_t_like_x,
)
from fmkernels.compat.torchcfm.optimal_transport import wasserstein

ot = pytest.importorskip("ot")

Formula = Callable[[Tensor, Tensor, Any, Tensor, float], tuple[Tensor, Tensor]]


def independent(x0: Tensor, x1: Tensor, t: Any, eps: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    return t * x1 + (1 - t) * x0 + sigma * eps, x1 - x0


def from_noise(x0: Tensor, x1: Tensor, t: Any, eps: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    xt = t * x1 + (1 - (1 - sigma) * t) * eps
    return xt, (x1 - (1 - sigma) * xt) / (1 - (1 - sigma) * t)


def brownian(x0: Tensor, x1: Tensor, t: Any, eps: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    mu = t * x1 + (1 - t) * x0
    xt = mu + sigma * torch.sqrt(t * (1 - t)) * eps
    return xt, (1 - 2 * t) / (2 * t * (1 - t) + 1e-8) * (xt - mu) + x1 - x0


def trigonometric(x0: Tensor, x1: Tensor, t: Any, eps: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    cos, sin = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return cos * x0 + sin * x1 + sigma * eps, math.pi / 2 * (cos * x1 - sin * x0)


MATCHERS: dict[str, tuple[Callable[..., ConditionalFlowMatcher], Formula, str | None]] = {
    "independent": (ConditionalFlowMatcher, independent, None),
    "exact": (ExactOptimalTransportConditionalFlowMatcher, independent, "exact"),
    "target": (TargetConditionalFlowMatcher, from_noise, None),
    "bridge": (SchrodingerBridgeConditionalFlowMatcher, brownian, "exact"),
    "sinkhorn": (lambda s, **k: SchrodingerBridgeConditionalFlowMatcher(s, "sinkhorn", **k), brownian, "sinkhorn"),
    "trigonometric": (VariancePreservingConditionalFlowMatcher, trigonometric, None),
}
matchers = pytest.mark.parametrize("name", MATCHERS)


def seed(number: int = 1) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 (torchcfm's stream)


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x[0], x[1]


def coupled(x0: Tensor, x1: Tensor, method: str | None, reg: float) -> tuple[Tensor, Tensor]:
    """By POT alone, pairs drawn with replacement by numpy."""
    if method is None:
        return x0, x1
    n = len(x0)
    costs = (torch.cdist(x0.reshape(n, -1), x1.reshape(n, -1)) ** 2).numpy()
    a = ot.unif(n)
    plan = ot.emd(a, a, costs) if method == "exact" else ot.sinkhorn(a, a, costs, reg)
    if abs(plan.sum()) < 1e-8:  # lost, as with little regularisation
        plan = np.full((n, n), 1 / n**2)
    chances = plan.flatten()
    drawn = np.random.choice(n * n, p=chances / chances.sum(), size=n)  # noqa: NPY002 (torchcfm's stream)
    i, j = np.divmod(drawn, n)
    return x0[i], x1[j]


@pytest.mark.filterwarnings("ignore")  # POT's, of plans with little regularisation
@matchers
@pytest.mark.parametrize("sigma", [0.0, 5e-3, 0.5, 1.5, 1])
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bitwise_torchcfm(name: str, sigma: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    make, formula, method = MATCHERS[name]
    if formula is brownian and sigma == 0.0:
        with pytest.raises(ValueError, match="sigma: expected a number > 0"):
            make(sigma)
        return
    x0, x1 = pair(32, *shape, dtype=dtype)
    seed()
    t, xt, ut, eps = make(sigma).sample_location_and_conditional_flow(x0, x1, return_noise=True)
    seed()
    x0, x1 = coupled(x0, x1, method, 2 * sigma**2)
    times = torch.rand(32).type_as(x0)
    noise = torch.randn_like(x0)
    want_xt, want_ut = formula(x0, x1, times.reshape(-1, *[1] * len(shape)), noise, sigma)
    assert torch.equal(t, times)
    assert torch.equal(eps, noise)
    assert torch.equal(xt, want_xt)
    assert torch.equal(ut, want_ut)


@matchers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_not_strict_is_the_fused_path(name: str, dtype: torch.dtype) -> None:
    """With the noise that it returns, x_t and u_t are the formulas', rounded once."""
    make, formula, _ = MATCHERS[name]
    sigma, x1 = 0.3, pair(64, 3, 5, dtype=dtype)[1]
    x0 = x1.flip(0) if MATCHERS[name][2] is None else x1
    seed()
    t, xt, ut, eps = make(sigma, strict=False).sample_location_and_conditional_flow(x0, x1, return_noise=True)
    assert t.dtype == xt.dtype == ut.dtype == eps.dtype == dtype
    if MATCHERS[name][2] is not None:  # the plan from a set to itself is the identity; which of the set, numpy drew
        if name == "exact":
            assert not ut.any()
        return
    wide = [x.double() for x in (x0, x1, t, eps)]
    want_xt, want_ut = formula(wide[0], wide[1], wide[2].reshape(-1, 1, 1), wide[3], sigma)
    size = 3.0 * (wide[0].abs() + wide[1].abs() + wide[3].abs())
    assert_rounded(xt, want_xt, 6, size=size)
    assert_rounded(ut, want_ut, 8, size=size)
    assert abs(eps.double().mean()) < 0.2
    assert abs(eps.double().std() - 1) < 0.1
    assert not torch.equal(eps, make(sigma, strict=False).sample_location_and_conditional_flow(x0, x1, None, True)[3])


@matchers
def test_given_times_and_seeds(name: str) -> None:
    make = MATCHERS[name][0]
    x0, x1 = pair(16, 4)
    t = torch.linspace(0, 1, 16)
    for strict in (True, False):
        results = []
        for _ in range(2):
            seed(3)
            results.append(make(0.2, strict=strict).sample_location_and_conditional_flow(x0, x1, t))
        assert torch.equal(results[0][0], t)
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
            assert torch.isfinite(a).all()
        with pytest.raises(AssertionError, match="t: expected x0's batch size 16, got 3"):
            make(0.2, strict=strict).sample_location_and_conditional_flow(x0, x1, t[:3])


def test_what_rules_strictness(monkeypatch: pytest.MonkeyPatch) -> None:
    x0, x1 = pair(8, 4)

    def is_torchcfms(matcher: ConditionalFlowMatcher) -> bool:
        seed()
        t, _, _, eps = matcher.sample_location_and_conditional_flow(x0, x1, return_noise=True)
        seed()
        return torch.equal(t, torch.rand(8)) and torch.equal(eps, torch.randn_like(x0))

    assert is_torchcfms(ConditionalFlowMatcher(0.1))
    with compat.strict(False):
        assert not is_torchcfms(ConditionalFlowMatcher(0.1))
        assert is_torchcfms(ConditionalFlowMatcher(0.1, strict=True))
        with compat.strict():
            assert is_torchcfms(ConditionalFlowMatcher(0.1))
    monkeypatch.setenv("FMKERNELS_COMPAT_STRICT", "0")
    assert not is_torchcfms(ConditionalFlowMatcher(0.1))
    monkeypatch.setenv("FMKERNELS_COMPAT_STRICT", "maybe")
    with pytest.raises(ValueError, match="FMKERNELS_COMPAT_STRICT: expected 0 or 1, got 'maybe'"):
        is_torchcfms(ConditionalFlowMatcher(0.1))
    with pytest.raises(TypeError, match="strict"):
        ConditionalFlowMatcher(0.1, strict=1)  # type: ignore[arg-type]


def test_own_formulas_are_never_left_out() -> None:
    """A subclass, an object or a sigma that the fused paths do not know is computed by its own methods."""
    x0, x1 = pair(8, 4)

    class Mine(ConditionalFlowMatcher):
        def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
            return x0

    class Sub(Mine):
        def compute_lambda(self, t: Any) -> Any:
            return 7.0

    for kind in (Mine, Sub):
        _, xt, ut = kind(0.0, strict=False).sample_location_and_conditional_flow(x0, x1)
        assert torch.equal(xt, x0)
        assert torch.equal(ut, x1 - x0)
    patched = ConditionalFlowMatcher(0.0, strict=False)
    patched.compute_conditional_flow = lambda x0, x1, t, xt: xt * 0  # type: ignore[method-assign]
    assert not patched.sample_location_and_conditional_flow(x0, x1)[2].any()
    changed = ConditionalFlowMatcher(0.0, strict=False)
    changed.sigma = torch.tensor(2.0)  # type: ignore[assignment]
    t, xt, _, eps = changed.sample_location_and_conditional_flow(x0, x1, return_noise=True)
    assert torch.equal(xt, t[:, None] * x1 + (1 - t[:, None]) * x0 + 2.0 * eps)
    changed.sigma = 0.5  # read at each call
    t, xt, _, eps = changed.sample_location_and_conditional_flow(x0, x1, return_noise=True)
    assert_rounded(xt, t[:, None] * x1 + (1 - t[:, None]) * x0 + 0.5 * eps, 8, size=x0.abs() + x1.abs() + eps.abs())


@pytest.mark.parametrize("strict", [True, False])
def test_gradients_reach_both_minibatches(strict: bool) -> None:
    x0, x1 = (x.requires_grad_() for x in pair(6, 3))
    t = torch.rand(6)
    _, xt, ut = ConditionalFlowMatcher(0.0, strict=strict).sample_location_and_conditional_flow(x0, x1, t)
    (xt.sum() + 2 * ut.sum()).backward()
    assert x0.grad is not None
    assert x1.grad is not None
    assert_rounded(x0.grad, (1 - t)[:, None].expand(6, 3) - 2, 4, size=torch.full((6, 3), 3.0))
    assert_rounded(x1.grad, t[:, None].expand(6, 3) + 2, 4, size=torch.full((6, 3), 3.0))


@pytest.mark.parametrize("kind", [ExactOptimalTransportConditionalFlowMatcher, SchrodingerBridgeConditionalFlowMatcher])
def test_labels_follow_their_samples(kind: Any) -> None:
    x0, x1 = pair(24, 3)
    y0, y1 = torch.arange(24), 100 + torch.arange(24)
    for strict in (True, False):
        matcher = kind(0.5, strict=strict)
        seed()
        t, xt, _ut, l0, l1, eps = matcher.guided_sample_location_and_conditional_flow(x0, x1, y0, y1, return_noise=True)
        a, b = x0[l0], x1[l1 - 100]
        mean = t[:, None] * b + (1 - t[:, None]) * a
        spread = 0.5 if kind is ExactOptimalTransportConditionalFlowMatcher else 0.5 * (t * (1 - t)).sqrt()[:, None]
        assert_rounded(xt, mean + spread * eps, 8, size=a.abs() + b.abs() + eps.abs())
        *_, none, labels = matcher.guided_sample_location_and_conditional_flow(x0, x1, y1=y1)
        assert none is None
        assert labels.shape == (24,)


def test_helpers() -> None:
    x = torch.zeros(4, 2, 3)
    assert pad_t_like_x(0.5, x) == 0.5
    assert pad_t_like_x(torch.rand(4), x).shape == (4, 1, 1)  # type: ignore[union-attr]
    matcher = SchrodingerBridgeConditionalFlowMatcher(0.5)
    t = torch.tensor([0.25])
    assert_rounded(matcher.compute_lambda(t), 2 * 0.5 * torch.sqrt(t * (1 - t)) / (0.25 + 1e-8), 4)
    with pytest.warns(UserWarning, match="Small sigma values"):
        SchrodingerBridgeConditionalFlowMatcher(1e-4)


# The plans.


@pytest.mark.parametrize("method", ["exact", "sinkhorn", "unbalanced", "partial"])
def test_plans_are_pots(method: str) -> None:
    x0, x1 = pair(12, 3)
    costs = (torch.cdist(x0, x1) ** 2).numpy()
    a = ot.unif(12)
    want = {
        "exact": lambda: ot.emd(a, a, costs),
        "sinkhorn": lambda: ot.sinkhorn(a, a, costs, 2.0),
        "unbalanced": lambda: ot.unbalanced.sinkhorn_knopp_unbalanced(a, a, costs, 2.0, 1.0),
        "partial": lambda: ot.partial.entropic_partial_wasserstein(a, a, costs, 2.0),
    }[method]()
    sampler = OTPlanSampler(method, reg=2.0)
    assert np.array_equal(sampler.get_map(x0, x1), want)
    assert np.array_equal(sampler.get_map(x0.reshape(12, 3, 1), x1.reshape(12, 1, 3)), want)


def test_samples_of_a_plan() -> None:
    x0, x1 = pair(16, 2)
    sampler = OTPlanSampler("exact")
    i, j = sampler.sample_map(sampler.get_map(x0, x1), 16, replace=False)
    assert sorted(i) == sorted(j) == list(range(16))
    rows, columns = __import__("scipy.optimize").optimize.linear_sum_assignment((torch.cdist(x0, x1) ** 2).numpy())
    assert dict(zip(i, j, strict=True)) == dict(zip(rows, columns, strict=True))
    same = OTPlanSampler("exact", normalize_cost=True).get_map(x0, x1)
    assert np.allclose(same, sampler.get_map(x0, x1))
    half = OTPlanSampler("exact").get_map(x0.bfloat16(), x1.bfloat16())  # which torchcfm refuses
    assert np.array_equal(half, OTPlanSampler("exact").get_map(x0.bfloat16().float(), x1.bfloat16().float()))


@pytest.mark.filterwarnings("ignore")  # POT's
def test_a_lost_plan_and_a_bad_one() -> None:
    near, far, bad = torch.zeros(4, 2), 1e4 * torch.ones(4, 2), torch.full((4, 2), float("nan"))
    sampler = OTPlanSampler("unbalanced", reg=1e-3)
    with pytest.warns(UserWarning, match="reverting to uniform"):
        plan = sampler.get_map(near, far)
    assert np.allclose(plan, 1 / 16)
    sampler = OTPlanSampler("sinkhorn")
    with pytest.raises(ValueError, match=r"x0, x1: expected a finite plan"):
        sampler.get_map(bad, far)
    with pytest.raises(ValueError, match="method: expected one of 'exact'"):
        OTPlanSampler("nearest")


def test_trajectories_go_from_population_to_population() -> None:
    seed()
    base = torch.randn(10, 1, 2)
    populations = torch.cat([base, (base + 5)[torch.randperm(10)], (base - 3)[torch.randperm(10)]], 1)
    found = OTPlanSampler("exact").sample_trajectory(populations)
    assert found.shape == (10, 3, 2)
    assert np.allclose(found[:, 1] - found[:, 0], 5, atol=1e-5)
    assert np.allclose(found[:, 2] - found[:, 0], -3, atol=1e-5)


def test_wasserstein_distances() -> None:
    x0, x1 = pair(20, 3)
    distances, a = torch.cdist(x0, x1), ot.unif(20)
    assert wasserstein(x0, x1) == math.sqrt(ot.emd2(a, a, (distances**2).numpy()))
    assert wasserstein(x0, x1, "exact", power=1) == ot.emd2(a, a, distances.numpy())
    assert wasserstein(x0, x1, "sinkhorn", reg=1.0, power=1) == ot.sinkhorn2(
        a, a, distances.numpy(), 1.0, numItermax=10**7
    )
    with pytest.raises(ValueError, match="method"):
        wasserstein(x0, x1, "noname")
    with pytest.raises(AssertionError, match="power: expected 1 or 2, got 3"):
        wasserstein(x0, x1, power=3)


def test_a_formula_replaced_on_the_class_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConditionalFlowMatcher, "compute_sigma_t", lambda self, t: 0.0)
    x0, x1 = pair(4, 3)
    t, xt, _ = ConditionalFlowMatcher(5.0, strict=False).sample_location_and_conditional_flow(x0, x1)
    assert torch.equal(xt, t[:, None] * x1 + (1 - t[:, None]) * x0 + 0.0 * x0)
