"""Results as JSON lines: results/<machine>/<name>.jsonl, one line a family, case, implementation and
timer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1
COPY = "copy"
# How the C library serves large blocks: as it does by itself, or with MALLOC settings under which it keeps them.
DEFAULT_MEMORY, KEPT_MEMORY = "default", "kept"


def append(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[Record]:
    """The records of a file; of a case that several runs measured, those of the last run alone.

    Times of different runs are not compared.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found: list[Record] = [json.loads(line) for line in lines if line.strip()]
    last: dict[tuple[str, ...], str] = {}
    for record in found:
        last[case_key(record)] = max(record["date"], last.get(case_key(record), ""))
    return [record for record in found if record["date"] == last[case_key(record)]]


def case_key(record: Record) -> tuple[str, ...]:
    """What makes results comparable: the same work, timed alike."""
    case = record["case"]
    shape = "x".join(map(str, case["shape"]))
    memory = record.get("memory", DEFAULT_MEMORY)
    timer = record["timer"] if memory == DEFAULT_MEMORY else kept(record["timer"])
    return record["family"], shape, case["dtype"], case["variant"], timer


def kept(timer: str) -> str:
    """The timer's name in the key of a case whose large blocks the C library kept."""
    return f"{timer}, memory kept"


def by_case(records: Iterable[Record]) -> dict[tuple[str, ...], dict[str, Record]]:
    """case_key -> implementation -> record, in the order of the records."""
    cases: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        cases.setdefault(case_key(record), {})[record["implementation"]] = record
    return cases


def ours(implementations: dict[str, Record]) -> Record | None:
    """What users get: impl="auto"."""
    return next((record for record in implementations.values() if record["auto"]), None)


def resolved(record: Record) -> bool:
    """Whether a solver's own time stands out from the noise: at least three of four differences are above 0."""
    return bool(record["solve"]["overhead"]["q1"] > 0)


def newest(root: Path) -> dict[str, list[Record]]:
    """machine -> its records: of each family those of the file with the family's latest result."""
    found: dict[str, list[Record]] = {}
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        files = [read(path) for path in sorted(folder.glob("*.jsonl"))]
        last: dict[str, tuple[str, int]] = {}
        for number, lines in enumerate(files):
            for record in lines:
                family = record["family"]
                last[family] = max((record["date"], number), last.get(family, ("", 0)))
        chosen = [r for number, lines in enumerate(files) for r in lines if last[r["family"]][1] == number]
        if chosen:
            found[folder.name] = chosen
    return found
