"""fm.sample within what torch.compile traces: every setting is guarded, or refused where no guard would see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tracing import traces_objects

import fmkernels as fm
from fmkernels.solvers.methods.diffusion import DPMSolverPP
from fmkernels.solvers.sampling import grids

pytestmark = traces_objects

X = torch.linspace(-1.0, 1.0, 6).reshape(3, 2)
Y = torch.arange(3.0)


def field(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    v = torch.sin(x) * (0.5 + t[:, None])
    return v if y is None else v + y.reshape(-1, 1).to(x.dtype)


def solver(**settings: Any) -> fm.Solver:
    return fm.Solver(field, **settings)


CFG = fm.guidance.CFG
# what is called, and values of one setting, one after the other
CASES: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "steps": (lambda x, v: fm.sample(field, x, steps=v), [2, 3, 2]),
    "times": (lambda x, v: fm.sample(field, x, time_grid=v), [[0.0, 0.5, 1.0], [0.0, 0.2, 1.0], [0.0, 1.0]]),
    "schedule": (
        lambda x, v: fm.sample(field, x, steps=2, schedule=v),
        ["cosine", grids.Power(2.0), grids.Power(3.0), lambda n: np.linspace(0, 1, n + 1)],
    ),
    "method": (lambda x, v: fm.sample(field, x, steps=2, method=v), ["heun2", DPMSolverPP(1), DPMSolverPP(2)]),
    "solvers": (
        lambda x, v: v.sample(x),
        [solver(time_grid=[0.0, 0.5, 1.0]), solver(time_grid=[0.0, 0.2, 1.0]), solver(steps=1)],
    ),
    "guidance": (
        lambda x, v: fm.sample(field, x, steps=1, guidance=v, y=Y),
        [CFG(s, negative={"y": n}) for s, n in ((2.0, 0.0), (2.0, 1.0), (Y, 1.0), (lambda t: 1.0 + t, 1.0))],
    ),
    "sde": (
        lambda x, v: fm.sample(field, x, steps=2, sde=v),
        [fm.SDE(scale=0.0), fm.SDE(scale=0.0, last_step="tweedie")],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_setting_is_guarded(name: str) -> None:
    call, values = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, v: call(x, v)[0], fullgraph=True, backend="eager")
    with torch.no_grad():
        for value in values:
            torch.testing.assert_close(compiled(X, value), call(X, value)[0], msg=lambda m, v=value: f"{v}: {m}")


def test_a_path_changed_in_place_is_seen() -> None:
    path = fm.paths.VP()

    def solve(x: Tensor) -> Tensor:
        return fm.sample(field, x, steps=1, path=path, prediction="x_1")[0]

    def change_and_solve(x: Tensor) -> Tensor:
        path.beta_max = 7.0
        return solve(x)

    torch._dynamo.reset()
    compiled = torch.compile(solve, fullgraph=True, backend="eager")
    with torch.no_grad():
        for beta in (20.0, 5.0):
            path.beta_max = beta
            torch.testing.assert_close(compiled(X), solve(X))
        within = torch.compile(change_and_solve, fullgraph=True, backend="eager")(X)
        path.beta_max = 7.0
        torch.testing.assert_close(within, solve(X))


def test_attributes_changed_between_calls_are_seen() -> None:
    kept = solver(steps=2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kept.sample(x)[0], fullgraph=True, backend="eager")
    with torch.no_grad():
        for name, value in (("steps", 1), ("method", "heun2"), ("prediction", "v")):
            setattr(kept, name, value)
            torch.testing.assert_close(compiled(X), fm.sample(field, X, **vars_of(kept))[0])


def vars_of(kept: fm.Solver) -> dict[str, Any]:
    return {name: getattr(kept, name) for name in ("steps", "method", "schedule", "prediction")}


POWER = 2.0
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tensor": ({"time_grid": torch.tensor([0.0, 0.5, 1.0])}, "time_grid: expected a sequence of Python numbers"),
    "array": ({"time_grid": np.array([0.0, 0.5, 1.0])}, "time_grid: expected a sequence of Python numbers"),
    "schedule": ({"steps": 2, "schedule": lambda n: np.linspace(0, 1, n + 1) ** POWER}, "schedule: expected"),
    "scale": (
        {"steps": 2, "guidance": CFG(lambda t: POWER * t, negative={"y": 0.0}), "y": Y},
        "guidance: scale: expected",
    ),
    "diffusion": ({"steps": 2, "method": fm.SDE(lambda t: POWER * t)}, "method: diffusion: expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_guard_sees_is_refused_and_not_baked_in(name: str) -> None:
    settings, message = REFUSED[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fm.sample(field, x, **settings)[0], fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match=message):
        compiled(X)


def test_a_static_buffer_under_compile() -> None:
    buffer = torch.empty(3, 2)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return buffer.copy_(field(x, t))

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fm.sample(model, x, steps=2, method="rk4")[0], backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), fm.sample(field, X, steps=2, method="rk4")[0])


@pytest.mark.parametrize(
    "grid",
    [torch.tensor([0.0, 0.5, 1.0]), np.array([0.0, 0.4, 1.0]), torch.tensor([[0.0] * 3, [0.2, 0.3, 0.4], [1.0] * 3])],
    ids=["tensor", "array", "of each sample"],
)
def test_times_that_no_guard_sees_break_the_graph_whatever_ran_before(grid: Any) -> None:
    torch._dynamo.reset()
    fm.clear_caches()
    compiled = torch.compile(lambda x, g: fm.sample(field, x, time_grid=g)[0], backend="eager")
    torch.testing.assert_close(compiled(X, grid), fm.sample(field, X, time_grid=grid)[0])
    other = grid * 0.9
    torch.testing.assert_close(compiled(X, other), fm.sample(field, X, time_grid=other)[0])


def test_likelihoods_run_beside_the_graph() -> None:
    x = torch.randn(4, 3)
    for method in ("rk4", "dopri5"):

        def value(x: Tensor, method: str = method) -> Tensor:
            steps = 3 if method == "rk4" else None
            return 2.0 * fm.log_prob(lambda x, t: torch.tanh(x) + t[:, None], x, method=method, steps=steps).log_prob

        torch.testing.assert_close(torch.compile(value, backend="eager")(x + 1.0), value(x + 1.0))
