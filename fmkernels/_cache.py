"""What is kept between calls: plans, tables, steppers, captured graphs. One mechanism for all of them.

An entry has a key that says everything its value depends on (:mod:`fmkernels._keys`; without one nothing is kept),
owners with which it dies, and bytes that count against a budget, beyond which the least recently used entries go. A
value that a call writes to is *taken* by that call alone; a second call at the same time, in another thread or within
the first, makes its own. A forked process begins with nothing.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import _torch

V = TypeVar("V")

# ---------------------------------------------------------------------- where values may be made and read


def is_plain_context() -> bool:
    """Whether tensors made now are ordinary ones: nobody traces, intercepts or transforms operations."""
    return not _torch.intercepted()


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Within it tensors are made that every later call can use: not inference's, on no default device."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        yield


@contextmanager
def numbers_only() -> Iterator[None]:
    """For work whose result is numbers: as :func:`ordinary_tensors`, and unseen by modes such as FakeTensorMode."""
    with _torch.without_modes(), ordinary_tensors():
        yield


# ---------------------------------------------------------------------- entries

_OVERHEAD = 512  # of an entry, in bytes
_tick = itertools.count().__next__  # atomic
_LOCK = threading.Lock()


class Budget:
    """Bytes that entries of several caches may have together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.caches: list[Cache[Any]] = []


HOST = Budget(int(os.environ.get("FMKERNELS_CACHE_MB", "64")) << 20)
# What captured graphs hold on a device; as many of them as one model may have are bounded beside this.
DEVICE = Budget(int(os.environ.get("FMKERNELS_GRAPH_MB", "8192")) << 20)


class Entry(Generic[V]):
    """A kept value; one that is made but not kept has no cache."""

    __slots__ = ("__weakref__", "busy", "bytes", "cache", "key", "owners", "used", "value")

    def __init__(self, value: V) -> None:
        self.value = value
        self.cache: Cache[V] | None = None
        self.key: Hashable = None
        self.owners: tuple[weakref.ref[Any], ...] = ()
        self.bytes = 0
        self.used = _tick()
        self.busy = threading.Lock()

    def release(self) -> None:
        """Ends the use that :meth:`Cache.take` began."""
        self.busy.release()

    def discard(self) -> None:
        """Ends the use of a value that is not to be used again."""
        if self.cache is not None:
            self.cache.remove(self)

    def __enter__(self) -> V:
        """The value, in use until the end of the block; with an exception its state is not known and it goes."""
        return self.value

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.release()
        else:
            self.discard()


class CacheInfo(NamedTuple):
    """What is kept of one kind.

    Attributes:
        entries: kept values; None where they are not counted.
        bytes: that they hold.
        hits, misses: how often a value was found, and not; None where that is not counted.
        limit: bytes that may be kept, of all kinds with this limit together.
    """

    entries: int | None
    bytes: int
    hits: int | None
    misses: int | None
    limit: int


