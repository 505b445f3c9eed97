"""Wrong arguments of `fm.odeint` and its relatives: each has a clear answer, by the caller's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from wrong_values import Calls, cases, check_answer

import fmkernels as fm

D = torch.float64
VALUES: dict[str, Any] = {
    "none": None,
    "string": "x",
    "list": [1, 2],
    "tuple": (),
    "dict": {1: 2},
    "bool": True,
    "nan": math.nan,
    "numpy nan": np.float64("nan"),
    "inf": math.inf,
    "-inf": -math.inf,
    "beyond floats": 10**400,
    "complex": 1j,
    "object": object(),
    "class": int,
    "meta tensor": torch.ones(2, device="meta"),
    "complex tensor": torch.ones(2, dtype=torch.complex64),
    "sparse tensor": torch.ones(2).to_sparse(),
    "nan tensor": torch.full((2,), math.nan),
    "large tensor": torch.ones(7, 7, 7),
}
Y0, T = torch.ones(2, dtype=D), torch.linspace(0.0, 1.0, 3, dtype=D)
ODE: dict[str, Any] = {"func": lambda t, y: -y, "y0": Y0, "t": T}
TENSORS = ["complex tensor", "nan tensor", "large tensor"]
BOOL, NONE = ["none", "bool"], ["none"]
POINTS = ["none", "list", "tuple", "inf", "-inf", "large tensor"]


def solve(method: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    return fm.odeint, {**ODE, "method": method}


def event(**arguments: Any) -> Any:
    right = {"func": lambda t, y: -y, "y0": Y0, "t0": 0.0, "event_fn": lambda t, y: 0.25 - t * t}
    return fm.odeint_event(**right | arguments)


OF_ALL: dict[str, list[str]] = {"func": [], "t": [], "rtol": [], "atol": [], "options": ["none"]}
CALLS: Calls = {
    "dopri5": (
        *solve("dopri5"),
        OF_ALL
        | {"y0": TENSORS}
        | {f"options: {name}": NONE for name in ("first_step", "min_step", "max_num_steps", "safety", "ifactor")}
        | {f"options: {name}": NONE for name in ("dfactor", "controller", "norm")}
        | {"options: max_step": ["none", "inf"], "options: per_sample": BOOL, "options: checkpoint": BOOL}
        | {"options: step_t": POINTS, "options: jump_t": POINTS},
    ),
    "rk4": (
        *solve("rk4"),
        OF_ALL
        | {f"options: {name}": NONE for name in ("step_size", "grid_constructor", "max_order")}
        | {"options: interp": []}
        | {f"options: {name}": BOOL for name in ("perturb", "checkpoint", "reversible")},
    ),
    "kvaerno3": (
        *solve("kvaerno3"),
        OF_ALL
        | {f"options: {name}": NONE for name in ("step_size", "first_step", "min_step", "max_num_steps", "norm")}
        | {"options: per_sample": BOOL},
    ),
    "odeint": (fm.odeint, ODE, {"method": ["none"]}),
    "odeint_adjoint": (
        fm.odeint_adjoint,
        {**ODE, "adjoint_params": ()},
        OF_ALL
        | {f"adjoint_{name}": NONE for name in ("rtol", "atol", "method", "options")}
        | {"adjoint_params": ["tuple"]},
    ),
    "odeint_event": (
        event,
        {},
        {"func": [], "event_fn": [], "t0": [], "reverse_time": ["bool"], "odeint_interface": [], "rtol": []},
    ),
    "odeint_dense": (
        fm.odeint_dense,
        {"func": lambda t, y: -y, "y0": Y0, "t0": 0.0, "t1": 1.0},
        {"func": [], "t0": [], "t1": [], "rtol": [], "atol": [], "method": ["none"], "options": ["none"]},
    ),
    "sdeint": (
        fm.sdeint,
        {"drift": lambda t, y: -y, "diffusion": 0.1, "y0": Y0, "t": T},
        {
            "drift": [],
            "diffusion": [],
            "t": ["list"],
            "method": ["none"],
            "noise": [],
            "calculus": [],
            "dt": ["none"],
            "seed": ["none"],
            "generator": ["none"],
            "row_offset": [],
            "noise_transform": ["none"],
        },
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument"), cases(CALLS), ids=lambda value: value)
def test_a_wrong_argument_of_an_equation_has_a_clear_answer(name: str, argument: str) -> None:
    call, right, arguments = CALLS[name]
    option = argument.removeprefix("options: ")
    names = {argument, option, "seed, generator" if argument == "generator" else argument}
    for kind, value in VALUES.items():
        given = right | ({"options": {option: value}} if option != argument else {argument: value})
        check_answer(lambda given=given: call(**given), names, kind, kind in arguments[argument])


def test_an_empty_and_a_scalar_state_that_fail_are_filled() -> None:
    y0 = torch.tensor(math.nan, dtype=D)
    with pytest.warns(UserWarning, match="not finite"):
        ys = fm.odeint(lambda t, y: -y, y0, T)
    assert ys.shape == (3,)
    assert ys.isnan().all()


def test_values_of_the_state_are_needed_where_they_choose_the_steps() -> None:
    y0 = torch.ones(2, device="meta")
    field: Callable[[Tensor, Tensor], Tensor] = lambda t, y: -y  # noqa: E731
    for call in (
        lambda: fm.odeint(field, y0, T),
        lambda: fm.odeint(field, y0, T, method="gl4"),
        lambda: fm.odeint_dense(field, y0, 0.0, 1.0),
        lambda: fm.odeint_event(field, y0, torch.zeros(()), event_fn=lambda t, y: t - 0.5),
    ):
        with pytest.raises(ValueError, match="y0: expected a tensor with values"):
            call()
