"""Flow and diffusion solvers: against the published formulas, exact laws, convergence orders and the ends of paths."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from diffusion_problems import (
    TWO_PATHS,
    at,
    data_network,
    even,
    execute,
    level,
    network,
    noise,
    program_of,
    solve,
    states,
    uneven,
)

from fmkernels.paths import VE, VP, CondOT, ConstantBridge, Cosine, LinearVP, OptimalTransport, Polynomial
from fmkernels.solvers.methods.diffusion import DDIM, DEIS, LCM, LMS, Ancestral, DPMSolverPP, DPMSolverPP2S, UniPC
from fmkernels.solvers.methods.edm import EDM, Restart, RestartInterval
from fmkernels.solvers.methods.noise_levels import exponential_moments
from fmkernels.solvers.methods.registry import METHODS
from fmkernels.solvers.methods.runge_kutta import RungeKutta
from fmkernels.solvers.methods.sde import SDE
from fmkernels.solvers.methods.tableaus import TABLEAUS
from fmkernels.solvers.programs.builder import Builder

NAMES = [name for name, entry in METHODS.items() if "path" in entry.needs and not isinstance(entry.make(), SDE)]


@pytest.fixture(autouse=True)
def no_warnings():
    """Infinite ratios at the ends are expected, and must not be told to users."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------ published formulas


def oracle_dpmpp(order, solver_type, eta, path, grid, x, lower_order_final=False):
    """DPM-Solver++ and its SDE form as diffusers and k-diffusion write them, in lambda."""
    outputs, lambdas = [], []
    for i, (t, u) in enumerate(itertools.pairwise(grid)):
        (a_s, s_s), (a_t, s_t) = level(path, t), level(path, u)
        outputs.append(at(data_network, x, t))
        lambdas.append(math.log(a_s / s_s) if a_s > 0 else -math.inf)
        h = (math.log(a_t / s_t) if s_t > 0 else math.inf) - lambdas[-1]
        h_eta = h + eta * h if eta else h
        phi_1 = -math.expm1(-h_eta)
        x_next = s_t / s_s * (math.exp(-eta * h) if eta else 1.0) * x + a_t * phi_1 * outputs[-1]
        now = min(order, i + 1, len(grid) - 1 - i if lower_order_final else order) if math.isfinite(h) else 1
        if now == 2:
            r = (lambdas[-1] - lambdas[-2]) / h
            d_1 = (outputs[-1] - outputs[-2]) / r
            x_next = x_next + a_t * (0.5 * phi_1 if solver_type == "midpoint" else 1.0 - phi_1 / h_eta) * d_1
        elif now == 3:
            r_0, r_1 = (lambdas[-1] - lambdas[-2]) / h, (lambdas[-2] - lambdas[-3]) / h
            d_10, d_11 = (outputs[-1] - outputs[-2]) / r_0, (outputs[-2] - outputs[-3]) / r_1
            d_1 = d_10 + r_0 / (r_0 + r_1) * (d_10 - d_11)
            d_2 = (d_10 - d_11) / (r_0 + r_1)
            phi_2 = 1.0 - phi_1 / h_eta
            x_next = x_next + a_t * phi_2 * d_1 - a_t * (phi_2 / h_eta - 0.5) * d_2
        if eta and s_t > 0:
            x_next = x_next + s_t * math.sqrt(-math.expm1(-2.0 * eta * h)) * noise(x, i)
        x = x_next
    return x


