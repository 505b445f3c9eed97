"""Training with the fused loss is training: the same model, data and noise give the losses of plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fmkernels as fm


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))


def ring(count: int, generator: torch.Generator) -> torch.Tensor:
    angle = 2 * torch.pi * torch.rand(count, generator=generator)
    return 2 * torch.stack((angle.cos(), angle.sin()), -1) + 0.1 * torch.randn(count, 2, generator=generator)


@pytest.mark.parametrize("impl", ["auto", "native"])
@pytest.mark.parametrize("drawn", [False, True])
def test_fused_and_plain_training_have_the_same_losses(impl: str, drawn: bool) -> None:
    """300 steps; rounding differs in the loss's last bits and grows with training, so late losses get more room."""
    fused, path = model(), fm.paths.CondOT()
    plain = copy.deepcopy(fused)
    optimizers = [torch.optim.Adam(net.parameters(), 2e-3) for net in (fused, plain)]
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(300):
        x_1 = ring(256, generator)
        x_0 = None if drawn else torch.randn(256, 2, generator=generator)
        batch = path.sample(x_1, x_0, generator=generator, store_noise=False, impl=impl)
        loss = fm.cfm_loss(fused(torch.cat((batch.x_t, batch.t[:, None]), -1)), batch, impl=impl)

        t, source = batch.t[:, None], batch.x_0
        x_t = t * x_1 + (1 - t) * source
        plain_loss = nn.functional.mse_loss(plain(torch.cat((x_t, t), -1)), x_1 - source)

        for optimizer, value in zip(optimizers, (loss, plain_loss), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        losses.append((loss.item(), plain_loss.item()))
        assert abs(losses[-1][0] - losses[-1][1]) < (1e-5 if step < 50 else 2e-3), step
    late = sum(a for a, _ in losses[-50:]) / 50
    assert late < 0.75 * sum(a for a, _ in losses[:10]) / 10, "it learns"


def test_a_trained_model_samples_the_data() -> None:
    """After training, Euler steps by `combine` carry noise to the ring of radius 2."""
    net, path = model(), fm.paths.CondOT()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(800):
        batch = path.sample(ring(512, generator), generator=generator)
        loss = fm.cfm_loss(net(torch.cat((batch.x_t, batch.t[:, None]), -1)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x = fm.randn(2000, 2, seed=3)
        steps = 50
        for i in range(steps):
            t = torch.full((2000, 1), i / steps)
            x = fm.combine([x, net(torch.cat((x, t), -1))], [1.0, 1 / steps])
    radius = x.norm(dim=-1)
    assert radius.mean() == pytest.approx(2.0, abs=0.15)
    assert ((radius > 1.4) & (radius < 2.6)).float().mean() > 0.85
    assert x.mean(0).abs().max() < 0.25
