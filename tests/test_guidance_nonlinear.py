"""APG, and the rules that guide a step: each against plain PyTorch written from its paper."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from guidance_problems import GRID, NULL, APGOracle, B, Model, W, close, data, dot, each_shape, euler, pair, solve, wide

import fmkernels as fm
from fmkernels.guidance import APG, CFG, CFGPlusPlus, RectifiedCFGPlusPlus
from fmkernels.paths import VP, CondOT, Cosine
from fmkernels.solvers.methods.diffusion import DDIM
from fmkernels.solvers.methods.registry import resolve

# ---------------------------------------------------------------------- APG

APG_CASES = [
    {},
    {"eta": 0.3},
    {"eta": 1.0},
    {"threshold": 0.8},
    {"momentum": -0.5},
    {"eta": 0.2, "threshold": 0.9, "momentum": -0.75},
    {"eta": 0.2, "threshold": 0.9, "momentum": -0.75, "base": "unconditional"},
]


@each_shape
@pytest.mark.parametrize("target", ["x_1", "velocity", "x_0"])
@pytest.mark.parametrize("options", APG_CASES, ids=str)
def test_apg(options: dict, target: str, shape: tuple) -> None:
    x, y = data(shape)
    path, outputs = CondOT(), pair(y)
    for scale, w in ((4.0, 4.0), (W, wide(W, x))):
        oracle = APGOracle(w, **options)

        def guided(x, t, i, oracle=oracle):
            c, u = (path.convert(v, x, t, "velocity", target) for v in outputs(x, t))
            return path.convert(oracle(c, u), x, t, target, "velocity")

        guidance = APG(scale, negative={"y": NULL}, target=target, **options)
        close(solve(guidance, Model(), x, y=y), euler(guided, x), 1e-11)
        t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
        alone = APGOracle(w, **{**options, "momentum": 0.0})
        close(guidance.at(Model(), {"y": y})(x, t), guided(x, t, 0, alone), 1e-11)


def test_apg_without_projection_is_cfg() -> None:
    x, y = data()
    cfg = CFG(4.0, negative={"y": NULL})
    for target in ("x_1", "velocity"):
        for base in ("conditional", "unconditional"):
            guidance = APG(4.0, negative={"y": NULL}, eta=1.0, target=target, base=base)
            # both ends of the path, where predictions lose the velocity, included
            grid = [0.0, 0.3, 1.0]
            for method in ("euler", "heun2"):
                got = solve(guidance, Model(), x, resolve(method), grid=grid, y=y)
                close(got, solve(cfg, Model(), x, resolve(method), grid=grid, y=y), 1e-13)


def test_apg_momentum_is_finite_at_the_data() -> None:
    x, y = data()
    guidance = APG(4.0, negative={"y": NULL}, momentum=-0.5, threshold=2.0)
    got = solve(guidance, Model(), x, resolve("heun2"), grid=[0.0, 0.5, 0.9, 1.0], y=y)
    assert torch.isfinite(got).all()
    assert got.abs().max() < 50.0


def test_apg_momentum_belongs_to_steps() -> None:
    """All stages of a step see the sum of the steps before; its first evaluation enters."""
    x, y = data()
    outputs = pair(y)
    beta, w, average = -0.5, 3.0, 0.0
    state = x
    for a, b in itertools.pairwise(GRID):
        ks, first, point = [], None, state
        for time in (a, b):
            t = torch.full((B,), time, dtype=torch.float64)
            c, u = outputs(point, t)
            change = (c - u) + beta * average
            first = change if first is None else first
            projected = change - dot(change, c) / dot(c, c) * c
            ks.append(c + (w - 1.0) * projected)
            point = state + (b - a) * ks[0]
        average = first
        state = state + (b - a) * 0.5 * (ks[0] + ks[1])
    guidance = APG(w, negative={"y": NULL}, momentum=beta, target="velocity")
    close(solve(guidance, Model(), x, resolve("heun2"), y=y), state)
    # one object serves several solves: nothing stays in it
    close(solve(guidance, Model(), x, resolve("heun2"), y=y), state)


def test_apg_interval_and_scale_1() -> None:
    x, y = data()
    model = Model()
    close(solve(APG(1.0), model, x, y=y), euler(lambda x, t, i: pair(y)(x, t)[0], x))
    assert model.rows == [B] * 4
    model = Model()
    solve(APG(4.0, negative={"y": NULL}, interval=(0.2, 0.5), momentum=-0.5), model, x, y=y)
    assert model.rows == [B, 2 * B, 2 * B, B]


# ---------------------------------------------------------------------- CFG++


@each_shape
def test_cfg_plus_plus_on_the_straight_path(shape: tuple) -> None:
    x, y = data(shape)
    outputs = pair(y)
    grid = [0.0, 0.2, 0.6, 1.0]
    for scale, w in ((0.6, 0.6), (W / 4, wide(W / 4, x))):
        wanted = x
        for a, b in itertools.pairwise(grid):
            c, u = outputs(wanted, torch.full((B,), a, dtype=torch.float64))
            v = u + w * (c - u)
            s, s1 = 1.0 - a, 1.0 - b
            # in sigma's terms, velocity data - noise: x - s v with v = noise - data
            wanted = (1.0 - s1) * (wanted + s * v) + s1 * (wanted - (1.0 - s) * u)
        guidance = CFGPlusPlus(scale, negative={"y": NULL})
        close(solve(guidance, Model(), x, grid=grid, y=y), wanted)
        close(solve(CFGPlusPlus(scale, negative={"y": NULL}, step="ddim"), Model(), x, DDIM(), grid=grid, y=y), wanted)


@pytest.mark.parametrize("path", [VP(), Cosine()], ids=repr)
@pytest.mark.parametrize("step", ["euler", "ddim"])
def test_cfg_plus_plus_on_other_paths(path, step: str) -> None:
    """The paper's form: the guided data, noised again by the unconditional noise prediction."""
    x, y = data()
    model = Model()
    wanted = x
    for a, b in itertools.pairwise(GRID):
        t = torch.full((B,), a, dtype=torch.float64)
        eps, eps_null = model(wanted, t, y=y), model(wanted, t, y=torch.full_like(y, NULL))
        alpha, sigma = path.coefficients(torch.tensor(a, dtype=torch.float64))[:2]
        alpha_1, sigma_1 = path.coefficients(torch.tensor(b, dtype=torch.float64))[:2]
        guided = eps_null + 0.4 * (eps - eps_null)
        wanted = alpha_1 * (wanted - sigma * guided) / alpha + sigma_1 * eps_null
    guidance = CFGPlusPlus(0.4, negative={"y": NULL}, step=step)
    close(solve(guidance, Model(), x, resolve(step), path=path, prediction="x_0", y=y), wanted, 1e-13)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_rectified_cfg_plus_plus(fraction: float) -> None:
    x, y = data()
    outputs = pair(y)
    wanted = x
    for a, b in itertools.pairwise(GRID):
        t, h = torch.full((B,), a, dtype=torch.float64), b - a
        v = outputs(wanted, t)[0]
        c, u = outputs(wanted + fraction * h * v, t + fraction * h)
        wanted = wanted + h * (v + wide(2.0 * (1.0 - t), x) * (c - u))
    model = Model()
    guidance = RectifiedCFGPlusPlus(lambda t: 2.0 * (1.0 - t), negative={"y": NULL}, fraction=fraction)
    close(solve(guidance, model, x, y=y), wanted)
    assert model.rows == [B, 2 * B] * (len(GRID) - 1)
    model = Model()
    close(solve(RectifiedCFGPlusPlus(0.0), model, x, y=y), euler(lambda x, t, i: outputs(x, t)[0], x))
    assert model.rows == [B] * (len(GRID) - 1)


