"""Gradients of what the right-hand side uses only at some times, which nothing shows at t[0]."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from odeint_problems import D, times
from torch import Tensor

import fmkernels as fm
from fmkernels.solvers.equations.dense import odeint_dense


class Late:
    """dy/dt = 1 up to t = 1/2, then weight; y(1) - y(0) = (1 + weight) / 2."""

    def __init__(self) -> None:
        self.weight = torch.tensor(3.0, dtype=D, requires_grad=True)
        self.calls = 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if t.dim():
            return torch.where(t > 0.5, self.weight, 1.0)[:, None].expand_as(y) if bool((t > 0.5).any()) else y * 0 + 1
        return self.weight.expand_as(y) if t > 0.5 else torch.ones_like(y)


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dopri5", {}),
        ("bosh3", {"norm": Tensor.norm}),
        ("dopri5", {"per_sample": True}),
        ("dopri5", {"jump_t": [0.25, 0.5, 0.75]}),
        ("dopri5", {"step_t": [0.3], "first_step": 0.01}),
        ("dopri5", {"checkpoint": True}),
        ("rk4", {"step_size": 0.125}),
        ("explicit_adams", {"step_size": 0.0625}),
        ("kvaerno3", {}),
        ("implicit_midpoint", {"step_size": 0.125}),
        ("radauIIA5", {"step_size": 0.125}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_gradients_of_what_is_used_late(method: str, options: dict[str, Any], outputs: int) -> None:
    func, t = Late(), torch.linspace(0.0, 1.0, outputs, dtype=D)
    ys = fm.odeint(func, torch.zeros(2, 1, dtype=D), t, method=method, options=options, rtol=1e-7, atol=1e-7)
    (grad,) = torch.autograd.grad(ys[-1].sum(), func.weight, retain_graph=True)
    exact = 2 * 0.5
    assert math.isclose(float(grad), exact, rel_tol=0.1 if "step_size" in options else 1e-4)
    if outputs > 2:  # before t = 1/2 nothing depends on it
        early = ys[1] if ys[1].requires_grad else ys[1] + 0.0 * func.weight
        assert float(torch.autograd.grad(early.sum(), func.weight, allow_unused=True)[0]) == 0.0
    with torch.no_grad():
        plain = fm.odeint(func, torch.zeros(2, 1, dtype=D), t, method=method, options=options, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ys.detach(), plain, rtol=1e-12, atol=1e-12)


def test_gradients_of_captured_tensors_in_dense_solutions() -> None:
    func = Late()
    dense = odeint_dense(func, torch.zeros(1, dtype=D), 0.0, 1.0)
    assert math.isclose(float(torch.autograd.grad(dense(1.0).sum(), func.weight)[0]), 0.5, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dopri5", {}),
        ("dopri5", {"jump_t": [0.5]}),
        ("rk4", {"step_size": 0.01}),
        ("explicit_adams", {"step_size": 0.01, "interp": "cubic"}),
        ("trbdf2", {}),
        ("sdirk2", {"step_size": 0.01, "interp": "cubic"}),
    ],
    ids=str,
)
def test_events_after_a_late_use(method: str, options: dict[str, Any]) -> None:
    """y = 1/2 + weight (t - 1/2) meets 2 at 1/2 + 3 / (2 weight)."""
    func = Late()
    event_t, ys = fm.odeint_event(
        func,
        torch.zeros(1, dtype=D),
        0.0,
        event_fn=lambda t, y: y - 2.0,
        method=method,
        options=options,
        rtol=1e-8,
        atol=1e-8,
    )
    assert math.isclose(event_t.item(), 1.0, rel_tol=0.01)
    assert math.isclose(float(torch.autograd.grad(event_t, func.weight, retain_graph=True)[0]), -1.5 / 9, rel_tol=0.05)
    assert abs(float(torch.autograd.grad(ys[-1].sum(), func.weight)[0])) < 0.02  # at the event y is 2


def test_no_call_is_spent_on_looking() -> None:
    """A solve that needs no gradient takes as many calls with gradients enabled as without."""
    counts = []
    for enabled in (False, True):
        func = Late()
        func.weight.requires_grad_(False)
        with torch.set_grad_enabled(enabled):
            assert not fm.odeint(func, torch.zeros(1, dtype=D), times(0.0, 1.0)).requires_grad
        counts.append(func.calls)
    assert counts[0] == counts[1]


def test_callbacks_are_told_once_where_a_solve_begins_again() -> None:
    class Told(Late):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[tuple[str, float]] = []

        def callback_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            self.told.append(("step", float(t)))

        def callback_accept_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            self.told.append(("accept", float(t)))

        def callback_reject_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            self.told.append(("reject", float(t)))

    for method, options in (("dopri5", {}), ("dopri5", {"jump_t": [0.25]}), ("kvaerno3", {}), ("trbdf2", {})):
        lists = []
        for enabled in (False, True):
            func = Told()
            with torch.set_grad_enabled(enabled):
                fm.odeint(func, torch.zeros(1, dtype=D), times(0.0, 1.0), method=method, options=options)
            lists.append(func.told)
            assert [kind for kind, _ in func.told[:2]] == ["step", "accept"]
        assert lists[0] == lists[1], method
