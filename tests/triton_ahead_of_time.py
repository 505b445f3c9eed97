"""Compiles the Triton kernels for GPUs that are not here and prints, as JSON, what the machine code shows.

Run by test_triton.py in a process of its own: the driver is replaced by one that only names a target.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from fmkernels.ops._triton import BLOCK, WARPS
from fmkernels.ops.combine import triton as combine
from fmkernels.ops.random import triton as random
from fmkernels.ops.regression_loss import triton as regression_loss

F32, BF16, F64, SEED = (MockTensor(d) for d in (torch.float32, torch.bfloat16, torch.float64, torch.int64))
N = 1 << 24


def table(count: int, given: bool) -> tuple[Any, ...]:
    return (F32,) * count, (N // 256,) * count, (1,) * count, (0.5,) * count, (given,) * count, (given,) * count


def combine_arguments(data: Any, count: int, noise: bool = False, norm: bool = False) -> tuple[Any, ...]:
    drawn = tuple(noise and k == count - 1 for k in range(count))
    pointers, covered, strides, values, given, uniform = table(count, True)
    return (
        data, data, tuple(SEED if z else data for z in drawn), (0,) * count, (0,) * count, (data,) * count,
        pointers, covered, strides, values, pointers, covered, strides, values, F32, 1e-3, 1e-3, N, N // BLOCK,
        drawn, (True,) * count, (False,) * count, given, uniform, given, uniform, norm, norm, False, False, BLOCK,
    )  # fmt: skip


def loss_arguments(pred: Any, data: Any, noise: bool = False) -> tuple[Any, ...]:
    drawn = (False, noise)
    pointers, covered, strides, values, _, _ = table(4, False)
    return (
        pred, pred, data, (data, SEED if noise else data), (0, 0), (0, 0), (data, data), pointers, covered, strides,
        values, F32, 1, F32, 1.0, N, N // BLOCK, drawn, (True, True), (False, False), (False,) * 4, (False,) * 4,
        False, True, True, 0, False, False, BLOCK,
    )  # fmt: skip


KERNELS = {
    "path_f32": (combine._kernel, combine_arguments(F32, 2)),
    "path_bf16": (combine._kernel, combine_arguments(BF16, 2)),
    "path_noise_f32": (combine._kernel, combine_arguments(F32, 2, noise=True)),
    "path_noise_bf16": (combine._kernel, combine_arguments(BF16, 2, noise=True)),
    "step_norm_f32": (combine._kernel, combine_arguments(F32, 8, norm=True)),
    "loss_f32": (regression_loss._kernel, loss_arguments(F32, F32)),
    "loss_bf16": (regression_loss._kernel, loss_arguments(BF16, BF16)),
    "loss_noise_f32": (regression_loss._kernel, loss_arguments(F32, F32, noise=True)),
    "randn_f32": (random._kernel, (F32, SEED, 0, 0, N, 2, 32, True, False, BLOCK)),
}


def disassembler() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        target = GPUTarget("cuda", capability, 32)
        triton.runtime.driver.set_active(
            SimpleNamespace(
                get_current_device=lambda: 0,
                get_current_stream=lambda device: 0,
                get_current_target=lambda target=target: target,
            )
        )
        for name, (kernel, arguments) in KERNELS.items():
            kernel.device_caches.clear()
            compiled = kernel.warmup(*arguments, grid=(1,), num_warps=WARPS)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                code = subprocess.run([disassembler(), file.name], capture_output=True, text=True, check=True).stdout
            registers = re.search(r"REG:(\d+)|SHI_REGISTERS=(\d+)", code)
            found = {
                "kernel": name,
                "capability": capability,
                "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
                "loads_128": len(re.findall(r"LDG\.E\S*\.128", code)),
                "stores_128": len(re.findall(r"STG\.E\S*\.128", code)),
                "atomics": len(re.findall(r"\b(?:ATOMG?|RED)\b", code)),
                "registers": next(filter(None, registers.groups())) if registers else None,
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
