"""Times and functions of t that a caller gives: they stay his, and what he does with them changes no other solve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels.solvers.methods.sde_coefficients import Function

X = torch.tensor([[0.3, -1.2, 0.7], [1.4, 0.2, -0.5]], dtype=torch.float64)
OWN = np.stack([np.linspace(0.0, 1.0, 6), np.linspace(0.0, 0.8, 6)], 1)  # (S + 1, B)


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(2.0 * x) + t.reshape(-1, 1).to(x)


def scaled(x: Tensor, t: Tensor, s: float | Tensor) -> Tensor:
    return net(x, t) * (s.reshape(-1, 1).to(x) if isinstance(s, Tensor) else s)


@pytest.fixture(autouse=True)
def fresh() -> None:
    fm.clear_caches()


# ---------------------------------------------------------------------- grids are copied


def _sequence(times: np.ndarray) -> Any:
    return list(times)


@pytest.mark.parametrize("make", [np.copy, torch.tensor, _sequence], ids=["array", "tensor", "rows"])
@pytest.mark.parametrize("given", ["time_grid", "schedule"])
@pytest.mark.parametrize("method", ["rk4", "dpmpp_2m"])
def test_a_grid_that_is_written_to_later_changes_no_other_solve(make: Any, given: str, method: str) -> None:
    def solve(grid: Any) -> Tensor:
        how = {"time_grid": grid} if given == "time_grid" else {"steps": 5, "schedule": lambda n: grid}
        return fm.sample(net, X, method=method, **how, gradient="direct")[0]

    want = fm.sample(net, X, method=method, time_grid=OWN.copy())[0]
    fm.clear_caches()
    grid = make(OWN.copy())
    solve(grid)
    for row in grid:
        row *= 0.3
    assert torch.equal(solve(make(OWN.copy())), want)


def test_a_callback_has_its_own_times() -> None:
    grid, seen = OWN.copy(), []

    def callback(step: int, t: np.ndarray, x: Tensor) -> None:
        seen.append(t.copy())
        t *= 1000.0

    want, result = fm.sample(net, X, time_grid=OWN.copy(), return_trajectory=True)
    got, told = fm.sample(net, X, time_grid=grid, callback=callback, return_trajectory=True)
    again = fm.sample(net, X, time_grid=OWN.copy())[0]
    assert np.array_equal(grid, OWN)
    assert np.array_equal(np.stack(seen), OWN[1:])
    assert torch.equal(got, want)
    assert torch.equal(again, want)
    assert torch.equal(told.times, result.times)


def test_nobody_can_write_to_the_times_of_a_plan() -> None:
    class Writes(fm.guidance.Guidance):
        def branches(self, model: Any, model_kwargs: Any) -> Any:
            return {"": (model, model_kwargs)}

        def velocity(self, builder: Any, x: Any, t: Any) -> Any:
            t *= 0.5
            return builder.evaluate(x, t)

    for method in ({}, {"sde": fm.SDE("sigma", last_step="mean", last_step_size=0.04)}):
        with pytest.raises(ValueError, match="read-only"):
            fm.sample(net, X, time_grid=OWN.copy(), guidance=Writes(), **method)


# ---------------------------------------------------------------------- plans and what functions read


def test_a_plan_is_that_of_the_default_dtype() -> None:
    sde = fm.SDE(lambda t: torch.asarray(0.3) * (1 - t))

    def solve() -> Tensor:
        return fm.sample(net, X, steps=6, sde=sde, generator=torch.Generator().manual_seed(0))[0]

    single = solve()
    torch.set_default_dtype(torch.float64)
    try:
        kept = solve()
        fm.clear_caches()
        want = solve()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(kept, want)
    assert not torch.equal(single, want)
    assert torch.equal(solve(), single)


def test_names_of_a_solver_are_those_of_its_construction() -> None:
    said, none = ["y"], ["c"]

    def model(x: Tensor, t: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return x

    solver = fm.Solver(model, 2, batched=said, shared=none)
    given = {"y": torch.ones(2), "c": torch.ones(2)}
    solver.sample(X, **given)
    said.append("nonsense")
    none.clear()
    solver.sample(X, **given)
    assert solver.batched == ("y",)
    assert solver.shared == ("c",)
    solver.shared = ["nonsense"]  # type: ignore[assignment]  # a sequence of names
    with pytest.raises(ValueError, match=r"^shared: "):
        solver.sample(X, **given)


# ---------------------------------------------------------------------- times of each sample, of adaptive methods too


@pytest.mark.parametrize("times", [2, 3, 4])  # fewer than, as many as and more than samples
def test_trajectory_of_adaptive_steps_at_times_of_each_sample(times: int) -> None:
    x = torch.cat([X, X[:1] * 2.0])
    ends = np.array([1.0, 0.8, 0.3])
    grid = np.linspace(0.0, 1.0, times)[:, None] * ends
    how = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9, "return_trajectory": True}
    end, result = fm.sample(net, x, time_grid=grid, **how)
    assert (result.status == fm.Status.SUCCESS).all()
    assert torch.equal(result.trajectory[0], x)
    assert torch.equal(result.trajectory[-1], end)
    assert torch.equal(result.times, torch.from_numpy(grid))  # as a fixed grid gives them
    for i in range(3):
        alone = fm.sample(net, x[i : i + 1], time_grid=grid[:, i], **how)[1]
        torch.testing.assert_close(result.trajectory[:, i], alone.trajectory[:, 0], rtol=1e-7, atol=1e-7)


def test_adaptive_methods_refuse_times_of_tokens() -> None:
    x = torch.zeros(2, 3, 2)
    grid = np.broadcast_to(np.linspace(0.0, 1.0, 4)[:, None, None], (4, 2, 3))
    message = r"^time_grid: expected times \(S \+ 1,\), or \(S \+ 1, B\).* got times of shape \(2, 3\)$"
    with pytest.raises(ValueError, match=message):
        fm.sample(net, x, method="dopri5", time_grid=grid)
    for how in ({}, {"method": "rk4"}):
        with pytest.raises(ValueError, match=message):
            fm.log_prob(net, x, time_grid=grid, **how)


@pytest.mark.parametrize("call", [fm.sample, fm.log_prob, fm.sample_with_log_prob])
def test_times_of_another_batch_are_told(call: Any) -> None:
    with pytest.raises(ValueError, match=r"^time_grid: expected times .* got times of shape \(2,\)$"):
        call(net, torch.zeros(3, 2), method="rk4", time_grid=OWN)
    with pytest.raises(ValueError, match=r"^time_grid: expected times .* got times of shape \(2,\)$"):
        call(net, torch.zeros(3, 2), method="dopri5", time_grid=OWN)


@pytest.mark.parametrize("call", [fm.sample, fm.log_prob, fm.sample_with_log_prob])
@pytest.mark.parametrize("gradient", ["none", "direct", "reversible"])
def test_one_time_for_all_is_refused_where_each_sample_has_its_own(call: Any, gradient: str) -> None:
    how = {"gradient": gradient} if call is fm.sample else {"gradient": gradient != "none"}
    for given in ({"time_grid": OWN}, {"steps": 5, "schedule": lambda n: OWN}):
        with pytest.raises(ValueError, match=r"^time_shape: expected 'batch' with times of each sample"):
            call(net, X, method="midpoint", time_shape="scalar", **how, **given)
    with pytest.raises(ValueError, match=r"^time_shape: "):
        fm.sample(net, torch.zeros(2, 3, 2), time_grid=np.stack([OWN] * 3, -1), time_shape="scalar")


# ---------------------------------------------------------------------- functions of t have their own t


class Clean(fm.paths.Path):
    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(1.5 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(1.0 - t) - 1.0


class Writing(Clean):
    """The same, by operations in place."""

    def alpha(self, t: Tensor) -> Tensor:
        return t.mul_(1.5).sin()

    def sigma(self, t: Tensor) -> Tensor:
        return t.neg_().add_(1.0).exp().sub(1.0)


SOLVES: dict[str, dict[str, Any]] = {
    "shared": {"steps": 5},
    "own": {"time_grid": OWN},
    "adaptive": {"method": "dopri5"},
    "own ends": {"method": "dopri5", "time_grid": OWN},
    "reversible": {"steps": 5, "method": "midpoint", "gradient": "reversible"},
    "direct": {"time_grid": OWN, "gradient": "direct"},
}
solves = pytest.mark.parametrize("how", SOLVES.values(), ids=SOLVES.keys())


RULES: dict[str, Any] = {
    "cfg": lambda scale: fm.guidance.CFG(scale, negative={"s": 0.1}),
    "interval": lambda scale: fm.guidance.CFG(scale, negative={"s": 0.1}, interval=(0.2, 0.9)),
    "rescale": lambda scale: fm.guidance.CFG(scale, negative={"s": 0.1}, rescale=0.5),
    "apg": lambda scale: fm.guidance.APG(scale, negative={"s": 0.1}),
    "auto": lambda scale: fm.guidance.AutoGuidance(lambda x, t, s: -x, scale),
    "classifier": lambda scale: fm.guidance.ClassifierGuidance(lambda x, t: -x, scale),
}


def clean_scale(t: Tensor) -> Tensor:
    return t.clamp(max=0.3) * 4.0


def writing_scale(t: Tensor) -> Tensor:
    return t.clamp_(max=0.3).mul_(4.0)


@solves
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_scale_that_writes_to_its_time(rule: Any, how: dict[str, Any]) -> None:
    grid = how.get("time_grid")
    want = fm.sample(scaled, X, guidance=rule(clean_scale), s=1.0, **how)[0]
    got = fm.sample(scaled, X, guidance=rule(writing_scale), s=1.0, **how)[0]
    assert torch.equal(got, want)
    assert grid is None or grid[-1].tolist() == [1.0, 0.8]


def test_a_scale_that_writes_elsewhere() -> None:
    clean, writing = (RULES["cfg"](scale) for scale in (clean_scale, writing_scale))
    for how in ({}, {"method": "rk4", "time_grid": OWN}, {"gradient": True}):
        want = fm.log_prob(scaled, X, guidance=clean, s=1.0, **how)
        assert torch.equal(fm.log_prob(scaled, X, guidance=writing, s=1.0, **how).log_prob, want.log_prob)
    times = torch.tensor([0.9, 0.4], dtype=torch.float64)
    for t in (times, times[0], times[:1].expand(2)):
        kept = t.clone()
        assert torch.equal(writing.at(scaled, {"s": 1.0})(X, t), clean.at(scaled, {"s": 1.0})(X, t))
        assert torch.equal(t, kept)
    requests = [(x, {"s": 1.0}) for x in X]
    one, other = ([r.x for r in fm.sample_stream(scaled, requests, guidance=g)] for g in (clean, writing))
    assert torch.equal(torch.stack(one), torch.stack(other))


@solves
def test_a_path_that_writes_to_its_time(how: dict[str, Any]) -> None:
    def solve(path: fm.paths.Path) -> Tensor:
        return fm.sample(lambda x, t: 0.5 * x, X, path=path, prediction="x_0", **how)[0]

    how = {name: value for name, value in how.items() if name != "steps"}
    how["time_grid"] = 0.1 + 0.8 * how.get("time_grid", np.linspace(0.0, 1.0, 6))
    assert torch.equal(solve(Writing()), solve(Clean()))


def test_a_path_that_writes_to_its_time_in_training() -> None:
    for t in (torch.tensor([0.3, 0.8], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)):
        kept, batches = t.clone(), []
        for path in (Clean(), Writing()):
            batch = path.sample(X, -X, t)
            batches.append((batch.x_t, batch.target()))
            assert torch.equal(t, kept)
            for one, other in zip(path.coefficients(t)[:4], Clean().coefficients(t)[:4], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
        for one, other in zip(*batches, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
    leaf = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    slopes = [torch.autograd.grad(path.coefficients(leaf).alpha_t.sum(), leaf)[0] for path in (Clean(), Writing())]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_a_step_density_leaves_its_times() -> None:
    def clean(t: Tensor) -> Tensor:
        return (1.0 - t).clamp(min=0.1)

    def writing(t: Tensor) -> Tensor:
        return t.neg_().add_(1.0).clamp_(min=0.1)

    for diffusion, path in ((clean, Writing()), (writing, fm.paths.CondOT()), (writing, Writing())):
        t, u = torch.tensor([0.3, 0.4], dtype=torch.float64), torch.tensor([0.5, 0.6], dtype=torch.float64)
        own = fm.paths.CondOT() if isinstance(path, fm.paths.CondOT) else Clean()
        for method in ("euler", "exponential"):
            want = fm.sde_step_log_prob(net, X, X + 0.1, t, u, sde=fm.SDE(clean, method=method), path=own)
            got = fm.sde_step_log_prob(net, X, X + 0.1, t, u, sde=fm.SDE(diffusion, method=method), path=path)
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
        assert t.tolist() == [0.3, 0.4]
        assert u.tolist() == [0.5, 0.6]


@pytest.mark.parametrize("method", ["euler", "heun", "exponential"])
@pytest.mark.parametrize("how", [{"steps": 5}, {"time_grid": OWN}], ids=["shared", "own"])
def test_a_diffusion_that_writes_to_its_time(method: str, how: dict[str, Any]) -> None:
    def solve(diffusion: Any) -> Tensor:
        sde, generator = fm.SDE(diffusion, method=method), torch.Generator().manual_seed(0)
        return fm.sample(net, X, sde=sde, generator=generator, **how)[0]

    assert torch.equal(solve(lambda t: t.neg_().add_(1.0).clamp_(min=0.1)), solve(lambda t: (1.0 - t).clamp(min=0.1)))


def test_a_diffusion_called_by_itself_leaves_its_times() -> None:
    t = torch.tensor([0.3, 0.4], dtype=torch.float64)
    Function(lambda t: t.mul_(2.0)).over_sigma(fm.paths.CondOT().coefficients(t), t)
    assert t.tolist() == [0.3, 0.4]


def test_a_weighting_that_writes_to_its_time() -> None:
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)

    class Own:
        def weight(self, path: fm.paths.Path, t: Tensor) -> Tensor:
            return t.mul_(2.0)

    for weight in (lambda t: t.mul_(2.0), Own()):
        assert fm.weightings.resolve(weight, fm.paths.CondOT(), t).tolist() == [0.6, 1.6]
        assert t.tolist() == [0.3, 0.8]


def test_a_step_density_names_the_reduction() -> None:
    x = torch.zeros(2, 3, 2)
    how = {"sde": fm.SDE(), "path": fm.paths.CondOT(), "noise_transform": fm.ZeroMeanNoise()}
    with pytest.raises(ValueError, match=r"^reduction: expected 'sum' or 'mean'"):
        fm.sde_step_log_prob(lambda x, t: x, x, x, 0.1, 0.2, reduction="none", **how)
