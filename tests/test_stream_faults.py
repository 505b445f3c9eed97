"""Streams in which something fails: what is finished is delivered, what failed is told with its request."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmkernels as fm
from fmkernels.guidance import CFG
from fmkernels.solvers.sampling.places import StreamResult

ONE = torch.ones(2)


def until_it_raises(stream: Iterator[StreamResult], error: type[Exception]) -> list[StreamResult]:
    got = []
    while True:
        try:
            got.append(next(stream))
        except error:
            return got


def decayed(x: Tensor, rate: float = 1.0) -> Tensor:
    return x * math.exp(-rate)


class Embedded(nn.Module):
    """Raises for labels that it does not know, as an embedding does, and from time ``late`` on for label 2."""

    def __init__(self, late: float = math.inf) -> None:
        super().__init__()
        self.table, self.late = torch.tensor([1.0, 2.0, 1.0]), late

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if bool(((y == 2) & (t > self.late)).any()):
            raise RuntimeError("label 2 is late")
        return -self.table[y][:, None] * x


@pytest.mark.parametrize("capacity", [1, 2, 3, 16])
def test_a_request_for_which_the_network_raises_fails_alone(capacity: int) -> None:
    labels = [0, 7, 1, 0, -9, 1, 0, 1, 8]
    results = list(fm.sample_stream(Embedded(), [(ONE, {"y": y}) for y in labels], capacity=capacity, rtol=1e-7))
    assert sorted(r.request for r in results) == list(range(len(labels)))
    for result in results:
        y = labels[result.request]
        if y in (0, 1):
            torch.testing.assert_close(result.x, decayed(ONE, 1.0 + y), rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(IndexError):
                _ = result.x


@pytest.mark.parametrize("capacity", [1, 3, 16])
@pytest.mark.parametrize("late", [0.2, 0.9])
def test_a_sample_that_fails_on_its_way_leaves_the_others(late: float, capacity: int) -> None:
    labels = [0, 2, 1, 0, 2, 1, 1]
    options = {"rtol": 1e-7, "atol": 1e-7, "capacity": capacity}
    results = list(fm.sample_stream(Embedded(late), [(ONE, {"y": y}) for y in labels], **options))
    assert sorted(r.request for r in results) == list(range(len(labels)))
    alone = {y: next(fm.sample_stream(Embedded(), [(ONE, {"y": y})], **options)) for y in (0, 1)}
    for result in results:
        y = labels[result.request]
        if y == 2:
            assert str(result.error) == "label 2 is late"
        else:
            torch.testing.assert_close(result.x, alone[y].x, rtol=1e-6, atol=1e-6)
            assert result.n_steps == alone[y].n_steps


def test_what_the_queue_raises_comes_after_all_before_it() -> None:
    def requests() -> Iterator[Tensor]:
        for i in range(5):
            yield ONE * i
        raise OSError("the connection is lost")

    got = until_it_raises(fm.sample_stream(lambda x, t: -x, requests(), capacity=2), OSError)
    assert sorted(r.request for r in got) == list(range(5))
    assert all(r.error is None for r in got)

    def at_once() -> Iterator[Tensor]:
        raise OSError("nobody there")
        yield ONE

    with pytest.raises(OSError, match="nobody there"):
        list(fm.sample_stream(lambda x, t: -x, at_once()))


def test_what_fails_for_no_sample_alone_ends_the_stream_after_what_has_finished() -> None:
    calls = 0

    def model(x: Tensor, t: Tensor, rate: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 60 and x.shape[0] > 1:
            raise torch.OutOfMemoryError("too large a batch")
        return -rate[:, None] * torch.sin(x)

    stream = fm.sample_stream(model, [(ONE, {"rate": r}) for r in (1.0, 300.0, 400.0)], capacity=3)
    assert [r.request for r in until_it_raises(stream, torch.OutOfMemoryError)] == [0]
    # and the next stream is none the worse
    assert [r.request for r in fm.sample_stream(lambda x, t: -x, [ONE, ONE])] == [0, 1]


def test_numbers_and_tensors_of_mixed_dtypes() -> None:
    seen = set()

    def model(x: Tensor, t: Tensor, scale: Tensor, shift: Any) -> Tensor:
        seen.add(scale.dtype)
        return -(scale[:, None] * x) + 0 * shift["a"][0][:, None]

    values = [1, 0.5, True, torch.tensor(2), torch.tensor(0.25, dtype=torch.float64), 3, 1.5, 0]
    requests = [(ONE.double(), {"scale": value, "shift": {"a": [value]}}) for value in values]
    for capacity in (1, 2, 3, 8):
        results = list(fm.sample_stream(model, requests, capacity=capacity, rtol=1e-8, atol=1e-8))
        for result in results:
            torch.testing.assert_close(result.x, decayed(ONE.double(), float(values[result.request])))
    assert torch.int64 in seen, "integers stay integers among themselves"


def test_a_consumer_that_stops_early_leaves_nothing_behind() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -x

    read = []

    def requests() -> Iterator[Tensor]:
        for i in range(100):
            read.append(i)
            yield ONE

    net = Net()
    stream = fm.sample_stream(net, requests(), capacity=4)
    first = next(stream)
    taken = len(read)
    assert torch.is_grad_enabled()
    kept = first.x.clone()
    second = next(stream)  # goes on where it was
    assert second.request != first.request
    stream.close()
    alive = weakref.ref(net)
    del net, stream
    gc.collect()
    assert alive() is None
    assert torch.equal(first.x, kept)
    assert len(read) <= taken + 4


def test_two_streams_at_a_time_and_one_within_another() -> None:
    """Also the model's own: nothing is shared between streams."""

    def nested(x: Tensor, t: Tensor) -> Tensor:
        inner = [r.x for r in fm.sample_stream(lambda x, t: -x, [torch.ones(1), torch.ones(1)], capacity=1)]
        return -x * (inner[0] / math.exp(-1)).to(x.dtype)

    for result in fm.sample_stream(nested, [ONE, 2 * ONE], capacity=2, rtol=1e-3, atol=1e-3):
        torch.testing.assert_close(result.x, decayed((1 + result.request) * ONE), rtol=1e-2, atol=1e-2)
    a = fm.sample_stream(lambda x, t: -x, [ONE * i for i in range(6)], capacity=2)
    b = fm.sample_stream(lambda x, t: -2 * x, [ONE * i for i in range(6)], capacity=2)
    for _ in range(6):
        for stream, rate in ((a, 1.0), (b, 2.0)):
            result = next(stream)
            torch.testing.assert_close(result.x, decayed(ONE * result.request, rate), rtol=1e-3, atol=1e-3)


