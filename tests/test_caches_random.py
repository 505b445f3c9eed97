"""Calls that differ in any one attribute do not share a result: settings drawn from all that there are."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from settings_space import (
    BRIDGES,
    GUIDANCE,
    MASK,
    METHODS,
    PATHS,
    Spec,
    X,
    Y,
    arguments,
    build,
    field,
    is_object,
    values,
)
from torch import Tensor

import fmkernels as fm

MORE = int(os.environ.get("FMKERNELS_TEST_EXAMPLES", "1"))  # times as many, and others each time
PATH = fm.paths.CondOT()
BATCH = PATH.sample(X, x_0=0.5 * X.flip(0), t=torch.tensor([0.1, 0.4, 0.6, 0.9]))


def call_odeint(**given: Any) -> Any:
    y0 = X.clone().requires_grad_()  # a gradient is a result too
    y = fm.odeint(lambda t, y: field(y, t), y0, **{"rtol": 1e-3, "atol": 1e-3, **given})
    return y, torch.autograd.grad(y.sum(), y0) if y.requires_grad else None


def call_loss(**given: Any) -> Any:
    pred = given.pop("pred").clone().requires_grad_()
    if given.keys() & {"t", "path"}:
        given = {"t": BATCH.t, "path": PATH, "x_1": X, "x_0": 0.5 * X, **given}
    else:
        given["batch"] = BATCH
    loss = fm.cfm_loss(pred, **given)
    return loss, torch.autograd.grad(loss.sum(), pred)


CALLS: dict[Any, Callable[..., Any]] = {
    fm.sample: lambda **given: fm.sample(field, X, **{"max_steps": 20, **given}),
    fm.log_prob: lambda **given: fm.log_prob(field, X, **{"rtol": 1e-2, "atol": 1e-2, "max_steps": 20, **given}),
    fm.odeint: call_odeint,
    fm.cfm_loss: call_loss,
    fm.sdeint: lambda **given: fm.sdeint(lambda t, y: field(y, t), y0=X, **given),
    fm.sde_step_log_prob: lambda **given: fm.sde_step_log_prob(field, X, 0.9 * X, **given),
}


def frozen(value: Any) -> Any:
    """Something that equals only what is the same to the last bit."""
    if isinstance(value, Tensor):
        held = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return value.dtype, tuple(value.shape), value.requires_grad, held
    if isinstance(value, (tuple, list)):
        return tuple(map(frozen, value))
    if dataclasses.is_dataclass(value):
        return tuple(frozen(getattr(value, f.name)) for f in dataclasses.fields(value))
    return repr(value)


def outcome(kind: Any, given: dict[str, Any]) -> Any:
    """What a call gives, or the error that it raises."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return frozen(CALLS[kind](**build(given)))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return type(error), str(error)


@st.composite
def drawn(draw: st.DrawFn, kind: Any, most: int = 2) -> dict[str, Any]:
    """A few arguments of a call or class, those that it needs among them; the others have their defaults."""
    names = arguments(kind)
    chosen = draw(st.lists(st.sampled_from(names), max_size=most, unique=True)) if names else []
    return {name: draw(value(kind, name)) for name in names if name in chosen or name in needed(kind)}


@functools.cache
def needed(kind: Any) -> frozenset[str]:
    parameters = inspect.signature(kind).parameters.values()
    return frozenset(p.name for p in parameters if p.default is p.empty and p.name in arguments(kind))


@functools.cache
def value(kind: Any, name: str) -> st.SearchStrategy[Any]:
    plain = [v for v in values(kind, name) if not is_object(v)]
    objects = [drawn(v).map(lambda given, v=v: Spec(v, given)) for v in values(kind, name) if is_object(v)]
    return st.one_of(*([st.sampled_from(plain)] if plain else []), *([st.one_of(objects)] if objects else []))


