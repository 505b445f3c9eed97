"""What holds for every method of the registry: orders on every kind of path, ends, waiting tokens, dtypes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from diffusion_problems import even, noise, program_of, solve
from gaussian_problem import Gaussian, moments

import fmkernels as fm
from fmkernels.paths import VE, VP, CondOT, Cosine, LinearVP, OptimalTransport, Path, Polynomial
from fmkernels.solvers.methods import registry as methods
from fmkernels.solvers.methods.adams import AdamsBashforth, AdamsMoulton
from fmkernels.solvers.methods.diffusion import DDIM, DEIS, LMS, Ancestral, DPMSolverPP, DPMSolverPP2S, UniPC
from fmkernels.solvers.methods.edm import EDM, Restart, RestartInterval
from fmkernels.solvers.methods.runge_kutta import RungeKutta
from fmkernels.solvers.methods.sde import SDE
from fmkernels.solvers.methods.sde_coefficients import FlowGRPO, Function
from fmkernels.solvers.methods.tableaus import TABLEAUS
from fmkernels.solvers.sampling.grids import Karras, Log, Power, Stretched

FIXED = [entry for entry in methods.METHODS.values() if entry.make and entry.kind != "sde"]
NOISY = [entry for entry in methods.METHODS.values() if entry.kind == "sde"]
each_fixed = pytest.mark.parametrize("entry", FIXED, ids=lambda entry: entry.name)
each_noisy = pytest.mark.parametrize("entry", NOISY, ids=lambda entry: entry.name)
each = pytest.mark.parametrize("entry", [*FIXED, *NOISY], ids=lambda entry: entry.name)
PATHS = [CondOT(), VP(), Cosine(), OptimalTransport(1e-4), OptimalTransport(0.1), Polynomial(2.0)]
each_path = pytest.mark.parametrize("path", PATHS, ids=repr)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Mixture:
    """The exact velocity for a mixture of three Gaussians: neither linear in x nor a constant prediction."""

    MEANS, STD = torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64), 0.35

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma, d_alpha, d_sigma = (c.reshape(-1, 1, 1) for c in self.path.coefficients(t)[:4])
        variance = (alpha * self.STD) ** 2 + sigma**2
        away = x[..., None] - alpha * self.MEANS
        weights = torch.softmax(-(away**2) / (2 * variance), -1)
        velocities = d_alpha * self.MEANS + (d_alpha * alpha * self.STD**2 + d_sigma * sigma) / variance * away
        return (weights * velocities).sum(-1)


def start(path: Path, t: float) -> torch.Tensor:
    return torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]


def graded(first: float, last: float, steps: int) -> list[float]:
    """Smooth and uneven: multistep weights must know the steps."""
    return [float(first + (last - first) * (s + 0.05 * np.sin(np.pi * s))) for s in np.linspace(0.0, 1.0, steps + 1)]


@functools.cache
def exact(path: Path, first: float, last: float) -> torch.Tensor:
    # even in a variable in which the end is resolved, where the velocity may have a root's singularity
    grid = [first + (last - first) * (1.0 - (1.0 - s) ** 2) for s in np.linspace(0.0, 1.0, 121)]
    return solve(RungeKutta(TABLEAUS["dopri8"]), grid, path, Mixture(path), start(path, first))


def error(method, path: Path, first: float, last: float, steps: int) -> float:
    got = solve(method, graded(first, last, steps), path, Mixture(path), start(path, first))
    return float((got - exact(path, first, last)).abs().max())


# ---------------------------------------------------------------------- orders


@each_path
@each_fixed
def test_order_between_the_ends(entry: methods.Entry, path: Path) -> None:
    assert entry.order is not None
    counts = (6, 12) if entry.order >= 5 else (40, 80)
    coarse, fine = (error(entry.make(), path, 0.3, 0.8, steps) for steps in counts)
    assert fine < 1e-12 or math.log2(coarse / fine) > entry.order - 0.35, (coarse, fine)


@each_path
@each_fixed
def test_order_with_the_last_step_to_data(entry: methods.Entry, path: Path) -> None:
    """Where lambda has no end the methods in it have order 2 at most, and where the velocity has a root's singularity
    (VP) so has every method; a path with a small sigma_min is no worse than one with none."""
    order = entry.order
    if entry.needs:
        order = min(order, 2)
    if isinstance(path, VP):
        order = 1
    coarse, fine = (error(entry.make(), path, 0.3, 1.0, steps) for steps in (20, 80))
    assert fine < 1e-9 or 0.5 * math.log2(coarse / fine) > 0.7 * order, (coarse, fine)
    assert fine < {1: 0.03, 2: 0.004}.get(order, 0.001)


@pytest.mark.parametrize("path", [OptimalTransport(), OptimalTransport(1e-2), VE(0.01, 50.0), CondOT()], ids=repr)
@each_fixed
def test_samples_of_few_steps_have_the_spread_of_the_data(entry: methods.Entry, path: Path) -> None:
    """The third-order methods had 3.7 in the place of 0.6 on OptimalTransport(): they extrapolated over a last step
    that is eight times as wide, in lambda, as the one before."""
    if isinstance(path, VE) and not entry.needs:
        return  # whose velocity is stiff in time
    model = Gaussian(path)
    for end in (1.0, 0.999):
        _, std = moments(program_of(entry.make(), even(0.0, end, 20), path), model, *model.marginal(0.0))
        assert std == pytest.approx(model.marginal(end)[1], abs=0.1)


@pytest.mark.parametrize("name", ["dpmpp_3m_sde", "dpmpp_2m_sde"])
def test_stochastic_multistep_methods_end_well_too(name: str) -> None:
    path = OptimalTransport()
    model = Gaussian(path)
    _, std = moments(program_of(methods.resolve(name), even(0.0, 1.0, 20), path), model, *model.marginal(0.0))
    assert std == pytest.approx(model.marginal(1.0)[1], abs=0.1)


@pytest.mark.parametrize("path", [CondOT(), VP(), OptimalTransport(0.01)], ids=repr)
@each_noisy
def test_weak_order(entry: methods.Entry, path: Path) -> None:
    """Exactly, of the mean and the standard deviation on a Gaussian problem."""
    if entry.order is None:
        return
    method, model = entry.make(), Gaussian(path)
    if isinstance(method, SDE):
        method = SDE(method=method.method, last_step="none")
    errors = []
    for steps in (150, 300) if entry.name == "edm_churn" else (40, 80):
        mean, std = moments(program_of(method, graded(0.2, 0.8, steps), path), model, *model.marginal(0.2))
        wanted = model.marginal(0.8)
        errors.append(max(abs(mean - wanted[0]), abs(std - wanted[1])))
    assert math.log2(errors[0] / errors[1]) > entry.order - 0.3, errors


# ---------------------------------------------------------------------- lower order at the end


@pytest.mark.parametrize("make", [DPMSolverPP, UniPC, DEIS], ids=lambda make: make.__name__)
def test_lower_order_final(make) -> None:
    """Of a step to data only the first order is left; the one before it has order 2 with True, 3 with False."""
    path, model, grid = CondOT(), Mixture(CondOT()), even(0.2, 1.0, 6)
    x = start(path, 0.2)
    runs = {final: solve(make(3, lower_order_final=final), grid, path, model, x) for final in (True, False, "auto")}
    torch.testing.assert_close(runs["auto"], runs[False], rtol=1e-12, atol=1e-12)
    assert float((runs[True] - runs[False]).abs().max()) > 1e-4
    # inside, "auto" lowers nothing, and True does
    inner = even(0.2, 0.8, 6)
    runs = {final: solve(make(3, lower_order_final=final), inner, path, model, x) for final in (True, False, "auto")}
    assert torch.equal(runs["auto"], runs[False])
    assert float((runs[True] - runs[False]).abs().max()) > 1e-5
    # where a small sigma is left, the last step of "auto" is the first-order one
    inner = even(0.2, 0.99, 6)
    runs = {final: solve(make(3, lower_order_final=final), inner, path, model, x) for final in (False, "auto")}
    before = solve(make(3, lower_order_final=False), inner[:-1], path, model, x)
    if make is UniPC:
        corrected = float((runs["auto"] - runs[False]).abs().max())
        assert corrected > 1e-3
    else:
        step = solve(DPMSolverPP(1), inner[-2:], path, model, before)
        torch.testing.assert_close(runs["auto"], step, rtol=1e-12, atol=1e-12)
    for bad in (1, None, "never"):
        with pytest.raises(ValueError, match="lower_order_final: expected True, False or 'auto'"):
            make(3, lower_order_final=bad)


def test_lower_order_final_of_each_sample() -> None:
    path, model = CondOT(), Mixture(CondOT())
    grids = [even(0.2, 0.8, 6), even(0.2, 0.99, 6), even(0.2, 1.0, 6)]
    x = torch.randn(3, 4, dtype=torch.float64)
    for method in (DPMSolverPP(3), UniPC(3), DEIS(3)):
        together = solve(method, list(np.asarray(grids).T.copy()), path, model, x)
        for i, grid in enumerate(grids):
            alone = solve(method, grid, path, model, x[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_dpmpp_3m_sde_is_k_diffusions() -> None:
    """Its formula for the variance-exploding state, with its start and its end."""
    grid = even(0.1, 1.0, 8)
    sigmas = [(1.0 - t) / t for t in grid]
    x = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)[:, None]
    y, older, widths = x / grid[0], [], []
    model = Mixture(CondOT())
    for i, (s, n) in enumerate(itertools.pairwise(sigmas)):
        state = y * grid[i]
        denoised = state + (1.0 - grid[i]) * model(state, torch.full((9,), grid[i], dtype=torch.float64))
        if n == 0.0:
            y = denoised
            break
        h = math.log(s / n)
        y = math.exp(-2.0 * h) * y - math.expm1(-2.0 * h) * denoised
        phi_2 = math.expm1(-2.0 * h) / (2.0 * h) + 1.0
        phi_3 = phi_2 / (2.0 * h) - 0.5
        if len(older) == 1:
            y = y + phi_2 * (denoised - older[0]) / (widths[0] / h)
        elif older:
            r_0, r_1 = widths[0] / h, widths[1] / h
            d_0, d_1 = (denoised - older[0]) / r_0, (older[0] - older[1]) / r_1
            y = y + phi_2 * (d_0 + (d_0 - d_1) * r_0 / (r_0 + r_1)) - phi_3 * (d_0 - d_1) / (r_0 + r_1)
        y = y + n * math.sqrt(-math.expm1(-2.0 * h)) * noise(x, i)
        older, widths = [denoised, *older[:1]], [h, *widths[:1]]
    got = solve(methods.resolve("dpmpp_3m_sde"), grid, CondOT(), model, x)
    torch.testing.assert_close(got, y, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------------- restarts


def test_restarts_take_as_many_steps_as_the_grid_has_there() -> None:
    """With a number of its own an interval keeps its error however fine the grid is."""
    path = CondOT()
    model = Gaussian(path)

    def bias(interval: RestartInterval, steps: int) -> float:
        mean, std = moments(program_of(Restart((interval,)), even(0.2, 0.8, steps), path), model, *model.marginal(0.2))
        wanted = model.marginal(0.8)
        return max(abs(mean - wanted[0]), abs(std - wanted[1]))

    kept = [bias(RestartInterval(0.5, 1.5, 3, 1), steps) for steps in (40, 160)]
    falling = [bias(RestartInterval(0.5, 1.5, repeats=1), steps) for steps in (40, 160)]
    assert kept[1] > 0.8 * kept[0]
    assert 0.5 * math.log2(falling[0] / falling[1]) > 1.7
    assert bias(RestartInterval(0.5, 1.5, 40, 1), 160) < 1e-4


# ---------------------------------------------------------------------- tokens that wait


def token_network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Tokens see each other."""
    return torch.tanh(x.mean(1, keepdim=True) + x * torch.cos(3.0 * t[..., None].to(x.dtype)))


