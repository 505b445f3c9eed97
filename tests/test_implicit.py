"""Implicit methods: order, stability, step control on stiff problems, gradients, independent samples, failures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from implicit_problems import PAIRS, TIGHT, every_tableau, times
from torch import Tensor

import fmkernels as fm
from fmkernels.solvers.implicit.solve import solve_implicit
from fmkernels.solvers.implicit.system import MAX_SIZE
from fmkernels.solvers.methods.implicit_tableaus import IMPLICIT, IMPLICIT_TABLEAUS, ImplicitTableau


def kaps(t: Tensor, y: Tensor) -> Tensor:
    """Kaps's problem with its time turned into t + sin(t) / 2: see kaps_exact."""
    a, b = y.unbind(-1)
    return (1.0 + 0.5 * torch.cos(t)) * torch.stack([-3.0 * a + b * b, a - b - b * b], -1)


def kaps_exact(t: float) -> Tensor:
    tau = t + 0.5 * math.sin(t)
    return times(math.exp(-2.0 * tau), math.exp(-tau))


def robertson(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    slow, back, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack([-slow + back, slow - back - fast, fast], -1)


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    return torch.stack([b, 1000.0 * (1.0 - a * a) * b - a], -1)


class Counted:
    def __init__(self, func: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.func, self.calls = func, 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.func(t, y)


def stability(tableau: ImplicitTableau, z: complex) -> complex:
    """R(z) = 1 + z b^T (I - z A)^-1 1, of a step of y' = lambda y with z = h lambda."""
    n = len(tableau.b)
    a = np.array([[*row, *[0.0] * (n - len(row))] for row in tableau.a])
    return 1.0 + z * np.array(tableau.b) @ np.linalg.solve(np.eye(n) - z * a, np.ones(n))


# ---------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("backward", [False, True])
@every_tableau
def test_order(tableau: ImplicitTableau, backward: bool) -> None:
    t = times(0.4, 0.0) if backward else times(0.0, 2.0)  # backward the problem is unstable
    y0, exact = kaps_exact(float(t[0])), kaps_exact(float(t[1]))
    length = float((t[1] - t[0]).abs())
    errors = []
    for steps in (20, 40) if tableau.order < 5 else (6, 12):  # before rounding shows
        ys = solve_implicit(kaps, y0, t, tableau.name, {"step_size": length / steps}, **TIGHT)
        errors.append(float((ys[-1] - exact).abs().max()))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert abs(slopes[-1] - tableau.order) < 0.15, (errors, slopes)


@every_tableau
def test_numbers_of_the_tableau(tableau: ImplicitTableau) -> None:
    assert math.isclose(sum(tableau.b), 1.0, abs_tol=1e-14)
    assert all(-1e-14 <= c <= 1.0 for c in tableau.c)
    assert all(tableau.a[i][i] >= 0.0 for i in range(len(tableau.b)))
    if tableau.error is not None:
        assert abs(sum(tableau.error)) < 1e-14
        assert tableau.error_order in (tableau.order, tableau.order + 1)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", PAIRS)
def test_error_follows_the_tolerance_and_outputs_do_not_cut_the_steps(method: str, backward: bool) -> None:
    t = torch.linspace(0.0, 0.4 if backward else 2.0, 6, dtype=torch.float64)
    t = t.flip(0) if backward else t
    tableau = IMPLICIT_TABLEAUS[method]
    exact = torch.stack([kaps_exact(float(x)) for x in t])
    errors = []
    for tol in (1e-3, 1e-6):
        ys = solve_implicit(kaps, exact[0], t, method, rtol=tol, atol=tol)
        errors.append(float((ys - exact).abs().max()))
        assert errors[-1] < 30 * tol ** (tableau.order / tableau.error_order)
    assert errors[1] < max(errors[0] / 10, 1e-5)
    many, one = Counted(kaps), Counted(kaps)
    solve_implicit(many, exact[0], t, method, rtol=1e-5, atol=1e-5)
    solve_implicit(one, exact[0], t[[0, -1]], method, rtol=1e-5, atol=1e-5)
    assert many.calls < 1.5 * one.calls + 100


def test_outputs_are_at_their_times_to_the_last_bit() -> None:
    """y' = 1 is solved exactly: what is off is the time."""
    t = torch.linspace(0.0, 1.0, 8, dtype=torch.float64) ** 2 / 3.0
    ys = solve_implicit(lambda t, y: torch.ones_like(y), times(0.0), t, "kvaerno3", rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ys[:, 0], t, rtol=1e-14, atol=1e-15)


@every_tableau
def test_each_time_ends_a_step(tableau: ImplicitTableau) -> None:
    """Reading the solution in between changes nothing where the steps end there anyway."""
    few = solve_implicit(kaps, kaps_exact(0.0), times(0.0, 0.5, 2.0), tableau.name, {"step_size": 0.25})
    many = solve_implicit(
        kaps, kaps_exact(0.0), torch.linspace(0.0, 2.0, 9, dtype=torch.float64), tableau.name, {"step_size": 9.0}
    )
    torch.testing.assert_close(many[[0, 2, 8]], few, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------------- stiffness


@every_tableau
def test_stability(tableau: ImplicitTableau) -> None:
    """lambda = -1e6 with a step of 0.1: |y| never grows, and L-stable methods get rid of it at once."""
    t = torch.linspace(0.0, 2.0, 21, dtype=torch.float64)
    y0 = times(1.0)
    ys = solve_implicit(lambda t, y: -1e6 * y, y0, t, tableau.name, {"step_size": 0.1}, **TIGHT)[:, 0]
    assert (ys.abs() <= 1.0 + 1e-9).all()
    factor = stability(tableau, -1e5).real
    assert math.isclose(float(ys[1]), factor, rel_tol=1e-6, abs_tol=1e-9)
    if abs(factor) < 0.5:
        assert ys[-1].abs() < 1e-10
    # A-stability: |R| <= 1 all along the imaginary axis and the negative one
    for z in (1e-3, 0.1, 1.0, 3.0, 10.0, 1e3, 1e6):
        assert abs(stability(tableau, 1j * z)) <= 1.0 + 1e-12
        assert abs(stability(tableau, -z)) <= 1.0
    if tableau.stiffly_accurate and tableau.name != "trapezoid":
        assert abs(stability(tableau, -1e9)) < 1e-3


@every_tableau
def test_stiff_forcing(tableau: ImplicitTableau) -> None:
    """Prothero and Robinson's problem from a point on the slow solution stays there, whatever the rate."""
    t = torch.linspace(0.0, 3.0, 31, dtype=torch.float64)
    ys = solve_implicit(
        lambda t, y: -1e6 * (y - torch.cos(t)) - torch.sin(t), times(1.0), t, tableau.name, {"step_size": 0.1}
    )
    assert (ys[:, 0] - t.cos()).abs().max() < 0.01


@pytest.mark.parametrize("method", PAIRS)
def test_robertson(method: str) -> None:
    """Robertson's reaction to t = 1e4; the reference is scipy's Radau at 1e-11."""
    func = Counted(robertson)
    ys = solve_implicit(func, times(1.0, 0.0, 0.0), times(0.0, 40.0, 1e4), method, rtol=1e-5, atol=1e-9)
    reference = torch.tensor(
        [
            [0.7158270687192778, 9.185534764568044e-06, 0.2841637457459582],
            [0.10730042853845029, 4.800166972603989e-07, 0.892699091444852],
        ],
        dtype=torch.float64,
    )
    error = ((ys[1:] - reference) / reference).abs().max()
    assert error < 1e-3
    assert (ys.sum(-1) - 1.0).abs().max() < 1e-6
    assert func.calls < 2500  # dopri5's stability needs a step of about 1.5e-3: 4e7 calls


def test_van_der_pol_needs_far_fewer_calls_than_an_explicit_pair() -> None:
    y0 = times(2.0, -2.0 / 3000.0)
    reference = torch.tensor(  # scipy's Radau at 1e-11
        [
            [2.0, -2.0 / 3000.0],
            [1.9993331481605643, -0.0006670372468523733],
            [-1.8636460036270692, 0.0007535432702362833],
        ],
        dtype=torch.float64,
    )
    calls = {}
    for method in ("kencarp4", "trbdf2"):
        func = Counted(van_der_pol)
        ys = solve_implicit(func, y0, times(0.0, 1.0, 1000.0), method, rtol=1e-4, atol=1e-4)
        assert (ys - reference).abs().max() < 2e-3
        calls[method] = func.calls
    explicit = Counted(van_der_pol)  # a thousandth of the way
    ys = fm.odeint(explicit, y0, times(0.0, 1.0), method="dopri5", rtol=1e-4, atol=1e-4)
    assert (ys[-1] - reference[1]).abs().max() < 1e-3
    assert max(calls.values()) < 3000
    assert max(calls.values()) < 1000 * explicit.calls / 100


# ---------------------------------------------------------------------- samples


class Stiffness:
    """Independent samples with a rate each; remembers the sizes of the states and times it saw."""

    def __init__(self, *rates: float) -> None:
        self.rates, self.seen = times(*rates)[:, None], set()

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.seen.add((tuple(t.shape), tuple(y.shape)))
        column = t[:, None] if t.dim() else t
        return -self.rates * (y**3 - torch.cos(column)) - torch.sin(column)


@pytest.mark.parametrize("method", [*PAIRS, "sdirk2"])
def test_samples_have_their_own_jacobians_and_steps(method: str) -> None:
    rates, y0 = (1.0, 1e5, 20.0), torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(3, 2)
    t = times(0.0, 0.4, 1.0)
    options = {"per_sample": True} if method in PAIRS else {"per_sample": True, "step_size": 0.1}
    func = Stiffness(*rates)
    together = solve_implicit(func, y0, t, method, options, rtol=1e-5, atol=1e-6)
    assert func.seen == {((3,), (3, 2))}
    for i, rate in enumerate(rates):
        alone = solve_implicit(Stiffness(rate), y0[i : i + 1], t, method, options, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-13, atol=1e-13)
    func = Stiffness(*rates)
    dense = solve_implicit(func, y0, t, method, {**options, "per_sample": False}, rtol=1e-5, atol=1e-6)
    assert func.seen == {((), (3, 2))}
    torch.testing.assert_close(together, dense, rtol=2e-4, atol=2e-4)


def test_a_failing_sample_leaves_the_others_alone() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y > 50.0, math.nan, y * y)

    y0 = times(0.5, 10.0, -1.0)[:, None]  # the second one is infinite at t = 0.1
    with pytest.warns(UserWarning, match=r"1 of 3 rows"):
        ys = solve_implicit(func, y0, times(0.0, 0.05, 1.0), "trbdf2", {"per_sample": True}, rtol=1e-5, atol=1e-7)
    assert torch.equal(ys.isnan()[:, :, 0].nonzero(), torch.tensor([[2, 1]]))
    torch.testing.assert_close(ys[2, [0, 2], 0], times(1.0, -0.5), rtol=1e-3, atol=0.0)


# ---------------------------------------------------------------------- failures


@every_tableau
def test_a_field_without_values_ends_the_solve(tableau: ImplicitTableau) -> None:
    func = Counted(lambda t, y: y * math.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        solve_implicit(func, times(1.0, 2.0), times(0.0, 1.0), tableau.name, {"step_size": 0.1})
    if tableau.error is not None:
        with pytest.warns(UserWarning, match="not finite"):
            ys = solve_implicit(func, times(1.0, 2.0), times(0.0, 1.0), tableau.name)
        assert ys[1].isnan().all()
        assert torch.equal(ys[0], times(1.0, 2.0))
        with pytest.warns(UserWarning, match="not finite"), pytest.raises(RuntimeError, match="gradient"):
            solve_implicit(func, times(1.0, 2.0).requires_grad_(), times(0.0, 1.0), tableau.name)
    assert func.calls < 300


@pytest.mark.parametrize("method", PAIRS)
def test_values_that_end_on_the_way(method: str) -> None:
    func = Counted(lambda t, y: torch.sqrt(0.5 - t) - y)
    with pytest.warns(UserWarning, match="not finite|min_step"):
        ys = solve_implicit(func, times(1.0), times(0.0, 0.4, 1.0), method, rtol=1e-5, atol=1e-5)
    assert ys[1].isfinite().all()
    assert ys[2].isnan().all()
    assert func.calls < 5000


def test_limits_of_the_steps() -> None:
    func = Counted(kaps)
    with pytest.warns(UserWarning, match="max_steps=3"):
        ys = solve_implicit(func, kaps_exact(0.0), times(0.0, 2.0), "trbdf2", {"max_num_steps": 3})
    assert ys[1].isnan().all()
    with pytest.warns(UserWarning, match="min_step"):
        solve_implicit(func, kaps_exact(0.0), times(0.0, 2.0), "trbdf2", {"min_step": 0.5})
    free, bound = Counted(kaps), Counted(kaps)
    solve_implicit(free, kaps_exact(0.0), times(0.0, 2.0), "trbdf2", rtol=1e-2, atol=1e-2)
    solve_implicit(bound, kaps_exact(0.0), times(0.0, 2.0), "trbdf2", {"max_step": 0.01}, rtol=1e-2, atol=1e-2)
    assert bound.calls > 800 > free.calls


def test_newton_that_does_not_converge() -> None:
    """No real solution of a step of 10: y' = 1 + y^2 is infinite at t = pi / 2."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return 1.0 + y * y

    with pytest.raises(RuntimeError, match=r"'implicit_euler': the step from t = 0 to 10 .*step_size"):
        solve_implicit(func, times(0.0), times(0.0, 10.0), "implicit_euler")
    # a smaller step has one
    ys = solve_implicit(func, times(0.0), times(0.0, 1.0), "trbdf2", {"first_step": 1.0}, rtol=1e-7, atol=1e-7)
    assert math.isclose(float(ys[-1]), math.tan(1.0), rel_tol=1e-4)


def test_full_newton_where_the_first_jacobian_misleads() -> None:
    """y' = -1000 y^5 from y = 3: the Jacobian of the start is 3^4 times that near the solution."""
    ys = solve_implicit(lambda t, y: -1000.0 * y**5, times(3.0), times(0.0, 1.0), "implicit_euler", **TIGHT)
    y = float(ys[-1])
    assert math.isclose(y + 1000.0 * y**5, 3.0, rel_tol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"y0": torch.zeros(3, dtype=torch.float16)}, TypeError, "float32 or float64"),
        ({"y0": torch.zeros(MAX_SIZE + 1)}, ValueError, "per_sample"),
        ({"y0": torch.zeros(()), "options": {"per_sample": True}}, ValueError, "dimension"),
        ({"options": {"step_size": -1.0}}, ValueError, "step_size"),
        ({"field": lambda t, y: y[:1]}, ValueError, "the state's shape"),
        ({"field": lambda t, y: y.long()}, TypeError, "floating output"),
        ({"method": "trbdf2", "norm": lambda e: e}, ValueError, "norm"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {"field": lambda t, y: -y, "y0": torch.ones(3), "method": "sdirk2"}
    with pytest.raises(error, match=match):
        solve_implicit(**{"t": torch.tensor([0.0, 1.0]), **arguments, **change})


# ---------------------------------------------------------------------- through odeint


@pytest.mark.parametrize("method", IMPLICIT)
def test_through_odeint(method: str) -> None:
    assert method in IMPLICIT_TABLEAUS
    t, y0 = torch.linspace(0.0, 2.0, 5, dtype=torch.float64), kaps_exact(0.0)
    options = {"step_size": 0.05}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ys = fm.odeint(kaps, y0, t, method=method, options=options, rtol=1e-6, atol=1e-6)
    assert ys.shape == (5, 2)
    assert (ys[-1] - kaps_exact(2.0)).abs().max() < 0.02

    def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        derivative = kaps(t, torch.cat(y))
        return derivative[:1], derivative[1:]

    parts = fm.odeint(pair, (y0[:1], y0[1:]), t, method=method, options=options, rtol=(1e-6, 1e-6), atol=1e-6)
    torch.testing.assert_close(torch.cat(parts, -1), ys, rtol=1e-13, atol=1e-13)
    turning = fm.odeint(lambda t, y: 1j * y, times(1.0).to(torch.complex128), t, method=method, options=options)
    assert turning.is_complex()
    assert (turning[:, 0] - torch.exp(1j * t)).abs().max() < 0.06
    with pytest.raises(ValueError, match="per_sample"):
        fm.odeint(pair, (y0[:1], y0[1:]), t, method=method, options={"per_sample": True})
    with pytest.warns(UserWarning, match="'grid_constructor'"):
        fm.odeint(kaps, y0, t, method=method, options={**options, "grid_constructor": None})


def test_tolerances_and_norm_through_odeint() -> None:
    errors = []
    for tol, factor in ((1e-2, 1.0), (1e-6, 1.0), (1e-2, 1e4)):
        norm = {"norm": lambda e, factor=factor: factor * e.square().mean().sqrt()}
        ys = fm.odeint(kaps, kaps_exact(0.0), times(0.0, 2.0), method="kencarp4", rtol=tol, atol=tol, options=norm)
        errors.append(float((ys[-1] - kaps_exact(2.0)).abs().max()))
    assert errors[1] < 1e-5 < errors[0]
    assert errors[2] < errors[0] / 20


def test_float32_and_small_cases() -> None:
    y0 = kaps_exact(0.0).float()
    for method in IMPLICIT:
        ys = fm.odeint(kaps, y0, torch.tensor([0.0, 1.0, 2.0]), method=method, options={"step_size": 0.02})
        assert ys.dtype == torch.float32
        assert (ys[-1].double() - kaps_exact(2.0)).abs().max() < 0.01
    ys = fm.odeint(kaps, y0, torch.tensor([0.0, 2.0]), method="kencarp4")
    assert (ys[-1].double() - kaps_exact(2.0)).abs().max() < 2e-4
    one = fm.odeint(kaps, y0, torch.tensor([0.0]), method="trbdf2")
    assert torch.equal(one, y0[None])
    empty = solve_implicit(lambda t, y: y, torch.zeros(0, 2), torch.tensor([0.0, 1.0]), "trbdf2", {"per_sample": True})
    assert empty.shape == (2, 0, 2)
    constant = solve_implicit(lambda t, y: torch.ones_like(y), y0, torch.tensor([0.0, 1.0]), "trbdf2")
    torch.testing.assert_close(constant[-1], y0 + 1.0, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("method", ["trapezoid", "trbdf2", "radauIIA5"])
@pytest.mark.parametrize("gradient", [False, True])
def test_perturbed_steps_see_their_ends_from_inside(method: str, gradient: bool) -> None:
    seen = []

    def jump(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t))
        return -y if t < 0.5 else 2.0 * y

    y0, t = torch.ones(2, dtype=torch.float64, requires_grad=gradient), times(0.0, 1.0)
    ys = solve_implicit(jump, y0, t, method, {"step_size": 0.05, "perturb": True}, rtol=1e-10, atol=1e-10)
    assert not {0.0, 0.5, 1.0} & set(seen)
    torch.testing.assert_close(ys[-1], y0 * math.exp(0.5), rtol=1e-2 if method != "radauIIA5" else 1e-7, atol=0.0)


def test_a_backward_pass_that_cannot_be_batched() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y * y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return torch.from_numpy(2.0 * y.detach().numpy() * grad.numpy())

    y0, t = times(1.0, 2.0), times(0.0, 1.0)
    ours = solve_implicit(lambda t, y: -Square.apply(y), y0, t, "sdirk2")
    torch.testing.assert_close(ours, solve_implicit(lambda t, y: -y * y, y0, t, "sdirk2"), rtol=1e-13, atol=1e-13)
    mixed = solve_implicit(lambda t, y: -fm.combine([y, y.flip(0)], [2.0, 1.0]), y0, t, "sdirk2")
    plain = solve_implicit(lambda t, y: -2.0 * y - y.flip(0), y0, t, "sdirk2")
    torch.testing.assert_close(mixed, plain, rtol=1e-13, atol=1e-13)
