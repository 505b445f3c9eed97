"""From eight Gaussians to two moons: the source is samples too, not noise."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
import toy
from torch import Tensor

EXTENT = 2.7


def eight_gaussians(count: int) -> Tensor:
    """Eight narrow Gaussians on a circle of radius 2: (count, 2)."""
    angle = torch.randint(8, (count,)) * (math.pi / 4)
    return 2 * torch.stack((angle.cos(), angle.sin()), dim=1) + 0.12 * torch.randn(count, 2)


def moons(count: int) -> Tensor:
    """Two interleaved half circles with noise: (count, 2)."""
    angle = math.pi * torch.rand(count)
    upper = torch.rand(count) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return 1.2 * torch.stack((x - 0.5, y - 0.25), dim=1) + 0.06 * torch.randn(count, 2)


def main(argv: Sequence[str] | None = None) -> int:
    options = toy.options("eight_gaussians_to_moons", __doc__, argv, steps=2000, points=3000)
    model = toy.train(moons, options.steps, source=eight_gaussians)
    states = toy.sample(model, eight_gaussians(options.points))

    figure, axes = plt.subplots(1, 3, figsize=(12, 4.5), layout="constrained")
    way = torch.stack(states)[:, :300].numpy()
    axes[0].scatter(*states[0].T.numpy(), s=2, color="#d1495b")
    toy.bare(axes[0], "source: eight Gaussians, t = 0", EXTENT)
    axes[1].plot(way[:, :, 0], way[:, :, 1], color="#9aa5b1", linewidth=0.4)
    axes[1].scatter(*way[0].T, s=5, color="#d1495b", zorder=2)
    axes[1].scatter(*way[-1].T, s=5, color="#1f6fb4", zorder=2)
    toy.bare(axes[1], "midpoint trajectories", EXTENT)
    axes[2].scatter(*moons(options.points).T.numpy(), s=2, color="#cfd6dd", label="data")
    axes[2].scatter(*states[-1].T.numpy(), s=2, color="#1f6fb4", label="generated")
    axes[2].legend(frameon=False, markerscale=4, loc="upper left")
    toy.bare(axes[2], "generated two moons, t = 1", EXTENT)
    figure.savefig(options.out, dpi=110)
    plt.close(figure)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
