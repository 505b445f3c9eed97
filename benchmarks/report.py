"""Tables from records: plain for the terminal, Markdown for the docs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .records import COPY, Record, by_case, ours
from .timing import LATENCY_ELEMENTS

# What ours is compared with, in the order of the columns.
RIVALS = ("eager", "compile", "torchcfm", "flow_matching")
HEADER = (
    "case",
    "dtype",
    "fmkernels",
    "of floor",
    *(f"vs {name}" for name in RIVALS),
    "extra memory",
    "eager's",
    "error",
)


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(value: int | None) -> str:
    if value is None:
        return "-"
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << shift:
            return f"{value / (1 << shift):.4g} {unit}"
    return f"{value} B"


def _share(record: Record) -> str:
    """Of the copy floor; nothing for a case that measures latency, where both are far from the memory's
    speed."""
    small = math.prod(record["case"]["shape"]) <= LATENCY_ELEMENTS
    return "-" if small else f"{100 * record['floor_share']:.0f} %"


def rows(records: Iterable[Record], timer: str | None = None) -> list[tuple[str, ...]]:
    """One row a case: ours (impl="auto"), its share of the copy floor, and how many times as
    fast."""
    table = []
    for (_, shape, dtype, variant, case_timer), measured in by_case(records).items():
        mine = ours(measured)
        if mine is None or (timer is not None and case_timer != timer):
            continue
        ratios = [f"{measured[name]['median'] / mine['median']:.2f} x" if name in measured else "-" for name in RIVALS]
        errors = mine["errors"]
        eager = measured.get("eager", {}).get("peak_extra_bytes")
        table.append(
            (
                f"{shape} {variant}".strip(),
                dtype + ("" if case_timer == "host" else f", {case_timer}"),
                seconds(mine["median"]),
                _share(mine),
                *ratios,
                size(mine["peak_extra_bytes"]),
                size(eager),
                f"{max(errors.values()):.1e}" if errors else "-",
            )
        )
    return table


def plain_table(header: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    """Columns side by side; the first flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (header, *table)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, table)])


def markdown_table(header: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def implementation_rows(records: Iterable[Record]) -> list[tuple[str, ...]]:
    """One row a case and implementation: everything that was measured."""
    table: list[tuple[str, ...]] = []
    for (family, shape, dtype, variant, timer), measured in by_case(records).items():
        for name, record in measured.items():
            peak = "-" if name == COPY else size(record["peak_extra_bytes"])
            errors = ", ".join(f"{key} {value:.1e}" for key, value in record["errors"].items())
            quartiles = f"{seconds(record['q1'])} - {seconds(record['q3'])}"
            case = f"{family} {shape} {variant}".strip()
            label = name + (" (auto)" if record["auto"] else "")
            share = _share(record)
            speed = f"{record['gb_per_s']:.3g}"
            table.append(
                (
                    case,
                    dtype,
                    timer,
                    label,
                    seconds(record["median"]),
                    quartiles,
                    speed,
                    share,
                    peak,
                    errors or "-",
                )
            )
    return table


IMPLEMENTATION_HEADER = (
    "case",
    "dtype",
    "timer",
    "implementation",
    "median",
    "quartiles",
    "GB/s",
    "of floor",
    "extra memory",
    "error against float64",
)
