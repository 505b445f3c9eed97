"""The pictures of the digits demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

COLUMNS = 8
BLUE, RED, GREY = "#1f6fb4", "#d1495b", "#9aa5b1"


def _tile(images: Tensor) -> Any:
    """(rows, columns, 8, 8) as one image with a line of paper between the digits."""
    rows, columns, height, width = images.shape
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), -1.0)
    for r in range(rows):
        for c in range(columns):
            top, left = r * (height + 1), c * (width + 1)
            canvas[top : top + height, left : left + width] = images[r, c].cpu().numpy()
    return canvas


def _show(axes: Axes, images: Tensor, title: str) -> None:
    axes.imshow(_tile(images), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=11)
    axes.set_yticks([9 * row + 3.5 for row in range(len(images))], labels=[str(row) for row in range(len(images))])
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color(GREY)


def _of_class(images: Tensor, per_class: int, count: int) -> Tensor:
    """The first images of each class, from images sorted by class: (classes, count, 8, 8)."""
    return images.reshape(-1, per_class, *images.shape[-2:])[:, :count]


def samples(path: Path, real: Tensor, labels: Tensor, generated: dict[str, Tensor], per_class: int) -> None:
    """Real digits beside generated ones, a row for each class; not picked, the first of each."""
    figure, axes = plt.subplots(1, 1 + len(generated), figsize=(4.2 * (1 + len(generated)), 5.6), layout="constrained")
    classes = int(labels.max()) + 1
    first = [index for c in range(classes) for index in (labels == c).nonzero().flatten()[:COLUMNS].tolist()]
    _show(axes[0], _of_class(real[first], COLUMNS, COLUMNS), "real")
    for ax, (method, images) in zip(axes[1:], generated.items(), strict=True):
        _show(ax, _of_class(images, per_class, COLUMNS), f"generated, {method}")
    figure.suptitle("Handwritten digits by flow matching, one row for each class asked for", fontsize=13)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def solvers(path: Path, drawn: dict[str, dict[str, Any]], floor: float, per_class: int) -> None:
    """The same noise through every solver, and their distance from real digits against their evaluations."""
    names = list(drawn["guided"])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 0.55 * len(names) + 1.6), width_ratios=(1.25, 1), layout="constrained"
    )
    rows = [_of_class(drawn["guided"][name].images, per_class, 1)[:, 0] for name in names]
    stacked = rows[0].new_empty((len(rows), *rows[0].shape))
    for r, row in enumerate(rows):
        stacked[r] = row
    _show(left, stacked, "guided, from the same noise")
    left.set_yticks([9 * r + 3.5 for r in range(len(names))], labels=names)
    for kind, colour, offset in (("guided", BLUE, -0.2), ("unguided", RED, 0.2)):
        found = [drawn[kind][name].figures for name in names]
        places = [row + offset for row in range(len(names))]
        bars = right.barh(places, [f["sliced_wasserstein"] for f in found], 0.38, color=colour, label=kind)
        right.bar_label(bars, [f"{f['nfe']} evaluations" for f in found], padding=3, fontsize=7, color=GREY)
    right.axvline(floor, color=GREY, linestyle="--", linewidth=1, label="real digits among themselves")
    right.set_yticks(range(len(names)), labels=names)
    right.invert_yaxis()
    right.set(xlabel="sliced Wasserstein distance", title="distance from held-out digits")
    right.margins(x=0.2)
    right.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def trajectories(path: Path, states: list[Tensor], per_class: int) -> None:
    """One digit of each class on its way from noise (t = 0) to data (t = 1)."""
    shown = sorted({round(i * (len(states) - 1) / 10) for i in range(11)})
    figure, ax = plt.subplots(figsize=(6.6, 6.2), layout="constrained")
    # Noise reaches beyond [-1, 1]; imshow clips it to white and black.
    columns = [_of_class(states[i], per_class, 1)[:, 0] for i in shown]
    stacked = columns[0].new_empty((len(columns[0]), len(columns), *columns[0].shape[1:]))
    for c, column in enumerate(columns):
        stacked[:, c] = column
    _show(ax, stacked, "From noise to digit: guided Euler steps")
    ax.set_xticks([9 * c + 3.5 for c in range(len(shown))], labels=[f"{i / (len(states) - 1):.1f}" for i in shown])
    ax.set_xlabel("time t")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def losses(path: Path, trained: list[float], compared: dict[str, Any]) -> None:
    """The loss of the whole training, and of its first steps fused and plain with their difference."""
    figure, (whole, first, gap) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    window = max(1, min(25, len(trained) // 4))
    smooth = np.convolve(trained, np.ones(window) / window, mode="valid")
    whole.plot(range(1, len(trained) + 1), trained, color=GREY, linewidth=0.6, alpha=0.7, label="each step")
    centres = np.arange(len(smooth)) + (window + 1) / 2
    whole.plot(centres, smooth, color=BLUE, label=f"mean of {window}")
    whole.set(title="training with the fused loss", xlabel="step", ylabel="loss")
    whole.legend(frameon=False)

    fused, plain = np.array(compared["losses_fused"]), np.array(compared["losses_plain"])
    steps = np.arange(1, len(fused) + 1)
    first.plot(steps, plain, color=RED, linewidth=4, alpha=0.45, label="plain PyTorch")
    first.plot(steps, fused, color=BLUE, linewidth=1.2, label="fused")
    first.set(title=f"first {len(steps)} steps, trained both ways", xlabel="step", ylabel="loss")
    first.legend(frameon=False)

    # Equal losses have no logarithm: they are drawn at the bottom, below any float32 rounding error.
    floor = 1e-9
    gap.semilogy(steps, np.maximum(np.abs(fused - plain), floor), ".-", color=BLUE, linewidth=0.8)
    gap.axhline(compared.get("limit", 1e-5), color=RED, linestyle="--", linewidth=1, label="allowed")
    gap.set(title="|fused - plain| (equal drawn at 1e-9)", xlabel="step", ylim=(floor / 2, 1e-4))
    gap.legend(frameon=False, loc="upper left")
    for ax in (whole, first, gap):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
