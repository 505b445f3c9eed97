"""SiT's transport: its losses and steps by formulas in float64 under the same draws, and the laws of Gaussian data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fmkernels.compat import sit

MEAN, SPREAD = 1.5, 0.4


def schedule(kind: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """alpha, sigma, their derivatives, and SiT's drift_var = sigma (sigma d alpha / alpha - d sigma)."""
    if kind == "Linear":
        parts = t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    elif kind == "GVP":
        angle = math.pi / 2 * t
        parts = angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()
    else:
        log_mean = -0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t)
        slope = 0.5 * (1 - t) * 19.9 + 0.05
        alpha, sigma = log_mean.exp(), (1 - (2 * log_mean).exp()).sqrt()
        parts = alpha, sigma, alpha * slope, -(alpha**2) * slope / sigma
    alpha, sigma, d_alpha, d_sigma = parts
    return alpha, sigma, d_alpha, d_sigma, sigma * (sigma * d_alpha / alpha - d_sigma)


def exact(kind: str, prediction: str) -> Callable[..., Tensor]:
    def model(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        assert t.shape == x.shape[:1]
        alpha, sigma, d_alpha, d_sigma, _ = (c.reshape(-1, *[1] * (x.dim() - 1)) for c in schedule(kind, t.double()))
        gain = (x.double() - alpha * MEAN) / ((alpha * SPREAD) ** 2 + sigma**2)
        x_1, x_0 = MEAN + alpha * SPREAD**2 * gain, sigma * gain
        return {"velocity": d_alpha * x_1 + d_sigma * x_0, "noise": x_0, "score": -gain}[prediction].to(x)

    return model


@pytest.mark.parametrize("kind", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("loss_weight", [None, "velocity", "likelihood"])
def test_losses_are_sits_under_the_same_draws(kind: str, prediction: str, loss_weight: str | None) -> None:
    transport = sit.create_transport(kind, prediction, loss_weight)
    x1 = torch.randn(6, 2, 3, dtype=torch.float64)

    def model(x: Tensor, t: Tensor, shift: float) -> Tensor:
        return torch.sin(x) + t.reshape(-1, 1, 1) + shift

    torch.manual_seed(1)
    found = transport.training_losses(model, x1, {"shift": 0.3})
    torch.manual_seed(1)
    x0 = torch.randn_like(x1)
    eps = {"VP": (0.0, 1e-5)}.get(kind, (0.0, 0.0) if prediction == "velocity" else (1e-3, 1e-3))
    t = (torch.rand(6) * (1 - eps[1] - eps[0]) + eps[0]).to(x1)
    alpha, sigma, d_alpha, d_sigma, var = (c.reshape(-1, 1, 1) for c in schedule(kind, t))
    xt = alpha * x1 + sigma * x0
    pred = model(xt, t, 0.3)
    weight = {None: torch.ones_like(var), "velocity": (var / sigma) ** 2, "likelihood": var / sigma**2}[loss_weight]
    squares = {
        "velocity": (pred - (d_alpha * x1 + d_sigma * x0)) ** 2,
        "noise": weight * (pred - x0) ** 2,
        "score": weight * (pred * sigma + x0) ** 2,
    }[prediction]
    want = squares.mean((1, 2))
    assert (found["pred"] - pred).abs().max() < 1e-6  # SiT's own times are float32's
    assert ((found["loss"] - want) / want).abs().max() < 1e-5
    assert found["loss"].shape == (6,)


@pytest.mark.parametrize("method", ["Euler", "Heun"])
@pytest.mark.parametrize("form", ["constant", "SBDM", "sigma", "linear", "decreasing", "inccreasing-decreasing"])
@pytest.mark.parametrize("last_step", [None, "Mean", "Tweedie", "Euler"])
@pytest.mark.parametrize("kind", ["Linear", "VP"])
def test_sde_steps_are_sits_under_the_same_draws(method: str, form: str, last_step: str | None, kind: str) -> None:
    prediction, norm, steps = "noise", 0.7, 12
    transport, model = sit.create_transport(kind, prediction), exact(kind, prediction)
    sample = sit.Sampler(transport).sample_sde(
        sampling_method=method, diffusion_form=form, diffusion_norm=norm, last_step=last_step, num_steps=steps
    )
    start = torch.randn(5, 2, dtype=torch.float64)
    torch.manual_seed(3)
    found = sample(start, model)
    torch.manual_seed(3)
    late = 1 - (0.04 if last_step is not None else 1e-3)
    early = 1e-3 if kind == "Linear" else 0.0
    grid = torch.linspace(early, late, steps, dtype=torch.float64)

    def parts(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The velocity, the score, and w."""
        times = t.expand(len(x))
        alpha, sigma, d_alpha, _, var = schedule(kind, t)
        score = -model(x, times) / sigma
        w = {
            "constant": torch.tensor(norm, dtype=torch.float64),
            "SBDM": norm * var,
            "sigma": norm * sigma,
            "linear": norm * (1 - t),
            "decreasing": 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
            "inccreasing-decreasing": norm * torch.sin(math.pi * t) ** 2,
        }[form]
        return d_alpha / alpha * x + var * score, score, w

    x, want, h = start, [], grid[1] - grid[0]
    for i in range(steps - 1):
        z = torch.randn(5, 2).to(x)
        if method == "Euler":
            v, s, w = parts(x, grid[i])
            x = x + (v + w * s) * h + (2 * w * h).sqrt() * z
        else:
            w = parts(x, grid[i])[2]
            y = x + (2 * w * h).sqrt() * z
            v, s, w = parts(y, grid[i])
            k = v + w * s
            v, s, w = parts(y + h * k, grid[i + 1])
            x = y + 0.5 * h * (k + v + w * s)
        want.append(x)
    if last_step is not None:
        v, s, w = parts(x, grid[-1])
        alpha, sigma = schedule(kind, grid[-1])[:2]
        x = {"Mean": x + 0.04 * (v + w * s), "Euler": x + 0.04 * v, "Tweedie": (x + sigma**2 * s) / alpha}[last_step]
    want.append(x)
    assert len(found) == steps
    for a, b in zip(found, want, strict=True):
        assert (a - b).abs().max() < 1e-8 * (1 + b.abs().max())


@pytest.mark.parametrize(
    ("kind", "prediction"), itertools.product(["Linear", "GVP", "VP"], ["velocity", "noise", "score"])
)
def test_laws_of_samples_and_likelihoods(kind: str, prediction: str) -> None:
    torch.manual_seed(0)
    model, sampler = exact(kind, prediction), sit.Sampler(sit.create_transport(kind, prediction))
    noise = torch.randn(4000, 1, dtype=torch.float64)
    x = sampler.sample_ode(sampling_method="dopri5", num_steps=5)(noise, model)
    assert x.shape == (5, 4000, 1)
    if kind != "VP":  # whose way back begins at t = 1, where the model of this test has no value
        back = sampler.sample_ode(sampling_method="dopri5", num_steps=5, reverse=True)(x[-1], model)
        assert (back[-1] - noise).abs().max() < 0.05
    stochastic = sampler.sample_sde(diffusion_form="sigma", num_steps=100)(noise, model)[-1]
    for found in (x[-1], stochastic):
        assert abs(found.mean() - MEAN) < 0.05
        assert abs(found.std() - SPREAD) < 0.05
    data = MEAN + SPREAD * torch.randn(50, 1, dtype=torch.float64)
    log_p, z = sampler.sample_ode_likelihood(sampling_method="dopri5", num_steps=3, rtol=1e-6)(data, model)
    want = -0.5 * ((data[:, 0] - MEAN) / SPREAD) ** 2 - math.log(SPREAD * math.sqrt(2 * math.pi))
    assert z.shape == data.shape
    assert (log_p - want).abs().max() < 0.03  # what the ends that SiT leaves out cost


def test_velocities_from_the_first_time_on() -> None:
    """Where SiT divides by alpha = 0 and returns NaN."""
    sampler = sit.Sampler(sit.create_transport("Linear", "velocity"))
    x = sampler.sample_sde(num_steps=50)(torch.randn(2000, 1), exact("Linear", "velocity"))[-1]
    assert torch.isfinite(x).all()
    assert abs(x.mean() - MEAN) < 0.05


def test_wrong_arguments() -> None:
    with pytest.raises(KeyError, match="path_type: expected one of 'Linear', 'GVP', 'VP', got 'Bezier'"):
        sit.create_transport("Bezier")
    with pytest.raises(ValueError, match="prediction"):
        sit.create_transport("Linear", "data")
    sampler = sit.Sampler(sit.create_transport())
    for name in ("sampling_method", "diffusion_form", "last_step"):
        with pytest.raises(NotImplementedError, match=f"{name}: expected one of"):
            sampler.sample_sde(**{name: "other"})
    with pytest.raises(AssertionError, match=r"model: expected an output of x1's shape \(3, 2\), got \(3, 1\)"):
        sampler.transport.training_losses(lambda x, t: x[:, :1], torch.randn(3, 2))
    assert sampler.transport.check_interval(0.1, 0.2, eval=True, reverse=True) == (1.0, 0.0)


@pytest.mark.parametrize("method", ["Euler", "Heun"])
@pytest.mark.parametrize("num_steps", [11, 50])
def test_the_default_sde_of_a_velocity_has_the_datas_law(method: str, num_steps: int) -> None:
    """From t = 0, where w is infinite, with few steps."""
    torch.manual_seed(0)
    sampler = sit.Sampler(sit.create_transport())
    states = sampler.sample_sde(sampling_method=method, num_steps=num_steps)(
        torch.randn(4000, 1), exact("Linear", "velocity")
    )
    assert all(state.std() < 1.5 for state in states)
    assert abs(states[-1].mean() - MEAN) < 0.05
    assert abs(states[-1].std() - SPREAD) < 0.06