class Cache(Generic[V]):
    """All kept values of one kind.

    Args:
        kind: its name in :func:`cache_info`.
        budget: its bytes count against.
    """

    def __init__(self, kind: str, budget: Budget = HOST) -> None:
        self.kind, self.budget = kind, budget
        self.hits = self.misses = 0
        self._entries: dict[Hashable, Entry[V]] = {}
        _CACHES[kind] = self
        budget.caches.append(self)

    def get(
        self,
        key: Hashable | None,
        make: Callable[[], V],
        owners: Sequence[Any] = (),
        size: Callable[[V], int] | None = None,
    ) -> V:
        """The value of a key, made where there is none; nobody writes to it.

        Args:
            key: everything that the value depends on, with the ids of the owners; None keeps nothing.
            owners: objects with which the value dies; it must not hold them.
            size: the value's bytes; :func:`bytes_of` if None.
        """
        entry = self.find(key)
        if entry is not None:
            return entry.value
        value = make()
        if key is not None:
            self.keep(key, value, owners, size)
        return value

    def take(
        self,
        key: Hashable | None,
        make: Callable[[], V],
        owners: Sequence[Any] = (),
        size: Callable[[V], int] | None = None,
    ) -> Entry[V]:
        """As :meth:`get`, for a value that the caller alone has until :meth:`Entry.release` or discard."""
        entry = self.find(key)
        if entry is not None and entry.busy.acquire(blocking=False):
            return entry
        taken = Entry(make())
        taken.busy.acquire()
        if key is not None and entry is None:
            self._add(taken, key, owners, size)
        return taken

    def find(self, key: Hashable | None) -> Entry[V] | None:
        """The entry of a key, if it is there; maybe in use."""
        if key is None:
            return None
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        for owner in entry.owners:
            if owner() is None:  # it has just died
                self.misses += 1
                return None
        self.hits += 1
        entry.used = _tick()
        return entry

    def keep(
        self, key: Hashable, value: V, owners: Sequence[Any] = (), size: Callable[[V], int] | None = None
    ) -> Entry[V]:
        """Keeps a value in the place of any other of its key."""
        return self._add(Entry(value), key, owners, size)

    def _add(self, entry: Entry[V], key: Hashable, owners: Sequence[Any], size: Callable[[V], int] | None) -> Entry[V]:
        total = _OVERHEAD + bytes_of(key) + (bytes_of if size is None else size)(entry.value)
        if total > self.budget.limit:
            return entry
        entry.key, entry.bytes = key, total
        try:
            entry.owners = tuple(weakref.ref(owner, _Death(self, entry)) for owner in owners)
        except TypeError:  # an owner that cannot be watched
            return entry
        gone: list[Any] = []
        with _locked(gone):
            if (old := self._entries.pop(key, None)) is not None:
                gone.append(self._forget(old))
            entry.cache = self
            self._entries[key] = entry
            self.budget.bytes += total
            if self.budget.bytes > self.budget.limit:
                gone += _evicted(self.budget)
        return entry

    def pop(self, key: Hashable | None) -> V | None:
        """The value of a key, kept no more, or None: the caller's alone until it is kept again."""
        entry = self.find(key)
        if entry is None:
            return None
        self.remove(entry)
        return entry.value if entry.busy.acquire(blocking=False) else None

    def remove(self, entry: Entry[V]) -> None:
        """Keeps an entry no more."""
        gone: list[Any] = []
        with _locked(gone):
            if entry.cache is self and self._entries.get(entry.key) is entry:
                del self._entries[entry.key]
                gone.append(self._forget(entry))

    def clear(self) -> None:
        """Keeps nothing any more; values in use end with their use."""
        gone: list[Any] = []
        with _locked(gone):
            gone += [self._forget(entry) for entry in self._entries.values()]
            self._entries.clear()
            self.hits = self.misses = 0

    def entries(self) -> list[Entry[V]]:
        with _LOCK:
            return list(self._entries.values())

    def info(self) -> CacheInfo:
        entries = self.entries()
        return CacheInfo(len(entries), sum(e.bytes for e in entries), self.hits, self.misses, self.budget.limit)

    def _forget(self, entry: Entry[V]) -> Entry[V]:
        """Under the lock: an entry that is in the table no more, and whose value the caller lets go after it."""
        entry.cache = None
        self.budget.bytes -= entry.bytes
        return entry

    def _renew(self) -> None:
        """In a forked process: what is kept stays as it is, unused. A device's memory cannot even be freed here."""
        _ABANDONED.append(self._entries)
        self._entries = {}
        self.hits = self.misses = 0
        self.budget.bytes = 0


_CACHES: dict[str, Cache[Any]] = {}
_DEAD: deque[tuple[Cache[Any], Entry[Any]]] = deque()
_ABANDONED: list[Any] = []


class _Death:
    """Called when an owner dies, by any thread at any point, also within the lock."""

    __slots__ = ("_cache", "_entry")

    def __init__(self, cache: Cache[Any], entry: Entry[Any]) -> None:
        self._cache, self._entry = cache, weakref.ref(entry)

    def __call__(self, _: Any) -> None:
        entry = self._entry()
        if entry is not None:
            _DEAD.append((self._cache, entry))
            gone: list[Any] = []
            if _LOCK.acquire(blocking=False):
                try:
                    gone += _buried()
                finally:
                    _LOCK.release()


