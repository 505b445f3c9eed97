"""Stochastic differential equations with additive noise: a process with known law, orders, noise, gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gaussian_problem import response, uniform

from fmkernels.paths import CondOT
from fmkernels.solvers.equations.sdeint import AdditiveNoise, sdeint
from fmkernels.solvers.programs.builder import Builder

THETA, CENTRE, NOISE = 1.5, 0.7, 0.8


def ornstein_uhlenbeck(t, y):
    return THETA * (CENTRE - y)


@pytest.mark.parametrize(
    "diffusion", [NOISE, torch.full((2,), NOISE), lambda t: NOISE, lambda t: torch.full((2,), NOISE)]
)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_ornstein_uhlenbeck(method: str, diffusion) -> None:
    y0 = torch.full((25_000, 2), 2.0, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 1.0, 2.0])
    ys = sdeint(ornstein_uhlenbeck, diffusion, y0, t, method=method, dt=0.02, seed=5)
    assert ys.shape == (4, 25_000, 2)
    assert torch.equal(ys[0], y0)
    for time, y in zip(t[1:].tolist(), ys[1:], strict=True):
        decay = math.exp(-THETA * time)
        mean, std = CENTRE + (2.0 - CENTRE) * decay, NOISE * math.sqrt((1 - decay**2) / (2 * THETA))
        order = 0.02 if method == "euler" else 0.02**2
        assert abs(float(y.mean()) - mean) < 5 * std / math.sqrt(y.numel()) + order
        assert abs(float(y.std()) - std) < 5 * std / math.sqrt(2 * y.numel()) + order


def strong_error(method: str, steps: int) -> float:
    """The root mean square error at time 1 of the Ornstein-Uhlenbeck process on the same Brownian path, exactly."""
    h = 1.0 / steps
    builder = Builder(uniform(steps), CondOT())
    AdditiveNoise(NOISE, method, set(), torch.zeros(()))(builder)
    coefficients = response(builder.program(), lambda t: (THETA * CENTRE, -THETA), 2.0, 0.0)
    error = (coefficients[0] - CENTRE - (2.0 - CENTRE) * math.exp(-THETA)) ** 2
    for i, c in enumerate(coefficients[2:]):
        # z = (W(t + h) - W(t)) / sqrt(h), and the solution holds the integral of NOISE e^(-THETA (1 - s)) dW
        start, end = (math.exp(-THETA * (1.0 - j * h)) for j in (i, i + 1))
        square, cross = NOISE**2 * (end**2 - start**2) / (2 * THETA), NOISE * (end - start) / THETA / math.sqrt(h)
        error += square - 2.0 * c * cross + c**2
    return math.sqrt(error)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_strong_order(method: str) -> None:
    order = math.log2(strong_error(method, 32) / strong_error(method, 64))
    assert 0.95 < order < 1.6, order


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_weak_order_with_noise_that_changes_in_time(method: str, order: int) -> None:
    level = lambda t: 0.5 + torch.sin(2.0 * t)  # noqa: E731
    t = np.linspace(0.0, 1.0, 200_001)
    exact = math.sqrt(np.trapezoid((0.5 + np.sin(2.0 * t)) ** 2 * np.exp(-2.0 * THETA * (1.0 - t)), t))

    def error(steps: int) -> float:
        builder = Builder(uniform(steps), CondOT())
        AdditiveNoise(level, method, set(), torch.zeros(()))(builder)
        noise = response(builder.program(), lambda t: (0.0, -THETA), 0.0, 0.0)
        return abs(float(np.linalg.norm(noise)) - exact)

    assert math.log2(error(32) / error(64)) == pytest.approx(order, abs=0.2)


def test_sdeint_times_noise_and_gradients() -> None:
    y0 = torch.randn(6, 3)
    t = torch.tensor([0.0, 0.1, 0.4])
    fine = sdeint(ornstein_uhlenbeck, 0.5, y0, torch.linspace(0.0, 0.4, 5, dtype=torch.float64), seed=3)
    coarse = sdeint(ornstein_uhlenbeck, 0.5, y0, t.double(), dt=0.1, seed=3)
    torch.testing.assert_close(coarse, fine[[0, 1, 4]])
    shards = [sdeint(ornstein_uhlenbeck, 0.5, y0[i : i + 2], t, seed=3, row_offset=i) for i in (0, 2, 4)]
    whole = sdeint(ornstein_uhlenbeck, 0.5, y0, t, seed=3)
    torch.testing.assert_close(torch.cat(shards, dim=1), whole, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(sdeint(ornstein_uhlenbeck, 0.5, y0, t, seed=3), whole)
    draws = [sdeint(ornstein_uhlenbeck, 0.5, y0, t, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], whole)
    assert torch.equal(sdeint(ornstein_uhlenbeck, 0.5, y0, t[:1], seed=3), y0[None])

    def function(y0, theta, level):
        return sdeint(lambda t, y: -theta * y + t, lambda t: level * (1.0 + t), y0, t, method="heun", seed=3)

    arguments = (
        y0.double(),
        torch.tensor(0.7, dtype=torch.float64),
        torch.tensor([0.2, 0.3, 0.1], dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(function, tuple(a.requires_grad_() for a in arguments))


def test_errors() -> None:
    x = torch.zeros(2, 3)
    t = torch.tensor([0.0, 1.0])
    for arguments, options, error, name in (
        ((None, 1.0, x, t), {}, TypeError, "drift"),
        ((ornstein_uhlenbeck, 1.0, x, -t), {}, ValueError, "t"),
        ((ornstein_uhlenbeck, 1.0, x, t[:, None]), {}, ValueError, "t"),
        ((ornstein_uhlenbeck, "1", x, t), {}, TypeError, "diffusion"),
        ((ornstein_uhlenbeck, torch.ones(4), x, t), {}, ValueError, "diffusion"),
        ((ornstein_uhlenbeck, 1.0, x, t), {"dt": 0.0}, ValueError, "dt"),
        ((ornstein_uhlenbeck, 1.0, x, t), {"method": "srk"}, ValueError, "method"),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            sdeint(*arguments, **options)
