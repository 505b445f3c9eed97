"""Every operation on small cases of its own: the shortest look at whether kernels are right, or what sanitizers watch.

    python tools/gpu_operations.py --check --out build/gpu/operations.jsonl   results against float64 on the CPU
    compute-sanitizer python tools/gpu_operations.py --impls native           nothing but the kernels

The cases are those of fmkernels/ops/<op>/cases.py, adaptive solves for the control and the rows of steps, and the
built-in paths for the schedule. Inputs are made on the CPU and copied, so that few kernels other than ours run.
Operations and dtypes take turns, each in an order of its own: a run that is cut has seen a part of all. A line for each
operation, dtype and implementation is written as it ends; the exit status is 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fmkernels as fm  # noqa: E402
from fmkernels import Noise, _dispatch  # noqa: E402
from fmkernels.paths import fused  # noqa: E402
from fmkernels.paths.schedule import at  # noqa: E402
from fmkernels.testing import Case, assert_within_budget, select, to_float64  # noqa: E402

OPS = ("regression_loss", "combine", "interpolate", "random", "row_dots")
SOLVE, SCHEDULE = "step_control", "schedule"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCHEDULES = (
    fm.paths.VP(),
    fm.paths.Cosine(),
    fm.paths.LinearVP(),
    fm.paths.Polynomial(1.5),
    fm.paths.VE(),
    fm.paths.OptimalTransport(0.3),
)
Check = Callable[[torch.device, bool], None]


def moved(value: Any, device: torch.device) -> Any:
    """Inputs on a device, which were made on the CPU."""
    if isinstance(value, Tensor):
        layout = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return layout.copy_(value) if 0 not in value.stride() or value.numel() == 0 else value.to(device)
    if isinstance(value, Noise):
        return Noise._of(value.seed.to(device), value.stream, value.row_offset)
    if isinstance(value, torch.Generator):
        return torch.Generator(device=device).manual_seed(value.initial_seed())
    if isinstance(value, torch.device):
        return device
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value


def run_case(case: Case, dtype: torch.dtype, impl: str, device: torch.device, check: bool) -> None:
    """Raises AssertionError where a result is beyond the error budget of the reference."""
    inputs = case.make(dtype, torch.device("cpu"), 0)
    got = case.evaluate(moved(inputs, device), impl)
    if not check:
        return
    oracle, reference = case.evaluate(to_float64(inputs), "reference"), case.evaluate(inputs, "reference")
    for i, (out, want, plain) in enumerate(zip(got, oracle, reference, strict=True)):
        assert_within_budget(out.cpu(), want, plain, noise=case.noise, name=f"{case.name}, output {i}")


def draws_itself(case: Case) -> bool:
    """Whether noise comes from a generator, whose numbers differ from device to device."""
    inputs = case.make(torch.float32, torch.device("cpu"), 0)
    return "generator" in inputs or (case.noise and not any(isinstance(v, (Tensor, Noise)) for v in _leaves(inputs)))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def run_solve(rows: int, inner: int, method: str, dtype: torch.dtype, device: torch.device, check: bool) -> None:
    """An adaptive solve with requested times: the control of steps, trial steps, moves of rows, dense output."""
    y = torch.linspace(0.5, 1.5, rows * inner, dtype=torch.float64).reshape(rows, inner).to(dtype)
    times = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    rate = torch.linspace(0.5, 3.0, rows, dtype=dtype)[:, None].to(device)
    tolerances = {"rtol": 1e-7, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        got = fm.odeint(lambda t, y: -rate * y, y.to(device), times.to(device), method=method, **tolerances)
    if not check:
        return
    want = y.double() * torch.exp(-rate.cpu().double() * times.double()[:, None, None])
    allowed = {torch.float64: 1e-4, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    error = float((got.cpu().double() - want).abs().max())
    assert error <= allowed, f"{method}, {rows} x {inner}: expected exp(-k t) y to {allowed}, off by {error:.2e}"


def run_schedule(path: fm.paths.Path, count: int, dtype: torch.dtype, device: torch.device, check: bool) -> None:
    """A path's schedule and derivatives at given times and at drawn ones, a launch each."""
    times, seed = torch.linspace(0.0, 1.0, count, dtype=dtype), torch.tensor(count)
    given = fused.at(path, times.to(device), "auto")
    drawn = fused.draw(path, (count,), seed.to(device), 2, 0, dtype, "auto")
    assert given is not None, f"{path!r}, {count} times: expected one launch, got formulas"
    assert drawn is not None, f"{path!r}, {count} drawn times: expected one launch, got formulas"
    if not check:
        return
    uniform = fm.rand(count, seed=seed, stream=2, impl="reference").to(dtype)
    assert torch.equal(drawn.t.cpu(), uniform), f"{path!r}: expected the times of fm.rand"
    for table, t in ((given, times), (drawn, uniform)):
        for place, name in enumerate(("alpha", "sigma", "d_alpha", "d_sigma")):
            want, plain, got = (
                torch.as_tensor(value).cpu().double().expand(t.shape)
                for value in (at(path, name, t.double()), at(path, name, t), table.row(place))
            )
            # next to the ends the formulas are off by more, as 1 - t is what it is
            allowed = 64 * torch.finfo(dtype).eps * want.abs() + 2 * (plain - want).abs()
            assert ((got - want).abs() <= allowed).all(), f"{path!r}: {name} at {count} times"


