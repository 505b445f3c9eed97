"""The CUDA sources compiled, once in a test run (``compile_cuda`` of conftest.py) for all tests that look at them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import sass  # noqa: E402

SOURCES = ROOT / "csrc"
FILES = tuple(sorted(str(p.relative_to(SOURCES)) for p in SOURCES.glob("*/*_cuda.cu")))
ARCHITECTURES = os.environ.get("FMKERNELS_TEST_CUDA_ARCHITECTURES", "90").split(",")
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not on PATH: CUDA sources cannot be compiled"
)

Compile = Callable[[str, str], sass.Compiled]  # file, architecture


def sources(*files: str) -> list:
    """A file for each architecture; the tests of one run on one worker and share what is compiled."""
    return [
        pytest.param((file, arch), id=f"{file}-{arch}", marks=pytest.mark.xdist_group(f"{file}-{arch}"))
        for file in files
        for arch in ARCHITECTURES
    ]


def compiler(folder: Path) -> Compile:
    """Compiles a file when it is asked for first."""
    made: dict[tuple[str, str], sass.Compiled] = {}

    def compiled(file: str, architecture: str) -> sass.Compiled:
        key = (file, architecture)
        if key not in made:
            made[key] = sass.compile_source(SOURCES / file, architecture, folder / f"{len(made)}.cubin")
        return made[key]

    return compiled


def machine_code(cubin: Path) -> dict[str, str]:
    """SASS by kernel."""
    if sass.find_cuobjdump() is None:
        pytest.skip("cuobjdump is neither on PATH nor in an installed Triton: no machine code to look at")
    return sass.disassemble(cubin)
