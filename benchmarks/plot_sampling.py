"""One PNG a machine for whole solves: error against time, time against evaluations, and the solvers' own time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plot
from .records import Record, by_case, resolved
from .report_sampling import PRECISION_RIVAL, precision
from .sampling import HEADLINE, PRECISION

# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_BARS = {
    "fmkernels": _COLOURS[0],
    "eager": _COLOURS[5],
    "torchdiffeq": _COLOURS[6],
    "torchode": _COLOURS[7],
    "flow_matching": _COLOURS[2],
    "diffusers": _COLOURS[4],
}


def _points(settings: dict[str, Record]) -> list[tuple[float, float, float]]:
    """(evaluations a sample, seconds, error), by evaluations."""
    return sorted(
        (record["solve"]["nfe_per_sample"], record["median"], record["errors"]["x_1"]) for record in settings.values()
    )


def _curves(error: Any, time: Any, records: Sequence[Record]) -> None:
    mine, rival = precision(records, "fmkernels"), precision(records, PRECISION_RIVAL)
    for i, method in enumerate(mine):
        colour = _COLOURS[i % len(_COLOURS)]
        for library, style, found in (("", "o-", mine), (f", {PRECISION_RIVAL}", "x:", rival)):
            points = _points(found.get(method, {}))
            if points:
                nfe, seconds, errors = zip(*points, strict=True)
                milliseconds = [1e3 * value for value in seconds]
                options = {"color": colour, "linewidth": 1, "markersize": 4, "label": method + library}
                error.plot(milliseconds, errors, style, **options)
                time.plot(nfe, milliseconds, style, **options)
    labels = (
        (error, "time, ms", "relative error", "error against time"),
        (time, "evaluations a sample", "time, ms", "time against NFE"),
    )
    for axes, x, y, title in labels:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.tick_params(which="both", labelsize=7)
        axes.xaxis.set_minor_formatter("")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel(x, fontsize=8)
        axes.set_ylabel(y, fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(linewidth=0.3)


def _bars(axes: Any, records: Sequence[Record]) -> None:
    """The solver's own time a step at the headline's batch size."""
    shape = "x".join(map(str, HEADLINE))
    cases = {
        variant: measured
        for (_, at, _, variant, _), measured in by_case(records).items()
        if at == shape and variant != PRECISION
    }
    width = 0.8 / len(_BARS)
    for i, (name, colour) in enumerate(_BARS.items()):
        found = [
            (x, measured[name]["solve"])
            for x, measured in enumerate(cases.values())
            if name in measured and resolved(measured[name])
        ]
        at = [x + (i - (len(_BARS) - 1) / 2) * width for x, _ in found]
        own = [1e6 * solve["overhead_per_step"] for _, solve in found]
        axes.bar(at, own, width, color=colour, label=name)
    axes.set_xticks(range(len(cases)), [name.replace(" ", "\n", 1) for name in cases], fontsize=7)
    axes.set_yscale("log")
    axes.set_ylim(1.0, 3e3)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylabel("µs a step", fontsize=8)
    axes.set_title(f"the solver's own time, state {shape}", fontsize=9, loc="left")
    axes.grid(axis="y", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, frameon=False, ncols=len(_BARS), loc="upper left")


def write(path: Path, machine: str, records: Sequence[Record], digest: str) -> None:
    """Draws the records; ``digest`` names them in the file's metadata."""
    figure = plot.new_figure(11, 7.5)
    grid = figure.add_gridspec(2, 2)  # one grid, or the layout could not keep them apart
    error, time, own = (figure.add_subplot(grid[place]) for place in ((0, 0), (0, 1), (1, slice(None))))
    _curves(error, time, records)
    _bars(own, records)
    handles, labels = error.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)
    figure.suptitle(f"{machine}, float32: whole solves", fontsize=11)
    plot.save(figure, path, digest)