@st.composite
def changed(draw: st.DrawFn, kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments but for one, or for one of an object among them."""
    name = draw(st.sampled_from(arguments(kind)))
    old = given.get(name)
    if isinstance(old, Spec) and old.arguments and draw(st.booleans()):
        return {**given, name: Spec(old.kind, draw(changed(old.kind, old.arguments)))}
    return {**given, name: draw(value(kind, name))}


EXAMPLES = {
    fm.sample: 50,
    fm.log_prob: 8,
    fm.odeint: 20,
    fm.cfm_loss: 30,
    fm.sdeint: 10,
    fm.sde_step_log_prob: 15,
}


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.__name__)
def test_no_call_gets_what_another_left_behind(kind: Any) -> None:
    @settings(
        max_examples=MORE * EXAMPLES[kind],
        derandomize=MORE == 1,
        deadline=None,
        database=None,
        phases=[Phase.generate] if MORE == 1 else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        before = data.draw(drawn(kind, 3))
        after = data.draw(changed(kind, before))
        first, second = outcome(kind, before), outcome(kind, after)
        assert outcome(kind, before) == first
        fm.clear_caches()
        assert outcome(kind, after) == second

    fm.clear_caches()
    check()


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.__name__)
def test_each_argument_has_values_to_draw(kind: Any) -> None:
    """And so has each of the classes among them."""
    seen: set[Any] = set()
    kinds = [kind]
    while kinds:
        kind = kinds.pop()
        seen.add(kind)
        found = [v for name in arguments(kind) for v in values(kind, name)]
        kinds += [v for v in found if is_object(v) and v not in seen]
    assert seen


# ---------------------------------------------------------------- what is changed where it lies


def solved(**given: Any) -> Any:
    return outcome(fm.sample, {"steps": 3, **given})


def check_change(run: Callable[[], Any], change: Callable[[], None]) -> None:
    """What is called again after a change gives what it gives where nothing is kept, which is something else."""
    fm.clear_caches()
    before = run()
    assert run() == before
    change()
    after = run()
    fm.clear_caches()
    assert run() == after
    assert after != before


def attributes_of(kinds: list[Any]) -> list[Any]:
    """(class, attribute) of what such objects hold."""
    found = [(kind, name) for kind in kinds for name in arguments(kind) if name != "base"]
    return [pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1]}") for pair in found]


@pytest.mark.parametrize(("kind", "name"), attributes_of(PATHS))
def test_an_attribute_of_a_path_that_is_set_is_used(kind: Any, name: str) -> None:
    first, second = values(kind, name)[:2]
    path = kind(**{name: first})
    assert getattr(path, name) == first

    def both() -> Any:
        loss = outcome(fm.cfm_loss, {"pred": X, "path": path, "target": "velocity"})
        return loss, solved(path=path, prediction="x_1", method="ddim")

    check_change(both, lambda: setattr(path, name, second))


@pytest.mark.parametrize(("kind", "name"), attributes_of([*GUIDANCE, *METHODS, *BRIDGES]))
def test_two_objects_that_differ_in_one_attribute_share_nothing(kind: Any, name: str) -> None:
    """Each value of each attribute, one after the other and back."""
    role = "guidance" if kind in GUIDANCE else "path" if kind in BRIDGES else "method"
    base = {n: values(kind, n)[-1] for n in needed(kind)}
    if kind in GUIDANCE:
        base |= {"scale": 2.5} if "scale" in arguments(kind) else {}
        base |= {"negative": {"y": 0.0}} if "negative" in arguments(kind) else {}
    objects = [Spec(kind, {**base, name: v}) for v in values(kind, name)]
    given = [{role: each, "model_kwargs": {"y": Y}} for each in objects]
    fm.clear_caches()
    results = [solved(**each) for each in given]
    assert [solved(**each) for each in given] == results
    for each, result in zip(given, results, strict=True):
        fm.clear_caches()
        assert solved(**each) == result
    assert any(not isinstance(result[0], type) for result in results)


class Halves(fm.paths.Path):
    power = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return t**self.power

    def sigma(self, t: Tensor) -> Tensor:
        return 1.0 - t**self.power


class Grid:
    """A schedule that is an object."""

    def __init__(self) -> None:
        self.power = 1.0

    def __call__(self, n: int) -> Any:
        return torch.linspace(0, 1, n + 1, dtype=torch.float64) ** self.power


@dataclasses.dataclass
class Scaled:
    """A method of one's own, or a scale, that is an object."""

    power: float = 1.0

    def __call__(self, at: Any) -> Any:
        if isinstance(at, Tensor):
            return at**self.power
        for step in at.steps():
            at.advance(at.x + at.evaluate(at.x, step.t) * (self.power * (step.u - step.t)))
        return None


class Ours(fm.guidance.CFG):
    """A rule of this package with an attribute more."""

    def __init__(self, power: float) -> None:
        super().__init__(2.0, negative={"y": 0.0})
        object.__setattr__(self, "power", power)

    def velocity(self, builder: Any, x: Any, t: Any) -> Any:
        return super().velocity(builder, x, t) * self.power


def set_power(owner: Any) -> Callable[[], None]:
    return lambda: object.__setattr__(owner, "power", 0.5)


def objects_that_change() -> dict[str, tuple[dict[str, Any], Callable[[], None]]]:
    path, grid, method, guidance = Halves(), Grid(), Scaled(), Ours(1.0)
    scale, noise, mine = Scaled(), Scaled(), Scaled()
    time, kwargs, mask = torch.tensor([0.0, 0.5, 1.0]), {"y": Y.clone()}, MASK.clone()
    array = time.double().numpy().copy()
    negative, weak_kwargs = torch.zeros(4), {"y": torch.zeros(4)}
    extra = fm.paths.VP()
    cell = [1.0]
    cfg = fm.guidance.CFG
    return {
        "a path's": ({"path": path, "prediction": "x_1"}, set_power(path)),
        "a schedule's": ({"schedule": grid}, set_power(grid)),
        "a method's": ({"method": method}, set_power(method)),
        "a guidance's": ({"guidance": guidance, "model_kwargs": {"y": 1.0}}, set_power(guidance)),
        "a scale's": ({"guidance": cfg(scale, negative={"y": 0.0}), "model_kwargs": {"y": 1.0}}, set_power(scale)),
        "an SDE's function's": ({"sde": fm.SDE(noise)}, set_power(noise)),
        "an SDE's function's, as a method": ({"method": fm.SDE(mine)}, set_power(mine)),
        "a list that a function reads": ({"sde": fm.SDE(lambda t: cell[0] * (1 - t))}, lambda: cell.insert(0, 0.5)),
        "times in a tensor": ({"time_grid": time, "steps": None}, lambda: time[2].fill_(0.8)),
        "times in an array": ({"time_grid": array, "steps": None}, lambda: array.put(2, 0.8)),
        "a keyword argument": ({"model_kwargs": kwargs}, lambda: kwargs["y"].mul_(2.0)),
        "what a negative argument holds": (
            {"guidance": cfg(2.0, negative={"y": negative}), "model_kwargs": {"y": Y}},
            lambda: negative.add_(1.0),
        ),
        "what the weak model gets": (
            {"guidance": fm.guidance.AutoGuidance(field, 2.0, weak_kwargs=weak_kwargs), "model_kwargs": {"y": Y}},
            lambda: weak_kwargs["y"].add_(1.0),
        ),
        "a mask of the noise": ({"sde": fm.SDE(), "noise_transform": fm.MaskedNoise(mask)}, lambda: mask.fill_(True)),
        "an attribute that was not there": (
            {"path": extra, "prediction": "x_1", "method": "ddim"},
            lambda: vars(extra).update(alpha=lambda t: t),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("steps", [3, None], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("name", objects_that_change())
def test_what_changes_where_it_lies_is_seen_at_the_next_call(name: str, steps: int | None) -> None:
    given, change = objects_that_change()[name]
    if steps is None:
        if given.keys() & {"method", "sde", "schedule"}:
            return
        given = {**given, "steps": None, "method": "dopri5", "rtol": 1e-2, "atol": 1e-2}
    check_change(lambda: solved(**given), change)


def test_a_class_attribute_is_seen_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    check_change(
        lambda: solved(path=Halves(), prediction="x_1"),
        lambda: monkeypatch.setattr(Halves, "power", 0.5),
    )
