"""Warnings: each points at the line of the user's code that called."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmkernels as fm
from fmkernels import _dispatch

PACKAGE = Path(fm.__file__).parent
T = torch.tensor([0.0, 1.0], dtype=torch.float64)
Y = torch.ones(2, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        self.fixed = nn.Parameter(torch.tensor(1.0, dtype=torch.float64), requires_grad=False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.weight * self.fixed * y


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def told(name: str) -> Callable[..., Tensor]:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y

    setattr(func, name, lambda t, y, h: None)
    return func


def explode(t: Tensor, y: Tensor) -> Tensor:
    return y * y * 1e3


def missing_implementation() -> None:
    _dispatch.chosen.cache_clear()
    try:
        _dispatch.chosen("combine", "cpu", "auto")
    finally:
        _dispatch.chosen.cache_clear()


def failing_backward() -> None:
    net, x = Net(), Y.clone().requires_grad_()
    ys = fm.odeint_adjoint(net, x, T, adjoint_options={"max_num_steps": 1})
    ys.sum().backward()


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "option": (lambda: fm.odeint(decay, Y, T, method="rk4", options={"nonsense": 1}), "has no 'nonsense'"),
    "judging callback": (lambda: fm.odeint(told("callback_accept_step"), Y, T, method="rk4"), "does not call"),
    "any callback": (lambda: fm.odeint(told("callback_step"), Y, T, method="scipy_solver"), "does not call"),
    "event": (
        lambda: fm.odeint_event(decay, Y, 0.0, event_fn=lambda t, y: y[0] - 0.5, options={"nonsense": 1}),
        "has no 'nonsense'",
    ),
    "dense": (lambda: fm.odeint_dense(decay, Y, 0.0, 1.0, options={"nonsense": 1}), "has no 'nonsense'"),
    "steps": (lambda: fm.odeint(decay, Y, T, options={"max_num_steps": 1}), "reached max_steps"),
    "implicit steps": (
        lambda: fm.odeint(decay, Y, T, method="kvaerno3", options={"max_num_steps": 1}),
        "reached max_steps",
    ),
    "sample": (
        lambda: fm.sample(lambda x, t: x * x * 1e9, torch.ones(2, 2), method="dopri5"),
        "adaptive solve",
    ),
    "adjoint norm": (
        lambda: fm.odeint_adjoint(
            (net := Net()),
            Y,
            T,
            adjoint_options={"norm": lambda state: state[1].abs().max()},
            adjoint_params=tuple(net.parameters()),
        ),
        "adjoint_params",
    ),
    "backward": (failing_backward, "reached max_steps"),
    "scipy option": (
        lambda: fm.odeint(decay, Y, T, method="scipy_solver", options={"solver": "RK45", "min_step": 0.1}),
        "has no 'min_step'",
    ),
    "scipy end": (
        lambda: fm.odeint(explode, Y, T, method="scipy_solver", options={"solver": "RK45"}),
        "ended before the last time",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_warning_points_at_the_callers_line(name: str) -> None:
    call, text = CALLS[name]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    ours = [w for w in seen if re.search(text, str(w.message))]
    assert ours
    assert {w.filename for w in ours} == {__file__}


def test_a_missing_implementation_is_told_at_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "unavailable", lambda impl, device: None if impl == "reference" else "not here")
    with pytest.warns(UserWarning, match="is not available on cpu") as seen:
        missing_implementation()
    assert seen[0].filename == __file__


def test_there_is_one_way_to_warn() -> None:
    files = [p for p in PACKAGE.rglob("*.py") if "warnings.warn(" in p.read_text() or "warn_explicit" in p.read_text()]
    assert [p.name for p in files] == ["_checks.py"]