def groups(impls: list[str], device: torch.device) -> dict[tuple[str, str, str], list[Check]]:
    """(implementation, operation, dtype) -> what is to be done, in an order of its own."""
    found: dict[tuple[str, str, str], list[Check]] = {}
    rng = random.Random(0)
    for impl in impls:
        for dtype in DTYPES:
            for op in OPS:
                cases = select(importlib.import_module(f"fmkernels.ops.{op}.cases").CASES, "test")
                cases = [case for case in cases if device.type == "cpu" or not draws_itself(case)]
                found[impl, op, str(dtype).removeprefix("torch.")] = [
                    lambda device, check, case=case, dtype=dtype, impl=impl: run_case(case, dtype, impl, device, check)
                    for case in rng.sample(cases, len(cases))
                ]
            if impl == "native" and dtype in (torch.float32, torch.float64):  # those of times
                found[impl, SCHEDULE, str(dtype).removeprefix("torch.")] = [
                    lambda device, check, path=path, n=n, dtype=dtype: run_schedule(path, n, dtype, device, check)
                    for path, n in zip(SCHEDULES, (1, 127, 128, 129, 1000, 5000), strict=True)
                ]
            if impl == "native":
                shapes = [(3, 7), (300, 2), (2, 4100), (5, 64), (70, 33)]
                found[impl, SOLVE, str(dtype).removeprefix("torch.")] = [
                    lambda device, check, s=s, m=m, dtype=dtype: run_solve(*s, m, dtype, device, check)
                    for s, m in zip(shapes, ("dopri5", "bosh3", "tsit5", "dopri5", "dopri8"), strict=True)
                ]
    return found


def take_turns(work: dict[Any, list[Check]]) -> Iterator[tuple[Any, int, Check]]:
    """One of each, then the next of each, until all are done."""
    for number in range(max(map(len, work.values()), default=0)):
        for key, checks in work.items():
            if number < len(checks):
                yield key, number, checks[number]


def run_all(options: argparse.Namespace, device: torch.device) -> bool:
    """Whether everything that was run was right."""
    end = time.monotonic() + options.seconds
    impls = [impl for impl in options.impls if _tell_whether_available(impl, device)]
    right = True
    for number, impl in enumerate(impls):  # each implementation has an equal part of the time that is left
        until = time.monotonic() + (end - time.monotonic()) / (len(impls) - number)
        right &= _run_one(impl, groups([impl], device), until, options, device)
    return right and bool(impls)


def _run_one(
    impl: str,
    work: dict[tuple[str, str, str], list[Check]],
    until: float,
    options: argparse.Namespace,
    device: torch.device,
) -> bool:
    done = dict.fromkeys(work, 0)
    wrong: dict[Any, list[str]] = {key: [] for key in work}
    told: set[Any] = set()

    def tell(key: tuple[str, str, str]) -> None:
        told.add(key)
        line = {"implementation": key[0], "operation": key[1], "dtype": key[2], "cases": len(work[key])}
        line |= {"run": done[key], "wrong": wrong[key], "checked": options.check}
        print(f"{' '.join(key):36} {done[key]:3} of {len(work[key]):3} cases, {len(wrong[key])} wrong", flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    try:
        for key, number, check in take_turns(work):
            if time.monotonic() > until or number >= options.most:
                break
            try:
                check(device, options.check)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except (AssertionError, RuntimeError) as error:
                wrong[key].append(str(error).splitlines()[0])
                print(f"WRONG: {' '.join(key)}: {error}", flush=True)
            done[key] += 1
            if done[key] == len(work[key]):
                tell(key)
    finally:
        for key in work:
            if key not in told:
                tell(key)
    return not any(wrong.values())


def _tell_whether_available(impl: str, device: torch.device) -> bool:
    reason = _dispatch.unavailable(impl, device.type)
    if reason is not None:
        print(f"{impl} is not available: {reason}", flush=True)
    return reason is None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impls", nargs="+", default=["native"], choices=["native", "triton", "reference"])
    parser.add_argument("--check", action="store_true", help="compare with the reference in float64 on the CPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no more cases are begun")
    parser.add_argument("--most", type=int, default=10**6, help="cases of an operation and dtype")
    parser.add_argument("--out", type=Path, help="file for a line of JSON for each operation, dtype, implementation")
    options = parser.parse_args(argv)
    return 0 if run_all(options, torch.device(options.device)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
