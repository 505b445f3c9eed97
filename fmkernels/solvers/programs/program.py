"""Programs: network calls and updates over registers, with what an executor needs to know of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .expressions import Number


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
    """Makes a function (*numbers, *tensors) of the module an operation of programs, to be called with its numbers."""
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


class Compute(NamedTuple):
    """Small or nonlinear work: registers ``results`` = function(*sources), a function of tensors."""

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
Prepared = tuple[int, str, Any, tuple[int, ...]]


@dataclass(eq=False)
class Program:
    """What a method does on a grid: instructions over registers (0 is the initial state), and evaluation times."""

    instructions: tuple[Instruction, ...]
    times: tuple[Number, ...]
    registers: int
    steps: int
    result: int
    streams: int
    extras: tuple[tuple[str, tuple[int, ...]], ...]
    grid: tuple[Number, ...]
    last_use: tuple[int, ...] = ()
    releases: tuple[tuple[int, ...], ...] = ()
    prepared: tuple[Prepared, ...] = ()
    unwatched: tuple[Prepared, ...] = ()
    slots: dict[int, int] = field(default_factory=dict)
    slot_count: int = 0
    state_rows: tuple[tuple[int, int], ...] = ()
    written: frozenset[tuple[int, int]] = frozenset()
    evaluations: int = 0
    outputs: frozenset[int] = frozenset()
    cache: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._find_last_uses()
        self._assign_slots()
        self.outputs = frozenset(r for i in self.instructions if isinstance(i, Evaluate) for r in i.results)
        self.evaluations = len(self.outputs)
        # which step's state an update's result is: the first, where steps leave it as it is
        ends = {i.state: i.number for i in reversed(self.instructions) if isinstance(i, EndStep)}
        self.state_rows = tuple((state, number) for state, number in ends.items() if state in self.slots)
        self.prepared = tuple(
            (at, type(i).__name__, tuple(i), self.releases[at]) for at, i in enumerate(self.instructions)
        )
        # where nobody looks at the steps, their ends matter only for states that no update writes to their place
        self.written = frozenset((number, state) for state, number in self.state_rows)
        self.unwatched = tuple(p for p in self.prepared if p[1] != "EndStep" or p[2] not in self.written)

    @property
    def calls(self) -> int:
        return sum(isinstance(i, Evaluate) for i in self.instructions)

    def _find_last_uses(self) -> None:
        last = [-1] * self.registers
        for at, instruction in enumerate(self.instructions):
            for register in reads(instruction):
                last[register] = at
        kept = [self.result, *(r for _, registers in self.extras for r in registers)]
        for register in kept:
            last[register] = len(self.instructions)
        self.last_use = tuple(last)
        self.releases = tuple(
            tuple(r for r in set(reads(instruction)) if last[r] == at)
            for at, instruction in enumerate(self.instructions)
        )

    def _assign_slots(self) -> None:
        """Buffers for the results of updates: one is free again after the last use of what it held."""
        free: list[int] = []
        for at, instruction in enumerate(self.instructions):
            if isinstance(instruction, Update):
                if not free:
                    free.append(self.slot_count)
                    self.slot_count += 1
                self.slots[instruction.result] = free.pop()
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
