"""Branches that few calls reach, each seen by one: every test here is the only one that saw some small bug."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from rounding import assert_rounded, roundings_of_sum
from test_step_control import IMPLS, State, rules
from torch import Tensor

import fmkernels as fm
from fmkernels import _cache
from fmkernels.guidance.base import scale_at
from fmkernels.ops.step_control.op import Clock
from fmkernels.solvers.methods.runge_kutta import stage_time
from fmkernels.solvers.programs.builder import Builder
from fmkernels.solvers.programs.captures import signature

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)
D = torch.float64


def field(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3.0 * x) * (0.5 + t.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1)))


def test_a_bool_is_no_number_of_steps() -> None:
    for call in (
        lambda: fm.sample(field, X, steps=True),
        lambda: fm.log_prob(field, X, probes=True),
        lambda: fm.randn((2, 2), seed=1, row_offset=True),
    ):
        with pytest.raises(TypeError, match="expected an int"):
            call()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_weights_of_what_is_masked_out_do_not_count(bad: float, impl: str) -> None:
    mask = torch.tensor([True, False, True, True])
    weight = torch.where(mask, 2.0, bad)
    pred = X.clone().requires_grad_()
    loss = fm.regression_loss(pred, [0.5 * X], [1.0], weight=weight, mask=mask, impl=impl)
    want = 2.0 * (0.5 * X[mask]).square().mean()
    assert_rounded(loss, want, 2 * (2 + roundings_of_sum(X.numel())))
    (grad,) = torch.autograd.grad(loss, pred)
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_step_to_the_end_ends_there_to_the_last_bit(impl: str) -> None:
    t = -torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=D)
    end = torch.full_like(t, 0.3)
    assert bool((t + (end - t) != end).any())
    state = State(t.clone(), end)
    state.clock[Clock.H] = end - t
    state.control(torch.full_like(t, 0.5), rules(), impl)
    assert torch.equal(state[Clock.T], end)


def test_the_last_stage_is_at_the_steps_end_to_the_last_bit() -> None:
    times = [(t, 0.3) for t in np.linspace(-0.99, -0.01, 40)]
    assert any(t + (u - t) != u for t, u in times)
    assert all(stage_time(t, u, 1.0) == u and stage_time(t, u, 0.0) == t for t, u in times)


def test_the_scale_of_an_exponential_sde_is_in_its_noise() -> None:
    """std^2 = sigma^2 (1 - e^(-2 scale L)): its logarithm is linear in the scale."""
    t, u = torch.tensor([0.2, 0.5], dtype=D), torch.tensor([0.3, 0.7], dtype=D)
    path = fm.paths.CondOT()

    def exponent(scale: float) -> Tensor:
        std = fm.SDE("sigma", scale, method="exponential")._exponential(path, t, u).std
        return -torch.log1p(-((std / (1.0 - u)) ** 2))

    # the logarithm's argument is 1 - e^(-2 L), of which the exponent forgets what is below its last place
    assert_rounded(exponent(0.25), 0.25 * exponent(1.0), 16, size=1.0)
    assert bool((exponent(1.0) > 0.0).all())


@pytest.mark.parametrize("name", ["DEIS", "DPMSolverPP"])
def test_the_lower_order_of_a_last_step_is_that_of_the_last_step(name: str) -> None:
    from fmkernels.solvers.methods import diffusion

    def trajectory(lower: bool | str) -> Any:
        method = getattr(diffusion, name)(order=3, lower_order_final=lower)
        path = fm.paths.OptimalTransport()
        return fm.sample(field, X, method=method, steps=5, path=path, return_trajectory=True)[1].trajectory

    low, full = trajectory("auto"), trajectory(False)
    assert torch.equal(low[3], full[3])
    assert not torch.equal(low[-1], full[-1])


def test_a_captured_graph_is_for_one_order_in_memory() -> None:
    y = torch.zeros(3, 3)
    keys = {signature({"y": value}, []) for value in (y, y.t(), y.double(), y[:2])}
    assert len(keys) == 4


class Twice(fm.guidance.Guidance):
    factor = 2.0
    plan_key = "the same of both classes"

    def branches(self, model: Any, model_kwargs: Any) -> Any:
        return {"": (model, model_kwargs)}

    def velocity(self, builder: Any, x: Any, t: Any) -> Any:
        return builder.evaluate(x, t) * self.factor


class Thrice(Twice):
    factor = 3.0


def test_two_classes_of_guidance_share_no_plan() -> None:
    fm.clear_caches()
    results = [fm.sample(field, X, steps=1, guidance=kind())[0] - X for kind in (Twice, Thrice)]
    # x + dt v - x forgets what is below the last place of x + dt v
    assert_rounded(results[1], 1.5 * results[0], 8, size=X.abs() + results[1].abs())


def test_coefficients_of_each_sample_are_kept_for_one_dtype() -> None:
    """The times for the network are float64 beside both."""
    grid = torch.linspace(0.0, 1.0, 4, dtype=D)[:, None] ** torch.linspace(1.0, 2.0, 4, dtype=D)

    def solve(x: Tensor) -> Tensor:
        return fm.sample(field, x, time_grid=grid, time_dtype=D)[0]

    fm.clear_caches()
    wide = solve(X.double())
    fm.clear_caches()
    solve(X)
    assert torch.equal(solve(X.double()), wide)


@pytest.mark.parametrize("shape", ["batch", "scalar"])
def test_reversible_solves_have_times_of_the_shape_that_is_asked_for(shape: str) -> None:
    seen = set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.add(t.dim())
        return -x

    fm.sample(model, X.clone(), steps=2, method="midpoint", gradient="reversible", time_shape=shape)
    assert seen == {1 if shape == "batch" else 0}


def test_a_weight_that_is_a_function_needs_a_path_and_times_too() -> None:
    t = torch.rand(3)
    for weight in (None, lambda t: 1.0 + t, t):
        with pytest.raises(TypeError, match="path: expected a path"):
            fm.weightings.resolve(weight, 3, t)
        with pytest.raises(TypeError, match=r"t: expected a torch\.Tensor"):
            fm.weightings.resolve(weight, fm.paths.CondOT(), 0.5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_in_the_first_state_alone_is_kept_in_the_error(impl: str) -> None:
    first, second = X.clone(), X + 1.0
    first[2, 1] = math.nan
    _, norm = fm.combine([first, second], [0.0, 1.0], error_coefficients=[0.0, 0.1], rtol=1e-3, atol=1e-3, impl=impl)
    assert norm.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["squared", "huber", "pseudo_huber"])
def test_a_prediction_that_is_no_number_has_no_derivative_that_is_one(kind: str, impl: str) -> None:
    """A gradient of delta there would hide it from who looks for it."""
    pred = torch.cat([X, X, X], 1)
    pred[1, 4] = math.nan
    pred.requires_grad_()
    loss = fm.regression_loss(pred, [torch.zeros_like(pred)], [1.0], kind=kind, delta=0.5, reduction="none", impl=impl)
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    assert torch.equal(grad.isnan(), pred.isnan())


def test_what_is_used_is_kept_before_what_is_not() -> None:
    budget = _cache.Budget(10_000)
    cache: _cache.Cache[bytes] = _cache.Cache("test", budget)
    made = []
    try:
        for i in range(100):
            cache.get(i + 1, lambda: bytes(1000))
            cache.get(0, lambda: made.append(0) or bytes(1000))
        assert made == [0]
    finally:
        del _cache._CACHES["test"]
        budget.caches.clear()


class Unkeyed(fm.guidance.Guidance):
    branches = Twice.branches
    velocity = Twice.velocity
    factor = 2.0


def test_a_class_attribute_of_a_guidance_of_ones_own_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    fm.clear_caches()
    guidance = Unkeyed()
    first = fm.sample(field, X, steps=1, guidance=guidance)[0] - X
    monkeypatch.setattr(Unkeyed, "factor", 3.0)
    assert_rounded(fm.sample(field, X, steps=1, guidance=guidance)[0] - X, 1.5 * first, 8, size=X.abs() + first.abs())


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_max_order_is_the_order_of_adams_methods(method: str) -> None:
    def error(order: int) -> float:
        options = {"step_size": 0.1, "max_order": order}
        y = fm.odeint(
            lambda t, y: -y, torch.ones(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D), method=method, options=options
        )
        return abs(float(y[-1]) - math.exp(-1.0))

    assert error(2) > 10.0 * error(4) > 0.0


def test_the_mean_log_density_is_of_what_gets_noise() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, True, True]])

    def solve(reduction: str) -> Any:
        return fm.sample(
            field, X, steps=2, sde=fm.SDE(log_prob=reduction), noise_transform=fm.MaskedNoise(mask),
            generator=torch.Generator().manual_seed(0),
        )[1].log_prob  # fmt: skip

    assert_rounded(solve("mean")[0], solve("sum")[0] / mask.sum(1), 4)


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_both_ends_of_an_interval_of_guidance_belong_to_it(kind: Any) -> None:
    t = kind([0.1, 0.25, 0.5, 0.75, 0.9])
    found = scale_at(Builder([0.0, 1.0], fm.paths.CondOT()), 2.0, t, (0.25, 0.75))
    assert found.tolist() == [1.0, 2.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_that_is_nothing_but_noise_has_the_states_dtype_and_layout(dtype: torch.dtype) -> None:
    def renewed(builder: Builder) -> None:
        for _ in builder.steps():
            builder.advance(builder.noise())

    x = torch.zeros(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
    found = fm.sample(field, x, steps=2, method=renewed, generator=torch.Generator().manual_seed(3))[0]
    assert found.dtype == dtype
    assert found.stride() == x.stride()
    assert 0.5 < float(found.float().std()) < 1.5
