"""Batches of adaptive steps: independence of mates, compaction, memory, layouts, graphs, no waiting."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from adaptive_problems import DOPRI5, IMPLS, Prothero, columns, solve
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fmkernels.ops.step_control.op import Status
from fmkernels.solvers.adaptive.options import AdaptiveOptions
from fmkernels.solvers.adaptive.stepper import AdaptiveStep


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("compact", [True, False, 1.0])
def test_a_stiff_sample_changes_nobody(compact: bool | float) -> None:
    """Bitwise the same result and the same steps alone, among others, and beside a stiff sample."""
    problem = Prothero([1.0, 200.0, 0.3, 2.0, 0.05, 8.0, 1.5], dtype=torch.float32)
    together = problem.solve(tol=1e-4, compact=compact, t_eval=torch.linspace(0, 2, 5))
    assert together.n_steps[1] > 4 * together.n_steps[0]
    for i in range(7):
        rate, y0 = problem.rate[i : i + 1], problem.y0[i : i + 1]
        alone = solve(problem, y0, 0.0, 2.0, tol=1e-4, arguments={"rate": rate}, t_eval=torch.linspace(0, 2, 5))
        assert torch.equal(alone.y[0], together.y[i]), i
        assert torch.equal(alone.ys[:, 0], together.ys[:, i])
        assert alone.n_steps[0] == together.n_steps[i]
        assert alone.n_accepted[0] == together.n_accepted[i]


def test_compaction_saves_evaluations(impl: str) -> None:
    rates = [1.0] * 15 + [300.0]
    counts = {}
    for compact in (True, False):
        problem = Prothero(rates)
        result = problem.solve(tol=1e-6, compact=compact, impl=impl)
        assert problem.evaluations == result.n_row_evals
        counts[compact] = problem.evaluations
    useful = int(6 * result.n_steps.sum() + 2 * 16)
    assert counts[False] > 4 * useful
    assert counts[True] < 1.5 * useful


def test_compaction_keeps_each_samples_own_output_times(impl: str) -> None:
    """Samples that stay when others leave keep their times, their outputs' places and their counts."""
    problem = Prothero([1.0, 300.0, 0.5, 200.0, 2.0, 250.0])
    own = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)[:, None] * torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    want = torch.stack([torch.stack([problem.exact(float(t))[i] for t in row]) for i, row in enumerate(own)], 1)
    for compact in (True, False):
        result = problem.solve(tol=1e-7, compact=compact, t_eval=own, impl=impl)
        torch.testing.assert_close(result.ys, want, rtol=0.0, atol=1e-5)
        if compact:
            counts = result.n_steps, result.n_accepted
    assert torch.equal(counts[0], result.n_steps)
    assert torch.equal(counts[1], result.n_accepted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [False, True])
def test_state_dtypes(dtype: torch.dtype, shared: bool, impl: str) -> None:
    seen = set()

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.add((t.dtype, t.shape))
        return -y

    y0 = torch.linspace(0.5, 2.0, 12).reshape(3, 4).to(dtype)
    result = solve(func, y0, 0.0, 1.0, tol=1e-3, shared=shared, impl=impl)
    assert result.y.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.y.double(), y0.double() * math.exp(-1), rtol=8 * eps + 1e-3, atol=0)
    assert {t for t, _ in seen} == {torch.float64 if dtype is torch.float64 else torch.float32}


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4, 5)])
def test_shared_steps_take_any_shape(shape: tuple[int, ...], impl: str) -> None:
    y0 = torch.rand(shape, dtype=torch.float64) + 1.0
    shapes = set()

    def func(t: Tensor, y: Tensor) -> Tensor:
        shapes.add((t.shape, y.shape))
        return -y * t

    times = torch.tensor([0.0, 0.5, 1.0])
    result = solve(func, y0, 0.0, 1.0, tol=1e-9, shared=True, time_shape="scalar", t_eval=times, impl=impl)
    torch.testing.assert_close(result.y, y0 * math.exp(-0.5), rtol=5e-9, atol=0.0)
    torch.testing.assert_close(result.ys[1], y0 * math.exp(-0.125), rtol=1e-8, atol=0.0)
    assert shapes == {((), shape)}
    assert result.status.shape == (shape[0] if shape else 1,)


