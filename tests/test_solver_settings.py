"""Every setting of a solve reaches it, in each of the solvers that take it, and what one solve was told stays there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from odeint_problems import D, times
from torch import Tensor, nn

import fmkernels as fm
from fmkernels import _dispatch
from fmkernels.solvers.adaptive.controllers import PIController

NATIVE = _dispatch.unavailable("native", "cpu") is None


@pytest.fixture(params=["auto", "reference"] if NATIVE else ["auto"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The implementation of the whole process, as FMKERNELS_IMPL sets it."""
    monkeypatch.setattr(_dispatch, "_ENVIRONMENT", request.param)
    _dispatch._plain_library.cache_clear()
    yield request.param
    _dispatch._plain_library.cache_clear()


class Told(nn.Module):
    """A field that notes its calls' times, and the steps that were tried."""

    def __init__(self, field: Any) -> None:
        super().__init__()
        self.field, self.calls = field, []
        self.steps: list[tuple[float, float, bool]] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append(float(t.detach().reshape(-1)[0]))
        return self.field(t, y)

    def callback_accept_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.steps.append((float(t), float(h), True))

    def callback_reject_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.steps.append((float(t), float(h), False))


def swing(t: Tensor, y: Tensor) -> Tensor:
    """y = sin(9 t) + a constant; steps do not depend on y's size."""
    return 9.0 * torch.cos(9.0 * t) + 0.0 * y


