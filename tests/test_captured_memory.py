"""What captured graphs read and write is alive as long as they are: by a stand-in that knows memory by weak references
and nothing of the body (tests/graph_stand_in.py)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import graph_stand_in
import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels import _cache
from fmkernels.solvers.adaptive import step_graph
from fmkernels.solvers.methods.registry import METHODS
from fmkernels.solvers.programs import captures

ROWS = 4
FIXED = [e.name for e in METHODS.values() if e.kind in ("fixed", "sde")]
ADAPTIVE = [e.name for e in METHODS.values() if e.kind == "adaptive"]
CACHES = ("solve_graph", "step_graph")


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        v = self.linear(x).tanh() + t[:, None].to(x.dtype)
        return v if y is None else v + y.reshape(-1, 1)


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fm.clear_caches()
    monkeypatch.setattr(fm.Solver, "_graph_refusal", lambda self, *_: "eager" if self.cuda_graph is False else None)
    monkeypatch.setattr(step_graph, "can_capture", lambda y: True)
    with graph_stand_in.played():
        yield
    fm.clear_caches()


def states(count: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, 2, generator=rng) for _ in range(count)]


def how(network: Any, x: Tensor, **settings: Any) -> tuple[Tensor, str]:
    got, result = fm.sample(network, x, **settings)
    return got, result.graph.split(":")[0]


def settings_of(method: str) -> dict[str, Any]:
    path = {"path": fm.paths.CondOT()} if METHODS[method].needs or METHODS[method].kind == "sde" else {}
    return {"method": method, "steps": 3, **path}


def check(network: Any, settings: dict[str, Any], **more: Any) -> None:
    """Eager, captured and replayed calls on new states each, with garbage in all memory that was freed between."""
    hows = []
    for x in states(4):
        torch.manual_seed(5)
        got, was = how(network, x, **settings, **more)
        torch.manual_seed(5)
        expected = fm.sample(network, x, **settings, **more, cuda_graph=False)[0]
        torch.testing.assert_close(got, expected)
        hows.append(was)
        gc.collect()
    assert hows == ["eager", "captured", "replayed", "replayed"]
    (graph,) = (alive for ref in graph_stand_in.GRAPHS if (alive := ref()) is not None)
    assert graph.work
    assert all(memory.alive for memory in graph.memories.values()), "the graph reads or writes what has been freed"


@pytest.mark.parametrize("method", FIXED)
def test_fixed_solves(method: str) -> None:
    check(Network().eval(), settings_of(method))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_steps(method: str) -> None:
    check(Network().eval(), {"method": method})


def test_arguments_and_guidance() -> None:
    y, null = torch.arange(float(ROWS)), torch.zeros(ROWS)
    network = Network().eval()
    for settings in (settings_of("heun2"), {"method": "bosh3"}):
        for guidance in (None, fm.guidance.CFG(2.0, negative={"y": null}), fm.guidance.AutoGuidance(network, 2.0)):
            fm.clear_caches()
            graph_stand_in.GRAPHS.clear()
            check(network, settings, **({} if guidance is None else {"guidance": guidance}), y=y)


def test_inputs_of_a_call_are_read_at_that_call_alone() -> None:
    """The state and the arguments of the capturing call may die."""
    network = Network().eval()
    for x in states(4):
        y = torch.rand(ROWS)
        got, _ = how(network, x, **settings_of("rk4"), y=y)
        torch.testing.assert_close(got, fm.sample(network, x, **settings_of("rk4"), y=y, cuda_graph=False)[0])
        del x, y, got
        gc.collect()


def test_other_numbers_and_states_change_nothing_that_others_read() -> None:
    """A graph's tables and inputs are its own: it takes another schedule's numbers, and the next state, over them."""
    one, other, inputs = Network().eval(), Network().eval(), states(6)
    before = [x.clone() for x in inputs]
    grids = [torch.tensor([0.0, 0.2, 1.0]), torch.tensor([0.0, 0.7, 1.0])]
    turns = [(one, 0), (one, 0), (one, 1), (other, 0), (other, 0), (other, 1)]
    hows = []
    for x, (network, grid) in zip(inputs, turns, strict=True):
        got, was = how(network, x, method="rk4", time_grid=grids[grid])
        expected = fm.sample(network, x, method="rk4", time_grid=grids[grid], cuda_graph=False)[0]
        torch.testing.assert_close(got, expected)
        hows.append(was)
    assert hows == ["eager", "captured", "replayed"] * 2
    for x, was_before in zip(inputs, before, strict=True):
        assert torch.equal(x, was_before)


def test_the_stand_in_sees_memory_that_dies() -> None:
    def with_a_buffer_of_its_own() -> tuple[Callable[[], None], Tensor]:
        buffer, x = torch.zeros(3), torch.ones(3)
        kept.append(x)
        return graph_stand_in.record(lambda: buffer.add_(x).clone(), None, torch.device("cpu"), None)

    kept: list[Tensor] = []
    replay, _ = with_a_buffer_of_its_own()
    with pytest.raises(graph_stand_in.Dead):
        replay()

    buffer = torch.zeros(3)
    replay, result = graph_stand_in.record(lambda: (buffer.add_(1.0) * 2.0) + 1.0, None, buffer.device, None)
    before = result.clone()
    replay()
    assert torch.equal(result, before + 2.0)  # temporaries are the graph's own


@pytest.mark.parametrize("settings", [settings_of("heun3"), {"method": "dopri5"}], ids=["solve", "steps"])
def test_the_model_dies_with_its_owner(settings: dict[str, Any]) -> None:
    network = Network().eval()
    function = Wrapper(network)
    check(function, settings)
    gone = weakref.ref(network), weakref.ref(function)
    del function
    gc.collect()
    assert gone[1]() is None
    assert sum(fm.cache_info()[name].entries for name in CACHES) == 0
    del network
    gc.collect()
    assert gone[0]() is None
    assert all(ref() is None for ref in graph_stand_in.GRAPHS)


# ---------------------------------------------------------------------- keys


class Wrapper:
    def __init__(self, network: Network) -> None:
        self.network = network

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t)

    __call__ = velocity


_NETWORK = Network()


def by_global(x: Tensor, t: Tensor) -> Tensor:
    return _NETWORK(x, t)


def called(network: Network, x: Tensor, t: Tensor) -> Tensor:
    return network(x, t)


OWNERS: dict[str, Callable[[Network], Any]] = {
    "module": lambda network: network,
    "method": lambda network: network.forward,
    "closure": lambda network: lambda x, t: network(x, t),
    "nested": lambda network: (lambda inner: lambda x, t: inner(x, t))(lambda x, t: network(x, t)),
    "default": lambda network: lambda x, t, _network=network: _network(x, t),
    "partial": lambda network: __import__("functools").partial(called, network),
    "object": Wrapper,
    "method of an object": lambda network: Wrapper(network).velocity,
    "global": lambda network: by_global,
}


def switched(network: Network) -> None:
    network.train()


def moved(network: Network) -> None:
    network.linear.weight.data = network.linear.weight.detach().clone()


@pytest.mark.parametrize("change", [switched, moved])
@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("settings", [settings_of("heun2"), {"method": "bosh3"}], ids=["solve", "steps"])
def test_modes_and_addresses_of_whatever_a_model_reads_are_part_of_the_key(
    settings: dict[str, Any], owner: str, change: Callable[[Network], None]
) -> None:
    network = _NETWORK if owner == "global" else Network()
    model = OWNERS[owner](network.eval())
    assert [how(model, x, **settings)[1] for x in states(3)] == ["eager", "captured", "replayed"]
    change(network)
    assert how(model, states(1)[0], **settings)[1] == "eager"
    check_again = [how(model, x, **settings)[1] for x in states(2)]
    assert check_again == ["captured", "replayed"]


def test_a_tensor_that_a_function_closes_over_is_part_of_the_key() -> None:
    shift = torch.ones(2)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return shift - x

    settings = settings_of("euler")
    assert [how(model, x, **settings)[1] for x in states(3)] == ["eager", "captured", "replayed"]
    shift = torch.zeros(2)
    x = states(1)[0]
    got, was = how(model, x, **settings)
    assert was == "eager"
    torch.testing.assert_close(got, fm.sample(model, x, **settings, cuda_graph=False)[0])
    shift.add_(1.0)  # where it lies
    assert [how(model, x, **settings)[1] for x in states(2)] == ["captured", "replayed"]


def test_what_is_read_is_found_in_bounded_work() -> None:
    network, data = Network(), list(range(10**6))
    ring: list[Any] = [network]
    ring.append(ring)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return ring[0](x, t) if data else x

    owners: list[Any] = []
    state = captures.state_of(model, owners)
    assert owners == [network]
    assert captures.state_of(model, []) == state


# ---------------------------------------------------------------------- streams and threads


def writes(graph: graph_stand_in.Graph, memory: graph_stand_in.Memory) -> bool:
    """Whether a replay writes there: to its own, or to what the calls share."""
    return memory.address != 0 and (memory.own is not None or id(memory) in graph.written)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current stream's handle, as tensors on a GPU would have it."""
    current = [1]
    real_surroundings = captures.surroundings
    for module in (step_graph, __import__("fmkernels.solvers.programs.solve_graph", fromlist=[""])):
        monkeypatch.setattr(module, "surroundings", lambda device: (real_surroundings(device), current[0]))
    return current


