"""Guidance in use: gradients, samples that finish early, transforms, compilation, keys of plans, counts of calls."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from guidance_problems import GRID, NULL, RULES, APGOracle, B, Model, W, close, data, each_rule, pair, solve

import fmkernels as fm
from fmkernels.guidance import (
    APG,
    CFG,
    AutoGuidance,
    CFGPlusPlus,
    ClassifierGuidance,
    MultiCondition,
    RectifiedCFGPlusPlus,
)
from fmkernels.paths import CondOT
from fmkernels.solvers.adaptive.compaction import select_rows
from fmkernels.solvers.adaptive.options import AdaptiveOptions
from fmkernels.solvers.adaptive.solve import solve_adaptive
from fmkernels.solvers.methods.registry import METHODS, resolve
from fmkernels.solvers.methods.tableaus import TABLEAUS
from fmkernels.solvers.programs.captures import held_object, network_fields
from fmkernels.solvers.sampling.velocity import FOLLOW, Velocity


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
            close(ours_, theirs, 1e-12)


@each_rule
def test_per_sample_parts_follow_their_samples(rule: str) -> None:
    make, formula = RULES[rule]
    x, y = data()
    guidance = make(negative={"y": torch.full((B,), NULL)}, interval=(0.0, 0.5), batched=("y",))
    velocity = Velocity(Model(), guidance, CondOT(), "velocity")
    arguments = velocity.arguments({"y": y}, x)
    assert not velocity.unknown
    keep = torch.tensor([2, 0])
    kept = select_rows(arguments, FOLLOW, keep, B)
    t = torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
    whole = velocity(t, x, **arguments)
    close(whole, guidance.at(Model(), {"y": y})(x, t))
    close(velocity(t[keep], x[keep], **kept), whole[keep])
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


def network_key(guidance):
    return held_object(guidance, [], network_fields(guidance))


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
    key = network_key(CFG(3.0, negative={"y": null}))
    assert key == network_key(CFG(W, negative={"y": null}))
    for other in ({"y": null.clone()}, {"z": null}, {"y": NULL}, {"y": None}):
        assert key != network_key(CFG(3.0, negative=other))
    assert network_key(CFG(3.0, negative={"y": 1})) != network_key(CFG(3.0, negative={"y": 2}))
    scale = W.clone()
    guidance = CFG(scale, negative={"y": NULL})
    scale.zero_()
    assert guidance.scale[1] == 2.0
    with pytest.raises(ValueError, match="read-only"):
        guidance.scale[1] = 3.0  # compiled solves have its numbers


@pytest.mark.parametrize("rule", ["scale", "per sample", "rescale", "zero star"])
def test_adaptive_solve_drops_finished_samples(rule: str) -> None:
    """Rows end at different times and the batch shrinks: scales, null labels and labels follow their samples."""
    make, _ = RULES[rule]
    x, y = data()
    guidance = make(negative={"y": torch.full((B,), NULL)}, batched=("y",))
    end = torch.tensor([0.3, 1.0, 0.05], dtype=torch.float64)
    model = Model()
    velocity = Velocity(model, guidance, CondOT(), "velocity")
    options = AdaptiveOptions(rtol=1e-9, atol=1e-9, compact=1.0, impl="reference")
    arguments = velocity.arguments({"y": y}, x)
    got = solve_adaptive(velocity, x, 0.0, end, TABLEAUS["dopri5"], options, arguments=arguments, follow=FOLLOW).y
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


CHOSEN = CFGPlusPlus(0.6, negative={"y": 0.0}, batched=False)


@pytest.mark.parametrize("entry", [e for e in METHODS.values() if e.make], ids=lambda entry: entry.name)
@pytest.mark.parametrize("path", [fm.paths.CondOT(), fm.paths.VP()], ids=["CondOT", "VP"])
def test_cfg_plus_plus_ends_its_steps_where_it_says_or_is_refused(entry, path) -> None:
    """Multistep and stochastic methods took its velocity for one, and ended elsewhere."""
    euler = ["euler"]
    if isinstance(path, fm.paths.CondOT):
        euler += ["ddim", "dpmpp_1s", "edm_euler"]
    ddim = ["ddim", "dpmpp_1s", "edm_euler"]
    if isinstance(path, fm.paths.CondOT):
        ddim.append("euler")
    x, y = torch.randn(3, 2, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    model = lambda x, t, y: torch.tanh(x) * y + t[:, None] * (1.0 - y)  # noqa: E731
    for step, names in (("euler", euler), ("ddim", ddim)):
        guidance = dataclasses.replace(CHOSEN, step=step)
        if entry.name not in names:
            with pytest.raises(ValueError, match="method: expected one"):
                fm.sample(model, x, method=entry.make(), steps=4, path=path, guidance=guidance, y=y)
            continue
        got, _ = fm.sample(model, x, method=entry.make(), time_grid=[0.2, 0.5, 0.7], path=path, guidance=guidance, y=y)
        state = x
        for t, u in ((0.2, 0.5), (0.5, 0.7)):
            times, ends = torch.full((3,), t, dtype=torch.float64), torch.tensor(u, dtype=torch.float64)
            c, free = model(state, times, y), model(state, times, torch.zeros(()))
            data = path.convert(0.6 * c + 0.4 * free, state, times, "velocity", "x_1")
            alpha, sigma = path.coefficients(ends)[:2]
            state = alpha * data + sigma * path.convert(free, state, times, "velocity", "x_0")
        torch.testing.assert_close(got, state, rtol=1e-13, atol=1e-13)
