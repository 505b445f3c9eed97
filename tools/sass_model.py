"""A model of the CUDA kernels' speed from their machine code, for where there is no GPU to measure on.

    python tools/sass_model.py           shows it, for the sources as they are
    python tools/sass_model.py --write   and puts it into benchmarks/model and docs/performance.md

For each kernel the cheapest way of a thread through its machine code that does a case's loads, stores and Philox
rounds, for one and for two rounds of its loop: a lower bound on what is issued. From it the times of 2^26 elements that
memory, the issue of instructions and each pipe would take alone, of which the longest is the model's. It knows nothing
of latencies, of caches, or of what does not overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sass
from sass import Wanted

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
TABLES = ROOT / "benchmarks" / "model"
PAGE = ROOT / "docs" / "performance.md"
MARKS = ("<!-- sass-model:begin -->\n", "<!-- sass-model:end -->\n")
ARCHITECTURES = ("90", "100")
ELEMENTS = 2**26
TOLERANCE = 0.05  # by which machine code may exceed its table


class Gpu(NamedTuple):
    """What the model takes a GPU for. Clock and bandwidth are the data sheets'; the latency under load is assumed."""

    name: str
    architecture: str
    multiprocessors: int
    gigahertz: float
    terabytes: float  # a second
    latency: float  # nanoseconds


GPUS = (
    Gpu("H100", "90", 132, 1.755, 3.35, 650),
    Gpu("H200", "90", 132, 1.755, 4.8, 650),
    Gpu("B200", "100", 148, 1.85, 8.0, 750),
)
# Of a multiprocessor: threads' instructions a clock. IMAD shares the FMA pipe's heavier half.
RATES = {"issue": 128, "fma": 128, "imad": 64, "alu": 64, "fp64": 64, "xu": 16}
THREADS = 256


class Case(NamedTuple):
    """A call, and what a thread of its kernel does in a round of its loop."""

    name: str
    file: str
    kernel: str
    elements: int
    rounds: int
    wanted: Wanted
    read: int  # bytes an element
    written: int
    narrow: bool = False

    @property
    def vectors_only(self) -> bool:
        vectors = ("combine_kernel", "random_kernel", "step_rows_kernel")
        return self.wanted.stores > 0 and self.kernel.startswith(vectors)


BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8}


