"""What the 2-D examples share: a small network, training, sampling, options and axes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import fmkernels as fm


class Velocity(nn.Module):
    """A multilayer perceptron from (x, t) to the velocity, in 2-D; sines of x and t let it draw sharp edges."""

    frequencies: Tensor

    def __init__(self, width: int = 128, hidden: int = 4, octaves: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(octaves))
        widths = [3 + 3 * 2 * octaves, *[width] * hidden]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        inputs = torch.cat((x, t[:, None]), dim=1)
        angles = (inputs[:, :, None] * self.frequencies).flatten(1)
        return self.net(torch.cat((inputs, angles.sin(), angles.cos()), dim=1))


def train(
    data: Callable[[int], Tensor],
    steps: int,
    source: Callable[[int], Tensor] | None = None,
    batch_size: int = 1024,
) -> nn.Module:
    """Trains on samples of data; from samples of source, or from standard normal noise."""
    path, model = fm.paths.CondOT(), Velocity()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batch = path.sample(data(batch_size), x_0=None if source is None else source(batch_size))
        loss = fm.cfm_loss(model(batch.x_t, batch.t), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def sample(model: nn.Module, x: Tensor, steps: int = 32) -> list[Tensor]:
    """Midpoint steps from x at t = 0 to t = 1; returns every state."""
    h = 1 / steps
    states = [x]
    for i in range(steps):
        half = fm.combine([x, model(x, torch.full((len(x),), i * h))], [1.0, h / 2])
        x = fm.combine([x, model(half, torch.full((len(x),), (i + 0.5) * h))], [1.0, h])
        states.append(x)
    return states


def options(
    name: str, description: str | None, argv: Sequence[str] | None, steps: int, points: int
) -> argparse.Namespace:
    """The options that the examples share, with steps and points to draw; creates the folder of the picture."""
    parser = argparse.ArgumentParser(description=description)
    default = Path(__file__).parent / "out" / f"{name}.png"
    parser.add_argument("--out", type=Path, default=default, help=f"the picture (examples/out/{name}.png)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that all runs")
    found = parser.parse_args(argv)
    found.steps, found.points = (50, 1000) if found.quick else (steps, points)
    found.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(found.seed)
    return found


def bare(axes: Axes, title: str, extent: float) -> None:
    """A square panel without ticks."""
    axes.set(title=title, xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal")