@pytest.mark.parametrize("settings", [settings_of("heun2"), {"method": "bosh3"}], ids=["solve", "steps"])
def test_streams_share_no_memory(settings: dict[str, Any], stream: list[int]) -> None:
    """What one stream's graph writes, another's neither reads nor writes."""
    network, y = Network().eval(), torch.rand(ROWS)
    for number in (1, 2):
        stream[0] = number
        assert [how(network, x, **settings, y=y)[1] for x in states(3)] == ["eager", "captured", "replayed"]
    first, second = (ref() for ref in graph_stand_in.GRAPHS)
    assert first is not None
    assert second is not None
    for one, other in ((first, second), (second, first)):
        written = {memory.address for memory in one.memories.values() if writes(one, memory)}
        assert written
        assert not written & {memory.address for memory in other.memories.values() if memory.address}
    entries = [entry for name in CACHES for entry in _cache._CACHES[name].entries()]
    assert len(entries) == 2


def test_the_stream_and_device_are_part_of_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmkernels.solvers.programs import tables

    streams = {0: 10, 1: 20}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d=None: type("S", (), {"cuda_stream": streams[d.index]})())
    devices = [torch.device("cuda", i) for i in (0, 1)]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    keys = [captures.surroundings(d) for d in devices]
    assert keys[0] != keys[1]
    streams[0] = 11
    assert captures.surroundings(devices[0]) != keys[0]

    class State:
        is_cuda, device = True, devices[0]

    place = tables.place(State())  # type: ignore[arg-type]
    streams[0] = 12
    assert tables.place(State()) != place  # type: ignore[arg-type]


@pytest.mark.parametrize("cached", [False, True])
def test_two_solves_at_a_time_share_no_memory(cached: bool) -> None:
    """A solve that begins within another one's network call, as another thread's would: all that a run lends or writes
    is its own."""
    lent: dict[int, set[int]] = {0: set(), 1: set()}
    alive: list[Tensor] = []
    level = [0]
    network = Network().eval()

    def model(x: Tensor, t: Tensor) -> Tensor:
        lent[level[0]] |= {x.untyped_storage().data_ptr(), t.untyped_storage().data_ptr()}
        alive.extend((x, t))
        if level[0] == 0:
            level[0] = 1
            fm.sample(model, x.clone(), **settings, cuda_graph=False)
            level[0] = 0
        return network(x, t)

    for settings in (settings_of("heun2"), settings_of("ab2"), {"method": "dopri5"}):
        for _ in range(2 if cached else 1):
            lent[0].clear(), lent[1].clear()
            fm.sample(model, states(1)[0], **settings, cuda_graph=False)
            assert lent[1]
            assert not lent[0] & lent[1]
