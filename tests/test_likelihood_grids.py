"""The grid of a log-density is that of fm.sample, reversed in time, whatever gives it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fmkernels as fm

X = torch.tensor([[0.3, -1.2], [1.4, 0.2], [-0.6, 0.9]], dtype=torch.float64)
ROWS = np.stack([np.linspace(a, b, 9) for a, b in ((0.0, 1.0), (0.2, 0.7), (0.1, 1.0))], 1)  # (S + 1, B)
GRIDS = {
    "whole": np.linspace(0.0, 1.0, 9),
    "own ends": np.linspace(0.2, 0.8, 9),
    "uneven": np.linspace(0.1, 0.9, 9) ** 2,
    "own start": np.linspace(0.3, 1.0, 9),
    "of each sample": ROWS,
}


def net(x: Tensor, t: Tensor) -> Tensor:
    return -x * t[:, None] + torch.sin(x)


def schedule(grid: np.ndarray) -> Any:
    return {"steps": 8, "schedule": lambda n: grid.copy()}


def same(a: fm.LogProb, b: fm.LogProb) -> None:
    for name in ("log_prob", "x_0", "x_1", "delta_log_p"):
        assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("method", ["rk4", "ab2"])
def test_a_schedule_is_the_grid_that_it_gives(grid: np.ndarray, method: str) -> None:
    x_1, result = fm.sample_with_log_prob(net, X, method=method, **schedule(grid))
    assert torch.equal(x_1, fm.sample(net, X, method=method, **schedule(grid))[0])
    same(result, fm.sample_with_log_prob(net, X, method=method, time_grid=grid)[1])
    there = fm.log_prob(net, X, method=method, **schedule(grid))
    same(there, fm.log_prob(net, X, method=method, time_grid=grid))
    assert torch.equal(there.x_0, fm.sample(net, X, method=method, time_grid=grid[::-1].copy())[0])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_either_direction_is_the_same_grid(grid: np.ndarray) -> None:
    down = grid[::-1].copy()
    for call in (fm.log_prob, lambda *args, **how: fm.sample_with_log_prob(*args, **how)[1]):
        want = call(net, X, method="heun2", time_grid=grid)
        same(call(net, X, method="heun2", time_grid=down), want)
        same(call(net, X, method="heun2", **schedule(down)), want)


def test_a_grid_inside_gives_the_density_between_its_ends() -> None:
    """dx/dt = a x: the density at 0.8 is that at 0.2, widened by e^(0.6 a)."""
    a = 0.7
    result = fm.log_prob(lambda x, t: a * x, X, method="rk4", **schedule(GRIDS["own ends"]))
    factor = np.exp(0.6 * a)
    want = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), factor).log_prob(X).sum(1)
    torch.testing.assert_close(result.log_prob, want, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(result.x_0, X / factor, rtol=1e-7, atol=1e-7)


def test_an_interval_maps_the_schedule() -> None:
    for name, own in (("whole", (0.25, 0.75)), ("own ends", (0.35, 0.65))):
        got = fm.log_prob(net, X, method="rk4", t_0=0.25, t_1=0.75, **schedule(GRIDS[name]))
        want = fm.log_prob(net, X, method="rk4", time_grid=np.linspace(*own, 9))
        torch.testing.assert_close(got.log_prob, want.log_prob, rtol=1e-12, atol=1e-12)
    seen: list[float] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return net(x, t)

    for t_0, t_1 in ((0.1, 0.95), (0.03, 0.29), (1e-3, 0.999)):  # t_0 + (t_1 - t_0) is not always t_1
        seen.clear()
        fm.log_prob(watched, X, method="heun2", steps=3, t_0=t_0, t_1=t_1)
        assert (seen[0], seen[-1]) == (t_1, t_0)


def test_adaptive_steps_have_no_schedule() -> None:
    want = fm.log_prob(net, X, method="dopri5", t_0=0.1)
    same(fm.log_prob(net, X, method="dopri5", t_0=0.1, schedule=lambda n: np.linspace(0.2, 0.8, n + 1)), want)


def test_a_prediction_singular_at_the_end_takes_a_schedule_that_stops_before() -> None:
    how = {"prediction": "x_1", "method": "rk4"}
    grid = np.linspace(0.05, 0.95, 9)
    got = fm.log_prob(lambda x, t: 0.5 * x, X, **how, **schedule(grid))
    same(got, fm.log_prob(lambda x, t: 0.5 * x, X, **how, time_grid=grid))
    assert got.log_prob.abs().max() < 20.0


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_source_that_writes_to_its_argument_changes_nothing(method: str) -> None:
    def clean(x: Tensor) -> Tensor:
        return -0.5 * (x * x).sum(1)

    def writes(x: Tensor) -> Tensor:
        return -0.5 * x.mul_(x).sum(1)

    same(fm.log_prob(net, X, method=method, log_p0=writes), fm.log_prob(net, X, method=method, log_p0=clean))
    x_0 = X.clone()
    got = fm.sample_with_log_prob(net, x_0, method=method, log_p0=writes)[1]
    assert torch.equal(x_0, X)
    same(got, fm.sample_with_log_prob(net, X, method=method, log_p0=clean)[1])

    def slope(log_p0: Any) -> Tensor:
        x = X.clone().requires_grad_()
        total = fm.log_prob(net, x, method="rk4", log_p0=log_p0, gradient=True).log_prob.sum()
        return torch.autograd.grad(total, x)[0]

    torch.testing.assert_close(slope(lambda x: -0.5 * x.square_().sum(1)), slope(clean))