def waiting_grid() -> torch.Tensor:
    """(7, 2, 5): tokens at data, at noise, and halfway that stay; that start late, and that end early."""
    base = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
    grid = base[:, None, None].repeat(1, 2, 5)
    grid[:, 0, 0], grid[:, 0, 1], grid[:, 1, 0] = 1.0, 0.0, 0.5
    grid[:, 1, 1], grid[:, 1, 2] = (2 * base - 1).clamp(0.0, 1.0), (2 * base).clamp(0.0, 1.0)
    return grid


STAYS = torch.tensor([[True, True, False, False, False], [True, False, False, False, False]])


@pytest.mark.parametrize("prediction", ["velocity", "x_1"])
@each
def test_what_has_no_time_to_pass_stays_bit_for_bit(entry: methods.Entry, prediction: str) -> None:
    for dtype in (torch.float64, torch.bfloat16) if prediction == "velocity" else (torch.float32,):
        x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
        y, _ = fm.sample(token_network, x, method=entry.make(), time_grid=waiting_grid(), prediction=prediction)
        assert y.isfinite().all()
        assert torch.equal(y[STAYS], x[STAYS])
        assert not (y[~STAYS] == x[~STAYS]).all(-1).any()


@each_fixed
def test_a_token_that_waits_is_solved_as_one_that_does_not(entry: methods.Entry) -> None:
    """A sample whose grid begins with waiting is that of a grid without, but for the start of multistep methods."""
    x = torch.randn(3, 4, dtype=torch.float64)
    field = lambda x, t: torch.sin(5.0 * t[:, None]) - x  # noqa: E731
    alone = fm.sample(field, x[:1], method=entry.make(), time_grid=np.linspace(0.2, 0.8, 9))[0]
    late = np.array([0.2, 0.2, 0.2, *np.linspace(0.2, 0.8, 9)])
    soon = np.array([*np.linspace(0.2, 0.8, 9), 0.8, 0.8, 0.8])
    grid = np.stack([soon, late, np.linspace(0.1, 0.9, 12)])[:, : min(map(len, (soon, late)))].T
    y, _ = fm.sample(field, torch.cat([x[:1], x[:1], x[2:]]), method=entry.make(), time_grid=grid.copy())
    torch.testing.assert_close(y[:1], alone, rtol=1e-12, atol=1e-12)
    assert float((y[1] - alone).abs().max()) < 2e-2
    if isinstance(entry.make(), RungeKutta) or entry.order == 1:
        torch.testing.assert_close(y[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("last_step", ["none", "mean", "tweedie", "euler"])
@pytest.mark.parametrize("method", ["euler", "heun", "exponential"])
def test_waiting_tokens_of_sdes(method: str, last_step: str) -> None:
    x = torch.randn(2, 5, 3)
    for diffusion in ("sigma", "constant", "sbdm", "flow_grpo"):
        sde = SDE(diffusion, last_step=last_step, method=method, log_prob=method != "heun")
        y, result = fm.sample(token_network, x, sde=sde, time_grid=waiting_grid())
        assert y.isfinite().all()
        assert torch.equal(y[STAYS], x[STAYS])
        if result.log_prob is not None:
            assert result.log_prob.isfinite().all()


def test_times_that_go_both_ways_or_stay_for_all_are_refused() -> None:
    x = torch.randn(2, 3)
    for grid in ([0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.4], [[0.0, 0.0], [0.5, 0.0], [0.4, 0.0]]):
        with pytest.raises(ValueError, match="time_grid: expected"):
            fm.sample(lambda x, t: x, x, time_grid=torch.tensor(grid))
    grid = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="time_grid: expected strictly monotone"):
        fm.sample(lambda x, t: x, x, time_grid=grid, method="dopri5")


# ---------------------------------------------------------------------- ends, dtypes, directions, sizes


@each
def test_dtypes_directions_and_sizes(entry: methods.Entry) -> None:
    field = lambda x, t: torch.sin(5.0 * t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)) - x  # noqa: E731
    method = entry.make()
    for path in (CondOT(), VP(), OptimalTransport(1e-4), LinearVP()):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
            for steps in (1, 2):
                y, result = fm.sample(field, x, method=method, steps=steps, path=path)
                assert y.dtype == dtype
                assert y.isfinite().all()
                assert result.steps == steps
    for shape in ((0, 2), (2, 0), (1,), (2, 3, 1)):
        assert fm.sample(field, torch.ones(shape), method=method, steps=2)[0].shape == shape
    down = np.linspace(1.0, 0.0, 5)
    if entry.kind != "sde" or isinstance(method, SDE):
        assert fm.sample(field, x, method=method, time_grid=down)[0].isfinite().all()
    else:
        with pytest.raises(ValueError, match="time_grid: expected increasing times"):
            fm.sample(field, x, method=method, time_grid=down)


