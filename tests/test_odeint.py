"""`fm.odeint` and `fm.odeint_dense`: states, tuples, complex numbers, errors, dense output."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from odeint_problems import D, Linear, Net, spiral, spiral_y0, times
from torch import Tensor

import fmkernels as fm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_state_without_dimensions(method: str) -> None:
    y = fm.odeint(lambda t, y: -y, torch.tensor(2.0, dtype=D), torch.linspace(0, 1, 21, dtype=D), method=method)
    assert y.shape == (21,)
    assert abs(float(y[-1]) - 2.0 * math.exp(-1.0)) < 1e-6


@pytest.mark.parametrize("method", ["dopri5", "rk4", "reversible"])
def test_one_time_gives_the_start(method: str) -> None:
    options = {"reversible": True} if method == "reversible" else {}
    y0 = torch.randn(2, 3, requires_grad=True)
    y = fm.odeint(lambda t, y: y, y0, torch.tensor([0.5]), method=method.replace("reversible", "rk4"), options=options)
    assert y.shape == (1, 2, 3)
    assert torch.equal(y[0], y0)
    (grad,) = torch.autograd.grad(y.sum(), y0)
    assert torch.equal(grad, torch.ones_like(y0))


@pytest.mark.parametrize("method", ["dopri5", "euler"])
def test_an_empty_state(method: str) -> None:
    y = fm.odeint(lambda t, y: y, torch.zeros(0, 3), times(0.0, 0.5, 1.0), method=method)
    assert y.shape == (3, 0, 3)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_tuples(method: str) -> None:
    a, b = torch.ones(2, 3), torch.full((4,), 2.0, dtype=D)

    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert y[0].shape == (2, 3)
        assert y[1].shape == (4,)
        return -y[0], y[1] * y[0].sum() / 6.0

    t = torch.linspace(0.0, 1.0, 21, dtype=D)
    x, y = fm.odeint(func, (a, b), t, method=method, rtol=(1e-6, 1e-9), atol=[1e-6, 1e-9])
    assert x.shape == (21, 2, 3)
    assert y.shape == (21, 4)
    assert abs(float(x[-1, 0, 0]) - math.exp(-1.0)) < 1e-5
    assert abs(float(y[-1, 0]) - 2.0 * math.exp(1.0 - math.exp(-1.0))) < 1e-5


def test_tuple_tolerances_are_of_each_tensor() -> None:
    def calls(**tolerances: Any) -> int:
        count = 0

        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            nonlocal count
            count += 1
            return torch.cos(40.0 * t) * torch.ones_like(y[0]), -y[1]

        fm.odeint(func, (torch.zeros(1, dtype=D), torch.ones(1, dtype=D)), times(0.0, 2.0), **tolerances)
        return count

    loose = calls(rtol=(1e-1, 1e-6), atol=(1e-1, 1e-6))
    assert loose < calls(rtol=1e-6, atol=1e-6) / 2
    assert loose == calls(rtol=torch.tensor([1e-1, 1e-6], dtype=D), atol=torch.tensor([1e-1, 1e-6], dtype=D))
    with pytest.raises(ValueError, match="rtol: expected a number, or 2 of them"):
        calls(rtol=(1e-3,) * 3)


def test_a_norm_of_the_users() -> None:
    shapes = []

    def norm(ratio: Any) -> Tensor:
        shapes.append([x.shape for x in ratio])
        return torch.stack([x.abs().max() for x in ratio]).max()

    fm.odeint(lambda t, y: (-y[0], y[1]), (torch.ones(2, 3), torch.ones(4)), times(0.0, 1.0), options={"norm": norm})
    assert shapes[0] == [(2, 3), (4,)]


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("tuples", [False, True])
def test_complex_states(method: str, tuples: bool) -> None:
    y0 = torch.tensor([1.0 + 0.5j, -2.0j], dtype=torch.complex128, requires_grad=True)
    t = torch.linspace(0.0, 1.0, 41, dtype=D)
    rate = 0.3 + 2.0j

    def func(t: Tensor, y: Any) -> Any:
        assert (y[0] if tuples else y).dtype is torch.complex128
        return (rate * y[0],) if tuples else rate * y

    y = fm.odeint(func, (y0,) if tuples else y0, t, method=method, rtol=1e-8, atol=1e-8)
    y = y[0] if tuples else y
    assert y.dtype is torch.complex128
    exact = y0 * torch.exp(rate * t[:, None])
    assert (y - exact).abs().max() < 1e-5
    grads = [torch.autograd.grad((x[-1].abs() ** 2).sum(), y0, retain_graph=True)[0] for x in (y, exact)]
    torch.testing.assert_close(*grads, rtol=2e-6, atol=2e-6)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("t", [[0.0, 1.0, 0.5], [0.0, 0.0], [0.0, math.nan], [0.0, math.inf], [1.0, 1.0, 0.0]], ids=str)
def test_bad_times(t: list[float]) -> None:
    with pytest.raises(ValueError, match="t: expected finite, strictly increasing or decreasing"):
        fm.odeint(spiral, spiral_y0(), times(*t))


def test_bad_arguments() -> None:
    y0, t = spiral_y0(), times(0.0, 1.0)
    with pytest.raises(TypeError, match="t: expected a floating tensor"):
        fm.odeint(spiral, y0, torch.arange(3))
    with pytest.raises(ValueError, match="t: expected times of shape"):
        fm.odeint(spiral, y0, torch.zeros(2, 2))
    with pytest.raises(TypeError, match="func: expected a function"):
        fm.odeint(3, y0, t)
    with pytest.raises(TypeError, match="y0: expected a floating or complex"):
        fm.odeint(spiral, torch.arange(3), t)
    with pytest.raises(TypeError, match="y0: expected a tensor or a tuple"):
        fm.odeint(spiral, 3.0, t)
    with pytest.raises(ValueError, match="method: expected one of"):
        fm.odeint(spiral, y0, t, method="magic")


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "explicit_adams", "reversible"])
def test_bad_outputs_of_func(method: str, gradient: bool) -> None:
    y0, t = torch.ones(2, 3, dtype=D, requires_grad=gradient), times(0.0, 1.0)
    options = {"reversible": True} if method == "reversible" else {}
    method = method.replace("reversible", "rk4")
    for func, error in (
        (lambda t, y: y[:1], ValueError),
        (lambda t, y: y.long(), TypeError),
        (lambda t, y: (y, y), TypeError),
        (lambda t, y: None, TypeError),
    ):
        with pytest.raises(error, match=r"^func: "):
            fm.odeint(func, y0, t, method=method, options=options)
    with pytest.raises(ValueError, match="func: expected 2 tensors"):
        fm.odeint(lambda t, y: (y[0],), (y0, y0), t, method=method, options=options)
    with pytest.raises(ValueError, match="func: output 1"):
        fm.odeint(lambda t, y: (y[0], y[1][:1]), (y0, y0), t, method=method, options=options)


def test_unknown_options_warn() -> None:
    y0, t = spiral_y0(), times(0.0, 0.1)
    with pytest.warns(UserWarning, match="method 'dopri5' has no 'step_size'"):
        fm.odeint(spiral, y0, t, options={"step_size": 0.1})
    with pytest.warns(UserWarning, match="method 'rk4' has no 'max_step', 'wind'") as caught:
        fm.odeint(spiral, y0, t, method="rk4", options={"max_step": 0.1, "wind": 3})
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.odeint(spiral, y0, t, options={"dtype": D, "first_step": 0.01})
        fm.odeint(spiral, y0, t, method="rk4", options={"perturb": True, "norm": None})


# ---------------------------------------------------------------------- dense output


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_odeint_dense(direction: float) -> None:
    problem, net = Linear(), Net()
    solution = fm.odeint_dense(problem, problem.y0, 0.0, direction, rtol=1e-9, atol=1e-9)
    t = direction * torch.rand(5, 2, dtype=D).sort(0).values
    y = solution(t)
    assert y.shape == (5, 2, 4, 3)
    ordered = torch.cat([times(0.0), direction * t.reshape(-1).abs().sort().values])
    torch.testing.assert_close(solution(ordered), problem.exact(ordered), rtol=0.0, atol=2e-8)
    assert solution(direction).shape == (4, 3)
    with pytest.raises(ValueError, match="t: expected times from"):
        solution(1.1 * direction)
    y0 = torch.randn(2, 2, dtype=D, requires_grad=True)
    t = direction * times(0.0, 0.3, 0.9, 1.0)
    pairs = (
        fm.odeint(net, y0, t, rtol=1e-9, atol=1e-9),
        fm.odeint_dense(net, y0, 0.0, direction, rtol=1e-9, atol=1e-9)(t),
    )
    torch.testing.assert_close(*pairs, rtol=1e-13, atol=1e-13)
    grads = [torch.autograd.grad((y**2).sum(), [y0, *net.parameters()]) for y in pairs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ["euler", "explicit_adams", "dopri5", "implicit_euler"])
def test_torch_compile_goes_on_around_it(method: str) -> None:
    def solve(y: Tensor, t: Tensor) -> Tensor:
        return 2.0 * fm.odeint(lambda t, y: torch.tanh(y) * torch.cos(t), y + 1.0, t, method=method)

    torch._dynamo.reset()
    fm.clear_caches()
    y0, t = torch.randn(4, 3, dtype=torch.float64), torch.linspace(0, 1, 6, dtype=torch.float64)
    compiled = torch.compile(solve, backend="eager")
    torch.testing.assert_close(compiled(y0, t), solve(y0, t))
    torch.testing.assert_close(compiled(y0, t * 0.5), solve(y0, t * 0.5))


@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_euler"])
def test_lazy_conjugates_and_negatives(method: str) -> None:
    z = torch.randn(2, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (0.5j * y.resolve_conj()).resolve_conj()

    def lazy(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (0.5j * y).conj().resolve_conj().conj()

    expected = fm.odeint(field, z.conj().resolve_conj(), t, method=method)
    assert z.conj().is_conj()
    for f, start in ((field, z.conj()), (lazy, z.conj().resolve_conj()), (lazy, z.conj())):
        torch.testing.assert_close(fm.odeint(f, start, t, method=method), expected)
    pair = fm.odeint(lambda t, y: (lazy(t, y[0]), -y[1]), (z.conj(), z.conj().imag), t, method=method)
    torch.testing.assert_close(pair[0], expected, rtol=1e-5, atol=1e-5)
    # its own conjugate, and a parameter's
    weight = torch.tensor([0.3 - 0.2j], dtype=torch.complex128, requires_grad=True)
    grads = []
    for lazily in (True, False):
        rate = weight.conj() if lazily else weight.conj().resolve_conj()
        y0 = z.detach().requires_grad_()
        ys = fm.odeint_adjoint(lambda t, y, r=rate: r * y, y0, t, adjoint_params=(rate,))
        grads.append(torch.autograd.grad(ys.abs().sum(), [y0, weight]))
    torch.testing.assert_close(*grads)
