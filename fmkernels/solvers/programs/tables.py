"""The numbers of a program as tensors and kernel arguments: times and coefficients.

Tables are kept as long as their program. Those of times are handed to the network, which may write to them: one run
alone has such a table, and one that was written to is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..._cache import Cache, bytes_of, is_plain_context, ordinary_tensors
from ..._checks import tensor_of
from .expressions import Number
from .program import Program, Update

V = TypeVar("V")

# Up to so many elements a table of times is laid out in full, as a network may want to view its rows.
DENSE_TIMES = 1 << 20


def place(x: Tensor) -> Any:
    """Where a table for a state lies, and on a GPU in which stream it was written."""
    return (x.device, torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else x.device


def for_program(cache: Cache[V], program: Program, key: tuple[Any, ...], make: Callable[[], V]) -> V:
    """A table of a program, kept as long as it; nobody writes to it."""
    if not is_plain_context():
        return make()
    return cache.get((id(program), *key), lambda: _made(make), [program])


def _made(make: Callable[[], V]) -> V:
    with ordinary_tensors():
        return make()


def table_of_numbers(numbers: Sequence[Number]) -> Tensor:
    """Numbers as a float64 tensor of the host, along its first dimension."""
    if all(isinstance(t, float) for t in numbers):
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if any(isinstance(t, Tensor) for t in numbers):
        return torch.stack([torch.as_tensor(t, dtype=torch.float64, device="cpu") for t in numbers])
    return torch.from_numpy(np.stack(np.broadcast_arrays(*numbers)))


def time_table(program: Program, x: Tensor, dtype: torch.dtype, shape: str) -> Tensor:
    """The program's evaluation times for the network, one a row: () or (B,), or of the grid's leading shape."""
    return _time_table(program, x.shape[0] if shape == "batch" else None, x.device, dtype)


def _time_table(program: Program, rows: int | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    table = table_of_numbers(program.times).to(dtype)
    if table.dim() == 1 and rows is not None:
        table = table[:, None].expand(-1, rows)
        table = table.contiguous() if table.numel() <= DENSE_TIMES else table
    return table.to(device, non_blocking=True)


def time_rows(program: Program, x: Tensor, dtype: torch.dtype, shape: str) -> Sequence[Tensor]:
    """The rows of :func:`time_table`, for the caller alone."""
    return time_table(program, x, dtype, shape).unbind(0) if program.calls else ()


def _placed(values: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor_of(values).to(device, dtype, non_blocking=True)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def coefficients_of(program: Program, x: Tensor) -> list[list[Any]]:
    """The coefficients of each update as numbers, or as tensors where they have a leading shape."""
    dtype = accumulator(x)
    return [
        [c if isinstance(c, float) else _placed(c, x.device, dtype) for c in i.coefficients]
        if isinstance(i, Update)
        else []
        for i in program.instructions
    ]


class Numbers(Protocol):
    """What a run reads beside states: for each chunk of a program its times and coefficients.

    Attributes:
        plain: it is known that nobody traces, intercepts or transforms operations.
    """

    plain: bool

    def chunk(self, number: int) -> tuple[Sequence[Tensor], Sequence[Any]]:
        """A tensor for each evaluation, and for each instruction the coefficients: a list, or one table."""

    def doubled_times(self, number: int) -> Sequence[Tensor]:
        """Of a chunk the times of a batch that holds each sample twice."""


class Lease(Protocol):
    """Numbers that one run has until it ends."""

    @property
    def value(self) -> Numbers: ...

    def release(self) -> None: ...


class GivenNumbers:
    """Times and coefficients as sequences over a whole program, of one run alone."""

    plain = False

    def __init__(self, program: Program, times: Sequence[Tensor], coefficients: Sequence[Any]) -> None:
        self.program, self.times, self.coefficients = program, times, coefficients

    def chunk(self, number: int) -> tuple[Sequence[Tensor], Sequence[Any]]:
        chunks = self.program.chunks
        if len(chunks) == 1:
            return self.times, self.coefficients
        calls = sum(chunk.segment.calls for chunk in chunks[:number])
        size, first = (sum(len(c.segment.instructions) for c in chunks[:n]) for n in (number + 1, number))
        times = self.times[calls : calls + chunks[number].segment.calls]
        return times, self.coefficients[first:size]

    def doubled_times(self, number: int) -> Sequence[Tensor]:
        return [t if t.dim() == 0 else torch.cat([t, t]) for t in self.chunk(number)[0]]

    @property
    def value(self) -> Numbers:
        return self

    def release(self) -> None:
        """Nothing is kept."""


class KeptNumbers:
    """The numbers of a program for states of one kind, kept for its next run."""

    plain = True
    MOST_ROWS = 4096  # that are kept as tensors, each of which takes more memory than its number

    def __init__(self, program: Program, x: Tensor, dtype: torch.dtype, shape: str) -> None:
        self._batch = x.shape[0] if shape == "batch" else None  # of times that are the same in all rows
        width = None if self._batch is None else self._batch * (2 if program.doubled else 1)
        self._table = _time_table(program, width, x.device, dtype)
        self._version = self._table._version
        self._twice: Sequence[Tensor] | None = None  # rows of it
        self._rows: Sequence[Tensor] | None = None  # their first halves, if they are such
        if self._table.shape[0] <= self.MOST_ROWS:
            self._twice = self._table.unbind(0)
            self._rows = self._halves(self._table).unbind(0)
        self._coefficients = coefficients_of(program, x) if len(program.chunks) == 1 else None
        # not the program, with which these numbers die
        self._loop, self._chunks = program.loop, [(c.first_step, c.steps, c.segment.calls) for c in program.chunks]
        rows = 600 * (1 + 2 * len(self._rows or ()))
        self.kept_bytes = self._table.untyped_storage().nbytes() + rows + bytes_of(self._coefficients)

    def _halves(self, times: Tensor) -> Tensor:
        return times if self._batch is None or times.dim() != 2 else times[:, : self._batch]

    @property
    def as_made(self) -> bool:
        """Whether nobody has written to the times."""
        return self._table._version == self._version

    def chunk(self, number: int) -> tuple[Sequence[Tensor], Sequence[Any]]:
        times = self._rows_of(number, self._rows, self._halves)
        if self._coefficients is not None:
            return times, self._coefficients
        assert self._loop is not None
        first, steps, _ = self._chunks[number]
        return times, self._loop.coefficients(first, steps)

    def doubled_times(self, number: int) -> Sequence[Tensor]:
        if self._batch is not None and self._table.shape[1:] == (2 * self._batch,):
            return self._rows_of(number, self._twice, lambda times: times)
        return [t if t.dim() == 0 else torch.cat([t, t]) for t in self.chunk(number)[0]]

    def _rows_of(
        self, number: int, rows: Sequence[Tensor] | None, part: Callable[[Tensor], Tensor]
    ) -> Sequence[Tensor]:
        if len(self._chunks) == 1:
            return part(self._table).unbind(0) if rows is None else rows
        calls, start = self._chunks[number][2], number * self._chunks[0][2]
        every = slice(start, start + calls)
        return part(self._table[every]).unbind(0) if rows is None else rows[every]


_NUMBERS: Cache[KeptNumbers] = Cache("numbers")


def numbers_for(program: Program, x: Tensor, dtype: torch.dtype, shape: str, *, keep: bool = True) -> Lease:
    """Times for the network of a dtype and shape, "batch" or "scalar", and coefficients for a state like x.

    Args:
        keep: for the next run; not where what is recorded for a gradient outlives the run.
    """
    if not keep or not program.calls or not is_plain_context():
        return GivenNumbers(program, time_rows(program, x, dtype, shape), coefficients_of(program, x))
    key = (id(program), place(x), x.dtype, dtype, x.shape[0] if shape == "batch" else None)
    while True:
        entry = _NUMBERS.take(key, lambda: _made(lambda: KeptNumbers(program, x, dtype, shape)), [program])
        if entry.value.as_made:
            return entry
        entry.discard()


_TABLES: Cache[Tensor] = Cache("table")


def table_of(program: Program, x: Tensor) -> tuple[Tensor, Callable[[Tensor], list[Any]]]:
    """The coefficients as one flat table on the device, and from such a table to its view for each update.

    A captured graph reads them from there: other numbers need no new capture.
    """
    dtype = accumulator(x)
    rows = [
        np.stack(np.broadcast_arrays(*i.coefficients), -1) if isinstance(i, Update) else None
        for i in program.instructions
    ]

    def make() -> Tensor:
        flat = [row.ravel() for row in rows if row is not None]
        return torch.from_numpy(np.concatenate(flat) if flat else np.zeros(0)).to(dtype).to(x.device, non_blocking=True)

    def views(table: Tensor) -> list[Any]:
        parts = iter(table.split([row.size for row in rows if row is not None]))
        return [[] if row is None else next(parts).view(row.shape) for row in rows]

    return for_program(_TABLES, program, (place(x), dtype), make), views
