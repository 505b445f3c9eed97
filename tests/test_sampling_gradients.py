"""Gradients of samples with respect to all that goes in: right by finite differences in float64, or told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fmkernels as fm
from fmkernels import guidance

X = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(2, 3)
MODES = ["direct", "checkpoint", "reversible"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64))

    def forward(self, x, t, y=None, tree=None):
        extra = 0.0 if tree is None else tree["a"][0]
        return torch.tanh(x * self.w + t[:, None]) + (0.0 if y is None else torch.sin(y) * x) + extra


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def cases() -> dict[str, tuple[Callable[..., torch.Tensor], torch.Tensor]]:
    """For each: samples as a function of (mode, keyword arguments), and what they have a gradient to."""

    def of_x_0():
        x = X.clone().requires_grad_()
        return lambda **kw: fm.sample(Net(), x, **kw)[0], x

    def of_a_parameter():
        net = Net()
        return lambda **kw: fm.sample(net, X, **kw)[0], net.w

    def of_what_a_function_reads():
        w = leaf(0.5, -0.3, 0.1)
        return lambda **kw: fm.sample(lambda x, t: torch.sin(x * w), X, **kw)[0], w

    def of_a_keyword_argument():
        y = leaf(0.4, 0.9, -0.2)
        return lambda **kw: fm.sample(Net(), X, y=y, **kw)[0], y

    def of_a_tree():
        a = leaf(0.4, 0.9, -0.2)
        return lambda **kw: fm.sample(Net(), X, model_kwargs={"tree": {"a": [a]}}, **kw)[0], a

    def of_another_prediction():
        net = Net()
        grid = [0.1, 0.4, 0.8]
        return lambda **kw: fm.sample(net, X, prediction="x_1", **{**kw, "steps": None, "time_grid": grid})[0], net.w

    def of_guidance():
        y = leaf(0.4, 0.9, -0.2)
        rule = guidance.CFG(2.0, negative={"y": torch.zeros(3, dtype=torch.float64)})
        return lambda **kw: fm.sample(Net(), X, y=y, guidance=rule, **kw)[0], y

    def of_the_negative():
        y, null = torch.ones(3, dtype=torch.float64), leaf(0.4, 0.9, -0.2)
        rule = guidance.CFG(2.0, negative={"y": null})
        return lambda **kw: fm.sample(Net(), X, y=y, guidance=rule, **kw)[0], null

    def of_a_weak_model():
        weak = Net()
        rule = guidance.AutoGuidance(weak, 2.0)
        return lambda **kw: fm.sample(Net(), X, guidance=rule, **kw)[0], weak.w

    def of_rescaled_guidance():
        y = leaf(0.4, 0.9, -0.2)
        rule = guidance.CFG(2.0, negative={"y": torch.zeros(3, dtype=torch.float64)}, rescale=0.5)
        return lambda **kw: fm.sample(Net(), X, y=y, guidance=rule, **kw)[0], y

    return {name: make() for name, make in locals().items() if callable(make) and name.startswith("of_")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", cases())
def test_gradients_are_those_of_finite_differences(name: str, mode: str) -> None:
    solve, source = cases()[name]
    settings = {"steps": 3, "method": "midpoint", "gradient": mode}
    result = solve(**settings)
    assert result.requires_grad
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=torch.float64).reshape(result.shape)
    (found,) = torch.autograd.grad((result * weights).sum(), source)
    assert not solve(**{**settings, "gradient": "none"}).requires_grad
    with torch.no_grad():
        flat, expected = source.view(-1), torch.empty(source.numel(), dtype=torch.float64)
        for i in range(source.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                kept = flat[i].item()
                flat[i] = kept + step
                ends.append((solve(**settings) * weights).sum())
                flat[i] = kept
            expected[i] = (ends[0] - ends[1]) / 2e-6
    torch.testing.assert_close(found.reshape(-1), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_times_are_told(mode: str) -> None:
    grid = torch.linspace(0.0, 1.0, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"time_grid: expected times without a gradient, which fm.odeint alone has, got"
    ):
        fm.sample(Net(), X, time_grid=grid, method="midpoint", gradient=mode)
    with pytest.raises(ValueError, match="time_grid: expected times without a gradient"):
        fm.log_prob(Net(), X, time_grid=grid, method="midpoint", gradient=True)
    with torch.no_grad():
        fm.sample(Net(), X, time_grid=grid, method="midpoint", gradient=mode)
    assert not fm.sample(Net(), X, time_grid=grid)[0].requires_grad


@pytest.mark.parametrize("kind", ["tensor", "parameter"])
def test_gradients_of_guidance_scales_are_told(kind: str) -> None:
    scale = leaf(2.0, 3.0) if kind == "tensor" else nn.Parameter(torch.tensor(2.0))
    null = {"y": 0.0}
    for make in (
        lambda: guidance.CFG(scale, negative=null),
        lambda: guidance.APG(scale, negative=null),
        lambda: guidance.AutoGuidance(Net(), scale),
        lambda: guidance.ClassifierGuidance(Net(), scale),
    ):
        with pytest.raises(ValueError, match="scale: expected numbers without a gradient"):
            make()
    with pytest.raises(ValueError, match=r"conditions\[0\]: expected numbers without a gradient"):
        guidance.MultiCondition([({"y": 0.0}, scale)])


class Learnable(fm.paths.Path):
    def __init__(self) -> None:
        self.power = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def alpha(self, t):
        return t**self.power

    def sigma(self, t):
        return 1.0 - t


@pytest.mark.parametrize("mode", ["direct", "checkpoint"])
def test_gradients_of_what_becomes_coefficients_are_told(mode: str) -> None:
    """A learnable schedule, a scale or a diffusion that a function computes: its gradient vanished on fixed grids."""
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    rule = guidance.CFG(lambda t: w * t, negative={"y": torch.zeros(3, dtype=torch.float64)})
    grid, y = [0.1, 0.4, 0.8], torch.ones(3, dtype=torch.float64)
    calls = {
        "scale": lambda **kw: fm.sample(Net(), X, guidance=rule, time_grid=grid, y=y, **kw),
        "path": lambda **kw: fm.sample(Net(), X, prediction="x_1", path=Learnable(), time_grid=grid, **kw),
        "sde": lambda **kw: fm.sample(Net(), X, method=fm.SDE(lambda t: w * t), time_grid=grid, **kw),
    }
    for _ in range(2):  # also where the plan is known
        for name, call in calls.items():
            assert not call()[0].requires_grad
            with pytest.raises(ValueError, match=f"{name}: expected values without a gradient"):
                call(gradient=mode)
            with torch.no_grad():
                call(gradient=mode)


def test_gradients_of_a_scale_by_a_function_of_the_state() -> None:
    """Where the velocity is evaluated as a function, what a scale's function reads has its gradient."""
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    rule = guidance.CFG(lambda t: w * t, negative={"y": torch.zeros(3, dtype=torch.float64)})
    y, t = torch.ones(3, dtype=torch.float64), torch.full((2,), 0.3, dtype=torch.float64)
    weights = torch.linspace(0.5, 1.5, X.numel(), dtype=torch.float64).reshape(X.shape)
    (found,) = torch.autograd.grad((weights * rule.at(Net(), {"y": y})(X, t)).sum(), w)
    c, u = (Net()(X, t, y) for y in (y, torch.zeros(3, dtype=torch.float64)))
    torch.testing.assert_close(found, 0.3 * (weights * (c - u)).sum().detach(), rtol=1e-12, atol=0.0)
    solved = fm.sample(Net(), X, guidance=rule, steps=3, method="midpoint", gradient="reversible", y=y)[0]
    (found,) = torch.autograd.grad((weights * solved).sum(), w)
    ends = []
    for step in (1e-6, -1e-6):
        moved = guidance.CFG(lambda t, step=step: (w.detach() + step) * t, negative=rule.negative)
        solved = fm.sample(Net(), X, guidance=moved, steps=3, method="midpoint", gradient="reversible", y=y)[0]
        ends.append((weights * solved).sum())
    expected = (ends[0] - ends[1]).detach() / 2e-6
    np.testing.assert_allclose(float(found), float(expected), rtol=1e-6)


