"""Adaptive steps: accuracy, control, independence of batch mates, status, dense output, compaction."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fmkernels import _dispatch
from fmkernels.solvers.adaptive import AdaptiveOptions, AdaptiveResult, AdaptiveStep, Status, solve_adaptive
from fmkernels.solvers.controllers import Controller, IController, PIController, PIDController
from fmkernels.solvers.tableaus import TABLEAUS, Tableau

ADAPTIVE = [tableau for tableau in TABLEAUS.values() if tableau.error is not None]
CONTROLLERS = [IController(), PIController(), PIDController()]
IMPLS = ["reference"] + (["auto"] if _dispatch.unavailable("native", "cpu") is None else [])
DOPRI5 = TABLEAUS["dopri5"]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def solve(func: Any, y0: Tensor, t0: Any, t1: Any, tableau: Tableau = DOPRI5, **options: Any) -> AdaptiveResult:
    outer = {k: options.pop(k) for k in ("t_eval", "model_kwargs", "on_step", "norm") if k in options}
    if "tol" in options:
        options["rtol"] = options["atol"] = options.pop("tol")
    return solve_adaptive(func, y0, t0, t1, tableau, AdaptiveOptions(**options), **outer)


def columns(t: Tensor, y: Tensor) -> Tensor:
    return t.reshape(t.shape + (1,) * (y.dim() - t.dim()))


class Prothero:
    """y' = -rate (y - cos t) - sin t, with a rate for each sample: y = (y0 - 1) exp(-rate t) + cos t from t = 0."""

    def __init__(self, rates: list[float], dtype: torch.dtype = torch.float64) -> None:
        self.rate = torch.tensor(rates, dtype=dtype)
        self.y0 = torch.linspace(-1.0, 2.0, 3 * len(rates), dtype=dtype).reshape(len(rates), 3)
        self.evaluations = 0

    def __call__(self, t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        self.evaluations += y.shape[0]
        t = columns(t, y).to(y.dtype)
        return -rate[:, None] * (y - torch.cos(t)) - torch.sin(t)

    def exact(self, t: float) -> Tensor:
        return (self.y0 - 1.0) * torch.exp(-self.rate * t)[:, None] + math.cos(t)

    def solve(self, t1: float = 2.0, tableau: Tableau = DOPRI5, **options: Any) -> AdaptiveResult:
        return solve(self, self.y0, 0.0, t1, tableau, model_kwargs={"rate": self.rate}, **options)


@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("tableau", ADAPTIVE, ids=lambda t: t.name)
def test_error_follows_the_tolerance(tableau: Tableau, controller: Controller, impl: str) -> None:
    problem = Prothero([-0.5, 0.3, 1.0])
    end = 2.0 if tableau.order < 5 else 8.0
    tolerances = {2: [1e-4, 1e-5, 1e-6], 8: [1e-5, 1e-8, 1e-11]}.get(tableau.order, [1e-5, 1e-7, 1e-9])
    errors = []
    for tol in tolerances:
        result = problem.solve(end, tableau=tableau, tol=tol, controller=controller, impl=impl)
        assert (result.status == Status.SUCCESS).all()
        assert (result.t == end).all()
        errors.append(float((result.y - problem.exact(end)).abs().max()))
    slope = math.log(errors[0] / errors[-1]) / math.log(tolerances[0] / tolerances[-1])
    assert 0.7 < slope < 1.4, errors
    assert errors[0] > errors[1] > errors[2], errors
    # Fehlberg's RKF 1(2) has an estimate with weights of 1/512: the solution is that much worse than it says
    assert errors[-1] < (3000 if tableau.name == "fehlberg2" else 300) * tolerances[-1], errors


@pytest.mark.parametrize("shared", [False, True])
def test_backward_time(shared: bool, impl: str) -> None:
    problem = Prothero([0.5, 1.0])
    end = problem.solve(tol=1e-10, impl=impl, shared=shared)
    back = solve(problem, end.y, 2.0, 0.0, tol=1e-10, impl=impl, shared=shared, model_kwargs={"rate": problem.rate})
    torch.testing.assert_close(back.y, problem.y0, rtol=0, atol=1e-7)
    assert (back.t == 0.0).all()


def test_opposite_directions_and_intervals_in_one_batch(impl: str) -> None:
    y0 = torch.tensor([[1.0, 2.0], [1.0, 3.0], [2.0, 1.0], [4.0, 5.0]], dtype=torch.float64)
    t0 = torch.tensor([0.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    t1 = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    result = solve(lambda t, y: y * torch.cos(columns(t, y)), y0, t0, t1, tol=1e-9, impl=impl)
    want = y0 * torch.exp(torch.sin(t1) - torch.sin(t0))[:, None]
    torch.testing.assert_close(result.y, want, rtol=1e-7, atol=0)
    assert torch.equal(result.t, t1)
    assert result.n_steps[3] == 0
    assert torch.equal(result.y[3], y0[3])


@pytest.mark.parametrize("compact", [True, False, 1.0])
def test_a_stiff_sample_changes_nobody(compact: bool | float) -> None:
    """Bitwise the same result and the same steps alone, among others, and beside a stiff sample."""
    problem = Prothero([1.0, 200.0, 0.3, 2.0, 0.05, 8.0, 1.5], dtype=torch.float32)
    together = problem.solve(tol=1e-4, compact=compact, t_eval=torch.linspace(0, 2, 5))
    assert together.n_steps[1] > 4 * together.n_steps[0]
    for i in range(7):
        rate, y0 = problem.rate[i : i + 1], problem.y0[i : i + 1]
        alone = solve(problem, y0, 0.0, 2.0, tol=1e-4, model_kwargs={"rate": rate}, t_eval=torch.linspace(0, 2, 5))
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


def test_a_rejected_step_is_tried_again_from_the_same_place(impl: str) -> None:
    steps: list[tuple[float, float, bool]] = []
    states: list[Tensor] = []

    def on_step(step: AdaptiveStep) -> None:
        steps.append((float(step.t[0]), float(step.h[0]), bool(step.accepted[0])))
        states.append(step.y.clone())

    problem = Prothero([3.0])
    problem.solve(tol=1e-8, first_step=1.0, on_step=on_step, impl=impl)
    assert not steps[0][2]
    for (t, h, accepted), (u, g, _), y, z in zip(steps, steps[1:], states, states[1:], strict=False):
        assert u == (t + h if accepted else t)
        assert accepted or abs(g) <= 0.9 * abs(h)
        assert accepted or torch.equal(y, z)


def test_finished_rows_are_frozen(impl: str) -> None:
    """A field that becomes NaN beyond a sample's end does not reach it."""
    y0 = torch.ones(3, 2, dtype=torch.float64)
    t1 = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)
    calls: list[Tensor] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t.clone())
        return -y

    result = solve(func, y0, 0.0, t1, tol=1e-8, compact=False, impl=impl)
    torch.testing.assert_close(result.y, torch.exp(-t1)[:, None].expand(3, 2), rtol=0, atol=1e-7)
    assert all((t <= t1 + 1e-12).all() for t in calls)
    assert torch.equal(calls[-1][:1], t1[:1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first_step", [None, 0.1])
def test_values_that_are_not_finite_end_in_a_status(bad: float, first_step: float | None, impl: str) -> None:
    def func(t: Tensor, y: Tensor, poison: Tensor) -> Tensor:
        late = (columns(t, y) > 0.5) | (poison[:, None] == 2)
        return torch.where(late & (poison[:, None] > 0), bad, -y)

    poison = torch.tensor([0, 1, 2])
    with pytest.warns(UserWarning, match="2 of 3 rows of the batch met values that are not finite"):
        result = solve(
            func,
            torch.ones(3, 2, dtype=torch.float64),
            0.0,
            1.0,
            tol=1e-6,
            first_step=first_step,
            model_kwargs={"poison": poison},
            t_eval=torch.tensor([0.0, 0.25, 1.0]),
            impl=impl,
        )
    assert result.status.tolist() == [Status.SUCCESS, Status.NON_FINITE, Status.NON_FINITE]
    torch.testing.assert_close(result.y[0], torch.full((2,), math.exp(-1), dtype=torch.float64), rtol=1e-5, atol=0)
    assert 0.4 < result.t[1] <= 0.5
    torch.testing.assert_close(result.y[1], torch.exp(-result.t[1]).expand(2), rtol=1e-5, atol=0)
    assert torch.equal(result.y[2], torch.ones(2, dtype=torch.float64))
    assert result.ys.isnan()[:, :, 0].tolist() == [[False] * 3, [False, False, True], [False, True, True]]


def test_max_steps_returns_the_state_and_warns_once(impl: str) -> None:
    problem = Prothero([1.0, 500.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = problem.solve(tol=1e-6, max_steps=30, impl=impl)
    assert len(caught) == 1
    assert "1 of 2 rows of the batch reached max_steps=30" in str(caught[0].message)
    assert result.status.tolist() == [Status.SUCCESS, Status.MAX_STEPS]
    assert result.n_steps[1] == 30
    assert 0 < result.t[1] < 2
    want = (problem.y0[1] - 1) * torch.exp(-500 * result.t[1]) + torch.cos(result.t[1])
    torch.testing.assert_close(result.y[1], want, rtol=0, atol=1e-4)


def test_min_and_max_step(impl: str) -> None:
    problem = Prothero([1.0])
    sizes: list[float] = []
    result = problem.solve(
        tol=1e-3, max_step=0.01, first_step=0.5, on_step=lambda step: sizes.append(float(step.h)), impl=impl
    )
    assert max(sizes) <= 0.01
    assert 200 <= result.n_steps[0] <= 202
    with pytest.warns(UserWarning, match="steps below min_step=0.05"):
        result = Prothero([100.0]).solve(tol=1e-8, min_step=0.05, first_step=0.1, impl=impl)
    assert result.status[0] == Status.MIN_STEP
    assert result.n_accepted[0] == 0
    forced = Prothero([1.0]).solve(tol=1e-12, min_step=0.05, force_min_step=True, impl=impl)
    assert forced.status[0] == Status.SUCCESS
    assert forced.n_steps[0] <= 45


def test_a_step_too_small_for_time_is_a_status(impl: str) -> None:
    """A pole at t = 1, which no step size passes."""
    with pytest.warns(UserWarning, match="steps below min_step"):
        result = solve(lambda t, y: y * y, torch.ones(1, 1, dtype=torch.float64), 0.0, 2.0, tol=1e-6, impl=impl)
    assert result.status[0] == Status.MIN_STEP
    assert 0.99 < result.t[0] < 1.01


@pytest.mark.parametrize("tableau", ADAPTIVE, ids=lambda t: t.name)
def test_order_of_dense_output(tableau: Tableau, impl: str) -> None:
    """One step of size h: the states within it have a local error of order q + 1 for an interpolant of order q."""
    order = {"heun2": 2, "fehlberg2": 2, "bosh3": 3, "fehlberg": 3, "dopri5": 4, "tsit5": 4, "dopri8": 4}[tableau.name]
    errors = []
    sizes = (0.2, 0.1, 0.05)
    for h in sizes:
        result = solve(
            lambda t, y: y * y * torch.cos(columns(t, y)),
            torch.ones(1, 1, dtype=torch.float64),
            0.3,
            0.3 + h,
            tableau,
            tol=1e3,
            first_step=10.0,
            t_eval=0.3 + h * torch.tensor([0.2, 0.4, 0.7, 0.9], dtype=torch.float64),
            impl=impl,
        )
        assert result.n_accepted[0] == 1
        theta = 0.3 + h * torch.tensor([0.2, 0.4, 0.7, 0.9], dtype=torch.float64)
        want = 1.0 / (1.0 + math.sin(0.3) - torch.sin(theta))
        errors.append(float((result.ys[:, 0, 0] - want).abs().max()))
    assert math.log(errors[0] / errors[-1], 4) > order + 0.5, (tableau.name, errors)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_requested_times(shared: bool, backward: bool, impl: str) -> None:
    problem = Prothero([0.5, 1.0, 12.0])
    times = torch.tensor([0.0, 1e-9, 0.1, 0.1, 0.5, 1.99, 2.0], dtype=torch.float64)
    result = problem.solve(tol=1e-8, t_eval=times, shared=shared, impl=impl)
    want = torch.stack([problem.exact(float(t)) for t in times])
    torch.testing.assert_close(result.ys, want, rtol=0, atol=1e-6)
    assert torch.equal(result.ys[0], problem.y0)
    assert torch.equal(result.ys[-1], result.y)
    if shared:
        return
    mild = Prothero([0.5, 1.0, 2.0])
    mild.y0 = problem.y0
    forward = mild.solve(tol=1e-10)
    own = torch.stack([times.flip(0), times.flip(0) * 0.5 + 0.5, torch.linspace(2, 0, 7, dtype=torch.float64)])
    back = solve(mild, forward.y, 2.0, 0.0, tol=1e-9, t_eval=own, model_kwargs={"rate": mild.rate}, impl=impl)
    want = torch.stack([torch.stack([mild.exact(float(t))[i] for i, t in enumerate(column)]) for column in own.t()])
    torch.testing.assert_close(back.ys, want, rtol=0, atol=1e-6)


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
    torch.testing.assert_close(result.y, y0 * math.exp(-0.5), rtol=1e-7, atol=0)
    torch.testing.assert_close(result.ys[1], y0 * math.exp(-0.125), rtol=1e-7, atol=0)
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
        torch.testing.assert_close(result.y, y0 * math.exp(-1), rtol=1e-6, atol=0)
        torch.testing.assert_close(result.ys[0], y0 * math.exp(-0.5), rtol=1e-6, atol=0)
    assert layouts == {True}
    transposed = torch.rand(4, 3, dtype=torch.float64).t()
    result = solve(func := lambda t, y: (-y.t().contiguous()).t(), transposed, 0.0, 1.0, tol=1e-8, impl=impl)
    torch.testing.assert_close(result.y, transposed * math.exp(-1), rtol=1e-6, atol=0)


def test_nothing_to_do(impl: str) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        assert y.shape[0] > 0
        return -y

    empty = solve(func, torch.zeros(0, 3), 0.0, 1.0, t_eval=torch.tensor([0.0, 1.0]), impl=impl)
    assert empty.y.shape == (0, 3)
    assert empty.ys.shape == (2, 0, 3)
    assert empty.status.shape == (0,)
    y0 = torch.rand(2, 3)
    same = solve(func, y0, 1.0, 1.0, t_eval=torch.tensor([1.0, 1.0]), impl=impl)
    assert torch.equal(same.y, y0)
    assert torch.equal(same.ys, torch.stack([y0, y0]))
    assert same.status.tolist() == [Status.SUCCESS] * 2
    assert same.n_steps.tolist() == [0, 0]
    assert solve(func, torch.zeros(2, 0), 0.0, 1.0, impl=impl).status.tolist() == [Status.SUCCESS] * 2


def test_a_zero_field_takes_few_steps(impl: str) -> None:
    result = solve(lambda t, y: torch.zeros_like(y), torch.ones(2, 3), 0.0, 1.0, impl=impl)
    assert (result.n_steps <= 8).all()
    assert torch.equal(result.y, torch.ones(2, 3))


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
def test_shared_steps_are_those_of_torchdiffeq(method: str, tol: float, impl: str) -> None:
    """All but the last, which goes beyond the end there and ends there here.

    Its other methods begin a step with a stage that is not the derivative at y.
    """
    torchdiffeq = pytest.importorskip("torchdiffeq")
    torch.manual_seed(0)
    theirs: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []

    class Func(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2)).double()

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.net(y) * (1 + t)

        def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
            theirs.append((float(t0), float(dt)))

    func, y0, times = Func(), torch.randn(6, 2, dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    with torch.no_grad():
        torchdiffeq.odeint(func, y0, times, method=method, rtol=tol, atol=tol)
    solve(
        func,
        y0,
        0.0,
        2.0,
        TABLEAUS[method],
        tol=tol,
        shared=True,
        time_shape="scalar",
        on_step=lambda step: ours.append((float(step.t), float(step.h))),
        impl=impl,
    )
    assert len(ours) <= len(theirs)
    last = next(i for i, (t, h) in enumerate(ours) if t + h > 2.0 - 1e-12)
    a, b = (torch.tensor(steps[:last], dtype=torch.float64) for steps in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert last >= 1


def test_norm_of_the_user(impl: str) -> None:
    problem = Prothero([0.5, 3.0])
    largest = problem.solve(tol=1e-6, norm=lambda ratio: ratio.abs().amax(1), impl=impl)
    usual = problem.solve(tol=1e-6, impl=impl)
    same = problem.solve(tol=1e-6, norm=lambda ratio: ratio.square().mean(1).sqrt(), impl=impl)
    assert torch.equal(usual.n_steps, same.n_steps)
    assert (largest.n_steps >= usual.n_steps).all()
    torch.testing.assert_close(largest.y, problem.exact(2.0), rtol=0, atol=1e-5)
    tensor = problem.solve(rtol=torch.full((3,), 1e-6), atol=torch.tensor([1e-6, 1e-6, 1e-6]), impl=impl)
    assert torch.equal(usual.n_steps, tensor.n_steps)
    shared = problem.solve(tol=1e-6, shared=True, norm=lambda ratio: ratio.abs().max(), impl=impl)
    torch.testing.assert_close(shared.y, problem.exact(2.0), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"norm: expected to return a tensor of shape \(2,\)"):
        problem.solve(norm=lambda ratio: ratio.abs().max(), impl=impl)


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
            torch.testing.assert_close(step.interpolate(step.t + step.h), step.y_new, rtol=1e-12, atol=1e-12)
        return bool((step.t > 0.5).any())

    result = problem.solve(tol=1e-8, on_step=on_step, impl=impl)
    assert max(checked) < 1e-6
    assert (result.status == Status.RUNNING).all()
    assert (result.t < 2.0).all()


def test_bad_arguments() -> None:
    y0 = torch.ones(2, 3)
    for bad, error, text in [
        (lambda t, y: y[:1], ValueError, r"func: expected to return y's shape \(2, 3\) on cpu, got .*\(1, 3\)"),
        (lambda t, y: y.double(), TypeError, r"func: expected to return y's dtype torch.float32, got .*float64"),
        (lambda t, y: 3.0, TypeError, "func: expected to return a tensor like y, got 3.0"),
    ]:
        with pytest.raises(error, match=text):
            solve(bad, y0, 0.0, 1.0)
    func = lambda t, y: -y  # noqa: E731
    with pytest.raises(ValueError, match="with an error estimate"):
        solve(func, y0, 0.0, 1.0, TABLEAUS["rk4"])
    with pytest.raises(ValueError, match=r"t0: expected a number or a tensor of shape \(\) or \(2,\)"):
        solve(func, y0, torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="t_eval: expected times from t0 to t1"):
        solve(func, y0, 0.0, 1.0, t_eval=torch.tensor([0.5, 0.2]))
    with pytest.raises(ValueError, match="t_eval: expected times from t0 to t1"):
        solve(func, y0, 0.0, 1.0, t_eval=torch.tensor([0.5, 1.2]))
    with pytest.raises(ValueError, match="time_shape: expected 'batch'"):
        AdaptiveOptions(time_shape="scalar")
    with pytest.raises(ValueError, match="safety: expected a finite number"):
        IController(safety=0.0)
    with pytest.raises(ValueError, match="rtol: expected a finite number"):
        AdaptiveOptions(rtol=-1.0)


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
    from fmkernels.solvers.adaptive import _dense
    from fmkernels.solvers.stepper import Batch, Stepper

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
    result = solve(func, y0, 0.0, 1.0, tol=1e-6, model_kwargs=kwargs, impl=impl)
    torch.testing.assert_close(result.y, 1 + (y0 - 1) * torch.exp(-rates)[:, None], rtol=0, atol=1e-5)


@pytest.mark.skipif("auto" not in IMPLS, reason="there is no compiled library")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_first_steps_compiled_and_reference(shared: bool, backward: bool) -> None:
    """Hairer's rule, also where the field is zero, huge, or not finite at one of its two evaluations."""
    from fmkernels.ops.step_control.op import Clock, Count, new_state
    from fmkernels.solvers.native_stepper import NativeStepper
    from fmkernels.solvers.stepper import Batch, Stepper

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
        torch.testing.assert_close(a.clock[Clock.H], b.clock[Clock.H], rtol=1e-9, atol=0)
        assert torch.equal(a.count, b.count)
        bad = [kind in (4, 5) for kind in row]
        assert (a.count[Count.STATUS] == Status.NON_FINITE).tolist() == ([any(bad)] if shared else bad)
        assert (torch.sign(a.clock[Clock.H][~torch.tensor(bad)]) == (-1 if backward else 1)).all()
