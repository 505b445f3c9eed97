"""A CUDA graph played on the CPU as the hardware has it: a list of operators on addresses, and no Python.

What runs while the body is recorded is put down with the memory of its tensors. A replay does it again there. Memory
that was there before the recording is known by weak references alone, as a graph keeps none of it alive: a replay that
would read or write what has died raises :class:`Dead`. Memory that is allocated within the recording is the graph's
pool's, and lives as long as the replay.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fmkernels import _dispatch, _torch
from fmkernels.solvers.adaptive import native_stepper
from fmkernels.solvers.programs import captures


class Dead(AssertionError):
    """A graph would read or write memory that has been freed."""


class Place:
    """A tensor by its memory."""

    def __init__(self, tensor: Tensor, graph: Graph) -> None:
        storage = tensor.untyped_storage()
        self.layout = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
        self.memory = graph.memory_of(storage)

    def tensor(self) -> Tensor:
        dtype, offset, shape, stride = self.layout
        return torch.empty(0, dtype=dtype).set_(self.memory.storage(), offset, shape, stride)


class Memory:
    """A storage: the pool's own, or one that others must keep alive."""

    def __init__(self, storage: torch.UntypedStorage, own: bool) -> None:
        self.own = storage if own else None
        self.weak = StorageWeakRef(storage)
        self.address, self.bytes = storage.data_ptr(), storage.nbytes()

    @property
    def alive(self) -> bool:
        return not self.weak.expired()

    def storage(self) -> torch.UntypedStorage:
        if self.own is not None:
            return self.own
        if not self.alive:
            raise Dead(f"{self.bytes} bytes at {self.address:x} have been freed")
        return torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)


class Graph(TorchDispatchMode):
    """Records operators while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[tuple[Any, Any, Any, list[Any]]] = []
        self.memories: dict[int, Memory] = {}
        self.within: set[int] = set()  # storages that are made in the recording
        self.written: dict[int, Memory] = {}  # what was there before and is written to

    def memory_of(self, storage: torch.UntypedStorage) -> Memory:
        known = self.memories.get(storage._cdata)
        if known is None or not known.alive:
            known = self.memories[storage._cdata] = Memory(storage, storage._cdata in self.within)
        return known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        before = {v.untyped_storage()._cdata for v in inputs}
        placed = pytree.tree_map_only(Tensor, lambda v: Place(v, self), (args, kwargs))
        result = func(*args, **kwargs)
        outputs = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]
        self.within |= {v.untyped_storage()._cdata for v in outputs} - before
        made = [v for v in outputs if v.untyped_storage()._cdata not in before]
        changed = [
            v
            for v, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(v, Tensor)
        ]
        for name, value in kwargs.items():
            argument = next(a for a in func._schema.arguments if a.name == name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                changed.append(value)
        places = [Place(v, self) for v in outputs]
        for v in (*made, *changed):
            memory = self.memory_of(v.untyped_storage())
            if memory.own is None:
                self.written[id(memory)] = memory
        self.work.append((func, *placed, places))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, places in self.work:
                args, kwargs = pytree.tree_map_only(Place, Place.tensor, (args, kwargs))
                result = func(*args, **kwargs)
                outputs = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]
                for place, output in zip(places, outputs, strict=False):
                    target = place.tensor()
                    if target.data_ptr() != output.data_ptr() or target.stride() != output.stride():
                        target.copy_(output)


GRAPHS: list[weakref.ref[Graph]] = []


def record(
    body: Callable[[], Tensor], generator: Any, device: torch.device, stream: Any
) -> tuple[Callable[[], None], Tensor]:
    """In the place of captures.record: what the body did, without the body."""
    graph = Graph()
    generators = [g for g in (generator, torch.default_generator) if g is not None]
    states = [g.get_state() for g in generators]
    with graph:
        result = body()
    for own, state in zip(generators, states, strict=True):
        own.set_state(state)  # nothing is drawn by what is only recorded
    GRAPHS.append(weakref.ref(graph))
    return graph.replay, result


@contextmanager
def played() -> Iterator[None]:
    """Within it captures are recorded so; operations run by PyTorch's dispatcher, which is where they are seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captures, "record", record)
        patch.setattr(_torch._Interceptors, "bound", True)
        for name, answer in {"modes": lambda: 0, "transforms": lambda: None, "tracing": lambda: None}.items():
            patch.setattr(_torch._Interceptors, name, staticmethod(answer), raising=False)
        patch.setattr(_dispatch, "plain", lambda *_: False)
        patch.setattr(_dispatch, "plain_library", lambda impl: None)
        patch.setattr(native_stepper, "runs_natively", lambda *_: False)
        GRAPHS.clear()
        yield
