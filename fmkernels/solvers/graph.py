"""Whole fixed-grid solves, the network included, as CUDA graphs: captured once, replayed with new data."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..random import draw_seed
from .program import Program, Update
from .run import Buffers, table_of, time_table

if TYPE_CHECKING:
    from .sample import Solver

MAX_GRAPHS = 4  # kept for one model; each holds the memory of a solve
WARM_UPS = 2


def capture(body: Callable[[], Tensor], generator: torch.Generator | None) -> tuple[Callable[[], None], Tensor]:
    """Captures the body; returns the replay and the tensor that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):  # lazy initialisation, autotuning and workspaces must be done before
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = body()
    return graph.replay, result


def structure(program: Program) -> tuple:
    """What a captured graph has fixed: everything of a program but its numbers."""
    if "structure" not in program.cache:
        program.cache["structure"] = tuple(
            (i.result, i.sources, tuple(getattr(c, "shape", ()) for c in i.coefficients))
            if isinstance(i, Update)
            else i
            for i in program.instructions
        )
    return program.cache["structure"]


def signature(value: Any) -> Any:
    """What of a keyword argument or guidance a captured graph has fixed, as something hashable: a tensor's kind, and
    other values themselves."""
    leaves, spec = pytree.tree_flatten(value)
    kinds = tuple(
        (v.shape, v.dtype, v.device, v.stride()) if isinstance(v, Tensor) else (type(v), _hashable(v)) for v in leaves
    )
    return kinds, repr(spec)


def held(guidance: Any) -> Any:
    """What a guidance's network calls read, as something hashable; its numbers are in the program."""
    return getattr(guidance, "network_key", id(guidance))


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


class CapturedSolve:
    """One captured solve and the tensors that it reads."""

    def __init__(
        self,
        solver: Solver,
        program: Program,
        x: Tensor,
        generator: torch.Generator | None,
        row_offset: int,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.x = x.clone()
        leaves, spec = pytree.tree_flatten(model_kwargs)
        self.leaves = [v.clone() if isinstance(v, Tensor) else v for v in leaves]
        kwargs = pytree.tree_unflatten(self.leaves, spec)
        self.coefficients, views = table_of(program, x)
        self.times = time_table(program, x, solver.time_dtype_of(x), solver.time_shape).clone()
        times = self.times.unbind(0)
        self.guidance, self.generator = solver.guidance, generator  # what the graph points to must stay
        buffers = Buffers()

        def body() -> Tensor:
            seed = draw_seed(x.device, generator) if program.streams else None
            run = solver.new_run(
                program, self.x, views, times, kwargs, seed=seed, row_offset=row_offset, buffers=buffers
            )
            run.all()
            return run.result

        self.replay, self.result = capture(body, generator)

    def run(self, solver: Solver, program: Program, x: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        self.x.copy_(x)
        for static, value in zip(self.leaves, pytree.tree_leaves(model_kwargs), strict=True):
            if isinstance(static, Tensor):
                static.copy_(value)
        self.coefficients.copy_(table_of(program, x)[0])
        self.times.copy_(time_table(program, x, solver.time_dtype_of(x), solver.time_shape))
        self.replay()
        return self.result.clone()


class GraphCache:
    """The captured solves of one model."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Any, CapturedSolve | str | None] = OrderedDict()

    def run(
        self,
        solver: Solver,
        program: Program,
        x: Tensor,
        generator: torch.Generator | None,
        row_offset: int,
        model_kwargs: dict[str, Any],
    ) -> tuple[Tensor | None, str]:
        """(samples, how), or (None, why it must run eagerly)."""
        key = (
            structure(program),
            (x.shape, x.dtype, x.device, x.stride()),
            signature(model_kwargs),
            held(solver.guidance),
            id(generator),
            row_offset,
            (solver.time_shape, solver.time_dtype_of(x)),
        )
        how = "replayed"
        entry = self._graphs.get(key)
        if not isinstance(entry, CapturedSolve):
            first_call = key not in self._graphs
            if isinstance(entry, str):
                return None, entry
            if first_call and solver.cuda_graph == "auto":
                self._keep(key, None)
                return None, "eager: a graph is captured at the second call"
            try:
                entry, how = CapturedSolve(solver, program, x, generator, row_offset, model_kwargs), "captured"
            except RuntimeError as error:
                if solver.cuda_graph is True:
                    raise
                torch.cuda.synchronize()
                reason = f"eager: the model cannot be captured: {str(error).splitlines()[0]}"
                self._keep(key, reason)
                return None, reason
            self._keep(key, entry)
        self._graphs.move_to_end(key)
        return entry.run(solver, program, x, model_kwargs), how

    def _keep(self, key: Any, entry: CapturedSolve | str | None) -> None:
        self._graphs[key] = entry
        while sum(isinstance(e, CapturedSolve) for e in self._graphs.values()) > MAX_GRAPHS or len(self._graphs) > 64:
            self._graphs.popitem(last=False)


_BY_MODEL: weakref.WeakKeyDictionary[Any, GraphCache] = weakref.WeakKeyDictionary()


def graphs_of(model: Any) -> GraphCache:
    """The graphs kept for a model, as long as it lives."""
    try:
        return _BY_MODEL.setdefault(model, GraphCache())
    except TypeError:  # no weak references or no hash
        return GraphCache()
