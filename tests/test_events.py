"""Events: their times and states, and gradients by the implicit function theorem."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adjoint_problems import D, assert_all_close, needs_peer, peer
from torch import Tensor, nn

import fmkernels as fm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Ball(nn.Module):
    """torchdiffeq's bouncing ball: height, speed and the logarithm of its radius."""

    def __init__(self) -> None:
        super().__init__()

        def parameter(value: float) -> nn.Parameter:
            return nn.Parameter(torch.tensor([value], dtype=D))

        self.gravity, self.t0, self.position, self.speed = map(parameter, (9.8, 0.0, 10.0, 0.0))
        self.log_radius, self.absorption = parameter(math.log(0.2)), parameter(0.2)

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, speed, log_radius = state
        return speed, -self.gravity + 0.0 * speed, torch.zeros_like(log_radius)

    def event_fn(self, t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        return state[0] - torch.exp(state[2])

    def bounces(self, count: int, interface: Any, solve: Any = fm.odeint_event, **settings: Any) -> Tensor:
        """The times of the collisions."""
        t, state, times = self.t0, (self.position, self.speed, self.log_radius), []
        settings = {"atol": 1e-9, "rtol": 1e-9, **settings}
        for _ in range(count):
            t, solution = solve(
                self, state, t, event_fn=self.event_fn, reverse_time=False, odeint_interface=interface, **settings
            )
            times.append(t)
            position, speed, log_radius = (part[-1] for part in solution)
            state = (position + 1e-7, -speed * (1 - self.absorption), log_radius)
        return torch.stack([t.reshape(()) for t in times])

    def exact(self, count: int) -> Tensor:
        height = self.position - self.log_radius.exp()
        speed = (self.speed**2 + 2 * self.gravity * height).sqrt()
        times = [self.t0 + (speed + self.speed) / self.gravity]
        for _ in range(count - 1):
            speed = speed * (1 - self.absorption)
            times.append(times[-1] + 2 * speed / self.gravity)
        return torch.cat(times)


@pytest.mark.parametrize(
    ("interface", "settings", "tol"),
    [
        (fm.odeint, {}, 5e-8),
        (fm.odeint, {"method": "bosh3"}, 5e-8),
        (fm.odeint_adjoint, {}, 5e-8),
        (fm.odeint, {"method": "rk4", "options": {"step_size": 0.05, "interp": "cubic"}}, 5e-8),
        (fm.odeint_adjoint, {"method": "rk4", "options": {"step_size": 0.05, "interp": "cubic"}}, 5e-8),
        (fm.odeint, {"method": "explicit_adams", "options": {"step_size": 0.02}}, 5e-4),
    ],
    ids=["direct", "bosh3", "adjoint", "rk4", "adjoint-rk4", "explicit_adams"],
)
def test_bouncing_ball(interface: Any, settings: dict[str, Any], tol: float) -> None:
    ball = Ball()
    times, exact = ball.bounces(2, interface, **settings), ball.exact(2)
    torch.testing.assert_close(times, exact, rtol=0.0, atol=tol)
    # torchdiffeq 0.2.5's numbers
    recorded = torch.tensor([1.4142135624, 3.6769552744], dtype=D)
    torch.testing.assert_close(times.detach(), recorded, rtol=0.0, atol=max(tol, 1e-7))
    grads = [
        torch.autograd.grad((x * torch.tensor([1.0, -0.5], dtype=D)).sum(), list(ball.parameters()))
        for x in (times, exact)
    ]
    assert_all_close(*grads, 10 * tol)


@needs_peer
@pytest.mark.parametrize("settings", [{}, {"method": "rk4", "options": {"step_size": 0.1}}], ids=str)
@pytest.mark.parametrize("adjoint", [False, True])
def test_bouncing_ball_equals_the_peer(settings: dict[str, Any], adjoint: bool) -> None:
    results = []
    for lib in (fm, peer):
        ball = Ball()
        interface = lib.odeint_adjoint if adjoint else lib.odeint
        times = ball.bounces(2, interface, lib.odeint_event, **settings)
        results.append([times, *torch.autograd.grad(times.sum(), list(ball.parameters()))])
    assert_all_close(*results, 1e-7)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("reverse", [False, True])
def test_events_in_both_directions(method: str, reverse: bool) -> None:
    sign = -1.0 if reverse else 1.0
    options = {"step_size": 0.03, "interp": "cubic"} if method == "rk4" else {}
    y0, t0 = torch.tensor([1.0], dtype=D, requires_grad=True), torch.tensor(0.5, dtype=D, requires_grad=True)
    seen = []

    def event(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t.detach()))
        return y - 2.0 + 0.1 * t

    def func(t: Tensor, y: Tensor) -> Tensor:
        return sign * y + 0.3 * torch.cos(t)

    def find(y0: Tensor, t0: Tensor) -> tuple[Tensor, Tensor]:
        return fm.odeint_event(
            func, y0, t0, event_fn=event, reverse_time=reverse, method=method, options=options, rtol=1e-11, atol=1e-11
        )

    t, solution = find(y0, t0)
    assert (t - t0) * sign > 0
    assert all((s - 0.5) * sign >= 0 for s in seen)
    assert abs(float((solution[1] - 2.0 + 0.1 * t).detach())) < 1e-8
    # the plain solve to that time
    plain = fm.odeint(func, y0, torch.stack([t0, t]).detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(solution, plain, rtol=5e-8, atol=5e-8)
    assert torch.autograd.gradcheck(lambda *x: find(*x), (y0, t0), atol=1e-4, eps=1e-5)


def test_the_first_of_several_events() -> None:
    y0 = torch.tensor([0.0, 0.0], dtype=D)
    func = lambda t, y: torch.tensor([1.0, 2.0], dtype=D)  # noqa: E731
    event = lambda t, y: torch.stack([y[0] - 1.0, 1.4 - y[1], t - 3.0])  # noqa: E731
    for settings in ({}, {"method": "rk4", "options": {"step_size": 0.3}}):
        t, solution = fm.odeint(func, y0, torch.tensor([0.0, 1.0], dtype=D), event_fn=event, **settings)
        assert abs(float(t) - 0.7) < 1e-8
        torch.testing.assert_close(solution[1], torch.tensor([0.7, 1.4], dtype=D), rtol=0.0, atol=1e-8)


def test_events_with_jumps_in_the_field() -> None:
    rate = torch.tensor([1.0], dtype=D, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 1.0, rate, 3.0 * rate)

    y0 = torch.zeros(1, dtype=D, requires_grad=True)
    t, solution = fm.odeint_event(func, y0, 0.0, event_fn=lambda t, y: y - 4.0, options={"jump_t": [1.0, 50.0]})
    assert abs(float(t.detach()) - 2.0) < 1e-8
    grads = torch.autograd.grad(t, [rate, y0])
    # y0 + rate (1 + 3 (t - 1)) = 4
    assert_all_close(grads, [torch.tensor([-4 / 3], dtype=D), torch.tensor([-1 / 3], dtype=D)], 1e-7)
    assert solution.shape == (2, 1)


def test_gradients_of_what_the_event_function_uses() -> None:
    level = torch.tensor(2.0, dtype=D, requires_grad=True)
    t, solution = fm.odeint_event(
        lambda t, y: y, torch.ones(1, dtype=D), 0.0, event_fn=lambda t, y: y - level, rtol=1e-10, atol=1e-10
    )
    (of_time,) = torch.autograd.grad(t, level, retain_graph=True)
    (of_state,) = torch.autograd.grad(solution[1].sum(), level)
    assert abs(float(t.detach()) - math.log(2.0)) < 1e-8
    assert abs(float(of_time) - 0.5) < 1e-7
    assert abs(float(of_state) - 1.0) < 1e-7


@pytest.mark.parametrize("coarse", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"method": "rk4", "options": {"step_size": 0.3}}], ids=["dopri5", "rk4"])
def test_the_event_is_found_to_the_smallest_atol(settings: dict[str, Any], coarse: int) -> None:
    """The state is linear in time, so that the time's error is the search's alone."""
    atol = [1e-11, 1e-11]
    atol[coarse] = 1e-2
    y0 = (torch.zeros(2, dtype=D), torch.zeros(1, dtype=D))
    func = lambda t, y: tuple(torch.ones_like(part) for part in y)  # noqa: E731
    for event in (lambda t, y: y[0] - 1.2345, lambda t, y: y[1] - 1.2345):
        t, _ = fm.odeint(func, y0, torch.tensor([0.0, 1.0], dtype=D), event_fn=event, atol=atol, **settings)
        assert abs(float(t) - 1.2345) < 1e-10
        t, _ = fm.odeint(func, y0, torch.tensor([0.0, 1.0], dtype=D), event_fn=event, atol=1e-2, **settings)
        assert 1e-10 < abs(float(t) - 1.2345) < 1e-2


