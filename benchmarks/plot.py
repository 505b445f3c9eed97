"""One PNG a machine: for each family, how many times as fast as eager PyTorch every implementation is, in
float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .families import FAMILIES
from .records import COPY, Record, by_case
from .timing import LATENCY_ELEMENTS

TIMES = "\N{MULTIPLICATION SIGN}"

# Ours stands out; the others are muted. Colours of the Okabe-Ito palette, which colour-blind readers tell
# apart.
COLOURS = {
    "fmkernels": "#D55E00",
    "fmkernels-triton": "#CC79A7",
    "compile": "#0072B2",
    "torchcfm": "#56B4E9",
    "flow_matching": "#009E73",
    COPY: "#BBBBBB",
}
LABELS = {
    "fmkernels-triton": "fmkernels, impl=triton",
    "compile": "torch.compile",
    COPY: "copy of the same bytes",
}


def _cases(records: Sequence[Record], family: str) -> dict[str, dict[str, Record]]:
    """Label -> implementation -> record; on a GPU the device's own time."""
    timers = {record["timer"] for record in records}
    timer = "graph" if "graph" in timers else min(timers)
    cases = {}
    for (name, shape, dtype, variant, case_timer), measured in by_case(records).items():
        if (name, dtype, case_timer) == (family, "float32", timer) and "eager" in measured:
            cases[f"{shape.replace('x', TIMES)}\n{variant}".strip()] = measured
    return cases


def _speed(measured: dict[str, Record], name: str) -> float:
    """NaN, no bar, where there is none: a copy says nothing about a case that measures latency."""
    if name not in measured:
        return math.nan
    if name == COPY and math.prod(measured[name]["case"]["shape"]) <= LATENCY_ELEMENTS:
        return math.nan
    return float(measured["eager"]["median"] / measured[name]["median"])


def _panel(axes: Any, what: str, cases: dict[str, dict[str, Record]]) -> None:
    names = [name for name in COLOURS if any(name in measured for measured in cases.values())]
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        at = [x + (i - (len(names) - 1) / 2) * width for x in range(len(cases))]
        speeds = [_speed(measured, name) for measured in cases.values()]
        bars = axes.bar(at, speeds, width, color=COLOURS[name], label=LABELS.get(name, name))
        if name == "fmkernels":
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(cases)), list(cases), fontsize=7)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [2.0**power for power in range(-5, 8) if low <= 2.0**power <= high]
    axes.set_yticks(ticks, [f"{tick:g}{TIMES}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_xlim(-0.5, max(len(cases), 4) - 0.5)  # bars of a lone case stay narrow
    axes.set_title(what, fontsize=9, loc="left")
    axes.grid(axis="y", linewidth=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def new_figure(width: float, height: float) -> Any:
    """Without a window and without pyplot's state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path, digest: str) -> None:
    figure.savefig(path, dpi=130, metadata={"Description": f"made from the results {digest}", "Software": None})


def write(path: Path, machine: str, records: Sequence[Record], digest: str) -> None:
    """Draws the records; ``digest`` names them in the file's metadata."""
    panels = [(family, cases) for family in FAMILIES if (cases := _cases(records, family))]
    figure = new_figure(11, 2.9 * max(1, len(panels)))
    for i, (name, cases) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, i + 1)
        _panel(axes, f"{name}: {FAMILIES[name].what}", cases)
    figure.suptitle(f"{machine}, float32: times as fast as eager PyTorch (dotted: 1)", fontsize=11)
    legend = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    save(figure, path, digest)
