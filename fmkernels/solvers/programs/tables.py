"""The numbers of a program as tensors and kernel arguments: times and coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .expressions import Number
from .program import Program, Update


def cached(program: Program, key: Any, make: Callable[[], Any]) -> Any:
    """What a program keeps, made at its first use; under torch.compile nothing is kept."""
    if torch.compiler.is_compiling():
        return make()
    if key not in program.cache:
        program.cache[key] = make()
    return program.cache[key]


def table_of_numbers(numbers: Sequence[Number]) -> Tensor:
    """Numbers as a float64 tensor, along its first dimension."""
    if all(isinstance(t, float) for t in numbers):
        return torch.tensor(numbers, dtype=torch.float64)
    if any(isinstance(t, Tensor) for t in numbers):
        return torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in numbers])
    return torch.from_numpy(np.stack(np.broadcast_arrays(*numbers)))


def time_table(program: Program, x: Tensor, dtype: torch.dtype, shape: str) -> Tensor:
    """The program's evaluation times for the network, one a row: () or (B,), or of the grid's leading shape."""
    batch = x.shape[0] if shape == "batch" else None

    def make() -> Tensor:
        table = table_of_numbers(program.times).to(dtype)
        if table.dim() == 1 and batch is not None:
            table = table[:, None].expand(-1, batch)
            # laid out in full where that is cheap, as a network may want to view them
            table = table.contiguous() if table.numel() <= 1 << 20 else table
        return table.to(x.device, non_blocking=True)

    return cached(program, ("times", x.device, dtype, batch), make)


def time_rows(program: Program, x: Tensor, dtype: torch.dtype, shape: str) -> Sequence[Tensor]:
    """The rows of the time table: one tensor for each evaluation."""
    key = ("rows", x.device, dtype, x.shape[0] if shape == "batch" else None)
    return cached(program, key, lambda: time_table(program, x, dtype, shape).unbind(0))


def _placed(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return values.to(device, dtype, non_blocking=True)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def coefficients_of(program: Program, x: Tensor) -> list[list[Any]]:
    """The coefficients of each update as numbers, or as tensors where they have a leading shape."""
    dtype = accumulator(x)

    def make() -> list[list[Any]]:
        return [
            [
                c if isinstance(c, float) else torch.as_tensor(c).to(x.device, dtype, non_blocking=True)
                for c in i.coefficients
            ]
            if isinstance(i, Update)
            else []
            for i in program.instructions
        ]

    return cached(program, ("coefficients", x.device, dtype), make)


def table_of(program: Program, x: Tensor) -> tuple[Tensor, Callable[[Tensor], list[Any]]]:
    """The coefficients as one flat table on the device, and from such a table to its view for each update.

    A captured graph reads them from there: other numbers need no new capture.
    """
    dtype = accumulator(x)
    updates = [i if isinstance(i, Update) else None for i in program.instructions]
    rows = [None if i is None else np.stack(np.broadcast_arrays(*i.coefficients), -1) for i in updates]

    def make() -> Tensor:
        flat = [row.ravel() for row in rows if row is not None]
        return torch.from_numpy(np.concatenate(flat) if flat else np.zeros(0)).to(dtype).to(x.device, non_blocking=True)

    def views(table: Tensor) -> list[Any]:
        parts = iter(table.split([row.size for row in rows if row is not None]))
        return [[] if row is None else next(parts).view(row.shape) for row in rows]

    return cached(program, ("table", x.device, dtype), make), views
