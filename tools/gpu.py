"""make gpu: on a machine with an NVIDIA GPU, with its own python3, torch and Triton, without network or isolation.

What tells most comes first: the build for this GPU alone, what is there, every operation against the reference, the
promised speeds, each kernel's time beside its model's, the tests on the GPU, the sanitizers, the other tests. All of it
ends within the budget: each step has a share and is ended at its limit (tools/timed_steps.py). Under $OUT, or
build/gpu, is what there is so far: steps.log, steps.jsonl (how each step ended), operations.jsonl, model.jsonl, and the
benchmarks' records.

    python3 tools/gpu.py [--budget SECONDS] [--only STEP ...] [--skip STEP ...]

Exit status: 0 where all steps passed, 1 where any failed, 2 without a GPU, 3 where some were cut or not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import timed_steps
from timed_steps import Step

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 560.0  # seconds: one call of ten minutes
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def steps(python: str, out: Path, architecture: str, sanitizer: str | None, workers: int) -> list[Step]:
    """All of them, by what they tell; shares in seconds of the usual budget."""
    building = {"FMKERNELS_CUDA": "on", "FMKERNELS_CUDA_ARCHITECTURES": architecture}
    operations = [python, "tools/gpu_operations.py"]
    parallel = ["-n", str(workers), "--dist", "loadgroup"] if workers > 1 else []
    checked = ["--check", "--impls", "native", "triton", "--seconds", "55", "--out", str(out / "operations.jsonl")]
    promised = ["--device", "cuda", "--quick", "--promises", "--check-targets", "--out", str(out)]
    pytest = [python, "-m", "pytest", "--durations=10", *parallel]
    found = [
        Step("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 180, building, needed=True),
        Step("env", [python, "-m", "fmkernels", "env"], 15),
        Step("operations", [*operations, *checked], 60),
        Step("bench", [python, "-m", "benchmarks", *promised], 110),
        Step("model", [python, "tools/measured_model.py", "--out", str(out / "model.jsonl")], 25),
        Step("tests", [*pytest, "-k", "cuda and not cuda_sources"], 60),
    ]
    if sanitizer is not None:
        found += [
            Step(
                tool,
                [sanitizer, "--tool", tool, "--error-exitcode", "9", *operations, "--seconds", "12"],
                20,
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor in memory of its own, with bounds
            )
            for tool in SANITIZERS
        ]
    return [*found, Step("rest", [*pytest, "-k", "not cuda"], 30)]


def chosen(every: Sequence[Step], only: Sequence[str], skip: Sequence[str]) -> list[Step]:
    """Raises ValueError for a name that no step has."""
    names = [step.name for step in every]
    unknown = [name for name in (*only, *skip) if name not in names]
    if unknown:
        raise ValueError(f"expected steps among {', '.join(names)}, got {', '.join(unknown)}")
    return [step for step in every if (not only or step.name in only) and step.name not in skip]


def has_module(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all steps; default {BUDGET:.0f}")
    parser.add_argument("--only", nargs="*", default=[], help="steps to run")
    parser.add_argument("--skip", nargs="*", default=[], help="steps not to run")
    options = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve()

    import torch

    if not torch.cuda.is_available():
        print("make gpu: expected a CUDA device, found none", file=sys.stderr)
        return 2
    architecture = "{}{}".format(*torch.cuda.get_device_capability())
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer was not found: none of its steps is run")
    workers = min(4, len(os.sched_getaffinity(0))) if has_module("xdist") else 1
    try:
        wanted = chosen(steps(sys.executable, out, architecture, sanitizer, workers), options.only, options.skip)
    except ValueError as error:
        parser.error(str(error))
    timed_steps.ending_on_sigterm()
    outcomes = timed_steps.Runner(ROOT, out, ROOT / "build" / "gpu", options.budget).run(wanted)
    print(timed_steps.table(outcomes))
    return timed_steps.exit_status(outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
