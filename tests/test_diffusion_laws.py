"""Flow and diffusion solvers: convergence orders, and the laws of the stochastic ones."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from diffusion_problems import (
    TWO_PATHS,
    even,
    execute,
    level,
    program_of,
    solve,
    states,
    uneven,
)

from fmkernels.paths import VP, CondOT
from fmkernels.solvers.methods.diffusion import DDIM, DEIS, LCM, LMS, Ancestral, DPMSolverPP, DPMSolverPP2S, UniPC
from fmkernels.solvers.methods.edm import EDM, Restart, RestartInterval
from fmkernels.solvers.methods.runge_kutta import RungeKutta
from fmkernels.solvers.methods.tableaus import TABLEAUS


@pytest.fixture(autouse=True)
def no_warnings():
    """Infinite ratios at the ends are expected, and must not be told to users."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------ convergence


def mixture(path):
    """The exact data prediction for two Gaussians."""
    means, deviations = torch.tensor([-0.8, 0.9]).double(), torch.tensor([0.8, 0.6]).double()

    def model(x, t):
        alpha, sigma = path.alpha(t[0]), path.sigma(t[0])
        variance = (alpha * deviations) ** 2 + sigma**2
        off = x - alpha * means
        share = torch.softmax(-0.5 * off**2 / variance - 0.5 * torch.log(variance), -1)
        return (share * (means + alpha * deviations**2 / variance * off)).sum(-1, keepdim=True)

    return model


ORDERS = {
    **{DPMSolverPP(p, solver_type=s): o for p, s, o in [(1, "heun", 1), (2, "heun", 2), (2, "midpoint", 2)]},
    # as published the second difference counts half
    DPMSolverPP(3): 2,
    DPMSolverPP(3, solver_type="exact"): 3,
    DPMSolverPP2S(): 2,
    DPMSolverPP2S(r=0.3): 2,
    **{UniPC(p, v, c): p + c for p in (1, 2, 3) for v in ("bh1", "bh2") for c in (False, True)},
    **{DEIS(p, v): p for p in (1, 2, 3) for v in ("log_rho", "t")},
    **{LMS(p): p for p in (1, 2, 3, 4)},
    EDM(): 2,
    EDM(heun=False): 1,
    DDIM(): 1,
}


@pytest.fixture(scope="module", params=[CondOT(), VP()], ids=repr)
def problem(request):
    path = request.param
    model, x_0 = mixture(path), states(7)
    reference = solve(RungeKutta(TABLEAUS["rk4"]), even(0.2, 0.8, 250), path, model, x_0, "x_1")
    return path, model, x_0, reference


@pytest.mark.parametrize("method", ORDERS, ids=str)
def test_order(problem, method):
    path, model, x_0, reference = problem
    errors = []
    first = 60 if method == LMS(4) else 30  # the highest order is the last to show
    for steps in (first, 2 * first):
        got = solve(method, uneven(0.2, 0.8, steps), path, model, x_0, "x_1")
        errors.append(float((got - reference).abs().pow(2).mean().sqrt()))
    order = math.log2(errors[0] / errors[1])
    assert ORDERS[method] - 0.3 < order < ORDERS[method] + 0.9, errors


# ------------------------------------------------------------------ laws of the stochastic ones

MEAN, DEVIATION = 1.0, 0.5


def gaussian(path):
    def model(x, t):
        alpha, sigma = path.alpha(t[0]), path.sigma(t[0])
        gain = alpha * DEVIATION**2 / ((alpha * DEVIATION) ** 2 + sigma**2)
        return gain * x + MEAN * (1.0 - gain * alpha)

    return model


def marginal(path, t):
    alpha, sigma = level(path, t)
    return alpha * MEAN, math.sqrt((alpha * DEVIATION) ** 2 + sigma**2)


def law(program, path, start):
    """Mean and standard deviation of the result, exactly: all is linear in the start and each noise."""
    inputs = 2 + program.streams
    x_0 = torch.zeros(inputs, 1, dtype=torch.float64)
    x_0[1] = 1.0
    noises = [torch.zeros_like(x_0) for _ in range(program.streams)]
    for i, z in enumerate(noises):
        z[2 + i] = 1.0
    result = execute(program, gaussian(path), x_0, noises=noises)[:, 0]
    slopes = result[1:] - result[0]
    mean, deviation = marginal(path, start)
    variance = (slopes[0] * deviation) ** 2 + slopes[1:].square().sum()
    return float(result[0] + slopes[0] * mean), float(variance.sqrt())


RESTART = Restart((RestartInterval(0.1, 0.5, 12, 2), RestartInterval(0.8, 3.0, 12, 1)))
STOCHASTIC = [
    DDIM(1.0),
    DDIM(0.5),
    Ancestral(),
    Ancestral(0.5),
    DPMSolverPP(1, 1.0),
    DPMSolverPP(2, 1.0),
    DPMSolverPP(2, 0.4, "heun"),
    DPMSolverPP(3, 1.0),
    DPMSolverPP2S(1.0),
    DPMSolverPP2S(0.5, 0.7),
    EDM(s_churn=5.0),
    EDM(s_churn=5.0, heun=False),
    EDM(s_churn=5.0, s_tmin=0.05, s_tmax=10.0),
    RESTART,
]
stochastic = pytest.mark.parametrize("method", STOCHASTIC, ids=str)


@stochastic
@pytest.mark.parametrize(("path", "end"), [(CondOT(), 1.0), (VP(), 1.0), (VP(), 0.8)], ids=str)
def test_marginals(path, method, end):
    mean, deviation = marginal(path, end)
    errors = []
    for steps in (50, 100):
        program = program_of(method, even(0.0, end, steps), path, "x_1")
        assert program.streams > 0
        got = law(program, path, 0.0)
        errors.append((abs(got[0] - mean), abs(got[1] - deviation)))
    assert max(errors[1]) < 0.04
    # and the bias falls with the step; the restarts' own steps stay
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 0.62 * coarse or fine < (3e-3 if method is RESTART else 5e-4), errors


@stochastic
@TWO_PATHS
def test_samples_follow_the_law(path, method):
    """200 000 samples against the exact law of the same grid: independent noise at each place."""
    count, program = 200_000, program_of(method, even(0.0, 1.0, 5), path, "x_1")
    mean, deviation = law(program, path, 0.0)
    start_mean, start_deviation = marginal(path, 0.0)
    generator = torch.Generator().manual_seed(3)
    x_0 = start_mean + start_deviation * torch.randn(count, 1, dtype=torch.float64, generator=generator)
    x = execute(program, gaussian(path), x_0)
    assert abs(float(x.mean()) - mean) < 4.5 * deviation / math.sqrt(count)
    assert abs(float(x.std()) - deviation) < 4.5 * deviation / math.sqrt(2 * count)


@TWO_PATHS
def test_lcm_on_a_point(path):
    """Data at one point: the data prediction is it, and every marginal is exact."""
    x_0 = torch.randn(200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for end in (0.6, 1.0):
        x = solve(LCM(), even(0.0, end, 5), path, lambda x, t: torch.full_like(x, MEAN), x_0, "x_1")
        alpha, sigma = level(path, end)
        assert abs(float(x.mean()) - alpha * MEAN) <= 4.5 * sigma / math.sqrt(len(x)) + 1e-12
        assert abs(float(x.std()) - sigma) <= 4.5 * sigma / math.sqrt(2 * len(x)) + 1e-12
