"""``python -m benchmarks [options]`` measures; ``python -m benchmarks render [--check]`` makes plots and
tables."""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fmkernels.testing import Case

from . import machine, records, render, report, report_sampling, targets
from .families import FAMILIES
from .family import Family
from .runner import Options, RedCheck, Runner

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Job = tuple[Family, Case, torch.dtype]

# Of each family the cases of a quick run, in float32: (shape, variant).
QUICK: dict[str, tuple[tuple[tuple[int, ...], str], ...]] = {
    "cfm": (
        ((256, 2), "x_0 given"),
        ((256, 16, 64, 64), "x_0 given"),
        ((256, 16, 64, 64), "x_0 drawn"),
    ),
    "path": (((256, 4, 32, 32), "x_0 given"),),
    "loss": (((256, 4, 32, 32), "x_0 given"),),
    "randn": (((256, 16, 64, 64), ""),),
    "combine": (((256, 4, 32, 32), "K=4"),),
    "sampling": (((16, 2), "euler 100"), ((16, 2), "euler cfg 50"), ((16, 2), "dopri5 1e-05")),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few float32 cases, under 2 minutes on 2 cores")
    parser.add_argument(
        "--promises", action="store_true", help="the cases of promised speeds (targets.py), and no others"
    )
    parser.add_argument("--family", action="append", choices=FAMILIES, help="may be repeated; default: all")
    parser.add_argument("--filter", default="", help="only cases whose name holds this text (see --list)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, help="samples of every implementation; default: by --budget")
    parser.add_argument("--budget", type=float, help="seconds of timing a case; default 6, quick 1")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which starts slowly")
    parser.add_argument(
        "--out",
        type=Path,
        help="root of the results; default benchmarks/results, quick: none",
    )
    parser.add_argument("--name", default=datetime.date.today().isoformat(), help="of the file; default: today")
    parser.add_argument(
        "--memory",
        choices=(records.DEFAULT_MEMORY, records.KEPT_MEMORY, "both"),
        default="both",
        help="how the C library serves large blocks: as it does, or keeping them (a process of its own); default: both",
    )
    parser.add_argument("--list", action="store_true", help="say what would be measured")
    parser.add_argument("--check-targets", action="store_true", help="fail unless every promise is kept")
    parser.add_argument("--verbose", action="store_true", help="print every implementation's figures")
    return parser


def _name(job: Job) -> str:
    family, case, dtype = job
    shape = "x".join(map(str, case.shape))
    return f"{family.name}/{shape}/{case.variant}/{dtype}".replace("torch.", "").replace("//", "/")


def _jobs(options: argparse.Namespace) -> list[Job]:
    jobs = []
    for family in FAMILIES.values():
        if options.family and family.name not in options.family:
            continue
        for name in options.dtype or (["float32"] if options.quick and not options.promises else DTYPES):
            if options.memory == records.KEPT_MEMORY and family.solve is not None:
                continue  # whole solves write into buffers of their own
            for case in family.cases if DTYPES[name] in family.dtypes else ():
                if options.promises:
                    wanted = targets.is_promised(family.name, case.shape, case.variant, name, options.device)
                else:
                    wanted = not options.quick or (case.shape, case.variant) in QUICK.get(family.name, ())
                if wanted:
                    jobs.append((family, case, DTYPES[name]))
    return [job for job in jobs if options.filter in _name(job)]


def _measure(options: argparse.Namespace, jobs: Sequence[Job]) -> int:
    device = torch.device(options.device)
    runner = Runner(
        Options(
            device=device,
            budget=options.budget or (1.0 if options.quick else 6.0),
            rounds=options.rounds,
            with_compile=not options.no_compile,
            quick=options.quick,
            memory=options.memory,
        )
    )
    name = machine.slug(runner.machine)
    out = options.out if options.out or options.quick else records.RESULTS
    path = out / name / f"{options.name}.jsonl" if out else None
    print(f"{name}: {len(jobs)} cases on {device}")
    measured: list[records.Record] = []
    refused: list[str] = []
    for number, job in enumerate(jobs, 1):
        start = time.perf_counter()
        print(f"[{number}/{len(jobs)}] {_name(job)}", flush=True)
        try:
            fresh = runner.run(*job)
        except RedCheck as error:
            refused.append(f"{_name(job)}: {error}")
            print(f"  REFUSED, its check is red: {error}", flush=True)
            continue
        measured += fresh
        if path is not None:
            records.append(path, fresh)
        mine = records.ours({r["implementation"]: r for r in fresh})
        if mine is not None:
            taken = time.perf_counter() - start
            print(f"  {report.seconds(mine['median'])}, took {taken:.0f} s", flush=True)
    _show(measured, verbose=options.verbose)
    print(f"\nresults: {path}" if path else "\nresults were not kept (a quick run keeps them with --out)")
    kept = True
    if options.check_targets and options.memory == records.DEFAULT_MEMORY:
        lines, kept = targets.check(measured, device.type, options.family)
        print("\n".join(["", "targets:", *lines]))
    for line in refused:
        print(f"REFUSED: {line}", file=sys.stderr)
    return 0 if kept and not refused else 1


def _show(measured: Sequence[records.Record], *, verbose: bool) -> None:
    for family in FAMILIES.values():
        lines = [r for r in measured if r["family"] == family.name]
        if lines:
            print(f"\n{family.name}: {family.what}")
            solves = family.solve is not None
            header = report_sampling.HEADER if solves else report.HEADER
            print(report.plain_table(header, report_sampling.rows(lines) if solves else report.rows(lines)))
    if verbose and measured:
        print()
        print(report.plain_table(report.IMPLEMENTATION_HEADER, report.implementation_rows(measured)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["render"]:
        return render.main(arguments[1:])
    options = _parser().parse_args(arguments)
    both = options.memory == "both"
    if both:
        options.memory = records.DEFAULT_MEMORY
    jobs = _jobs(options)
    if options.list:
        print("\n".join(map(_name, jobs)))
        return 0
    if not jobs:
        print("no case matches", file=sys.stderr)
        return 0 if options.memory == records.KEPT_MEMORY else 2
    status = _measure(options, jobs)
    if both and options.device == "cpu" and sys.platform == "linux":
        status = max(status, _measure_with_kept_memory(arguments))
    return status


# glibc: no block by mmap, none given back to the system; so that nobody pays for the page faults of fresh outputs.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 46)}


def _measure_with_kept_memory(arguments: Sequence[str]) -> int:
    """The same jobs once more in a process whose C library keeps large blocks: ours, plain PyTorch and its compile."""
    command = [sys.executable, "-m", "benchmarks", *arguments, "--memory", records.KEPT_MEMORY]
    return subprocess.run(command, env={**os.environ, **KEEPING}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
