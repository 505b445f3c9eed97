"""The one executor of fixed-grid programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import _dispatch, _native
from ..._checks import as_state, type_error
from ...ops.combine.op import combine
from ...random import Noise
from .program import EndStep, Prepared, Program, perform

_is_alias_of: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]
# Beyond this the time is the kernel's, and outputs are written through the operation.
MOST_ELEMENTS = 1 << 20
COPIED_BYTES = 1 << 14
# A call of the network at a state and a time; one output, or several for guidance in one batch.
Call = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]
OnStep = Callable[[int, Tensor], None]


class Buffers:
    """Tensors for the results of updates, kept between runs; a run within another one finds none and makes its own."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def take(self, count: int, like: Tensor) -> list[Tensor]:
        kept, self._tensors = self._tensors, []
        if kept and (kept[0].shape != like.shape or kept[0].dtype != like.dtype or kept[0].device != like.device):
            kept = []
        return kept[:count] + [torch.empty_like(like) for _ in range(count - len(kept))]

    def give_back(self, tensors: list[Tensor], but: Tensor) -> None:
        """After a run: all but what it returned."""
        self._tensors = [tensor for tensor in tensors if tensor is not but]


def _is_plain(x: Tensor) -> bool:
    """Whether the compiled library takes tensors like x by their addresses."""
    return type(x) is Tensor and x.is_contiguous() and 0 < x.numel() <= MOST_ELEMENTS


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

    function_name = "model"  # in errors

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
        # where updates write, by register; their addresses where the compiled library takes those
        self.targets: list[Any] | None = None
        self.addresses: list[int] | None = None
        self.trajectory = trajectory
        # a trajectory's rows that updates write to, or the addresses to which small states are copied
        self.rows: Sequence[Tensor] = ()
        self.copies: list[int] = []
        if buffers is not None:
            self._place(buffers, x_0)

    def _place(self, buffers: Buffers, x_0: Tensor) -> None:
        program, trajectory = self.program, self.trajectory
        self.kept = kept = buffers.take(program.slot_count, x_0)
        targets: list[Any] = [None] * program.registers
        self.targets = targets
        for register, slot in program.slots.items():
            targets[register] = kept[slot]
        library = _dispatch.plain_library("auto") if x_0.device.type == "cpu" and _is_plain(x_0) else None
        if library is not None:
            starts = [tensor.data_ptr() for tensor in kept]
            self.addresses = addresses = [0] * program.registers
            for register, slot in program.slots.items():
                addresses[register] = starts[slot]
            self.copies = copies = [0] * program.registers
            self.write = library.combine_into_buffer
            self.kind = (_native.DTYPE_CODE[x_0.dtype], tuple(x_0.shape))
        if trajectory is None:
            return
        size = x_0.numel() * x_0.element_size()
        if self.addresses is not None and size <= COPIED_BYTES:
            # a copy of a few lines costs less than a tensor for each row
            first = trajectory.data_ptr() + size
            for register, number in program.state_rows:
                copies[register] = first + number * size
            return
        self.rows = rows = trajectory.unbind(0)
        for register, number in program.state_rows:
            targets[register] = rows[number + 1]
            if self.addresses is not None:
                self.addresses[register] = rows[number + 1].data_ptr()

    def all(self) -> None:
        """Runs the whole program."""
        unwatched = self.on_step is None and (self.trajectory is None or self.targets is not None)
        self.execute(self.program.unwatched if unwatched else self.program.prepared)

    def execute(self, prepared: Sequence[Prepared]) -> None:
        """Runs instructions in the form of :attr:`Program.prepared`."""
        registers, calls, times, coefficients = self.registers, self.calls, self.times, self.coefficients
        targets, addresses = self.targets, self.addresses
        watched = self.trajectory is not None or self.on_step is not None
        if addresses is not None:
            write, copies, (dtype, shape) = self.write, self.copies, self.kind
        for at, kind, instruction, released in prepared:
            if kind == "Update":
                result, sources, _ = instruction
                if addresses is not None and write(
                    addresses[result],
                    dtype,
                    shape,
                    [(addresses[s] or registers[s]) if s >= 0 else self.noises[-1 - s] for s in sources],
                    coefficients[at],
                    copies[result],
                ):
                    registers[result] = targets[result]  # type: ignore[index]
                else:
                    operands = [registers[s] if s >= 0 else self.noises[-1 - s] for s in sources]
                    if addresses is not None:
                        operands = self._taken(operands)
                    out = None if targets is None else targets[result]
                    registers[result] = combine(operands, coefficients[at], out=out)
                    if addresses is not None and copies[result]:
                        self._copy(result)
            elif kind == "Evaluate":
                branch, source, time, results = instruction
                x = registers[source]
                output = calls[branch](x, times[time])
                if len(results) == 1:
                    if addresses is not None and type(output) is Tensor:  # checked where it is read
                        registers[results[0]] = output.clone() if _is_alias_of(output, x) else output
                    else:
                        registers[results[0]] = self._checked(output, x)
                else:
                    if not isinstance(output, (tuple, list)) or len(output) != len(results):
                        raise type_error("model", f"{len(results)} outputs", output)
                    for result, v in zip(results, output, strict=True):
                        registers[result] = self._checked(v, x)
            elif kind == "Compute":
                function, sources, results = instruction
                if addresses is not None:
                    used = [s for s in sources if s in self.program.outputs]
                    for s, value in zip(used, self._taken([registers[s] for s in used]), strict=True):
                        registers[s] = value
                values = perform(function, [registers[s] for s in sources])
                for result, value in zip(results, values, strict=True):
                    registers[result] = value
            elif watched:
                self._end_step(*instruction)
            for register in released:
                registers[register] = None

    def _taken(self, operands: Sequence[Any]) -> list[Any]:
        """States are what they should be; network outputs are told from them by nothing but that."""
        assert self.targets is not None
        like = next(target for target in self.targets if target is not None)
        name = self.function_name
        return [operand if isinstance(operand, Noise) else as_state(name, operand, like) for operand in operands]

    def _checked(self, v: Any, x: Tensor) -> Tensor:
        v = as_state(self.function_name, v, x)
        # what the network returns must not change when the state's buffer is written again
        return v.clone() if self.targets is not None and _is_alias_of(v, x) else v

    def _copy(self, state: int) -> None:
        """Writes a state to its place in the trajectory."""
        assert self.trajectory is not None
        self.trajectory[dict(self.program.state_rows)[state] + 1].copy_(self.registers[state])

    def _end_step(self, number: int, state: int) -> None:
        value = self.registers[state]
        if self.trajectory is not None and (self.targets is None or (number, state) not in self.program.written):
            self.trajectory[number + 1].copy_(value)
        if self.on_step is not None:
            self.on_step(number, value)

    def checkpointed(self, segments: int) -> None:
        """Runs in segments that keep only the states between them and are computed again for the gradient."""
        ends = [at + 1 for at, i in enumerate(self.program.instructions) if isinstance(i, EndStep)]
        if not ends:
            self.all()
            return
        ends[-1] = len(self.program.instructions)  # what is put out after the last step belongs to it
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
            self.execute(self.program.prepared[start:stop])
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
        return {name: [self.registers[r] for r in registers] for name, registers in self.program.extras}