def test_channels_last_stays(impl: str) -> None:
    y0 = torch.rand(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    layouts = set()

    def func(t: Tensor, y: Tensor) -> Tensor:
        layouts.add(y.is_contiguous(memory_format=torch.channels_last))
        return -y

    for shared in (False, True):
        result = solve(func, y0, 0.0, 1.0, tol=1e-8, shared=shared, t_eval=torch.tensor([0.5, 1.0]), impl=impl)
        torch.testing.assert_close(result.y, y0 * math.exp(-1), rtol=2e-7, atol=0.0)
        torch.testing.assert_close(result.ys[0], y0 * math.exp(-0.5), rtol=5e-8, atol=0.0)
    assert layouts == {True}
    transposed = torch.rand(4, 3, dtype=torch.float64).t()
    result = solve(func := lambda t, y: (-y.t().contiguous()).t(), transposed, 0.0, 1.0, tol=1e-8, impl=impl)
    torch.testing.assert_close(result.y, transposed * math.exp(-1), rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("kind", ["input", "view", "buffer", "constant", "expanded", "requires_grad"])
def test_outputs_that_share_memory(kind: str, impl: str) -> None:
    """A model that returns its input, one buffer again and again, or a tensor of its own."""
    constant = torch.full((3, 4), -0.5, dtype=torch.float64)
    kept = constant.clone()
    buffer = torch.empty_like(constant)

    def func(t: Tensor, y: Tensor) -> Tensor:
        if kind == "input":
            return y
        if kind == "view":
            return y.view(-1).view(y.shape)
        if kind == "buffer":
            return torch.mul(y, columns(t, y), out=buffer[: y.shape[0]])
        if kind == "constant":
            return constant[: y.shape[0]]
        if kind == "expanded":
            return torch.ones((), dtype=y.dtype).expand(y.shape)
        with torch.enable_grad():
            return -(y.clone().requires_grad_() * 2).square() / 4

    y0 = torch.rand(3, 4, dtype=torch.float64) + 0.5
    first = y0.clone()
    result = solve(func, y0, 0.0, torch.tensor([0.5, 1.0, 1.5]), tol=1e-9, impl=impl)
    t = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)[:, None]
    want = {
        "input": y0 * torch.exp(t),
        "view": y0 * torch.exp(t),
        "buffer": y0 * torch.exp(t * t / 2),
        "constant": y0 - 0.5 * t,
        "expanded": y0 + t,
        "requires_grad": y0 / (1 + y0 * t),
    }[kind]
    torch.testing.assert_close(result.y, want, rtol=1e-7, atol=0)
    assert torch.equal(constant, kept)
    assert torch.equal(y0, first)


def test_recorded_steps_can_be_taken_again() -> None:
    problem = Prothero([0.5, 3.0])
    result = problem.solve(tol=1e-8, record=True)
    assert result.steps is not None
    assert len(result.steps) == int(result.n_accepted.max())
    for row in range(2):
        steps = [(float(t[row]), float(h[row])) for t, h in result.steps if h[row] != 0]
        assert len(steps) == int(result.n_accepted[row])
        assert steps[0][0] == 0.0
        for (t, h), (u, _) in itertools.pairwise(steps):
            assert u == t + h


def test_on_step_may_look_within_and_stop(impl: str) -> None:
    problem = Prothero([1.0, 2.0])
    checked = []

    def on_step(step: AdaptiveStep) -> bool:
        if step.accepted.all():
            middle = step.t + 0.5 * step.h
            want = (problem.y0 - 1) * torch.exp(-problem.rate * middle)[:, None] + torch.cos(middle)[:, None]
            checked.append(float((step.interpolate(middle) - want).abs().max()))
            torch.testing.assert_close(step.interpolate(step.t + step.h), step.y_new, rtol=1e-13, atol=1e-13)
        return bool((step.t > 0.5).any())

    result = problem.solve(tol=1e-8, on_step=on_step, impl=impl)
    assert max(checked) < 1e-6
    assert (result.status == Status.RUNNING).all()
    assert (result.t < 2.0).all()


class NoSync(TorchDispatchMode):
    """Fails on operators that make the host wait for a GPU."""

    BAD = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        assert name not in self.BAD, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shared", [False, True])
def test_steps_do_not_make_the_host_wait(shared: bool) -> None:
    from fmkernels.ops.step_control.op import new_state
    from fmkernels.solvers.adaptive.rows import Batch
    from fmkernels.solvers.adaptive.solve import _dense
    from fmkernels.solvers.adaptive.stepper import Stepper

    problem = Prothero([1.0, 40.0])
    start = torch.zeros(1 if shared else 2, dtype=torch.float64)
    dense = _dense(torch.linspace(0, 1, 5), start, start + 1.0, problem.y0)
    options = AdaptiveOptions(shared=shared, impl="reference")
    batch = Batch(problem.y0.clone(), *new_state(start, start + 1.0), {"rate": problem.rate}, dense)
    with torch.no_grad(), NoSync():
        stepper = Stepper(options.problem(problem, DOPRI5, torch.float64), batch)
        stepper.begin(None)
        for _ in range(16):
            stepper.step()
    assert (batch.count[1] > 0).all()


def test_only_what_belongs_to_samples_follows_them(impl: str) -> None:
    """Also where a shared tensor has as many rows as a batch that has shrunk."""
    rates = torch.tensor([1.0] * 5 + [50.0, 60.0, 500.0], dtype=torch.float64)
    shared = torch.ones(2, dtype=torch.float64)

    def func(t: Tensor, y: Tensor, condition: dict[str, Any], shared: Tensor) -> Tensor:
        assert shared.shape == (2,)
        assert condition["deep"][0].shape == (y.shape[0],)
        return -condition["deep"][0][:, None] * (y - shared.mean())

    kwargs = {"condition": {"deep": [rates], "name": "x"}, "shared": shared}
    y0 = torch.rand(8, 3, dtype=torch.float64)
    result = solve(func, y0, 0.0, 1.0, tol=1e-6, arguments=kwargs, follow=["condition"], impl=impl)
    torch.testing.assert_close(result.y, 1 + (y0 - 1) * torch.exp(-rates)[:, None], rtol=0, atol=1e-5)


@pytest.mark.skipif("auto" not in IMPLS, reason="there is no compiled library")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_first_steps_compiled_and_reference(shared: bool, backward: bool) -> None:
    """Hairer's rule, also where the field is zero, huge, or not finite at one of its two evaluations."""
    from fmkernels.ops.step_control.op import Clock, Count, new_state
    from fmkernels.solvers.adaptive.native_stepper import NativeStepper
    from fmkernels.solvers.adaptive.rows import Batch
    from fmkernels.solvers.adaptive.stepper import Stepper

    kind = torch.arange(9)

    def func(t: Tensor, y: Tensor, kind: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 0.0, 1e30, 1e-30, math.nan, math.inf, 1.0, 1.0, 30.0], dtype=torch.float64)
        late = torch.where((kind == 6) & (t != 0), math.nan, torch.where((kind == 7) & (t != 0), math.inf, 1.0))
        return scale[kind][:, None] * late[:, None] * y.sin()

    for row in ([0], [1], [2], [3], [4], [5], [6], [7], [8]) if shared else [list(range(9))]:
        y0 = torch.rand(len(row), 5, dtype=torch.float64) * torch.tensor([1.0, 1e-9]).repeat(5)[: len(row), None] + 0.1
        start = torch.zeros(1 if shared else len(row), dtype=torch.float64)
        options = AdaptiveOptions(shared=shared)
        states = []
        for made in (Stepper, NativeStepper):
            batch = Batch(y0.clone(), *new_state(start, start + (-1.0 if backward else 1.0)), {"kind": kind[row]})
            with torch.no_grad():
                assert made(options.problem(func, DOPRI5, torch.float64), batch).begin(None) == 2
            states.append(batch)
        a, b = states
        torch.testing.assert_close(a.clock[Clock.H], b.clock[Clock.H], rtol=1e-13, atol=0.0)
        assert torch.equal(a.count, b.count)
        bad = [kind in (4, 5) for kind in row]
        assert (a.count[Count.STATUS] == Status.NON_FINITE).tolist() == ([any(bad)] if shared else bad)
        assert (torch.sign(a.clock[Clock.H][~torch.tensor(bad)]) == (-1 if backward else 1)).all()


