"""Functions that keep the times and states that they are given, and what they returned: nobody writes to them later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels.solvers.methods import registry as methods

TOLERANCES = {"rtol": 1e-3, "atol": 1e-4}
METHODS = methods.names(methods.ODEINT)


def field(t: Tensor, y: Tensor) -> Tensor:
    return torch.sin(y) + t.reshape(-1, *[1] * (y.dim() - 1)).to(y.dtype)


class Keeper:
    """Keeps the arguments and values of its calls, from some call on, as they are or as views of their memory."""

    def __init__(self, function: Callable[..., Any], first: int = 1, views: bool = False) -> None:
        self.function, self.first, self.views = function, first, views
        self.calls = 0
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Tensor, y: Any) -> Any:
        self.calls += 1
        value = self.function(t, y)
        if self.calls >= self.first:
            for x in (t, *(y if isinstance(y, tuple) else (y,)), *(value if isinstance(value, tuple) else (value,))):
                self.kept.append((x.detach() if self.views else x, x.detach().clone()))
        return value

    def check(self, calls: int | None = None) -> None:
        assert self.kept
        assert all(torch.equal(x, copy) for x, copy in self.kept)
        assert calls is None or self.calls == calls


def options_of(method: str) -> list[dict[str, Any]]:
    kind = methods.find(method, methods.ODEINT).kind
    if kind in ("adaptive", "implicit"):
        return [{}, {"per_sample": True}]
    return [{"step_size": 0.15}, {"step_size": 0.15, "interp": "cubic"}] if kind == "fixed" else [{}]


# at most 16 KiB, and more: there a trajectory's rows are the states
@pytest.mark.parametrize(
    ("method", "columns"),
    [
        (method, columns)
        for method in METHODS
        for columns in (2, 1400)
        if columns == 2 or methods.find(method, methods.ODEINT).kind != "implicit"
    ],
)
def test_what_a_function_keeps_stays_as_it_is(method: str, columns: int) -> None:
    implicit = methods.find(method, methods.ODEINT).kind == "implicit"
    y0 = torch.linspace(-1.0, 1.0, 3 * columns, dtype=torch.float64 if implicit else torch.float32).reshape(3, columns)
    start, t = y0.clone(), torch.linspace(0.0, 1.0, 5, dtype=y0.dtype)
    for options in options_of(method):
        settings: dict[str, Any] = {"method": method, "options": options, **TOLERANCES}
        with torch.no_grad():
            counter = Keeper(field, first=10**9)
            expected = fm.odeint(counter, y0, t, **settings)
        for gradient, first, views in ((False, 1, False), (False, 4, False), (False, 6, True), (True, 4, False)):
            with torch.set_grad_enabled(gradient):
                keeper = Keeper(field, first, views)
                ys = fm.odeint(keeper, y0, t, **settings)
            assert torch.equal(ys, expected)
            keeper.check(None if gradient else counter.calls)  # looking for a gradient may take one
            ys.detach().zero_()  # nor are the results theirs
            keeper.check()
            if not gradient:
                for x, _ in keeper.kept:  # nor are they anything of a later solve's
                    if x.data_ptr() not in (y0.data_ptr(), t.data_ptr()) and not x.requires_grad:
                        x.fill_(7.0)
                with torch.no_grad():
                    assert torch.equal(fm.odeint(field, y0, t, **settings), expected)
        assert torch.equal(y0, start)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "implicit_adams", "trbdf2"])
@pytest.mark.parametrize("first", [1, 4])
def test_tuples_complex_states_tolerances_and_other_interfaces(method: str, first: int) -> None:
    t = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)
    y0 = torch.linspace(0.1, 1.0, 6, dtype=torch.float64).reshape(3, 2)
    states = [(y0, y0[0]), (torch.complex(y0, -y0),), torch.complex(y0, -y0)]
    fixed = {"options": {"step_size": 0.1}} if methods.find(method, methods.ODEINT).kind == "fixed" else {}

    def func(t: Tensor, y: Any) -> Any:
        return tuple(x * t - x for x in y) if isinstance(y, tuple) else y * t - y

    for state in states:
        keeper = Keeper(func, first)
        with torch.no_grad():
            fm.odeint(keeper, state, t, method=method, **TOLERANCES)
        keeper.check()
    # as many tolerances as numbers: the norm by single operations
    keeper = Keeper(func, first)
    with torch.no_grad():
        ys = fm.odeint(keeper, y0, t, method=method, rtol=torch.full((2,), 1e-4), atol=1e-5)
        assert torch.equal(ys, fm.odeint(func, y0, t, method=method, rtol=torch.full((2,), 1e-4), atol=1e-5))
    keeper.check()
    # the event function too
    for gradient in (False, True):
        keeper, event = Keeper(func, first), Keeper(lambda t, y: y.mean() - 0.4, 2)
        with torch.set_grad_enabled(gradient):
            fm.odeint_event(keeper, y0, 0.0, event_fn=event, method=method, **fixed, **TOLERANCES)
        keeper.check()
        event.check()
    # the adjoint solve hands out states of its own
    keeper = Keeper(func, first)
    x = y0.clone().requires_grad_()
    fm.odeint_adjoint(keeper, x, t, method=method, adjoint_params=(), **TOLERANCES).sum().backward()
    keeper.check()
    if method in ("dopri5", "bosh3"):
        keeper = Keeper(func, first)
        solution = fm.odeint_dense(keeper, y0, 0.0, 1.0, method=method, **TOLERANCES)
        fm.odeint_dense(keeper, y0 + 1.0, 0.0, 1.0, method=method, **TOLERANCES)
        solution(0.5).detach().zero_()
        keeper.check()


@pytest.mark.parametrize(
    ("noise", "calculus", "method"),
    [
        ("additive", "ito", "euler"),
        ("additive", "ito", "heun"),
        ("diagonal", "ito", "milstein"),
        ("diagonal", "stratonovich", "heun"),
        ("matrix", "stratonovich", "midpoint"),
    ],
)
def test_drift_and_diffusion_keep_what_they_are_given(noise: str, calculus: str, method: str) -> None:
    y0, t = torch.linspace(-1.0, 1.0, 6).reshape(3, 2), torch.linspace(0.0, 1.0, 3)

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * (torch.cos(y) if noise == "diagonal" else torch.cos(y)[..., None])

    settings: dict[str, Any] = {"noise": noise, "calculus": calculus, "method": method, "dt": 0.1, "seed": 3}
    level = 0.1 if noise == "additive" else diffusion
    with torch.no_grad():
        expected = fm.sdeint(field, level, y0, t, **settings)
        for first in (1, 5):
            drift, kept = Keeper(field, first), Keeper(diffusion, first)
            ys = fm.sdeint(drift, 0.1 if noise == "additive" else kept, y0, t, **settings)
            assert torch.equal(ys, expected)
            ys.zero_()
            drift.check()
            if noise != "additive":
                kept.check()


@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams", "dopri5"])
def test_a_function_that_makes_its_state_ask_for_a_gradient(method: str) -> None:
    def divergence(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y.requires_grad_(True)
            (grad,) = torch.autograd.grad(torch.sin(y).sum(), y)
        return grad.detach()

    y0, t = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64), torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    with torch.no_grad():
        ys = fm.odeint(divergence, y0.clone(), t, method=method)
        assert torch.equal(ys, fm.odeint(lambda t, y: torch.cos(y), y0, t, method=method))
    assert not ys.requires_grad
