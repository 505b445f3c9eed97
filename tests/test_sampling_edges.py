"""Sampling at its edges: what a path does not have, times beyond it, tokens that wait, nothing at all, odd memory."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

import fmkernels as fm
from fmkernels import guidance
from fmkernels.paths import SchrodingerBridge
from fmkernels.solvers.methods import registry

NAMES = registry.names(registry.SAMPLE)
BRIDGE = SchrodingerBridge(0.3)
X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)
NULL = {"y": torch.zeros(3, dtype=torch.float64)}
Y = torch.ones(3, dtype=torch.float64)


def field(x, t, y=None):
    t = t.reshape(*t.shape, *(1,) * (x.dim() - t.dim()))
    return torch.sin(x) * (1.0 + t) + (0.0 if y is None else y)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


# ---------------------------------------------------------------------- bridges


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("method", NAMES)
def test_a_bridge_has_no_prediction_but_its_velocity(method: str, steps: int | None) -> None:
    """Fixed-grid Euler solved a bridge with prediction="x_0" as if it had no noise of its own."""
    for prediction in ("x_0", "x_1", "score", "v"):
        with pytest.raises(ValueError, match="prediction: expected 'velocity' with SchrodingerBridge"):
            fm.sample(field, X, method=method, steps=steps, path=BRIDGE, prediction=prediction)


def test_what_converts_predictions_refuses_a_bridge() -> None:
    """Densities of steps, guided velocities and rules that convert took a bridge for the path below it."""
    t = torch.full((4,), 0.3, dtype=torch.float64)
    rule = guidance.CFG(2.0, negative=NULL)
    apg = guidance.APG(2.0, negative=NULL)
    plus = guidance.CFGPlusPlus(0.5, negative=NULL)
    slope = guidance.ClassifierGuidance(lambda x, t: -x, 2.0)
    for call in (
        lambda: list(fm.sample_stream(field, list(X), path=BRIDGE, prediction="x_0")),
        lambda: fm.log_prob(field, X, path=BRIDGE, prediction="x_0"),
        lambda: fm.sample_with_log_prob(field, X, path=BRIDGE, prediction="x_0"),
        lambda: fm.sde_step_log_prob(field, X, X, 0.1, 0.2, sde=fm.SDE(), path=BRIDGE),
        lambda: fm.sde_step_log_prob(field, X, X, 0.1, 0.2, sde=fm.SDE(), path=BRIDGE, prediction="x_0"),
        lambda: rule.at(field, {"y": Y}, BRIDGE, "x_0")(X, t),
        lambda: apg.at(field, {"y": Y}, BRIDGE)(X, t),
        lambda: fm.sample(field, X, steps=2, path=BRIDGE, guidance=apg, y=Y),
        lambda: fm.sample(field, X, steps=2, path=BRIDGE, guidance=plus, y=Y),
        lambda: fm.sample(field, X, steps=2, path=BRIDGE, guidance=slope),
        lambda: fm.sample(field, X, steps=2, path=BRIDGE, sde=fm.SDE()),
    ):
        with pytest.raises(ValueError, match=r"(path|prediction): expected .* gamma term"):
            call()
    flow = fm.sample(field, X, steps=3, path=BRIDGE)[0]
    torch.testing.assert_close(fm.sample(field, X, steps=3, path=BRIDGE, sde=fm.SDE(scale=0.0))[0], flow)
    guided = fm.sample(field, X, steps=2, path=BRIDGE, guidance=rule, y=Y)[0]
    torch.testing.assert_close(guided, fm.sample(field, X, steps=2, guidance=rule, y=Y)[0])


# ---------------------------------------------------------------------- times


@pytest.mark.parametrize("method", NAMES)
def test_times_beyond_the_path_are_refused(method: str) -> None:
    for grid in ([0.0, 2.0], [-0.1, 1.0], [0, 500, 1000], [[0.0, 0.0, 0.0, -0.2], [1.0] * 4]):
        with pytest.raises(ValueError, match=r"time_grid: expected times in \[0, 1\]"):
            fm.sample(field, X, method=method, time_grid=grid)


# ---------------------------------------------------------------------- tokens that wait

B, T, D = 2, 4, 3
TOKENS = torch.linspace(-1.0, 1.0, B * T * D, dtype=torch.float64).reshape(B, T, D)


def waiting_grid(steps: int = 4) -> np.ndarray:
    """Two tokens at t = 1 throughout, a prefix; one that waits for two steps; one of the whole way."""
    times = np.linspace(0.0, 1.0, steps + 1)
    grid = np.ones((steps + 1, B, T))
    grid[:, :, 2] = np.concatenate([[0.0, 0.0, 0.0], np.linspace(0.0, 1.0, steps - 1)[1:]])[:, None]
    grid[:, :, 3] = times[:, None]
    return grid


def tokenwise(x, t, y=None):
    """Each token for itself."""
    v = torch.sin(2.0 * x) * (1.0 + t.reshape(*t.shape, *(1,) * (x.dim() - t.dim())))
    return v if y is None else v + y


@pytest.mark.parametrize("gradient", ["none", "direct", "checkpoint", "reversible"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_frozen_tokens_stay_and_the_others_do_as_alone(method: str, gradient: str) -> None:
    grid = waiting_grid()
    x = TOKENS.clone().requires_grad_()
    kwargs: dict[str, Any] = {"method": method, "gradient": gradient}
    result, told = fm.sample(tokenwise, x, time_grid=grid, return_trajectory=True, **kwargs)
    assert torch.equal(result[:, :2], TOKENS[:, :2])
    assert torch.equal(told.trajectory[:, :, :2], TOKENS[:, :2].expand(5, B, 2, D))
    assert torch.equal(told.trajectory[:3, :, 2], TOKENS[:, 2].expand(3, B, D))
    alone = fm.sample(tokenwise, TOKENS[:, 3], time_grid=grid[:, 0, 3], **kwargs)[0]
    torch.testing.assert_close(result[:, 3], alone)
    late = fm.sample(tokenwise, TOKENS[:, 2], time_grid=grid[2:, 0, 2], **kwargs)[0]
    torch.testing.assert_close(result[:, 2], late)
    if gradient == "none":
        return
    (found,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(found[:, :2], torch.ones_like(found[:, :2]))
    # of a network of single tokens: by directional differences
    with torch.no_grad():
        ends = [fm.sample(tokenwise, TOKENS + h, time_grid=grid, **kwargs)[0] for h in (1e-6, -1e-6)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-6, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["euler", "heun", "exponential"])
def test_frozen_tokens_get_no_noise(method: str) -> None:
    grid = waiting_grid()
    sde = fm.SDE(method=method, log_prob="none" if method != "heun" else False)
    result, told = fm.sample(tokenwise, TOKENS, time_grid=grid, sde=sde, generator=seeded())
    assert torch.equal(result[:, :2], TOKENS[:, :2])
    assert torch.isfinite(result).all()
    assert not torch.equal(result[:, 2:], TOKENS[:, 2:])
    if told.log_prob is not None:
        assert torch.isfinite(told.log_prob).all()
        assert bool((told.log_prob[:, :, :2] == 0.0).all())
        assert bool((told.log_prob[0, :, 3] != 0.0).all())
        assert bool((told.log_prob[:2, :, 2] == 0.0).all())


def test_frozen_tokens_with_guidance() -> None:
    grid = waiting_grid()
    for rule in (
        guidance.CFG(2.0, negative=NULL),
        guidance.CFG(2.0, negative=NULL, interval=(0.2, 0.8)),
        guidance.CFG(torch.tensor([2.0, 3.0]), negative=NULL),
        guidance.CFG(2.0, negative=NULL, rescale=0.5),
        guidance.APG(2.0, negative=NULL),
        guidance.CFGPlusPlus(0.5, negative=NULL),
        guidance.AutoGuidance(tokenwise, 2.0, weak_kwargs=NULL),
    ):
        result = fm.sample(tokenwise, TOKENS, time_grid=grid, guidance=rule, y=Y)[0]
        assert torch.equal(result[:, :2], TOKENS[:, :2])
        assert torch.isfinite(result).all()
        assert not torch.equal(result[:, 2:], TOKENS[:, 2:])
    linear = fm.sample(tokenwise, TOKENS, time_grid=grid, guidance=guidance.CFG(2.0, negative=NULL), y=Y)[0]
    torch.testing.assert_close(linear, fm.sample(lambda x, t: tokenwise(x, t, 2.0 * Y), TOKENS, time_grid=grid)[0])


def test_an_adaptive_solve_takes_times_of_samples_and_refuses_those_of_tokens() -> None:
    ends = np.array([[0.0, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0, 0.4]])
    for grid in (waiting_grid(), ends):
        x = TOKENS if grid.ndim == 3 else X
        with pytest.raises(ValueError, match="time_grid: expected "):
            fm.sample(tokenwise, x, method="dopri5", time_grid=grid)


# ---------------------------------------------------------------------- nothing at all


@pytest.mark.parametrize("shape", [(0, 3), (0,), (4,), (4, 0), (4, 1, 1)], ids=str)
@pytest.mark.parametrize("method", NAMES)
def test_states_of_any_size_and_grids_of_any_length(method: str, shape: tuple[int, ...]) -> None:
    x = torch.linspace(-1.0, 1.0, int(np.prod(shape))).reshape(shape)
    for steps in (None, 0, 1, 3):
        result, told = fm.sample(field, x, method=method, steps=steps, return_trajectory=True)
        assert (result.shape, result.dtype) == (x.shape, x.dtype)
        assert bool(torch.isfinite(result).all())
        assert steps != 0 or torch.equal(result, x)
        assert told.trajectory.shape[1:] == x.shape


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "reversible"])
@pytest.mark.parametrize("shape", [(0, 3), (0,), (4,), (4, 0)], ids=str)
def test_gradients_of_states_of_any_size(shape: tuple[int, ...], gradient: str) -> None:
    for steps in (0, 1, 3):
        x = torch.ones(shape, requires_grad=True)
        fm.sample(field, x, method="midpoint", steps=steps, gradient=gradient)[0].sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(0, 3), (0,), (4,), (4, 0)], ids=str)
def test_densities_of_states_of_any_size(shape: tuple[int, ...]) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"method": "euler", "steps": 0},
        {"method": "rk4", "steps": 2},
        {"divergence": "hutchinson"},
        {"divergence": "hutchinson", "probes": 5, "method": "rk4", "steps": 2},
        {"mode": "forward"},
        {"gradient": True},
    ]
    x = torch.linspace(-1.0, 1.0, int(np.prod(shape))).reshape(shape)
    for kwargs in settings:
        result = fm.log_prob(field, x, **kwargs)
        assert result.log_prob.shape == shape[:1], kwargs
        assert bool(torch.isfinite(result.log_prob).all()), kwargs


# ---------------------------------------------------------------------- memory

BASE = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)
LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "expanded": lambda x: x[:1].expand(4, 6),
    "negative bit": lambda x: torch._neg_view(-x),
    "offset": lambda x: torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(4, 6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_the_state_does_not_matter(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](BASE.to(dtype))
    kept = x.clone(memory_format=torch.contiguous_format)
    for method in ("euler", "heun2", "ab2", "dpmpp_2m", "unipc", "euler_maruyama", "restart"):
        found, expected = (
            fm.sample(field, start, method=method, steps=3, generator=seeded())[0] for start in (x, kept)
        )
        assert torch.equal(x, kept)
        torch.testing.assert_close(found, expected)
    if dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(*(fm.sample(field, start, method="dopri5")[0] for start in (x, kept)))
        torch.testing.assert_close(*(fm.log_prob(field, start).log_prob for start in (x, kept)))


# ---------------------------------------------------------------------- transforms, exceptions, threads


@pytest.mark.parametrize("gradient", ["none", "direct"])
def test_vmap_over_a_solve(gradient: str) -> None:
    x = torch.linspace(-1.0, 1.0, 24).reshape(2, 4, 3)
    for method in ("euler", "heun2", "ab2", "unipc"):

        def solve(x, method=method):
            return fm.sample(field, x, method=method, steps=3, gradient=gradient)[0]

        torch.testing.assert_close(torch.vmap(solve)(x), torch.stack([solve(part) for part in x]))


@pytest.mark.parametrize("output", ["none", "tuple", "int", "complex", "shape", "meta"])
@pytest.mark.parametrize("method", ["euler", "heun2", "ab2", "dpmpp_2m", "dopri5"])
def test_outputs_that_are_no_velocity_are_told(method: str, output: str) -> None:
    answers = {
        "none": lambda x: None,
        "tuple": lambda x: (x,),
        "int": lambda x: torch.ones_like(x, dtype=torch.int64),
        "complex": lambda x: x.to(torch.complex64),
        "shape": lambda x: x[:1],
        "meta": lambda x: x.to("meta"),
    }
    for guided in (None, guidance.CFG(2.0, negative=NULL, batched=False)):
        kwargs = {} if guided is None else {"y": Y}
        with pytest.raises((TypeError, ValueError), match=r"^model: expected .*, got "):
            fm.sample(lambda x, t, y=None: answers[output](x), X, method=method, guidance=guided, **kwargs)


def test_nan_from_a_network_is_no_success() -> None:
    bad = lambda x, t: torch.where(t.reshape(-1, 1) > 0.5, torch.nan, 0.0) * x  # noqa: E731
    assert bool(fm.sample(bad, X, steps=4)[0].isnan().all())
    with pytest.warns(UserWarning, match="adaptive solve"):
        told = fm.sample(bad, X, method="dopri5", max_steps=100)[1]
    assert bool((told.status != int(fm.Status.SUCCESS)).all())


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rk4", "steps": 3},
        {"method": "unipc", "steps": 3},
        {"method": "dopri5"},
        {"sde": fm.SDE(), "steps": 3},
    ],
    ids=["rk4", "unipc", "dopri5", "sde"],
)
def test_a_solver_is_whole_after_an_exception(settings: dict[str, Any], raised: type[BaseException]) -> None:
    calls, limit = [0], [10**9]

    def model(x, t):
        calls[0] += 1
        if calls[0] > limit[0]:
            raise raised("in the middle")
        return field(x, t)

    solver = fm.Solver(model, **settings)
    expected = solver.sample(X, generator=seeded())[0]
    kept = expected.clone()
    for stop in (0, 1, 2):
        calls[0], limit[0] = 0, stop
        with pytest.raises(raised, match="in the middle"):
            solver.sample(X, generator=seeded())
        limit[0] = 10**9
        assert torch.equal(solver.sample(X, generator=seeded())[0], kept)
    assert torch.equal(expected, kept)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_two_threads_with_one_solver_and_all_that_was_handed_out(method: str) -> None:
    solver = fm.Solver(field, method=method, steps=3 if method == "rk4" else None)
    starts = [X * scale for scale in (1.0, -0.5)]
    expected = [solver.sample(x)[0].clone() for x in starts]
    handed: list[list[torch.Tensor]] = [[], []]

    def work(number: int) -> None:
        for _ in range(10):
            result, told = solver.sample(starts[number], return_trajectory=method == "rk4")
            handed[number].append(result)
            if told.trajectory is not None:
                handed[number].append(told.trajectory[-1])

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, right in zip(handed, expected, strict=True):
        assert len(results) >= 10
        assert all(torch.equal(result, right) for result in results)


@pytest.mark.parametrize("settings", [{}, {"sde": fm.SDE()}, {"gradient": "direct"}], ids=["flow", "sde", "direct"])
def test_times_of_other_samples_are_told_by_name(settings: dict[str, Any]) -> None:
    """The message named a coefficient of an update."""
    for shape in ((3,), (4, 2), (4, 3, 2)):
        grid = np.broadcast_to(np.linspace(0.0, 1.0, 3).reshape(3, *(1 for _ in shape)), (3, *shape))
        with pytest.raises(ValueError, match=r"time_grid: expected times .* of x_0, \(4, 3\), got times of shape"):
            fm.sample(field, X, time_grid=grid, **settings)
        with pytest.raises(ValueError, match="schedule: expected times"):
            fm.sample(field, X, steps=2, schedule=lambda n, grid=grid: grid, **settings)
    with pytest.raises(ValueError, match="time_grid: expected times"):
        fm.sample(field, X, time_grid=np.zeros((2, 3)), method="midpoint", gradient="reversible")


def test_a_source_density_of_another_kind_is_told() -> None:
    for value in (torch.ones(4, dtype=torch.int64), torch.ones(4, dtype=torch.complex64), torch.ones(4, device="meta")):
        with pytest.raises((TypeError, ValueError), match="log_p0: expected a "):
            fm.log_prob(field, X, log_p0=lambda x, value=value: value, method="euler", steps=1)


def test_empty_batches_of_guided_adaptive_sampling_dense_solutions_and_own_times() -> None:
    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return torch.tanh(x) + t[:, None]

    x, labels = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    for batched in (True, False):
        guidance = fm.guidance.CFG(2.0, negative={"y": 7}, batched=batched)
        samples, _ = fm.sample(model, x, method="dopri5", guidance=guidance, y=labels)
        assert samples.shape == (0, 3)
    solution = fm.odeint_dense(lambda t, y: -y, x, 0.0, 1.0)
    assert solution(0.5).shape == (0, 3)
    assert solution(torch.tensor([0.1, 0.9])).shape == (2, 0, 3)
    for method in fm.solvers.methods.registry.names():
        samples, _ = fm.sample(model, x, time_grid=torch.zeros(5, 0), method=method)
        assert samples.shape == (0, 3), method
