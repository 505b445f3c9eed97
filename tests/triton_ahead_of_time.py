"""Compiles the Triton kernels for GPUs that are not here and prints, as JSON, what the code shows.

Run by test_triton.py in a process of its own: the driver is replaced by one that only names a target. The launchers
themselves say what to compile, called with tensors that have no memory; each launch becomes a compilation.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fmkernels.ops._operands import TENSOR
from fmkernels.ops.combine import triton as combine
from fmkernels.ops.random import triton as random
from fmkernels.ops.regression_loss import triton as regression_loss
from fmkernels.ops.regression_loss.kinds import KINDS
from fmkernels.ops.row_dots import triton as row_dots

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import sass
import sass_model

ROWS, INNER = 4096, 4096
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype is F64 else F32


def operands(dtype: torch.dtype, inner: int, count: int, noise: bool) -> tuple[list[Tensor], list[int], list[int]]:
    """``count`` operands, the last one noise if wanted: tensors, streams, offsets."""
    tensors = [empty(dtype, ROWS, inner) for _ in range(count)]
    if noise:
        tensors[-1] = empty(torch.int64)
    return tensors, [TENSOR] * (count - noise) + [0] * noise, [0] * count


def combined(
    dtype: torch.dtype, count: int, covered: int = 1, inner: int = INNER, noise: bool = False, norm: bool = False
) -> None:
    """With coefficients that cover so many rows each, and an error estimate where the norm is wanted."""
    coefs = [empty(accumulation(dtype), ROWS // covered) for _ in range(count)]
    combine.run(
        *operands(dtype, inner, count, noise), coefs, [0.0] * count, coefs if norm else [],
        [0.0] * count if norm else [], 1e-3, 1e-3, norm, False,
    )  # fmt: skip


def loss(
    dtype: torch.dtype, inner: int = INNER, kind: str = "squared", noise: bool = False, rows: bool = False
) -> None:
    """With constant coefficients and one loss, or with ``rows`` weights, a mask and a loss a sample."""
    double = accumulation(dtype)
    regression_loss.run(
        empty(dtype, ROWS, inner), *operands(dtype, inner, 2, noise), [None, None], [1.0, -1.0], dtype,
        empty(double, ROWS) if rows else None, None, 1.0, empty(torch.bool, ROWS, inner) if rows else None,
        KINDS[kind], 0.1, rows, True,
    )  # fmt: skip


def dots(dtype: torch.dtype, count: int, inner: int = INNER) -> None:
    """Every tensor with itself and with the next, as many pairs as a call takes, and a row sum."""
    pairs = [(k, k) for k in range(count)] + [(k, k + 1) for k in range(count - 1)] + [(0, -1)]
    row_dots.run([empty(dtype, ROWS, inner) for _ in range(count)], *map(list, zip(*pairs, strict=True)))


CASES: dict[str, Callable[[], object]] = {
    "path_f32": lambda: combined(F32, 2),
    "path_bf16": lambda: combined(BF16, 2),
    "path_f64": lambda: combined(F64, 2),
    "path_noise_f32": lambda: combined(F32, 2, noise=True),
    "path_noise_bf16": lambda: combined(BF16, 2, noise=True),
    "path_noise_f64": lambda: combined(F64, 2, noise=True),
    "path_small_rows_f32": lambda: combined(F32, 2, inner=48),
    "step_norm_f32": lambda: combined(F32, 8, norm=True),
    "step_norm_f64": lambda: combined(F64, 2, norm=True),
    "step_norm_one_tile_f32": lambda: combined(F32, 8, inner=1024, norm=True),
    "loss_f32": lambda: loss(F32),
    "loss_bf16": lambda: loss(BF16),
    "loss_noise_f32": lambda: loss(F32, noise=True),
    "loss_noise_bf16": lambda: loss(BF16, noise=True),
    "loss_rows_bf16": lambda: loss(BF16, inner=1024, rows=True),
    "loss_huber_f64": lambda: loss(F64, kind="huber"),
    "dots_f32": lambda: dots(F32, 2),
    "dots_bf16": lambda: dots(BF16, 2),
    "dots_most_f32": lambda: dots(F32, 6),
    "dots_most_f64": lambda: dots(F64, 6),
    "dots_one_tile_bf16": lambda: dots(BF16, 2, inner=1024),
    "dots_short_f32": lambda: dots(F32, 2, inner=64),
    "randn_f32": lambda: random.run([ROWS, INNER], empty(torch.int64), 2, 0, 0, F32),
    "randn_bf16": lambda: random.run([ROWS, INNER], empty(torch.int64), 2, 0, 0, BF16),
}


class Compiler:
    """Stands in for JITFunction.run: compiles what would be launched, and keeps it."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, Any]] = []
        run = JITFunction.run

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel.device_caches.clear()
            found = run(kernel, *args, grid=grid, warmup=True, **options)
            self.compiled.append((kernel.fn.__name__, found))
            return found

        JITFunction.run = compile_only


def modelled(case: str, compiled: Any) -> dict[str, Any] | None:
    """What tools/sass_model.py counts; None where it does not list the case or there is no cuobjdump."""
    if case not in sass_model.TRITON or sass.find_cuobjdump() is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (code,) = sass.disassemble(cubin).values()
        registers = sass.registers(cubin)
    threads = 32 * compiled.metadata.num_warps
    return sass_model.triton_entry(case, code, registers, compiled.metadata.shared, threads)


def disassembled(cubin: bytes) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    compiler = Compiler()
    for capability in map(int, sys.argv[1:]):
        target = GPUTarget("cuda", capability, 32)
        triton.runtime.driver.set_active(
            SimpleNamespace(
                get_current_device=lambda: 0,
                get_current_stream=lambda device: 0,
                get_current_target=lambda target=target: target,
            )
        )
        for case, launch in CASES.items():
            compiler.compiled.clear()
            launch()
            for kernel, compiled in compiler.compiled:
                code = disassembled(compiled.asm["cubin"])
                found = {
                    "case": case,
                    "kernel": kernel,
                    "capability": capability,
                    "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
                    "loads_128": len(re.findall(r"LDG\.E\S*\.128", code)),
                    "stores_128": len(re.findall(r"STG\.E\S*\.128", code)),
                    "atomics": len(re.findall(r"\b(?:ATOMG?|RED)\b", code)),
                    "widened": len(re.findall(r"cvt\.f64\.f32", compiled.asm["ptx"])),
                    "model": modelled(case, compiled) if kernel == "_kernel" else None,
                    "float_arguments": len(re.findall(r"\.param \.f(?:32|64)", compiled.asm["ptx"])),
                }
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
