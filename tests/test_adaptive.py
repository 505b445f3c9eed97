"""Adaptive steps: accuracy, control, status, dense output, errors."""

from __future__ import annotations

import math
import warnings
import weakref

import pytest
import torch
from adaptive_problems import IMPLS, Prothero, columns, solve
from torch import Tensor

import fmkernels as fm
from fmkernels.ops.step_control.op import Status
from fmkernels.solvers.adaptive.controllers import Controller, IController, PIController, PIDController
from fmkernels.solvers.adaptive.options import AdaptiveOptions
from fmkernels.solvers.adaptive.stepper import AdaptiveStep
from fmkernels.solvers.methods.tableaus import TABLEAUS, Tableau

ADAPTIVE = [tableau for tableau in TABLEAUS.values() if tableau.error is not None]
CONTROLLERS = [IController(), PIController(), PIDController()]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


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
    back = solve(problem, end.y, 2.0, 0.0, tol=1e-10, impl=impl, shared=shared, arguments={"rate": problem.rate})
    torch.testing.assert_close(back.y, problem.y0, rtol=0.0, atol=1e-8)
    assert (back.t == 0.0).all()


def test_opposite_directions_and_intervals_in_one_batch(impl: str) -> None:
    y0 = torch.tensor([[1.0, 2.0], [1.0, 3.0], [2.0, 1.0], [4.0, 5.0]], dtype=torch.float64)
    t0 = torch.tensor([0.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    t1 = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    result = solve(lambda t, y: y * torch.cos(columns(t, y)), y0, t0, t1, tol=1e-9, impl=impl)
    want = y0 * torch.exp(torch.sin(t1) - torch.sin(t0))[:, None]
    torch.testing.assert_close(result.y, want, rtol=1e-8, atol=0.0)
    assert torch.equal(result.t, t1)
    assert result.n_steps[3] == 0
    assert torch.equal(result.y[3], y0[3])


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
            arguments={"poison": poison},
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
    torch.testing.assert_close(result.y[1], want, rtol=0.0, atol=2e-5)


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
    order = {"heun_euler": 2, "fehlberg2": 2, "bosh3": 3, "fehlberg": 3, "dopri5": 4, "tsit5": 4, "dopri8": 4}[
        tableau.name
    ]
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
    torch.testing.assert_close(result.ys, want, rtol=0.0, atol=2e-7)
    assert torch.equal(result.ys[0], problem.y0)
    assert torch.equal(result.ys[-1], result.y)
    if shared:
        return
    mild = Prothero([0.5, 1.0, 2.0])
    mild.y0 = problem.y0
    forward = mild.solve(tol=1e-10)
    own = torch.stack([times.flip(0), times.flip(0) * 0.5 + 0.5, torch.linspace(2, 0, 7, dtype=torch.float64)])
    back = solve(mild, forward.y, 2.0, 0.0, tol=1e-9, t_eval=own, arguments={"rate": mild.rate}, impl=impl)
    want = torch.stack([torch.stack([mild.exact(float(t))[i] for i, t in enumerate(column)]) for column in own.t()])
    torch.testing.assert_close(back.ys, want, rtol=0, atol=1e-6)


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
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0.0)
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


def test_bad_arguments() -> None:
    y0 = torch.ones(2, 3)
    for bad, error, text in [
        (lambda t, y: y[:1], ValueError, r"func: expected an output of the state's shape, \(2, 3\), got .*\(1, 3\)"),
        (
            lambda t, y: y.long(),
            TypeError,
            r"func: expected a floating output, as the state is torch.float32, got .*int64",
        ),
        (lambda t, y: 3.0, TypeError, "func: expected a tensor from func, got 3.0"),
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


# ---------------------------------------------------------------- steppers kept between solves


def test_kept_steppers_are_safe() -> None:
    class Field:
        def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -y

    y0 = torch.rand(5, 3, dtype=torch.float64)
    first, second = Field(), Field()
    results = [fm.odeint(field, y0, torch.tensor([0.0, 1.0]), rtol=1e-9, atol=1e-9)[-1] for field in (first, second)]
    kept = results[0].clone()
    fm.odeint(lambda t, y: y, y0, torch.tensor([0.0, 2.0]), rtol=1e-9, atol=1e-9)
    assert torch.equal(results[0], kept)
    assert torch.equal(results[0], results[1])
    gone = weakref.ref(first)
    del first
    assert gone() is None

    def nested(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inner = fm.odeint(lambda s, z: -z, y, torch.tensor([0.0, 1.0]), rtol=1e-9, atol=1e-9)[-1]
        return -inner * math.e  # -y

    assert torch.allclose(fm.odeint(nested, y0, torch.tensor([0.0, 1.0]), rtol=1e-9, atol=1e-9)[-1], kept, atol=1e-7)

    calls = 0

    def broken(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyError("broken")
        return -y

    with pytest.raises(KeyError):
        fm.odeint(broken, y0, torch.tensor([0.0, 1.0]), rtol=1e-9, atol=1e-9)
    again = fm.odeint(lambda t, y: -y, y0, torch.tensor([0.0, 1.0]), rtol=1e-9, atol=1e-9)[-1]
    assert torch.equal(again, kept)
    with pytest.warns(UserWarning, match="not finite"):
        fm.odeint(lambda t, y: y * math.nan, y0, torch.tensor([0.0, 1.0]), rtol=1e-9, atol=1e-9)
    again = fm.odeint(lambda t, y: -y, y0, torch.tensor([0.0, 1.0]), rtol=1e-9, atol=1e-9)[-1]
    assert torch.equal(again, kept)
