"""SDE samplers: marginals, orders, noise. A new diffusion coefficient is tested by being in DIFFUSIONS.

On a Gaussian problem every step is affine in the state and its noise, so that the moments of a sampler's result are
computed exactly from its program, and sampling is held to these within its standard errors.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gaussian_problem import Gaussian, moments, program_of, run, uniform

from fmkernels.paths import VP, CondOT, Cosine, OptimalTransport, Path, Polynomial, SchrodingerBridge
from fmkernels.solvers.methods.registry import resolve
from fmkernels.solvers.methods.sde import LAST_STEPS, METHODS, SDE
from fmkernels.solvers.methods.sde_coefficients import DIFFUSIONS, FlowGRPO
from fmkernels.solvers.programs.expressions import as_grid
from fmkernels.solvers.programs.program import Update

each_diffusion = pytest.mark.parametrize("diffusion", DIFFUSIONS)
each_method = pytest.mark.parametrize("method", METHODS)
each_path = pytest.mark.parametrize("path", [CondOT(), VP()], ids=repr)


def bias(sde: SDE, path: Path, steps: int, start: float = 0.0, end: float = 1.0) -> float:
    """How far the result's mean and standard deviation are from the marginal's, the larger of both."""
    model = Gaussian(path)
    mean, std = moments(program_of(sde, uniform(steps, start, end), path), model, *model.marginal(start))
    wanted = model.marginal(end)
    return max(abs(mean - wanted[0]), abs(std - wanted[1]))


# ---------------------------------------------------------------------- marginals


@each_path
@each_method
@each_diffusion
def test_marginals_converge_from_end_to_end(diffusion: str, method: str, path: Path) -> None:
    for last_step in LAST_STEPS:
        sde = SDE(diffusion, last_step=last_step, method=method)
        coarse, fine = bias(sde, path, 16), bias(sde, path, 128)
        assert fine < 0.5 * coarse, last_step
        assert fine < (0.08 if method == "exponential" else 0.01), last_step


@each_path
@each_method
@each_diffusion
def test_samples_have_the_moments_of_the_program(diffusion: str, method: str, path: Path) -> None:
    model, samples = Gaussian(path), 20_000
    x, start = model.start(samples), model.marginal(0.0)
    for i, last_step in enumerate(LAST_STEPS):
        sde = SDE(diffusion, last_step=last_step, method=method)
        mean, std = moments(program_of(sde, uniform(8), path), model, *start)
        result = run(sde, uniform(8), path, model, x, seed=i).result
        count = result.numel()
        assert abs(float(result.mean()) - mean) < 5.0 * std / math.sqrt(count), last_step
        assert abs(float(result.std()) - std) < 5.0 * std / math.sqrt(2 * count), last_step


@each_method
@each_diffusion
def test_weak_order(diffusion: str, method: str) -> None:
    sde = SDE(diffusion, last_step="none", method=method)
    coarse, fine = (bias(sde, CondOT(), steps, 0.2, 0.6) for steps in (40, 80))
    order = math.log2(coarse / fine)
    assert sde.order - 0.2 < order, order


@pytest.mark.parametrize("diffusion", ["flow_grpo", FlowGRPO(0.3), "sbdm", "constant"], ids=str)
@each_path
def test_heun_has_weak_order_2_from_pure_noise(diffusion, path: Path) -> None:
    """Also where w is infinite at t = 0: with noise of the mean variance the first step's error decayed like n^-a^2,
    0.5 for flow_grpo."""
    sde = SDE(diffusion, last_step="none", method="heun")
    coarse, fine = (bias(sde, path, steps, 0.0, 0.4) for steps in (40, 80))
    assert math.log2(coarse / fine) > 1.8
    assert fine < 1e-4


def test_a_last_step_is_one_that_ends_the_path() -> None:
    """A window of a solve that ends before loses no noise; at the end the last step has none."""
    for method in METHODS:
        sde = SDE(method=method)
        assert program_of(sde, uniform(7, 0.2, 0.8), CondOT()).streams == 7
        assert program_of(sde, uniform(7, 0.2, 1.0), CondOT()).streams == 6
        coarse, fine = (bias(sde, CondOT(), steps, 0.2, 0.8) for steps in (40, 80))
        assert math.log2(coarse / fine) > sde.order - 0.2
    t, u = torch.tensor([0.8, 0.8]), torch.tensor([0.9, 1.0])
    assert (SDE().transition(CondOT(), t, u).std > 0).tolist() == [True, False]
    assert (SDE(last_step="none").transition(CondOT(), t, u).std > 0).tolist() == [True, True]


@each_method
def test_scale_changes_the_noise_and_not_the_marginals(method: str) -> None:
    biases = [bias(SDE("sigma", scale=scale, method=method), CondOT(), 256) for scale in (0.0, 0.3, 1.0, 3.0)]
    assert max(biases) < 0.02
    levels = [
        float(SDE(scale=scale).transition(CondOT(), torch.tensor(0.4), torch.tensor(0.5)).std)
        for scale in (0.0, 0.3, 1.0, 3.0)
    ]
    assert levels == pytest.approx([math.sqrt(2.0 * scale * 0.6 * 0.1) for scale in (0.0, 0.3, 1.0, 3.0)])


@each_path
@each_method
def test_noising_against_time_has_the_marginals_too(method: str, path: Path) -> None:
    sde = SDE("sigma", last_step="none", method=method)
    coarse, fine = (bias(sde, path, steps, 0.95, 0.1) for steps in (64, 256))
    assert fine < 0.5 * coarse
    assert fine < 0.02
    result = run(SDE("sigma", method=method), uniform(100, 1.0, 0.0), path, Gaussian(path), torch.ones(8, 2)).result
    assert result.isfinite().all()


def test_any_function_of_time_is_a_diffusion_coefficient() -> None:
    by_name, by_function = (
        SDE(d, last_step="none") for d in ("increasing-decreasing", lambda t: torch.sin(math.pi * t) ** 2)
    )
    t, u = torch.linspace(0.0, 0.9, 10), torch.linspace(0.1, 1.0, 10)
    for wanted, got in zip(by_name.transition(VP(), t, u), by_function.transition(VP(), t, u), strict=True):
        torch.testing.assert_close(got, wanted, rtol=3e-15, atol=3e-15)
    singular = SDE(lambda t: 1.0 / (t * (1.0 - t)))  # infinite at both ends
    assert bias(singular, CondOT(), 256) < 0.01
    constant = SDE(lambda t: 0.5).transition(CondOT(), torch.tensor(0.0), torch.tensor(0.1))
    assert float(constant.std) == pytest.approx(math.sqrt(0.1))
    assert SDE(FlowGRPO(1.2)).diffusion == FlowGRPO(1.2)


# ---------------------------------------------------------------------- formulas


@each_path
@each_diffusion
def test_euler_maruyama_is_the_drift_with_the_score(diffusion: str, path: Path) -> None:
    """Against SiT's formulas, written plainly, where no limit applies."""
    t, u = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.301, dtype=torch.float64)
    c = path.coefficients(t)
    alpha, sigma, d_alpha, d_sigma = c[:4]
    w = {
        "constant": torch.ones_like(t),
        "sigma": sigma,
        "sbdm": sigma**2 * d_alpha / alpha - sigma * d_sigma,
        "linear": 1 - t,
        "decreasing": 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": torch.sin(math.pi * t) ** 2,
        "flow_grpo": 0.5 * 0.7**2 * sigma / alpha,
    }[diffusion]
    x = torch.randn(5, 3, dtype=torch.float64)
    v = torch.randn(5, 3, dtype=torch.float64)
    a, b, std = SDE(diffusion).transition(path, t, u)
    score = path.convert(v, x, t, "velocity", "score")
    torch.testing.assert_close(a * x + b * v, x + 0.001 * (v + w * score), rtol=3e-15, atol=3e-15)
    torch.testing.assert_close(std, torch.sqrt(2 * w * 0.001), rtol=3e-15, atol=3e-15)


