"""The machine-code model's cases measured on the GPU that is here, each beside its modelled time.

    python tools/measured_model.py --out build/gpu/model.jsonl

For each case of benchmarks/model (tools/sass_model.py) the operation is called on as many elements as the model takes,
far more than caches hold; of several rounds of back-to-back calls the median round counts. The time holds what the
call launches beside its kernel (the sum of partial sums). A line is written and printed as it is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import sass_model  # noqa: E402
import torch  # noqa: E402

import fmkernels as fm  # noqa: E402

INNER = 4096
SHORT, ODD = 64, 63  # elements of a row of which several share a block
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
# Kernels that no call launches alone.
WITHIN_OTHERS = frozenset({"step_rows, move", "step_rows, move, rows of odd length"})
CALLS, ROUNDS, WARM_UPS = 4, 7, 3

Call = Callable[[], Any]


class Inputs:
    """Tensors of so many elements, made when a case asks for them."""

    def __init__(self, dtype: torch.dtype, device: torch.device, elements: int, inner: int = INNER) -> None:
        self.dtype, self.device, self.shape = dtype, device, (elements // inner, inner)

    def data(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.rand(self.shape, device=self.device, dtype=torch.float32).sub_(0.5).to(dtype or self.dtype)

    def times(self) -> torch.Tensor:
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.rand(self.shape[0], device=self.device, dtype=kind)


def call_of(name: str, device: torch.device, elements: int) -> Call | None:
    """What a case of the model calls, its inputs made; None for a kernel that no call launches alone.

    Raises:
        KeyError: a case that this does not know.
    """
    kind, _, last = name.rpartition(", ")
    if kind in WITHIN_OTHERS:
        return None
    beside, dtype = last.endswith(" beside f32"), DTYPES[last.removesuffix(" beside f32")]
    inner = SHORT if kind.endswith("short rows") else ODD if kind.endswith("of odd length") else INNER
    inputs = Inputs(dtype, device, elements, inner)
    operands = torch.float32 if beside else None

    def combine(count: int, **options: Any) -> Call:
        tensors, times = [inputs.data() for _ in range(count)], inputs.times()
        coefficients = [times] * count
        return lambda: fm.combine(tensors, coefficients, impl="native", **options)

    def numbers(count: int) -> Call:
        tensors = [inputs.data() for _ in range(count)]
        return lambda: fm.combine(tensors, [0.5] * count, impl="native")

    def noisy(store: bool) -> Call:
        data, times = inputs.data(), inputs.times()
        rest = 1 - times
        return lambda: fm.interpolate(data, alpha=times, sigma=rest, store_noise=store, impl="native")

    def loss(noise: bool) -> Call:
        pred, target = inputs.data().requires_grad_(), inputs.data(operands)
        other = fm.Noise(fm.random.draw_seed(device)) if noise else inputs.data(operands)
        return lambda: fm.regression_loss(pred, [target, other], [1.0, -1.0], impl="native")

    def dots(count: int) -> Call:
        tensors = [inputs.data() for _ in range(count)]
        pairs = [(i, j) for i in range(count) for j in range(i, count)]
        return lambda: fm.row_dots(tensors, pairs, impl="native")

    made: dict[str, Callable[[], Call]] = {
        "scale": lambda: numbers(1),
        "combine 2, numbers": lambda: numbers(2),
        "combine 2, a sample": lambda: combine(2),
        "combine 3, numbers": lambda: numbers(3),
        "combine 3, a sample": lambda: combine(3),
        "combine 1 + noise, a sample": lambda: noisy(False),
        "combine 1 + noise stored, a sample": lambda: noisy(True),
        "combine 4 + norm, a sample": lambda: combine(4, atol=1e-3, rtol=1e-3),
        "loss of 2, gradient": lambda: loss(False),
        "loss of 1 + noise, gradient": lambda: loss(True),
        "randn": lambda: lambda: fm.randn(*inputs.shape, device=device, dtype=dtype, impl="native"),
        "rand": lambda: lambda: fm.rand(*inputs.shape, device=device, dtype=dtype, impl="native"),
        "row_dots of 2": lambda: dots(2),
        "row_dots of 4": lambda: dots(4),
        "row_dots of 2, short rows": lambda: dots(2),
        "row_dots of 2, short rows of odd length": lambda: dots(2),
    }
    return made[kind]()


def seconds(call: Call) -> float:
    """Of one call, on the GPU: the median of some rounds."""
    for _ in range(WARM_UPS):
        call()
    rounds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / 1e3 / CALLS)
    return statistics.median(rounds)


def gpu_named(name: str) -> sass_model.Gpu | None:
    """What the model knows of a GPU by its name."""
    return next((gpu for gpu in sass_model.GPUS if gpu.name in name), None)


def line_of(name: str, entry: dict[str, Any], gpu: sass_model.Gpu, measured: float) -> dict[str, Any]:
    """A case's record, times in microseconds."""
    modelled = sass_model.modelled(entry, gpu)
    bound = max(modelled.times, key=modelled.times.__getitem__)
    moved = (entry["read"] + entry["written"]) * sass_model.ELEMENTS
    return {
        "case": name,
        "gpu": gpu.name,
        "measured_us": round(measured * 1e6, 2),
        "modelled_us": round(modelled.times[bound], 2),
        "bound": bound,
        "memory_us": round(modelled.times["memory"], 2),
        "terabytes_per_s": round(moved / measured / 1e12, 3),
        "over_model": round(measured * 1e6 / modelled.times[bound], 3),
    }


def text_of(line: dict[str, Any]) -> str:
    return (
        f"{line['case']:42} {line['measured_us']:9.1f} {line['modelled_us']:9.1f} {line['bound']:>7} "
        f"{line['over_model']:6.2f} {line['terabytes_per_s']:7.2f}"
    )


HEADER = f"{'case':42} {'measured':>9} {'modelled':>9} {'by':>7} {'ratio':>6} {'TB/s':>7}   (times in µs)"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for a line of JSON a case")
    parser.add_argument("--filter", default="", help="only cases whose name holds this")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no more cases are begun")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("expected a CUDA device, found none", file=sys.stderr)
        return 2
    device, name = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
    gpu = gpu_named(name)
    if gpu is None:
        print(f"the model knows {', '.join(g.name for g in sass_model.GPUS)}, not {name}")
        return 0
    end = time.monotonic() + options.seconds
    print(HEADER, flush=True)
    cases = sass_model.read_table(gpu.architecture)["cases"]
    # by dtype, those that matter most first: a run that is cut has them
    for case in sorted(cases, key=lambda case: [*DTYPES].index(case.rpartition(", ")[2].split()[0])):
        if options.filter not in case:
            continue
        if time.monotonic() > end:
            print("no time is left for the others")
            return 3
        call = call_of(case, device, sass_model.ELEMENTS)
        if call is None:
            continue
        line = line_of(case, cases[case], gpu, seconds(call))
        print(text_of(line), flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        del call
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
