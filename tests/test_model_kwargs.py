"""Keyword arguments of networks: whose they are, which follow their samples, and what is told of near misses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmkernels as fm
from fmkernels._arguments import Named, kind_of, take_rows, tree_map
from fmkernels.guidance import CFG, AutoGuidance, MultiCondition

B = 64
G = torch.Generator().manual_seed(0)
X = torch.randn(B, 16, generator=G)
RATE = torch.where(torch.arange(B) % 8 == 3, 60.0, 1.0)  # one in eight needs many steps
CONTEXT = torch.randn(B, 16, generator=G)  # shared, though it has as many rows as there are samples


@dataclass
class Condition:
    rate: Tensor
    name: str = "a"


class Field(nn.Module):
    """Needs steps of each sample's own rate; the context is shared by all. Keeps how many rows each call had."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(
        self, x: Tensor, t: Tensor, rate: Any = None, context: Tensor | None = None, other: Any = None
    ) -> Tensor:
        self.rows.append(x.shape[0])
        while not isinstance(rate, Tensor):
            rate = rate.rate if isinstance(rate, Condition) else rate() if callable(rate) else rate[0]
        v = -rate[:, None] * torch.sin(x)
        return v if context is None else v + (context.mean(0) * t[:, None]).to(x.dtype)


def solve(model: Any = None, compact: Any = "auto", **options: Any) -> tuple[Tensor, fm.SampleResult]:
    return fm.sample(model or Field(), X, method="dopri5", rtol=1e-4, atol=1e-4, compact=compact, **options)


# ---------------------------------------------------------------------- what follows its samples


def test_a_shared_context_of_as_many_rows_as_samples_stays_whole() -> None:
    whole, _ = solve(rate=RATE, context=CONTEXT, compact=False)
    for options, on in (
        ({}, False),
        ({"batched": ("rate",)}, False),
        ({"shared": ("context",)}, False),
        ({"batched": ("rate",), "shared": ("context",)}, True),
    ):
        model = Field()
        got, result = solve(model, rate=RATE, context=CONTEXT, **options)
        assert torch.equal(got, whole)
        assert (min(model.rows) < B) == on
        assert (result.compaction == "on") == on
    assert solve(rate=RATE, context=CONTEXT)[1].compaction == (
        "off: rate, context may have an entry for each sample or none: name it in batched= or shared="
    )


def test_the_result_says_whether_finished_samples_leave() -> None:
    assert solve(partial(Field(), rate=torch.tensor([1.0])))[1].compaction == "on"
    assert solve(rate=torch.ones(1))[1].compaction == "on", "no dimension of the batch's size"
    assert solve(rate=RATE, compact=False)[1].compaction == "off: compact=False"
    small = fm.sample(lambda x, t: -x, X[:2], method="dopri5", compact="auto")[1]
    assert small.compaction == "off: a small state (compact='auto')"
    assert fm.sample(lambda x, t: -x, X, steps=2)[1].compaction is None
    with pytest.raises(ValueError, match="compact: expected batched= or shared= to name rate beside it, got True"):
        solve(rate=RATE, compact=True)
    assert solve(rate=RATE, compact=True, batched=("rate",))[1].compaction == "on"
    model = Field()
    solve(model, rate=RATE, compact=0.1, batched=["rate"])
    assert min(model.rows) <= 0.1 * B or min(model.rows) == B


class Cached(nn.Module):
    """Holds a row for each sample by itself, and reads as many of them as x has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", RATE)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.rate[: len(x), None] * torch.sin(x)


def likelihood_gradient(x: Tensor, t: Tensor) -> Tensor:
    """Of a target that has a row for each sample."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(-(RATE * (x - CONTEXT).square().sum(1)).sum(), x)
    return gradient


