"""Networks that write to the times they are given: the same numbers, and the caller's times as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels.solvers.methods import registry

B, D = 4, 3


def core(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    v = torch.tanh(x) * torch.cos(t.reshape(-1, 1))
    return v if y is None else v + 0.3 * y.reshape(-1, 1) * x


def clean(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    return core(x, t * 3, y)


def writing(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    t.mul_(3)
    v = core(x, t, y)
    t.add_(5.0)  # also where it is 0
    return v


def state(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1, 1, B * D, dtype=dtype).reshape(B, D)


GUIDANCE: dict[str, Any] = {
    "none": lambda batched: None,
    "cfg": lambda batched: fm.guidance.CFG(2.0, negative={"y": 0}, batched=batched),
    "rescaled": lambda batched: fm.guidance.CFG(2.0, negative={"y": 0}, batched=batched, rescale=0.5),
    "zero_star": lambda batched: fm.guidance.CFG(2.0, negative={"y": 0}, batched=batched, zero_star=True),
    "apg": lambda batched: fm.guidance.APG(2.0, negative={"y": 0}, batched=batched),
    "several": lambda batched: fm.guidance.MultiCondition([({"y": 1}, 2.0)], negative={"y": 0}, batched=batched),
}
METHODS = [name for name in registry.names() if registry.find(name).kind in ("fixed", "multistep", "adaptive")]
SOME = ["euler", "rk4", "ab2", "dpmpp_2m", "dopri5", "heun_euler"]


def both(solve: Any) -> None:
    torch.testing.assert_close(solve(writing), solve(clean), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batched", [False, ["y"], "auto"], ids=["apart", "joined", "auto"])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("method", SOME)
def test_samples(method: str, guidance: str, batched: Any) -> None:
    y = torch.tensor([1, 2, 0, 1])
    for prediction, grid in (("velocity", [0.0, 0.3, 1.0]), ("x_1", [0.0, 0.4, 0.9])):
        both(
            lambda f, p=prediction, g=grid: fm.sample(
                f,
                state(),
                method=method,
                time_grid=g,
                prediction=p,
                guidance=GUIDANCE[guidance](batched),
                y=y,
                time_dtype=torch.float64,
                max_steps=50,
            )[0]
        )


@pytest.mark.parametrize("name", METHODS)
def test_samples_of_every_method(name: str) -> None:
    both(lambda f: fm.sample(f, state(), method=name, time_grid=[0.0, 0.3, 0.6, 0.9], time_dtype=torch.float64)[0])


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_streams(guidance: str) -> None:
    rule = GUIDANCE[guidance](False)

    def solve(f: Any) -> Tensor:
        results = torch.zeros(B, D, dtype=torch.float64)
        requests = [(state()[i], {"y": torch.tensor(i)}) for i in range(B)]
        for r in fm.sample_stream(f, requests, capacity=2, guidance=rule, prediction="x_1", t1=0.9):
            results[r[0]] = r[1]
        return results

    both(solve)


@pytest.mark.parametrize("guidance", ["none", "cfg"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_likelihoods(method: str, mode: str, guidance: str, chunk: int | None) -> None:
    options: dict[str, Any] = {"steps": 5} if method == "rk4" else {}
    for prediction in ("velocity", "x_0"):
        both(
            lambda f, p=prediction: (
                fm.log_prob(
                    f,
                    state(),
                    method=method,
                    mode=mode,
                    chunk=chunk,
                    guidance=GUIDANCE[guidance](False),
                    prediction=p,
                    t_0=0.1,
                    y=torch.ones(B),
                    **options,
                ).log_prob
            )
        )


@pytest.mark.parametrize("prediction", ["velocity", "x_1"])
def test_log_probabilities_of_steps(prediction: str) -> None:
    t = torch.full((B,), 0.3, dtype=torch.float64)
    kept = t.clone()

    def solve(f: Any, t: Any, u: Any) -> Tensor:
        return fm.sde_step_log_prob(
            f, state(), state() + 0.05, t, u, sde=fm.SDE(), path=fm.paths.CondOT(), prediction=prediction
        )

    both(lambda f: solve(f, t, t + 0.1))
    assert torch.equal(t, kept)
    both(lambda f: solve(f, 0.3, 0.4))


def test_divergences_and_guided_functions_leave_the_callers_times() -> None:
    t = torch.full((B,), 0.3, dtype=torch.float64)
    kept = t.clone()
    both(lambda f: fm.divergence(lambda t, x: f(x, t), t, state())[1])
    guided = fm.guidance.CFG(2.0, negative={"y": 0}, batched=False)
    both(lambda f: guided.at(f, {"y": torch.ones(B)})(state(), t))
    assert torch.equal(t, kept)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "reversible"])
@pytest.mark.parametrize("method", ["euler", "heun2", "rk4"])
@pytest.mark.parametrize("time_shape", ["batch", "scalar"])
def test_gradients_of_samples(method: str, gradient: str, time_shape: str) -> None:
    def solve(f: Any) -> Tensor:
        x_0 = state().requires_grad_()
        samples, _ = fm.sample(
            f, x_0, method=method, steps=4, gradient=gradient, time_shape=time_shape, time_dtype=torch.float64
        )
        return torch.stack([samples, *torch.autograd.grad(samples.square().sum(), x_0)])

    both(solve)


REVERSIBLE = {"options": {"reversible": True, "step_size": 0.1}}
EXPLICIT, STIFF = ("rk4", "heun2", "dopri5"), ("implicit_euler", "trapezoid", "gl4", "sdirk3", "kvaerno3")


@pytest.mark.parametrize(
    ("method", "options"),
    [*((name, {}) for name in EXPLICIT + STIFF), ("rk4", REVERSIBLE), ("heun2", REVERSIBLE)],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_equations(method: str, options: dict[str, Any]) -> None:
    times, kept = torch.linspace(0, 0.5, 3, dtype=torch.float64), torch.linspace(0, 0.5, 3, dtype=torch.float64)

    def solve(f: Any) -> Tensor:
        y0 = state()[:2].requires_grad_()
        ys = fm.odeint(lambda t, y: f(y, t), y0, times, method=method, **options)
        return torch.cat([ys.detach(), torch.autograd.grad(ys[-1].sum(), y0)[0][None]])

    both(solve)
    assert torch.equal(times, kept)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_midpoint"])
def test_event_times_with_gradients(method: str) -> None:
    def solve(f: Any) -> Tensor:
        p = torch.ones((), dtype=torch.float64, requires_grad=True)
        options = {} if method == "dopri5" else {"options": {"step_size": 0.05}}
        event_t, _ = fm.odeint_event(
            lambda t, y: p * f(y, t),
            state()[:2],
            torch.zeros((), dtype=torch.float64),
            event_fn=lambda t, y: t - 0.37 + 0.1 * y.sum(),
            method=method,
            **options,
        )
        return torch.stack([event_t.detach(), *torch.autograd.grad(event_t, p)])

    both(solve)
