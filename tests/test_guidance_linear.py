"""Linear rules of guidance, their conventions, scales and intervals: each against plain PyTorch from its paper."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from guidance_problems import (
    GRID,
    NULL,
    RULES,
    B,
    Model,
    W,
    close,
    data,
    each_rule,
    each_shape,
    euler,
    pair,
    solve,
    std,
    wide,
    zero_star,
)

from fmkernels.guidance import CFG, AutoGuidance, ClassifierGuidance, MultiCondition, scale_of_weight, weight_of_scale
from fmkernels.paths import VP, CondOT, Cosine
from fmkernels.solvers.methods.registry import resolve
from fmkernels.solvers.programs.builder import Builder
from fmkernels.solvers.programs.run import Run
from fmkernels.solvers.programs.tables import numbers_for


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
    run = Run(program, {"": Guided()}, x, numbers_for(program, x, torch.float64, "batch"))
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
    joined = ("y",) if batched else False
    for weights in ((2.0, -0.5), (W, 1.5), (lambda t: 2.0 * t, W)):
        guidance = MultiCondition(
            [({"y": y}, weights[0]), ({"y": z}, weights[1])], negative={"y": NULL}, batched=joined
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
    solve(MultiCondition([({"y": y}, 0.25), ({"y": z}, 0.75)], batched=joined), model, x)
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
        close(solve(guidance, Model(), x, path=path), euler(guided, x), 1e-12)
        t = torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
        close(guidance.at(Model(), {}, path)(x, t), guided(x, t), 1e-12)


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
