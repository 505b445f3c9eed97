"""What a result was measured on and with: no host name, no path."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fmkernels as fm
from fmkernels import _native

ROOT = Path(__file__).resolve().parent.parent


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        match = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return match.group(1) if match else None


def describe(device: torch.device) -> dict[str, Any]:
    library = None if _native.missing("cpu") else _native.library()
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": library.isa() if library is not None else torch.backends.cpu.get_cpu_capability(),
        "gpu": None,
        "driver": None,
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "driver": _driver()}
    return machine


def slug(machine: dict[str, Any]) -> str:
    """The folder of a machine's results: its GPU, or its CPU and how many threads ran."""
    if machine["gpu"]:
        name = machine["gpu"]
    else:
        name = re.sub(r"\((r|tm)\)|processor|cpu|@.*|\d+-core", " ", machine["cpu"].lower())
        name += f" {machine['threads']}threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    return {
        "fmkernels": vars(fm).get("__version__"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "torchcfm": _version("torchcfm"),
        "flow_matching": _version("flow_matching"),
        "torchdiffeq": _version("torchdiffeq"),
        "torchode": _version("torchode"),
        "diffusers": _version("diffusers"),
    }


def commit() -> str | None:
    """The commit of the source tree, marked where tracked files differ from it; None outside a git
    checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-modified" if changed else "")


def _git(*arguments: str) -> str:
    # --no-optional-locks: status must not write the index of a tree that others work in
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
