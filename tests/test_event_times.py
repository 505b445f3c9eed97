"""Event times: their gradients in all interfaces, implicit methods, callbacks, and event functions that are wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from odeint_problems import D
from torch import Tensor, nn

import fmkernels as fm
from fmkernels.solvers.methods.implicit_tableaus import IMPLICIT_TABLEAUS


class Growth(nn.Module):
    """y' = rate y meets the level at log(level / y0) / rate."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y


SETTINGS: list[dict[str, Any]] = [
    {"method": "dopri5"},
    {"method": "rk4", "options": {"step_size": 0.05, "interp": "cubic"}},
    {"method": "explicit_adams", "options": {"step_size": 0.01, "interp": "cubic"}},
    {"method": "kvaerno3"},
    {"method": "gl4", "options": {"step_size": 0.1, "interp": "cubic"}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["method"])
@pytest.mark.parametrize("interface", [fm.odeint, fm.odeint_adjoint], ids=["direct", "adjoint"])
def test_the_event_time_has_its_gradient_by_itself(interface: Any, settings: dict[str, Any]) -> None:
    func, level = Growth(), torch.tensor(3.0, dtype=D, requires_grad=True)
    y0, t = torch.tensor([1.0], dtype=D, requires_grad=True), torch.tensor([0.25, 1.0], dtype=D, requires_grad=True)
    event_t, ys = interface(func, y0, t, event_fn=lambda t, y: y - level, rtol=1e-9, atol=1e-9, **settings)
    inputs = (y0, func.rate, level, t)
    exact = t[0] + torch.log(level / y0[0]) / func.rate
    tolerance: Any = {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(event_t, exact.to(event_t), **tolerance)
    ours, wanted = (torch.autograd.grad(x, inputs, retain_graph=True) for x in (event_t, exact))
    # t[1] says no more than the direction
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    # the state is that at a fixed time
    fixed = y0 * torch.exp(func.rate * (exact.detach() - t[0]))
    ours, wanted = (torch.autograd.grad(x.sum(), (y0, func.rate)) for x in (ys[-1], fixed))
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", IMPLICIT_TABLEAUS)
def test_events_of_implicit_methods(method: str, reverse: bool) -> None:
    """y' = cos(t) - 100 (y - sin(t)), whose solution is sin(t), meets 1/2 at pi / 6."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.cos(t) - rate * (y - torch.sin(t))

    rate = -100.0 if reverse else 100.0
    start = math.pi / 2 if reverse else 0.0
    y0 = torch.tensor([math.sin(start)], dtype=D, requires_grad=True)
    options = {} if IMPLICIT_TABLEAUS[method].error is not None else {"step_size": 0.01, "interp": "cubic"}
    settings: dict[str, Any] = {"method": method, "options": options, "rtol": 1e-8, "atol": 1e-8}
    event_t, ys = fm.odeint_event(func, y0, start, event_fn=lambda t, y: y - 0.5, reverse_time=reverse, **settings)
    loose = 2e-2 if method == "implicit_euler" else 1e-4
    assert math.isclose(event_t.item(), math.pi / 6, abs_tol=loose)
    torch.testing.assert_close(ys[:, 0].detach(), torch.tensor([math.sin(start), 0.5], dtype=D), rtol=0.0, atol=1e-5)
    # the initial state is forgotten at once
    assert abs(torch.autograd.grad(event_t, y0, retain_graph=True)[0].item()) < 1e-4
    with torch.no_grad():
        plain = fm.odeint_event(func, y0, start, event_fn=lambda t, y: y - 0.5, reverse_time=reverse, **settings)
    torch.testing.assert_close(plain[0], event_t.detach(), rtol=1e-9, atol=1e-9)
    if not options:
        return
    with pytest.raises(ValueError, match="step_size"):
        fm.odeint_event(func, y0, start, event_fn=lambda t, y: y - 0.5, method=method)


def test_events_of_implicit_methods_that_never_come() -> None:
    y0, t = torch.ones(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    with pytest.raises(RuntimeError, match="event_fn"):
        fm.odeint(
            lambda t, y: -y, y0, t, event_fn=lambda t, y: y + 1.0, method="implicit_euler", options={"step_size": 1e9}
        )
    with pytest.warns(UserWarning, match="max_steps"), pytest.raises(RuntimeError, match="event_fn"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=lambda t, y: y + 1.0, method="trbdf2", options={"max_num_steps": 5})


@pytest.mark.parametrize(
    "settings", [{}, {"method": "rk4", "options": {"step_size": 0.3}}, {"method": "trbdf2"}], ids=str
)
def test_an_event_function_that_is_nan_or_no_tensor(settings: dict[str, Any]) -> None:
    y0, t = torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D)

    def nan_at(time: float) -> Any:
        return lambda t, y: y - 5.0 if t < time else y * math.nan

    for event_fn, match in ((nan_at(-1.0), "NaN at t = 0"), (nan_at(1.0), "NaN at t = 1")):
        with pytest.raises(ValueError, match=f"^event_fn: expected numbers, got {match}"):
            fm.odeint(lambda t, y: y, y0, t, event_fn=event_fn, **settings)
    for value in (None, 1.0, torch.zeros(0), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"^event_fn: expected a floating tensor"):
            fm.odeint(lambda t, y: y, y0, t, event_fn=lambda t, y, value=value: value, **settings)

    def one_of_two(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[0] - 5.0, y[1] * math.nan])

    with pytest.raises(ValueError, match=r"^event_fn: expected numbers"):
        fm.odeint(lambda t, y: y, y0, t, event_fn=one_of_two, **settings)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dopri5", {}),
        ("euler", {"step_size": 0.25}),
        ("explicit_adams", {"step_size": 0.01}),
        ("sdirk2", {"step_size": 0.25}),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_callbacks_on_the_way_to_an_event(method: str, options: dict[str, Any], gradient: bool) -> None:
    """Each step once, in order, up to the one in which the event lies."""

    class Told(Growth):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[float] = []

        def callback_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            self.told.append(float(t))

    func = Told().requires_grad_(gradient)
    y0, t = torch.ones(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    event_t, _ = fm.odeint(func, y0, t, event_fn=lambda t, y: y - 2.0, method=method, options=options)
    assert func.told == sorted(set(func.told))
    assert func.told[0] == 0.0
    if options:
        assert len(func.told) == math.ceil(event_t.item() / options["step_size"])