def zero(t: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(y)


# ---------------------------------------------------------------- what is kept between solves

# Each differs from the first in one thing that a kept stepper was made with or told.
KEPT: dict[str, dict[str, Any]] = {
    "first": {},
    "rtol": {"rtol": 1e-10},
    "atol": {"atol": 1e-2},
    "safety": {"options": {"safety": 0.5}},
    "ifactor": {"options": {"ifactor": 1.5}},
    "dfactor": {"options": {"dfactor": 0.05, "first_step": 0.9}},
    "first_step": {"options": {"first_step": 0.9}},
    "max_step": {"options": {"max_step": 0.02}},
    "min_step": {"options": {"min_step": 0.2}},
    "max_num_steps": {"options": {"max_num_steps": 2}},
    "norm": {"options": {"norm": lambda ratio: 30.0 * ratio.abs().max()}},
    "method": {"method": "tsit5"},
    "per_sample": {"options": {"per_sample": True}},
    "end": {"end": 0.9},
    "dtype": {"dtype": torch.float32},
    "shape": {"rows": 3},
}
# What only fm.sample can be told.
SAMPLED: dict[str, dict[str, Any]] = {
    "first": {},
    "rtol": {"rtol": 1e-10},
    "atol": {"atol": 1e-2},
    "controller": {"controller": PIController()},
    "max_steps": {"max_steps": 2},
    "method": {"method": "tsit5"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "time_dtype": {"time_dtype": D},
    "grid": {"time_grid": [0.0, 0.9]},
}


def field_of_both(t: Tensor, y: Tensor) -> Tensor:
    t = t.reshape(-1, *[1] * (y.dim() - 1))
    return (y * torch.cos(5.0 * y) + torch.sin(30.0 * t)).to(y.dtype)


def solve_kept(rtol: float = 1e-5, atol: float = 1e-7, end: float = 1.0, **settings: Any) -> Tensor:
    dtype, rows = settings.pop("dtype", D), settings.pop("rows", 2)
    y0 = torch.tensor([[0.1, 0.2], [0.3, 2.0], [1.0, 0.0]], dtype=dtype)[:rows]
    t = torch.tensor([0.0, end], dtype=dtype)
    return fm.odeint(field_of_both, y0, t, rtol=rtol, atol=atol, **settings)[-1]


def sample_kept(rtol: float = 1e-5, atol: float = 1e-7, **settings: Any) -> Tensor:
    x_0 = torch.tensor([[0.1, 0.2], [0.3, 2.0], [1.0, 0.0]], dtype=settings.pop("dtype", torch.float32))
    settings = {"method": "dopri5", **settings}
    return fm.sample(lambda x, t: field_of_both(t, x), x_0, rtol=rtol, atol=atol, **settings)[0]


@pytest.mark.filterwarnings("ignore:fmkernels. adaptive solve")
@pytest.mark.parametrize(("solve", "kinds"), [(solve_kept, KEPT), (sample_kept, SAMPLED)], ids=["odeint", "sample"])
def test_no_solve_answers_with_the_settings_of_another(solve: Any, kinds: dict[str, Any], impl: str) -> None:
    """In any order of calls each setting has its own result, bitwise the same, and other than the first's."""
    alone = {name: solve(**settings) for name, settings in kinds.items()}
    for names in (reversed(kinds), itertools.chain.from_iterable(("first", name) for name in kinds)):
        for name in names:
            again = solve(**kinds[name])
            torch.testing.assert_close(again, alone[name], rtol=0.0, atol=0.0, equal_nan=True, msg=name)
    for name, settings in list(kinds.items())[1:]:
        # those that only a rejected step shows beside the setting that makes one
        base = alone["first_step" if name == "dfactor" else "first"]
        assert alone[name].dtype == settings.get("dtype", base.dtype)
        assert alone[name].shape != base.shape or not torch.equal(alone[name].to(base.dtype), base), name


# ---------------------------------------------------------------- the control of steps


@pytest.mark.parametrize("dfactor", [0.05, 0.2, 0.6])
def test_dfactor_bounds_how_much_a_step_shrinks(dfactor: float, impl: str) -> None:
    func = Told(swing)
    options = {"first_step": 1.0, "dfactor": dfactor}
    fm.odeint(func, times(1.0), times(0.0, 5.0), options=options, rtol=1e-11, atol=1e-11)
    (_, first, accepted), (_, second, _) = func.steps[:2]
    assert (first, accepted) == (1.0, False)
    assert second == pytest.approx(dfactor, rel=1e-12)


@pytest.mark.parametrize("ifactor", [1.5, 10.0, 40.0])
def test_ifactor_bounds_how_much_a_step_grows(ifactor: float, impl: str) -> None:
    func = Told(zero)
    fm.odeint(func, times(1.0), times(0.0, 5.0), options={"first_step": 1e-3, "ifactor": ifactor})
    sizes = [h for _, h, _ in func.steps[:2]]
    assert sizes == pytest.approx([1e-3, 1e-3 * ifactor], rel=1e-12)


def test_safety_scales_the_next_step(impl: str) -> None:
    seen = []
    for safety in (0.9, 0.3):
        func = Told(swing)
        options = {"first_step": 0.05, "safety": safety, "dfactor": 1e-3, "ifactor": 1e3}
        fm.odeint(func, times(1.0), times(0.0, 2.0), options=options, rtol=1e-8, atol=1e-8)
        (_, _, accepted), (_, second, _) = func.steps[:2]
        assert not accepted
        seen.append(second)
    assert seen[0] / seen[1] == pytest.approx(3.0, rel=1e-9)


class Enough(Exception):
    """A field has seen what a test asks for."""


def implicit_ends(field: Any, **options: Any) -> list[float]:
    """Where the first two steps that kvaerno3 tries end, of which its last two stages are."""
    seen: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        if float(t) not in seen[-1:]:
            seen.append(float(t))
        if len(seen) == 5:
            raise Enough
        return field(t, y)

    with torch.no_grad(), pytest.raises(Enough):
        fm.odeint(func, times(1.0), times(0.0, 5.0), method="kvaerno3", options=options, rtol=1e-6, atol=1e-6)
    assert seen[0] == 0.0
    return [seen[2], seen[4]]


def test_step_control_of_implicit_methods() -> None:
    for dfactor in (0.05, 0.2, 0.6):
        ends = implicit_ends(swing, first_step=0.5, dfactor=dfactor)
        assert ends == pytest.approx([0.5, 0.5 * dfactor], rel=1e-12)
    for ifactor in (1.5, 10.0, 40.0):
        ends = implicit_ends(zero, first_step=1e-3, ifactor=ifactor)
        assert ends == pytest.approx([1e-3, 1e-3 * (1.0 + ifactor)], rel=1e-12)
    rejected = [implicit_ends(swing, first_step=0.5, safety=safety, dfactor=1e-3)[1] for safety in (0.9, 0.3)]
    assert rejected[0] / rejected[1] == pytest.approx(3.0, rel=1e-9)
    assert implicit_ends(zero, first_step=3.0, max_step=0.25) == pytest.approx([0.25, 0.5], rel=1e-12)
    with pytest.warns(UserWarning, match="steps below min_step=0.4"):
        fm.odeint(swing, times(1.0), times(0.0, 5.0), method="kvaerno3", options={"min_step": 0.4})


@pytest.mark.parametrize("method", ["dopri5", "kvaerno3"])
def test_either_tolerance_alone_controls_the_error(method: str, impl: str) -> None:
    """The error at sizes of the state at which one of them decides, and the work that it takes."""
    for size, decides in ((1e6, "rtol"), (1e-6, "atol")):
        errors, calls = [], []
        for tol in (1e-3, 1e-6):
            func = Told(lambda t, y, size=size: size * swing(t, y / size))
            rtol, atol = (tol, 1e-13) if decides == "rtol" else (1e-12, tol * size)
            y = fm.odeint(func, times(3.0 * size), times(0.0, 1.0), method=method, rtol=rtol, atol=atol)
            errors.append(abs(float(y[-1]) / size - 3.0 - math.sin(9.0)))
            calls.append(len(func.calls))
        assert errors[1] < 1e-4, (decides, errors)
        assert calls[1] > 2 * calls[0], (decides, calls)


# ---------------------------------------------------------------- the first step


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [1e-2, 1e4])
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "tsit5", "kvaerno3"])
def test_no_call_leaves_the_interval(method: str, scale: float, sign: float, impl: str) -> None:
    """Nor does the trial step of the first step size, for which a slow field asks far beyond the end."""
    end = sign * 1e-3 * scale
    func = Told(lambda t, y: 1e-7 * y)
    fm.odeint(func, torch.ones(2, dtype=D), times(0.0, end), method=method)
    assert func.calls
    assert all(min(0.0, end) <= t <= max(0.0, end) for t in func.calls), func.calls


