"""The model of the CUDA kernels' speed (tools/sass_model.py): its counting, its committed tables, its page; and that
the sources' machine code has not grown beyond them."""

from __future__ import annotations

import pytest
import sass
import sass_model
import torch
from cuda_sources import FILES, Compile, machine_code, needs_nvcc, sources
from sass import Kernel, Wanted

from fmkernels.paths.batch import stores_noise

CODE = """
        /*0000*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, 0x4, PT ;
        /*0020*/              @!P0 BRA 0x80 ;
        /*0030*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   IMAD.WIDE.U32 R8, R8, -0x2daee0ad, RZ ;
        /*0050*/              @P1 BRA 0x30 ;
        /*0060*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
        /*0080*/                   MUFU.RCP R3, R2 ;
        /*0090*/                   STG.E desc[UR4][R2.64], R3 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
        /*00c0*/                   NOP;
"""


def test_the_cheapest_way_does_what_is_wanted() -> None:
    kernel = Kernel(CODE)
    ways = {rounds: kernel.cheapest(Wanted(loads=rounds, stores=1)) for rounds in (1, 2, 3)}
    assert [len(way or ()) for way in ways.values()] == [8, 11, 14]
    assert [i.opcode for i in ways[1] or ()] == ["LDC", "ISETP", "BRA", "LDG", "IMAD", "BRA", "STG", "EXIT"]
    found = sass.count(ways[2] or [])
    assert found == {"ldc": 1, "alu": 1, "ctrl": 4, "lsu": 3, "imad": 2, "wide": 2, "vectors": 3}
    assert len(kernel.cheapest(Wanted()) or ()) == 6
    assert len(kernel.cheapest(Wanted(products=4)) or ()) == 17


def test_of_two_stores_predicated_against_each_other_one_is_done() -> None:
    other = """
        /*0060*/              @!P2 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0068*/               @P2 STG.E.EF.128 desc[UR4][R2.64], R4 ;
        /*006c*/               @P3 STG.E desc[UR4][R6.64], R4 ;
"""
    kernel = Kernel(CODE.replace("        /*0060*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;\n", other))
    way = kernel.cheapest(Wanted(loads=1, stores=1)) or []
    assert [i.opcode for i in way] == ["LDC", "ISETP", "BRA", "LDG", "IMAD", "BRA", "STG", "STG", "STG", "EXIT"]
    found = sass.count(way)
    assert (found["lsu"], found["off"], found["vectors"]) == (3, 1, 2)
    assert sum(found[name] for name in sass.PIPES) == len(way)


def test_ways_that_are_closed_are_not_taken() -> None:
    assert len(Kernel(CODE, vectors_only=True).cheapest(Wanted()) or ()) == 8
    assert Kernel(CODE).cheapest(Wanted(entries=1)) is None


def test_the_model_is_the_slowest_of_memory_issue_and_pipes() -> None:
    issued = {"issued": 40.0, "alu": 10.0, "imad": 4.0, "wide": 4.0, "xu": 1.0, "lsu": 0.5, "vectors": 0.5}
    entry = {"issued": issued, "read": 4, "written": 4, "loaded": 32, "threads": 256, "registers": 64, "shared": 0}
    gpu = sass_model.Gpu("one", "90", 1, 1.0, 1.0, 1000.0)
    found = sass_model.modelled(entry, gpu)
    n = sass_model.ELEMENTS
    assert found.times["memory"] == pytest.approx(n * 8 / 1e6)
    assert found.times["issue"] == pytest.approx(n * 40 / 128 / 1e3)  # four instructions of a warp a clock
    assert found.times["alu"] == pytest.approx(n * 10 / 64 / 1e3)
    assert found.times["imad"] == pytest.approx(n * 8 / 64 / 1e3)  # wide ones count twice
    assert found.times["lsu"] == pytest.approx(n * 8 / 128 / 1e3)
    assert found.slowest == "issue"
    assert found.ratio == pytest.approx(40e-3 / 128 / 8e-6)
    assert found.occupancy == 0.5  # 64 registers: four blocks of 256 threads
    assert found.flight == 4 * 256 * 32
    assert found.needed == pytest.approx(1e12 * 1000e-9 / 2)  # half of what moves is read


def test_what_exceeds_a_table_is_named() -> None:
    def entries(issued: float, registers: int) -> dict[str, dict[str, sass_model.Entry]]:
        return {"cases": {"randn": {"issued": {"issued": issued}}}, "kernels": {"k": {"registers": registers}}}

    def excesses(issued: float, registers: int) -> list[str]:
        now = entries(issued, registers)
        return sass_model.excesses(entries(100.0, 40), now["kernels"], now["cases"])

    assert not excesses(104.9, 42)
    assert excesses(105.1, 40) == ["randn: 105.1 instructions an element, 100 in the table"]
    assert excesses(100.0, 43) == ["k: 43 registers, 40 in the table"]
    assert sass_model.excesses(entries(1.0, 1), {"other": {"registers": 1}}, {}) == ["other: not in the table"]


@needs_nvcc
@pytest.mark.parametrize("source", sources(*FILES))
def test_machine_code_stays_within_its_table(source: tuple[str, str], compile_cuda: Compile) -> None:
    """Instructions an element and registers, to 5 %; `python tools/sass_model.py --write` where more is meant."""
    file, architecture = source
    if architecture not in sass_model.ARCHITECTURES:
        pytest.skip(f"no table for sm_{architecture}")
    compiled = compile_cuda(file, architecture)
    assert machine_code(compiled.cubin)
    counted = sass_model.cases_of(file.split("/")[0], compiled)
    table = sass_model.read_table(architecture)
    found = sass_model.excesses(table, sass_model.kernels_of(compiled), counted)
    assert not found, f"nvcc {sass_model.nvcc_version()}, the table's is {table['nvcc']}: {found}"


def test_tables_list_every_case() -> None:
    for architecture in sass_model.ARCHITECTURES:
        table = sass_model.read_table(architecture)
        assert list(table["cases"]) == [case.name for case in sass_model.cases()]
        assert list(table["triton_cases"]) == [name for name, *_ in sass_model.TRITON.values()]
        assert {entry["kernel"] for entry in table["cases"].values()} <= set(table["kernels"])
        text = (sass_model.TABLES / f"sm_{architecture}.json").read_text(encoding="utf-8")
        assert text == sass_model.table_text(table)


def test_the_page_is_what_the_tables_say() -> None:
    """`python tools/sass_model.py --write` makes both."""
    tables = {architecture: sass_model.read_table(architecture) for architecture in sass_model.ARCHITECTURES}
    page = sass_model.PAGE.read_text(encoding="utf-8")
    assert page == sass_model.page_with(page, sass_model.page_text(tables))
    with pytest.raises(ValueError, match="expected the marks"):
        sass_model.page_with("no marks", "")


@pytest.mark.parametrize("gpu", sass_model.GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("name", "dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_noise_is_stored_where_the_model_says(name: str, dtype: torch.dtype, gpu: sass_model.Gpu) -> None:
    again, stored = sass_model.noise_times(sass_model.read_table(gpu.architecture)["cases"], gpu, name)
    assert stores_noise(dtype, int(gpu.architecture)) == (stored < again)
    assert stores_noise(dtype, None)  # a CPU
