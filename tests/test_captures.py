"""Captured graphs, played on the CPU: by what they are found again, whom they keep, in threads, modes and streams.

A stand-in for capture runs the recorded work again at each replay, on the same tensors. Where lives are counted it
keeps nothing of the work, as a graph holds no Python.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels import _cache
from fmkernels.ops.step_control.op import Count
from fmkernels.solvers.adaptive import step_graph
from fmkernels.solvers.programs import captures

X = torch.linspace(-1.0, 1.0, 8).reshape(4, 2)


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(2, 2)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, note: Any = None) -> Tensor:
        v = self.linear(x) + t[:, None].to(x.dtype)
        return v if y is None else v + y.reshape(-1, 1)


def again(body: Callable[[], Tensor], generator: Any, device: Any, stream: Any) -> tuple[Callable[[], None], Tensor]:
    generators = [g for g in (generator, torch.default_generator) if g is not None]
    states = [g.get_state() for g in generators]
    result = body().clone()
    for g, state in zip(generators, states, strict=True):
        g.set_state(state)  # nothing is drawn by what is only recorded

    def replay() -> None:
        with torch.no_grad():
            result.copy_(body())

    return replay, result


def held_by_none(body: Callable[[], Tensor], *_: Any) -> tuple[Callable[[], None], Tensor]:
    cells = dict(zip(body.__code__.co_freevars, body.__closure__ or (), strict=True))
    owner = weakref.ref(cells["self"].cell_contents)

    def replay() -> None:
        batch = getattr(owner(), "batch", None)
        if batch is not None:  # else the loop over steps would not end
            batch.count[Count.STATUS].fill_(fm.Status.SUCCESS)

    return replay, body()


@pytest.fixture(params=["solve", "steps"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a fixed-grid or an adaptive solve, in which capture is possible."""
    fm.clear_caches()
    play(monkeypatch, again)
    monkeypatch.setattr(fm.Solver, "_graph_refusal", lambda self, *_: "eager" if self.cuda_graph is False else None)
    monkeypatch.setattr(step_graph, "can_capture", lambda y: True)
    return {"steps": 3, "method": "heun2"} if request.param == "solve" else {"method": "dopri5"}


def play(monkeypatch: pytest.MonkeyPatch, record: Any) -> None:
    monkeypatch.setattr(captures, "record", record)


def hows(count: int, model: Any, settings: dict[str, Any], **more: Any) -> list[str]:
    return [fm.sample(model, X, **settings, **more)[1].graph.split(":")[0] for _ in range(count)]


def test_captured_at_the_second_call_and_replayed_after(kind: dict[str, Any]) -> None:
    network = Network().eval()
    assert hows(4, network, kind) == ["eager", "captured", "replayed", "replayed"]
    expected = fm.sample(network, X + 1.0, **kind, cuda_graph=False)[0]
    got, result = fm.sample(network, X + 1.0, **kind)
    assert result.graph == "replayed"
    torch.testing.assert_close(got, expected)
    assert sum(info.entries for name, info in fm.cache_info().items() if name in ("solve_graph", "step_graph")) == 1


def switched(network: Network) -> None:
    network.train()


def moved(network: Network) -> None:
    network.linear.weight = torch.nn.Parameter(network.linear.weight.detach().clone())


@pytest.mark.parametrize("change", [switched, moved])
def test_modes_and_addresses_of_the_model_are_part_of_the_key(kind: dict[str, Any], change: Any) -> None:
    network = Network().eval()
    assert hows(3, network, kind)[-1] == "replayed"
    change(network)
    assert hows(1, network, kind) == ["eager"]


