"""Programs: network calls and updates over registers, with what an executor needs to know of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .expressions import Number, shape_of


class Evaluate(NamedTuple):
    """Network outputs ``results`` = the call ``branch`` at the state ``source`` and time number ``time``."""

    branch: str
    source: int
    time: int
    results: tuple[int, ...]


class Update(NamedTuple):
    """The state ``result`` = the sum of ``coefficients`` times ``sources``; a source below 0 is noise -1 - stream."""

    result: int
    sources: tuple[int, ...]
    coefficients: tuple[Number, ...]


Work = Callable[..., tuple[Tensor, ...]]
_OPERATIONS: dict[str, Work] = {}


def operation(function: Work) -> Callable[..., Operation]:
    """Makes a function (*numbers, *tensors) of the module an operation of programs, to be called with its numbers.

    Its results are new tensors.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    _OPERATIONS[name] = function
    return lambda *numbers: Operation(name, numbers)


class Operation(NamedTuple):
    """A function by its name, and its first arguments: compared by value, and traced by torch.compile."""

    name: str
    numbers: tuple[float, ...]


def perform(function: Work | Operation, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(function, Operation):
        return _OPERATIONS[function.name](*function.numbers, *tensors)
    return function(*tensors)


def _gives_new_tensors(function: Work | Operation) -> bool:
    """Whether no result lies in the memory of an argument."""
    return isinstance(function, Operation) or bool(getattr(function, "gives_new_tensors", False))


class Compute(NamedTuple):
    """Small or nonlinear work: registers ``results`` = function(*sources), a function of tensors.

    A function of one's own may return its arguments; one whose results are new tensors says so by an attribute
    ``gives_new_tensors = True``, which saves copies.
    """

    function: Work | Operation
    sources: tuple[int, ...]
    results: tuple[int, ...]


class EndStep(NamedTuple):
    """The state after step ``number`` is ``state``."""

    number: int
    state: int


Instruction = Evaluate | Update | Compute | EndStep


class Step(NamedTuple):
    """One interval of the grid: from time t to time u, and its number."""

    number: int
    t: Number
    u: Number


# What the executor reads in its loop: index, kind and fields of an instruction, and registers that are free after it.
# The kind is the instruction's name, but for network calls: "First" at a branch's first call, which is checked; "Held"
# where an output is read later than by the next instruction, so that it must be nobody else's memory; "Beside" where
# that instruction may write to the network's input, so that it must not be in that; "Doubled" where two branches are
# called at a state that an update has written, and the next instruction is an update.
Prepared = tuple[int, str, Any, tuple[int, ...]]


@dataclass(eq=False)
class Segment:
    """Instructions over registers, with what an executor needs to know of them. Register 0 is the state before them.

    Args:
        instructions: steps are numbered from 0, evaluation times too.
        registers: how many there are.
        result: the state after them.
        kept: registers that live on beside it.
        again: whether the state before them may be in one of the buffers, which then is slots[0].
    """

    instructions: tuple[Instruction, ...]
    registers: int
    result: int
    kept: tuple[int, ...] = ()
    again: bool = False
    last_use: tuple[int, ...] = ()
    releases: tuple[tuple[int, ...], ...] = ()
    prepared: tuple[Prepared, ...] = ()
    unwatched: tuple[Prepared, ...] = ()
    slots: dict[int, int] = field(default_factory=dict)
    slot_count: int = 0
    held_slots: dict[int, int] = field(default_factory=dict)
    held_count: int = 0
    state_rows: tuple[tuple[int, int], ...] = ()
    written: frozenset[tuple[int, int]] = frozenset()
    outputs: frozenset[int] = frozenset()
    calls: int = 0
    doubled: frozenset[int] = frozenset()  # states at which two branches are called
    half_of: dict[int, int] = field(default_factory=dict)  # outputs of such calls, and which of the two they are

    def __post_init__(self) -> None:
        self._find_last_uses()
        held = self._held()
        self._assign_slots(held)
        self.outputs = frozenset(r for i in self.instructions if isinstance(i, Evaluate) for r in i.results)
        self.calls = sum(isinstance(i, Evaluate) for i in self.instructions)
        # which step's state an update's result is: the first, where steps leave it as it is
        ends = {i.state: i.number for i in reversed(self.instructions) if isinstance(i, EndStep)}
        self.state_rows = tuple((state, number) for state, number in ends.items() if state in self.slots and state)
        self.prepared = tuple(self._prepared(held))
        joined = [i for _, kind, i, _ in self.prepared if kind == "Doubled"]
        self.doubled = frozenset(source for _, source, _, _ in joined)
        self.half_of = {r: half for *_, results in joined for half, r in enumerate(results)}
        # where nobody looks at the steps, their ends matter only for states that no update writes to their place
        self.written = frozenset((number, state) for state, number in self.state_rows)
        self.unwatched = tuple(p for p in self.prepared if p[1] != "EndStep" or p[2] not in self.written)

    @property
    def step_ends(self) -> list[int]:
        """After how many instructions each step has ended."""
        return [at + 1 for at, i in enumerate(self.instructions) if isinstance(i, EndStep)]

    def _prepared(self, held: set[int]) -> Iterator[Prepared]:
        seen: set[str] = set()
        for at, i in enumerate(self.instructions):
            kind = type(i).__name__
            if isinstance(i, Evaluate):
                if i.branch not in seen:
                    kind = "First"
                elif held.intersection(i.results):
                    kind = "Held"
                elif self.last_use[i.source] <= at:
                    kind = "Beside"
                elif len(i.results) == 2 and i.source in self.slots and self._is_update(at + 1):
                    kind = "Doubled"
                seen.add(i.branch)
            yield at, kind, tuple(i), self.releases[at]  # a plain tuple is unpacked faster

    def _is_update(self, at: int) -> bool:
        return at < len(self.instructions) and isinstance(self.instructions[at], Update)

    def _find_last_uses(self) -> None:
        last = [-1] * self.registers
        for at, instruction in enumerate(self.instructions):
            for register in reads(instruction):
                last[register] = at
        for register in (self.result, *self.kept):
            last[register] = len(self.instructions)
        for i in reversed(self.instructions):
            if isinstance(i, Compute) and not _gives_new_tensors(i.function):
                until = max((last[r] for r in i.results), default=-1)
                for s in reads(i):
                    last[s] = max(last[s], until)
        self.last_use = tuple(last)
        dies: dict[int, list[int]] = {}
        for register, at in enumerate(last):
            dies.setdefault(at, []).append(register)
        self.releases = tuple(tuple(dies.get(at, ())) for at in range(len(self.instructions)))

    def _held(self) -> set[int]:
        """Network outputs that are not read by the next instruction alone, an update or the like.

        Before that nothing is written by the network, whose own memory they may be, nor to a buffer.
        """
        held: set[int] = set()
        following = None  # the next instruction that does something
        for at in range(len(self.instructions) - 1, -1, -1):
            i = self.instructions[at]
            if isinstance(i, Evaluate):
                after = None if following is None else self.instructions[following]
                read = isinstance(after, Update) or (isinstance(after, Compute) and _gives_new_tensors(after.function))
                held.update(r for r in i.results if not (read and self.last_use[r] == following))
            if not isinstance(i, EndStep):
                following = at
        return held

    def _assign_slots(self, held: set[int]) -> None:
        """Buffers for the results of updates, and others for copies of outputs that are held.

        One is free again after the last use of what was in it.
        """
        free: list[int] = []
        free_held: list[int] = []
        if self.again:
            self.slots[0], self.slot_count = 0, 1
        for at, instruction in enumerate(self.instructions):
            if isinstance(instruction, Update):
                if not free:
                    free.append(self.slot_count)
                    self.slot_count += 1
                self.slots[instruction.result] = free.pop()
            for result in instruction.results if isinstance(instruction, Evaluate) else ():
                if result in held:
                    if not free_held:
                        free_held.append(self.held_count)
                        self.held_count += 1
                    self.held_slots[result] = free_held.pop()
            free_held += [self.held_slots[r] for r in self.releases[at] if r in self.held_slots]
            free += [self.slots[register] for register in self.releases[at] if register in self.slots]


def reads(instruction: Instruction) -> tuple[int, ...]:
    """The registers that an instruction reads."""
    if isinstance(instruction, Evaluate):
        return (instruction.source,)
    if isinstance(instruction, EndStep):
        return (instruction.state,)
    if isinstance(instruction, (Update, Compute)):
        return tuple(s for s in instruction.sources if s >= 0)
    raise AssertionError(instruction)


class Chunk(NamedTuple):
    """Steps that one segment takes."""

    segment: Segment
    first_step: int
    steps: int


CHUNK_STEPS = 256  # even, so that a state that changes between two buffers ends where it began


@dataclass(eq=False)
class Loop:
    """Steps that differ in their numbers alone: the instructions of one, whose numbers are arrays, one for each step.

    Args:
        instructions: of a step, register 0 being the state before it; coefficients are floats, the same in all steps,
            or arrays (steps,).
        times: of the step's evaluations, (steps, evaluations).
        registers: of a step.
        result: the state after a step.
    """

    instructions: tuple[Instruction, ...]
    times: np.ndarray
    registers: int
    result: int

    @cached_property
    def tables(self) -> list[np.ndarray | None]:
        """For each instruction of a step the coefficients of all steps: (steps, terms), None where it has none."""
        steps = self.times.shape[0]
        return [
            np.stack([np.broadcast_to(np.float64(c), (steps,)) for c in i.coefficients], -1)
            if isinstance(i, Update)
            else None
            for i in self.instructions
        ]

    def coefficients(self, first: int, steps: int) -> list[list[float]]:
        """For each instruction of some steps its coefficients."""
        rows = [[[]] * steps if t is None else t[first : first + steps].tolist() for t in self.tables]
        return [numbers for step in zip(*rows, strict=True) for numbers in step]

    def segment(self, steps: int, again: bool) -> Segment:
        """So many steps, one after the other; their updates have no coefficients."""
        per_step, times = self.registers - 1, self.times.shape[1]
        state, instructions = 0, list[Instruction]()
        for number in range(steps):
            place = {0: state} | {r: number * per_step + r for r in range(1, self.registers)}
            for i in self.instructions:
                if isinstance(i, Evaluate):
                    results = tuple(place[r] for r in i.results)
                    instructions.append(Evaluate(i.branch, place[i.source], number * times + i.time, results))
                elif isinstance(i, Update):
                    sources = tuple(place[s] for s in i.sources)
                    instructions.append(Update(place[i.result], sources, ()))
                else:
                    assert isinstance(i, EndStep)
                    instructions.append(EndStep(number, place[i.state]))
            state = place[self.result]
        return Segment(tuple(instructions), 1 + steps * per_step, state, again=again)


class Program:
    """What a method does on a grid: instructions over registers (0 is the initial state), and evaluation times.

    Attributes:
        chunks: what is run, one after the other: here all in one.
        instructions: all of them, with their coefficients.
        times: of all evaluations, in their order.
        grid: the times of the states; ``steps`` is one less than there are.
        own_times: the shape of each, see :func:`shape_of`.
        streams: of noise.
        extras: names and registers of what is put out beside the result.
        calls: of the network.
        evaluations: outputs of the network: more than calls where one call returns several.
    """

    loop: Loop | None = None

    def __init__(
        self,
        segment: Segment,
        grid: Sequence[Number],
        times: Sequence[Number] = (),
        streams: int = 0,
        extras: Sequence[tuple[str, tuple[int, ...]]] = (),
    ) -> None:
        # attributes, not properties: torch.compile reads them
        self.grid, self.times, self.streams, self.extras = tuple(grid), tuple(times), streams, tuple(extras)
        self.steps, self.own_times = max(len(self.grid) - 1, 0), shape_of(self.grid)
        self._set_chunks([Chunk(segment, 0, self.steps)])
        self.instructions, self.registers, self.result = segment.instructions, segment.registers, segment.result

    def _set_chunks(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self.slot_count = max(chunk.segment.slot_count for chunk in chunks)
        self.held_count = max(chunk.segment.held_count for chunk in chunks)
        self.doubled = any(chunk.segment.doubled for chunk in chunks)
        self.calls = sum(chunk.segment.calls for chunk in chunks)
        self.evaluations = sum(len(chunk.segment.outputs) for chunk in chunks)

    def unrolled(self) -> Program:
        """The same program in one chunk."""
        return self

    @property
    def kept_bytes(self) -> int:
        """About the memory that it holds."""
        segments = {id(chunk.segment): chunk.segment for chunk in self.chunks}
        instructions = [i for segment in segments.values() for i in segment.instructions]
        numbers = (c for i in instructions if isinstance(i, Update) for c in i.coefficients)
        arrays = sum(c.nbytes + 100 for c in numbers if isinstance(c, np.ndarray))
        return arrays + 32 * len(self.grid) + 900 * len(instructions)


class LoopProgram(Program):
    """A program of equal steps: a table of their numbers in the place of instructions, run in equal parts."""

    loop: Loop

    def __init__(self, loop: Loop, grid: Sequence[Number]) -> None:
        self.loop, self.grid, self.streams, self.extras = loop, tuple(grid), 0, ()
        self.steps, self.own_times = len(self.grid) - 1, ()
        full, rest = divmod(self.steps, CHUNK_STEPS)
        again = self.steps > CHUNK_STEPS
        whole = loop.segment(CHUNK_STEPS, again) if full else None
        chunks = [Chunk(whole, i * CHUNK_STEPS, CHUNK_STEPS) for i in range(full) if whole is not None]
        if rest:
            chunks.append(Chunk(loop.segment(rest, again), full * CHUNK_STEPS, rest))
        self._set_chunks(chunks)

    @property
    def instructions(self) -> tuple[Instruction, ...]:  # type: ignore[override]
        every = self.loop.segment(self.steps, again=False).instructions
        numbers = self.loop.coefficients(0, self.steps)
        return tuple(
            i._replace(coefficients=tuple(c)) if isinstance(i, Update) else i
            for i, c in zip(every, numbers, strict=True)
        )

    @property
    def times(self) -> Sequence[Number]:  # type: ignore[override]
        return self.loop.times.ravel().tolist()

    def unrolled(self) -> Program:
        every = self.loop.segment(self.steps, again=False)
        return Program(Segment(self.instructions, every.registers, every.result), self.grid, self.times)

    @property
    def kept_bytes(self) -> int:
        tables = sum(table.nbytes for table in self.loop.tables if table is not None)
        return super().kept_bytes + self.loop.times.nbytes + tables