def test_flow_grpo_is_its_authors_step() -> None:
    """Eq. 9 of Liu et al. 2025 in their time, sigma = 1 - t, and with their rule for the first step."""
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.1], dtype=torch.float64)
    x, v = torch.randn(2, 6, dtype=torch.float64)
    for i in range(3):
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        level = 0.7 * torch.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
        mean = x * (1 + level**2 / (2 * sigma) * dt) - v * (1 + level**2 * (1 - sigma) / (2 * sigma)) * dt
        a, b, std = SDE("flow_grpo").transition(CondOT(), 1 - sigma, 1 - sigmas[i + 1])
        torch.testing.assert_close(a * x + b * v, mean, rtol=5e-15, atol=5e-15)
        torch.testing.assert_close(std, level * torch.sqrt(-dt), rtol=3e-15, atol=3e-15)


def test_exponential_steps_are_ddim_and_ddpm() -> None:
    path = VP()
    t, u = (
        torch.tensor([0.0, 0.2, 0.6, 0.98], dtype=torch.float64),
        torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64),
    )
    (alpha, sigma), (alpha_u, sigma_u) = (path.coefficients(s)[:2] for s in (t, u))
    x, v = torch.randn(2, 4, dtype=torch.float64)
    x_1, x_0 = (path.convert(v, x, t, "velocity", target) for target in ("x_1", "x_0"))
    for scale in (0.0, 1.0):
        # Song et al. 2021, "Denoising diffusion implicit models", eq. 16 at eta = scale
        variance = scale * sigma_u**2 / sigma**2 * (1.0 - alpha**2 / alpha_u**2)
        mean = alpha_u * x_1 + torch.sqrt(sigma_u**2 - variance) * x_0
        a, b, std = SDE("sbdm", scale=scale, method="exponential").transition(path, t, u)
        torch.testing.assert_close(a * x + b * v, mean, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(std, torch.sqrt(variance), rtol=3e-15, atol=3e-15)


@pytest.mark.parametrize(("method", "name"), [("euler", "euler"), ("heun", "heun2")])
@pytest.mark.parametrize("last_step", ["none", "mean"])
def test_scale_zero_is_the_ode(method: str, name: str, last_step: str) -> None:
    for path in (CondOT(), VP(), SchrodingerBridge(0.5)):
        for grid in (uniform(9), as_grid(np.linspace([0.0, 0.1, 0.2], [0.9, 0.8, 1.0], 6))):
            sde = SDE("constant", scale=0.0, method=method, last_step=last_step)
            model = lambda x, t: torch.sin(3.0 * x) * (1.0 + t[:, None])  # noqa: E731
            x = torch.randn(3, 5)
            assert program_of(sde, grid, path).streams == 0
            result = run(sde, grid, path, model, x).result.clone()
            wanted = run(resolve(name), grid, path, model, x).result
            if isinstance(grid[0], float):
                assert torch.equal(result, wanted)
            else:
                torch.testing.assert_close(result, wanted)


def test_last_steps() -> None:
    path, x = CondOT(), torch.randn(4, 3, dtype=torch.float64)
    model = Gaussian(path)
    grid = uniform(5)
    before = torch.empty(6, 4, 3, dtype=torch.float64)  # all but the initial state
    results = {}
    for last_step in LAST_STEPS:
        results[last_step] = run(SDE(last_step=last_step), grid, path, model, x, trajectory=before).result.clone()
        state, t, h = before[4], torch.tensor(0.8, dtype=torch.float64), 0.2
        v = model(state, t)
        x_0, x_1 = state - t * v, state + (1 - t) * v
        wanted = {"mean": state + h * (v - x_0), "tweedie": x_1, "euler": state + h * v}
        if last_step != "none":
            torch.testing.assert_close(results[last_step], wanted[last_step], rtol=3e-15, atol=3e-15)
    noise = (results["none"] - results["mean"]) / math.sqrt(2 * 0.2 * 0.2)
    assert 0.3 < float(noise.std()) < 3.0


def test_last_step_size_moves_the_times_before_it() -> None:
    sde = SDE(last_step_size=0.04)
    times = sde.times(uniform(5))
    assert times == pytest.approx([0.0, 0.24, 0.48, 0.72, 0.96, 1.0])
    assert times[-2] == 0.96
    assert sde.times(times) == pytest.approx(times, abs=1e-15)
    assert SDE(last_step_size=0.04, last_step="none").times(uniform(5)) == uniform(5)
    assert SDE(last_step_size=0.04).times(uniform(1)) == uniform(1)
    assert SDE(last_step_size=0.1).times(uniform(2, 1.0, 0.0)) == pytest.approx([1.0, 0.1, 0.0])
    per_sample = sde.times(as_grid(np.linspace([0.0, 0.5], [1.0, 0.9], 4)))
    np.testing.assert_allclose(per_sample[2], [0.96, 0.86])
    model = Gaussian(CondOT())
    run(sde, uniform(5), CondOT(), model, torch.zeros(2, 2))
    assert [float(t[0]) for t in model.times] == pytest.approx(times[:-1])
    with pytest.raises(ValueError, match="last_step_size: expected less than the whole time"):
        SDE(last_step_size=2.0).times(uniform(5))


@pytest.mark.parametrize("prediction", ["x_1", "x_0", "v", "edm"])
@each_method
def test_other_predictions_sample_the_same(method: str, prediction: str) -> None:
    path, x = CondOT(), torch.randn(6, 2, dtype=torch.float64)
    grid = uniform(8, 0.05, 0.95)
    velocity = Gaussian(path)
    converted = lambda x, t: path.convert(velocity(x, t), x, t, "velocity", prediction)  # noqa: E731
    wanted = run(SDE(method=method), grid, path, velocity, x).result.clone()
    got = run(SDE(method=method), grid, path, converted, x, prediction=prediction).result
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)


