"""The CUDA kernels, judged by their machine code: they compile, spill nothing, and move 16 bytes an access.

Their arithmetic is tested without a GPU by tests/cpp/emulated. FMKERNELS_TEST_CUDA_ARCHITECTURES,
a list such as "80,90,120", replaces the one architecture compiled for by default.
"""

from __future__ import annotations

import re

import pytest
from cuda_sources import FILES, Compile, machine_code, needs_nvcc, sources
from sass import Compiled

pytestmark = needs_nvcc


@pytest.fixture(params=sources(*FILES))
def compiled(request: pytest.FixtureRequest, compile_cuda: Compile) -> Compiled:
    return compile_cuda(*request.param)


def test_nothing_goes_to_local_memory(compiled: Compiled) -> None:
    assert compiled.resources
    bad = [item for item in compiled.resources.items() if (r := item[1]).stack or r.spill_stores or r.spill_loads]
    assert not bad, bad


def test_registers_leave_two_blocks_resident(compiled: Compiled) -> None:
    # 65536 registers of a multiprocessor, blocks of 256 threads
    assert max(r.registers for r in compiled.resources.values()) <= 128, compiled.resources


def test_accesses_are_128_bits_wide(compiled: Compiled) -> None:
    vectorised = 0
    for name, code in machine_code(compiled.cubin).items():
        # one element, one time, or one row of the control, a thread
        if re.search(
            r"finish_kernel|ScalarLossShape|(step_control|schedule)_kernel|StepRowsShapeILNS_5DtypeE\dELi1E", name
        ):
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
    assert vectorised > 0 or "schedule_kernel" in name


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
