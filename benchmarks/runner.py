"""Runs one case: checks it, measures it, and makes its records. A case whose check is red gives no record."""

from __future__ import annotations

import datetime
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fmkernels import _dispatch
from fmkernels.testing import Case, Inputs, assert_within_budget, relative_error

from . import machine, memory, timing
from .families import CHECK_SEED
from .family import Family, Implementation, Outputs, Solve, implementations
from .records import COPY, DEFAULT_MEMORY, SCHEMA, Record


class RedCheck(Exception):
    """An implementation of ours is wrong: its case is refused."""


@dataclass(frozen=True)
class Options:
    device: torch.device
    budget: float = 6.0  # seconds of timing a case
    rounds: int | None = None
    with_compile: bool = True
    quick: bool = False  # of ours only impl="auto"
    memory: str = DEFAULT_MEMORY


class Runner:
    """Holds what is the same for every case of a run, and the reasons for skips that were already told."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.machine = machine.describe(options.device)
        self.stamp = {
            "machine": self.machine,
            "versions": machine.versions(),
            "commit": machine.commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        }
        self._told: set[tuple[str, str]] = set()

    def run(self, family: Family, case: Case, dtype: torch.dtype) -> list[Record]:
        """The records of a case in one dtype.

        Raises:
            RedCheck: an implementation of ours gives a result beyond its error budget.
        """
        options = self.options
        latency = math.prod(case.shape) <= timing.LATENCY_ELEMENTS
        inputs = _inputs(case, dtype, options.device, 0)
        usable = self._usable(family, case, dtype, inputs)
        errors = {entry.name: _check(family, case, inputs, entry) for entry in usable}
        peaks = {
            entry.name: memory.peak_extra_bytes(lambda e=entry: e.run(inputs), options.device)  # type: ignore[misc]
            for entry in usable
        }
        retained = {
            entry.name: memory.retained_bytes(lambda e=entry: e.run(inputs), options.device)  # type: ignore[misc]
            for entry in usable
            if entry.ours
        }
        solves = _solves(family, case, inputs, usable)
        # the calls of a solve are those of one input
        count = timing.set_count(_bytes_of(inputs), options.device, latency=latency or bool(solves))
        sets = [inputs, *(_inputs(case, dtype, options.device, seed) for seed in range(1, count))]
        entries = [timing.Entry(entry.name, entry.run, sets) for entry in usable]
        for entry in entries:
            if entry.name in solves:
                entry.part = timing.Entry(f"{entry.name}, network alone", solves[entry.name].network, sets)
        entries.append(timing.copy_entry(case.bytes(dtype), options.device, latency=latency))

        parts = {entry.name: (entry.part.name, entry.rest) for entry in entries if entry.part is not None}
        hidden = {name for pair in parts.values() for name in pair}
        takes = _dispatch.chosen("combine", options.device.type, _dispatch.wanted("auto"))
        records = []
        # What torch.compile has specialised on must not change from one input set to the next: fail, do not
        # time it.
        with torch._dynamo.config.patch(error_on_recompile=True):
            taken_by = self._times(entries, graph=not solves)
        for timer, times in taken_by.items():
            for name, taken in times.items():
                if name in hidden:
                    continue
                one = next((e for e in usable if e.name == name), None)
                records.append(
                    {
                        "schema": SCHEMA,
                        "family": family.name,
                        "case": {
                            "shape": list(case.shape),
                            "dtype": str(dtype).removeprefix("torch."),
                            "variant": case.variant,
                        },
                        "implementation": name,
                        "auto": bool(one and one.auto),
                        "takes": takes if one and one.auto else None,
                        "timer": timer,
                        "memory": options.memory,
                        **asdict(taken),
                        "sets": count,
                        "bytes": case.bytes(dtype),
                        "flops": case.flops,
                        "gb_per_s": case.bytes(dtype) / taken.median / 1e9,
                        "floor_seconds": times[COPY].median,
                        "floor_share": times[COPY].median / taken.median,
                        "peak_extra_bytes": peaks.get(name),
                        "retained_bytes": retained.get(name),
                        "errors": errors.get(name, {}),
                        **(_solve_fields(solves[name], *(times[n] for n in parts[name])) if name in parts else {}),
                        **self.stamp,
                    }
                )
        return records

    def _times(self, entries: list[timing.Entry], *, graph: bool) -> dict[str, dict[str, timing.Timing]]:
        options = self.options
        timer = "events" if options.device.type == "cuda" else "host"
        times = {timer: timing.interleave(entries, options.device, budget=options.budget, rounds=options.rounds)}
        if graph and options.device.type == "cuda":
            captured = [c for c in map(timing.capture, entries) if c is not None]
            if any(entry.name == COPY for entry in captured):
                taken = timing.interleave(captured, options.device, budget=options.budget, rounds=options.rounds)
                calls = {entry.name: len(entry.sets) for entry in entries}
                times["graph"] = {name: timing.per_call(value, calls[name]) for name, value in taken.items()}
        return times

    def _usable(self, family: Family, case: Case, dtype: torch.dtype, inputs: Inputs) -> list[Implementation]:
        """The implementations that run here, warmed up (compiled); says once why another does not."""
        options, usable = self.options, []
        for entry in implementations(
            family,
            case,
            dtype,
            options.device,
            with_compile=options.with_compile,
            quick=options.quick or options.memory != DEFAULT_MEMORY,
            peers=options.memory == DEFAULT_MEMORY,
        ):
            if isinstance(entry, tuple):
                self._tell(*entry)
                continue
            try:
                entry.run(inputs)  # the check and the memory's measurement warm it further
            except Exception as error:  # a peer's failure must not end the run; ours must
                if entry.ours:
                    raise
                self._tell(entry.name, f"{type(error).__name__}: {str(error).splitlines()[0]}")
            else:
                usable.append(entry)
        return usable

    def _tell(self, name: str, reason: str) -> None:
        if (name, reason) not in self._told:
            self._told.add((name, reason))
            print(f"  skipped {name}: {reason}")


def _solves(family: Family, case: Case, inputs: Inputs, usable: list[Implementation]) -> dict[str, Solve]:
    return {} if family.solve is None else {entry.name: family.solve(case, entry.run, inputs) for entry in usable}


def _solve_fields(solve: Solve, network: timing.Timing, overhead: timing.Timing) -> dict[str, Any]:
    """What the record of a solve has more: evaluations, steps, the network's time and the solver's own."""
    return {
        "solve": {
            "nfe": solve.calls,
            "nfe_per_sample": solve.rows,
            "steps": solve.steps,
            "network": asdict(network),
            "overhead": asdict(overhead),
            "overhead_per_step": overhead.median / max(1, solve.steps),
        }
    }


def _inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    inputs = case.make(dtype, device, seed)
    if "pred" in inputs:
        inputs["pred"].requires_grad_()
    return inputs


def _bytes_of(inputs: Any) -> int:
    if isinstance(inputs, Tensor):
        return inputs.numel() * inputs.element_size()
    if isinstance(inputs, dict | list | tuple):
        return sum(_bytes_of(v) for v in (inputs.values() if isinstance(inputs, dict) else inputs))
    return 0


def _check(family: Family, case: Case, inputs: Inputs, entry: Implementation) -> dict[str, float]:
    """Errors against float64, by the name of the result; RedCheck where one of ours is beyond its budget."""
    torch.manual_seed(CHECK_SEED)
    outputs: Outputs = family.checked(entry.run(inputs))
    oracle = family.oracle(case, inputs, outputs)
    names = [name for name in oracle if name in outputs]
    if entry.ours:
        try:
            _check_ours(family, case, inputs, outputs, oracle)
        except AssertionError as error:
            raise RedCheck(f"{entry.name}: {error}") from error
    return {name: relative_error(outputs[name], oracle[name]) for name in names}


def _check_ours(family: Family, case: Case, inputs: Inputs, outputs: Outputs, oracle: dict[str, Tensor]) -> None:
    reference, factor = family.reference(case, inputs, outputs), family.budget(outputs)
    for name, right in oracle.items():
        if name not in outputs:
            raise AssertionError(f"{name}: expected a result, got none")
        assert_within_budget(outputs[name], right, reference[name], factor, noise=case.noise, name=name)
    drawn = outputs.get("x_0")
    if case.noise and isinstance(drawn, Tensor) and drawn.numel() > timing.LATENCY_ELEMENTS:
        # The oracle took it as it came, so that it is normal is looked at here: six standard deviations.
        bound = 6 / math.sqrt(drawn.numel())
        mean, variance = float(drawn.double().mean()), float(drawn.double().var())
        if abs(mean) > bound or abs(variance - 1) > bound * math.sqrt(2) + drawn_rounding(drawn.dtype):
            raise AssertionError(f"x_0: expected standard normal noise, got mean {mean}, variance {variance}")


def drawn_rounding(dtype: torch.dtype) -> float:
    """By how much rounding normal numbers to a dtype may move their variance."""
    return float(torch.finfo(dtype).eps) ** 2