def test_autocast_and_precision_are_part_of_the_key(kind: dict[str, Any]) -> None:
    network = Network().eval()
    assert hows(3, network, kind)[-1] == "replayed"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert hows(1, network, kind) == ["eager"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if before != "medium" else "high")
    try:
        assert hows(1, network, kind) == ["eager"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert hows(1, network, kind) == ["replayed"]


@dataclass
class Context:
    scale: float


def test_arguments_that_may_change_unseen_are_not_captured(kind: dict[str, Any]) -> None:
    network, context = Network().eval(), Context(1.0)
    _, result = fm.sample(network, X, **kind, note=context)
    assert result.graph == "eager: note is of type Context, which may change unseen"
    assert hows(3, network, kind, note=context) == ["eager"] * 3
    assert hows(3, network, kind, note="a")[-1] == "replayed"
    assert hows(1, network, kind, note="b") == ["eager"]
    assert hows(1, network, kind, note=[1, {"a": 2.0}]) == ["eager"]


def test_guidance_is_known_by_what_its_calls_read(kind: dict[str, Any]) -> None:
    network, null, y = Network().eval(), torch.zeros(4), torch.arange(4.0)

    def how(negative: Any, scale: Any = 2.0) -> str:
        guidance = fm.guidance.CFG(scale, negative={"y": negative})
        got, result = fm.sample(network, X, **kind, guidance=guidance, y=y)
        torch.testing.assert_close(got, fm.sample(network, X, **kind, guidance=guidance, y=y, cuda_graph=False)[0])
        assert result.nfe == fm.sample(network, X, **kind, guidance=guidance, y=y, cuda_graph=False)[1].nfe
        return result.graph.split(":")[0]

    assert [how(null) for _ in range(3)] == ["eager", "captured", "replayed"]  # guidance made anew at each call
    null.add_(1.0)  # read where it lies
    assert how(null) == "replayed"
    assert how(null.clone()) == "eager"
    assert how(5.0) == "eager"


def test_what_is_captured_keeps_neither_model_nor_guidance(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, held_by_none)
    network, weak, null = Network().eval(), Network().eval(), torch.zeros(4)
    y = torch.arange(4.0)
    guidance = fm.guidance.AutoGuidance(weak, 2.0)
    for _ in range(3):
        fm.sample(network, X, **kind)
        fm.sample(network, X, **kind, guidance=guidance, y=y)
        fm.sample(network, X, **kind, guidance=fm.guidance.CFG(2.0, negative={"y": null}), y=y)
    names = ("solve_graph", "step_graph")
    assert sum(fm.cache_info()[name].entries for name in names) == 3
    left = {"weak": 2, "null": 1, "network": 0}
    kept = {"weak": weak, "null": null, "network": network}
    del weak, guidance, null, network
    for name, expected in left.items():  # each with what it was found by
        gone = weakref.ref(kept.pop(name))
        gc.collect()
        assert gone() is None, name
        assert sum(fm.cache_info()[name].entries for name in names) == expected


def test_memory_that_a_graph_writes_lives_as_long_as_it(kind: dict[str, Any]) -> None:
    network = Network().eval()
    hows(3, network, kind)
    (entry,) = [e for c in ("solve_graph", "step_graph") for e in _cache._CACHES[c].entries()]
    if "steps" in kind:
        _, buffers, *_ = entry.value.memory
        assert any(entry.value.result.shape == b.shape for b in buffers)
    assert entry.bytes > X.untyped_storage().nbytes()


def test_a_graph_in_use_is_nobody_elses(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []

    class Nested(Network):
        def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
            if len(inside) == 0 and ready:
                inside.append("")
                inside[0] = fm.sample(self, X, **kind)[1].graph
            return super().forward(x, t)

    ready = False
    network = Nested().eval()
    assert hows(2, network, kind) == ["eager", "captured"]
    ready = True
    assert hows(1, network, kind) == ["replayed"]
    assert inside == ["eager: the graph is in use by another call"]


def test_threads_replay_one_after_the_other_or_run_eagerly(kind: dict[str, Any]) -> None:
    network = Network().eval()
    hows(2, network, kind)
    states = [X + i for i in range(6)]
    results: list[Any] = [None] * 6

    def work(i: int) -> None:
        results[i] = [fm.sample(network, states[i], **kind)[0] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for state, got in zip(states, results, strict=True):
        expected = fm.sample(network, state, **kind, cuda_graph=False)[0]
        for samples in got:
            torch.testing.assert_close(samples, expected)


def test_captured_in_inference_mode_and_used_outside(kind: dict[str, Any]) -> None:
    network = Network().eval()
    with torch.inference_mode():
        assert hows(2, network, kind) == ["eager", "captured"]
    assert hows(1, network, kind) == ["replayed"]
    torch.testing.assert_close(
        fm.sample(network, X + 1.0, **kind)[0], fm.sample(network, X + 1.0, **kind, cuda_graph=False)[0]
    )


def test_an_exception_in_a_replay_lets_the_graph_go(kind: dict[str, Any]) -> None:
    fail = False

    class Failing(Network):
        def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
            if fail:
                raise KeyboardInterrupt
            return super().forward(x, t)

    network = Failing().eval()
    hows(2, network, kind)
    fail = True
    with pytest.raises(KeyboardInterrupt):
        fm.sample(network, X, **kind)
    fail = False
    assert hows(3, network, kind) == ["eager", "captured", "replayed"]


def test_graphs_are_bounded_for_one_model_and_in_bytes(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network().eval()
    names = ("solve_graph", "step_graph")
    for rows in range(1, 12):
        for _ in range(2):
            fm.sample(network, torch.zeros(rows, 2), **kind)
    entries = [e for name in names for e in _cache._CACHES[name].entries()]
    assert sum(e.value is not None for e in entries) == captures.MAX_GRAPHS
    for rows in range(20, 120):
        fm.sample(network, torch.zeros(rows, 2), **kind)
    assert sum(fm.cache_info()[name].entries for name in names) <= captures.MAX_KEYS
    fm.clear_caches()
    monkeypatch.setattr(_cache.DEVICE, "limit", 20_000)
    graphs = [fm.sample(network, torch.zeros(4096, 2), **kind)[1].graph for _ in range(3)]
    assert graphs[1:] == ["captured", "eager: the graph's memory exceeds FMKERNELS_GRAPH_MB"]


@pytest.mark.parametrize("noisy", ["sde", "dropout"])
@pytest.mark.parametrize("own", [False, True])
def test_a_captured_call_draws_what_an_eager_and_a_replayed_one_draw(
    kind: dict[str, Any], noisy: str, own: bool
) -> None:
    if noisy == "sde":
        if "steps" not in kind:
            return  # no noise in adaptive steps
        kind = {**kind, "method": "euler_maruyama"}
    network = Network().train(noisy == "dropout")

    def samples(**more: Any) -> tuple[Tensor, str]:
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(6) if own else None
        got, result = fm.sample(network, X, **kind, generator=generator, **more)
        return got, result.graph.split(":")[0]

    expected, _ = samples(cuda_graph=False)
    for how in ["eager", "captured", "replayed"] if not own else ["eager"]:
        got, was = samples()
        assert was == how
        torch.testing.assert_close(got, expected)


def test_a_generator_of_ones_own_draws_the_same_when_captured(kind: dict[str, Any]) -> None:
    if "steps" not in kind:
        return
    network, generator = Network().eval(), torch.Generator()
    expected = fm.sample(
        network, X, steps=3, method="euler_maruyama", generator=generator.manual_seed(6), cuda_graph=False
    )[0]
    for how in ("eager", "captured", "replayed"):
        got, result = fm.sample(network, X, steps=3, method="euler_maruyama", generator=generator.manual_seed(6))
        assert result.graph.split(":")[0] == how
        torch.testing.assert_close(got, expected)


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda v: v.sum().item(),
    "bool": lambda v: bool((v > 0).all()),
    "mask": lambda v: v[v > 0].sum(),
    "nonzero": lambda v: v.nonzero().sum(),
    "unique": lambda v: v.unique().sum(),
}


@pytest.mark.parametrize("read", READS)
def test_a_model_that_reads_values_is_never_captured(kind: dict[str, Any], read: str) -> None:
    """A capture that fails in the middle would leave the allocator damaged: it is not begun."""

    class Reading(Network):
        def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
            v = super().forward(x, t)
            READS[read](v)
            return v

    network = Reading().eval()
    expected = fm.sample(network, X, **kind, cuda_graph=False)[0]
    for _ in range(3):
        got, result = fm.sample(network, X, **kind)
        torch.testing.assert_close(got, expected)
        assert result.graph.startswith("eager")
    assert "reads values" in result.graph
    with pytest.raises(RuntimeError, match="reads values of cpu on the host"):
        fm.sample(network, X, **kind, cuda_graph=True)


def test_a_recording_that_fails_is_left_and_told(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(body: Callable[[], Tensor], *_: Any) -> Any:
        body()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    play(monkeypatch, failing)
    network = Network().eval()
    expected = fm.sample(network, X, **kind, cuda_graph=False)[0]
    for how in ["eager: a graph is captured", *["eager: the model cannot be captured: CUDA error: operation"] * 2]:
        got, result = fm.sample(network, X, **kind)
        assert result.graph.startswith(how)
        torch.testing.assert_close(got, expected)


class Cuda:
    """The calls of torch.cuda that a recording makes, in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
        self.calls: list[Any] = []
        cuda, note = torch.cuda, self.calls.append

        class Context:
            def __init__(self, *what: Any) -> None:
                self.what = what

            def __enter__(self) -> None:
                note(("enter", *self.what))

            def __exit__(self, *error: object) -> None:
                note(("exit", *self.what))
                if fails and self.what[0] == "graph":
                    raise RuntimeError("invalidated")

        graph = type(
            "Graph", (), {"replay": lambda self: None, "register_generator_state": lambda self, g: note("own")}
        )
        monkeypatch.setattr(cuda, "CUDAGraph", graph)
        monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (7, 0))
        monkeypatch.setattr(cuda, "current_stream", lambda device=None: ("stream of", device))
        monkeypatch.setattr(cuda, "device", lambda device: Context("device", device))
        monkeypatch.setattr(
            cuda,
            "graph",
            lambda graph, pool, stream, capture_error_mode: Context("graph", pool, stream, capture_error_mode),
        )
        monkeypatch.setattr(cuda, "set_stream", lambda stream: note(("set", stream)))
        monkeypatch.setattr(cuda, "synchronize", lambda device: note(("wait", device)))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *a: note(("end", *a)), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *a: note(("release", *a)), raising=False)


def test_a_recording_names_its_device_stream_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    cuda = Cuda(monkeypatch, fails=False)
    replay, result = captures.record(lambda: X, None, device, "side")
    assert result is X
    replay()
    graph = ("graph", (7, 0), "side", "thread_local")
    assert cuda.calls == [("enter", "device", device), ("enter", *graph), ("exit", *graph), ("exit", "device", device)]


def test_after_a_failed_recording_stream_and_memory_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    cuda = Cuda(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="invalidated"):
        captures.record(lambda: X, torch.Generator(), device, "side")
    assert cuda.calls[0] == "own"
    assert cuda.calls[-4:] == [
        ("set", ("stream of", device)),
        ("wait", device),
        ("end", 1, (7, 0)),
        ("release", 1, (7, 0)),
    ]


def test_statuses_are_copied_and_marked_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark belongs behind the copy, on the stream of the tensor's device, whatever the current device is."""
    from fmkernels.solvers.adaptive import compaction

    marks: list[Any] = []
    event = type("Event", (), {"record": lambda self, stream: marks.append(stream), "synchronize": lambda self: None})
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: real(*a, **k))
    monkeypatch.setattr(Tensor, "is_cuda", True)
    watch = compaction.Watch(1)
    count = torch.zeros(len(Count), 3, dtype=torch.int32)
    assert watch.look(count) is None
    assert marks == [("stream of", count.device)]
    assert torch.equal(watch.look(count), count[Count.STATUS])
