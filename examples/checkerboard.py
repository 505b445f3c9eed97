"""Points on a checkerboard, generated from noise."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
import toy
from torch import Tensor

EXTENT = 4.5


def checkerboard(count: int) -> Tensor:
    """Uniform on the black fields of a 4x4 board over [-4, 4]^2: (count, 2)."""
    column = torch.randint(4, (count,))
    row = 2 * torch.randint(2, (count,)) + column % 2
    return 2 * (torch.stack((column, row), dim=1) + torch.rand(count, 2)) - 4


def main(argv: Sequence[str] | None = None) -> int:
    options = toy.options("checkerboard", __doc__, argv, steps=2500, points=20_000)
    model = toy.train(lambda count: checkerboard(count) / 2, options.steps)  # about as wide as the noise
    states = toy.sample(model, torch.randn(options.points, 2))

    figure, axes = plt.subplots(1, 6, figsize=(16, 3.1), layout="constrained")
    shown = [round(f * (len(states) - 1)) for f in (0, 0.4, 0.6, 0.8, 1)]
    panels = [(f"t = {i / (len(states) - 1):.1f}", 2 * states[i]) for i in shown]
    for ax, (title, points) in zip(axes, [*panels, ("data", checkerboard(options.points))], strict=True):
        ax.hist2d(*points.T.numpy(), bins=120, range=[[-EXTENT, EXTENT]] * 2, cmap="Blues", vmin=0, vmax=8)
        toy.bare(ax, title, EXTENT)
    figure.savefig(options.out, dpi=110)
    plt.close(figure)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