# ---------------------------------------------------------------------- numerics, calls, noise


@pytest.mark.parametrize("path", [CondOT(), VP(), Cosine(), OptimalTransport(), Polynomial(2.5)], ids=repr)
@each_method
@each_diffusion
def test_finite_at_both_ends(diffusion: str, method: str, path: Path) -> None:
    model = Gaussian(path)
    results = {}
    for dtype in (torch.float32, torch.float64):
        x = model.start(64).to(dtype)
        for steps in (1, 2, 20):
            sde = SDE(diffusion, last_step="none", method=method, log_prob=method != "heun")
            solve = run(sde, uniform(steps), path, model, x)
            assert solve.result.isfinite().all()
            assert all(value.isfinite().all() for value in solve.extras().get("log_prob", []))
            assert solve.result.abs().max() < 20.0
        results[dtype] = solve.result
    # the same noise in both; float32 times and velocities next to the ends
    torch.testing.assert_close(results[torch.float32].double(), results[torch.float64], rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("method", METHODS)
def test_network_calls(method: str) -> None:
    each = 2 if method == "heun" else 1
    for last_step, calls in (("none", each), ("mean", each), ("tweedie", 1), ("euler", 1)):
        model = Gaussian(CondOT())
        run(SDE(method=method, last_step=last_step), uniform(7), CondOT(), model, torch.zeros(3, 2))
        assert len(model.times) == 6 * each + calls


def test_an_euler_maruyama_step_is_one_update() -> None:
    program = program_of(SDE(), uniform(7), CondOT())
    assert sum(isinstance(i, Update) for i in program.instructions) == 7
    assert program.streams == 6  # none in the last step


def test_names() -> None:
    assert resolve("euler_maruyama") == SDE()
    assert resolve("heun_sde") == SDE(method="heun")
    assert resolve("exponential_sde") == SDE(method="exponential")


@each_method
def test_noise_belongs_to_its_seed_and_sample(method: str) -> None:
    path, x = CondOT(), torch.randn(12, 5)
    model = Gaussian(path)
    sde = SDE(method=method, log_prob=method != "heun")

    def sample(x, seed, row_offset=0):
        solve = run(sde, uniform(6), path, model, x, seed, row_offset)
        return solve.result.clone(), [value.clone() for value in solve.extras().get("log_prob", [])]

    whole, log_probs = sample(x, 1)
    again, _ = sample(x, 1)
    other, _ = sample(x, 2)
    assert torch.equal(whole, again)
    assert not torch.isclose(whole, other).any()
    parts = [sample(x[i : i + 4], 1, i) for i in range(0, 12, 4)]
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), whole, rtol=1e-5, atol=1e-6)
    for step, value in enumerate(log_probs):
        torch.testing.assert_close(torch.cat([part[step] for _, part in parts]), value, rtol=1e-4, atol=1e-4)


