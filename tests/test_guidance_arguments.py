"""Guidance's keyword arguments for the network, and what it tells of wrong ones."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from guidance_problems import NULL, B, Model, close, data, euler, pair, solve
from torch import Tensor

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
        close(solved(("extra",), **kwargs), solved(False, **kwargs), 0.0)
    # a scalar time, and a tensor for the null label
    guidance = CFG(3.0, negative={"y": torch.tensor([NULL])})
    t = torch.tensor(0.3, dtype=torch.float64)
    c, u = pair(y)(x, t)
    close(guidance.at(Model(), {"y": y})(x, t), u + 3.0 * (c - u))


def test_what_cannot_be_batched_is_told() -> None:
    x, y = data()
    named = ("y", "extra")
    cases = [
        ({"y": y, "flag": "a cat"}, {"flag": ""}, named, "flag: expected tensors with a row .*, or equal values"),
        ({"y": y}, {"y": None}, named, "y: expected tensors, or equal values"),
        ({"y": y}, {"extra": {}}, named, "extra: expected the same keyword arguments"),
        ({"extra": {"shift": y}}, {"extra": {"other": y}}, named, "extra: expected the same structure"),
        ({"y": torch.tensor(1)}, {"y": torch.tensor(2)}, True, r"y: expected tensors with a row for each of 3 samples"),
        ({"y": y.double()}, {"y": NULL}, True, "y: expected to be named in batched=, as .*, or in shared="),
        ({"y": y, "table": torch.zeros(B, 2)}, {"y": NULL}, True, "table: expected to be named in batched="),
        ({"y": y, "flag": Model()}, {"y": NULL}, True, "flag: expected to be named in batched="),
    ]
    for kwargs, negative, batched, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            solve(CFG(2.0, negative=negative, batched=batched), Model(), x, **kwargs)
        assert "batched=False" in str(error.value)
        # by itself it makes two calls of it
        if "extra" not in negative:
            model = Model()
            got = solve(CFG(2.0, negative=negative), model, x, **kwargs)
            assert set(model.rows) == {B}
            close(got, solve(CFG(2.0, negative=negative, batched=False), Model(), x, **kwargs), 0.0)
    with pytest.raises(ValueError, match=r"batched: expected y to have an entry for each of 3 samples, got .*\(2,\)"):
        solve(CFG(2.0, negative={"y": torch.zeros(2)}, batched=("y",)), Model(), x, y=y)
    # and works in two calls
    got = solve(CFG(2.0, negative={"y": None}, batched=False), Model(), x, y=y)
    close(got, euler(lambda x, t, i: 2.0 * Model()(x, t, y=y) - Model()(x, t), x))
    with pytest.raises(ValueError, match="y: expected tensors with a row"):
        solve(CFG(2.0, negative={"y": NULL}, shared=("y",), batched=True), Model(), x, y=y)


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
        (lambda: CFG(3.0, negative=null, shared=3), TypeError, "shared: expected a sequence of names"),
        (lambda: CFG(3.0, negative=null, batched="y"), ValueError, "batched: expected True, False, 'auto' or a seq"),
        (lambda: CFG(3.0, negative=null, batched=3), TypeError, "batched: expected a sequence of names"),
        (lambda: CFG(3.0, negative=null, batched=(3,)), TypeError, "batched: expected names"),
        (lambda: CFG(3.0, negative={3: 4}), TypeError, "negative: expected a dict of keyword arguments"),
        (lambda: AutoGuidance(Model(), 2.0, weak_kwargs=3), TypeError, "weak_kwargs: expected a dict"),
        (lambda: ClassifierGuidance(Model(), 2.0, gradient_kwargs=3), TypeError, "gradient_kwargs: expected a dict"),
        (lambda: MultiCondition({"y": 3}), TypeError, "conditions: expected a list of pairs"),
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


@pytest.mark.parametrize(
    "value",
    [None, "2", True, 1j, [2.0], object(), torch.tensor(True), np.array(["a"])],
    ids=lambda value: type(value).__name__,
)
def test_what_a_scales_function_returns_is_told(value) -> None:
    x, y = data()
    guidance = CFG(lambda t: value, negative={"y": NULL})
    for call in (
        lambda: solve(guidance, Model(), x, y=y),
        lambda: guidance.at(Model(), {"y": y})(x, torch.zeros(B, dtype=torch.float64)),
    ):
        with pytest.raises(TypeError, match=r"^scale\(t\): expected a number, or a tensor of t's shape, got "):
            call()


def test_a_scales_function_may_return_any_number() -> None:
    x, y = data()
    expected = solve(CFG(2.0, negative={"y": NULL}), Model(), x, y=y)
    for value in (2, np.float32(2.0), np.array(2.0), torch.tensor(2.0), torch.tensor(2)):
        close(solve(CFG(lambda t, value=value: value, negative={"y": NULL}), Model(), x, y=y), expected)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_a_negative_with_one_entry_is_one_for_each_sample_however_it_is_called(method: str) -> None:
    seen: set[tuple[int, ...]] = set()

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        seen.add((x.shape[0], *c.shape))
        return -x * c.sum(1, keepdim=True)

    x_0, c = torch.randn(4, 2), torch.randn(4, 3)
    for batched in (False, ["c"], "auto"):
        guidance = fm.guidance.CFG(2.0, negative={"c": torch.ones(1, 3)}, batched=batched)
        fm.sample(model, x_0, method=method, time_grid=[0.0, 1.0], guidance=guidance, c=c)
    assert seen == {(4, 4, 3), (8, 8, 3)}
    seen.clear()
    guidance = fm.guidance.CFG(2.0, negative={"c": torch.ones(1, 3)}, batched=False, shared=["c"])
    fm.sample(model, x_0, method="euler", steps=1, guidance=guidance, c=c)
    assert seen == {(4, 4, 3), (4, 1, 3)}


RULES = {
    "cfg": lambda: CFG(2.0, negative={"y": -1.0}),
    "rescaled": lambda: CFG(2.0, negative={"y": -1.0}, rescale=0.5),
    "apg": lambda: APG(2.0, negative={"y": -1.0}),
    "cfg++": lambda: CFGPlusPlus(0.5, negative={"y": -1.0}),
    "rectified": lambda: RectifiedCFGPlusPlus(1.0, negative={"y": -1.0}),
    "several": lambda: MultiCondition([({"y": 0.5}, 2.0), ({"y": 0.3}, 1.0)], negative={"y": -1.0}),
}


ROADS = [(method, gradient) for method in ("euler", "heun2", "ab2") for gradient in ("none", "direct", "checkpoint")]
OF_STEPS = ("cfg++", "rectified")  # defined by Euler steps


@pytest.mark.parametrize(
    ("rule", "method", "gradient"),
    [
        (rule, method, gradient)
        for rule in RULES
        for method, gradient in [*ROADS, ("dopri5", "none")]
        if method == "euler" or rule not in OF_STEPS
    ],
)
def test_two_calls_of_a_network_with_one_buffer(rule: str, method: str, gradient: str) -> None:
    """A number for y cannot be joined: each branch is a call, and the second writes over the first's answer."""
    buffer, x_0 = torch.empty(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def plain(x: Tensor, t: Tensor, y: float) -> Tensor:
        return torch.tanh(x) * y + t[:, None]

    def static(x: Tensor, t: Tensor, y: float) -> Tensor:
        return buffer.detach().copy_(plain(x, t, y)) if gradient != "none" else buffer.copy_(plain(x, t, y))

    steps = {"time_grid": [0.0, 0.9]} if method == "dopri5" else {"steps": 4}
    options = {"method": method, "guidance": RULES[rule](), "gradient": gradient, "y": 1.0, **steps}
    options["time_dtype"] = torch.float64
    found, expected = (fm.sample(f, x_0, **options)[0] for f in (static, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tree", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("batched", [False, ("c",)])
def test_arguments_that_are_written_to_in_place_are_read_at_each_call(batched: Any, tree: bool) -> None:
    def model(x: Tensor, t: Tensor, c: Any) -> Tensor:
        return x * 0.0 + (c[0] if tree else c)

    def wrapped(c: Tensor) -> Any:
        return [c] if tree else c

    x, t, null, c = torch.zeros(2, 1), torch.zeros(2), torch.nn.Parameter(torch.zeros(2, 1)), torch.ones(2, 1)
    velocity = CFG(3.0, negative={"c": wrapped(null)}, batched=batched).at(model, {"c": wrapped(c)})
    assert velocity(x, t).tolist() == [[3.0], [3.0]]
    with torch.no_grad():
        null.add_(1.0)  # an optimizer's step
        assert velocity(x, t).tolist() == [[1.0], [1.0]]
        null.data = torch.full((2, 1), 3.0)  # of which no version tells
    assert velocity(x, t).tolist() == [[-3.0], [-3.0]]

    def switch(number: int, t: float, x: Tensor) -> None:
        if number == 1:
            c.fill_(5.0)

    guidance = CFG(1.5, negative={"c": wrapped(torch.zeros(2, 1))}, batched=batched)
    got = fm.sample(model, x, steps=4, guidance=guidance, callback=switch, c=wrapped(c))[0]
    assert got.tolist() == [[4.5], [4.5]]


def test_arrays_of_numpy_in_one_call() -> None:
    lengths = []

    def model(x: Tensor, t: Tensor, y: Tensor, c: np.ndarray) -> Tensor:
        lengths.append((len(x), len(c)))
        return x * 0.0 + y[:, None] * torch.from_numpy(c)[:, None]

    c, y, x = np.arange(1.0, 4.0), torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 1)
    for other in ({}, {"c": c + 1.0}, {"c": np.ones(1)}):
        results = []
        for batched in (False, ("y", "c")):
            if not batched and len(other.get("c", c)) == 1:
                other = {"c": np.broadcast_to(other["c"], 3).copy()}
            guidance = CFG(2.0, negative={"y": 0.5, **other}, batched=batched)
            results.append(fm.sample(model, x, steps=1, guidance=guidance, y=y, c=c)[0])
        assert lengths[-1] == (6, 6)
        assert torch.equal(*results)


@pytest.mark.parametrize(
    ("y", "number", "good"),
    [
        (torch.tensor([1, 2]), 0.5, -7),
        (torch.tensor([1, 2]), math.nan, 5.0),
        (torch.tensor([1, 2], dtype=torch.uint8), -1, 255),
        (torch.tensor([True, False]), 2, 0),
        (torch.tensor([1.0, 2.0], dtype=torch.float16), 1e6, math.inf),
    ],
)
def test_a_number_that_an_arguments_dtype_does_not_hold_is_told(y: Tensor, number: float, good: float) -> None:
    seen = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y.flatten().tolist())
        return x * 0.0

    rules = {
        "negative": lambda value: CFG(2.0, negative={"y": value}),
        "conditions[0]": lambda value: MultiCondition([({"y": value}, 2.0)]),
        "weak_kwargs": lambda value: AutoGuidance(model, 2.0, weak_kwargs={"y": value}),
    }
    for argument, rule in rules.items():
        message = f"{argument}: expected a number for y that its dtype, {y.dtype}, holds"
        with pytest.raises(ValueError, match=re.escape(message)):
            fm.sample(model, torch.ones(2, 2), steps=1, guidance=rule(number), y=y)
        seen.clear()
        fm.sample(model, torch.ones(2, 2), steps=1, guidance=rule(good), y=y)
        assert sum(row.count(good) for row in seen) >= 2


def test_a_rule_of_several_conditions_can_be_made_again() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x * 0.0 + y[:, None]

    y = torch.tensor([5, 5])
    weights = torch.tensor([2.0, 3.0])
    for weight, want in ((2.0, [2.0, 2.0]), (weights, [2.0, 3.0]), (lambda t: 2.0, [2.0, 2.0])):
        rule = MultiCondition([({"y": 1}, weight)], negative={"y": 0})
        for again in (
            rule,
            dataclasses.replace(rule, batched=False),
            dataclasses.replace(dataclasses.replace(rule), batched=False),
            MultiCondition(rule.conditions, negative={"y": 0}),
        ):
            got = fm.sample(model, torch.zeros(2, 1), steps=2, guidance=again, y=y)[0]
            assert got[:, 0].tolist() == want
    assert repr(MultiCondition([({"y": 1}, 2.0)])).startswith("MultiCondition(conditions=(({'y': 1}, 2.0),)")
