"""Log-densities by adaptive steps, and the probes over a solve."""

from __future__ import annotations

import math

import pytest
import torch
from likelihood_problems import DTYPE, data, expand, network, normal_flow, rng, shapes
from torch import Tensor, nn

import fmkernels as fm
from fmkernels.likelihood.density import log_prob, sample_with_log_prob
from fmkernels.ops.step_control.op import Status

# ---------------------------------------------------------------------- adaptive steps


@shapes
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_adaptive_normal_to_normal_flow(shape: tuple[int, ...], method: str) -> None:
    mean, std = 0.7, 0.2
    x_1 = mean + std * data(shape)
    target = torch.distributions.Normal(torch.tensor(mean, dtype=DTYPE), std)
    expected = target.log_prob(x_1).reshape(shape[0], -1).sum(1)
    tol = 1e-5 if method == "bosh3" else 1e-7
    options: dict = {"method": method, "rtol": tol, "atol": tol}
    for estimate in ("exact", "hutchinson"):  # Rademacher is exact here
        result = log_prob(normal_flow(mean, std), x_1, divergence=estimate, generator=rng(), **options)
        torch.testing.assert_close(result.log_prob, expected, rtol=20 * tol, atol=20 * tol)
        assert (result.status == Status.SUCCESS).all()
        back, forward = sample_with_log_prob(normal_flow(mean, std), result.x_0, **options)
        torch.testing.assert_close(back, x_1, rtol=20 * tol, atol=20 * tol)
        torch.testing.assert_close(forward.log_prob, expected, rtol=40 * tol, atol=40 * tol)


def test_adaptive_steps_bound_the_error_of_the_log_density_in_many_dimensions() -> None:
    """A state at rest with a large divergence: only control of the integral itself takes small steps."""
    dims = 2500

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cos(20.0 * expand(t, x)) * x

    x = torch.zeros(2, dims, dtype=DTYPE)
    for tolerance in (1e-4, 1e-7):
        # Rademacher probes are exact for this diagonal Jacobian
        result = log_prob(model, x, rtol=0.0, atol=tolerance, divergence="hutchinson")
        exact = -dims * math.sin(20.0) / 20.0
        assert (result.delta_log_p - exact).abs().max() < 5.0 * tolerance


