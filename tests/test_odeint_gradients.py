"""Gradients of `fm.odeint`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from odeint_problems import D, Net, times
from torch import Tensor

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
