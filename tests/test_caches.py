"""What is kept between calls: complete keys, bounds, death with the owner, use in every mode, thread and process."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fmkernels as fm
from fmkernels import _cache
from fmkernels._keys import NoKey, key_of, key_or_none
from fmkernels.solvers.methods import registry
from fmkernels.solvers.methods.diffusion import DPMSolverPP

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)


def field_of(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    t = t.reshape(t.shape + (1,) * (x.dim() - t.dim())).to(x.dtype)
    v = torch.sin(3.0 * x) * (0.5 + t)
    return v if y is None else v + y.reshape(-1, *(1,) * (x.dim() - 1)).to(x.dtype)


@pytest.fixture(autouse=True)
def empty() -> None:
    fm.clear_caches()


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "values",
    [
        (1, 1.0, True, "1", np.float64(1.0), np.int64(1)),
        (0.0, -0.0, 0, False, None),
        ([1, 2], (1, 2), {1: 2}, {1, 2}, frozenset({1, 2})),
        (
            np.zeros(2),
            np.zeros((1, 2)),
            np.zeros(2, np.float32),
            torch.zeros(2),
            torch.zeros(1, 2),
            torch.zeros(2).double(),
        ),
        (torch.float32, torch.float64, torch.device("cpu"), "cpu"),
        (fm.paths.VP(), fm.paths.VP(0.2), fm.paths.VE(), fm.paths.CondOT(), fm.paths.Cosine()),
        (DPMSolverPP(2), DPMSolverPP(3), DPMSolverPP(2, lower_order_final=True)),
    ],
    ids=lambda values: str(values[0])[:20],
)
def test_keys_tell_apart_what_compares_equal(values: tuple[Any, ...]) -> None:
    keys = [key_of(value) for value in values]
    assert len(set(keys)) == len(keys)


def test_equal_values_have_one_key_until_one_is_changed() -> None:
    for make in (
        lambda: fm.paths.VP(0.3, 4.0),
        lambda: np.arange(3.0),
        lambda: torch.arange(3.0),
        lambda: [1.0, (2, "a")],
        lambda: registry.resolve("dopri5"),
        lambda: lambda t: 1.0 + t,
        lambda: float("nan"),
    ):
        assert key_of(make()) == key_of(make())
    path, array, tensor = fm.paths.VP(), np.arange(3.0), torch.arange(3.0)
    before = key_or_none(path, array, tensor)
    path.beta_max = 7.0
    array[0] = 1.0
    tensor.mul_(2.0)
    after = key_or_none(path, array, tensor)
    assert all(a != b for a, b in zip(before, after, strict=True))


W = 2.0


class Mine(fm.paths.Path):
    factor = 2.0

    def alpha(self, t: Tensor) -> Tensor:
        return t**self.factor

    def sigma(self, t: Tensor) -> Tensor:
        return 1.0 - t**self.factor


def test_what_may_change_unseen_has_no_key() -> None:
    w = 2.0

    def with_default(t: Tensor, scale: float = 2.0) -> Tensor:
        return scale * t

    for value in (
        lambda t: w * t,
        lambda t: W * t,
        lambda t: torch.rand(()),
        with_default,
        field_of,
        torch.nn.Linear(1, 1),
        Mine(),
        object(),
        fm.paths,
        torch.zeros(2, requires_grad=True),
        np.array([object()]),
        fm.SDE(lambda t: w * t),
        {"a": [Mine()]},
    ):
        with pytest.raises(NoKey):
            key_of(value)


# ---------------------------------------------------------------- settings that change


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def solve(**settings: Any) -> Tensor:
    torch.manual_seed(0)
    return fm.sample(field_of, X, **({"steps": 3} | settings))[0]


def test_a_path_changed_in_place_changes_the_samples() -> None:
    path = fm.paths.VP(0.1, 20.0)
    first = solve(path=path, prediction="x_1")
    path.beta_max = 5.0
    assert not same(first, solve(path=path, prediction="x_1"))
    assert same(solve(path=path, prediction="x_1"), solve(path=fm.paths.VP(0.1, 5.0), prediction="x_1"))


def test_a_path_of_ones_own_is_asked_again() -> None:
    first = solve(path=Mine(), prediction="x_1")
    Mine.factor = 3.0
    try:
        assert not same(first, solve(path=Mine(), prediction="x_1"))
    finally:
        Mine.factor = 2.0
    assert same(first, solve(path=Mine(), prediction="x_1"))


def test_functions_as_settings_are_called_again() -> None:
    scale = 2.0
    y = torch.arange(4.0)
    guidance = fm.guidance.CFG(lambda t: scale * t, negative={"y": 0.0})
    sde = fm.SDE(lambda t: scale * (1.0 - t))

    def schedule(n: int) -> np.ndarray:
        return np.linspace(0.0, 1.0, n + 1) ** scale

    def results() -> list[Tensor]:
        return [solve(guidance=guidance, y=y), solve(sde=sde), solve(method=sde), solve(schedule=schedule)]

    first = results()
    scale = 3.0
    assert not any(map(same, first, results()))
    scale = 2.0
    assert all(map(same, first, results()))


class Halved(fm.guidance.Guidance):
    """A rule of one's own that is no dataclass: two of them have no field to tell them apart."""

    def __init__(self, weight: float) -> None:
        object.__setattr__(self, "weight", weight)

    def branches(self, model: Any, model_kwargs: Any) -> Any:
        return {"": (model, model_kwargs)}

    def velocity(self, builder: Any, x: Any, t: Any) -> Any:
        return builder.evaluate(x, t) * self.weight


