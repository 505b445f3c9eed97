"""Gradients through implicit methods: of states, parameters and times, with and without step control."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from implicit_problems import PAIRS, TIGHT, every_tableau, times
from torch import Tensor

from fmkernels.solvers.implicit.solve import solve_implicit
from fmkernels.solvers.methods.implicit_tableaus import ImplicitTableau


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 3, dtype=torch.float64)
        self.outer = torch.nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(y) + t)) - 5.0 * y


@pytest.mark.parametrize("per_sample", [False, True])
@every_tableau
def test_gradients(tableau: ImplicitTableau, per_sample: bool) -> None:
    torch.manual_seed(0)
    y0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    t = times(0.0, 0.3, 0.7).requires_grad_()

    def solve(y0: Tensor, weight: Tensor, t: Tensor) -> Tensor:
        def func(t: Tensor, y: Tensor) -> Tensor:
            t = t[:, None] if per_sample else t
            return torch.tanh(y @ weight + t) - 3.0 * y * y * y

        options = {"step_size": 0.5, "per_sample": per_sample}
        return solve_implicit(func, y0, t, tableau.name, options, rtol=1e-13, atol=1e-13)

    assert torch.autograd.gradcheck(solve, (y0, weight, t), fast_mode=True)
    with torch.no_grad():
        plain = solve(y0, weight, t)
    torch.testing.assert_close(solve(y0, weight, t).detach(), plain, rtol=1e-13, atol=1e-13)


def values_and_gradients(method: str, options: dict[str, Any], tol: float) -> list[Tensor]:
    """Of a problem whose samples need different steps: the solution, and gradients in y0, a parameter and t."""
    generator = torch.Generator().manual_seed(1)
    rates = times(1.0, 30.0)[:, None].requires_grad_()
    y0 = torch.randn(2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    t = times(0.0, 0.2, 0.6).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.cos(10.0 * (t[:, None] if t.dim() else t)) - rates * y**3

    ys = solve_implicit(func, y0, t, method, options, rtol=tol, atol=tol)
    return [ys.detach(), *torch.autograd.grad((ys * ys.detach().sin()).sum(), (y0, rates, t))]


@pytest.fixture(scope="module")
def fine() -> list[Tensor]:
    return values_and_gradients("kencarp4", {"step_size": 0.005}, 1e-11)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", PAIRS)
def test_gradients_with_step_control(method: str, per_sample: bool, fine: list[Tensor]) -> None:
    """Against fine steps of a fixed size: rejected steps and rows that wait leave no trace."""
    for got, wanted in zip(values_and_gradients(method, {"per_sample": per_sample}, 1e-6), fine, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_gradients_of_a_module_and_none_without_need() -> None:
    torch.manual_seed(2)
    net, y0, t = Net(), torch.randn(3, 2, dtype=torch.float64), times(0.0, 1.0)
    ys = solve_implicit(net, y0, t, "sdirk2", {"step_size": 0.25})
    ys[-1].square().sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    with torch.no_grad():
        parameter, eps = net.inner.weight, 1e-5
        sums = []
        for sign in (1.0, -1.0):
            parameter[0, 1] += sign * eps
            sums.append(solve_implicit(net, y0, t, "sdirk2", {"step_size": 0.25}, **TIGHT)[-1].square().sum())
            parameter[0, 1] -= sign * eps
        assert not sums[0].requires_grad
    assert math.isclose(float(grads[0][0, 1]), float(sums[0] - sums[1]) / (2 * eps), rel_tol=1e-6)
    net.requires_grad_(False)
    assert not solve_implicit(net, y0, t, "trbdf2").requires_grad
    with torch.inference_mode():
        solve_implicit(net, y0, t, "trbdf2")


@pytest.mark.parametrize("method", ["sdirk2", "trapezoid", "radauIIA3", "kvaerno3"])
def test_gradients_of_what_the_field_uses_only_later(method: str) -> None:
    weight, y0, t = torch.tensor(1.5, dtype=torch.float64, requires_grad=True), times(1.0, 2.0), times(0.0, 0.5, 1.0)

    def late(t: Tensor, y: Tensor) -> Tensor:
        return -weight * y if t > 0.5 else -1.5 * y

    ys = solve_implicit(late, y0, t, method, {"step_size": 0.05}, rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(ys[-1].sum(), weight)
    torch.testing.assert_close(grad, -0.5 * ys[-1].sum().detach(), rtol=0.1, atol=0.0)


def test_second_derivatives_are_an_error() -> None:
    y0 = times(1.0).requires_grad_()
    ys = solve_implicit(lambda t, y: -(y**2), y0, times(0.0, 1.0), "implicit_euler")
    (grad,) = torch.autograd.grad(ys[-1].sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.grad(grad.sum(), y0)
