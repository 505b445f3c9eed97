"""Times and functions of t that a caller gives: they stay his, and what he does with them changes no other solve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fmkernels as fm

X = torch.tensor([[0.3, -1.2, 0.7], [1.4, 0.2, -0.5]], dtype=torch.float64)
OWN = np.stack([np.linspace(0.0, 1.0, 6), np.linspace(0.0, 0.8, 6)], 1)  # (S + 1, B)


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(2.0 * x) + t[:, None].to(x)


def scaled(x: Tensor, t: Tensor, s: float) -> Tensor:
    return net(x, t) * s


@pytest.fixture(autouse=True)
def fresh() -> None:
    fm.clear_caches()


# ---------------------------------------------------------------------- grids are copied


def _sequence(times: np.ndarray) -> Any:
    return list(times)


@pytest.mark.parametrize("make", [np.copy, torch.tensor, _sequence], ids=["array", "tensor", "rows"])
@pytest.mark.parametrize("given", ["time_grid", "schedule"])
@pytest.mark.parametrize("method", ["rk4", "dpmpp_2m"])
def test_a_grid_that_is_written_to_later_changes_no_other_solve(make: Any, given: str, method: str) -> None:
    def solve(grid: Any) -> Tensor:
        how = {"time_grid": grid} if given == "time_grid" else {"steps": 5, "schedule": lambda n: grid}
        return fm.sample(net, X, method=method, **how, gradient="direct")[0]

    want = fm.sample(net, X, method=method, time_grid=OWN.copy())[0]
    fm.clear_caches()
    grid = make(OWN.copy())
    solve(grid)
    for row in grid:
        row *= 0.3
    assert torch.equal(solve(make(OWN.copy())), want)


def test_a_callback_has_its_own_times() -> None:
    grid, seen = OWN.copy(), []

    def callback(step: int, t: np.ndarray, x: Tensor) -> None:
        seen.append(t.copy())
        t *= 1000.0

    want, result = fm.sample(net, X, time_grid=OWN.copy(), return_trajectory=True)
    got, told = fm.sample(net, X, time_grid=grid, callback=callback, return_trajectory=True)
    again = fm.sample(net, X, time_grid=OWN.copy())[0]
    assert np.array_equal(grid, OWN)
    assert np.array_equal(np.stack(seen), OWN[1:])
    assert torch.equal(got, want)
    assert torch.equal(again, want)
    assert torch.equal(told.times, result.times)


def test_nobody_can_write_to_the_times_of_a_plan() -> None:
    class Writes(fm.guidance.Guidance):
        def branches(self, model: Any, model_kwargs: Any) -> Any:
            return {"": (model, model_kwargs)}

        def velocity(self, builder: Any, x: Any, t: Any) -> Any:
            t *= 0.5
            return builder.evaluate(x, t)

    for method in ({}, {"sde": fm.SDE("sigma", last_step="mean", last_step_size=0.04)}):
        with pytest.raises(ValueError, match="read-only"):
            fm.sample(net, X, time_grid=OWN.copy(), guidance=Writes(), **method)


# ---------------------------------------------------------------------- plans and what functions read


def test_a_plan_is_that_of_the_default_dtype() -> None:
    sde = fm.SDE(lambda t: torch.asarray(0.3) * (1 - t))

    def solve() -> Tensor:
        return fm.sample(net, X, steps=6, sde=sde, generator=torch.Generator().manual_seed(0))[0]

    single = solve()
    torch.set_default_dtype(torch.float64)
    try:
        kept = solve()
        fm.clear_caches()
        want = solve()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(kept, want)
    assert not torch.equal(single, want)
    assert torch.equal(solve(), single)


def test_names_of_a_solver_are_those_of_its_construction() -> None:
    said, none = ["y"], ["c"]

    def model(x: Tensor, t: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return x

    solver = fm.Solver(model, 2, batched=said, shared=none)
    given = {"y": torch.ones(2), "c": torch.ones(2)}
    solver.sample(X, **given)
    said.append("nonsense")
    none.clear()
    solver.sample(X, **given)
    assert solver.batched == ("y",)
    assert solver.shared == ("c",)
    solver.shared = ["nonsense"]  # type: ignore[assignment]  # a sequence of names
    with pytest.raises(ValueError, match=r"^shared: "):
        solver.sample(X, **given)


# ---------------------------------------------------------------------- times of each sample, of adaptive methods too


@pytest.mark.parametrize("times", [2, 3, 4])  # fewer than, as many as and more than samples
def test_trajectory_of_adaptive_steps_at_times_of_each_sample(times: int) -> None:
    x = torch.cat([X, X[:1] * 2.0])
    ends = np.array([1.0, 0.8, 0.3])
    grid = np.linspace(0.0, 1.0, times)[:, None] * ends
    how = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9, "return_trajectory": True}
    end, result = fm.sample(net, x, time_grid=grid, **how)
    assert (result.status == fm.Status.SUCCESS).all()
    assert torch.equal(result.trajectory[0], x)
    assert torch.equal(result.trajectory[-1], end)
    assert torch.equal(result.times, torch.from_numpy(grid))  # as a fixed grid gives them
    for i in range(3):
        alone = fm.sample(net, x[i : i + 1], time_grid=grid[:, i], **how)[1]
        torch.testing.assert_close(result.trajectory[:, i], alone.trajectory[:, 0], rtol=1e-7, atol=1e-7)


def test_adaptive_methods_refuse_times_of_tokens() -> None:
    x = torch.zeros(2, 3, 2)
    grid = np.broadcast_to(np.linspace(0.0, 1.0, 4)[:, None, None], (4, 2, 3))
    message = r"^time_grid: expected times \(S \+ 1,\), or \(S \+ 1, B\).* got times of shape \(2, 3\)$"
    with pytest.raises(ValueError, match=message):
        fm.sample(net, x, method="dopri5", time_grid=grid)
    for how in ({}, {"method": "rk4"}):
        with pytest.raises(ValueError, match=message):
            fm.log_prob(net, x, time_grid=grid, **how)


@pytest.mark.parametrize("call", [fm.sample, fm.log_prob, fm.sample_with_log_prob])
def test_times_of_another_batch_are_told(call: Any) -> None:
    with pytest.raises(ValueError, match=r"^time_grid: expected times .* got times of shape \(2,\)$"):
        call(net, torch.zeros(3, 2), method="rk4", time_grid=OWN)
    with pytest.raises(ValueError, match=r"^time_grid: expected times .* got times of shape \(2,\)$"):
        call(net, torch.zeros(3, 2), method="dopri5", time_grid=OWN)


@pytest.mark.parametrize("call", [fm.sample, fm.log_prob, fm.sample_with_log_prob])
@pytest.mark.parametrize("gradient", ["none", "direct", "reversible"])
def test_one_time_for_all_is_refused_where_each_sample_has_its_own(call: Any, gradient: str) -> None:
    how = {"gradient": gradient} if call is fm.sample else {"gradient": gradient != "none"}
    for given in ({"time_grid": OWN}, {"steps": 5, "schedule": lambda n: OWN}):
        with pytest.raises(ValueError, match=r"^time_shape: expected 'batch' with times of each sample"):
            call(net, X, method="midpoint", time_shape="scalar", **how, **given)
    with pytest.raises(ValueError, match=r"^time_shape: "):
        fm.sample(net, torch.zeros(2, 3, 2), time_grid=np.stack([OWN] * 3, -1), time_shape="scalar")