def test_no_call_of_a_sampler_leaves_the_interval(impl: str) -> None:
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return 1e-7 * x

    x = torch.ones(3, 2, dtype=D)
    fm.sample(model, x, method="dopri5")
    fm.log_prob(model, x, method="dopri5", log_p0=lambda x: x.sum(1))
    list(fm.sample_stream(model, [x[0], x[1]], capacity=1))
    assert all(0.0 <= t <= 1.0 for t in seen)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["step_t", "jump_t"])
@pytest.mark.parametrize("kind", ["odeint", "times", "dense", "event", "adjoint"])
def test_a_given_first_step_is_only_the_first(kind: str, name: str, gradient: bool, impl: str) -> None:
    """After a time at which a step had to end, the step size is found anew."""
    func = Told(swing)
    y0 = times(1.0).requires_grad_(gradient)
    settings: dict[str, Any] = {"options": {"first_step": 1e-6, name: [0.25, 0.5]}, "rtol": 1e-4, "atol": 1e-4}
    if kind == "dense":
        fm.odeint_dense(func, y0, 0.0, 1.0, **settings)
    elif kind == "event":
        fm.odeint(func, y0, times(0.0, 1.0), event_fn=lambda t, y: t - 0.9, **settings)
    elif kind == "adjoint":
        fm.odeint_adjoint(func, y0, times(0.0, 1.0), **settings)
    else:
        fm.odeint(func, y0, times(0.0, 1.0) if kind == "odeint" else times(0.0, 0.4, 0.5, 1.0), **settings)
    begun = {t: h for t, h, accepted in func.steps if accepted and t in (0.0, 0.25, 0.5)}
    assert begun[0.0] == 1e-6
    assert min(begun[0.25], begun[0.5]) > 1e-4, begun
