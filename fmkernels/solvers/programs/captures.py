"""CUDA graphs: what all captures share, and the one policy by which captured work is kept.

A graph reads and writes fixed memory. It is found again by everything that it has fixed: shapes, the model's own
addresses and modes, autocast, the stream. What cannot be told keeps nothing. A model is taken for what its arguments,
parameters and modes make of it: Python numbers that it reads elsewhere are fixed with the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ... import _torch
from ..._cache import DEVICE, Cache, Entry
from ..._keys import NoKey, attributes, is_ours, key_of

MAX_GRAPHS = 4  # kept for one model; each holds the memory of a solve
MAX_KEYS = 64
WARM_UPS = 2


Replay = Callable[[], None]


def capture(
    body: Callable[[], Tensor], generator: torch.Generator | None, device: torch.device
) -> tuple[Replay, Tensor]:
    """Captures the body on a device; returns the replay and the tensor that it writes.

    The body runs before, for lazy initialisation, autotuning and workspaces; what it draws there is drawn again.

    Args:
        generator: that it draws from beside the device's own.

    Raises:
        RuntimeError: the body reads values of the device on the host, or cannot be captured for another reason.
    """
    generators = [own for own in (generator, default_generator(device)) if own is not None]
    states = [own.get_state() for own in generators]
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with beside(stream):
        with refusing_reads(device):
            body()
        for _ in range(WARM_UPS):
            body()
    for own, state in zip(generators, states, strict=True):
        own.set_state(state)
    return record(body, generator, device, stream)


def record(
    body: Callable[[], Tensor], generator: torch.Generator | None, device: torch.device, stream: Any
) -> tuple[Replay, Tensor]:
    """The body as a CUDA graph with memory of its own. Other threads may allocate meanwhile."""
    graph, pool, current = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream(device)
    if generator is not None:
        graph.register_generator_state(generator)
    try:
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            result = body()
    except BaseException:
        _torch.leave_capture(device, pool, current)
        raise
    return graph.replay, result


def default_generator(device: torch.device) -> torch.Generator | None:
    """What is drawn from where no generator is named."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator if device.type == "cpu" else None


@contextmanager
def beside(stream: Any) -> Iterator[None]:
    """Work on another stream, after what came before and before what comes after it."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


READS = frozenset({"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_dim"})
MASKED = frozenset({"index", "index_put", "index_put_"})
MOVES = frozenset({"_to_copy", "copy_"})


def refusing_reads(device: torch.device) -> AbstractContextManager[Any]:
    """Refuses what makes the host wait for values of a device: a capture in which that happens is lost, and what it had
    begun with it."""

    def see(name: str, args: Sequence[Any], result: Any) -> None:
        if not any(isinstance(a, Tensor) and a.device == device for a in pytree.tree_leaves(args)):
            return
        masks = name in MASKED and any(
            isinstance(a, Tensor) and a.dtype in (torch.bool, torch.uint8) for a in pytree.tree_leaves(args[1])
        )
        if name in READS or masks or (name in MOVES and result.device.type != device.type):
            raise RuntimeError(f"it reads values of {device} on the host ({name}), which no graph can")

    return _torch.seeing_operators(see)


def reserved_bytes(device: torch.device) -> int:
    """Memory of a device that PyTorch holds; what a capture adds to it is the graph's."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


# ---------------------------------------------------------------------- keys


def signature(arguments: Mapping[str, Any], owners: list[Any]) -> Hashable:
    """What of keyword arguments a captured graph has fixed: a tensor's kind, and of other values :func:`held`.

    Raises:
        NoKey: a value that may change unseen.
    """
    kinds: list[Hashable] = []
    for name, argument in arguments.items():
        leaves, spec = pytree.tree_flatten(argument)
        kinds.append((name, repr(spec)))
        for i, v in enumerate(leaves):
            plain = isinstance(v, Tensor)
            try:
                kinds.append((v.shape, v.dtype, v.device, v.stride()) if plain else held(v, owners, name))
            except NoKey:  # told by the caller's name, where ours group what callers name
                where = [str(k.key) for k in pytree.tree_flatten_with_path(argument)[0][i][0] if hasattr(k, "key")]
                held(v, owners, where[-1] if where else name)
                raise
    return tuple(kinds)


def held(value: Any, owners: list[Any], name: str = "") -> Hashable:
    """What a captured graph has fixed of something that it reads: tensors by their memory, callables by identity.

    Args:
        owners: receives what is known by identity, with which the key ends.

    Raises:
        NoKey: a value that may change unseen.
    """
    if isinstance(value, Tensor):
        owners.append(value)
        return id(value), value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, Mapping):
        return type(value), *((key_of(k), held(v, owners, str(k))) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), *(held(v, owners, name) for v in value)
    try:
        return key_of(value)
    except NoKey:
        pass
    if not callable(value) or isinstance(value, type):
        raise NoKey(f"{name} is of type {type(value).__name__}, which may change unseen")
    owners.append(value)
    return id(value), state_of(value, owners)


def held_object(value: Any, owners: list[Any], names: Callable[[str], bool] = lambda name: True) -> Hashable:
    """The same of an object by all, or some, of what it holds: a guidance, a path."""
    if value is None:
        return None
    found = attributes(value)
    return type(value), *((name, held(found[name], owners, name)) for name in sorted(found) if names(name))


def network_fields(guidance: Any) -> Callable[[str], bool]:
    """Which attributes of a guidance its network calls read; what else a rule of this package holds is in programs."""
    if guidance is None or not is_ours(type(guidance)):
        return lambda name: True
    told = {name: f.metadata for name, f in getattr(guidance, "__dataclass_fields__", {}).items()}
    return lambda name: name not in told or (told[name].get("network", False) and not told[name].get("given", False))


