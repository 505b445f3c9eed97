"""Guidance: each rule against plain PyTorch written from its paper, in fixed-grid programs and as a function."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import fmkernels as fm
from fmkernels.guidance import (
    APG,
    CFG,
    AutoGuidance,
    CFGPlusPlus,
    ClassifierGuidance,
    MultiCondition,
    RectifiedCFGPlusPlus,
    scale_of_weight,
    weight_of_scale,
)
from fmkernels.paths import VP, CondOT, Cosine
from fmkernels.solvers.adaptive import AdaptiveOptions, solve_adaptive
from fmkernels.solvers.diffusion import DDIM
from fmkernels.solvers.methods import resolve
from fmkernels.solvers.program import Builder, as_grid
from fmkernels.solvers.run import Buffers, Run, coefficients_of, time_rows
from fmkernels.solvers.tableaus import TABLEAUS

B, NULL = 3, 9
SHAPES = [(B, 5), (B, 2, 3, 4)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
GRID = [0.05, 0.2, 0.45, 0.7, 0.95]
EULER = resolve("euler")


class Model:
    """A smooth conditional field with labels (B,); counts its calls and rows."""

    def __init__(self, strength: float = 1.0) -> None:
        self.rows, self.strength = [], strength

    def __call__(self, x, t, y=None, table=None, extra=None, flag=None):
        self.rows.append(x.shape[0])
        t = t.reshape(t.shape + (1,) * (x.dim() - t.dim())).to(x.dtype)
        v = torch.sin(2.0 * x) * (0.5 + t) + 0.3 * x.flip(-1)
        if y is not None:
            y = y.reshape(-1, *(1,) * (x.dim() - 1)).to(x.dtype)
            v = v + self.strength * torch.cos(y + x + t)
        if table is not None:
            v = v + table.sum()
        if extra is not None:
            v = v + extra["shift"].reshape(-1, *(1,) * (x.dim() - 1))
        return v


def data(shape=SHAPES[0], dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=g, dtype=dtype), torch.arange(shape[0]) % 4


def solve(guidance, model, x, method=EULER, grid=GRID, path=None, prediction="velocity", buffers=True, **kwargs):
    builder = Builder(grid if isinstance(grid, list) else as_grid(grid), path or CondOT(), prediction, guidance)
    method(builder)
    program = builder.program()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    run = Run(
        program,
        guidance.calls(model, kwargs),
        x,
        time_rows(program, x, dtype, "batch"),
        coefficients_of(program, x),
        buffers=Buffers() if buffers else None,
    )
    run.all()
    return run.result


def euler(rule, x, grid=GRID):
    """rule(x, t, step number) is the velocity at t, a (B,) tensor."""
    for i, (t, u) in enumerate(itertools.pairwise(grid)):
        x = x + (u - t) * rule(x, torch.full((x.shape[0],), t, dtype=torch.float64), i)
    return x


def pair(y, model=None):
    model = model or Model()
    null = torch.full_like(y, NULL)
    return lambda x, t: (model(x, t, y=y), model(x, t, y=null))


def wide(w, x):
    return w.reshape(w.shape + (1,) * (x.dim() - w.dim()))


def std(x):
    return x.flatten(1).std(1).reshape(-1, *(1,) * (x.dim() - 1))


def dot(a, b):
    return (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.dim() - 1))


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# What each rule of c and u alone means, as a function of (c, u): the papers' formulas.
W = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)


def lin_rescale(c, v, phi):
    return phi * v * (std(c) / std(v)) + (1 - phi) * v


def zero_star(c, u, w):
    s = dot(c, u) / (dot(u, u) + 1e-8)
    return s * u + w * (c - s * u)


RULES = {
    "scale": (lambda **k: CFG(3.0, **k), lambda c, u: u + 3.0 * (c - u)),
    "int": (lambda **k: CFG(3, **k), lambda c, u: u + 3.0 * (c - u)),
    "weight": (lambda **k: CFG(2.0, convention="weight", **k), lambda c, u: (1 + 2.0) * c - 2.0 * u),
    "per sample": (lambda **k: CFG(W, **k), lambda c, u: u + wide(W, c) * (c - u)),
    "per sample weight": (
        lambda **k: CFG(W.numpy(), convention="weight", **k),
        lambda c, u: (1 + wide(W, c)) * c - wide(W, c) * u,
    ),
    "rescale": (lambda **k: CFG(3.0, rescale=0.7, **k), lambda c, u: lin_rescale(c, u + 3.0 * (c - u), 0.7)),
    "zero star": (lambda **k: CFG(3.0, zero_star=True, zero_init=0, **k), lambda c, u: zero_star(c, u, 3.0)),
    "all": (
        lambda **k: CFG(W, rescale=1.0, zero_star=True, zero_init=0, **k),
        lambda c, u: lin_rescale(c, zero_star(c, u, wide(W, c)), 1.0),
    ),
}
each_rule = pytest.mark.parametrize("rule", RULES)


@each_shape
@each_rule
@pytest.mark.parametrize("batched", [True, False])
def test_formula_in_a_solve_and_as_a_function(rule: str, shape: tuple, batched: bool) -> None:
    make, formula = RULES[rule]
    x, y = data(shape)
    guidance = make(negative={"y": NULL}, batched=batched)
    outputs = pair(y)
    model = Model()
    close(solve(guidance, model, x, y=y), euler(lambda x, t, i: formula(*outputs(x, t)), x))
    assert model.rows == ([2 * B] if batched else [B, B]) * (len(GRID) - 1)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    close(guidance.at(Model(), {"y": y})(x, t), formula(*outputs(x, t)))


@pytest.mark.parametrize("method", ["heun2", "rk4", "ab2", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("rule", ["scale", "per sample", "rescale", "zero star"])
def test_every_stage_is_guided(method: str, rule: str) -> None:
    make, formula = RULES[rule]
    x, y = data()
    outputs = pair(y)
    got = solve(make(negative={"y": NULL}), Model(), x, resolve(method), y=y)

    class Guided:
        def __call__(self, x, t):
            return formula(*outputs(x, t))

    builder = Builder(GRID, CondOT())
    resolve(method)(builder)
    program = builder.program()
    run = Run(program, {"": Guided()}, x, time_rows(program, x, torch.float64, "batch"), coefficients_of(program, x))
    run.all()
    close(got, run.result, 1e-11)


@pytest.mark.parametrize("prediction", ["x_1", "x_0", "v"])
@pytest.mark.parametrize("rule", ["scale", "rescale"])
def test_other_predictions(prediction: str, rule: str) -> None:
    make, formula = RULES[rule]
    x, y = data()
    path, outputs = Cosine(), pair(y)

    def guided(x, t, i):
        c, u = (path.convert(v, x, t, prediction, "velocity") for v in outputs(x, t))
        return formula(c, u)

    guidance = make(negative={"y": NULL})
    close(solve(guidance, Model(), x, path=path, prediction=prediction, y=y), euler(guided, x))
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    close(guidance.at(Model(), {"y": y}, path, prediction)(x, t), guided(x, t, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    x, y = data(dtype=dtype)
    for rule, (make, formula) in RULES.items():
        outputs = pair(y)
        wanted = euler(lambda x, t, i, f=formula, o=outputs: f(*o(x, t)), x.double())
        error = (solve(make(negative={"y": NULL}), Model(), x, y=y).double() - wanted).abs().max()
        assert error < (1e-5 if dtype is torch.float32 else 0.15), rule


def test_linear_guidance_costs_no_update() -> None:
    def updates(guidance, prediction):
        builder = Builder(GRID, Cosine(), prediction, guidance)
        resolve("heun2")(builder)
        return sum(type(i).__name__ != "Evaluate" for i in builder.program().instructions)

    guided = CFG(W, negative={"y": NULL}, interval=(0.1, 0.5))
    for prediction in ("velocity", "x_1"):
        assert updates(guided, prediction) == updates(None, prediction)


# ---------------------------------------------------------------------- conventions, scales, intervals


def test_conventions_convert() -> None:
    assert scale_of_weight(2.0) == 3.0
    assert weight_of_scale(3.0) == 2.0
    close(weight_of_scale(scale_of_weight(W)), W)
    assert weight_of_scale(lambda t: t)(torch.tensor(3.0)) == 2.0
    x, y = data()
    for scale in (3.0, W, lambda t: 1.0 + t):
        guidance = CFG(scale, negative={"y": NULL})
        other = guidance.converted("weight")
        assert other.convention == "weight"
        close(solve(other, Model(), x, y=y), solve(guidance, Model(), x, y=y))
        close(solve(other.converted("scale"), Model(), x, y=y), solve(guidance, Model(), x, y=y))


@pytest.mark.parametrize("options", [{}, {"rescale": 0.5}, {"zero_star": True, "zero_init": 0}])
@pytest.mark.parametrize("negative", [None, {"y": NULL}])
def test_no_guidance_is_the_conditional_model_exactly(options: dict, negative: dict | None) -> None:
    x, y = data(dtype=torch.float32)
    model = Model()
    wanted = solve(MultiCondition([({"y": y}, 1.0)]), Model(), x)
    for guidance in (CFG(1.0, negative=negative, **options), CFG(0, convention="weight", negative=negative, **options)):
        assert torch.equal(solve(guidance, model, x, y=y), wanted)
    assert model.rows == [B] * 2 * (len(GRID) - 1)
    t = torch.full((B,), 0.3)
    assert torch.equal(CFG(1.0).at(Model(), {"y": y})(x, t), Model()(x, t, y=y))


def test_scale_0_is_the_unconditional_model() -> None:
    x, y = data()
    model = Model()
    close(solve(CFG(0.0, negative={"y": NULL}), model, x, y=y), euler(lambda x, t, i: pair(y)(x, t)[1], x))
    assert model.rows == [B] * (len(GRID) - 1)


def test_scale_as_a_function_of_time() -> None:
    x, y = data()
    outputs = pair(y)

    def formula(x, t, i=0):
        c, u = outputs(x, t)
        return u + wide(1.0 + 5.0 * t, x) * (c - u)

    guidance = CFG(lambda t: 1.0 + 5.0 * t, negative={"y": NULL})
    close(solve(guidance, Model(), x, y=y), euler(formula, x))
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    close(guidance.at(Model(), {"y": y})(x, t), formula(x, t))
    # where it gives the number 1 the other branch is not evaluated
    model = Model()
    solve(CFG(lambda t: 1.0 if t > 0.3 else 2.0, negative={"y": NULL}), model, x, y=y)
    assert model.rows == [2 * B] * 2 + [B] * 2


@each_rule
def test_interval(rule: str) -> None:
    make, formula = RULES[rule]
    x, y = data()
    outputs = pair(y)

    def guided(x, t, i=0):
        c, u = outputs(x, t)
        return torch.where(wide((t >= 0.2) & (t <= 0.45), x), formula(c, u), c)

    for batched in (True, False):
        model = Model()
        guidance = make(negative={"y": NULL}, interval=(0.2, 0.45), batched=batched)
        close(solve(guidance, model, x, y=y), euler(guided, x))
        both = [2 * B] if batched else [B, B]
        assert model.rows == [B, *both, *both, B]
        t = torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
        close(guidance.at(Model(), {"y": y})(x, t), guided(x, t))


@each_rule
def test_times_of_each_sample(rule: str) -> None:
    make, formula = RULES[rule]
    x, y = data()
    outputs = pair(y)
    grid = np.linspace(0.0, [1.0, 0.8, 0.4], 5)
    model = Model()
    got = solve(make(negative={"y": NULL}, interval=(0.5, 0.9)), model, x, grid=grid, y=y)
    wanted = x
    for t, u in itertools.pairwise(torch.from_numpy(grid)):
        c, u_ = outputs(wanted, t)
        v = torch.where(wide((t >= 0.5) & (t <= 0.9), x), formula(c, u_), c)
        wanted = wanted + wide(u - t, x) * v
    close(got, wanted)
    assert model.rows == [B, B, 2 * B, 2 * B]


def test_rescale_keeps_the_standard_deviation() -> None:
    x, y = data((B, 2, 3, 4))
    t = torch.full((B,), 0.4, dtype=torch.float64)
    c, _ = pair(y)(x, t)
    v = CFG(7.0, negative={"y": NULL}, rescale=1.0).at(Model(), {"y": y})(x, t)
    close(std(v), std(c))
    # constant rows, and rows of one element, are left as they are
    x1 = x[:, :1, 0, 0]
    v = CFG(7.0, negative={"y": NULL}, rescale=1.0).at(Model(), {"y": y})(x1, t)
    close(v, CFG(7.0, negative={"y": NULL}).at(Model(), {"y": y})(x1, t))


@pytest.mark.parametrize("steps", [None, 0, 1, 3])
def test_zero_init(steps: int | None) -> None:
    x, y = data()
    outputs, model = pair(y), Model()
    count = 1 if steps is None else steps
    guidance = CFG(3.0, negative={"y": NULL}, zero_star=True, zero_init=steps)
    wanted = euler(lambda x, t, i: 0.0 * x if i < count else zero_star(*outputs(x, t), 3.0), x)
    close(solve(guidance, model, x, y=y), wanted)
    assert len(model.rows) == len(GRID) - 1 - count
    # without Zero* too, and at every stage of a step
    model = Model()
    solve(CFG(3.0, negative={"y": NULL}, zero_init=2), model, x, resolve("heun2"), y=y)
    assert len(model.rows) == 2 * (len(GRID) - 1 - 2)


# ---------------------------------------------------------------------- APG


class APGOracle:
    """Sadat et al. 2024, algorithm 1, on predictions."""

    def __init__(self, w, eta=0.0, threshold=0.0, momentum=0.0, base="conditional"):
        self.w, self.eta, self.threshold, self.momentum, self.base = w, eta, threshold, momentum, base
        self.average = 0.0

    def __call__(self, c, u):
        self.average = (c - u) + self.momentum * self.average
        change = self.average
        if self.threshold:
            change = change * torch.clamp(self.threshold / dot(change, change).sqrt(), max=1.0)
        unit = c / dot(c, c).sqrt()
        parallel = dot(change, unit) * unit
        change = (change - parallel) + self.eta * parallel
        return c + (self.w - 1.0) * change if self.base == "conditional" else u + self.w * change


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
                close(got, solve(cfg, Model(), x, resolve(method), grid=grid, y=y), 1e-9)


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
    close(solve(guidance, Model(), x, resolve(step), path=path, prediction="x_0", y=y), wanted, 1e-9)


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


# ---------------------------------------------------------------------- other linear rules


def test_autoguidance() -> None:
    x, y = data()
    strong, weak = Model(), Model(0.4)
    for scale, w in ((2.0, 2.0), (W, wide(W, x))):
        guidance = AutoGuidance(weak, scale, interval=(0.1, 0.5))

        def guided(x, t, i=0, w=w):
            a, b = Model()(x, t, y=y), Model(0.4)(x, t, y=y)
            return torch.where(wide((t >= 0.1) & (t <= 0.5), x), b + w * (a - b), a)

        strong.rows, weak.rows = [], []
        close(solve(guidance, strong, x, y=y), euler(guided, x))
        assert len(strong.rows) == 4
        assert len(weak.rows) == 2
        t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
        close(guidance.at(strong, {"y": y})(x, t), guided(x, t))
    weak.rows = []
    solve(AutoGuidance(weak, 1.0), strong, x, y=y)
    assert not weak.rows
    with_null = AutoGuidance(Model(), 3.0, weak_kwargs={"y": NULL})
    close(solve(with_null, Model(), x, y=y), solve(CFG(3.0, negative={"y": NULL}), Model(), x, y=y))


@pytest.mark.parametrize("batched", [True, False])
def test_several_conditions(batched: bool) -> None:
    x, y = data()
    z = torch.tensor([5, 6, 7])
    for weights in ((2.0, -0.5), (W, 1.5), (lambda t: 2.0 * t, W)):
        guidance = MultiCondition(
            [({"y": y}, weights[0]), ({"y": z}, weights[1])], negative={"y": NULL}, batched=batched
        )

        def guided(x, t, i=0, weights=weights):
            a, u = pair(y)(x, t)
            b = Model()(x, t, y=z)
            w = [f(t) if callable(f) else f for f in weights]
            w = [wide(f, x) if isinstance(f, torch.Tensor) else f for f in w]
            return u + w[0] * (a - u) + w[1] * (b - u)

        model = Model()
        close(solve(guidance, model, x, y=y), euler(guided, x))
        assert model.rows == ([3 * B] if batched else [B] * 3) * 4
        t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
        close(guidance.at(Model(), {"y": y})(x, t), guided(x, t))
    one = MultiCondition([({"y": y}, 3.0)], negative={"y": NULL})
    close(solve(one, Model(), x, y=y), solve(CFG(3.0, negative={"y": NULL}), Model(), x, y=y))
    # without negative the caller's arguments are unconditional; weights that add up to 1 leave that branch out
    model = Model()
    close(solve(MultiCondition([({"y": y}, 1.0)]), model, x), euler(lambda x, t, i: pair(y)(x, t)[0], x))
    solve(MultiCondition([({"y": y}, 0.25), ({"y": z}, 0.75)], batched=batched), model, x)
    assert sum(model.rows) == 4 * B + 4 * 2 * B


@pytest.mark.parametrize("path", [CondOT(), VP()], ids=repr)
def test_classifier_guidance(path) -> None:
    x, _ = data()
    goal = torch.ones_like(x)

    def gradient(x, t, goal, strength=1.0):
        return strength * (goal - x)

    for scale, w in ((2.0, 2.0), (W, wide(W, x))):

        def guided(x, t, i=0, w=w):
            score = path.convert(Model()(x, t), x, t, "velocity", "score") + w * 0.5 * (goal - x)
            return path.convert(score, x, t, "score", "velocity")

        guidance = ClassifierGuidance(gradient, scale, gradient_kwargs={"goal": goal, "strength": 0.5})
        close(solve(guidance, Model(), x, path=path), euler(guided, x), 1e-10)
        t = torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
        close(guidance.at(Model(), {}, path)(x, t), guided(x, t), 1e-10)


def test_classifier_guidance_beyond_its_interval_and_at_noise() -> None:
    x, _ = data()
    calls = []

    def gradient(x, t):
        calls.append(float(t[0]))
        return torch.ones_like(x)

    guidance = ClassifierGuidance(gradient, 2.0, interval=(0.0, 0.5))
    grid = [0.0, 0.25, 0.75, 1.0]
    solve(guidance, Model(), x, grid=grid)
    assert calls == [0.25]
    t = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64)
    v = guidance.at(Model(), {})(x, t)
    slope = torch.tensor([0.0, (1.0 - 0.25) / 0.25, 0.0], dtype=torch.float64)  # CondOT: v = (x + (1 - t) s) / t
    close(v, Model()(x, t) + 2.0 * wide(slope, x))
    # the network's prediction does not concern the gradient
    path = CondOT()
    close(
        solve(guidance, Model(), x, prediction="x_1"),
        solve(guidance, lambda x, t: path.convert(Model()(x, t), x, t, "x_1", "velocity"), x),
    )


# ---------------------------------------------------------------------- keyword arguments


def test_keyword_arguments_of_all_kinds() -> None:
    x, y = data()
    g = torch.Generator().manual_seed(1)
    table = torch.randn(7, generator=g, dtype=torch.float64)  # no entry for each sample
    square = torch.randn(B, 2, generator=g, dtype=torch.float64)  # none either, though it looks like it
    extra = {"shift": torch.randn(B, generator=g, dtype=torch.float64), "name": "a", "none": None}
    other = {**extra, "shift": torch.zeros(1, dtype=torch.float64)}

    def solved(batched, **kwargs):
        guidance = CFG(3.0, negative={"y": NULL, "extra": other}, batched=batched, shared=("table",))
        return solve(guidance, Model(), x, y=y, extra=extra, flag=True, **kwargs)

    for kwargs in ({"table": table}, {"table": square}, {"table": None}):
        close(solved(True, **kwargs), solved(False, **kwargs), 0.0)
    # without `shared` the rows of a table of B rows are taken as the samples'
    looks = CFG(3.0, negative={"y": NULL})
    assert not torch.allclose(
        solve(looks, Model(), x, y=y, table=square),
        solve(CFG(3.0, negative={"y": NULL}, batched=False), Model(), x, y=y, table=square),
    )
    # a scalar time, and a tensor for the null label
    guidance = CFG(3.0, negative={"y": torch.tensor([NULL])})
    t = torch.tensor(0.3, dtype=torch.float64)
    c, u = pair(y)(x, t)
    close(guidance.at(Model(), {"y": y})(x, t), u + 3.0 * (c - u))


def test_what_cannot_be_batched_is_told() -> None:
    x, y = data()
    cases = [
        ({"y": y, "flag": "a cat"}, {"flag": ""}, "flag: expected tensors, or equal values"),
        ({"y": y}, {"y": None}, "y: expected tensors, or equal values"),
        ({"y": y}, {"extra": {}}, "extra: expected the same keyword arguments"),
        ({"extra": {"shift": y}}, {"extra": {"other": y}}, "extra: expected the same structure"),
        ({"y": y}, {"y": torch.zeros(2)}, r"y: expected tensors with a row for each of 3 samples"),
        ({"y": torch.tensor(1)}, {"y": torch.tensor(2)}, r"y: expected tensors with a row for each of 3 samples"),
    ]
    for kwargs, negative, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            solve(CFG(2.0, negative=negative), Model(), x, **kwargs)
        assert "batched=False" in str(error.value)
    # and works in two calls
    got = solve(CFG(2.0, negative={"y": None}, batched=False), Model(), x, y=y)
    close(got, euler(lambda x, t, i: 2.0 * Model()(x, t, y=y) - Model()(x, t), x))
    with pytest.raises(ValueError, match="y: expected tensors with a row"):
        solve(CFG(2.0, negative={"y": NULL}, shared=("y",)), Model(), x, y=y)


def test_wrong_arguments_are_told() -> None:
    x, y = data()
    null = {"y": NULL}
    for make, error, message in [
        (lambda: CFG(3.0), ValueError, "negative: expected the unconditional call's keyword arguments"),
        (lambda: CFG(0.0, convention="scale"), ValueError, "negative"),
        (lambda: CFG(3.0, negative=7), TypeError, "negative: expected a dict"),
        (lambda: CFG("3", negative=null), TypeError, "scale: expected a number"),
        (lambda: CFG(True, negative=null), TypeError, "scale: expected a number"),
        (lambda: CFG(math.nan, negative=null), ValueError, "scale: expected a finite"),
        (lambda: CFG(torch.tensor([1.0, math.inf]), negative=null), ValueError, "scale: expected finite"),
        (lambda: CFG(3.0, negative=null, convention="omega"), ValueError, "convention: expected one of"),
        (lambda: CFG(3.0, negative=null, interval=(0.5, 0.1)), ValueError, "interval: expected low <= high"),
        (lambda: CFG(3.0, negative=null, interval=0.5), TypeError, "interval: expected two times"),
        (lambda: CFG(3.0, negative=null, rescale=2.0), ValueError, "rescale"),
        (lambda: CFG(3.0, negative=null, zero_init=-1), ValueError, "zero_init"),
        (lambda: CFG(3.0, negative=null, shared="y"), TypeError, "shared"),
        (lambda: APG(3.0, negative=null, base="u"), ValueError, "base"),
        (lambda: APG(3.0, negative=null, target="u"), ValueError, "target"),
        (lambda: APG(3.0, negative=null, threshold=-1.0), ValueError, "threshold"),
        (lambda: CFGPlusPlus(1.0), ValueError, "negative"),
        (lambda: CFGPlusPlus(1.0, negative=null, step="heun"), ValueError, "step"),
        (lambda: RectifiedCFGPlusPlus(1.0), ValueError, "negative"),
        (lambda: RectifiedCFGPlusPlus(1.0, negative=null, fraction=0.0), ValueError, "fraction"),
        (lambda: AutoGuidance(None, 2.0), TypeError, "weak_model"),
        (lambda: MultiCondition([]), ValueError, "conditions"),
        (lambda: MultiCondition([3.0]), TypeError, r"conditions\[0\]"),
        (lambda: ClassifierGuidance(None, 2.0), TypeError, "gradient"),
    ]:
        with pytest.raises(error, match=message):
            make()
    for guidance in (
        CFG(torch.ones(4), negative=null),
        APG(torch.ones(4), negative=null),
        AutoGuidance(Model(), torch.ones(4)),
        MultiCondition([({"y": y}, torch.ones(4))], negative=null),
    ):
        with pytest.raises(ValueError, match=r"expected a number or a leading part of the state's shape \(3, 5\)"):
            solve(guidance, Model(), x, y=y)
        with pytest.raises(ValueError, match="leading part of the state's shape"):
            guidance.at(Model(), {"y": y})(x, torch.zeros(B, dtype=torch.float64))
    with pytest.raises(ValueError, match="no more dimensions than the times"):
        solve(CFG(torch.ones(B, 5), negative=null), Model(), x, grid=np.linspace(0.0, [1.0, 0.8, 0.4], 5), y=y)
    with pytest.raises(TypeError, match="model: expected a tensor"):
        solve(CFG(2.0, negative=null), lambda x, t, y: None, x, y=y)
    with pytest.raises(ValueError, match="model: expected an output of 6 rows for 2 branches"):
        solve(CFG(2.0, negative=null), lambda x, t, y: x[:1], x, y=y)


# ---------------------------------------------------------------------- use by solvers


@pytest.mark.parametrize("method", ["euler", "heun2"])
def test_gradient_of_a_guided_solve(method: str) -> None:
    x, y = data()
    for make, formula in (
        RULES["scale"],
        RULES["all"],
        (lambda **k: APG(3.0, eta=0.3, threshold=0.9, target="velocity", **k), APGOracle(3.0, 0.3, 0.9)),
    ):
        leaves = []
        for ours in (True, False):
            start = x.clone().requires_grad_()
            shift = torch.linspace(0.1, 0.4, B, dtype=torch.float64).requires_grad_()
            zero = {"shift": torch.zeros(1, dtype=torch.float64)}
            if ours:
                guidance = make(negative={"y": NULL, "extra": zero})
                end = solve(guidance, Model(), start, resolve(method), buffers=False, y=y, extra={"shift": shift})
            else:
                null = torch.full_like(y, NULL)

                def field(x, t, i=0, shift=shift, zero=zero, formula=formula, null=null):
                    c = Model()(x, t, y=y, extra={"shift": shift})
                    return formula(c, Model()(x, t, y=null, extra=zero))

                end = start
                for a, b in itertools.pairwise(GRID):
                    t, h = torch.full((B,), a, dtype=torch.float64), b - a
                    k = field(end, t)
                    if method == "euler":
                        end = end + h * k
                    else:
                        end = end + 0.5 * h * (k + field(end + h * k, t + h))
            leaves.append(torch.autograd.grad(end.square().sum(), [start, shift]))
        for ours_, theirs in zip(*leaves, strict=True):
            close(ours_, theirs, 1e-9)


@each_rule
def test_per_sample_parts_follow_their_samples(rule: str) -> None:
    make, formula = RULES[rule]
    x, y = data()
    guidance = make(negative={"y": torch.full((B,), NULL)}, interval=(0.0, 0.5))
    kwargs = guidance.per_sample({"y": y}, x)
    keep = torch.tensor([2, 0])
    kept = {name: value[keep] for name, value in kwargs.items()}
    t = torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
    whole = guidance.at(Model(), kwargs)(x, t)
    close(whole, guidance.at(Model(), {"y": y})(x, t))
    close(guidance.at(Model(), kept)(x[keep], t[keep]), whole[keep])
    close(whole[:2], formula(*pair(y)(x, t))[:2])


def test_at_under_vmap_and_jvp() -> None:
    x, y = data()
    t = torch.full((B,), 0.3, dtype=torch.float64)
    for guidance in (CFG(W, negative={"y": NULL}, rescale=0.5, zero_star=True), APG(3.0, negative={"y": NULL})):
        field = guidance.at(Model(), {"y": y})
        tangent = torch.ones_like(x)
        _, got = torch.func.jvp(lambda x, f=field: f(x, t), (x,), (tangent,))
        step = 1e-6
        close(got, (field(x + step * tangent, t) - field(x - step * tangent, t)) / (2 * step), 1e-8)


def test_plan_keys() -> None:
    a, b = (CFG(3.0, negative={"y": torch.zeros(2)}) for _ in range(2))
    assert a.plan_key == b.plan_key
    assert a is not b
    assert a != b
    keys = {
        a.plan_key,
        CFG(3.5, negative={"y": NULL}).plan_key,
        CFG(3.0, negative={"y": NULL}, batched=False).plan_key,
        CFG(3.0, negative={"y": NULL}, interval=(0.0, 0.5)).plan_key,
        CFG(W, negative={"y": NULL}).plan_key,
        CFG(2 * W, negative={"y": NULL}).plan_key,
        MultiCondition([({"y": NULL}, 3.0)]).plan_key,
        MultiCondition([({"y": NULL}, 4.0)]).plan_key,
        AutoGuidance(Model(), 3.0).plan_key,
    }
    assert len(keys) == 9
    assert CFG(W, negative={"y": NULL}).plan_key == CFG(W.clone(), negative={"y": NULL}).plan_key
    null = torch.zeros(2)
    key = CFG(3.0, negative={"y": null}).network_key
    assert key == CFG(W, negative={"y": null}).network_key
    for other in ({"y": null.clone()}, {"z": null}, {"y": NULL}, {"y": None}):
        assert key != CFG(3.0, negative=other).network_key
    assert CFG(3.0, negative={"y": 1}).network_key != CFG(3.0, negative={"y": 2}).network_key
    scale = W.clone()
    guidance = CFG(scale, negative={"y": NULL})
    scale.zero_()
    assert guidance.scale[1] == 2.0


@pytest.mark.parametrize("rule", ["scale", "per sample", "rescale", "zero star"])
def test_adaptive_solve_drops_finished_samples(rule: str) -> None:
    """Rows end at different times and the batch shrinks: scales, null labels and labels follow their samples."""
    make, _ = RULES[rule]
    x, y = data()
    guidance = make(negative={"y": torch.full((B,), NULL)})
    end = torch.tensor([0.3, 1.0, 0.05], dtype=torch.float64)
    model = Model()

    def field(t, x, **kwargs):
        return guidance.at(model, kwargs)(x, t)

    options = AdaptiveOptions(rtol=1e-9, atol=1e-9, compact=1.0, impl="reference")
    got = solve_adaptive(
        field, x, 0.0, end, TABLEAUS["dopri5"], options, model_kwargs=guidance.per_sample({"y": y}, x)
    ).y
    assert {2 * B, 2} <= set(model.rows)
    times = end[:, None] * torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
    wanted = solve(guidance, Model(), x, resolve("rk4"), grid=times.T.numpy(), y=y)
    close(got, wanted, 1e-7)


@pytest.mark.parametrize(
    "guidance",
    [
        CFG(lambda t: 1.0 + t, negative={"y": NULL}, interval=(0.2, 0.8)),
        CFG(W.float(), negative={"y": NULL}, rescale=0.5, zero_star=True),
        APG(3.0, negative={"y": NULL}, momentum=-0.5, threshold=1.0),
        CFGPlusPlus(0.5, negative={"y": NULL}),
        ClassifierGuidance(lambda x, t: -x, 2.0),
    ],
    ids=lambda g: type(g).__name__,
)
def test_sample_compiles_whole(guidance) -> None:
    x, y = data(dtype=torch.float32)

    def net(x, t, y):
        return torch.sin(x) * t[:, None] + torch.cos(y[:, None].to(x.dtype) + x)

    def sampled(x, y):
        return fm.sample(net, x, steps=3, guidance=guidance, y=y)[0]

    torch._dynamo.reset()
    close(torch.compile(sampled, fullgraph=True, backend="eager")(x, y), sampled(x, y), 1e-6)


def test_nfe_counts_every_branch() -> None:
    x, y = data()
    for guidance, nfe in (
        (CFG(3.0, negative={"y": NULL}), 20),
        (CFG(3.0, negative={"y": NULL}, interval=(0.0, 0.45)), 15),
        (CFG(3.0, negative={"y": NULL}, zero_star=True), 18),
        (RectifiedCFGPlusPlus(3.0, negative={"y": NULL}), 30),
    ):
        _, result = fm.sample(Model(), x, steps=10, guidance=guidance, y=y)
        assert result.nfe == nfe
