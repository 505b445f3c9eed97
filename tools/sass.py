"""GPU machine code: what nvcc makes of a file, and the cheapest way of a thread through a kernel."""

from __future__ import annotations

import heapq
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

FLAGS = ("-cubin", "-std=c++17", "-O3", "-Xptxas=-v")


class Resources(NamedTuple):
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int  # bytes, without those that a launch adds


class Compiled(NamedTuple):
    """A source for one architecture; kernels by their mangled names."""

    cubin: Path
    resources: dict[str, Resources]


def find_cuobjdump() -> str | None:
    """CUDA's own, or the one in Triton's package."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return found


def compile_source(source: Path, architecture: str, cubin: Path) -> Compiled:
    """What nvcc makes of a source. RuntimeError where it fails or warns."""
    command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "-o", str(cubin), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    report = result.stdout + result.stderr
    if result.returncode or "warning" in report:
        raise RuntimeError(f"{' '.join(command)}\n{report}")
    pattern = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers[^\n]*?(?:, (\d+) bytes smem|\n)"
    )
    resources = {m[0]: Resources(*(int(number or 0) for number in m[1:])) for m in re.findall(pattern, report)}
    if len(resources) != report.count("Compiling entry function"):
        raise RuntimeError(f"{' '.join(command)}: expected a report on each kernel\n{report}")
    return Compiled(cubin, resources)


def disassemble(cubin: Path) -> dict[str, str]:
    """Machine code by mangled name. FileNotFoundError where there is no cuobjdump."""
    tool = find_cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither on PATH nor in an installed Triton: no machine code to look at")
    result = subprocess.run([tool, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True)
    parts = re.split(r"Function : (\S+)", result.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def registers(cubin: Path) -> int:
    """Of a thread, in a file of one kernel."""
    tool = find_cuobjdump()
    command = [str(tool), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+)", text)
    return int(found)


# What executes an instruction; one that is in none of these is the "alu" pipe's.
_PIPES: Mapping[str, frozenset[str]] = {
    "fma": frozenset({"FFMA", "FADD", "FMUL", "FFMA32I", "FFMA2", "FADD2", "FMUL2"}),
    "imad": frozenset({"IMAD", "HFMA2", "HADD2", "HMUL2", "IDP"}),
    "fp64": frozenset({"DFMA", "DADD", "DMUL", "DSETP", "DMNMX"}),
    "xu": frozenset({"MUFU", "F2I", "I2F", "F2F", "FRND", "POPC", "FLO"}),
    "lsu": frozenset({"LDG", "STG", "LDS", "STS", "SHFL", "LD", "ST", "LDL", "STL", "ATOM", "ATOMG", "RED", "ATOMS"}),
    "ldc": frozenset({"LDC"}),
    "ctrl": frozenset(
        {"BRA", "BRX", "EXIT", "BSSY", "BSYNC", "NOP", "BAR", "WARPSYNC", "CALL", "RET", "BREAK", "BMOV", "YIELD"}
    ),
    "uniform": frozenset({"R2UR", "S2UR", "LDCU", "VOTEU"}),
}
PIPES = (*_PIPES, "alu", "off")


def pipe(opcode: str) -> str:
    for name, opcodes in _PIPES.items():
        if opcode in opcodes:
            return name
    return "uniform" if opcode.startswith("U") else "alu"


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    suffix: str
    arguments: str


class Wanted(NamedTuple):
    """What a way through a kernel has to do."""

    loads: int = 0  # of 128 bits
    stores: int = 0  # of 128 bits
    entries: int = 0  # loads of 32 bits, or of 64 in double precision: coefficients
    products: int = 0  # of Philox by its first multiplier: ten a block of four numbers

    def times(self, factor: int) -> Wanted:
        return Wanted(*(factor * number for number in self))


_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,5})\*/\s+(?:\{ )?(@!?U?P[0-9T]+ )?([A-Z0-9_]+)((?:\.[A-Za-z0-9_]+)*)([^;]*);"
)
_LEAVES = {"BRA", "EXIT", "RET", "CALL", "BRX", "BREAK"}
_EXIT = -1


class Kernel:
    """A kernel's basic blocks. ``narrow``: 64-bit accesses count as wide ones. ``double``: they count as entries.
    ``vectors_only``: ways through stores of single elements are closed (which a kernel that ends in sums takes in any
    case)."""

    def __init__(self, text: str, narrow: bool = False, double: bool = False, vectors_only: bool = False) -> None:
        code = [Instruction(int(m[1], 16), m[2] or "", m[3], m[4], m[5]) for m in _INSTRUCTION.finditer(text)]
        while code and code[-1].opcode == "NOP":
            code.pop()
        at = {instruction.address: i for i, instruction in enumerate(code)}
        targets: dict[int, int] = {}
        leaders = {0}
        for i, instruction in enumerate(code):
            if instruction.opcode not in _LEAVES:
                continue
            leaders.add(i + 1)
            target = re.search(r"0x([0-9a-f]+)", instruction.arguments) if instruction.opcode == "BRA" else None
            if target and int(target[1], 16) in at:
                targets[i] = at[int(target[1], 16)]
                leaders.add(targets[i])
        starts = sorted(i for i in leaders if i < len(code))
        ends = [*starts[1:], len(code)]
        number = {start: n for n, start in enumerate(starts)}
        self.blocks = [code[start:end] for start, end in zip(starts, ends, strict=True)]
        self._next: list[list[int]] = []
        for block, end in zip(self.blocks, ends, strict=True):
            last = block[-1]
            following = [number[end]] if end in number else []
            conditional = bool(last.predicate) or re.match(r"\s*!?U?P[0-6]", last.arguments) is not None
            if last.opcode == "BRA":
                ahead = [number[targets[end - 1]]] if end - 1 in targets else []
                self._next.append(ahead + (following if conditional else []))
            elif last.opcode == "EXIT":
                self._next.append([_EXIT] + (following if last.predicate else []))
            elif last.opcode in ("RET", "BRX", "CALL"):  # calls are the slow ways of divisions and roots
                self._next.append([])
            else:
                self._next.append(following)
        self._gains = [_gain(block, narrow, double) for block in self.blocks]
        if vectors_only:
            for n, block in enumerate(self.blocks):
                if any(i.opcode in ("STG", "ST") and not _is_wide(i, narrow) for i in block):
                    self._next[n] = []

    def cheapest(self, wanted: Wanted) -> list[Instruction] | None:
        """The instructions of the shortest way to an exit that does at least what is wanted (Dijkstra's search)."""
        start = (0, Wanted())
        heap: list[tuple[int, int, int, Wanted]] = [(0, 0, *start)]
        best = {start: 0}
        before: dict[tuple[int, Wanted], tuple[int, Wanted]] = {}
        pushed = 0
        while heap:
            cost, _, block, done = heapq.heappop(heap)
            if block == _EXIT:
                if done == wanted:
                    break
                continue
            if best[block, done] < cost:
                continue
            now = Wanted(*(min(w, d + g) for w, d, g in zip(wanted, done, self._gains[block], strict=True)))
            cost += len(self.blocks[block])
            for following in self._next[block]:
                if cost < best.get((following, now), cost + 1):
                    best[following, now] = cost
                    before[following, now] = (block, done)
                    pushed += 1
                    heapq.heappush(heap, (cost, pushed, following, now))
        else:
            return None
        blocks = []
        key = (_EXIT, done)
        while key in before:
            key = before[key]
            blocks.append(self.blocks[key[0]])
        return [instruction for block in reversed(blocks) for instruction in block]


def _is_wide(instruction: Instruction, narrow: bool) -> bool:
    return ".128" in instruction.suffix or (narrow and ".64" in instruction.suffix)


def _stores(block: list[Instruction], narrow: bool) -> int:
    """One for two of the same that are predicated against each other: past the caches, or not."""
    wide = [i for i in block if i.opcode in ("STG", "ST") and _is_wide(i, narrow)]
    either = {i.arguments for i in wide if i.predicate}
    return len(either) + sum(not i.predicate for i in wide)


def _gain(block: list[Instruction], narrow: bool, double: bool) -> Wanted:
    loads = [i for i in block if i.opcode in ("LDG", "LD")]
    return Wanted(
        loads=sum(_is_wide(i, narrow) for i in loads),
        stores=_stores(block, narrow),
        entries=sum(not _is_wide(i, narrow) and (".64" in i.suffix) == double for i in loads),
        products=sum("-0x2daee0ad" in i.arguments or "0xd2511f53" in i.arguments for i in block),
    )


def _off(stores: list[Instruction]) -> int:
    """How many of some stores do nothing as another one, of the same and predicated against them, is done."""
    found = Counter((i.arguments, i.predicate.strip()) for i in stores if i.predicate)
    return sum(min(n, found[args, f"@!{p[1:]}"]) for (args, p), n in found.items() if not p.startswith("@!"))


def count(way: list[Instruction]) -> Counter[str]:
    """Instructions by pipe, "off" those of two stores predicated against each other that are issued for nothing; beside
    them "wide", the IMADs that take the pipe twice, and "vectors", 128-bit accesses."""
    found = Counter(pipe(instruction.opcode) for instruction in way)
    found["wide"] = sum(i.opcode == "IMAD" and ".WIDE" in i.suffix for i in way)
    found["vectors"] = sum(i.opcode in ("LDG", "STG") and ".128" in i.suffix for i in way)
    for wide in (True, False):
        if off := _off([i for i in way if i.opcode in ("STG", "ST") and (".128" in i.suffix) == wide]):
            found["lsu"] -= off
            found["off"] += off
            found["vectors"] -= off * wide
    return found
