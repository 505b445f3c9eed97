"""make gpu: on a machine with an NVIDIA GPU, with its own python3, torch and Triton, without network or isolation.

Builds the library in place for this GPU, runs the whole suite on it, compute-sanitizer over small cases, and the
benchmarks. The result lines go under benchmarks/results, and where OUT is set, copies of them and of the logs there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, command: list[str], logs: Path, **env: str) -> bool:
    """Runs a step, its output to a log as well; True if it succeeded."""
    start = time.perf_counter()
    log = logs / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            file.write(line)
            sys.stdout.write(line)
    ok = process.wait() == 0
    print(f"== {name}: {'passed' if ok else 'FAILED'} in {time.perf_counter() - start:.0f} s", flush=True)
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip", nargs="*", default=[], choices=["build", "tests", "sanitizer", "bench"])
    parser.add_argument("--bench-args", default="--device cuda", help="arguments of the benchmark suite")
    options = parser.parse_args()
    logs = Path(os.environ.get("OUT", ROOT / "build" / "gpu"))
    logs.mkdir(parents=True, exist_ok=True)

    import torch

    if not torch.cuda.is_available():
        print("make gpu: expected a CUDA device, found none", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}"
    passed = True
    if "build" not in options.skip:
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if not run("build", build, logs, FMKERNELS_CUDA="on", FMKERNELS_CUDA_ARCHITECTURES=architecture):
            return 1
        run("env", [sys.executable, "-m", "fmkernels", "env"], logs)
    if "tests" not in options.skip:
        passed &= run("tests", [sys.executable, "-m", "pytest", "--durations=10"], logs)
    if "sanitizer" not in options.skip:
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            print("== sanitizer: compute-sanitizer was not found")
        else:
            pytest = [sys.executable, "-m", "pytest", "tests/test_ops_random.py", "-k", "cuda-native", "-x"]
            for tool in ("memcheck", "racecheck", "initcheck"):
                command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest]
                passed &= run(f"sanitizer-{tool}", command, logs, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "bench" not in options.skip:
        passed &= run("bench", [sys.executable, "-m", "benchmarks", *options.bench_args.split()], logs)
        for lines in (ROOT / "benchmarks" / "results").rglob("*.jsonl"):
            if "OUT" in os.environ:
                shutil.copy(lines, logs / f"{lines.parent.name}-{lines.name}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
