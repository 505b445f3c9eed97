"""Tables from records: plain for the terminal, Markdown for the docs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .records import COPY, KEPT_MEMORY, Record, by_case, kept, ours
from .sampling import PRECISION
from .timing import LATENCY_ELEMENTS

# What ours is compared with, in the order of the columns. "eager" is the best form known in plain PyTorch.
RIVALS = ("eager", "compile", "torchcfm", "flow_matching")
KEPT_RIVALS = ("eager", "compile")
HEADER = (
    "case",
    "dtype",
    "fmkernels",
    "of floor",
    *(f"vs {name}" for name in RIVALS),
    *(f"memory kept: vs {name}" for name in KEPT_RIVALS),
    "page faults' share",
    "extra memory",
    "eager's",
    "retained",
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


def ratio(measured: dict[str, Record], name: str) -> float | None:
    """How many times as long as ours an implementation of the case takes."""
    mine, other = ours(measured), measured.get(name)
    return None if mine is None or other is None else float(other["median"] / mine["median"])


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _faults(measured: dict[str, Record], kept_measured: dict[str, Record]) -> str:
    """The part of what eager takes longer than ours that is gone where the C library keeps large blocks, for both."""
    pairs = [(ours(found), found.get("eager")) for found in (measured, kept_measured)]
    lost = [float(other["median"] - mine["median"]) for mine, other in pairs if mine is not None and other is not None]
    return f"{100 * max(0.0, 1 - lost[1] / lost[0]):.0f} %" if len(lost) == 2 and lost[0] > 0 else "-"


def rows(records: Iterable[Record], timer: str | None = None) -> list[tuple[str, ...]]:
    """One row a case: ours (impl="auto"), its share of the copy floor, and how many times as fast; the same where the C
    library keeps large blocks, so that nobody pays for page faults."""
    table: list[tuple[str, ...]] = []
    cases = by_case(records)
    for (family, shape, dtype, variant, case_timer), measured in cases.items():
        mine = ours(measured)
        beside = mine is not None and (family, shape, dtype, variant, mine["timer"]) in cases
        if mine is None or (timer is not None and case_timer != timer):
            continue
        if mine.get("memory") == KEPT_MEMORY and beside:
            continue  # told in the columns of the other one
        kept_measured = cases.get((family, shape, dtype, variant, kept(case_timer)), {})
        errors = mine["errors"]
        eager = measured.get("eager", {}).get("peak_extra_bytes")
        table.append(
            (
                f"{shape} {variant}".strip(),
                dtype + ("" if case_timer == "host" else f", {case_timer}"),
                seconds(mine["median"]),
                _share(mine),
                *(_times(ratio(measured, name)) for name in RIVALS),
                *(_times(ratio(kept_measured, name)) for name in KEPT_RIVALS),
                _faults(measured, kept_measured),
                size(mine["peak_extra_bytes"]),
                size(eager),
                size(mine["retained_bytes"]),
                f"{max(errors.values()):.1e}" if errors else "-",
            )
        )
    return table


LOSSES_HEADER = ("case", "dtype", "where", "faster", "by")


def losses(records: Iterable[Record]) -> list[tuple[str, ...]]:
    """Where an implementation that is not ours is faster than impl="auto"; work-precision has a table of its own."""
    table: list[tuple[str, ...]] = []
    for (family, shape, dtype, variant, timer), measured in by_case(records).items():
        if variant == PRECISION:  # its entries take different steps
            continue
        for name in measured:
            found = None if name == COPY or name.startswith("fmkernels") else ratio(measured, name)
            if found is not None and found < 1.0:
                case = f"{family} {shape} {variant}".strip()
                table.append((case, dtype, timer, name, f"{1 / found:.2f} x"))
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
