"""Continuous batching: what a stream gives is what each sample would be alone, at fewer network evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels.ops.step_control.op import Status
from fmkernels.solvers.adaptive.options import AdaptiveOptions
from fmkernels.solvers.adaptive.solve import solve_adaptive
from fmkernels.solvers.methods.tableaus import TABLEAUS
from fmkernels.solvers.sampling.streaming import StreamResult, sample_stream, stream

DOPRI5 = TABLEAUS["dopri5"]


class Mixture:
    """Samples that need very different numbers of steps: one in eight is stiff."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.rate = torch.where(torch.arange(size) % 8 == 3, 200.0, 0.5 + torch.rand(size)).to(dtype)
        self.y0 = torch.randn(size, 4).to(dtype)
        self.evaluations = self.calls = 0

    def __call__(self, t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        self.evaluations += y.shape[0]
        self.calls += 1
        return -rate[:, None] * (y - torch.cos(t)[:, None].to(y.dtype))

    def requests(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        yield from ((y0, {"rate": rate}) for y0, rate in zip(self.y0, self.rate, strict=True))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_samples_are_those_of_single_solves(impl: str) -> None:
    mixture = Mixture(37, torch.float64 if impl == "reference" else torch.float32)
    options = AdaptiveOptions(rtol=1e-4, atol=1e-4, impl=impl)
    results = list(stream(mixture, mixture.requests(), DOPRI5, options, capacity=8))
    assert sorted(r.request for r in results) == list(range(37))
    assert [r.request for r in results] != list(range(37)), "they finish out of order"
    for result in results:
        row = slice(result.request, result.request + 1)
        alone = solve_adaptive(
            mixture, mixture.y0[row], 0.0, 1.0, DOPRI5, options, arguments={"rate": mixture.rate[row]}
        )
        assert result.status == Status.SUCCESS
        if impl == "auto":
            assert torch.equal(result.x, alone.y[0])
        torch.testing.assert_close(result.x, alone.y[0], rtol=1e-12, atol=1e-12)
        assert (result.n_steps, result.n_accepted) == (int(alone.n_steps), int(alone.n_accepted))


def test_a_stream_evaluates_less_than_batches() -> None:
    """Network evaluations of single samples: batches until their slowest is done, compacted ones, and a stream."""
    options = AdaptiveOptions(rtol=1e-5, atol=1e-5, compact=True)
    counts = {}
    useful = 0
    for name, compact in (("fixed", False), ("compacted", True)):
        mixture = Mixture(256)
        for i in range(0, 256, 32):
            rows = slice(i, i + 32)
            own = AdaptiveOptions(rtol=1e-5, atol=1e-5, compact=compact)
            result = solve_adaptive(
                mixture,
                mixture.y0[rows],
                0.0,
                1.0,
                DOPRI5,
                own,
                arguments={"rate": mixture.rate[rows]},
                follow=["rate"],
            )
            useful += int(6 * result.n_steps.sum() + 2 * 32) if compact else 0
        counts[name] = mixture.evaluations
    mixture = Mixture(256)
    assert len(list(stream(mixture, mixture.requests(), DOPRI5, options, capacity=32))) == 256
    counts["stream"] = mixture.evaluations
    assert counts["stream"] < 1.35 * useful, (counts, useful)
    assert counts["stream"] < counts["fixed"] / 3, counts
    assert counts["stream"] < counts["compacted"], counts


def test_public_function() -> None:
    def model(x: Tensor, t: Tensor, label: Tensor, scale: float) -> Tensor:
        assert t.shape == x.shape[:1] == label.shape
        return scale * x * label[:, None]

    def requests() -> Iterator[tuple[Tensor, dict[str, float]]]:
        for i in range(10):
            yield torch.full((3,), 1.0 + i, dtype=torch.float64), {"label": 0.1 * i}

    results = sorted(fm.sample_stream(model, requests(), capacity=4, scale=2.0, rtol=1e-8, atol=1e-8))
    for i, result in enumerate(results):
        assert isinstance(result, StreamResult)
        want = torch.full((3,), (1.0 + i) * math.exp(0.2 * i), dtype=torch.float64)
        torch.testing.assert_close(result.x, want, rtol=5e-7, atol=0)
    plain = list(fm.sample_stream(lambda x, t: -x, [torch.ones(2), torch.ones(2)], method="bosh3"))
    assert [r.request for r in plain] == [0, 1]
    assert list(fm.sample_stream(lambda x, t: -x, [])) == []


def test_requests_are_read_as_places_become_free() -> None:
    read = []

    def requests() -> Iterator[Tensor]:
        for i in range(100):
            read.append(i)
            yield torch.ones(2)

    results = sample_stream(lambda x, t: -x, requests(), capacity=5)
    assert read == []
    next(results)
    assert len(read) <= 10
    assert torch.is_grad_enabled()


def test_failures_are_told_one_by_one() -> None:
    def model(x: Tensor, t: Tensor, bad: Tensor) -> Tensor:
        return torch.where(bad[:, None] > 0, math.nan, -x)

    requests = [(torch.ones(2), {"bad": i % 3 == 1}) for i in range(9)]
    status = {r.request: r.status for r in sample_stream(model, requests, capacity=4)}
    assert status == {i: Status.NON_FINITE if i % 3 == 1 else Status.SUCCESS for i in range(9)}
    slow = list(sample_stream(lambda x, t: -500 * x, [torch.ones(2)] * 3, max_steps=5, capacity=2))
    assert [(r.status, r.n_steps) for r in slow] == [(Status.MAX_STEPS, 5)] * 3


def test_bad_requests() -> None:
    def run(requests: list, **options: object) -> list:
        return list(sample_stream(lambda x, t, **kwargs: -x, requests, **options))  # type: ignore[arg-type]

    x, y = torch.ones(2), torch.ones(3)
    first = r"in requests\[0\]"
    for requests, text in [
        ([x, y], r"requests\[1\]: expected the shape of requests\[0\], \(2,\)"),
        ([x, x.double()], r"requests\[1\]: expected the dtype of requests\[0\], torch.float32"),
        ([(x, {"a": 1}), x], r"requests\[1\]: expected the keyword arguments of requests\[0\], \['a'\]"),
        (
            [(x, {"a": x}), (x, {"a": y})],
            r"requests\[1\]: expected a of the shape that it has " + first,
        ),
        ([(x, {"a": [1]}), (x, {"a": 1})], r"requests\[1\]: expected a of the structure that it has " + first),
        ([x, "x"], r"requests\[1\]: expected a tensor or a pair \(x_0, keyword arguments\), got 'x'"),
        ([x, (x, None)], r"requests\[1\]: expected a tensor or a pair"),
        ([x, torch.ones(2, dtype=torch.int32)], r"requests\[1\]: expected a float32"),
        ([(x, {"a": 1}), (x, {"a": "x"})], r"requests\[1\]: expected keyword arguments that are tensors or numbers"),
        ([(x, {"a": 1}), (x, {"a": x.to("meta")})], r"requests\[1\]: expected keyword arguments on the device of x_0"),
    ]:
        for capacity in (1, 2):  # beside others, and by itself
            good, bad = sorted(run(requests, capacity=capacity), key=lambda r: r.request)
            assert (good.status, good.error) == (Status.SUCCESS, None)
            torch.testing.assert_close(good.x, x * math.exp(-1), rtol=1e-5, atol=1e-5)
            assert (bad.sample, bad.status, bad.n_steps) == (None, None, 0)
            with pytest.raises((TypeError, ValueError), match=text):
                _ = bad.x
    for requests in ("x", 3, None, {"x": 1}):
        with pytest.raises(TypeError, match="requests: expected an iterable of tensors or pairs"):
            run(requests)
    with pytest.raises(ValueError, match=r"method: expected one of 'heun_euler', .*'euler' is explicit, on a fixed"):
        run([], method="euler")
    with pytest.raises(ValueError, match="capacity: expected an int >= 1"):
        run([], capacity=0)


@pytest.mark.parametrize("capacity", [1, 3, 8])
def test_requests_in_one_memory_are_copied_as_they_are_read(capacity: int) -> None:
    values = [torch.full((3,), 1.0 + i) for i in range(5)]

    def refilled() -> Iterator[tuple[Tensor, dict]]:
        x, rate, shifts = torch.empty(3), torch.empty(()), [torch.empty(3)]
        for value in values:
            x.copy_(value)
            rate.copy_(value[0])
            shifts[0].copy_(value)
            yield x, {"rate": rate, "shifts": shifts}
        x.zero_()

    def apart() -> Iterator[tuple[Tensor, dict]]:
        yield from ((value, {"rate": value[0], "shifts": [value]}) for value in values)

    def net(x: Tensor, t: Tensor, rate: Tensor, shifts: list[Tensor]) -> Tensor:
        return shifts[0] - rate[:, None] * x

    got, want = (
        sorted(sample_stream(net, requests, capacity=capacity), key=lambda r: r.request)
        for requests in (refilled(), apart())
    )
    for ours, other in zip(got, want, strict=True):
        torch.testing.assert_close(ours.x, other.x, rtol=1e-6, atol=1e-6)


def test_python_floats_have_the_precision_of_the_states() -> None:
    def net(x: Tensor, t: Tensor, rate: Tensor, labels: list[Tensor]) -> Tensor:
        dtypes.add((rate.dtype, labels[0].dtype))
        return -x * rate[:, None]

    for dtype in (torch.float16, torch.float32, torch.float64):
        dtypes: set = set()
        x = torch.ones(3, dtype=dtype)
        (result,) = sample_stream(net, [(x, {"rate": 0.1, "labels": [3]})], rtol=1e-9, atol=1e-9, max_steps=200)
        assert dtypes == {(torch.float64 if dtype is torch.float64 else torch.float32, torch.int64)}
        if dtype is torch.float64:
            assert (result.x - math.exp(-0.1)).abs().max() < 1e-10