@pytest.mark.parametrize("shared", [False, True])
def test_captured_steps_serve_other_data(shared: bool, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's replay is played by calling the captured function again: same buffers, no Python state in between."""
    from fmkernels.solvers.adaptive import step_graph as adaptive_graph
    from fmkernels.solvers.adaptive.step_graph import StepGraph
    from fmkernels.solvers.programs import captures as programs_captures

    captures = []

    def record(body: Any, *_: Any) -> tuple[Any, Any]:
        captures.append(body)
        return body, body()

    monkeypatch.setattr(programs_captures, "record", record)
    monkeypatch.setattr(adaptive_graph, "can_capture", lambda y: True)
    hows = []
    owner = Prothero([1.0])
    for rates in ([1.0, 5.0, 0.2], [2.0, 0.1, 7.0], [3.0, 3.0, 3.0], [1.0, 2.0]):
        problem = Prothero(rates)
        problem.y0 = problem.y0 * rates[0]
        for times in (None, torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)):
            common = {"tol": 1e-6, "shared": shared, "impl": impl, "t_eval": times}
            want = problem.solve(**common, compact=False)
            got = problem.solve(**common, graph=StepGraph(owner, "f"))
            hows.append(got.graph)
            assert torch.equal(got.y, want.y)
            assert torch.equal(got.n_steps, want.n_steps)
            assert torch.equal(got.status, want.status)
            assert times is None or torch.equal(got.ys, want.ys)
    second = "eager: a graph is captured at the second call"
    assert hows == [second, second, "captured", "captured", "replayed", "replayed", second, second]
    assert len(captures) == 2
    monkeypatch.undo()
    assert owner.solve(graph=StepGraph(owner)).graph == "eager"
    with pytest.raises(ValueError, match="cuda_graph: expected a state on a CUDA device"):
        owner.solve(graph=StepGraph(owner, mode=True))