def oracle_unipc(order, variant, path, grid, x, lower_order_final=True):
    """UniPC as published: the systems R rho = b of predictor and corrector."""

    def update(x, new, outputs, lambdas, p, a_s, s_s, a_t, s_t, lambda_t):
        h = lambda_t - lambdas[-1]
        hh = -h
        m_0 = outputs[-1]
        rks = [(lambdas[-1 - i] - lambdas[-1]) / h for i in range(1, p)] + [1.0]
        d1s = [(outputs[-1 - i] - m_0) / rks[i - 1] for i in range(1, p)]
        h_phi_1 = math.expm1(hh)
        b_h = hh if variant == "bh1" else h_phi_1
        h_phi_k, factorial, rows, b = h_phi_1 / hh - 1.0, 1.0, [], []
        for i in range(1, p + 1):
            rows.append(np.power(rks, i - 1))
            b.append(h_phi_k * factorial / b_h)
            factorial *= i + 1
            h_phi_k = h_phi_k / hh - 1.0 / factorial
        rows, b = np.stack(rows), np.asarray(b)
        result = s_t / s_s * x - a_t * h_phi_1 * m_0
        if new is None:
            rhos = [0.5] if p == 2 else np.linalg.solve(rows[:-1, :-1], b[:-1]) if p > 1 else []
        else:
            rhos = [0.5] if p == 1 else np.linalg.solve(rows, b)
            d1s.append(new - m_0)
        for rho, d in zip(rhos, d1s, strict=True):
            result = result - a_t * b_h * float(rho) * d
        return result

    outputs, lambdas, p, last = [], [], 0, None
    steps = len(grid) - 1
    for i in range(steps):
        (a_s, s_s), (a_t, s_t) = level(path, grid[i]), level(path, grid[i + 1])
        new = at(data_network, x, grid[i])
        lambda_s = math.log(a_s / s_s)
        if last is not None:
            x_last, a_l, s_l = last
            x = update(x_last, new, outputs, lambdas, p, a_l, s_l, a_s, s_s, lambda_s)
        outputs.append(new)
        lambdas.append(lambda_s)
        p = min(order, i + 1, steps - i if lower_order_final else order)
        last = x, a_s, s_s
        if s_t == 0.0:
            x = a_t * new
        else:
            x = update(x, None, outputs, lambdas, p, a_s, s_s, a_t, s_t, math.log(a_t / s_t))
    return x