def _cases(dtype: str) -> Iterable[Case]:
    size = BYTES[dtype]
    V = 8 if size == 2 else 4  # elements of a vector
    w = V * size // 16  # its 128-bit accesses
    blocks = V // 4  # and Philox blocks

    def case(name: str, file: str, kernel: str, rounds: int, wanted: Wanted, read: int, written: int) -> Case:
        elements, shape = kernel.split(":")
        return Case(f"{name}, {dtype}", file, shape, int(elements), rounds, wanted, read * size, written * size)

    def combine(shape: str, vectors: int) -> str:
        return f"{vectors * V}:combine_kernel<CombineShape<{dtype}, {shape}>>"

    two = 1 if dtype == "f64" else 2  # vectors of a round
    one = 4 if dtype == "f32" else 2
    source = "combine"
    scale = combine(f"{one}, 1, false, false", one)
    yield case("scale", source, scale, 1, Wanted(one * w, one * w), 1, 1)
    pair = combine(f"{two}, 2, false, false", two)
    yield case("combine 2, numbers", source, pair, 1, Wanted(2 * two * w, two * w), 2, 1)
    yield case("combine 2, a sample", source, pair, 1, Wanted(2 * two * w, two * w, 2 * two), 2, 1)
    more = combine("1, 4, false, false", 1)
    yield case("combine 3, numbers", source, more, 1, Wanted(3 * w, w), 3, 1)
    yield case("combine 3, a sample", source, more, 1, Wanted(3 * w, w, 3), 3, 1)
    entries = 3 if dtype == "f64" else 2  # there the seed counts, which has 64 bits
    many = 1 if dtype == "f64" else 16 // V
    noise = combine(f"{many}, 1, true, false", many)
    per = many * w
    drawn = 10 * blocks * many
    yield case("combine 1 + noise, a sample", source, noise, 1, Wanted(per, per, entries, drawn), 1, 1)
    yield case("combine 1 + noise stored, a sample", source, noise, 1, Wanted(per, 2 * per, entries, drawn), 1, 2)
    norm = f"{V}:combine_norm_kernel<CombineShape<{dtype}, 1, 4, true, true>>"
    yield case("combine 4 + norm, a sample", source, norm, 16 // V, Wanted(4 * w, w, 6), 4, 1)

    source = "regression_loss"
    U = 2 if dtype == "f32" else 1
    loss = f"{U * V}:loss_kernel<LossShape<{dtype}, {dtype}, {U}, false>>"
    yield case("loss of 2, gradient", source, loss, 16 // (U * V), Wanted(3 * U * w, U * w), 3, 1)
    loss = f"{2 * V}:loss_kernel<LossShape<{dtype}, {dtype}, 2, true>>"
    if dtype != "f64":  # whose way of single elements is the cheaper one
        yield case("loss of 1 + noise, gradient", source, loss, 8 // V, Wanted(4 * w, 2 * w, 0, 20 * blocks), 2, 1)

    source = "random"
    for name, kind in (("randn", "normal"), ("rand", "uniform")):
        U = 1 if dtype == "f64" else 16 // V
        numbers = f"{U * V}:random_kernel<RandomShape<{kind}, {dtype}>>"
        yield case(name, source, numbers, 1, Wanted(0, w, 0, 10 * blocks).times(U), 0, 1)

    source = "row_dots"
    v = 2 if dtype == "f64" else V
    for count in (2, 4):
        U = 2 if count == 2 else 1
        dots = f"{U * v}:row_dots_kernel<RowDotsShape<{dtype}, {count}>>"
        yield case(f"row_dots of {count}", source, dots, max(1, 16 // (U * v)), Wanted(count * U), count, 0)
    dots = f"{v}:short_row_dots_kernel<RowDotsShape<{dtype}, 2>>"
    yield case("row_dots of 2, short rows", source, dots, 8, Wanted(2), 2, 0)
    dots = f"1:short_row_dots_kernel<RowDotsShape<{dtype}, 2>>"
    yield case("row_dots of 2, short rows of odd length", source, dots, 8, Wanted(entries=2), 2, 0)

    rows = f"{V}:step_rows_kernel<StepRowsShape<{dtype}, {V}, true>>"
    yield case("step_rows, move", "step_control", rows, 1, Wanted(2 * w, 2 * w), 2, 2)
    rows = f"{V}:step_rows_kernel<StepRowsShape<{dtype}, {V}, false>>"
    yield case("step_rows, move, rows of odd length", "step_control", rows, 1, Wanted(2 * w, 2 * w), 2, 2)


def cases() -> list[Case]:
    found = [case for dtype in BYTES for case in _cases(dtype)]
    for pred, size in (("bf16", 2), ("f16", 2)):
        kernel = f"loss_kernel<LossShape<{pred}, f32, 2, false>>"
        wanted, name = Wanted(6, 2), f"loss of 2, gradient, {pred} beside f32"
        found.append(Case(name, "regression_loss", kernel, 8, 2, wanted, 8 + size, size, narrow=True))
    return found


# Of tests/triton_ahead_of_time.py: name, dtype, what a thread (8 elements) does, bytes read and written. 128 threads.
TRITON: Mapping[str, tuple[str, Wanted, int, int]] = {
    "path_f32": ("combine 2, a sample, f32", Wanted(4, 2), 8, 4),
    "path_bf16": ("combine 2, a sample, bf16", Wanted(2, 1), 4, 2),
    "path_noise_f32": ("combine 1 + noise, a sample, f32", Wanted(2, 2, 0, 20), 4, 4),
    "path_noise_bf16": ("combine 1 + noise, a sample, bf16", Wanted(1, 1, 0, 20), 2, 2),
    "loss_f32": ("loss of 2, gradient, f32", Wanted(6, 2), 12, 4),
    "loss_bf16": ("loss of 2, gradient, bf16", Wanted(3, 1), 6, 2),
    "loss_noise_f32": ("loss of 1 + noise, gradient, f32", Wanted(4, 2, 0, 20), 8, 4),
    "loss_noise_bf16": ("loss of 1 + noise, gradient, bf16", Wanted(2, 1, 0, 20), 4, 2),
    "randn_f32": ("randn, f32", Wanted(0, 2, 0, 20), 0, 4),
    "randn_bf16": ("randn, bf16", Wanted(0, 1, 0, 20), 0, 2),
}
TRITON_ELEMENTS = 8


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Mangled names -> as in ``Case.kernel``."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    codes = {"Dtype": ("f32", "bf16", "f16", "f64"), "RandomKind": ("words", "uniform", "normal")}
    short = []
    for name in plain.split("\n")[: len(names)]:
        name = name.replace("(anonymous namespace)::", "").replace("fm::", "").removeprefix("void ")
        name = re.sub(r"\((Dtype|RandomKind)\)(\d)", lambda m: codes[m[1]][int(m[2])], name)
        short.append(name.split("(")[0].replace("> >", ">>").strip())
    return dict(zip(names, short, strict=True))


def _per_element(kernel: sass.Kernel, wanted: Wanted, elements: int, rounds: int) -> dict[str, float] | None:
    """What the cheapest way issues an element; the rounds after the first as the second."""
    first = kernel.cheapest(wanted)
    if first is None:
        return None
    total = sass.count(first)
    second = kernel.cheapest(wanted.times(2)) if rounds > 1 else None
    if second is not None:
        more = sass.count(second)
        for key in set(total) | set(more):
            total[key] += (rounds - 1) * max(0, more[key] - total[key])
    of = elements * rounds
    issued = sum(total[name] for name in sass.PIPES)
    return {"issued": round(issued / of, 3), **{k: round(total[k] / of, 3) for k in sorted(total) if total[k]}}


Entry = dict[str, Any]


def kernels_of(compiled: sass.Compiled) -> dict[str, Entry]:
    """Registers and static shared memory of each kernel of a file."""
    names = demangled(list(compiled.resources))
    found = {names[k]: {"registers": r.registers, "shared": r.shared} for k, r in compiled.resources.items()}
    return dict(sorted(found.items()))


def cases_of(file: str, compiled: sass.Compiled) -> dict[str, Entry]:
    """What each case of a file issues. ValueError where a kernel, or a way through it, is not there."""
    code = sass.disassemble(compiled.cubin)
    names = {short: name for name, short in demangled(list(code)).items()}
    found = {}
    for case in cases():
        if case.file != file:
            continue
        if case.kernel not in names:
            raise ValueError(f"{case.name}: expected a kernel {case.kernel} in {file}, found {sorted(names)}")
        name = names[case.kernel]
        kernel = sass.Kernel(code[name], case.narrow, case.name.endswith("f64"), case.vectors_only)
        issued = _per_element(kernel, case.wanted, case.elements, case.rounds)
        if issued is None:
            raise ValueError(f"{case.name}: no way through {case.kernel} does {case.wanted}")
        found[case.name] = {
            "kernel": case.kernel,
            "issued": issued,
            "read": case.read,
            "written": case.written,
            "loaded": case.read * case.elements,  # bytes of a thread's round
            "threads": THREADS,
            "registers": compiled.resources[name].registers,
            "shared": compiled.resources[name].shared,
        }
    return found


def triton_entry(case: str, code: str, registers: int, shared: int, threads: int) -> Entry | None:
    """The same of a kernel that Triton has compiled; None where the model does not list the case."""
    if case not in TRITON:
        return None
    name, wanted, read, written = TRITON[case]
    issued = _per_element(sass.Kernel(code), wanted, TRITON_ELEMENTS, 1)
    if issued is None:
        raise ValueError(f"{case}: no way through Triton's kernel does {wanted}")
    entry = {"issued": issued, "read": read, "written": written, "loaded": read * TRITON_ELEMENTS}
    return {"case": name, **entry, "threads": threads, "registers": registers, "shared": shared}


class Modelled(NamedTuple):
    times: dict[str, float]  # microseconds, by what takes them
    occupancy: float
    flight: float  # bytes that a multiprocessor has on their way
    needed: float  # bytes for the full bandwidth, by Little's law

    @property
    def slowest(self) -> str:
        return max((name for name in self.times if name != "memory"), key=self.times.__getitem__)

    @property
    def ratio(self) -> float:
        """Of the slowest of issue and pipes to memory: above 0.9 a kernel cannot reach 90 % of the bandwidth."""
        return self.times[self.slowest] / self.times["memory"]


def modelled(entry: Entry, gpu: Gpu) -> Modelled:
    issued = entry["issued"]

    def of(*names: str) -> float:
        return sum(issued.get(name, 0.0) for name in names)

    per_clock = gpu.multiprocessors * gpu.gigahertz * 1e3  # clocks of all multiprocessors in a microsecond
    work = {
        "issue": issued["issued"],
        "fma": of("fma", "imad"),
        "imad": of("imad", "wide"),
        "alu": of("alu"),
        "fp64": of("fp64"),
        "xu": of("xu"),
    }
    moved = entry["read"] + entry["written"]
    times = {name: ELEMENTS * amount / RATES[name] / per_clock for name, amount in work.items()}
    # 128 bytes a clock, and a clock for each other access of a warp
    times["lsu"] = ELEMENTS * (moved / 128 + (of("lsu") - of("vectors")) / 32) / per_clock
    times["memory"] = ELEMENTS * moved / gpu.terabytes / 1e6
    warps = entry["threads"] // 32
    by_registers = 65536 // (-(-max(entry["registers"], 1) * 32 // 256) * 256) // warps
    blocks = min(by_registers, 64 // warps, 32, 228 * 1024 // (entry["shared"] + 1024))
    needed = gpu.terabytes * gpu.latency * 1e3 / gpu.multiprocessors * (entry["read"] / moved)
    return Modelled(times, blocks * warps / 64, blocks * entry["threads"] * entry["loaded"], needed)


def read_table(architecture: str) -> dict[str, Any]:
    return json.loads((TABLES / f"sm_{architecture}.json").read_text(encoding="utf-8"))


def table_text(table: dict[str, Any]) -> str:
    """JSON with a kernel or case a line, so that a change shows as what it is."""
    parts = []
    for key, value in table.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            parts.append(f"  {json.dumps(key)}: {{\n{lines}\n  }}")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else "unknown"


def of_triton(architecture: str) -> dict[str, Entry]:
    script = ROOT / "tests" / "triton_ahead_of_time.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(script), architecture]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    entries = [line["model"] for line in lines if line.get("model")]
    return {entry.pop("case"): entry for entry in entries}


def make_table(architecture: str) -> dict[str, Any]:
    """Compiles everything for an architecture and counts."""
    import triton

    kernels: dict[str, Entry] = {}
    counted: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*/*_cuda.cu")):
            compiled = sass.compile_source(source, architecture, Path(folder) / "out.cubin")
            kernels |= kernels_of(compiled)
            counted |= cases_of(source.parent.name, compiled)
    order = {case.name: counted[case.name] for case in cases()}
    versions = {"nvcc": nvcc_version(), "triton": triton.__version__}
    counts = {"kernels": kernels, "cases": order, "triton_cases": of_triton(architecture)}
    return {"architecture": architecture, **versions, **counts}


def excesses(table: dict[str, Any], kernels: Mapping[str, Entry], counted: Mapping[str, Entry]) -> list[str]:
    """Where machine code is larger than a table by more than the tolerance, or not in it."""
    found = []

    def compare(name: str, what: str, was: float | None, now: float) -> None:
        if was is None:
            found.append(f"{name}: not in the table")
        elif now > was * (1 + TOLERANCE):
            found.append(f"{name}: {now:g} {what}, {was:g} in the table")

    for name, entry in kernels.items():
        compare(name, "registers", table["kernels"].get(name, {}).get("registers"), entry["registers"])
    for name, entry in counted.items():
        was = table["cases"].get(name, {}).get("issued", {}).get("issued")
        compare(name, "instructions an element", was, entry["issued"]["issued"])
    return found


_SHOWN = ("f32", "bf16")
_HEADER = (
    "case",
    "instructions an element",
    "registers",
    "occupancy",
    "KiB in flight / needed",
    "memory",
    "issue",
    "slowest pipe",
    "ratio",
)


def _row(name: str, entry: Entry, gpu: Gpu) -> str:
    m = modelled(entry, gpu)
    slowest = max((p for p in m.times if p not in ("memory", "issue")), key=m.times.__getitem__)
    flight = f"{m.flight / 1024:.0f} / {m.needed / 1024:.0f}" if entry["read"] else "-"
    cells = [
        name,
        f"{entry['issued']['issued']:.1f}",
        str(entry["registers"]),
        f"{100 * m.occupancy:.0f} %",
        flight,
        f"{m.times['memory']:.0f} µs",
        f"{m.times['issue']:.0f} µs",
        f"{slowest} {m.times[slowest]:.0f} µs",
        f"{m.ratio:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


NOISE_DTYPES = ("f32", "bf16")


def _wider_accesses(cases: Mapping[str, Entry], gpu: Gpu) -> str:
    """What fewer loads and stores could save where the memory is not what a kernel waits for."""
    bound = {name: entry["issued"] for name, entry in cases.items() if modelled(entry, gpu).ratio > 0.9}
    if not bound:
        return "No kernel of ours is above 0.9: wider accesses, bulk loads and clusters save nothing by this model."
    share = 100 * max(issued.get("vectors", 0.0) / issued["issued"] for issued in bound.values())
    return (
        f"Of ours above 0.9: {'; '.join(bound)}. Loads and stores of vectors are at most {share:.1f} % of what these "
        f"issue: 256-bit accesses, which halve them, would save {share / 2:.1f} % at most, bulk loads (TMA) not all of "
        f"{share:.1f} %; clusters nothing, as no block reads what another one does."
    )


def noise_times(cases: Mapping[str, Entry], gpu: Gpu, dtype: str) -> tuple[float, float]:
    """Microseconds of a path and its loss where noise is drawn again, and where it is stored."""

    def time(*names: str) -> float:
        return sum(max(modelled(cases[f"{name}, {dtype}"], gpu).times.values()) for name in names)

    again = time("combine 1 + noise, a sample", "loss of 1 + noise, gradient")
    return again, time("combine 1 + noise stored, a sample", "loss of 2, gradient")


def page_text(tables: Mapping[str, dict[str, Any]]) -> str:
    """What stands between the marks of the page."""
    versions = tables[ARCHITECTURES[0]]
    parts = [
        "A MODEL, NO MEASUREMENT: lower bounds from machine code "
        f"(nvcc {versions['nvcc']}, Triton {versions['triton']}), by `python tools/sass_model.py --write`. "
        "The times are those in which the memory, the issue of instructions or the slowest pipe alone would be done "
        "with 2^26 elements; the ratio is the longer of issue and pipes over memory. Above 0.9 a kernel cannot reach "
        "90 % of the bandwidth; below it nothing is promised: the cheapest way through a kernel passes by arithmetic "
        "that stands behind a branch, of a loss that of a second operand and of rows that count.",
    ]
    for gpu in GPUS:
        table = tables[gpu.architecture]
        shown = {name: entry for name, entry in table["cases"].items() if name.endswith(_SHOWN)}
        shown |= {f"Triton: {name}": entry for name, entry in table["triton_cases"].items()}
        lines = [
            f"### {gpu.name}, modelled",
            f"sm_{gpu.architecture}, {gpu.multiprocessors} multiprocessors at {gpu.gigahertz} GHz, "
            f"{gpu.terabytes} TB/s; a latency of {gpu.latency:.0f} ns under load is assumed.",
            "\n".join(
                [
                    f"| {' | '.join(_HEADER)} |",
                    f"| --- |{' ---: |' * (len(_HEADER) - 1)}",
                    *(_row(name, entry, gpu) for name, entry in shown.items()),
                ]
            ),
            "Path and loss with noise drawn again, or stored: "
            + "; ".join("{}: {:.0f}, {:.0f} µs".format(d, *noise_times(table["cases"], gpu, d)) for d in NOISE_DTYPES)
            + ".",
            _wider_accesses({name: entry for name, entry in shown.items() if name in table["cases"]}, gpu),
        ]
        parts += lines
    return "\n\n".join(parts) + "\n"


def page_with(page: str, text: str) -> str:
    """The page with what stands between its marks replaced. ValueError where it has none."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"{PAGE.name}: expected the marks {MARKS[0].strip()} and {MARKS[1].strip()}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables and the page")
    options = parser.parse_args(arguments)
    tables = {architecture: make_table(architecture) for architecture in ARCHITECTURES}
    text = page_text(tables)
    print(text)
    if options.write:
        TABLES.mkdir(exist_ok=True)
        for architecture, table in tables.items():
            (TABLES / f"sm_{architecture}.json").write_text(table_text(table), encoding="utf-8")
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
