"""Options of `fm.odeint`, and its callbacks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from odeint_problems import D, Linear, spiral, spiral_y0, times
from torch import Tensor, nn

import fmkernels as fm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_per_sample_control_is_of_each_sample() -> None:
    rate = times(1.0, 30.0)[:, None]

    def func(t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == (2,)
        return -rate * (y - t.cos()[:, None])

    t, y0 = times(0.0, 0.5, 2.0), torch.ones(2, 1, dtype=D)
    y = fm.odeint(func, y0, t, options={"per_sample": True}, rtol=1e-8, atol=1e-8)
    for i in range(2):
        alone = fm.odeint(lambda t, y, i=i: -rate[i] * (y - t.cos()), y0[i], t, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(y[:, i], alone, rtol=0.0, atol=1e-13)
    with pytest.raises(ValueError, match="per_sample"):
        fm.odeint(lambda t, y: y, (y0, y0), t, options={"per_sample": True})


def relay(t: Tensor, y: Tensor) -> Tensor:
    """A slope that jumps at t = 0.5."""
    return torch.where(t < 0.5, torch.ones_like(y), -2.0 * torch.ones_like(y))


@pytest.mark.parametrize("strict", [False, True], ids=["at_or_after", "after"])
@pytest.mark.parametrize("backward", [False, True])
def test_jump_t(strict: bool, backward: bool) -> None:
    calls = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(float(t))
        before = t <= 0.5 if strict else t < 0.5
        return torch.where(before, torch.ones_like(y), -2.0 * torch.ones_like(y))

    t, y0 = times(0.0, 0.25, 0.5, 1.0), torch.zeros(1, dtype=D)
    expected = times(0.0, 0.25, 0.5, -0.5)[:, None]
    if backward:
        t, y0, expected = t.flip(0), expected[-1], expected.flip(0)
    y = fm.odeint(func, y0, t, options={"jump_t": times(0.5)}, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y, expected, rtol=0.0, atol=5e-14)
    assert 0.5 not in calls
    with_jump = len(calls)
    calls.clear()
    fm.odeint(func, y0, t, rtol=1e-9, atol=1e-9)
    assert len(calls) > 2 * with_jump


def test_jump_t_in_gradients() -> None:
    slope = times(1.5).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.5, slope * y, -2.0 * slope * y)

    t = times(0.0, 0.5, 1.0).requires_grad_()
    y = fm.odeint(func, torch.ones(1, dtype=D), t, options={"jump_t": [0.5]}, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(y[2, 0], [slope, t])
    exact = math.exp(-0.75)
    assert abs(float(y[2, 0].detach()) - exact) < 1e-8
    assert abs(float(grads[0]) + 0.5 * exact) < 1e-7
    torch.testing.assert_close(grads[1], times(-1.5 * exact, 0.0, -3.0 * exact), rtol=2e-9, atol=2e-10)


def test_step_t_ends_steps() -> None:
    seen: list[float] = []

    class Watched(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def callback_accept_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            seen.append(float(t))

    fm.odeint(Watched(), torch.ones(1, dtype=D), times(0.0, 1.0), options={"step_t": times(0.3, 0.7, 1.4)})
    assert 0.3 in seen
    assert 0.7 in seen


def test_grid_constructor() -> None:
    made = []

    def constructor(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        made.append((func, y0.shape))
        return torch.linspace(float(t[0]), float(t[-1]), 11, dtype=D)

    t = times(0.0, 0.5, 1.0)
    y = fm.odeint(spiral, spiral_y0(), t, method="rk4", options={"grid_constructor": constructor})
    same = fm.odeint(spiral, spiral_y0(), t, method="rk4", options={"step_size": 0.1})
    torch.testing.assert_close(y, same, rtol=1e-13, atol=1e-13)
    assert made[0][0] is spiral
    assert made[0][1] == (1, 2)
    with pytest.raises(ValueError, match="grid_constructor"):
        fm.odeint(spiral, spiral_y0(), t, method="rk4", options={"grid_constructor": lambda f, y, t: t[:-1]})
    both = {"grid_constructor": constructor, "step_size": 0.1}
    with pytest.raises(ValueError, match="step_size, grid_constructor"):
        fm.odeint(spiral, spiral_y0(), t, method="rk4", options=both)


def test_interp_of_fixed_grids() -> None:
    t = torch.linspace(0.0, 1.0, 14, dtype=D)
    problem = Linear()
    errors = {
        interp: (
            fm.odeint(problem, problem.y0, t, method="rk4", options={"step_size": 0.1, "interp": interp})
            - problem.exact(t)
        ).abs()
        for interp in ("linear", "cubic")
    }
    assert errors["cubic"].max() < 1e-4 < 1e-3 < errors["linear"].max()
    with pytest.raises(ValueError, match="interp"):
        fm.odeint(problem, problem.y0, t, method="rk4", options={"step_size": 0.1, "interp": "quintic"})


class Told(nn.Module):
    """Notes what its callbacks are told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, list[tuple[float, float, float]]] = {"step": [], "accept": [], "reject": []}
        self.kept: list[Tensor] = []

    def forward(self, t: Tensor, y: Any) -> Any:
        f = lambda y: -50.0 * (y - torch.cos(20.0 * t))  # noqa: E731
        return f(y) if isinstance(y, Tensor) else tuple(f(part) for part in y)

    def _note(self, kind: str, t: Tensor, y: Any, h: Tensor) -> None:
        first = y if isinstance(y, Tensor) else y[0]
        self.told[kind].append((float(t), float(first.reshape(-1)[0]), float(h)))
        self.kept.append(first)

    def callback_step(self, t: Tensor, y: Any, h: Tensor) -> None:
        self._note("step", t, y, h)