@each
def test_on_a_path_of_the_users_own(entry: methods.Entry) -> None:
    class Quadratic(Path):
        def alpha(self, t):
            return 2.0 * t - t * t

        def sigma(self, t):
            return (1.0 - t) ** 2 + 0.01 * t

        def d_alpha(self, t):
            return 2.0 - 2.0 * t

        def d_sigma(self, t):
            return -2.0 * (1.0 - t) + 0.01

        def log_snr_inverse(self, log_snr):
            low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
            for _ in range(60):
                middle = 0.5 * (low + high)
                above = 2.0 * torch.log(self.alpha(middle) / self.sigma(middle)) > log_snr
                low, high = torch.where(above, low, middle), torch.where(above, middle, high)
            return 0.5 * (low + high)

    path = Quadratic()
    if entry.kind == "sde":
        assert fm.sample(Gaussian(path), torch.randn(3, 2), method=entry.make(), path=path, steps=4)[0].isfinite().all()
        return
    model = Gaussian(path)
    _, std = moments(program_of(entry.make(), even(0.0, 1.0, 30), path), model, *model.marginal(0.0))
    assert std == pytest.approx(model.marginal(1.0)[1], abs=0.1)


def test_multistep_orders_of_their_own() -> None:
    """Settings beside the registry's: a polynomial of higher degree does not help the first steps."""
    for method, order in ((DPMSolverPP(3, solver_type="exact"), 2), (DEIS(2), 2), (LMS(2), 2), (LMS(3), 2)):
        coarse, fine = (error(method, CondOT(), 0.3, 0.8, steps) for steps in (40, 80))
        assert order - 0.2 < math.log2(coarse / fine) < order + 0.6


