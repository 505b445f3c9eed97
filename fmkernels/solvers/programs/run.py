"""The one executor of fixed-grid programs.

Whose memory a tensor is decides what may be done with it. States that updates write are the run's own buffers, or
places in a trajectory; they are written again, so that nobody who is to keep one gets it (a callback gets a copy, the
network is told). A network's output is nobody's but the run's where it is a new tensor; a static buffer, the input, a
parameter may be written by the network's next call or by the run's next update. Outputs that are read before either
are taken as they come; the others are copied unless the run is their only owner.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import _dispatch, _native
from ..._cache import is_plain_context
from ..._checks import as_state, type_error
from ..._torch import same_memory
from ...ops.combine.op import combine
from ...random import Noise
from .draws import Draws, Transform
from .ownership import (
    Owned,
    OwnTimes,
    check_each,
    is_kept,
    ordinary_copy,
    ordinary_memory,
    owned_each,
    owned_memory,
    owned_state,
    references_of,
    wrote_to_input,
)
from .program import Prepared, Program, Segment, perform
from .tables import Lease

# Beyond this the time is the kernel's, and outputs are written through the operation.
MOST_ELEMENTS = 1 << 20
COPIED_BYTES = 1 << 14
# A call of the network at a state and a time; one output, or several for guidance in one batch.
Call = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, ...]]
OnStep = Callable[[int, Tensor], None]


class JoinedCall(ABC):
    """A call of several branches, which may be one call of the network on a batch of all."""

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """An output for each branch."""

    @abstractmethod
    def on_all(self, x: Tensor, t: Tensor) -> Tensor | None:
        """The outputs one after the other, where x and t hold the state's rows once for each branch (t may be 0-dim);
        None where it takes several calls, or the network writes to its input."""


def _is_plain(x: Tensor) -> bool:
    """Whether the compiled library takes tensors like x by their addresses."""
    return type(x) is Tensor and x.is_contiguous() and 0 < x.numel() <= MOST_ELEMENTS


_ONE = [1.0]


class Run:
    """One run of a program.

    Args:
        calls: for each branch the network call.
        x_0: initial state.
        numbers: times and coefficients, see :func:`fmkernels.solvers.programs.tables.numbers_for`.
        seed: of the program's noise.
        row_offset: the batch's place in a larger one, for noise.
        noise_transform: from the noise that is drawn to what is used in its place.
        reuse: updates write to a few buffers, which are written again, those of this run alone; else each makes a new
            tensor, as gradients need.
        lends: functions may keep the states that they are given: one that is kept is not written again.
        trajectory: (steps + 1, B, ...) tensor that receives the states.
        on_step: called with (index, state) after each step; with ``reuse`` the state is written again later.
    """

    function_name = "model"  # in errors
    gave_rows = False  # whether a function keeps states that are rows of the trajectory

    def __init__(
        self,
        program: Program,
        calls: Mapping[str, Call],
        x_0: Tensor,
        numbers: Lease,
        seed: Tensor | None = None,
        *,
        row_offset: int = 0,
        noise_transform: Transform | None = None,
        reuse: bool = False,
        lends: bool = False,
        trajectory: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.program, self.calls, self.numbers, self.lease = program, calls, numbers.value, numbers
        self.trajectory, self.on_step, self.x_0 = trajectory, on_step, x_0
        self.noises: Sequence[Any] = []  # what updates take
        self.draws = Draws((), x_0, None)  # what functions take
        if program.streams:
            assert seed is not None
            self.noises = [Noise._of(seed, stream, row_offset) for stream in range(program.streams)]
            self.draws = Draws(self.noises, x_0, noise_transform)
            if noise_transform is not None:
                self.noises = self.draws
        self.look = self.numbers.plain or is_plain_context()  # whether the owners of memory can be seen
        self.first_step = 0
        self.registers: list[Any] = [x_0]
        # where updates write, by register; their addresses where the compiled library takes those
        self.targets: list[Any] | None = None
        self.addresses: list[int] | None = None
        # a trajectory's rows that updates write to, or the addresses to which small states are copied
        self.rows: Sequence[Tensor] = ()
        self.copies: list[int] = []
        self.buffers: list[Tensor] | None = None
        # for copies of small outputs that are held: a copy costs no more than what it saves, as it has an address
        self.holders: list[Tensor] = []
        self.write: Callable[..., bool] | None = None  # combine into memory given by its address
        # of buffers that hold a state twice, for a call of two branches: the whole
        self.doubles: list[Tensor] = []
        self.double_starts: set[int] = set()
        self.lends = lends and reuse and self.look
        self.records = not reuse and torch.is_grad_enabled()
        if reuse and (self.look or not lends):
            with ordinary_memory():
                self._make_buffers(calls)
        self._begin(0, x_0)

    def _make_buffers(self, calls: Mapping[str, Call]) -> None:
        program, x_0, trajectory = self.program, self.x_0, self.trajectory
        self.row_bytes = x_0.numel() * x_0.element_size()
        library = _dispatch.plain_library("auto") if x_0.device.type == "cpu" and _is_plain(x_0) else None
        if library is not None and program.doubled and trajectory is None and x_0.dim():
            shape = (2 * x_0.shape[0], *x_0.shape[1:])
            self.doubles = [x_0.new_empty(shape) for _ in range(program.slot_count)]
            self.double_starts = {double.data_ptr() for double in self.doubles}
            self.buffers = [double[: x_0.shape[0]] for double in self.doubles]
        else:
            self.buffers = [torch.empty_like(x_0) for _ in range(program.slot_count)]
        if self.lends:
            self.memory: dict[int, Owned] = {id(buffer): owned_memory(buffer) for buffer in self.buffers}
            self.calls = {branch: self._lending(call) for branch, call in calls.items()}
        if library is not None:
            self.write = library.combine_into_buffer
            self.kind = (_native.DTYPE_CODE[x_0.dtype], tuple(x_0.shape))
            if self.row_bytes <= COPIED_BYTES and program.held_count:
                self.holders = [torch.empty_like(x_0) for _ in range(program.held_count)]
        if trajectory is not None and (self.write is None or self.row_bytes > COPIED_BYTES):
            self.rows = trajectory.unbind(0)

    def _begin(self, number: int, state: Tensor) -> None:
        """Makes a chunk ready to run from a state."""
        segment, self.first_step, _ = self.program.chunks[number]
        self.segment = segment
        self.times, self.coefficients = self.numbers.chunk(number)
        self.doubled_times = self.numbers.doubled_times(number) if self.doubles else ()
        self.registers = [None] * segment.registers
        self.registers[0] = state
        if self.buffers is not None:
            self._place(segment, self.buffers, state)

    def _place(self, segment: Segment, buffers: list[Tensor], state: Tensor) -> None:
        if segment.again:  # the state's own buffer is the one that is free again after its last use
            for at, buffer in enumerate(buffers):
                if buffer is state:
                    buffers[0], buffers[at] = buffer, buffers[0]
                    if self.doubles:
                        self.doubles[0], self.doubles[at] = self.doubles[at], self.doubles[0]
        targets: list[Any] = [None] * segment.registers
        self.targets = targets
        for register, slot in segment.slots.items():
            targets[register] = buffers[slot]
        if self.write is not None:
            starts_of_slots = [buffer.data_ptr() for buffer in buffers]
            self.addresses = addresses = [0] * segment.registers
            for register, slot in segment.slots.items():
                addresses[register] = starts_of_slots[slot]
            addresses[0] = 0  # an external state is checked as any operand
            if self.holders:
                starts = [holder.data_ptr() for holder in self.holders]
                for register, slot in segment.held_slots.items():
                    targets[register], addresses[register] = self.holders[slot], starts[slot]
            self.copies = copies = [0] * segment.registers
            if self.doubles:
                for register in segment.doubled:
                    copies[register] = starts_of_slots[segment.slots[register]] + self.row_bytes
        if self.trajectory is None:
            return
        first = self.first_step + 1
        if not self.rows:
            # a copy of a few lines costs less than a tensor for each row
            begin = self.trajectory.data_ptr() + first * self.row_bytes
            for register, number in segment.state_rows:
                copies[register] = begin + number * self.row_bytes
            return
        for register, number in segment.state_rows:
            targets[register] = row = self.rows[first + number]
            if self.addresses is not None:
                self.addresses[register] = row.data_ptr()

    def _lending(self, call: Call) -> Call:
        memory = self.memory

        def lending(x: Tensor, t: Tensor) -> Any:
            own = memory.get(id(x))
            if own is None:
                own = owned_memory(x)
            references = references_of(x)
            output = call(x, t)
            if is_kept(x, references, own):
                self._give(x)
            return output

        return lending

    def _perform(self, function: Any, arguments: list[Any]) -> tuple[Tensor, ...]:
        if not self.lends:
            return perform(function, arguments)
        before = [references_of(x) for x in arguments]
        memory = [owned_memory(x) if isinstance(x, Tensor) else None for x in arguments]
        values = perform(function, arguments)
        for i, own in enumerate(memory):
            if own is not None and is_kept(arguments[i], before[i] - 1, own):  # before, a variable had it too
                self._give(arguments[i])
        return values

    def _give(self, x: Tensor) -> None:
        """Leaves a state to who keeps it: what was its buffer is another tensor from now on."""
        if self.rows and x._base is self.trajectory:
            self.gave_rows = True
            return
        buffers, targets, addresses = self.buffers, self.targets, self.addresses
        assert buffers is not None
        assert targets is not None
        for at, buffer in enumerate(buffers):
            if buffer is x:
                del self.memory[id(x)]
                with ordinary_memory():
                    buffers[at] = new = torch.empty_like(x)
                self.memory[id(new)] = owned_memory(new)
                for register in self.segment.slots:
                    if targets[register] is x and self.registers[register] is not x:
                        targets[register] = new
                        if addresses is not None and register:
                            addresses[register] = new.data_ptr()

    def all(self) -> None:
        """Runs the whole program."""
        unwatched = self.on_step is None and (self.trajectory is None or self.targets is not None)
        try:
            for number in range(len(self.program.chunks)):
                if number:
                    self._begin(number, self.registers[self.segment.result])
                self.execute(self.segment.unwatched if unwatched else self.segment.prepared)
        finally:
            self.lease.release()
        if self.gave_rows and self.trajectory is not None:
            self.trajectory = self.trajectory.clone()

    def execute(self, prepared: Sequence[Prepared]) -> None:
        """Runs instructions in the form of :attr:`Segment.prepared`."""
        registers, calls, times, coefficients = self.registers, self.calls, self.times, self.coefficients
        targets, addresses = self.targets, self.addresses
        watched, look = self.trajectory is not None or self.on_step is not None, self.look
        if addresses is not None:
            write: Any = self.write
            copies, (dtype, shape) = self.copies, self.kind
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
                    if self.doubles:
                        self._part(sources)
                    operands = [registers[s] if s >= 0 else self.noises[-1 - s] for s in sources]
                    if addresses is not None:
                        operands = self._taken(operands)
                    out = None if targets is None else targets[result]
                    registers[result] = combine(operands, coefficients[at], out=out)
                    if addresses is not None and copies[result]:
                        self._copy(result)
            elif kind == "Evaluate":
                branch, source, time, results = instruction
                output = calls[branch](registers[source], times[time])
                if addresses is not None and type(output) is Tensor and len(results) == 1:
                    registers[results[0]] = output  # checked where it is read
                else:
                    # what is recorded may save it for its derivative
                    references = references_of(output) if self.records and look else None
                    self._take(output, results, registers[source], references)
            elif kind == "Held":
                branch, source, time, results = instruction
                output = calls[branch](registers[source], times[time])
                result = results[0]
                if (
                    addresses is not None
                    and len(results) == 1
                    and addresses[result]
                    and write(addresses[result], dtype, shape, [output], _ONE, 0)
                ):
                    registers[result] = targets[result]  # type: ignore[index]
                else:
                    references = references_of(output) if look else 0
                    self._take(output, results, registers[source], references)
            elif kind == "Beside":
                branch, source, time, results = instruction
                x = registers[source]
                output = calls[branch](x, times[time])
                if addresses is not None and type(output) is Tensor and len(results) == 1:
                    registers[results[0]] = output.clone() if same_memory(output, x) else output
                else:
                    references = references_of(output) if self.records and look else None
                    self._take(output, results, x, references)
                    if targets is not None:
                        for result in results:
                            if same_memory(registers[result], x):
                                registers[result] = registers[result].clone()
            elif kind == "Doubled":
                branch, source, time, results = instruction
                if not self.doubles or not self._call_on_all(calls[branch], source, time, results):
                    x = registers[source]
                    output = calls[branch](x, times[time])
                    references = references_of(output) if self.records and look else None
                    self._take(output, results, x, references)
            elif kind == "Compute":
                function, sources, results = instruction
                if addresses is not None:
                    used = [s for s in sources if s in self.segment.outputs]
                    for s, value in zip(used, self._taken([registers[s] for s in used]), strict=True):
                        registers[s] = value
                arguments: list[Any] = [registers[s] if s >= 0 else self.draws.draw(-1 - s) for s in sources]
                values = self._perform(function, arguments)
                for result, value in zip(results, values, strict=True):
                    registers[result] = value
            elif kind == "First":
                self._call_first(*instruction)
            elif watched:
                self._end_step(*instruction)
            for register in released:
                registers[register] = None

    def _call_on_all(self, call: Call, source: int, time: int, results: tuple[int, ...]) -> bool:
        """One call of two branches on the buffer that holds the state twice; whether it was done.

        The output, in one piece, goes to the update by the addresses of its halves.
        """
        assert self.addresses is not None
        slot = self.segment.slots[source]
        x = self.doubles[slot]
        version = x._version
        output = call.on_all(x, self.doubled_times[time]) if isinstance(call, JoinedCall) else None
        if output is None:
            return False
        if x._version != version:
            raise wrote_to_input(self.function_name)
        output = as_state(self.function_name, output, x)
        begin = output.data_ptr()
        first, second = results
        self.registers[first] = self.registers[second] = output
        if output.is_contiguous() and not output.is_neg() and begin not in self.double_starts:
            self.addresses[first], self.addresses[second] = begin, begin + self.row_bytes
        else:
            self.addresses[first] = self.addresses[second] = 0
            self._part(results)
        return True

    def _part(self, sources: tuple[int, ...]) -> None:
        """Puts each branch's half of an output of two in its register."""
        rows = self.doubles[0].shape[0]
        for s in sources:
            half = self.segment.half_of.get(s)
            if half is not None and self.registers[s].shape[0] == rows:
                self.registers[s] = self.registers[s].unflatten(0, (2, rows // 2))[half]

    def _call_first(self, branch: str, source: int, time: int, results: tuple[int, ...]) -> None:
        """A branch's first call, which shows whether the network writes to its input."""
        x = self.registers[source]
        if x is self.x_0 and not x.requires_grad:  # the caller's, which a network that writes would spoil
            x = ordinary_copy(x)
        output = self.calls[branch](x, self.times[time])
        references = references_of(output) if self.look else 0
        self._take(output, results, x, references)

    def _take(self, output: Any, results: tuple[int, ...], x: Tensor, references: int | None = None) -> None:
        """Puts an output in its registers; with ``references``, of the caller's variable, so that it may stay there."""
        if self.holders:
            for result in results:
                self.addresses[result] = 0  # type: ignore[index]  # not copied
        name = self.function_name
        if len(results) == 1:
            self.registers[results[0]] = (
                as_state(name, output, x) if references is None else owned_state(name, output, x, references, self.look)
            )
            return
        if not isinstance(output, (tuple, list)) or len(output) != len(results):
            raise type_error("model", f"{len(results)} outputs", output)
        check_each(output, x, name)
        kept = output if references is None else owned_each(output, self.look)
        for result, v in zip(results, kept, strict=True):
            self.registers[result] = as_state(name, v, x)

    def _taken(self, operands: Sequence[Any]) -> list[Any]:
        """States are what they should be; network outputs are told from them by nothing but that."""
        like, name = self.x_0, self.function_name
        return [operand if isinstance(operand, Noise) else as_state(name, operand, like) for operand in operands]

    def _copy(self, state: int) -> None:
        """Writes a state to its place in the trajectory, or for the second time to a buffer that holds it twice."""
        if self.doubles:
            double = self.doubles[self.segment.slots[state]]
            double[double.shape[0] // 2 :].copy_(self.registers[state])
            return
        assert self.trajectory is not None
        number = self.first_step + dict(self.segment.state_rows)[state]
        self.trajectory[number + 1].copy_(self.registers[state])

    def _end_step(self, number: int, state: int) -> None:
        value = self.registers[state]
        if self.trajectory is not None and (self.targets is None or (number, state) not in self.segment.written):
            self.trajectory[self.first_step + number + 1].copy_(value)
        if self.on_step is not None:
            self.on_step(self.first_step + number, value)

    def checkpointed(self, segments: int) -> None:
        """Runs in segments that keep only the states between them and are computed again for the gradient."""
        per_segment = -(-self.program.steps // max(1, min(segments, self.program.steps)))
        for number in range(len(self.program.chunks)):
            if number:
                self._begin(number, self.registers[self.segment.result])
            # what is put out after the last step belongs to it
            ends = [*self.segment.step_ends[:-1], len(self.segment.instructions)]
            start = 0
            for stop in [*ends[per_segment - 1 : -1 : max(per_segment, 1)], ends[-1]]:
                self._segment(number, start, stop)
                start = stop

    def _live(self, at: int) -> list[int]:
        return [r for r, last in enumerate(self.segment.last_use) if last >= at and self.registers[r] is not None]

    def _segment(self, number: int, start: int, stop: int) -> None:
        before, after = self._live(start), list[int]()
        # The graph keeps the segment, which must not keep what has a graph: a run of its own, with nothing in it
        own, on_step = copy.copy(self), self.on_step
        own.registers, own.on_step = [], None

        def segment(*tensors: Tensor) -> tuple[Tensor, ...]:
            nonlocal on_step
            # where the network takes gradients itself, this is called within its own call
            outer = vars(own).copy()
            own._begin(number, tensors[0])
            own.times = OwnTimes(own.times)  # the segment is run again, at the times as they were
            own.registers[0] = None
            for register, tensor in zip(before, tensors, strict=True):
                own.registers[register] = tensor
            own.on_step, on_step = on_step, None  # the steps are told of once
            try:
                own.execute(own.segment.prepared[start:stop])
                after[:] = own._live(stop)
                return tuple(own.registers[r] for r in after)
            finally:
                vars(own).update(outer)

        results = checkpoint(segment, *(self.registers[r] for r in before), use_reentrant=False)
        self.registers = [None] * self.segment.registers
        for register, tensor in zip(after, results, strict=True):
            self.registers[register] = tensor

    @property
    def result(self) -> Tensor:
        """The last state: in the run's own memory, a row of its trajectory, or x_0 itself."""
        state: Tensor = self.registers[self.segment.result]
        # a buffer that holds it twice is not kept for one half
        return state.clone() if self.doubles and any(state is b for b in self.buffers or ()) else state

    def extras(self) -> dict[str, list[Tensor]]:
        return {name: [self.registers[r] for r in registers] for name, registers in self.program.extras}
