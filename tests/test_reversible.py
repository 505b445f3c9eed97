"""The reversible scheme: its order, its inverse, and its gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from adjoint_problems import D, Net, assert_all_close, loss_of
from torch import Tensor

import fmkernels as fm
from fmkernels.solvers.methods import registry as methods
from fmkernels.solvers.methods.reversible import Scheme


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("coupling", [True, 0.8])
@pytest.mark.parametrize("size", [None, 0.04])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ralston"])
def test_reversible_gradients_are_those_of_the_plain_scheme(method: str, size: float | None, coupling: Any) -> None:
    net = Net()
    y0 = torch.randn(3, 2, dtype=D, requires_grad=True)
    t = torch.tensor([1.0, 0.7, 0.3, 0.0], dtype=D, requires_grad=True)
    options = {"reversible": coupling} if size is None else {"reversible": coupling, "step_size": size}
    y = fm.odeint(net, y0, t, method=method, options=options)

    tableau = methods.resolve({"rk4": "rk4_38"}.get(method, method)).tableau  # type: ignore[attr-defined]
    scheme = Scheme(net, tableau, [], 0.999 if coupling is True else coupling)
    a = b = y0
    states = [y0]
    for start, end in itertools.pairwise(t):
        count = 1 if size is None else math.ceil(float((start - end).detach()) / size - 1e-9)
        grid = [start + (end - start) * (i / count) for i in range(count + 1)]
        for now, later in itertools.pairwise(grid):
            a, b = scheme.forward(now, later, a, b)
        states.append(a)
    plain = torch.stack(states)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss_of(x), [y0, t, *net.used()]) for x in (y, plain)]
    assert_all_close(*grads, 1e-12)


def test_reversible_scheme_keeps_its_order_and_reverses() -> None:
    net, t = Net(), torch.tensor([0.0, 1.0], dtype=D)
    y0 = torch.randn(3, 2, dtype=D)
    net.requires_grad_(False)
    exact = fm.odeint(net, y0, t, rtol=1e-12, atol=1e-12)[1]
    for method, order in (("euler", 1), ("midpoint", 2), ("heun3", 3), ("rk4", 4)):
        errors = []
        for h in (1 / 20, 1 / 40):
            y = fm.odeint(net, y0, t, method=method, options={"reversible": True, "step_size": h})
            errors.append(float((y[1] - exact).norm()))
        assert math.log2(errors[0] / errors[1]) > order - 0.35
    a = b = y0
    scheme = Scheme(net, methods.resolve("rk4").tableau, [])  # type: ignore[attr-defined]
    grid = torch.linspace(0, 1, 31, dtype=D)
    with torch.no_grad():
        for now, later in itertools.pairwise(grid):
            a, b = scheme.forward(now, later, a, b)
        for later, now in zip(grid.flip(0)[:-1], grid.flip(0)[1:], strict=True):
            b = b + scheme.increment(later, now, a)
            a = (a - 0.001 * b - scheme.increment(now, later, b)) / 0.999
    torch.testing.assert_close(a, y0, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(b, y0, rtol=0.0, atol=1e-12)


def test_reversible_samples() -> None:
    net = Net()
    raw = torch.randn(4, 2, dtype=D, requires_grad=True)
    shift = torch.randn(2, dtype=D, requires_grad=True)  # held by the model, no parameter of it

    def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        assert t.shape == (4,)
        time = t[:, None]
        return torch.tanh(torch.cat([x, time], -1) @ net.w) @ net.v + condition * time + shift.sin()

    x_0 = torch.randn(4, 2, dtype=D, requires_grad=True)
    inputs = [x_0, raw, shift, *net.used()]
    settings: Any = {"method": "rk4", "steps": 40}
    ours, result = fm.sample(model, x_0, gradient="reversible", condition=raw.exp(), **settings)
    direct, _ = fm.sample(model, x_0, gradient="direct", condition=raw.exp(), **settings)
    torch.testing.assert_close(ours, direct, rtol=5e-9, atol=5e-9)
    grads = [torch.autograd.grad((x**2).sum(), inputs) for x in (ours, direct)]
    assert_all_close(*grads, 5e-8)
    assert result.nfe == 2 * 4 * 40
    with torch.no_grad():
        settings["return_trajectory"] = True
        same, result = fm.sample(model, x_0, gradient="reversible", condition=raw.exp(), **settings)
    assert torch.equal(same, ours)
    assert result.trajectory is not None
    assert result.trajectory.shape == (41, 4, 2)
    assert torch.equal(result.trajectory[-1], same)


def test_gradients_of_what_the_field_uses_only_later() -> None:
    weight = torch.tensor(1.5, dtype=D, requires_grad=True)

    def late(t: Tensor, y: Tensor) -> Tensor:
        return 2.0 * weight * y if t > 0.5 else -y

    y0, t = torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    settings: Any = {"method": "midpoint", "options": {"step_size": 0.125, "reversible": True}}

    def solve() -> Tensor:
        return fm.odeint(late, y0, t, **settings)[-1].sum()

    (ours,) = torch.autograd.grad(solve(), weight)
    with torch.no_grad():
        sums = []
        for value in (1.5 + 1e-5, 1.5 - 1e-5):
            weight.fill_(value)
            sums.append(solve())
    torch.testing.assert_close(ours, (sums[0] - sums[1]) / 2e-5, rtol=1e-9, atol=0.0)
    # the derivative is the parameter itself
    slope = torch.ones(2, dtype=D, requires_grad=True)
    ys = fm.odeint(lambda t, y: slope, y0, t, method="euler", options={"reversible": True})
    torch.testing.assert_close(torch.autograd.grad(ys[-1].sum(), slope)[0], torch.ones(2, dtype=D))


def test_reversible_with_times_of_each_sample_and_guidance() -> None:
    class Model(Net):
        def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
            return scale * torch.tanh(torch.cat([x, t[:, None]], -1) @ self.w) @ self.v

    model, x_0 = Model(), torch.randn(3, 2, dtype=D, requires_grad=True)
    grid = torch.linspace(0, 1, 31, dtype=D)[:, None] * torch.tensor([1.0, 0.5, 0.8], dtype=D)
    guidance = fm.guidance.CFG(1.5, negative={"scale": 0.5}, batched=False)
    settings: Any = {"method": "heun3", "time_grid": grid, "guidance": guidance}
    pairs = [fm.sample(model, x_0, gradient=gradient, **settings)[0] for gradient in ("reversible", "direct")]
    torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad((x**2).sum(), [x_0, model.w, model.v]) for x in pairs]
    assert_all_close(*grads, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("tokens", [False, True])
def test_who_waits_stays_and_has_the_gradient_of_its_own_steps(tokens: bool, dtype: torch.dtype) -> None:
    weight = torch.tensor(3.0, dtype=D, requires_grad=True)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return (torch.sin(weight * x) + 2.0 + t[(...,) + (None,) * (x.dim() - t.dim())]).to(x.dtype)

    own = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=D)
    waits = torch.tensor([[0, 0, 0, 1, 1, 2, 3], [0, 1, 2, 3, 3, 3, 3], [0, 1, 1, 1, 2, 2, 3], [2] * 7])
    x_0 = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    grid = own[waits].t()
    settings: Any = {"method": "midpoint", "gradient": "reversible", "return_trajectory": True}
    if tokens:
        x = torch.stack([x_0, x_0], 0)  # two samples of four tokens
        states = fm.sample(model, x, time_grid=grid[:, None].expand(7, 2, 4), **settings)[1].trajectory[:, 1]
    else:
        states = fm.sample(model, x_0, time_grid=grid, **settings)[1].trajectory
    want = fm.sample(model, x_0[:3], time_grid=own, **settings)[1].trajectory
    for i in range(3):
        assert torch.equal(states[:, i], want[waits[i], i])
    assert torch.equal(states[:, 3], x_0[3].expand(7, 5))
    grads = [torch.autograd.grad(x.square().sum(), [x_0, weight]) for x in (states[-1], torch.cat([want[-1], x_0[3:]]))]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4 if dtype is torch.float32 else 1e-10, atol=1e-6)


def test_reversible_refuses_what_it_cannot_do() -> None:
    y0, t = torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    func = lambda t, y: -y  # noqa: E731
    for method, options in (
        ("ab2", {"reversible": True}),
        ("rk4", {"reversible": 1.5}),
        ("rk4", {"reversible": True, "interp": "cubic"}),
        ("rk4", {"reversible": True, "grid_constructor": lambda f, y, t: t}),
    ):
        with pytest.raises(ValueError, match="expected"):
            fm.odeint(func, y0, t, method=method, options=options)
    with pytest.raises(ValueError, match="method: expected an explicit Runge-Kutta"):
        fm.sample(lambda x, t: x, (2, 2), steps=2, method="dpmpp_2m", gradient="reversible")
    with pytest.raises(ValueError, match="gradient: expected no callback"):
        fm.sample(lambda x, t: x, (2, 2), steps=2, gradient="reversible", callback=lambda *a: None)