class ToldAll(Told):
    def callback_accept_step(self, t: Tensor, y: Any, h: Tensor) -> None:
        self._note("accept", t, y, h)

    def callback_reject_step(self, t: Tensor, y: Any, h: Tensor) -> None:
        self._note("reject", t, y, h)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("tuples", [False, True])
def test_callbacks_of_adaptive_solves(sign: float, tuples: bool) -> None:
    func, y0 = ToldAll(), torch.ones(1, dtype=D)
    fm.odeint(func, (y0, y0) if tuples else y0, sign * times(0.0, 0.05), rtol=1e-5, atol=1e-5)
    told = func.told
    assert len(told["step"]) == len(told["accept"]) + len(told["reject"])
    assert told["reject"]
    time = 0.0
    for t, _, h in told["accept"]:
        assert t == pytest.approx(time, abs=1e-12)
        assert h * sign > 0.0
        time = t + h
    assert time == pytest.approx(0.05 * sign)
    # what was handed out stays as it was
    values = [note[1] for note in told["accept"]]
    assert len(set(values)) == len(values)
    assert {float(y.reshape(-1)[0]) for y in func.kept} >= set(values)


@pytest.mark.parametrize("gradient", [False, True])
def test_callbacks_of_fixed_grids(gradient: bool) -> None:
    func, y0 = Told(), torch.ones(1, dtype=D)
    with torch.set_grad_enabled(gradient):
        y = fm.odeint(func, y0, torch.linspace(0.0, 0.1, 6, dtype=D), method="heun2")
    assert [note[0] for note in func.told["step"]] == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08])
    assert [note[2] for note in func.told["step"]] == pytest.approx([0.02] * 5)
    assert torch.equal(torch.stack(func.kept), y[:-1])
    with pytest.warns(UserWarning, match="callback_accept_step, callback_reject_step"):
        fm.odeint(ToldAll(), y0, times(0.0, 0.1), method="heun2")


def test_min_and_max_step() -> None:
    func, y0, t = ToldAll(), torch.ones(1, dtype=D), times(0.0, 1.0)
    fm.odeint(func, y0, t, options={"max_step": 0.003}, rtol=1e-2, atol=1e-2)
    assert max(note[2] for note in func.told["step"]) <= 0.003 * (1 + 1e-12)
    func = ToldAll()
    fm.odeint(func, y0, t, options={"min_step": 0.01, "first_step": 0.02}, rtol=1e-10, atol=1e-10)
    sizes = [note[2] for note in func.told["accept"]]
    assert min(sizes[:-1]) == pytest.approx(0.01)
    assert func.told["step"][0][2] == pytest.approx(0.02)


def test_max_num_steps_warns_and_fills() -> None:
    with pytest.warns(UserWarning, match="max_steps"):
        y = fm.odeint(Told(), torch.ones(1, dtype=D), times(0.0, 1e-4, 5.0), options={"max_num_steps": 20})
    assert y[:2].isfinite().all()
    assert y[2].isnan().all()
    options = {"max_num_steps": 20, "jump_t": [2.0]}
    with pytest.warns(UserWarning, match="max_steps"):
        y = fm.odeint(Told(), torch.ones(1, dtype=D), times(0.0, 1e-4, 1.0, 3.0, 5.0), options=options)
    assert y.shape == (5, 1)
    assert y[:2].isfinite().all()
    assert y[2:].isnan().all()
    y0 = torch.ones(1, dtype=D, requires_grad=True)
    with pytest.warns(UserWarning, match="max_steps"), pytest.raises(RuntimeError, match="a solve that succeeds"):
        fm.odeint(Told(), y0, times(0.0, 5.0), options={"max_num_steps": 20})


