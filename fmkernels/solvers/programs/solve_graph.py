"""Whole fixed-grid solves, the network included, as CUDA graphs: captured once, replayed with new data."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..._cache import Cache
from ..._keys import NoKey
from ...random import draw_seed
from .captures import (
    Captures,
    StaticArguments,
    capture,
    held_object,
    network_fields,
    reserved_bytes,
    signature,
    state_of,
    surroundings,
)
from .program import Program, Update
from .run import Call, Run
from .tables import GivenNumbers, table_of, time_table

_STRUCTURES: Cache[tuple[Any, ...]] = Cache("structure")


def structure(program: Program) -> tuple[Any, ...]:
    """What a captured graph has fixed: everything of a program but its numbers."""

    def make() -> tuple[Any, ...]:
        loop = program.loop
        instructions = program.instructions if loop is None else loop.instructions
        return program.steps if loop is None else ("loop", program.steps), tuple(
            (i.result, i.sources, tuple(getattr(c, "shape", ()) for c in i.coefficients))
            if isinstance(i, Update)
            else i
            for i in instructions
        )

    return _STRUCTURES.get(id(program), make, [program])


class Wanted(NamedTuple):
    """What a captured solve takes from its solver: the model, its owner, its network calls, how it is captured."""

    model: Any
    calls: Callable[[dict[str, Any]], Mapping[str, Call]]
    guidance: Any
    said: Hashable
    time_dtype: torch.dtype
    time_shape: str
    mode: bool | Literal["auto"]


class CapturedSolve:
    """One captured solve and the tensors that it reads and writes."""

    def __init__(
        self,
        wanted: Wanted,
        program: Program,
        x: Tensor,
        generator: torch.Generator | None,
        row_offset: int,
        model_kwargs: dict[str, Any],
    ) -> None:
        before = reserved_bytes(x.device)
        self.x, self.program, self.arguments = x.clone(), program, StaticArguments(model_kwargs)
        table, views_of = table_of(program, x)
        self.coefficients = table.clone()
        self.times = time_table(program, x, wanted.time_dtype, wanted.time_shape).clone()
        views, times = views_of(self.coefficients), self.times.unbind(0)
        self.generator = generator  # what the graph points to must stay
        self.memory: list[Any] = []
        kwargs = self.arguments.load(model_kwargs)

        def body() -> Tensor:
            seed = draw_seed(x.device, generator) if program.streams else None
            numbers = GivenNumbers(program, times, views)
            run = Run(program, wanted.calls(kwargs), self.x, numbers, seed, row_offset=row_offset, reuse=True)
            run.all()
            self.memory = [seed, run.buffers, run.holders, views, times]
            return run.result

        self.replay, self.result = capture(body, generator, x.device)
        own = sum(t.untyped_storage().nbytes() for t in (self.x, self.coefficients, self.times, self.result))
        self.kept_bytes = max(reserved_bytes(x.device) - before, own + self.arguments.kept_bytes)

    def run(self, wanted: Wanted, program: Program, x: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        self.x.copy_(x)
        self.arguments.load(model_kwargs)
        if program is not self.program:  # the same work with other numbers
            self.program = program
            self.coefficients.copy_(table_of(program, x)[0])
            self.times.copy_(time_table(program, x, wanted.time_dtype, wanted.time_shape))
        self.replay()
        return self.result.clone()


_SOLVES: Captures[CapturedSolve] = Captures("solve_graph")


def replayed(
    wanted: Wanted,
    program: Program,
    x: Tensor,
    generator: torch.Generator | None,
    row_offset: int,
    model_kwargs: dict[str, Any],
) -> tuple[Tensor | None, str]:
    """(samples, how), or (None, why it must run eagerly)."""
    owners: list[Any] = []
    try:
        key: Hashable = (
            structure(program),
            (x.shape, x.dtype, x.device, x.stride()),
            signature(model_kwargs, owners),
            held_object(wanted.guidance, owners, network_fields(wanted.guidance)),
            (wanted.said, getattr(wanted.guidance, "said", None), getattr(wanted.guidance, "batching", None)),
            (None if generator is None else id(generator), row_offset, wanted.time_shape, wanted.time_dtype),
            state_of(wanted.model, owners),
            surroundings(x.device),
        )
    except NoKey as error:
        if wanted.mode is True:
            raise RuntimeError(f"cuda_graph: expected values that a graph can be found by, got {error}") from None
        return None, f"eager: {error}"
    entry, how = _SOLVES.obtain(
        wanted.model,
        key,
        owners,
        wanted.mode,
        lambda: CapturedSolve(wanted, program, x, generator, row_offset, model_kwargs),
    )
    if entry is None:
        return None, how
    with entry as captured:
        return captured.run(wanted, program, x, model_kwargs), how