@pytest.mark.parametrize("number", [10, 63, 64, 65, 150])
@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "ab2", "am3", "rk4", "heun2"])
def test_a_fixed_grid_is_the_same_with_an_event(method: str, number: int) -> None:
    """However many steps lie before it: the search goes over them in parts, and those of a multistep method go on."""
    size, y0 = 0.03, torch.tensor([1.0, 0.0], dtype=D)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -y[0]]) * (1.0 + 0.5 * torch.sin(5.0 * t))

    grid = size * torch.arange(number + 2, dtype=D)
    ys = fm.odeint(func, y0, grid, method=method)
    at = size * (number + 0.4)
    t, found = fm.odeint(
        func,
        y0,
        torch.tensor([0.0, 1.0], dtype=D),
        method=method,
        options={"step_size": size},
        event_fn=lambda t, y: t - at,
        atol=1e-12,
    )
    assert abs(float(t) - at) < 1e-11
    torch.testing.assert_close(found[1], 0.6 * ys[-2] + 0.4 * ys[-1], rtol=0.0, atol=1e-11)


def test_events_at_the_start_without_end_and_wrong() -> None:
    y0, t = torch.ones(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    event_t, solution = fm.odeint(lambda t, y: y, y0, t, event_fn=lambda t, y: y - 1.0)
    assert float(event_t) == 0.0
    assert torch.equal(solution, torch.stack([y0, y0]))
    never = lambda t, y: y + 1.0  # noqa: E731
    with pytest.warns(UserWarning, match="max_steps"), pytest.raises(RuntimeError, match="event_fn: expected a sign"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=never, options={"max_num_steps": 30})
    with pytest.raises(RuntimeError, match="within 20000 steps"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=never, method="euler", options={"step_size": 0.1})
    with pytest.raises(ValueError, match="step_size with event_fn"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=never, method="euler")
    with pytest.raises(ValueError, match=r"t: expected shape \(2,\)"):
        fm.odeint(lambda t, y: -y, y0, torch.linspace(0, 1, 3), event_fn=never)
    with pytest.raises(TypeError, match="event_fn: expected a floating tensor"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=lambda t, y: 1.0)
    with pytest.raises(TypeError, match="event_fn: expected a function"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=3)
    with pytest.raises(ValueError, match="per_sample"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=never, options={"per_sample": True})


def test_events_in_single_precision_have_the_dtype_of_the_times() -> None:
    t, solution = fm.odeint_event(
        lambda t, y: torch.ones_like(y), torch.zeros(3), torch.tensor([0.25]), event_fn=lambda t, y: y.sum() - 3.0
    )
    assert t.dtype is torch.float32
    assert t.shape == ()
    assert solution.dtype is torch.float32
    assert abs(float(t) - 1.25) < 1e-6


def test_an_event_sees_the_state_in_its_shape_whatever_its_layout() -> None:
    y0 = torch.arange(12.0, dtype=torch.float64).reshape(1, 2, 2, 3)

    def solve(y: Tensor) -> tuple[Tensor, Tensor]:
        slope = y0.flip(-1)
        return fm.odeint_event(
            lambda s, y: slope * s,
            y,
            torch.tensor(0.0),
            event_fn=lambda s, y: y[0, 1, 0, 2] - 9.0,
            odeint_interface=fm.odeint,
        )

    (t, y), (got_t, got_y) = solve(y0), solve(y0.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got_t, t)
    torch.testing.assert_close(got_y, y)