def test_a_right_hand_side_that_is_not_finite_ends() -> None:
    for bad in (math.nan, math.inf):
        with pytest.warns(UserWarning, match="not finite"):
            y = fm.odeint(lambda t, y, bad=bad: y * bad, torch.ones(2, dtype=D), times(0.0, 1.0))
        assert y[1].isnan().all()


@pytest.mark.parametrize("kind", ["tuple", "norm", "atol"])
def test_error_norms_of_single_operations_hold_in_half_precision(kind: str) -> None:
    """There small tolerances are 0, and squares of ratios infinite."""
    y0, t = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float16), torch.linspace(0.0, 1.0, 3)
    given: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-8}
    if kind == "norm":
        given["options"] = {"norm": lambda ratio: ratio.square().mean().sqrt()}
    if kind == "atol":
        given["atol"] = torch.tensor([1e-3, 1e-8, 1e-3])
    if kind == "tuple":
        (y,) = fm.odeint(lambda s, y: (-y[0],), (y0,), t, **given)
    else:
        y = fm.odeint(lambda s, y: -y, y0, t, **given)
    torch.testing.assert_close(y, fm.odeint(lambda s, y: -y, y0, t, rtol=1e-3, atol=1e-8))


@pytest.mark.parametrize("kind", ["norm", "atol"])
def test_error_norms_of_single_operations_follow_the_layout(kind: str) -> None:
    """The tolerance of an element is its own where the memory has another order than the shape."""
    y0 = torch.linspace(0.01, 30.0, 12, dtype=D).reshape(1, 2, 2, 3)
    size = y0.square()
    seen: list[list[float]] = []

    def solve(y: Tensor) -> Tensor:
        def norm(ratio: Tensor) -> Tensor:
            seen[-1].append(float(ratio.flatten()[-1]))
            return ratio.abs().max()

        seen.append([])
        more: dict[str, Any] = {"options": {"norm": norm}} if kind == "norm" else {"atol": 1e-6 * size}
        return fm.odeint(lambda s, y: torch.sin(size * s) * y, y, times(0.0, 0.3), rtol=1e-4, **more)

    torch.testing.assert_close(
        solve(y0.contiguous(memory_format=torch.channels_last)), solve(y0), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(torch.tensor(seen[0]), torch.tensor(seen[1]))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("solve", ["odeint", "dense", "event"])
def test_no_solve_asks_for_the_slope_at_a_jump_itself(solve: str, backward: bool) -> None:
    seen: list[float] = []
    sign = -1.0 if backward else 1.0

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t))
        return relay(t, y)

    y0, first, last = times(0.0), 0.5 - 0.5 * sign, 0.5 + 0.5 * sign
    settings: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9, "options": {"jump_t": [0.5]}}
    want = torch.tensor([-0.5 if not backward else 0.5], dtype=D)
    if solve == "odeint":
        y = fm.odeint(func, y0, times(first, last), **settings)[-1]
    elif solve == "dense":
        y = fm.odeint_dense(func, y0, first, last, **settings)(last)
    else:
        time, ys = fm.odeint_event(func, y0, first, reverse_time=backward, event_fn=lambda t, y: t - last, **settings)
        y = ys[-1]
        torch.testing.assert_close(time, torch.tensor(last, dtype=D), rtol=0.0, atol=1e-8)
    torch.testing.assert_close(y, want, rtol=0.0, atol=1e-7)
    assert 0.5 not in seen
    assert min(seen) < 0.5 < max(seen)


def test_after_a_part_that_fails_nothing_is_solved() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:  # hard before the jump, easy after it
        return torch.where(t < 0.5, 50.0 * (50.0 * t).cos(), torch.zeros_like(t)) * torch.ones_like(y)

    options = {"jump_t": [0.5], "max_num_steps": 12}
    t = times(0.0, 0.25, 0.5, 0.75, 1.0)
    with pytest.warns(UserWarning, match="max_steps=12") as warned:
        y = fm.odeint(func, times(0.0, 1.0), t, rtol=1e-9, atol=1e-9, options=options)
    assert len(warned) == 1
    torch.testing.assert_close(y[0], times(0.0, 1.0), rtol=0.0, atol=0.0)
    assert bool(y[1:].isnan().all())