@pytest.mark.parametrize("name", ["jacrev", "vjp", "grad"])
def test_reverse_transforms_of_a_solve_without_gradients_are_told(name: str) -> None:
    transform = getattr(torch.func, name)

    def solve(x: torch.Tensor, **options: Any) -> torch.Tensor:
        samples = fm.sample(lambda x, t: -x, x, steps=5, **options)[0]
        return samples.sum() if transform is torch.func.grad else samples

    arguments = (X,) if transform is torch.func.vjp else ()

    def apply(**options: Any) -> Any:
        found = transform(lambda x: solve(x, **options), *arguments)
        return found if arguments else found(X)

    with pytest.raises(ValueError, match=r"gradient: expected .direct. within torch\.func"):
        apply()
    apply(gradient="direct")
    jacobian = torch.func.jacfwd(solve)(X)  # forward mode records nothing
    assert jacobian.abs().max() > 0.1


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
def test_a_grid_of_constants_in_a_tensor_is_one_within_transforms(name: str) -> None:
    def solve(x: torch.Tensor, grid: Any) -> torch.Tensor:
        samples = fm.sample(lambda x, t: torch.sin(x), x, time_grid=grid, gradient="direct")[0]
        return samples.sum() if name == "hessian" else samples

    transform = getattr(torch.func, name)
    expected = transform(lambda x: solve(x, [0.0, 0.5, 1.0]))(X)
    torch.testing.assert_close(transform(lambda x: solve(x, torch.tensor([0.0, 0.5, 1.0])))(X), expected)
    torch.testing.assert_close(transform(lambda x: solve(x, torch.linspace(0.0, 1.0, 3)))(X), expected)


def test_a_grid_that_a_transform_acts_on_is_told() -> None:
    grid = torch.tensor([0.0, 0.5, 1.0])

    def solve(g: torch.Tensor) -> torch.Tensor:
        return fm.sample(lambda x, t: torch.sin(x), X, time_grid=g, gradient="direct")[0]

    for call in (
        lambda: torch.func.jacrev(solve)(grid),
        lambda: torch.func.jacfwd(solve)(grid),
        lambda: torch.func.jvp(solve, (grid,), (torch.ones(3),)),
        lambda: torch.func.vmap(solve)(grid[None]),
    ):
        with pytest.raises(ValueError, match=r"^time_grid: expected (times|values)"):
            call()