@pytest.mark.parametrize("kind", [CFGPlusPlus, RectifiedCFGPlusPlus])
def test_guidance_of_a_step_needs_one_evaluation_a_step(kind) -> None:
    x, y = data()
    guidance = kind(0.5, negative={"y": NULL})
    for method in ("heun2", "midpoint", "rk4", "am2"):
        with pytest.raises(ValueError, match="one evaluation a step"):
            solve(guidance, Model(), x, resolve(method), y=y)
    with pytest.raises(ValueError, match="steps of a fixed grid"):
        guidance.at(Model(), {"y": y})(x, torch.zeros(B, dtype=torch.float64))
    # per-sample times are steps as well
    solve(guidance, Model(), x, grid=np.linspace(0.1, [1.0, 0.8, 0.4], 4), y=y)


def test_cfg_plus_plus_interval() -> None:
    x, y = data()
    model = Model()
    got = solve(CFGPlusPlus(0.5, negative={"y": NULL}, interval=(2.0, 3.0)), model, x, y=y)
    close(got, euler(lambda x, t, i: pair(y)(x, t)[0], x))
    assert model.rows == [B] * 4


@pytest.mark.parametrize("kind", [CFGPlusPlus, RectifiedCFGPlusPlus])
def test_intervals_of_a_steps_guidance_are_of_each_sample(kind) -> None:
    """Beside samples that are within, one beyond takes the conditional step; each is what it would be alone."""
    x, y = data()
    grid = np.linspace(0.0, [1.0, 0.8, 0.4], 5)
    guidance = kind(0.7, negative={"y": NULL}, interval=(0.3, 0.6))
    together = solve(guidance, Model(), x, grid=grid, y=y)
    for i in range(B):
        own = slice(i, i + 1)
        times = grid[:, i]
        close(solve(guidance, Model(), x[own], grid=times, y=y[own]), together[own])
        wanted = x[own]
        for t, u in itertools.pairwise(times.tolist()):
            if 0.3 <= round(t, 9) <= 0.6:  # the grid has 0.6000000000000001
                step = kind(0.7, negative={"y": NULL})
                wanted = solve(step, Model(), wanted, grid=[t, u], y=y[own])
            else:
                wanted = euler(lambda x, t, _, own=own: pair(y[own])(x, t)[0], wanted, [t, u])
        close(together[own], wanted)


@pytest.mark.parametrize("rule", [{}, {"rescale": 0.5}, {"zero_star": True}, {"interval": (0.2, 0.7), "rescale": 0.5}])
@pytest.mark.parametrize("scale", [torch.tensor([2.0, 3.0]), lambda t: torch.tensor([2.0, 3.0], dtype=t.dtype)])
def test_a_scale_of_each_sample_on_a_grid_of_each_token(scale, rule) -> None:
    def model(x, t, s):
        return torch.sin(x + t[..., None]) * s

    grid = np.broadcast_to(np.linspace(0, 1, 4)[:, None, None], (4, 2, 3)) * np.array([1.0, 0.9, 0.8])
    x = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guidance, single = CFG(scale, negative={"s": 0.3}, **rule), CFG(2.0, negative={"s": 0.3}, **rule)
    for gradient in ("none", "reversible"):
        got = fm.sample(model, x, time_grid=grid, guidance=guidance, gradient=gradient, s=1.0)[0]
        for i, w in enumerate((2.0, 3.0)):
            alone = dataclasses.replace(single, scale=w)
            want = fm.sample(
                model, x[i : i + 1], time_grid=grid[:, i : i + 1], guidance=alone, gradient=gradient, s=1.0
            )[0]
            torch.testing.assert_close(got[i : i + 1], want, rtol=1e-6, atol=1e-6)
