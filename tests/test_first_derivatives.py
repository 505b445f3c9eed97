"""Derivatives that are not to be had: an error, never a part left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from odeint_problems import D, times
from torch import Tensor

import fmkernels as fm

Solve = Callable[[Tensor, Tensor], Tensor]


def _reversible(x: Tensor, a: Tensor) -> Tensor:
    options = {"step_size": 0.05, "reversible": True}
    return fm.odeint(lambda t, y: a * y, x, times(0.0, 1.0), method="rk4", options=options)[-1]


def _reversible_sample(x: Tensor, a: Tensor) -> Tensor:
    return fm.sample(lambda x, t: a * x, x, steps=20, method="rk4", gradient="reversible")[0]


def _adjoint(x: Tensor, a: Tensor) -> Tensor:
    return fm.odeint_adjoint(lambda t, y: a * y, x, times(0.0, 1.0), adjoint_params=(a,))[-1]


def _implicit(x: Tensor, a: Tensor) -> Tensor:
    return fm.odeint(lambda t, y: a * y, x, times(0.0, 1.0), method="gl4", options={"step_size": 0.05})[-1]


def _event_time(x: Tensor, a: Tensor) -> Tensor:
    return fm.odeint_event(lambda t, y: a * y, x, times(0.0), event_fn=lambda t, y: y.sum() - 2.0)[0]


def _event_state(x: Tensor, a: Tensor) -> Tensor:
    solution = fm.odeint_event(lambda t, y: a * y, x, times(0.0), event_fn=lambda t, y: y.sum() + t - 2.0)[1]
    return solution[-1]


@pytest.mark.parametrize("solve", [_reversible, _reversible_sample, _adjoint, _implicit, _event_time, _event_state])
def test_a_gradient_penalty_is_an_error(solve: Solve) -> None:
    x, a = torch.tensor([1.3], dtype=D, requires_grad=True), torch.tensor(0.7, dtype=D, requires_grad=True)
    loss = solve(x, a).pow(3).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(grad, expected)
    # beside a loss that has a derivative, and where what is unused is allowed: nothing hides the missing part
    penalised = grad.square().sum() + loss
    for leaf in (x, a):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(penalised, leaf, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        penalised.backward()


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_recorded_solves_have_every_derivative(method: str) -> None:
    x, a = torch.tensor([1.3], dtype=D, requires_grad=True), torch.tensor(0.7, dtype=D, requires_grad=True)
    options = {"step_size": 0.01} if method == "rk4" else {}
    y = fm.odeint(lambda t, y: a * y, x, times(0.0, 1.0), method=method, options=options, rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(y[-1].pow(3).sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(grad.square().sum(), a)
    slope = 3.0 * x.detach() ** 2 * torch.exp(3.0 * a.detach())
    torch.testing.assert_close(got, (2.0 * slope * 3.0 * slope).sum(), rtol=1e-7, atol=0.0)


def test_what_transforms_hide_is_told() -> None:
    solution = fm.odeint_dense(lambda t, y: -y, torch.ones(2), 0.0, 1.0)
    with pytest.raises(ValueError, match="t: expected all times in one tensor"):
        torch.func.vmap(solution)(torch.tensor([0.1, 0.5]))
    torch.testing.assert_close(torch.func.jacfwd(solution)(torch.tensor(0.5)), -solution(0.5), rtol=1e-5, atol=0.0)
    for transformed in (torch.func.vmap, torch.func.grad):
        with pytest.raises(RuntimeError, match=r"do not run within torch.func's transforms"):
            transformed(lambda x: fm.log_prob(lambda x, t: -x, x).log_prob.sum())(torch.randn(3, 2, 2))