def test_results_are_nobody_elses_memory() -> None:
    """Neither the requests' states nor their arguments change, nor do results while the stream goes on."""
    states = [ONE * i for i in range(12)]
    rates = [torch.full((1,), 1.0 + i) for i in range(12)]
    null = torch.zeros(1, 1)
    before = [x.clone() for x in (*states, *rates, null)]
    guidance = CFG(2.0, negative={"rate": null})
    kept = []
    for capacity in (1, 3):
        for result in fm.sample_stream(
            lambda x, t, rate: -rate * x,
            [(x, {"rate": r}) for x, r in zip(states, rates, strict=True)],
            capacity=capacity,
            guidance=guidance,
        ):
            kept.append((result.x, result.x.clone()))
    assert all(torch.equal(a, b) for a, b in kept)
    assert all(torch.equal(a, b) for a, b in zip((*states, *rates, null), before, strict=True))


@pytest.mark.parametrize("batched", ["auto", False, ("rate",)])
def test_guided_streams_are_guided_solves(batched: Any) -> None:
    def model(x: Tensor, t: Tensor, rate: Tensor, table: Tensor) -> Tensor:
        return -(rate[:, None] + table.mean()) * torch.sin(x)

    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    rate, table = torch.linspace(0.5, 5.0, 7), torch.ones(3)  # as many rows as a batch may have
    guidance = CFG(1.5, negative={"rate": 0.0}, batched=batched)
    options = {"guidance": guidance, "rtol": 1e-5, "atol": 1e-5, "table": table}
    want, _ = fm.sample(model, x, method="dopri5", batched=("rate",), shared=("table",), rate=rate, **options)
    for result in fm.sample_stream(
        model, [(s, {"rate": r}) for s, r in zip(x, rate, strict=True)], capacity=3, **options
    ):
        torch.testing.assert_close(result.x, want[result.request], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guidance: expected scales that are numbers or functions of t"):
        fm.sample_stream(model, [], guidance=CFG(torch.ones(7), negative={"rate": 0.0}))


def test_an_argument_that_is_shared_too_is_told_with_its_request() -> None:
    (result,) = fm.sample_stream(lambda x, t, a: -x, [(ONE, {"a": 1})], a=2)
    with pytest.raises(ValueError, match=r"requests: expected keyword arguments that are not shared .* got \['a'\]"):
        _ = result.x