@dataclass(frozen=True, eq=False)
class Weighted(fm.guidance.Guidance):
    weight: float = field(compare=False)

    branches = Halved.branches
    velocity = Halved.velocity


@pytest.mark.parametrize("kind", [Halved, Weighted])
def test_guidance_of_ones_own_does_not_get_anothers_plan(kind: type) -> None:
    first, second = (solve(guidance=kind(w)) for w in (0.5, 0.25))
    assert not same(first, second)
    assert same(first, solve(guidance=kind(0.5)))


class Vouched(Halved):
    @property
    def plan_key(self) -> Any:
        return self.weight


def test_a_guidance_of_ones_own_may_give_its_key() -> None:
    results = [solve(guidance=Vouched(w)) for w in (0.5, 0.25, 0.5)]
    assert same(results[0], results[2])
    assert not same(results[0], results[1])
    assert fm.cache_info()["plan"].hits == 1


# ---------------------------------------------------------------- bounds and death


def test_info_tells_entries_bytes_hits_and_misses() -> None:
    assert fm.cache_info()["plan"] == fm.CacheInfo(0, 0, 0, 0, fm.cache_info()["plan"].limit)
    for _ in range(3):
        solve()
    info = fm.cache_info()
    assert (info["plan"].entries, info["plan"].hits, info["plan"].misses) == (1, 2, 1)
    assert info["plan"].bytes > 0
    assert info["numbers"].entries == 1
    assert info["cpu_pool"].limit > 0
    fm.clear_caches()
    assert all(kept.entries in (0, None) and kept.bytes == 0 for kept in fm.cache_info().values())


def test_a_budget_holds_and_the_least_recently_used_go() -> None:
    budget = _cache.Budget(10_000)
    cache: _cache.Cache[bytes] = _cache.Cache("test", budget)
    try:
        for i in range(100):
            cache.get(i, lambda: bytes(1000))
            cache.get(0, lambda: bytes(1000))
            assert budget.bytes <= budget.limit
        assert budget.bytes == sum(entry.bytes for entry in cache.entries())
        kept = {entry.key for entry in cache.entries()}
        assert 0 in kept
        assert 99 in kept
        assert len(kept) < 10
        cache.get("large", lambda: bytes(20_000))  # beyond all: not kept, and nothing else goes for it
        assert kept == {entry.key for entry in cache.entries()}
    finally:
        del _cache._CACHES["test"]