def test_samples_with_their_keyword_arguments_and_probes_leave_the_batch_as_they_finish() -> None:
    """A stiff sample does not change the others, whose probes and conditions move with them."""
    base, x = network((6, 3)), data((6, 3))
    scale = torch.tensor([20.0, 1.0, 0.2, 1.0, 0.5, 15.0], dtype=DTYPE)

    def model(x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        return base(x, t) * scale[:, None]

    options = {"divergence": "hutchinson", "probes": 2, "distribution": "gaussian", "rtol": 1e-5, "atol": 1e-5}
    whole = log_prob(model, x, scale=scale, generator=rng(3), **options)
    for i in (0, 2, 3, 5):
        own = slice(i, i + 1)
        one = log_prob(model, x[own], scale=scale[own], generator=rng(3), row_offset=i, **options)
        torch.testing.assert_close(one.log_prob, whole.log_prob[own], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(one.x_0, whole.x_0[own], rtol=1e-13, atol=1e-13)
    fixed = log_prob(model, x, scale=scale, generator=rng(3), **(options | {"method": "rk4", "steps": 400}))
    torch.testing.assert_close(whole.log_prob, fixed.log_prob, rtol=5e-5, atol=5e-5)


def test_gradients_through_adaptive_steps() -> None:
    model, x = network((3, 2)), data((3, 2)).requires_grad_()
    inputs = (x, *model.parameters())
    for prediction in ("exact", "hutchinson"):
        options = {"divergence": prediction, "gradient": True}
        adaptive = log_prob(model, x, rtol=1e-8, atol=1e-8, generator=rng(1), **options)
        fixed = log_prob(model, x, method="rk4", steps=40, generator=rng(1), **options)
        torch.testing.assert_close(adaptive.log_prob, fixed.log_prob, rtol=5e-9, atol=5e-9)
        plain = log_prob(model, x, rtol=1e-8, atol=1e-8, generator=rng(1), divergence=prediction)
        torch.testing.assert_close(adaptive.log_prob, plain.log_prob, rtol=1e-13, atol=1e-13)
        for ours, theirs in zip(
            torch.autograd.grad(adaptive.log_prob.sum(), inputs),
            torch.autograd.grad(fixed.log_prob.sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_adaptive_steps_of_half_precision_data() -> None:
    mean, std = 0.7, 0.4
    x_1 = (mean + std * data((5, 4))).to(torch.bfloat16)
    result = log_prob(normal_flow(mean, std), x_1, time_dtype=torch.bfloat16, rtol=1e-2, atol=1e-2)
    assert (result.x_0.dtype, result.log_prob.dtype) == (torch.bfloat16, torch.float32)
    target = torch.distributions.Normal(torch.tensor(mean, dtype=DTYPE), std)
    torch.testing.assert_close(result.log_prob.double(), target.log_prob(x_1.double()).sum(1), rtol=0.0, atol=0.3)


# ---------------------------------------------------------------------- probes over a solve


class Recorder(nn.Module):
    """Records the gradients that reach the model's output: the probes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        v = self.model(x, t)
        v.register_hook(lambda grad: self.seen.append(grad.clone()))
        return v


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes_are_fixed_over_the_solve_or_fresh(distribution: str) -> None:
    model, x = Recorder(network((3, 4))), data((3, 4))
    options = {"divergence": "hutchinson", "method": "heun2", "steps": 3, "distribution": distribution}
    log_prob(model, x, generator=rng(1), **options)
    assert len(model.seen) == 6
    assert all(torch.equal(seen, model.seen[0]) for seen in model.seen)
    fixed, model.seen = model.seen[0], []
    log_prob(model, x, generator=rng(1), fresh=True, **options)
    assert len(model.seen) == 6
    assert len({tuple(seen.flatten().tolist()) for seen in model.seen}) == 6
    assert torch.equal(model.seen[0], fixed)


def test_hutchinson_log_density_is_unbiased_and_reproducible() -> None:
    model, x = network((4, 6)), data((4, 6))
    options = {"method": "heun2", "steps": 5}
    exact = log_prob(model, x, **options).log_prob
    # many probes at once, as more samples of the same point
    many = 512
    repeated = x.repeat_interleave(many, 0)
    for fresh in (False, True):
        estimates = log_prob(
            model, repeated, divergence="hutchinson", generator=rng(4), fresh=fresh, **options
        ).log_prob.reshape(4, many)
        error = (estimates.mean(1) - exact).abs()
        assert (error < 4.5 * estimates.std(1) / math.sqrt(many)).all()
    several = [
        log_prob(model, x, divergence="hutchinson", probes=8, generator=rng(4), **options).log_prob for _ in range(2)
    ]
    assert torch.equal(*several)
    shard = log_prob(
        model, x[2:], divergence="hutchinson", probes=8, generator=rng(4), row_offset=2, **options
    ).log_prob
    torch.testing.assert_close(shard, several[0][2:], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("atol", [1e-6, 1e-12])
def test_padding_is_in_no_norm_whatever_it_is(gradient: bool, atol: float) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    seen = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach()[0, 2].item())
        return torch.tanh(torch.nan_to_num(x, 0.5, 0.5, 0.5).clamp(-9.0, 9.0))

    results = []
    for padding in (0.5, 1e300, math.inf, math.nan):
        start = x.masked_fill(~mask, padding)
        seen.clear()
        found = fm.log_prob(model, start, mask=mask, rtol=1e-6, atol=atol, gradient=gradient)
        assert all(value == padding or padding != padding for value in seen)  # the network sees it
        assert found.status.tolist() == [1, 1, 1, 1]
        results.append((found.log_prob, found.nfe))
        torch.testing.assert_close(found.x_0[~mask], start[~mask], equal_nan=True)
        _, back = fm.sample_with_log_prob(model, found.x_0.detach(), mask=mask, rtol=1e-6, atol=atol)
        torch.testing.assert_close(back.log_prob, found.log_prob.detach(), rtol=1e-4, atol=1e-4)
    for value, nfe in results[1:]:
        assert torch.equal(value, results[0][0])
        assert nfe == results[0][1]
