"""The one executor of fixed-grid programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import _dispatch
from .._checks import type_error, value_error
from ..ops.combine.op import combine
from ..random import Noise
from .program import Compute, EndStep, Evaluate, Program, Update

_is_alias_of: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]

# A call of the network at a state and a time; one output, or several for guidance in one batch.
Call = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]
OnStep = Callable[[int, Tensor], None]


def times_of(program: Program, x: Tensor, dtype: torch.dtype, shape: str) -> Sequence[Tensor]:
    """The program's evaluation times as tensors for the network: () or (B,), or of the grid's leading shape."""
    batch = x.shape[0] if shape == "batch" and x.dim() else None
    key = ("times", x.device, dtype, batch)
    if key not in program.cache:
        numbers = program.times
        table = torch.from_numpy(np.asarray(numbers, dtype=np.float64)).to(dtype=dtype)
        if table.dim() == 1 and batch is not None:
            # few numbers are laid out in full, as a network may want to view them
            table = table[:, None].expand(-1, batch)
            table = table.contiguous() if table.numel() <= 1 << 20 else table
        program.cache[key] = table.to(x.device, non_blocking=True).unbind(0) if numbers else ()
    return program.cache[key]


def coefficients_of(program: Program, x: Tensor) -> list[list[Any]]:
    """The coefficients of each update as numbers, or as tensors where they have a leading shape."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    key = ("coefficients", x.device, dtype)
    if key not in program.cache:
        program.cache[key] = [
            [
                c if isinstance(c, float) else torch.from_numpy(np.asarray(c, np.float64)).to(dtype).to(x.device)
                for c in i.coefficients
            ]
            if isinstance(i, Update)
            else []
            for i in program.instructions
        ]
    return program.cache[key]


def table_of(program: Program, x: Tensor) -> tuple[Tensor, list[Any]]:
    """The coefficients as one flat table on the device and a view of it for each update.

    A captured graph reads them from there: other numbers need no new capture.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = [np.stack(np.broadcast_arrays(*i.coefficients), -1) for i in program.instructions if isinstance(i, Update)]
    flat = np.concatenate([row.ravel() for row in rows]) if rows else np.zeros(0)
    table = torch.from_numpy(flat).to(dtype).to(x.device)
    views: list[Any] = []
    start, remaining = 0, iter(rows)
    for instruction in program.instructions:
        if isinstance(instruction, Update):
            row = next(remaining)
            views.append(table[start : start + row.size].view(row.shape))
            start += row.size
        else:
            views.append([])
    return table, views


def check_output(v: Any, x: Tensor) -> None:
    """The network's output must be like the state."""
    if not isinstance(v, Tensor):
        raise type_error("model", "a tensor from model(x, t)", v)
    if v.shape != x.shape:
        raise value_error("model", f"an output of the state's shape, {tuple(x.shape)}", v)
    if v.dtype is not x.dtype:
        raise type_error("model", f"an output of the state's dtype, {x.dtype} (cast it, or set dtype=)", v)
    if v.device != x.device:
        raise value_error("model", f"an output on the state's device, {x.device}", v)