def test_steps_draw_independent_noise() -> None:
    x = torch.zeros(20_000, 2, dtype=torch.float64)
    states = torch.zeros(4, *x.shape, dtype=torch.float64)  # a run writes the states after the first
    run(
        SDE("constant", last_step="none"),
        uniform(3, 0.0, 0.03),
        CondOT(),
        lambda x, t: torch.zeros_like(x),
        x,
        trajectory=states,
    )
    table = torch.corrcoef(torch.stack([s.flatten() for s in states.diff(dim=0)]))
    assert float((table - torch.eye(3)).abs().max()) < 0.05


# ---------------------------------------------------------------------- errors


def test_errors() -> None:
    for arguments, name in (
        ({"diffusion": "loud"}, "diffusion"),
        ({"scale": -1.0}, "scale"),
        ({"last_step": "first"}, "last_step"),
        ({"method": "milstein"}, "method"),
        ({"last_step_size": 0.0}, "last_step_size"),
        ({"method": "heun", "log_prob": True}, "log_prob"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            SDE(**arguments)
    with pytest.raises(TypeError, match=r"^diffusion: expected"):
        SDE(3.0)
    with pytest.raises(ValueError, match=r"^path: expected a path without a gamma term"):
        program_of(SDE(), uniform(3), SchrodingerBridge())
    for function in (lambda t: -t, lambda t: t.sum(), lambda t: t * math.nan):
        with pytest.raises(ValueError, match=r"^diffusion\(t\): expected"):
            program_of(SDE(function), uniform(3, 0.1), CondOT())
    with pytest.raises(TypeError, match=r"^diffusion\(t\): expected"):
        program_of(SDE(lambda t: "much"), uniform(3), CondOT())