def test_entries_die_with_their_owner() -> None:
    cache: _cache.Cache[Tensor] = _cache.Cache("test")
    try:

        class Owner:
            pass

        owner = Owner()
        gone = weakref.ref(cache.get(id(owner), lambda: torch.zeros(3), [owner]))
        assert gone() is not None
        del owner
        gc.collect()
        assert gone() is None
        assert cache.info().entries == 0
    finally:
        del _cache._CACHES["test"]


# ---------------------------------------------------------------- threads, re-entrance, fork, modes


def test_one_solver_in_many_threads() -> None:
    barrier = threading.Barrier(4)

    def model(x: Tensor, t: Tensor) -> Tensor:
        if float(t[0]) == 0.0 and not barrier.broken:
            barrier.wait(10)  # all are within a solve
        return field_of(x, t)

    solver = fm.Solver(model, method="rk4", steps=4)
    states = [X + i for i in range(4)]
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        results[i] = solver.sample(states[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    barrier.abort()
    for state, result in zip(states, results, strict=True):
        assert same(result, fm.sample(field_of, state, method="rk4", steps=4)[0])


def test_a_solver_within_its_own_callback() -> None:
    solver = fm.Solver(field_of, method="rk4", steps=4)
    inner: list[Tensor] = []
    outer, _ = solver.sample(X, callback=lambda i, t, x: inner.append(solver.sample(X + 1.0)[0]))
    assert same(outer, solver.sample(X)[0])
    assert all(same(x, solver.sample(X + 1.0)[0]) for x in inner)


def test_a_network_that_writes_into_its_times() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return field_of(x, t.mul_(0.5))

    solver = fm.Solver(model, steps=4)
    expected = fm.sample(lambda x, t: field_of(x, 0.5 * t), X, steps=4)[0]
    for _ in range(3):
        assert same(solver.sample(X)[0], expected)


def test_an_exception_within_a_solve_leaves_nothing_behind() -> None:
    fail = True

    def model(x: Tensor, t: Tensor) -> Tensor:
        if fail and float(t[0]) > 0.4:
            raise KeyboardInterrupt
        return field_of(x, t)

    for method in ("rk4", "dopri5"):
        solver = fm.Solver(model, method=method, steps=4 if method == "rk4" else None)
        fail = True
        with pytest.raises(KeyboardInterrupt):
            solver.sample(X)
        fail = False
        clean = fm.Solver(field_of, method=method, steps=4 if method == "rk4" else None)
        for _ in range(2):
            assert same(solver.sample(X)[0], clean.sample(X)[0])


def poisons() -> dict[str, Any]:
    return {
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "fake": FakeTensorMode,
        "meta": lambda: torch.device("meta"),
    }


SOLVES = {
    "sample": lambda x: fm.sample(field_of, x, steps=4, method="heun2")[0],
    "prediction": lambda x: fm.sample(field_of, x, steps=4, prediction="x_1", path=fm.paths.VP())[0],
    "diffusion": lambda x: fm.sample(field_of, x, steps=4, method="unipc")[0],
    "sde": lambda x: fm.sample(field_of, x, steps=4, sde=fm.SDE(method="exponential", scale=0.0))[0],
    "log_prob": lambda x: fm.log_prob(field_of, x, steps=4, method="heun2").log_prob,
    "odeint": lambda x: fm.odeint(
        lambda t, y: field_of(y, t), x, torch.tensor([0.0, 0.5, 1.0], device="cpu"), method="rk4"
    ),
    "dopri5": lambda x: fm.sample(field_of, x, method="dopri5")[0],
}


@pytest.mark.parametrize("mode", poisons())
@pytest.mark.parametrize("name", SOLVES)
def test_use_in_a_mode_does_not_poison_what_follows(name: str, mode: str) -> None:
    expected = SOLVES[name](X)
    fm.clear_caches()
    with poisons()[mode]() as context:
        x = context.from_tensor(X) if mode == "fake" else X
        try:
            within = SOLVES[name](x)
        except (RuntimeError, NotImplementedError, TypeError):
            # values of tensors without values are asked for
            assert mode in ("fake", "meta")
            within = None
        if within is not None and mode != "fake":
            assert torch.equal(within.cpu(), expected)
    assert same(SOLVES[name](X), expected)
    with torch.inference_mode():
        assert same(SOLVES[name](X), expected)
    assert same(SOLVES[name](X.requires_grad_(False)), expected)


def test_the_default_dtype_changes_nothing() -> None:
    expected = {name: run(X) for name, run in SOLVES.items()}
    fm.clear_caches()
    torch.set_default_dtype(torch.float64)
    try:
        for name, run in SOLVES.items():
            assert same(run(X), expected[name]), name
    finally:
        torch.set_default_dtype(torch.float32)
    for name, run in SOLVES.items():
        assert same(run(X), expected[name]), name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_begins_with_nothing() -> None:
    expected = solve()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        good = fm.cache_info()["plan"].entries == 0 and not _cache._LOCK.locked() and same(solve(), expected)
        os.write(write, b"1" if good else b"0")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"1"
    os.close(read)
    os.close(write)
    assert same(solve(), expected)
    assert fm.cache_info()["plan"].hits == 1


# ---------------------------------------------------------------- attributes of a solver


CHANGES: dict[str, Any] = {
    "model": lambda x, t: -x,
    "steps": 5,
    "method": "rk4",
    "path": fm.paths.Cosine(),
    "prediction": "x_1",
    "guidance": fm.guidance.AutoGuidance(lambda x, t: -x, 2.0),
    "sde": fm.SDE(scale=0.5),
    "schedule": "cosine",
    "dtype": torch.float64,
    "time_dtype": torch.bfloat16,
    "gradient": "direct",
    "time_shape": "scalar",
}


@pytest.mark.parametrize("name", CHANGES)
def test_attributes_of_a_solver_that_are_changed_are_used(name: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((t.dtype, t.dim(), torch.is_grad_enabled()))
        return field_of(x, t)

    seen: list[Any] = []
    settings: dict[str, Any] = {"model": model, "steps": 3, "method": "euler", "prediction": "v"}
    solver = fm.Solver(**settings)

    def result(solver: fm.Solver) -> Any:
        seen.clear()
        torch.manual_seed(0)
        return solver.sample(X)[0].double().tolist(), list(seen)

    first = result(solver)
    setattr(solver, name, CHANGES[name])
    changed = result(solver)
    assert changed == result(fm.Solver(**(settings | {name: CHANGES[name]})))
    assert changed != first
    setattr(solver, name, getattr(fm.Solver(**settings), name))
    assert result(solver) == first


def test_a_solver_becomes_adaptive_and_back_and_is_checked() -> None:
    solver = fm.Solver(field_of, method="dopri5", steps=4)
    fixed, _ = solver.sample(X)
    solver.steps = None
    adaptive, result = solver.sample(X)
    assert result.status is not None
    solver.rtol = solver.atol = 1e-2
    assert not same(solver.sample(X)[0], adaptive)
    solver.time_grid = [0.0, 0.5]
    assert not same(solver.sample(X)[0], adaptive)
    solver.time_grid, solver.steps = None, 4
    assert same(solver.sample(X)[0], fixed)
    for name, value, message in (
        ("method", "rk5", "method"),
        ("steps", -1, "steps: expected an int >= 0"),
        ("path", 3, "path: expected a path"),
        ("gradient", "no", "gradient: expected one of"),
    ):
        before = getattr(solver, name)
        setattr(solver, name, value)
        with pytest.raises((TypeError, ValueError), match=message):
            solver.sample(X)
        setattr(solver, name, before)
    assert same(solver.sample(X)[0], fixed)


def test_times_changed_in_place_are_used() -> None:
    for grid in ([0.0, 0.5, 1.0], torch.tensor([0.0, 0.5, 1.0]), np.array([0.0, 0.5, 1.0])):
        solver = fm.Solver(field_of, time_grid=grid)
        first = solver.sample(X)[0]
        grid[1] = 0.25
        assert not same(solver.sample(X)[0], first)
        assert same(solver.sample(X)[0], fm.sample(field_of, X, time_grid=[0.0, 0.25, 1.0])[0])
