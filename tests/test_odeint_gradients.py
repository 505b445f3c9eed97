"""Gradients of `fm.odeint`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from odeint_problems import D, Net, times
from torch import Tensor
from torch.autograd import forward_ad

import fmkernels as fm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("euler", {}),
        ("rk4", {}),
        ("rk4", {"step_size": 0.15, "interp": "cubic"}),
        ("ab3", {}),
        ("rk4", {"checkpoint": True}),
        ("rk4", {"reversible": True}),
        ("midpoint", {"reversible": 0.9, "step_size": 0.13}),
        ("dopri5", {}),
        ("dopri5", {"checkpoint": True}),
        ("dopri5", {"jump_t": [0.25]}),
    ],
    ids=str,
)
def test_gradcheck_in_the_state_and_the_times(method: str, options: dict[str, Any]) -> None:
    net = Net()
    y0, t = torch.randn(2, 2, dtype=D).requires_grad_(), times(0.0, 0.2, 0.7, 0.8).requires_grad_()

    def solve(y0: Tensor, t: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            net.w.copy_(w)
        object.__setattr__(net, "_w", w)
        return fm.odeint(
            lambda t, y: torch.tanh(torch.cat([y, t.expand(2, 1)], -1) @ w) @ net.v,
            y0,
            t,
            method=method,
            options=options,
            rtol=1e-11,
            atol=1e-11,
        )

    w = net.w.detach().clone().requires_grad_()
    tolerance = 1e-5 if method == "dopri5" else 1e-6
    assert torch.autograd.gradcheck(solve, (y0, t, w), atol=tolerance, rtol=1e-4, nondet_tol=0.0, fast_mode=True)


def test_gradcheck_per_sample() -> None:
    net = Net()
    y0 = torch.randn(3, 2, dtype=D, requires_grad=True)

    def solve(y0: Tensor) -> Tensor:
        return fm.odeint(net, y0, times(0.0, 0.3, 1.0), options={"per_sample": True}, rtol=1e-10, atol=1e-10)

    assert torch.autograd.gradcheck(solve, (y0,), atol=1e-6)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_outputs_where_steps_end_are_counted_once(per_sample: bool, backward: bool, checkpoint: bool) -> None:
    """With steps of 1/4 the times lie on their ends; a recorded solve gives there what one without a record gives."""
    t = times(0.0, 0.25, 0.3, 0.5, 1.0)
    t = t.flip(0) if backward else t
    y0 = torch.tensor([[1.0], [2.0], [-0.5]], dtype=D)
    options = {"first_step": 0.25, "max_step": 0.25, "per_sample": per_sample, "checkpoint": checkpoint}

    def solve(y0: Tensor) -> Tensor:
        return fm.odeint(lambda t, y: -0.3 * y, y0, t, options=options, rtol=1e-3, atol=1e-3)

    plain, recorded = solve(y0), solve(y0.clone().requires_grad_())
    torch.testing.assert_close(recorded.detach(), plain, rtol=1e-13, atol=1e-13)
    exact = y0 * torch.exp(-0.3 * (t - t[0]))[:, None, None]
    torch.testing.assert_close(plain, exact, rtol=5e-9, atol=5e-9)


def test_no_gradient_is_recorded_where_none_is_asked() -> None:
    net = Net()
    with torch.no_grad():
        assert not fm.odeint(net, torch.randn(2, 2, dtype=D), times(0.0, 1.0)).requires_grad
    frozen = Net().requires_grad_(False)
    assert not fm.odeint(frozen, torch.randn(2, 2, dtype=D), times(0.0, 1.0)).requires_grad


METHODS_OF_EACH_KIND = ["dopri5", "tsit5", "kvaerno3", "trapezoid", "gl4", "scipy_solver"]


@pytest.mark.parametrize("options", [{}, {"step_size": 0.15}, {"step_size": 0.15, "interp": "cubic"}])
@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams", "implicit_adams"])
def test_transforms_of_fixed_grids(method: str, options: dict[str, Any]) -> None:
    a = torch.tensor([[0.3, -0.5, 0.1], [0.2, 0.1, 0.4], [-0.3, 0.2, 0.0]], dtype=D)
    y0, t = torch.tensor([0.3, -0.2, 0.5], dtype=D), torch.linspace(0.0, 1.0, 4, dtype=D)

    def end(y: Tensor, times: Tensor = t, scale: float | Tensor = 1.0) -> Tensor:
        return fm.odeint(lambda s, y: y @ a * scale + s * y, y, times, method=method, options=options)[-1]

    rows = torch.autograd.functional.jacobian(end, y0)
    of_times = torch.autograd.functional.jacobian(lambda times: end(y0, times), t)
    scale = torch.tensor(1.2, dtype=D)
    of_scale = torch.autograd.functional.jacobian(lambda s: end(y0, t, s), scale)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(end)(y0), rows)
        torch.testing.assert_close(transform(lambda s: end(y0, t, s))(scale), of_scale)
    torch.testing.assert_close(torch.func.jacrev(lambda times: end(y0, times))(t), of_times)
    torch.testing.assert_close(torch.func.vmap(end)(torch.stack([y0, -y0])), torch.stack([end(y0), end(-y0)]))
    # forward mode, in the times too
    v = torch.tensor([0.1, -0.2, 0.3, 0.4], dtype=D)
    torch.testing.assert_close(torch.func.jvp(lambda times: end(y0, times), (t,), (v,))[1], of_times @ v)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(end(y0, forward_ad.make_dual(t, v))).tangent
        torch.testing.assert_close(tangent, of_times @ v)
    with pytest.raises(ValueError, match=r"t: expected values that torch\.vmap does not map over"):
        torch.func.vmap(lambda times: end(y0, times))(torch.stack([t, 2.0 * t]))


@pytest.mark.parametrize("method", METHODS_OF_EACH_KIND)
def test_transforms_are_refused_by_implicit_methods_and_adjoints(method: str) -> None:
    y0, t = torch.tensor([0.3, -0.2], dtype=D), torch.linspace(0.0, 1.0, 3, dtype=D)

    def end(y: Tensor) -> Tensor:
        return fm.odeint(lambda s, y: -y * s, y, t, method=method)[-1]

    def adjoint(y: Tensor) -> Tensor:
        return fm.odeint_adjoint(lambda s, y: -y * s, y, t, method=method, adjoint_params=())[-1]

    functions = [adjoint] if method in ("dopri5", "tsit5") else [end, adjoint]
    calls: list[Any] = []
    for g in functions:
        calls += [lambda f=f, g=g: f(g)(y0) for f in (torch.func.jacrev, torch.func.jacfwd)]
        calls += [lambda g=g: torch.func.vmap(g)(torch.stack([y0, -y0]))]
        calls += [lambda g=g: torch.func.jvp(g, (y0,), (y0,))]

        def forward_mode(g: Any = g) -> None:
            with forward_ad.dual_level():
                g(forward_ad.make_dual(y0, y0))

        calls.append(forward_mode)

    for call in calls:
        with pytest.raises(RuntimeError, match=r"does not run within torch\.func's transforms"):
            call()


def test_transforms_of_events_and_reversible_solves_are_refused() -> None:
    y0, t = torch.tensor([0.3, -0.2], dtype=D), torch.linspace(0.0, 1.0, 3, dtype=D)

    def event(y: Tensor) -> Tensor:
        options = {"step_size": 0.1}
        return fm.odeint_event(
            lambda s, y: -y, y, 0.0, event_fn=lambda s, y: y[0] - 0.1, method="rk4", options=options
        )[0]

    def reversible(y: Tensor) -> Tensor:
        return fm.odeint(lambda s, y: -y, y, t, method="rk4", options={"reversible": True})[-1]

    for function in (event, reversible):
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            with pytest.raises(RuntimeError, match=r"does not run within torch\.func's transforms"):
                transform(function)(y0)


def test_times_alone_have_their_gradient() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = fm.odeint(lambda t, y: -y, torch.ones(1, dtype=torch.float64), t, rtol=1e-9, atol=1e-9)
    (grad,) = torch.autograd.grad(y[-1].sum(), t)
    torch.testing.assert_close(grad, y[-1].detach() * torch.tensor([1.0, -1.0]), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("t", [-0.01, 1.01])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
def test_a_dense_solution_is_of_its_interval(t: float, ends: tuple[float, float]) -> None:
    solution = fm.odeint_dense(lambda t, y: -y, torch.ones(1, dtype=torch.float64), *ends)
    with pytest.raises(ValueError, match=r"^t: expected times from"):
        solution(t)