def oracle_polynomial(order, variable, path, grid, x, lower_order_final=False):
    """DEIS and LMS by numerical integration of the polynomial of E over sigma / alpha."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    history = []
    for i, (t, u) in enumerate(itertools.pairwise(grid)):
        (a_s, s_s), (a_t, s_t) = level(path, t), level(path, u)
        history.insert(0, (t, (x - a_s * at(data_network, x, t)) / s_s))
        history = history[: min(order, len(grid) - 1 - i) if lower_order_final else order]
        # from sigma / alpha at t to that at u; w^6 resolves the logarithm where the latter is 0
        w = 0.5 + 0.5 * nodes
        rho_s, rho_t = s_s / a_s, s_t / a_t
        rho = rho_t + (rho_s - rho_t) * w**6
        jacobian = -(rho_s - rho_t) * 6.0 * w**5 * 0.5 * weights

        def place(time_or_rho, is_rho):
            if variable == "rho":
                return time_or_rho if is_rho else level(path, time_or_rho)[1] / level(path, time_or_rho)[0]
            if variable == "log_rho":
                return np.log(time_or_rho) if is_rho else math.log(place_rho(time_or_rho))
            if not is_rho:
                return time_or_rho
            return path.log_snr_inverse(torch.from_numpy(-2.0 * np.log(time_or_rho))).numpy()

        def place_rho(time):
            alpha, sigma = level(path, time)
            return sigma / alpha

        change = torch.zeros_like(x)
        for i, (own, value) in enumerate(history):
            basis = np.ones_like(rho)
            for j, (other, _) in enumerate(history):
                if i != j:
                    basis *= (place(rho, True) - place(other, False)) / (place(own, False) - place(other, False))
            change = change + float(np.sum(basis * jacobian)) * value
        x = a_t * (x / a_s + change)
    return x


GRIDS = pytest.mark.parametrize("grid", [even(0.1, 1.0, 7), uneven(0.05, 0.9, 6), even(0.3, 0.9, 1)], ids=len)


@pytest.mark.parametrize("eta", [0.0, 1.0, 0.4])
@pytest.mark.parametrize(
    ("order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")]
)
@GRIDS
@TWO_PATHS
def test_dpmpp_is_the_published_one(path, grid, order, solver_type, eta):
    if order == 3 and solver_type == "midpoint" and eta:
        solver_type = "heun"  # k-diffusion's third-order SDE starts with the integral, diffusers' ODE with m_0 / 2
    for lower in (True, False):
        method = DPMSolverPP(order, eta, solver_type, lower_order_final=lower)
        got = solve(method, grid, path, data_network, states(), "x_1")
        expected = oracle_dpmpp(order, solver_type, eta, path, grid, states(), lower)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@GRIDS
@TWO_PATHS
def test_unipc_is_the_published_one(path, grid, order, variant):
    for lower in (True, False):
        got = solve(UniPC(order, variant, lower_order_final=lower), grid, path, data_network, states(), "x_1")
        expected = oracle_unipc(order, variant, path, grid, states(), lower)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "variable"),
    [
        (DEIS(2, lower_order_final=False), "log_rho"),
        (DEIS(3, lower_order_final=False), "log_rho"),
        (DEIS(2, "t", lower_order_final=False), "t"),
        (DEIS(3, "t", lower_order_final=False), "t"),
        (DEIS(2, lower_order_final=True), "log_rho"),
        (DEIS(3, lower_order_final=True), "log_rho"),
        (DEIS(3, "t", lower_order_final=True), "t"),
        (LMS(3), "rho"),
        (LMS(4), "rho"),
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [even(0.1, 0.97, 7), uneven(0.05, 0.9, 6)], ids=len)
@TWO_PATHS
def test_deis_and_lms_integrate_their_polynomials(path, grid, method, variable):
    got = solve(method, grid, path, data_network, states(), "x_1")
    lower = getattr(method, "lower_order_final", False)
    expected = oracle_polynomial(method.order, variable, path, grid, states(), lower)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", [0.0, 0.2])
def test_flow_closed_forms(start):
    """The forms in sigma = 1 - t with v = x_0 - x_1, as libraries that run the other way have them."""
    grid, x_0 = even(start, 1.0, 6), states()
    sigmas = [1.0 - t for t in grid]
    x = dict.fromkeys(("euler", "2m", "sde", "ancestral", "lcm", "ddim"), x_0)
    previous = {}
    for i, (s, n) in enumerate(itertools.pairwise(sigmas)):
        v = {name: -at(network, value, 1.0 - s) for name, value in x.items()}
        d = {name: x[name] - s * v[name] for name in x}
        z = noise(x_0, i) if n > 0 else 0.0
        lambdas = [math.log((1 - q) / q) if 0 < q < 1 else math.inf if q <= 0 else -math.inf for q in (s, n)]
        h = lambdas[1] - lambdas[0]
        inverse_r = 0.0
        if i and math.isfinite(h):
            inverse_r = h / (
                lambdas[0] - (math.log((1 - sigmas[i - 1]) / sigmas[i - 1]) if sigmas[i - 1] < 1 else -math.inf)
            )
        difference = {k: d[k] - previous.get(k, d[k]) for k in d}
        x["euler"] = x["euler"] + (n - s) * v["euler"]
        x["2m"] = x["2m"] + (n - s) * v["2m"] + (1 - n / s) * inverse_r / 2 * difference["2m"]
        e, e2 = math.exp(-h), math.exp(-2 * h)
        x["sde"] = n / s * e * x["sde"] + (1 - n) * (1 - e2) * (d["sde"] + inverse_r / 2 * difference["sde"])
        x["sde"] = x["sde"] + n * math.sqrt(1 - e2) * z
        down = n * (1 + (n / s - 1))
        x_d = down / s * x["ancestral"] + (1 - down / s) * d["ancestral"]
        deviation = math.sqrt(max(n**2 - (down * (1 - n) / (1 - down)) ** 2, 0.0))
        x["ancestral"] = (1 - n) / (1 - down) * x_d + deviation * z
        x["lcm"] = (1 - n) * d["lcm"] + n * z
        # k-diffusion's ancestral step in sigma / (1 - sigma), for x / (1 - sigma)
        v_s, v_n = (s / (1 - s) if s < 1 else math.inf), n / (1 - n)
        up = v_n * math.sqrt(1 - (v_n / v_s) ** 2)
        noise_level = math.sqrt(v_n**2 - up**2)
        eps = x["ddim"] - (1 - s) * d["ddim"] if s == 1 else (x["ddim"] / (1 - s) - d["ddim"]) / v_s
        x["ddim"] = (1 - n) * (d["ddim"] + noise_level * eps + up * z)
        previous = d
    methods = {"euler": DPMSolverPP(1), "2m": DPMSolverPP(2), "sde": DPMSolverPP(2, 1.0), "ancestral": Ancestral()}
    methods |= {"lcm": LCM(), "ddim": DDIM(1.0)}
    for name, method in methods.items():
        torch.testing.assert_close(solve(method, grid, CondOT(), network, x_0), x[name], rtol=1e-13, atol=1e-13)


def ve_heun(x, s, n, denoise, heun):
    """EDM's step for x / alpha from noise level s to n."""
    d = (x - denoise(x, s)) / s
    x_n = x + (n - s) * d
    if heun and n > 0:
        x_n = x + (n - s) * 0.5 * (d + (x_n - denoise(x_n, n)) / n)
    return x_n


