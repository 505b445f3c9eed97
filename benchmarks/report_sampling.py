"""Tables of whole solves: end to end, the network alone, the solver's own time, evaluations and errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .records import Record, by_case, ours, resolved
from .report import markdown_table, seconds, size
from .sampling import HEADLINE, IMAGES, PRECISION

HEADER = (
    "case",
    "implementation",
    "end to end",
    "network alone",
    "solver's own, a step",
    "steps",
    "NFE a sample",
    "error",
    "extra memory",
)
BATCH_RIVALS = (
    "fmkernels-Solver",
    "fmkernels-odeint",
    "eager",
    "torchdiffeq",
    "torchode",
    "flow_matching",
    "diffusers",
)
PRECISION_RIVAL = "torchdiffeq"
Rows = list[tuple[str, ...]]


def _error(record: Record) -> str:
    """Against the exact solution, or, where that is not known, against the same method in float64."""
    errors = record["errors"]
    return f"{errors['x_1']:.1e}" if "x_1" in errors else f"{errors['method']:.1e} (rounding)"


def _own(record: Record) -> str:
    """The solver's own time a step."""
    return seconds(record["solve"]["overhead_per_step"]) if resolved(record) else "in the noise"


def rows(records: Iterable[Record], shape: tuple[int, ...] | None = None) -> Rows:
    """One row a case and implementation, of all shapes or of one; work-precision stands in its own table."""
    table: Rows = []
    for (_, name, _, variant, _), measured in by_case(records).items():
        if variant == PRECISION or (shape is not None and name != "x".join(map(str, shape))):
            continue
        for implementation, record in measured.items():
            if "solve" in record:
                solve = record["solve"]
                table.append(
                    (
                        f"{name} {variant}",
                        implementation,
                        seconds(record["median"]),
                        seconds(solve["network"]["median"]),
                        _own(record),
                        str(solve["steps"]),
                        f"{solve['nfe_per_sample']:.4g}",
                        _error(record),
                        size(record["peak_extra_bytes"]),
                    )
                )
    return table


def batch_table(records: Iterable[Record]) -> str:
    """How many times as long as ours each implementation takes end to end, by shape."""
    table: Rows = []
    for (_, shape, _, variant, _), measured in sorted(by_case(records).items(), key=_order):
        mine = ours(measured)
        if mine is None or variant == PRECISION:
            continue
        ratios = [
            f"{measured[name]['median'] / mine['median']:.2f} x" if name in measured else "-" for name in BATCH_RIVALS
        ]
        table.append((variant, shape, seconds(mine["median"]), *ratios))
    return markdown_table(("task", "state", "fmkernels", *BATCH_RIVALS), table)


def _order(item: tuple[tuple[str, ...], dict[str, Record]]) -> tuple[str, int, int]:
    _, shape, _, variant, _ = item[0]
    sizes = [int(n) for n in shape.split("x")]
    return variant, len(sizes), sizes[0]


def precision(records: Iterable[Record], library: str) -> dict[str, dict[str, Record]]:
    """Method -> its setting (steps or tolerance) -> record, of one library."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        name, _, task = record["implementation"].partition("-")
        if record["case"]["variant"] == PRECISION and name == library and task:
            method, setting = task.split()
            found.setdefault(method, {})[setting] = record
    return found


def precision_table(records: Iterable[Record]) -> str:
    lines = list(records)
    rival, table = precision(lines, PRECISION_RIVAL), []
    for method, settings in precision(lines, "fmkernels").items():
        for setting, record in settings.items():
            other = rival.get(method, {}).get(setting)
            table.append(
                (
                    method,
                    setting,
                    f"{record['solve']['nfe_per_sample']:.4g}",
                    _error(record),
                    seconds(record["median"]),
                    "-" if other is None else f"{other['solve']['nfe_per_sample']:.4g}",
                    "-" if other is None else _error(other),
                    "-" if other is None else seconds(other["median"]),
                )
            )
    theirs = [f"{PRECISION_RIVAL}'s {what}" for what in ("NFE", "error", "time")]
    return markdown_table(("method", "steps or tolerance", "NFE", "error", "time", *theirs), table)


def blocks(lines: Sequence[Record]) -> dict[str, str]:
    """Name of a docs block -> its text, from one machine's records of the family."""
    every = markdown_table(HEADER, rows(lines))
    return {
        "sampling_small": markdown_table(HEADER, rows(lines, HEADLINE)),
        "sampling_images": markdown_table(HEADER, rows(lines, IMAGES)),
        "sampling_batch": batch_table(lines),
        "sampling_precision": precision_table(lines),
        "sampling_every": f"<details><summary>Every figure</summary>\n\n{every}\n\n</details>",
    }
