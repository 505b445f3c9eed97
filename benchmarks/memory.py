"""Peak extra memory of one call: what it holds at its fullest beyond its inputs, results included."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fmkernels import _memory, _native
from fmkernels.testing import unpooled


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The profiler's library writes two lines to the standard error at every use, whatever its log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The peak of the bytes allocated through torch, above what was allocated before.

    On the CPU every allocation and release is taken from torch's profiler. For this one call large outputs
    come from torch's allocator instead of fmkernels' pool, which the profiler does not see; their sizes are
    the same.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated(device) - before
    with _silent(), unpooled(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = call()
    del results
    events = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    peak = held = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak


def retained_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """What fmkernels' pool of CPU memory keeps after a call whose results are gone, for the next call."""
    if device.type != "cpu" or _native.missing("cpu") is not None:
        return 0
    limit = int(os.environ.get("FMKERNELS_CPU_POOL_MB", "1024"))
    _memory.set_cpu_pool_limit(0)
    _memory.set_cpu_pool_limit(limit)
    results = call()
    del results
    return int(_native.library().pool_cached_bytes())
