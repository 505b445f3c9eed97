"""Adaptive steps as CUDA graphs: the control is on the device, so that one captured step serves a whole solve."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..._cache import Entry
from ..._keys import NoKey
from ..programs.captures import (
    Captures,
    StaticArguments,
    capture,
    reserved_bytes,
    signature,
    state_of,
    surroundings,
)
from .native_stepper import make_stepper
from .rows import Batch, Dense, Problem, without_function


class StepGraph(NamedTuple):
    """Asks for captured steps.

    Attributes:
        owner: the graphs are kept as long as this lives: the model.
        key: what sets func apart from other functions of the same owner.
        mode: True captures at the first call and raises where that fails; "auto" captures at the second call alike and
            falls back to single launches.
        owners: what else the key knows by identity.
        refusal: why nothing can be captured, or None.
    """

    owner: Any
    key: Hashable = None
    mode: bool | Literal["auto"] = "auto"
    owners: Sequence[Any] = ()
    refusal: str | None = None


class CapturedSteps:
    """Steps of a batch of one shape: its buffers, and the graph that reads and writes them."""

    def __init__(self, problem: Problem, batch: Batch, first_step: float | None, chunk: int) -> None:
        before = reserved_bytes(batch.y.device)
        self._arguments = StaticArguments(batch.kwargs)
        dense = batch.dense
        if dense is not None:
            dense = Dense(dense.wanted.contiguous(), dense.ids, torch.empty_like(dense.out))
        self.batch = Batch(batch.y.clone(), batch.clock.clone(), batch.count.clone(), {}, dense)
        self.stepper = make_stepper(problem, self.batch)
        with self.solving(problem, batch.kwargs):
            self.stepper.begin(first_step)

            def body() -> Tensor:
                for _ in range(chunk):
                    self.stepper.step()
                return self.stepper.y1

            self.replay, _ = capture(body, None, batch.y.device)
        y, stages = self.batch.y, problem.tableau.stages
        own = (stages + 4) * y.untyped_storage().nbytes() + self._arguments.kept_bytes
        self.kept_bytes = max(reserved_bytes(y.device) - before, own)

    @contextmanager
    def solving(self, problem: Problem, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Holds the problem's function and arguments no longer than a solve: they may hold the owner."""
        self.stepper.problem, self.batch.kwargs = problem, self._arguments.load(kwargs)
        try:
            yield
        finally:
            self.stepper.problem, self.batch.kwargs = without_function(problem), {}

    def load(self, batch: Batch) -> None:
        """Begins with another batch of the same shape."""
        self._copy(batch, self.batch)
        if self.batch.dense is not None and batch.dense is not None:
            self.batch.dense.wanted.copy_(batch.dense.wanted)

    def unload(self, batch: Batch) -> None:
        """Hands the results over to the batch that was loaded."""
        self._copy(self.batch, batch)

    @staticmethod
    def _copy(source: Batch, target: Batch) -> None:
        target.y.copy_(source.y)
        target.clock.copy_(source.clock)
        target.count.copy_(source.count)
        if source.dense is not None and target.dense is not None:
            target.dense.out.copy_(source.dense.out)


_STEPS: Captures[CapturedSteps] = Captures("step_graph")


def can_capture(y: Tensor) -> bool:
    """Whether there is anything to capture for."""
    return y.is_cuda


def captured_steps(
    graph: StepGraph, problem: Problem, batch: Batch, first_step: float | None, chunk: int
) -> tuple[Entry[CapturedSteps] | None, str]:
    """(the captured steps, how), or (None, why single launches must do)."""
    if not can_capture(batch.y):
        if graph.mode is True:
            raise ValueError(f"cuda_graph: expected a state on a CUDA device, got one on {batch.y.device}")
        return None, "eager"
    if problem.slow_norm:
        return None, "eager: the error norm is a function of the user's or has tensors of tolerances"
    dense, owners = batch.dense, [*graph.owners]
    refusal = graph.refusal
    try:
        arguments = signature(batch.kwargs, owners)
    except NoKey as error:
        refusal = str(error)
    if refusal is not None:
        if graph.mode is True:
            raise ValueError(f"cuda_graph: expected values that a graph can be found by, got others: {refusal}")
        return None, f"eager: {refusal}"
    key = (
        graph.key,
        (problem.tableau.cache_key, problem.rules, problem.atol, problem.rtol),
        (problem.shared, problem.scalar_time, problem.time_dtype, problem.impl, first_step is None, chunk),
        (batch.y.shape, batch.y.dtype, batch.y.device, batch.y.stride()),
        None if dense is None else (dense.out.shape, dense.out.stride()),
        arguments,
        state_of(graph.owner, owners),
        surroundings(batch.y.device),
    )
    make = partial(CapturedSteps, problem, batch, first_step, chunk)
    return _STEPS.obtain(graph.owner, key, owners, graph.mode, make)