def ve_problem(path):
    """The data prediction as a function of x / alpha and sigma / alpha."""

    def denoise(x, s):
        t = float(path.log_snr_inverse(torch.tensor(-2.0 * math.log(s), dtype=torch.float64)))
        return at(data_network, level(path, t)[0] * x, t)

    return denoise


@pytest.mark.parametrize("heun", [True, False])
@TWO_PATHS
def test_edm_is_the_published_one(path, heun):
    steps, grid, x_0 = 6, even(0.25, 1.0, 6), states()
    method = EDM(s_churn=1.2, s_tmin=0.3, s_tmax=2.0, s_noise=1.1, heun=heun)
    alphas, sigmas = zip(*(level(path, t) for t in grid), strict=True)
    x, denoise, churned = x_0 / alphas[0], ve_problem(path), 0
    for i in range(steps):
        s, n = sigmas[i] / alphas[i], sigmas[i + 1] / alphas[i + 1]
        if 0.3 <= s <= 2.0:
            hat = s * (1.0 + min(1.2 / steps, math.sqrt(2.0) - 1.0))
            x = x + math.sqrt(hat**2 - s**2) * 1.1 * noise(x, i)
            s, churned = hat, churned + 1
        x = ve_heun(x, s, n, denoise, heun)
    assert 0 < churned < steps
    torch.testing.assert_close(
        solve(method, grid, path, data_network, x_0, "x_1"), x * alphas[-1], rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("heun", [True, False])
@TWO_PATHS
def test_restart_is_the_published_one(path, heun):
    grid, x_0 = even(0.25, 1.0, 5), states()
    intervals = (RestartInterval(0.2, 0.9, 3, 2), RestartInterval(0.5, 2.0, 2, 1))
    alphas, sigmas = zip(*(level(path, t) for t in grid), strict=True)
    levels = sorted({s / a for s, a in zip(sigmas, alphas, strict=True)} | {0.2, 0.5}, reverse=True)
    x, denoise, stream = x_0 / alphas[0], ve_problem(path), 0
    for s, n in itertools.pairwise(levels):
        x = ve_heun(x, s, n, denoise, heun)
        for interval in intervals:
            for _ in range(interval.repeats if n == interval.sigma_min else 0):
                x = x + math.sqrt(interval.sigma_max**2 - n**2) * noise(x, stream)
                stream += 1
                roots = np.linspace(interval.sigma_max ** (1 / 7), n ** (1 / 7), interval.steps + 1) ** 7
                for high, low in itertools.pairwise(roots):
                    x = ve_heun(x, float(high), float(low), denoise, heun)
    got = solve(Restart(intervals, heun), grid, path, data_network, x_0, "x_1")
    assert stream == 3
    torch.testing.assert_close(got, x * alphas[-1], rtol=1e-13, atol=1e-13)


def test_dpmpp_2s_is_the_published_one():
    path, x, r = VP(), states(), 0.4
    grid = even(0.2, 0.9, 4)
    for t, u in itertools.pairwise(grid):
        (a_s, s_s), (a_t, s_t) = level(path, t), level(path, u)
        h = math.log(a_t / s_t) - math.log(a_s / s_s)
        middle = float(path.log_snr_inverse(torch.tensor(2 * (math.log(a_s / s_s) + r * h), dtype=torch.float64)))
        a_m, s_m = level(path, middle)
        d = at(data_network, x, t)
        d_m = at(data_network, s_m / s_s * x - a_m * math.expm1(-r * h) * d, middle)
        x = s_t / s_s * x - a_t * math.expm1(-h) * ((1 - 0.5 / r) * d + 0.5 / r * d_m)
    torch.testing.assert_close(
        solve(DPMSolverPP2S(r=r), grid, path, data_network, states(), "x_1"), x, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("grid", [even(0.0, 1.0, 9), uneven(0.0, 0.9, 8), even(0.8, 0.1, 5)], ids=str)
def test_methods_that_coincide(grid):
    def run(method, path=CondOT()):  # noqa: B008
        return solve(method, grid, path, network, states())

    close = {"rtol": 1e-13, "atol": 1e-13}
    euler = run(RungeKutta(TABLEAUS["euler"]))
    for method in (DDIM(), DPMSolverPP(1), UniPC(1, corrector=False), DEIS(1), LMS(1), EDM(heun=False), Ancestral(0.0)):
        torch.testing.assert_close(run(method), euler, **close)
    for path in (CondOT(), Cosine()):
        torch.testing.assert_close(run(DPMSolverPP(2), path), run(UniPC(2, "bh2", corrector=False), path), **close)
    if grid[0] < grid[1]:
        torch.testing.assert_close(run(DDIM(1.0)), run(DPMSolverPP(1, 1.0)), **close)


def test_moments_are_the_integrals():
    h = np.array([-30.0, -2.0, -0.999, -1e-3, -1e-9, 1e-12, 1e-4, 0.3, 0.9999, 1.0, 5.0, 40.0])
    nodes, weights = np.polynomial.legendre.leggauss(80)
    s = 0.5 + 0.5 * nodes
    for n, got in enumerate(exponential_moments(h, 4)):
        expected = np.array([np.sum(0.5 * weights * width * np.exp(-width * (1 - s)) * s**n) for width in h])
        np.testing.assert_allclose(got, expected, rtol=2e-13)
    assert exponential_moments(math.inf, 4) == [1.0] * 4


@pytest.mark.parametrize(
    "name", [name for name in NAMES if program_of(METHODS[name].make(), [0.2, 0.5, 0.9], CondOT()).streams]
)
def test_noise_needs_a_grid_towards_data(name):
    with pytest.raises(ValueError, match="time_grid: expected increasing times"):
        program_of(METHODS[name].make(), [0.9, 0.5, 0.2], CondOT())


# ------------------------------------------------------------------ ends, grids, calls

PATHS = [CondOT(), VP(), Cosine(), LinearVP(), Polynomial(2.5), OptimalTransport(1e-3), VE()]


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_finite_from_end_to_end(name, path):
    for prediction in ("velocity", "x_1"):
        for steps in (0, 1, 2, 5):
            x = solve(METHODS[name].make(), even(0.0, 1.0, steps), path, data_network, states(5), prediction)
            assert torch.isfinite(x).all(), (prediction, steps)
    # the last step goes to the data prediction
    if isinstance(path, CondOT):
        x = solve(METHODS[name].make(), [0.4, 1.0], path, data_network, states(5), "x_1")
        if name != "restart" and "churn" not in name:
            torch.testing.assert_close(x, at(data_network, states(5), 0.4), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "method",
    [DDIM(), DPMSolverPP(3), DPMSolverPP2S(), UniPC(3), UniPC(2, "bh1"), DEIS(3), DEIS(2, "t"), LMS(4), EDM()],
    ids=str,
)
def test_backwards_to_noise(method):
    for path in (CondOT(), Cosine()):
        x_0 = states(5)
        assert torch.isfinite(solve(method, even(1.0, 0.0, 5), path, data_network, x_0)).all()
        there = solve(method, even(0.2, 0.9, 100), path, network, x_0)
        back = solve(method, even(0.9, 0.2, 100), path, network, there)
        assert float((back - x_0).abs().max()) < 0.05


METHODS_FOR_ROWS = {name: METHODS[name].make() for name in NAMES} | {
    "restart": Restart((RestartInterval(0.1, 0.5, 2, 2), RestartInterval(0.8, 3.0, 2, 1)), s_noise=0.0),
    "restart_euler": Restart((RestartInterval(0.3, 0.9, 2, 1),), heun=False, s_noise=0.0),
}


@pytest.mark.parametrize("path", [CondOT(), VP(), Cosine()], ids=repr)
@pytest.mark.parametrize("name", METHODS_FOR_ROWS)
def test_grids_of_each_sample(name, path):
    method = METHODS_FOR_ROWS[name]
    grids = [even(0.0, 1.0, 6), [t**1.5 for t in even(0.0, 1.0, 6)]]
    deterministic = "restart" in name or not program_of(method, grids[0], path).streams
    if deterministic:  # noise is counted by its places, which differ between grids with other ends
        grids += [even(0.1, 0.9, 6), even(0.0, 0.95, 6)]
    x_0 = torch.linspace(-1.0, 1.0, len(grids) * 3, dtype=torch.float64).view(-1, 3)
    together = solve(method, list(np.asarray(grids).T.copy()), path, network, x_0)
    for row, grid in enumerate(grids):
        alone = solve(method, grid, path, network, x_0[row : row + 1], row_offset=row)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-13, atol=1e-13)


def test_calls():
    def calls(method, grid):
        return program_of(method, grid, CondOT()).calls

    n = 8
    ends, inner = even(0.0, 1.0, n), even(0.1, 0.9, n)
    one_a_step = [
        DDIM(1.0),
        Ancestral(),
        LCM(),
        DPMSolverPP(3, 1.0),
        UniPC(3),
        DEIS(3, "t"),
        LMS(),
        EDM(5.0, heun=False),
    ]
    for method in one_a_step:
        assert calls(method, ends) == calls(method, inner) == n
    for method in (DPMSolverPP2S(1.0), EDM(5.0)):
        assert calls(method, inner) == 2 * n
        assert calls(method, ends) == 2 * n - 2
    intervals = (RestartInterval(0.1, 0.5, 3, 2), RestartInterval(0.8, 3.0, 4, 1))
    assert calls(Restart(intervals), ends) == 2 * n - 2 + 2 * (1 + 6) + 2 * (1 + 4)
    assert calls(Restart(intervals, heun=False), ends) == n + (1 + 6) + (1 + 4)
    assert calls(Restart(()), ends) == 2 * n - 2


def test_one_update_a_step():
    """All terms of a step are one launch, the corrector's too."""
    for method in (DDIM(1.0), Ancestral(), LCM(), DPMSolverPP(3, 1.0), UniPC(3), DEIS(3), LMS(4)):
        program = program_of(method, even(0.0, 1.0, 10), CondOT())
        assert len(program.instructions) == 3 * 10  # call, update, end of step


def test_a_sum_of_many_terms_is_split():
    builder = Builder([0.0, 1.0], CondOT())
    total = builder.x
    for _ in range(40):
        total = total + 0.5 * builder.noise()
    builder.advance(total)
    program = builder.program()
    x_0 = states()
    expected = x_0 + 0.5 * sum(noise(x_0, i) for i in range(40))
    torch.testing.assert_close(execute(program, network, x_0), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(1.5), "eta: expected a finite number >= 0.0 and <= 1.0"),
        (lambda: DPMSolverPP(4), "order: expected an int <= 3"),
        (lambda: DPMSolverPP(2, solver_type="euler"), "solver_type: expected one of 'midpoint'"),
        (lambda: DPMSolverPP2S(r=0.0), "r: expected"),
        (lambda: UniPC(variant="bh3"), "variant: expected one of 'bh1', 'bh2'"),
        (lambda: DEIS(variable="rho"), "variable: expected one of 'log_rho', 't'"),
        (lambda: LMS(5), "order: expected an int <= 4"),
        (lambda: EDM(s_tmin=2.0, s_tmax=1.0), "s_tmax: expected"),
        (lambda: RestartInterval(0.5, 0.4), "sigma_max: expected"),
        (lambda: program_of(DDIM(), [0.0, 1.0], ConstantBridge(0.1)), "path: expected one without a gamma term"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
