"""Gradients of log-densities: those of a plain implementation, and training."""

from __future__ import annotations

import math

import pytest
import torch
from likelihood_problems import data, network, rng
from torch import Tensor, nn

from fmkernels.likelihood.density import log_prob


def plain_log_prob(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Euler from 1 to 0 with full Jacobians, as a textbook has it."""
    total = torch.zeros(x.shape[0], dtype=x.dtype)
    h = 1.0 / steps
    for i in range(steps):
        t = torch.tensor(1.0 - i * h, dtype=x.dtype)
        jacobian = torch.stack([torch.func.jacrev(lambda one, t=t: model(one[None], t)[0])(one) for one in x])
        total = total - h * jacobian.diagonal(dim1=1, dim2=2).sum(1)
        x = x - h * model(x, t)
    return -0.5 * x.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi) + total


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_gradients_are_those_of_a_plain_implementation(mode: str) -> None:
    model, x = network((3, 2)), data((3, 2)).requires_grad_()
    inputs = (x, *model.parameters())
    expected = plain_log_prob(model, x, 4)
    result = log_prob(model, x, method="euler", steps=4, gradient=True, mode=mode).log_prob
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    # the last bias moves no divergence, but the state
    for ours, plain in zip(
        torch.autograd.grad(result.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)


def test_gradcheck_and_nothing_recorded_without_gradient() -> None:
    model, x = network((2, 2), hidden=4), data((2, 2)).requires_grad_()

    def score(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        return log_prob(
            lambda x, t: torch.func.functional_call(model, named, (x, t)),
            x,
            method="midpoint",
            steps=2,
            gradient=True,
            divergence="hutchinson",
            probes=2,
            generator=rng(2),
        ).log_prob

    assert torch.autograd.gradcheck(score, (x, *model.parameters()))
    result = log_prob(model, x, method="midpoint", steps=2)
    assert not result.log_prob.requires_grad
    assert not result.x_0.requires_grad
    with torch.no_grad():
        assert not log_prob(model, x, method="midpoint", steps=2, gradient=True).log_prob.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_maximum_likelihood_training_lowers_the_loss() -> None:
    model = network((64, 2), hidden=16)
    x_1 = 0.5 * data((64, 2)) + 1.0
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -log_prob(model, x_1, method="midpoint", steps=3, gradient=True).log_prob.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_without_gradient_no_graph_outlives_its_evaluation() -> None:
    alive: list[int] = []
    count = 0

    class Token:
        def __del__(self) -> None:
            nonlocal count
            count -= 1

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal count
            count += 1
            ctx.token = Token()
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad

    base = network((2, 3))

    def model(x: Tensor, t: Tensor) -> Tensor:
        alive.append(count)
        return base(Counted.apply(x), t)

    log_prob(model, data((2, 3)), method="rk4", steps=5)
    assert max(alive) <= 1
    assert count == 0
