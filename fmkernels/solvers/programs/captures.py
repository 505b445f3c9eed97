"""CUDA graphs: what all captures share."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

MAX_GRAPHS = 4  # kept for one model; each holds the memory of a solve
MAX_KEYS = 64
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


Captured = TypeVar("Captured")


class Captures(Generic[Captured]):
    """Captured work of one kind, by owner (a model) and key; what it holds must not hold the owner."""

    def __init__(self) -> None:
        self._by_owner: weakref.WeakKeyDictionary[Any, OrderedDict[Any, Captured | str | None]]
        self._by_owner = weakref.WeakKeyDictionary()

    def obtain(
        self, owner: Any, key: Any, mode: bool | Literal["auto"], make: Callable[[], Captured]
    ) -> tuple[Captured | None, str]:
        """(what was captured, "captured" or "replayed"), or (None, why single launches must do).

        mode: True captures at the first call and raises where that fails; "auto" at the second call with the same key.
        """
        try:
            graphs = self._by_owner.setdefault(owner, OrderedDict())
        except TypeError:  # no weak references or no hash
            graphs = OrderedDict()
        entry = graphs.get(key)
        if isinstance(entry, str):
            return None, entry
        if entry is not None:
            graphs.move_to_end(key)
            return entry, "replayed"
        if mode == "auto" and key not in graphs:
            graphs[key] = None
            return None, "eager: a graph is captured at the second call"
        try:
            entry = make()
        except RuntimeError as error:
            if mode is True:
                raise
            torch.cuda.synchronize()
            graphs[key] = reason = f"eager: the model cannot be captured: {str(error).splitlines()[0]}"
            return None, reason
        graphs[key] = entry
        while sum(not isinstance(e, str | None) for e in graphs.values()) > MAX_GRAPHS or len(graphs) > MAX_KEYS:
            graphs.popitem(last=False)
        return entry, "captured"


class StaticArguments:
    """Keyword arguments whose tensors stay where a captured graph reads them."""

    def __init__(self, model_kwargs: Mapping[str, Any]) -> None:
        leaves, spec = pytree.tree_flatten(dict(model_kwargs))
        self._leaves = [v.clone() if isinstance(v, Tensor) else v for v in leaves]
        self.values: dict[str, Any] = pytree.tree_unflatten(self._leaves, spec)

    def load(self, model_kwargs: Mapping[str, Any]) -> None:
        for static, value in zip(self._leaves, pytree.tree_leaves(dict(model_kwargs)), strict=True):
            if isinstance(static, Tensor):
                static.copy_(value)
