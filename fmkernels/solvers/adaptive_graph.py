"""Adaptive steps as CUDA graphs: the control is on the device, so that one captured step serves a whole solve."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .graph import MAX_GRAPHS, capture, signature
from .native_stepper import make_stepper
from .stepper import Batch, Dense, Problem


class StepGraph(NamedTuple):
    """Asks for captured steps.

    Attributes:
        owner: the graphs are kept as long as this lives: the model.
        key: what sets func apart from other functions of the same owner.
        mode: True captures at the first call and raises where that fails; "auto" captures at the second call alike and
            falls back to single launches.
    """

    owner: Any
    key: Hashable = None
    mode: bool | Literal["auto"] = "auto"


class CapturedSteps:
    """Steps of a batch of one shape: its buffers, and the graph that reads and writes them."""

    def __init__(self, problem: Problem, batch: Batch, first_step: float | None, chunk: int) -> None:
        leaves, spec = pytree.tree_flatten(dict(batch.kwargs))
        self.leaves = [v.clone() if isinstance(v, Tensor) else v for v in leaves]
        dense = batch.dense
        if dense is not None:
            dense = Dense(dense.wanted.contiguous(), dense.ids, torch.empty_like(dense.out))
        kwargs = pytree.tree_unflatten(self.leaves, spec)
        self.batch = Batch(batch.y.clone(), batch.clock.clone(), batch.count.clone(), kwargs, dense)
        self.stepper = make_stepper(problem, self.batch)
        self.stepper.begin(first_step)

        def body() -> Tensor:
            for _ in range(chunk):
                self.stepper.step()
            return self.stepper.y1

        self.replay, _ = capture(body, None)

    def load(self, batch: Batch) -> None:
        """Begins with another batch of the same shape."""
        for target, source in (
            (self.batch.y, batch.y),
            (self.batch.clock, batch.clock),
            (self.batch.count, batch.count),
        ):
            target.copy_(source)
        for static, value in zip(self.leaves, pytree.tree_leaves(dict(batch.kwargs)), strict=True):
            if isinstance(static, Tensor):
                static.copy_(value)
        if self.batch.dense is not None and batch.dense is not None:
            self.batch.dense.wanted.copy_(batch.dense.wanted)
            self.batch.dense.out.copy_(batch.dense.out)

    def unload(self, batch: Batch) -> None:
        """Hands the results over to the batch that was loaded."""
        for target, source in (
            (batch.y, self.batch.y),
            (batch.clock, self.batch.clock),
            (batch.count, self.batch.count),
        ):
            target.copy_(source)
        if self.batch.dense is not None and batch.dense is not None:
            batch.dense.out.copy_(self.batch.dense.out)


Entry = CapturedSteps | str | None
_BY_OWNER: weakref.WeakKeyDictionary[Any, OrderedDict[Any, Entry]] = weakref.WeakKeyDictionary()


def can_capture(y: Tensor) -> bool:
    """Whether there is anything to capture for."""
    return y.is_cuda


def captured_steps(
    graph: StepGraph, problem: Problem, batch: Batch, first_step: float | None, chunk: int
) -> tuple[CapturedSteps | None, str]:
    """(the captured steps, how), or (None, why single launches must do)."""
    if not can_capture(batch.y):
        if graph.mode is True:
            raise RuntimeError("cuda_graph: expected a state on a CUDA device")
        return None, "eager"
    try:
        graphs = _BY_OWNER.setdefault(graph.owner, OrderedDict())
    except TypeError:  # no weak references or no hash
        graphs = OrderedDict()
    if problem.slow_norm:
        return None, "eager: the error norm is a function of the user's or has tensors of tolerances"
    dense = batch.dense
    key = (
        graph.key,
        (problem.tableau, problem.rules, problem.atol, problem.rtol),
        (problem.shared, problem.scalar_time, problem.time_dtype, problem.impl, first_step is None, chunk),
        (batch.y.shape, batch.y.dtype, batch.y.device, batch.y.stride()),
        None if dense is None else dense.out.shape,
        signature(dict(batch.kwargs)),
    )
    entry = graphs.get(key)
    if isinstance(entry, CapturedSteps):
        graphs.move_to_end(key)
        return entry, "replayed"
    if isinstance(entry, str):
        return None, entry
    if key not in graphs and graph.mode == "auto":
        graphs[key] = None
        return None, "eager: a graph is captured at the second call"
    try:
        entry = CapturedSteps(problem, batch, first_step, chunk)
    except RuntimeError as error:
        if graph.mode is True:
            raise
        torch.cuda.synchronize()
        reason = f"eager: the model cannot be captured: {str(error).splitlines()[0]}"
        graphs[key] = reason
        return None, reason
    graphs[key] = entry
    while sum(isinstance(e, CapturedSteps) for e in graphs.values()) > MAX_GRAPHS or len(graphs) > 64:
        graphs.popitem(last=False)
    return entry, "captured"
