"""Functions that write to the state they are lent: told at any call in every road, or harmless where it is a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fmkernels as fm

D = torch.float64
T = torch.tensor([0.0, 0.4, 1.0], dtype=D)
LABELS = torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=D)


def start(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, dtype=D, generator=torch.Generator().manual_seed(seed))


def times(t: float) -> Tensor:
    return torch.full((4,), t, dtype=D)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) + t.reshape(-1, 1)


class Writing:
    """The velocity; from call number ``first`` on it spoils the state that it was given."""

    def __init__(self, first: int) -> None:
        self.first, self.calls = first, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x.clone(), t)
        if self.calls >= self.first:
            with torch.no_grad():
                x.mul_(1.5)
        self.calls += 1
        return v


Model = Callable[[Tensor, Tensor], Tensor]


def swapped(model: Model) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: model(y, t)


def labelled(model: Model) -> Callable[..., Tensor]:
    return lambda x, t, y: model(x, t) * (1.0 + y[:, None])


def two_calls() -> Any:
    return fm.guidance.CFG(2.0, negative={"y": 7.0}, batched=False)


# from a network and a state; the argument that the error names
ROADS: dict[str, tuple[Callable[[Model, Tensor], Any], str]] = {
    **{
        f"sample {method}": (lambda m, x, method=method: fm.sample(m, x, steps=6, method=method)[0], "model")
        for method in ("euler", "rk4", "ab3", "unipc", "dpmpp_2m", "ddim")
    },
    "sample dopri5": (lambda m, x: fm.sample(m, x, method="dopri5")[0], "model"),
    "sample_stream": (lambda m, x: next(fm.sample_stream(m, list(x), capacity=4)).x, "model"),
    "Solver": (lambda m, x: fm.Solver(m, steps=6).sample(x)[0], "model"),
    "trajectory": (lambda m, x: fm.sample(m, x, steps=6, return_trajectory=True)[0], "model"),
    "sde": (lambda m, x: fm.sample(m, x, steps=6, sde=fm.SDE("sigma"))[0], "model"),
    "guided": (lambda m, x: fm.sample(labelled(m), x, steps=4, guidance=two_calls(), y=LABELS)[0], "model"),
    "guided dopri5": (
        lambda m, x: fm.sample(labelled(m), x, method="dopri5", guidance=two_calls(), y=LABELS)[0],
        "model",
    ),
    "guidance.at": (lambda m, x: two_calls().at(labelled(m), {"y": LABELS})(x, times(0.3)), "model"),
    "log_prob forward": (lambda m, x: fm.log_prob(m, x, mode="forward", method="rk4", steps=3).log_prob, "model"),
    "log_prob forward dopri5": (lambda m, x: fm.log_prob(m, x, mode="forward").log_prob, "model"),
    "sample_with_log_prob": (
        lambda m, x: fm.sample_with_log_prob(m, x, mode="forward", steps=3, method="euler")[0],
        "model",
    ),
    "divergence": (lambda m, x: fm.divergence(swapped(m), times(0.2), x, mode="forward", chunk=1)[1], "func"),
    "divergence batched": (lambda m, x: fm.divergence(swapped(m), times(0.2), x, mode="forward", chunk=3)[1], "func"),
    "odeint rk4": (lambda m, x: fm.odeint(swapped(m), x, T, method="rk4"), "func"),
    "odeint explicit_adams": (lambda m, x: fm.odeint(swapped(m), x, T, method="explicit_adams"), "func"),
    "odeint trbdf2": (lambda m, x: fm.odeint(swapped(m), x, T, method="trbdf2", rtol=1e-2, atol=1e-2), "func"),
    "odeint tuple": (lambda m, x: fm.odeint(lambda t, y: (m(y[0], t),), (x,), T, method="rk4")[0], "func"),
    "odeint_dense": (lambda m, x: fm.odeint_dense(swapped(m), x, 0.0, 1.0)(0.5), "func"),
    "sdeint": (lambda m, x: fm.sdeint(swapped(m), 0.1, x, T, dt=0.2, seed=1), "drift"),
    "sdeint diffusion": (
        lambda m, x: fm.sdeint(lambda t, y: -y, swapped(m), x, T, dt=0.2, seed=3, noise="diagonal", method="euler"),
        "diffusion",
    ),
    "event_fn": (
        lambda m, x: fm.odeint_event(
            lambda t, y: torch.ones_like(y), x, 0.0, event_fn=lambda t, y: m(y, t).mean() - 5.0, method="dopri5"
        )[1],
        "event_fn",
    ),
}
ONCE = ("guidance.at", "divergence", "divergence batched")  # a call or two: none is late


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("road", ROADS)
def test_a_function_that_writes_to_its_state_is_told_at_any_call(
    road: str, first: int, mode: Callable[[], Any]
) -> None:
    solve, name = ROADS[road]
    if first and road in ONCE:
        first = 0
    x, kept = start(), start()
    with mode(), pytest.raises(ValueError, match=f"{name}: expected a function that leaves its input as it is"):
        solve(Writing(first), x)
    if first == 0 and road.startswith(("sample", "guided", "Solver", "odeint rk4", "log_prob")):
        assert torch.equal(x, kept)


def test_a_step_density_tells_of_a_network_that_writes() -> None:
    step = {"sde": fm.SDE("sigma"), "path": fm.paths.CondOT()}
    with pytest.raises(ValueError, match="model: expected a function that leaves its input as it is"):
        fm.sde_step_log_prob(Writing(0), start(), start(1), times(0.2), times(0.3), **step)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("road", [r for r in ROADS if r != "event_fn"])
def test_inference_tensors_give_the_same_numbers(road: str, mode: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        expected = ROADS[road][0](velocity, start())
    torch.manual_seed(0)
    with mode():
        found = ROADS[road][0](velocity, start())  # made there
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


ADAPTIVE = ["dopri5", "tsit5", "bosh3", "dopri8", "fehlberg2", "adaptive_heun"]


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize(
    "options",
    [{}, {"norm": lambda x: x.abs().max()}, {"per_sample": True}],
    ids=["plain", "norm", "per_sample"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_adaptive_odeint_lends_states_that_a_function_may_write_to(
    method: str, options: dict[str, Any], mode: Callable[[], Any]
) -> None:
    # torchdiffeq's own users write; what they are given here is of no further use
    def plain(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y) + t.reshape(-1, 1)

    def writing(t: Tensor, y: Tensor) -> Tensor:
        v = plain(t, y)
        y.mul_(1.5)
        return v

    with mode():
        found, expected = (fm.odeint(f, start(), T, method=method, options=dict(options)) for f in (writing, plain))
        pair, _ = fm.odeint(lambda t, y: (writing(t, y[0]), -y[1]), (start(), start(1)), T, method=method)
        alone, _ = fm.odeint(lambda t, y: (plain(t, y[0]), -y[1]), (start(), start(1)), T, method=method)
    assert torch.equal(found, expected)
    assert torch.equal(pair, alone)


@pytest.mark.parametrize("method", ["dopri5", "trbdf2"])
def test_gradients_of_a_function_that_writes_are_refused(method: str) -> None:
    weight = torch.tensor(0.7, dtype=D, requires_grad=True)

    def writing(t: Tensor, y: Tensor) -> Tensor:
        v = torch.tanh(y.clone() * weight) + t
        with torch.no_grad():
            y.mul_(1.5)
        return v

    y0 = start().requires_grad_()
    solve = fm.odeint_adjoint if method == "dopri5" else fm.odeint
    more = {"adjoint_params": (weight,)} if method == "dopri5" else {}
    with pytest.raises(ValueError, match="func: expected a function that leaves its input as it is"):
        solve(writing, y0, T, method=method, rtol=1e-3, atol=1e-3, **more).sum().backward()


@pytest.mark.parametrize("depth", [1, 2])
def test_writing_is_told_within_vmap(depth: int) -> None:
    def solve(x: Tensor) -> Tensor:
        return fm.sample(Writing(2), x, steps=4)[0]

    for _ in range(depth):
        solve = torch.func.vmap(solve)
    with pytest.raises(ValueError, match="model: expected a function that leaves its input as it is"):
        solve(torch.randn(*[2] * depth, 4, 3, dtype=D))


# ---------------------------------------------------------------------- what functions return


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5", "dopri8"])
def test_dense_solutions_of_functions_with_one_buffer_or_another_dtype(method: str) -> None:
    buffer = torch.empty(4, 3, dtype=D)

    def plain(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y) + t

    def static(t: Tensor, y: Tensor) -> Tensor:
        return buffer.copy_(plain(t, y))

    found, single, expected = (
        fm.odeint_dense(f, start(), 0.0, 1.0, method=method)(0.3)
        for f in (static, lambda t, y: plain(t, y).float(), plain)
    )
    assert torch.equal(found, expected)
    torch.testing.assert_close(single, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("rule", ["zero_star", "rescale", "apg"])
def test_gradients_of_guidance_whose_network_has_one_buffer(gradient: str, batched: bool, rule: str) -> None:
    weight = torch.tensor(0.7, dtype=D, requires_grad=True)
    buffers: dict[int, Tensor] = {}

    def fresh(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x * weight) * (1.0 + 0.1 * y[:, None]) + t[:, None]

    def static(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        buffer = buffers.setdefault(len(x), torch.empty_like(x.detach())).detach()
        buffer.copy_(fresh(x, t, y))
        return buffer

    more = {"zero_star": {"zero_star": True}, "rescale": {"rescale": 0.7}, "apg": {}}[rule]
    kind = fm.guidance.APG if rule == "apg" else fm.guidance.CFG
    rule_ = kind(2.5, negative={"y": 7.0}, batched=["y"] if batched else False, **more)
    results = []
    for network in (static, fresh):
        x = start().requires_grad_()
        samples, _ = fm.sample(network, x, steps=4, guidance=rule_, gradient=gradient, y=LABELS)
        results.append([samples.detach(), *torch.autograd.grad(samples.sum(), [x, weight])])
    torch.testing.assert_close(*results)
