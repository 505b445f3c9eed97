"""The command ``fmkernels``: what is installed and what would run (env), the demo, the benchmarks."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import _dispatch, _native
from .version import __version__

# A source checkout has examples/ and benchmarks/ beside the package; an installed wheel has neither.
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "demo": ("examples/digits.py", ["examples/digits.py"], "make demo"),
    "bench": ("benchmarks/__main__.py", ["-m", "benchmarks"], "make bench"),
}


def environment() -> dict[str, Any]:
    """What fmkernels runs on and with: versions, the compiled library, devices, and what ``impl="auto"`` takes.

    Values are those of JSON; no host or user name among them.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "fmkernels": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "triton": _triton_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if "cuda" in devices else [],
        "library": _library(),
        "FMKERNELS_IMPL": os.environ.get("FMKERNELS_IMPL"),
        "implementations": {device: {op: _taken(op, device) for op in _dispatch.OPS} for device in devices},
        "unavailable": {device: _unavailable(device) for device in devices},
    }


def _triton_version() -> str | None:
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _library() -> dict[str, Any]:
    """What the compiled library was built with and found at run time, or why it is missing."""
    reason = _native.missing("cpu")
    if reason is not None:
        return {"missing": reason}
    library = _native.library()
    return {
        "missing": None,
        "build": dict(library.build_info()),
        "cuda_architectures": list(library.cuda_architectures()),
        "isa": library.isa(),
        "max_threads": library.max_threads(),
    }


def _taken(op: str, device_type: str) -> str:
    """The implementation that ``impl="auto"`` takes; under an FMKERNELS_IMPL that cannot run, the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not available, and why, is told anyway
        try:
            return _dispatch.chosen(op, device_type, _dispatch.wanted("auto"))
        except RuntimeError as error:
            return f"none ({error})"


def _unavailable(device_type: str) -> dict[str, str]:
    reasons = {impl: _dispatch.unavailable(impl, device_type) for impl in _dispatch.IMPLS if impl != "auto"}
    return {impl: reason for impl, reason in reasons.items() if reason is not None}


def describe(found: dict[str, Any]) -> str:
    """The environment as text, a line for each fact."""
    rows = [(name, found[name]) for name in ("fmkernels", "python", "torch")]
    rows.append(("triton", found["triton"] or "not installed"))
    rows.append(("system", found["system"]))
    rows.append(("CPU", f"{found['cpu']}, {found['threads']} threads"))
    for gpu in found["gpus"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        rows.append(("GPU", f"{gpu['name']}, compute capability {gpu['capability']}, {memory}"))
    if not found["gpus"]:
        built = f"torch was built for CUDA {found['torch_cuda']}" if found["torch_cuda"] else "torch has no CUDA"
        rows.append(("GPU", f"none ({built})"))
    library = found["library"]
    if library["missing"] is not None:
        rows.append(("compiled library", f"missing: {library['missing']}"))
    else:
        rows.append(("compiled library", ", ".join(f"{k} {v}" for k, v in library["build"].items())))
        architectures = ", ".join(map(str, library["cuda_architectures"])) or "none (built without CUDA)"
        rows.append(("  CUDA architectures", architectures))
        rows.append(("  CPU instructions", f"{library['isa']}, up to {library['max_threads']} threads"))
    if found["FMKERNELS_IMPL"] is not None:
        rows.append(("FMKERNELS_IMPL", found["FMKERNELS_IMPL"]))
    for device, taken in found["implementations"].items():
        rows += [(f"{op} on {device}", f"{impl}") for op, impl in taken.items()]
        rows += [(f"  no {impl} on {device}", why) for impl, why in found["unavailable"][device].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _run_script(command: str, arguments: Sequence[str]) -> int:
    """Runs a script of the source checkout in a process of its own; returns its exit status."""
    needed, start, target = SCRIPTS[command]
    if not (ROOT / needed).is_file():
        print(
            f"fmkernels {command}: needs a source checkout, for {needed}; this fmkernels is an installed package, "
            f"which has none. Clone the repository and run `{target}` there.",
            file=sys.stderr,
        )
        return 2
    script = [str(ROOT / part) if part == needed else part for part in start]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.call(
        [sys.executable, *script, *arguments], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fmkernels", description="Fused flow matching for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fmkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    env = commands.add_parser("env", help="versions, devices, the compiled library, and what impl='auto' takes")
    env.add_argument("--json", action="store_true", help="as one JSON object")
    commands.add_parser("demo", help="train on handwritten digits and sample (source checkout); takes its options")
    commands.add_parser("bench", help="run the benchmark suite (source checkout); takes its options")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # All that follows belongs to the script, --help too, so argparse must not see it.
    if arguments and arguments[0] in SCRIPTS:
        return _run_script(arguments[0], arguments[1:])
    options = _parser().parse_args(arguments)
    found = environment()
    print(json.dumps(found, indent=2) if options.json else describe(found))
    return 0