def state_of(model: Any, owners: list[Any]) -> Hashable:
    """Modes and addresses of the modules, and addresses of the tensors, that a callable reads: a module's own; of a
    function those that it closes over or names, of a method or another object those that the object holds.

    Args:
        owners: receives the modules, with which the key ends.
    """
    return tuple(_states(model, owners, set(), 0))


MOST_NESTED = 8
MOST_HELD = 1024  # of a container: what is larger is data


def _states(value: Any, owners: list[Any], seen: set[int], depth: int) -> Iterator[Hashable]:
    if id(value) in seen or depth > MOST_NESTED:
        return
    seen.add(id(value))
    if isinstance(value, torch.nn.Module):
        owners.append(value)
        tensors = (*value.parameters(), *value.buffers())
        yield id(value), tuple(m.training for m in value.modules()), tuple(tensor.data_ptr() for tensor in tensors)
    elif isinstance(value, Tensor):
        if depth and value.layout is torch.strided:
            yield value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
    else:
        for held_by_it in _held_by(value, depth):
            yield from _states(held_by_it, owners, seen, depth + 1)


def _held_by(value: Any, depth: int) -> Iterator[Any]:
    """What a value holds in which modules and tensors may be."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is empty
                yield cell.cell_contents
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        for name in _names_of(value.__code__):
            named = value.__globals__.get(name)
            if isinstance(named, (torch.nn.Module, Tensor)) or getattr(named, "__globals__", None) is value.__globals__:
                yield named
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, (Mapping, tuple, list)):
        if len(value) <= MOST_HELD:
            yield from value.values() if isinstance(value, Mapping) else value
    elif depth <= 1 and not isinstance(value, (type, ModuleType)) and hasattr(value, "__dict__"):
        yield from vars(value).values()  # of what is called, or whose method is


def _names_of(code: CodeType) -> Iterator[str]:
    """The names of a function and of those within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_of(constant)


def surroundings(device: torch.device) -> Hashable:
    """What else decides which kernels run, and where."""
    kind = device.type
    cuda = kind == "cuda"
    return (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        torch.cuda.current_stream(device).cuda_stream if cuda else None,
    )


# ---------------------------------------------------------------------- what is kept

Captured = TypeVar("Captured")
SEEN = "eager: a graph is captured at the second call"


class Captures(Generic[Captured]):
    """Captured work of one kind, by owner (a model) and key; what it holds must not hold the owner.

    Args:
        kind: its name in :func:`fmkernels.cache_info`.
    """

    def __init__(self, kind: str) -> None:
        # values: a graph, why there is none, or None: it was asked for once
        self._cache: Cache[Any] = Cache(kind, DEVICE)

    def obtain(
        self,
        owner: Any,
        key: Hashable,
        owners: Sequence[Any],
        mode: bool | Literal["auto"],
        make: Callable[[], Captured],
    ) -> tuple[Entry[Captured] | None, str]:
        """(what was captured, for the caller alone until it is released, "captured" or "replayed"), or (None, why
        single launches must do).

        Args:
            owners: what else the key knows by identity.
            mode: True captures at the first call and raises where that fails; "auto" at the second call alike.
        """
        full, owners = (id(owner), key), [owner, *owners]
        entry = self._cache.find(full)
        if entry is not None and isinstance(entry.value, str):
            if mode is not True:
                return None, entry.value
        elif entry is not None and entry.value is not None:
            if entry.busy.acquire(blocking=False):
                return entry, "replayed"
            return None, "eager: the graph is in use by another call"
        elif entry is None and mode == "auto":
            self._cache.keep(full, None, owners)
            self._limit(id(owner))
            return None, SEEN
        try:
            # tensors that every later call may write to
            with torch.inference_mode(False), torch.no_grad():
                captured = make()
        except RuntimeError as error:
            if mode is True:
                raise
            reason = f"eager: the model cannot be captured: {str(error).splitlines()[0]}"
            self._cache.keep(full, reason, owners)
            return None, reason
        entry = self._cache.keep(full, captured, owners)
        if entry.cache is None:
            self._cache.keep(full, "eager: the graph's memory exceeds FMKERNELS_GRAPH_MB", owners)
        entry.busy.acquire()
        self._limit(id(owner))
        return entry, "captured"

    def _limit(self, owner: int) -> None:
        """Removes the least recently used of one owner beyond its share."""
        every: list[Entry[Any]] = self._cache.entries()
        entries = sorted((e for e in every if isinstance(e.key, tuple) and e.key[0] == owner), key=lambda e: e.used)
        graphs = [e for e in entries if not isinstance(e.value, str | None)]
        for entry in {id(e): e for e in (*graphs[:-MAX_GRAPHS], *entries[:-MAX_KEYS])}.values():
            self._cache.remove(entry)


class StaticArguments:
    """Keyword arguments whose tensors stay where a captured graph reads them; holds nothing else of them."""

    def __init__(self, model_kwargs: Mapping[str, Any]) -> None:
        leaves, self._spec = pytree.tree_flatten(dict(model_kwargs))
        self._tensors = [v.clone() if isinstance(v, Tensor) else None for v in leaves]

    def load(self, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Copies tensors to their places; returns the arguments with these in their places."""
        leaves = pytree.tree_leaves(dict(model_kwargs))
        for static, value in zip(self._tensors, leaves, strict=True):
            if static is not None:
                static.copy_(value)
        pairs = zip(self._tensors, leaves, strict=True)
        return pytree.tree_unflatten([value if static is None else static for static, value in pairs], self._spec)

    @property
    def kept_bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._tensors if t is not None)