class Buffers:
    """Tensors for the results of updates, kept between runs."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def take(self, count: int, like: Tensor) -> list[Tensor]:
        kept = self._tensors
        if kept and (kept[0].shape != like.shape or kept[0].dtype != like.dtype or kept[0].device != like.device):
            kept.clear()
        while len(kept) < count:
            kept.append(torch.empty_like(like))
        return kept[:count]


class Run:
    """One run of a program.

    Args:
        calls: for each branch the network call.
        x_0: initial state.
        times: one tensor for each evaluation time.
        coefficients: for each instruction, the update's coefficients: a list of numbers and tensors, or one table.
        seed: of the program's noise.
        row_offset: the batch's place in a larger one, for noise.
        buffers: where updates are written; None allocates (as gradients need).
        trajectory: (steps + 1, B, ...) tensor that receives the states.
        on_step: called with (index, state) after each step.
    """

    def __init__(
        self,
        program: Program,
        calls: Mapping[str, Call],
        x_0: Tensor,
        times: Sequence[Tensor],
        coefficients: Sequence[Any],
        seed: Tensor | None = None,
        *,
        row_offset: int = 0,
        buffers: Buffers | None = None,
        trajectory: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.program, self.calls, self.times, self.coefficients = program, calls, times, coefficients
        self.trajectory, self.on_step = trajectory, on_step
        self.noises: list[Noise] = []
        if program.streams:
            assert seed is not None
            self.noises = [Noise(seed, stream, row_offset) for stream in range(program.streams)]
        self.registers: list[Any] = [None] * program.registers
        self.registers[0] = x_0
        self.outs: list[Tensor] | None = None
        if buffers is not None:
            self.outs = buffers.take(program.slot_count, x_0)
        self.native = None
        if self.outs is not None and x_0.device.type == "cpu" and not program.streams:
            self.native = _dispatch.plain_library("auto")

    def all(self) -> None:
        self.execute(0, len(self.program.instructions))

    def execute(self, start: int, stop: int) -> None:
        program, registers, calls, times = self.program, self.registers, self.calls, self.times
        outs, slots, native = self.outs, program.slots, self.native
        instructions, coefficients, releases = program.instructions, self.coefficients, program.releases
        for at in range(start, stop):
            instruction = instructions[at]
            if isinstance(instruction, Evaluate):
                branch, source, time, results = instruction
                x = registers[source]
                output = calls[branch](x, times[time])
                outputs = (output,) if len(results) == 1 and not isinstance(output, tuple) else output
                if not isinstance(outputs, (tuple, list)) or len(outputs) != len(results):
                    raise type_error("model", f"{len(results)} outputs", output)
                for result, v in zip(results, outputs, strict=True):
                    if not isinstance(v, Tensor) or v.shape != x.shape or v.dtype is not x.dtype:
                        check_output(v, x)
                    # what the network returns must not change when the state's buffer is written again
                    registers[result] = v.clone() if outs is not None and _is_alias_of(v, x) else v
            elif isinstance(instruction, Update):
                result, sources, _ = instruction
                operands = [registers[s] if s >= 0 else self.noises[-1 - s] for s in sources]
                if outs is None:
                    registers[result] = combine(operands, coefficients[at])
                else:
                    out = outs[slots[result]]
                    if native is None or not native.combine_into_plain(out, operands, coefficients[at]):
                        combine(operands, coefficients[at], out=out)
                    registers[result] = out
            elif isinstance(instruction, Compute):
                values = instruction.function(*[registers[s] for s in instruction.sources])
                for result, value in zip(instruction.results, values, strict=True):
                    registers[result] = value
            else:
                number, state = instruction
                if self.trajectory is not None:
                    self.trajectory[number + 1].copy_(registers[state])
                if self.on_step is not None:
                    self.on_step(number, registers[state])
            for register in releases[at]:
                registers[register] = None

    def checkpointed(self, segments: int) -> None:
        """Runs in segments that keep only the states between them and are computed again for the gradient."""
        ends = [at + 1 for at, i in enumerate(self.program.instructions) if isinstance(i, EndStep)]
        if not ends:
            return
        per_segment = -(-len(ends) // max(1, min(segments, len(ends))))
        start = 0
        for stop in [*ends[per_segment - 1 : -1 : per_segment], ends[-1]]:
            self._segment(start, stop)
            start = stop

    def _segment(self, start: int, stop: int) -> None:
        def live(at: int) -> list[int]:
            return [r for r, last in enumerate(self.program.last_use) if last >= at and self.registers[r] is not None]

        before = live(start)
        after: list[int] = []

        def segment(*tensors: Tensor) -> tuple[Tensor, ...]:
            self.registers = [None] * self.program.registers
            for register, tensor in zip(before, tensors, strict=True):
                self.registers[register] = tensor
            self.execute(start, stop)
            after[:] = live(stop)
            return tuple(self.registers[r] for r in after)

        results = checkpoint(segment, *(self.registers[r] for r in before), use_reentrant=False)
        self.registers = [None] * self.program.registers
        for register, tensor in zip(after, results, strict=True):
            self.registers[register] = tensor

    @property
    def result(self) -> Tensor:
        return self.registers[self.program.result]

    def extras(self) -> dict[str, list[Tensor]]:
        return {name: [self.registers[r] for r in registers] for name, registers in self.program.extras.items()}
