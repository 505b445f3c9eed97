"""Times: interleaved rounds, inputs rotated past the cache, medians.

All implementations of a case take turns, in a new random order each round, so that the machine's noise hits
all alike. A sample is the mean over as many calls as make it long enough for the clock; a result is the
median of the samples. Outputs are freshly allocated and dropped, as in a training step.

On a CUDA device a sample lies between two events on the stream: what a caller waits for, launches included.
With a captured graph the launches fall away and the device's own time is left.
"""

from __future__ import annotations

import gc
import glob
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LATENCY_ELEMENTS = 4096  # up to here a case measures latency: its inputs stay in the cache
MIN_SAMPLE_SECONDS = 1e-3
SLOW_SECONDS = 0.3  # a call that takes longer is sampled less often than the others
CACHE_MULTIPLE = 3  # rotate over inputs of so many times the last-level cache
MAX_SETS = 256


@dataclass(frozen=True)
class Timing:
    median: float
    q1: float
    q3: float
    samples: int
    calls: int  # per sample


@dataclass
class Entry:
    """One implementation with the input sets that its calls rotate over."""

    name: str
    run: Callable[[Any], Any]
    sets: Sequence[Any]
    calls: int = 1
    rounds: int = 0
    cursor: int = 0
    part: Entry | None = None  # what it contains, timed beside it each time, so that their difference is known

    @property
    def rest(self) -> str:
        """Under this name stands what the entry takes beyond its part: the differences of neighbouring samples."""
        return f"{self.name} beyond its part"


def cache_bytes(device: torch.device) -> int:
    """The last-level cache; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        text = Path(path).read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes) or 32 << 20


def set_count(input_bytes: int, device: torch.device, *, latency: bool) -> int:
    """How many input sets a case rotates over; one for a latency case, whose inputs a caller has just
    written."""
    if latency or input_bytes == 0:
        return 1
    return min(MAX_SETS, max(1, math.ceil(CACHE_MULTIPLE * cache_bytes(device) / input_bytes)))


def copy_entry(bytes_moved: int, device: torch.device, *, latency: bool) -> Entry:
    """The floor: a copy between warm buffers that moves as many bytes, half read and half written."""
    count = max(1, bytes_moved // 8)

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.randn(count, device=device)
        return source, torch.empty_like(source).copy_(source)

    pairs = [pair() for _ in range(set_count(8 * count, device, latency=latency))]
    return Entry("copy", lambda buffers: buffers[1].copy_(buffers[0]), pairs)


def _host(entry: Entry) -> float:
    sets, run, cursor = entry.sets, entry.run, entry.cursor
    start = time.perf_counter()
    for i in range(entry.calls):
        run(sets[(cursor + i) % len(sets)])
    elapsed = time.perf_counter() - start
    entry.cursor = (cursor + entry.calls) % len(sets)
    return elapsed / entry.calls


def _events(entry: Entry) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    _host(entry)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / entry.calls


def _plan(entries: Sequence[Entry], sample: Callable[[Entry], float], budget: float, rounds: int | None) -> None:
    """Warms up and chooses calls a sample and samples for each, within about ``budget`` seconds together."""
    for entry in [*entries, *(entry.part for entry in entries if entry.part)]:
        seconds = sample(entry)
        if seconds < SLOW_SECONDS:
            seconds = sample(entry)
            entry.calls = min(2000, max(1, math.ceil(MIN_SAMPLE_SECONDS / seconds)))
            seconds = sample(entry)
        share = budget / len(entries) / (seconds * entry.calls)
        fewest = 3 if seconds > SLOW_SECONDS else 7
        entry.rounds = rounds or max(fewest, min(300, int(share)))


def interleave(
    entries: Sequence[Entry],
    device: torch.device,
    *,
    budget: float,
    rounds: int | None = None,
) -> dict[str, Timing]:
    """Times every entry and its part; a slow one takes part in fewer rounds, evenly spread."""
    sample = _events if device.type == "cuda" else _host
    order = random.Random(0)
    samples: dict[str, list[float]] = {entry.name: [] for entry in entries}
    calls: dict[str, int] = {}
    _plan(entries, sample, budget, rounds)
    total = max(entry.rounds for entry in entries)
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(total):
            due = [e for e in entries if (turn + 1) * e.rounds // total > turn * e.rounds // total]
            order.shuffle(due)
            for entry in due:
                pair = [entry] if entry.part is None else [entry, entry.part]
                order.shuffle(pair)
                for one in pair:
                    samples.setdefault(one.name, []).append(sample(one))
                    calls[one.name] = one.calls
                if entry.part is not None:
                    rest = samples[entry.name][-1] - samples[entry.part.name][-1]
                    samples.setdefault(entry.rest, []).append(rest)
                    calls[entry.rest] = entry.calls
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(values, calls[name]) for name, values in samples.items()}


def _summary(samples: list[float], calls: int) -> Timing:
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0], len(samples), calls)
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q1, q3, len(samples), calls)


def capture(entry: Entry) -> Entry | None:
    """The same entry as replays of one CUDA graph of a call for every input set; None where it cannot be
    captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                entry.run(entry.sets[0])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for inputs in entry.sets:
                entry.run(inputs)
    except Exception as error:  # whatever an implementation does that a capture forbids
        torch.cuda.synchronize()
        print(f"  {entry.name}: not captured in a CUDA graph ({error})")
        return None
    return Entry(entry.name, lambda _: graph.replay(), [None])


def per_call(timing: Timing, calls: int) -> Timing:
    """A graph of several calls, told per call."""
    return Timing(timing.median / calls, timing.q1 / calls, timing.q3 / calls, timing.samples, timing.calls * calls)