@pytest.mark.parametrize("said", [{}, {"shared": ("context",), "context": CONTEXT}], ids=["nothing", "names"])
def test_finished_samples_stay_unless_the_caller_says_that_they_may_leave(said: dict[str, Any]) -> None:
    """Nobody sees what a model, a closure or a classifier holds of single samples."""
    rows: list[int] = []
    classifier = fm.guidance.ClassifierGuidance(likelihood_gradient, 1.0)

    def closure(x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        rows.append(len(x))
        return -RATE[:, None] * torch.sin(x)

    def free(x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        rows.append(len(x))
        return torch.sin(x)

    for model, guidance in ((closure, None), (free, classifier)):
        rows.clear()
        result = fm.sample(model, X, method="dopri5", guidance=guidance, **said)[1]
        assert set(rows) == {B}
        assert result.compaction == "off: compact=False"
    x = torch.randn(4, 300, generator=G)
    assert fm.log_prob(lambda x, t: -x, x, divergence="hutchinson").compaction == "off: compact=False"
    got = fm.sample(Cached(), X, method="dopri5", rtol=1e-4, atol=1e-4)[0]
    assert torch.equal(got, solve(rate=RATE, compact=False)[0])


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda r: [r],
        lambda r: (r, None),
        lambda r: {0: r, "n": 3, "few": torch.ones(2)},
        lambda r: Condition(r),
        lambda r: [{0: Condition(r[:, None][:, 0])}],
    ],
)
def test_trees_of_tensors_follow_where_they_are_named(wrapped: Any) -> None:
    want, _ = solve(rate=RATE, compact=False)
    tree = wrapped(RATE)
    model = Field()
    if isinstance(tree, dict):
        with pytest.raises(ValueError, match=r"batched: expected rate to have an entry for each of 64"):
            solve(model, rate=tree, batched=("rate",))
        del tree["few"]
    got, result = solve(model, rate=tree, batched=("rate",))
    assert torch.equal(got, want)
    assert min(model.rows) < B
    got, result = solve(model, rate=tree)
    assert torch.equal(got, want)
    assert result.compaction.startswith("off: rate may")


@pytest.mark.parametrize("opaque", [lambda: RATE, [lambda: RATE]], ids=["closure", "list of closures"])
def test_objects_that_nobody_sees_into_keep_the_batch_whole(opaque: Any) -> None:
    got, result = solve(rate=opaque)
    assert torch.equal(got, solve(rate=RATE, compact=False)[0])
    assert result.compaction.startswith("off: rate may")
    with pytest.raises(ValueError, match="batched: expected rate made of tensors, in lists, tuples, dicts or data"):
        solve(rate=opaque, batched=("rate",))


def test_names_that_are_no_arguments_are_told() -> None:
    for name in ("batched", "shared"):
        for options in ({"method": "dopri5"}, {"steps": 2}, {"steps": 2, "gradient": "reversible"}):
            with pytest.raises(ValueError, match=rf"{name}: expected names of the model's .* \('rate'\), got 'rates'"):
                fm.sample(Field(), X, rate=RATE, **{name: ("rates",)}, **options)
        with pytest.raises(TypeError, match=f"{name}: expected a sequence of names of keyword arguments, got 'rate'"):
            solve(rate=RATE, **{name: "rate"})
        with pytest.raises(TypeError, match=f"{name}: expected names of keyword arguments, got 3"):
            solve(rate=RATE, **{name: (3,)})
    with pytest.raises(ValueError, match=r"batched: expected names that are not in shared= too, got \['rate'\]"):
        solve(rate=RATE, batched=("rate",), shared=("rate",))


def test_kinds_of_arguments() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    for value, kind in [
        (None, "shared"),
        (1.5, "shared"),
        ("abc", "shared"),
        (torch.float32, "shared"),
        ([1, (2, {"a": None})], "shared"),
        (torch.ones(()), "shared"),
        (torch.ones(4, 3), "shared"),
        (torch.ones(1, 3), "shared"),
        (torch.ones(3).numpy(), "unknown"),
        (torch.ones(3), "unknown"),
        (labels, "unknown"),
        ({"a": [torch.ones(3, 2)]}, "unknown"),
        (len, "unknown"),
        (nn.Linear(1, 1), "unknown"),
        (object(), "unknown"),
    ]:
        assert kind_of("y", value, 3) == kind, value
        assert kind_of("y", value, 3, Named(shared=frozenset("y"))) == "shared"
    said = Named(labels=frozenset("y"))
    assert kind_of("y", labels, 3, said) == "batched"
    assert kind_of("y", labels.double(), 3, said) == kind_of("y", labels[:, None], 3, said) == "unknown"
    rows = torch.tensor([2, 0])
    tree = {
        "a": torch.arange(3),
        "b": [torch.arange(3).numpy()],
        "c": torch.ones(1, 3),
        "d": Condition(torch.arange(3)),
    }
    taken = take_rows(tree, rows, 3)
    assert (taken["a"].tolist(), taken["b"][0].tolist(), taken["d"].rate.tolist()) == ([2, 0],) * 3
    assert taken["c"] is tree["c"]
    assert tree["d"].rate.tolist() == [0, 1, 2], "the user's own object stays as it is"
    assert tree_map(lambda a, b: a + b, (1, [2]), (3, [4])) == (4, [6])