def _buried() -> Iterator[Entry[Any]]:
    """Under the lock: the entries whose owners have died."""
    while _DEAD:
        cache, entry = _DEAD.popleft()
        if cache._entries.get(entry.key) is entry:
            del cache._entries[entry.key]
            yield cache._forget(entry)


@contextmanager
def _locked(gone: list[Any]) -> Iterator[None]:
    """The lock; ``gone`` holds what was removed until the lock is free, as its end may run any code."""
    with _LOCK:
        yield
        gone += _buried()


def _evicted(budget: Budget) -> Iterator[Entry[Any]]:
    """Under the lock: the least recently used entries, so many that a quarter of the budget is free."""
    entries = [(entry.used, entry.key, cache) for cache in budget.caches for entry in cache._entries.values()]
    newest = max((used for used, *_ in entries), default=0)
    for used, key, cache in sorted(entries, key=lambda item: item[0]):
        if budget.bytes <= 0.75 * budget.limit or used == newest:
            return
        yield cache._forget(cache._entries.pop(key))


_FLAT = frozenset({type(None), bool, int, float, str, bytes, torch.dtype, torch.device, type})


def bytes_of(value: Any, _depth: int = 0) -> int:
    """About the bytes that a value holds: its own, and those of what it contains."""
    kind = type(value)
    if kind in _FLAT:
        return sys.getsizeof(value)
    if kind is tuple or kind is list:
        return sys.getsizeof(value) + sum(map(bytes_of, value))
    own = getattr(value, "kept_bytes", None)
    if own is not None:
        return int(own)
    if isinstance(value, Tensor):
        return 600 + (value.untyped_storage().nbytes() if value.layout is torch.strided else 0)
    size = sys.getsizeof(value, 64)
    if isinstance(value, dict):
        return size + sum(bytes_of(k, _depth) + bytes_of(v, _depth) for k, v in value.items())
    if isinstance(value, (tuple, list, set, frozenset)):
        return size + sum(map(bytes_of, value))
    if isinstance(value, np.ndarray) and value.base is not None:
        return size + value.nbytes
    return size


# ---------------------------------------------------------------------- all of it

_Report = tuple[Callable[[], CacheInfo], Callable[[], None]]
_REPORTS: dict[str, _Report] = {}


def report(kind: str, info: Callable[[], CacheInfo], clear: Callable[[], None]) -> None:
    """Makes what is kept elsewhere (in the compiled library) part of :func:`cache_info` and :func:`clear_caches`."""
    _REPORTS[kind] = info, clear


def cache_info() -> dict[str, CacheInfo]:
    """What is kept between calls, by kind.

    "plan": fixed-grid methods on their grids. "numbers", "table", "weights", "quadrature": numbers on the device where
    they are read. "stepper": the buffers of small adaptive solves. "solve_graph", "step_graph": captured CUDA graphs.
    "cpu_pool": freed large outputs of CPU kernels (see :func:`fmkernels.set_cpu_pool_limit`).

    Kept values are found again only by all that they depend on. They die with their model and guidance, and the least
    recently used go where a budget is exceeded: 64 MiB for all on the host (FMKERNELS_CACHE_MB, read when the package
    is imported), 8 GiB for captured graphs (FMKERNELS_GRAPH_MB).

    Returns:
        For each kind a :class:`fmkernels.CacheInfo` (entries, bytes, hits, misses, limit).

    Example:
        >>> fm.cache_info()["plan"].entries
        0
    """
    infos = {kind: cache.info() for kind, cache in _CACHES.items()}
    return infos | {kind: info() for kind, (info, _) in _REPORTS.items()}


def clear_caches() -> None:
    """Lets go of everything that is kept between calls, captured graphs and the CPU pool's memory too.

    Results do not depend on it. Calls that run keep what they use until they end.
    """
    for cache in list(_CACHES.values()):
        cache.clear()
    for _, clear in list(_REPORTS.values()):
        clear()


def _renew() -> None:
    global _LOCK
    _LOCK = threading.Lock()
    _DEAD.clear()
    for cache in _CACHES.values():
        cache._renew()


if hasattr(os, "register_at_fork"):
    # what another thread has half done must not be what a child begins with
    os.register_at_fork(before=lambda: _LOCK.acquire(), after_in_parent=lambda: _LOCK.release(), after_in_child=_renew)
