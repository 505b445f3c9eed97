"""The CUDA kernels, judged by their machine code: they compile, spill nothing, and move 16 bytes an access.

Their arithmetic is tested without a GPU by tests/cpp/emulated. FMKERNELS_TEST_CUDA_ARCHITECTURES,
a list such as "80,90,120", replaces the one architecture compiled for by default.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCES = Path(__file__).parents[1] / "csrc"
FILES = tuple(sorted(str(p.relative_to(SOURCES)) for p in SOURCES.glob("*/*_cuda.cu")))
ARCHITECTURES = os.environ.get("FMKERNELS_TEST_CUDA_ARCHITECTURES", "90").split(",")

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH: CUDA sources cannot be compiled")


def find_cuobjdump() -> str | None:
    """CUDA's own, or the one in Triton's package."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return found


class Resources(NamedTuple):
    kernel: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int


class Compiled(NamedTuple):
    cubin: Path
    resources: list[Resources]


def sources(*files: str) -> list:
    """A file for each architecture; the tests of one share what is compiled."""
    return [
        pytest.param((file, arch), id=f"{file}-{arch}", marks=pytest.mark.xdist_group(f"{file}-{arch}"))
        for file in files
        for arch in ARCHITECTURES
    ]


@pytest.fixture(scope="module", params=sources(*FILES))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    file, arch = request.param
    cubin = tmp_path_factory.mktemp("cubin") / "out.cubin"
    flags = ["-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-Xptxas=-v"]
    command = [str(NVCC), *flags, "-o", str(cubin), str(SOURCES / file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert "warning" not in report, report
    pattern = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers"
    )
    resources = [Resources(m[0], *map(int, m[1:])) for m in re.findall(pattern, report)]
    assert len(resources) == report.count("Compiling entry function"), report
    return Compiled(cubin, resources)


def machine_code(cubin: Path) -> dict[str, str]:
    """SASS by kernel."""
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is neither on PATH nor in an installed Triton: no machine code to look at")
    command = [tool, "--dump-sass", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    parts = re.split(r"Function : (\S+)", result.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_nothing_goes_to_local_memory(compiled: Compiled) -> None:
    assert compiled.resources
    bad = [r for r in compiled.resources if r.stack or r.spill_stores or r.spill_loads]
    assert not bad, bad


def test_registers_leave_two_blocks_resident(compiled: Compiled) -> None:
    # 65536 registers of a multiprocessor, blocks of 256 threads
    assert max(r.registers for r in compiled.resources) <= 128, compiled.resources


def test_accesses_are_128_bits_wide(compiled: Compiled) -> None:
    vectorised = 0
    for name, code in machine_code(compiled.cubin).items():
        # one element, or one row of the control, a thread
        if re.search(r"finish_kernel|ScalarLossShape|step_control_kernel|StepRowsShapeILNS_5DtypeE\dELi1E", name):
            continue
        vectorised += 1
        # cache hints may stand between the parts of the mnemonic
        stores = re.search(r"STG\.E\.(\w+\.)*128", code)
        # a 2-byte pred beside 4-byte data: four elements of its gradient are 8 bytes
        narrow = re.search(r"LossShapeILNS_5DtypeE[12]ELS\d+_0E", name)
        reduction = "row_dots" in name  # writes nothing but sums
        assert stores or narrow or reduction, f"{name}: no 128-bit store"
        if "random_kernel" not in name:
            assert re.search(r"LDG\.E\.(\w+\.)*128", code), f"{name}: no 128-bit load"
        assert not re.search(r"\b(LDL|STL|ATOM|RED)\b", code), f"{name}: local memory or an atomic"
    assert vectorised > 0


@pytest.mark.parametrize("compiled", sources("combine/combine_cuda.cu"), indirect=True)
def test_operands_are_in_flight_together(compiled: Compiled) -> None:
    """The combination of two float32 operands issues all its wide loads before it uses the first."""
    codes = [
        code
        for name, code in machine_code(compiled.cubin).items()
        if re.search(r"combine_kernelINS_12CombineShapeILNS_5DtypeE0ELi2ELi2E", name)
    ]
    assert codes
    loads = [m.start() for m in re.finditer(r"LDG\.E\.(?:\w+\.)*128", codes[0])]
    assert len(loads) == 4
    between = codes[0][loads[0] : loads[-1]]
    assert not re.search(r"\b(FFMA|STG|BRA)\b", between), between