# ---------------------------------------------------------------------- torch.compile

MADE = {
    "method": lambda: {"method": UniPC(3, "bh1"), "path": VP(0.2, 5.0)},
    "nested": lambda: {"method": Restart((RestartInterval(0.2, 0.9, 3, 2),), heun=False)},
    "schedule": lambda: {"method": "ab2", "schedule": Stretched(fm.times.Shift(5.0), 0.2)},
    "sde": lambda: {"sde": SDE("flow_grpo", log_prob="mean"), "noise_transform": fm.ZeroMeanNoise()},
}


@pytest.mark.parametrize("name", MADE)
def test_objects_made_within_what_is_compiled_keep_their_settings(name: str) -> None:
    """The tracer gave those of their classes."""
    layer = torch.nn.Linear(4, 4)

    def sampled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(3) if not torch.compiler.is_compiling() else None
        model = lambda x, t: torch.tanh(layer(x) + t[:, None])  # noqa: E731
        samples, result = fm.sample(model, x, steps=5, generator=generator, **MADE[name]())
        return samples, result.log_prob

    x = torch.randn(3, 4)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        got = torch.compile(sampled, fullgraph=True, backend="eager")(x)
    wanted = sampled(x)
    torch.testing.assert_close(got[0], wanted[0])
    if wanted[1] is not None:
        torch.testing.assert_close(got[1], wanted[1])


# ---------------------------------------------------------------------- errors

WRONG = [None, "x", -1, math.nan, [1], torch.tensor(1.0), {}, object()]
CLASSES = (DDIM, Ancestral, DPMSolverPP, DPMSolverPP2S, UniPC, DEIS, LMS, EDM, RestartInterval, Restart, Stretched)
CLASSES += (AdamsBashforth, AdamsMoulton, RungeKutta, SDE, FlowGRPO, Function, Power, Log, Karras)
NEEDED = {RestartInterval: {"sigma_min": 0.1, "sigma_max": 0.5}, Stretched: {"schedule": "uniform", "terminal": 0.1}}
OPTIONAL = {"steps", "last_step_size"}  # may be None


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_setting_is_checked_under_its_name(kind: type) -> None:
    for field in dataclasses.fields(kind):
        for value in WRONG:
            if value is None and field.name in OPTIONAL:
                continue
            with pytest.raises((TypeError, ValueError), match=r"^\w+: expected") as caught:
                kind(**{**NEEDED.get(kind, {}), field.name: value})
            assert str(caught.value).startswith(field.name), (field.name, value)
