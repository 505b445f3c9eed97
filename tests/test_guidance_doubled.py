"""Guided steps whose two branches are one call on a buffer that holds the state twice: whatever the network does with
what it is handed, the samples are those of two calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels.solvers.programs import run

B, D = 5, 3


class Field:
    """A network with y; each is a way of returning an output."""

    def __init__(self, way: str) -> None:
        self.way, self.kept, self.buffer = way, [], None

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        v = (3.0 * x).sin() * (1.0 + t.to(x.dtype)[:, None]) + y[:, None].to(x.dtype)
        if self.way == "input":  # what it was handed, written to
            return x.copy_(v)
        if self.way == "writes":
            x.zero_()
        if self.way == "static":
            if self.buffer is None or self.buffer.shape != v.shape:
                self.buffer = torch.empty_like(v)
            return self.buffer.copy_(v)
        if self.way == "transposed":
            return v.t().contiguous().t()
        if self.way == "wide":
            return v.double()
        if self.way == "negative":
            return torch._neg_view(-v)
        if self.way == "strided":
            return torch.stack([v, v], 1)[:, 0]
        return v


def solve(way: str, batched: Any, **options: Any) -> Any:
    x_0 = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
    guidance = fm.guidance.CFG(2.0, negative={"y": 0.0}, batched=batched)
    steps = {} if "time_grid" in options else {"steps": 7}
    return fm.sample(Field(way), x_0, guidance=guidance, y=torch.linspace(-1, 1, B), **steps, **options)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", ["plain", "input", "writes", "static", "transposed", "wide", "negative", "strided"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "ddim", "ab2"])
def test_samples_are_those_of_two_calls(method: str, way: str, no_grad: Callable[[], Any]) -> None:
    with no_grad():
        expected, _ = solve("plain", False, method=method)
        found, _ = solve(way, ["y"], method=method)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_network_that_returns_the_state_itself() -> None:
    def identity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x

    x_0 = torch.randn(B, D)
    guidance = fm.guidance.CFG(2.0, negative={"y": 0.0}, batched=["y"])
    found, _ = fm.sample(identity, x_0, steps=10, method="euler", guidance=guidance, y=torch.zeros(B))
    torch.testing.assert_close(found, x_0 * 1.1**10)


def test_a_network_that_begins_to_write_later_is_told() -> None:
    calls = 0

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.mul_(0.5) if calls == 3 else -x

    guidance = fm.guidance.CFG(2.0, negative={"y": 0.0}, batched=["y"])
    with pytest.raises(ValueError, match="model: expected a function that leaves its input as it is"):
        fm.sample(network, torch.randn(B, D), steps=6, method="euler", guidance=guidance, y=torch.zeros(B))


def test_an_output_of_another_shape_is_told_at_any_step() -> None:
    calls = 0

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x[:, :1] if calls == 3 else -x

    guidance = fm.guidance.CFG(2.0, negative={"y": 0.0}, batched=["y"])
    with pytest.raises(ValueError, match=r"model: .*shape"):
        fm.sample(network, torch.randn(B, D), steps=6, method="euler", guidance=guidance, y=torch.zeros(B))


@pytest.mark.parametrize("steps", [1, 2, 300, 513])  # beyond one chunk of a loop
@pytest.mark.parametrize("time_shape", ["batch", "scalar"])
def test_any_number_of_steps_and_form_of_times(steps: int, time_shape: str) -> None:
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == (() if time_shape == "scalar" else x.shape[:1])
        return y[:, None] - x * (t if t.dim() == 0 else t[:, None])

    x_0, y = torch.randn(B, D), torch.linspace(-1, 1, B)
    found = []
    for batched in (False, ["y"]):
        guidance = fm.guidance.CFG(2.0, negative={"y": 0.0}, batched=batched)
        solver = fm.Solver(network, method="euler", steps=steps, guidance=guidance, time_shape=time_shape)
        found += [solver.sample(x_0, y=y)[0] for _ in range(2)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(B,), (B, D), (1, 1), (300, 7)])
def test_times_of_each_sample_and_states_of_any_shape(shape: tuple[int, ...]) -> None:
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        column = (...,) + (None,) * (x.dim() - 1)
        return y[column] - x * t[column]

    x_0, y = torch.randn(shape), torch.linspace(-1, 1, shape[0])
    ends = torch.linspace(0.6, 1.0, shape[0])
    for grid in (None, torch.linspace(0, 1, 6)[:, None] * ends):
        options = {"steps": 5} if grid is None else {"time_grid": grid}
        apart, joined = (
            fm.sample(
                network,
                x_0,
                method="euler",
                guidance=fm.guidance.CFG(2.0, negative={"y": 0.0}, batched=b),
                y=y,
                **options,
            )[0]
            for b in (False, ["y"])
        )
        torch.testing.assert_close(joined, apart, rtol=1e-5, atol=1e-6)


def test_states_and_trajectories_that_were_handed_out_stay() -> None:
    _, plain = solve("plain", False, method="euler", return_trajectory=True)
    _, result = solve("plain", ["y"], method="euler", return_trajectory=True)
    torch.testing.assert_close(result.trajectory, plain.trajectory, rtol=1e-5, atol=1e-6)
    seen: list[Tensor] = []
    solve("plain", ["y"], method="euler", callback=lambda i, t, x: seen.append(x))
    torch.testing.assert_close(torch.stack(seen), plain.trajectory[1:], rtol=1e-5, atol=1e-6)


def test_a_sample_does_not_keep_the_memory_of_two() -> None:
    found, _ = solve("plain", ["y"], method="euler")
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()
    assert found._base is None


def test_the_two_calls_are_one_on_the_state_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[bool] = []
    call = run.Run._call_on_all

    def watched(*args: Any) -> bool:
        done.append(call(*args))
        return done[-1]

    monkeypatch.setattr(run.Run, "_call_on_all", watched)
    solve("plain", ["y"], method="euler")
    assert done == [True] * 6  # all but the first
    done.clear()
    solve("writes", ["y"], method="euler")
    assert done == [False] * 6


def test_a_table_of_times_that_the_network_wrote_to_is_made_again() -> None:
    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        v = y[:, None] - x * t[:, None]
        t.zero_()
        return v

    x_0, y = torch.randn(B, D), torch.linspace(-1, 1, B)
    guidance = fm.guidance.CFG(2.0, negative={"y": 0.0}, batched=["y"])
    solver = fm.Solver(network, method="euler", steps=4, guidance=guidance)
    first, second = (solver.sample(x_0, y=y)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
