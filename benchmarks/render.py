"""Plots and Markdown tables from the newest results of each machine; ``--check`` tells whether they are up to
date.

A page takes a table where it says ``<!-- benchmarks:begin NAME -->`` ... ``<!-- benchmarks:end -->``; NAME is
one of BLOCKS. What stands between the marks is replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import plot, plot_sampling, records, report, report_sampling, targets
from .families import FAMILIES
from .records import Record

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/performance.md", "docs/solvers.md", "README.md")
IMAGES = "docs/images"
_MARKS = re.compile(r"(<!-- benchmarks:begin (\w+) -->\n)(.*?)(<!-- benchmarks:end -->)", re.DOTALL)

Results = dict[str, list[Record]]  # machine -> records
# and (kind of plot, machine) -> its address, seen from the page
Context = tuple[Results, Callable[[str, str], str]]
SAMPLING = "sampling"
# Kind of plot -> what draws it, and which records it shows.
PLOTS: dict[str, tuple[Callable[[Path, str, Sequence[Record], str], None], Callable[[Record], bool]]] = {
    "benchmarks": (plot.write, lambda record: record["family"] != SAMPLING),
    SAMPLING: (plot_sampling.write, lambda record: record["family"] == SAMPLING),
}


def _headline(machine: str, lines: Sequence[Record]) -> str:
    last = max(lines, key=lambda record: record["date"])
    where, versions = last["machine"], last["versions"]
    hardware = where["gpu"] or f"{where['cpu']}, {where['threads']} threads, {where['isa']}"
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commits = sorted({record["commit"] for record in lines if record["commit"]})
    commit = f", commit {' and '.join(commits)}" if commits else ""
    return f"**{machine}**: {hardware}; {software}{commit}; {last['date'][:10]}."


def _image(machine: str, context: Context) -> str:
    return f"![Speed beside eager PyTorch on {machine}]({context[1]('benchmarks', machine)})"


def _shown(kind: str, context: Context) -> list[tuple[str, list[Record]]]:
    """Machine and records, of the machines that have some of this kind."""
    chosen = [(machine, [r for r in lines if PLOTS[kind][1](r)]) for machine, lines in context[0].items()]
    return [(machine, lines) for machine, lines in chosen if lines]


def _promised(lines: Sequence[Record], families: Sequence[str]) -> str:
    device = "cuda" if lines[0]["machine"]["gpu"] else "cpu"
    promised, _ = targets.check(lines, device, families)
    return "\n".join(["What was promised:", "", *(f"- {line}" for line in promised)])


def _lost(lines: Sequence[Record]) -> str:
    table = report.losses(lines)
    if not table:
        return "Where it loses: in no case measured."
    return "Where it loses:\n\n" + report.markdown_table(report.LOSSES_HEADER, table)


def _readme(context: Context) -> str:
    """For each machine its plot, the whole step, and every case that another wins."""
    parts = []
    for machine, lines in _shown("benchmarks", context):
        chosen = [r for r in lines if r["family"] == "cfm"]
        parts += [_headline(machine, lines), _image(machine, context)]
        parts.append(report.markdown_table(report.HEADER, report.rows(chosen)))
        parts.append(_lost(lines + [r for m, s in _shown(SAMPLING, context) if m == machine for r in s]))
    return "\n\n".join(parts)


def _performance(context: Context) -> str:
    """Every family, what was promised, and every single figure."""
    parts = []
    families = [family for family in FAMILIES.values() if family.solve is None]
    for machine, lines in _shown("benchmarks", context):
        parts += [f"## {machine}", _headline(machine, lines), _image(machine, context)]
        parts.append(_promised(lines, [family.name for family in families]))
        for family in families:
            rows = report.rows(r for r in lines if r["family"] == family.name)
            if rows:
                parts.append(f"### {family.name}: {family.what}")
                parts.append(report.markdown_table(report.HEADER, rows))
        every = report.markdown_table(report.IMPLEMENTATION_HEADER, report.implementation_rows(lines))
        parts.append(f"<details><summary>Every figure</summary>\n\n{every}\n\n</details>")
    return "\n\n".join(parts)


def _sampling(name: str) -> Callable[[Context], str]:
    """A block of the page on solvers."""

    def block(context: Context) -> str:
        parts = []
        for machine, lines in _shown(SAMPLING, context):
            text = report_sampling.blocks(lines).get(name)
            if text is None:
                image = f"![Whole solves on {machine}]({context[1](SAMPLING, machine)})"
                parts += [_headline(machine, lines), image, _promised(lines, [SAMPLING])]
            else:
                parts += [f"**{machine}**", text]
        return "\n\n".join(parts) or "Not measured yet."

    return block


BLOCKS: dict[str, Callable[[Context], str]] = {
    "readme": _readme,
    "performance": _performance,
    "sampling": _sampling("sampling"),
    **{name: _sampling(name) for name in report_sampling.blocks([])},
}


def digest(lines: Sequence[Record]) -> str:
    """Names the records that a plot was made from; stands in the PNG's metadata."""
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()[:16]


def _page(text: str, context: Context) -> str:
    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]](context)}\n\n{match[4]}"

    return _MARKS.sub(replace, text)


def render(root: Path, results_root: Path, *, check: bool) -> list[str]:
    """Writes plots and pages under ``root`` (or, with ``check``, only looks); returns what is missing or
    stale."""
    results = records.newest(results_root)
    if not results:
        return [f"{results_root.name}: no results; run python -m benchmarks first"]
    problems = []
    context: Context = (results, lambda kind, machine: f"{kind}-{machine}.png")
    shown = [(kind, *chosen) for kind in PLOTS for chosen in _shown(kind, context)]
    for kind, machine, lines in shown:
        image = root / IMAGES / context[1](kind, machine)
        name = image.relative_to(root)
        if not check:
            image.parent.mkdir(parents=True, exist_ok=True)
            if not _made_from(image, lines):
                PLOTS[kind][0](image, machine, lines, digest(lines))
        elif not image.exists():
            problems.append(f"{name}: missing; run python -m benchmarks render")
        elif not _made_from(image, lines):
            problems.append(f"{name}: made from other results; run python -m benchmarks render")
    for page_name in PAGES:
        page = root / page_name
        if not page.exists():
            problems.append(f"{page_name}: missing")
            continue
        text = page.read_text(encoding="utf-8")
        if not _MARKS.search(text):
            problems.append(f"{page_name}: no marks <!-- benchmarks:begin NAME --> ... <!-- benchmarks:end --> in it")
            continue
        images = os.path.relpath(root / IMAGES, page.parent).replace(os.sep, "/")
        unknown = {match[2] for match in _MARKS.finditer(text)} - set(BLOCKS)
        if unknown:
            expected = ", ".join(BLOCKS)
            problems += [f"{page_name}: unknown block {u!r}, expected one of {expected}" for u in sorted(unknown)]
            continue
        new = _page(text, (results, lambda kind, machine, at=images: f"{at}/{kind}-{machine}.png"))  # type: ignore[misc]
        if new != text and check:
            problems.append(f"{page_name}: differs from the results; run python -m benchmarks render")
        elif new != text:
            page.write_text(new, encoding="utf-8")
    return problems


def _made_from(image: Path, lines: Sequence[Record]) -> bool:
    return image.exists() and digest(lines).encode() in image.read_bytes()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks render", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree that holds README.md and docs/")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="root of the results")
    options = parser.parse_args(argv)
    problems = render(options.root, options.results, check=options.check)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0