# ---------------------------------------------------------------------- guidance in one call


class Attends(nn.Module):
    """A context shared by all samples, and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        self.rows.append(x.shape[0])
        v = torch.sin(x)
        v = v if y is None else v * (1 + 0.1 * y.reshape(-1, 1))
        return v if context is None else v + torch.softmax(x @ context.T, -1) @ context


LABELS = torch.arange(B) % 4


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_guidance_never_guesses_rows(method: str) -> None:
    """A context of B rows in both calls, or another one in each: what one call would make of it is not known."""
    steps = {"steps": 3} if method == "euler" else {"rtol": 1e-2, "atol": 1e-2}
    context, null = 0.3 * CONTEXT, torch.zeros_like(CONTEXT)

    def run(model: Any, guidance: Any, **kwargs: Any) -> Tensor:
        return fm.sample(model, X, method=method, guidance=guidance, **steps, **kwargs)[0]

    for kwargs, negative in (
        ({"context": context, "y": LABELS}, {"y": 9}),
        ({"context": context}, {"context": null}),
        ({"context": context}, {"context": 0.0}),
    ):
        model = Attends()
        got = run(model, CFG(2.0, negative=negative), **kwargs)
        assert torch.equal(got, run(Attends(), CFG(2.0, negative=negative, batched=False), **kwargs))
        assert max(model.rows) == B, "not joined"
        with pytest.raises(ValueError, match="context: expected to be named in batched="):
            run(Attends(), CFG(2.0, negative=negative, batched=True), **kwargs)
    # said, by the guidance or by the solve, it is one call
    for said, guidance in (
        ({}, CFG(2.0, negative={"y": 9}, shared=("context",))),
        ({"shared": ("context",)}, CFG(2.0, negative={"y": 9})),
        ({"shared": ("context",)}, CFG(2.0, negative={"y": 9}, batched=True)),
    ):
        model = Attends()
        got = run(model, guidance, context=context, y=LABELS, **said)
        torch.testing.assert_close(
            got, run(Attends(), CFG(2.0, negative={"y": 9}, batched=False), context=context, y=LABELS)
        )
        assert max(model.rows) == 2 * B


def test_class_labels_that_a_number_replaces_are_known() -> None:
    model = Attends()
    guidance = CFG(2.0, negative={"y": 9})
    _, result = fm.sample(model, X, method="dopri5", guidance=guidance, compact="auto", y=LABELS)
    assert max(model.rows) == 2 * B
    assert result.compaction == "on"
    conditions = MultiCondition([({"y": 1}, 2.0), ({"y": 2}, 1.0)], negative={"y": 9})
    model = Attends()
    fm.sample(model, X, steps=2, guidance=conditions, y=LABELS)
    assert model.rows == [3 * B] * 2


def test_a_tensor_of_labels_named_as_batched_is_one_call() -> None:
    null = torch.full((1,), 9.0)
    model = Attends()
    got = fm.sample(model, X, steps=3, guidance=CFG(2.0, negative={"y": null}, batched=("y",)), y=LABELS.float())[0]
    assert model.rows == [2 * B] * 3
    want = fm.sample(Attends(), X, steps=3, guidance=CFG(2.0, negative={"y": 9.0}, batched=False), y=LABELS.float())[0]
    torch.testing.assert_close(got, want)


def test_nfe_of_adaptive_guidance_counts_every_network() -> None:
    class Counted:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            return -x

    strong, weak = Counted(), Counted()
    _, result = fm.sample(strong, X, method="dopri5", guidance=AutoGuidance(weak, 2.0))
    assert strong.calls == weak.calls
    assert result.nfe == strong.calls + weak.calls


# ---------------------------------------------------------------------- names


_NAMES = """rows times guidance steps path model x_0 x_1 x t y self func kwargs model_kwargs probes mask batched shared
scales noise gradient method generator callback dtype device request requests capacity t_0 t_1 sde prediction divergence
"""
NAMES = _NAMES.split()  # of ours, and of functions within


def any_field(*args: Any, **kwargs: Any) -> Tensor:
    x = args[0] if args[0].dim() == 2 else args[1]
    assert set(kwargs) == set(NAMES), set(kwargs) ^ set(NAMES)
    return -x * kwargs["rows"]


CALLS = {
    "sample": lambda m, x, k: fm.sample(m, x, steps=2, model_kwargs=k),
    "sample adaptively": lambda m, x, k: fm.sample(m, x, method="bosh3", model_kwargs=k),
    "sample checkpointed": lambda m, x, k: fm.sample(m, x, steps=2, gradient="checkpoint", model_kwargs=k),
    "sample reversibly": lambda m, x, k: fm.sample(m, x, steps=2, gradient="reversible", model_kwargs=k),
    "guided": lambda m, x, k: fm.sample(m, x, steps=2, guidance=CFG(2.0, negative={"y": 0}), model_kwargs=k),
    "guided adaptively": lambda m, x, k: fm.sample(
        m, x, method="bosh3", guidance=CFG(2.0, negative={"y": 0}), model_kwargs=k
    ),
    "Solver": lambda m, x, k: fm.Solver(m, steps=2).sample(x, model_kwargs=k),
    "sample_stream": lambda m, x, k: list(fm.sample_stream(m, x, model_kwargs=k)),
    "requests": lambda m, x, k: [r.x for r in fm.sample_stream(m, [(row, k) for row in x])],
    "log_prob": lambda m, x, k: fm.log_prob(m, x, model_kwargs=k),
    "log_prob on a grid": lambda m, x, k: fm.log_prob(m, x, method="rk4", steps=2, model_kwargs=k),
    "log_prob of a guided flow": lambda m, x, k: fm.log_prob(
        m, x, steps=2, method="euler", guidance=CFG(2.0, negative={"y": 0}), divergence="hutchinson", model_kwargs=k
    ),
    "sample_with_log_prob": lambda m, x, k: fm.sample_with_log_prob(m, x, divergence="hutchinson", model_kwargs=k),
    "divergence": lambda m, x, k: fm.divergence(m, 0.5, x, model_kwargs=k),
    "divergence forward": lambda m, x, k: fm.divergence(m, 0.5, x, mode="forward", model_kwargs=k),
    "divergence of chunks": lambda m, x, k: fm.divergence(m, 0.5, x, mode="forward", chunk=2, model_kwargs=k),
    "sde_step_log_prob": lambda m, x, k: fm.sde_step_log_prob(
        m, x, x, 0.1, 0.2, sde=fm.SDE(), path=fm.paths.CondOT(), model_kwargs=k
    ),
    "guidance.at": lambda m, x, k: CFG(2.0, negative={"y": 0}).at(m, k)(x, torch.zeros(2)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_arguments_of_any_name_reach_the_model(call: Any) -> None:
    call(any_field, torch.ones(2, 2), dict.fromkeys(NAMES, 1))


@pytest.mark.parametrize("call", list(CALLS.values())[:-1], ids=list(CALLS)[:-1])
def test_model_kwargs_must_be_a_dict_of_names(call: Any) -> None:
    if call is CALLS["requests"]:
        return
    for wrong in ({1: 2}, 3, "y", [("y", 1)]):
        with pytest.raises(TypeError, match=r"^model_kwargs: expected a dict of the model's keyword arguments"):
            call(lambda x, t, **kwargs: -x, torch.ones(2, 2), wrong)


def test_both_ways_of_giving_arguments_join() -> None:
    x = torch.ones(2, 2)
    want = fm.sample(lambda x, t, a, b: -a * x + b, x, steps=3, a=1.0, b=2.0)[0]
    assert torch.equal(want, fm.sample(lambda x, t, a, b: -a * x + b, x, steps=3, a=1.0, model_kwargs={"b": 2.0})[0])
    with pytest.raises(ValueError, match=r"model_kwargs: expected names that are not given as .* too, got \['a'\]"):
        fm.sample(lambda x, t, a: -x, x, steps=3, a=1.0, model_kwargs={"a": 2.0})


NEAR = {
    fm.sample: {
        "num_steps": "steps=", "n_steps": "steps=", "num_inference_steps": "steps=", "step_size": "steps=",
        "step": "steps=", "seed": "generator=torch.Generator", "cfg_scale": "guidance=fm.guidance.CFG",
        "guidance_scale": "guidance=fm.guidance.CFG", "return_intermediates": "return_trajectory=",
        "return_all": "return_trajectory=", "solver": "method=", "t_span": "time_grid=", "tol": "atol=",
        "relative_tolerance": "rtol=", "max_num_steps": "max_steps=", "prediction_type": "prediction=",
        "verbose": "progress=", "scheduler": "schedule=", "callbacks": "callback=", "model_kwarg": "model_kwargs=",
    },
    fm.log_prob: {
        "num_steps": "steps=", "n_probes": "probes=", "exact_divergence": "divergence=", "base_log_prob": "log_p0=",
        "t0": "t_0=", "seed": "generator=", "create_graph": "gradient=", "guidance_scale": "guidance=",
    },
    fm.sample_with_log_prob: {"num_steps": "steps=", "hutchinson_samples": "probes=", "t_end": "t_1="},
    fm.sample_stream: {"solver": "method=", "guidance_scale": "guidance=", "max_num_steps": "max_steps="},
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "name", "ours"),
    [(f, name, ours) for f, names in NEAR.items() for name, ours in names.items()],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_near_misses_name_the_argument_that_was_meant(function: Any, name: str, ours: str) -> None:
    """Where the model would have swallowed it."""
    with pytest.raises(TypeError) as error:
        function(lambda x, t, **kwargs: -x, torch.ones(2, 2), **{name: 4})
    text = str(error.value)
    assert text.startswith(f"{name}: expected a keyword argument of the model, got one that {function.__name__} calls")
    assert ours in text
    assert f"model_kwargs={{{name!r}: ...}}" in text
    # through model_kwargs, or by the model's own signature, it is the model's
    seen = []
    scope: dict[str, Any] = {"seen": seen}
    exec(f"def model(x, t, {name}=0):\n    seen.append({name})\n    return -x", scope)
    swallow = lambda x, t, **kwargs: (seen.append(kwargs[name]), -x)[1]  # noqa: E731
    for model, given in ((scope["model"], {name: 4}), (swallow, {"model_kwargs": {name: 4}})):
        result = function(model, torch.ones(2, 2), **given)
        if function is fm.sample_stream:
            list(result)
    assert set(seen) == {4}


def test_settings_given_to_a_solvers_sample_are_told() -> None:
    solver = fm.Solver(lambda x, t, **kwargs: -x)
    for name in ("steps", "method", "n_steps", "guidance"):
        with pytest.raises(TypeError, match=f"^{name}: expected a keyword argument of the model, got one that sample"):
            solver.sample(torch.ones(2, 2), **{name: 3})


@pytest.mark.parametrize("wrap", ["module", "compiled", "partial", "method"])
def test_signatures_within_wrappers_count(wrap: str) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor, num_steps: int = 3) -> Tensor:
            return -x * num_steps

    class Parallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.module(*args, **kwargs)

    class Compiled(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self._orig_mod(*args, **kwargs)

    net = Net()
    model = {
        "module": Parallel(net),
        "compiled": Compiled(Parallel(net)),
        "partial": partial(net.forward),
        "method": net,
    }
    fm.sample(model[wrap], torch.ones(2, 2), steps=1, num_steps=4)


# ---------------------------------------------------------------------- settings


def test_defaults_stand_once() -> None:
    """A function's defaults are those of the settings that it makes."""
    import inspect

    from fmkernels.likelihood.density import LikelihoodSettings
    from fmkernels.solvers.sampling.settings import FlowSettings

    for function, settings in (
        (fm.sample, fm.Solver),
        (fm.log_prob, LikelihoodSettings),
        (fm.sample_with_log_prob, LikelihoodSettings),
        (fm.sample_stream, FlowSettings),
    ):
        for name, parameter in inspect.signature(function).parameters.items():
            if hasattr(settings, name) and parameter.default is not parameter.empty and name != "method":
                assert parameter.default == getattr(settings, name), (function, name)
