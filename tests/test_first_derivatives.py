"""Derivatives that are not to be had: an error, never a part left out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from odeint_problems import D, times
from torch import Tensor

import fmkernels as fm

Solve = Callable[[Tensor, Tensor], Tensor]


def _reversible(x: Tensor, a: Tensor) -> Tensor:
    options = {"step_size": 0.05, "reversible": True}
    return fm.odeint(lambda t, y: a * y, x, times(0.0, 1.0), method="rk4", options=options)[-1]


def _reversible_sample(x: Tensor, a: Tensor) -> Tensor:
    return fm.sample(lambda x, t: a * x, x, steps=20, method="rk4", gradient="reversible")[0]


def _adjoint(x: Tensor, a: Tensor) -> Tensor:
    return fm.odeint_adjoint(lambda t, y: a * y, x, times(0.0, 1.0), adjoint_params=(a,))[-1]


def _implicit(x: Tensor, a: Tensor) -> Tensor:
    return fm.odeint(lambda t, y: a * y, x, times(0.0, 1.0), method="gl4", options={"step_size": 0.05})[-1]


def _event_time(x: Tensor, a: Tensor) -> Tensor:
    return fm.odeint_event(lambda t, y: a * y, x, times(0.0), event_fn=lambda t, y: y.sum() - 2.0)[0]


def _event_state(x: Tensor, a: Tensor) -> Tensor:
    solution = fm.odeint_event(lambda t, y: a * y, x, times(0.0), event_fn=lambda t, y: y.sum() + t - 2.0)[1]
    return solution[-1]


@pytest.mark.parametrize("solve", [_reversible, _reversible_sample, _adjoint, _implicit, _event_time, _event_state])
def test_a_gradient_penalty_is_an_error(solve: Solve) -> None:
    x, a = torch.tensor([1.3], dtype=D, requires_grad=True), torch.tensor(0.7, dtype=D, requires_grad=True)
    loss = solve(x, a).pow(3).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(grad, expected)
    # beside a loss that has a derivative, and where what is unused is allowed: nothing hides the missing part
    penalised = grad.square().sum() + loss
    for leaf in (x, a):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(penalised, leaf, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        penalised.backward()


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_recorded_solves_have_every_derivative(method: str) -> None:
    x, a = torch.tensor([1.3], dtype=D, requires_grad=True), torch.tensor(0.7, dtype=D, requires_grad=True)
    options = {"step_size": 0.01} if method == "rk4" else {}
    y = fm.odeint(lambda t, y: a * y, x, times(0.0, 1.0), method=method, options=options, rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(y[-1].pow(3).sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(grad.square().sum(), a)
    slope = 3.0 * x.detach() ** 2 * torch.exp(3.0 * a.detach())
    torch.testing.assert_close(got, (2.0 * slope * 3.0 * slope).sum(), rtol=1e-7, atol=0.0)


def test_what_transforms_hide_is_told() -> None:
    solution = fm.odeint_dense(lambda t, y: -y, torch.ones(2), 0.0, 1.0)
    with pytest.raises(ValueError, match="t: expected all times in one tensor"):
        torch.func.vmap(solution)(torch.tensor([0.1, 0.5]))
    torch.testing.assert_close(torch.func.jacfwd(solution)(torch.tensor(0.5)), -solution(0.5), rtol=1e-5, atol=0.0)
    for transformed in (torch.func.vmap, torch.func.grad):
        with pytest.raises(RuntimeError, match=r"do not run within torch.func's transforms"):
            transformed(lambda x: fm.log_prob(lambda x, t: -x, x, gradient=True).log_prob.sum())(torch.randn(3, 2, 2))


def test_what_is_not_recorded_is_told_within_grad() -> None:
    """The derivative asked for may be that of parameters the network closes over, which nothing shows."""
    weight, x = torch.tensor(0.5, dtype=D), torch.rand(3, 2, dtype=D)

    def sampled(w: Tensor, **options: object) -> Tensor:
        return fm.sample(lambda x, t: w * x, x, **options)[0].sum()

    def density(w: Tensor, **options: object) -> Tensor:
        return fm.log_prob(lambda x, t: w * x, x, mode="forward", method="rk4", steps=3, **options).log_prob.sum()

    for function, method in ((sampled, {"steps": 4}), (sampled, {"method": "dopri5"}), (density, {})):
        for transform in (torch.func.grad, torch.func.jacrev):
            with pytest.raises(ValueError, match=r"gradient: expected .* within torch.func's grad"):
                transform(lambda w, function=function, method=method: function(w, **method))(weight)

        def constant(w: Tensor, function: object = function, method: object = method) -> Tensor:
            with torch.no_grad():
                found = function(w.detach(), **method)
            return w * found

        torch.testing.assert_close(torch.func.grad(constant)(weight), constant(torch.ones_like(weight) * 0.5) / 0.5)
    for function, options in ((sampled, {"steps": 4, "gradient": "direct"}), (density, {"gradient": True})):
        step = 1e-6
        slope = (function(weight + step, **options) - function(weight - step, **options)) / (2 * step)
        got = torch.func.grad(lambda w, function=function, options=options: function(w, **options))(weight)
        torch.testing.assert_close(got, slope, rtol=1e-6, atol=0.0)


def test_a_reversible_solve_refuses_what_it_would_leave_out() -> None:
    x = torch.rand(2, 2, dtype=D)
    leaf = torch.tensor(0.5, dtype=D, requires_grad=True)
    made = leaf * 1.0  # a hypernetwork's output

    def ode(w: Tensor) -> Tensor:
        options = {"step_size": 0.25, "reversible": True}
        return fm.odeint(lambda t, y: w * y, x, times(0.0, 1.0), method="rk4", options=options)[-1].sum()

    def flow(w: Tensor) -> Tensor:
        return fm.sample(lambda x, t: w * x, x, method="rk4", steps=4, gradient="reversible")[0].sum()

    def given(w: Tensor) -> Tensor:
        options = {"method": "rk4", "steps": 4, "gradient": "reversible"}
        return fm.sample(lambda x, t, w: w * x, x, w=w, shared=("w",), **options)[0].sum()

    for solve in (ode, flow):
        (expected,) = torch.autograd.grad(solve(leaf), leaf)
        with pytest.raises(RuntimeError, match="got one computed before the solve"):
            solve(made)
        with pytest.raises(RuntimeError, match="got one computed before the solve"):
            torch.autograd.functional.hessian(solve, leaf.detach())
        (of_made,) = torch.autograd.grad(given(made), made)  # an argument of the network is seen
        torch.testing.assert_close(of_made, expected, rtol=1e-3, atol=0.0)
        with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
            solve(forward_ad.make_dual(leaf.detach(), torch.ones((), dtype=D)))


def test_milstein_refuses_transforms() -> None:
    y0, t = torch.rand(1, 2, dtype=D), times(0.0, 0.5, 1.0)

    def solve(w: Tensor, method: str = "milstein") -> Tensor:
        options = {"seed": 1, "noise": "diagonal", "method": method}
        return fm.sdeint(lambda t, y: -y, lambda t, y: torch.sin(w * y), y0, t, **options)[-1].sum()

    weight = torch.tensor(0.7, dtype=D)
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="method 'milstein' with noise='diagonal' does not run within"):
            transform(solve)(weight)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="method 'milstein'"):
        solve(forward_ad.make_dual(weight, torch.ones_like(weight)))
    slope = (solve(weight + 1e-6) - solve(weight - 1e-6)) / 2e-6
    leaf = weight.clone().requires_grad_()
    (got,) = torch.autograd.grad(solve(leaf), leaf)
    torch.testing.assert_close(got, slope, rtol=1e-6, atol=0.0)


def test_a_reversible_solve_refuses_a_field_that_draws() -> None:
    x = torch.rand(2, 2, dtype=D, requires_grad=True)
    for solve in (
        lambda f: fm.sample(lambda x, t: f(x), x, method="rk4", steps=4, gradient="reversible"),
        lambda f: fm.odeint(lambda t, y: f(y), x, times(0.0, 1.0), method="rk4", options={"reversible": True}),
    ):
        with pytest.raises(RuntimeError, match="draws no random numbers"):
            solve(lambda x: torch.dropout(x, 0.5, True))
        solve(lambda x: torch.dropout(x, 0.5, False))


@pytest.mark.parametrize("method", ["euler", "heun2", "rk4", "ab2", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_checkpoints_of_a_network_that_is_a_gradient_itself(method: str, steps: int) -> None:
    """An energy's: its backward pass within a segment computes the segment again."""
    x = torch.rand(4, 3, dtype=D)

    def solve(w: Tensor, gradient: str) -> Tensor:
        def model(x: Tensor, t: Tensor) -> Tensor:
            with torch.enable_grad():
                z = x if x.requires_grad else x.detach().requires_grad_()
                (force,) = torch.autograd.grad(torch.tanh(z @ w).pow(2).sum(), z, create_graph=True)
            return force + torch.sin(x @ w) * t[:, None]

        return fm.sample(model, x, method=method, steps=steps, gradient=gradient)[0].pow(3).sum()

    w = torch.rand(3, 3, dtype=D, requires_grad=True)
    grads = [torch.autograd.grad(solve(w, gradient), w)[0] for gradient in ("direct", "checkpoint")]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams"])
def test_vmap_over_what_a_function_closes_over_without_gradients(method: str) -> None:
    y0, w, t = torch.rand(4, 3), torch.rand(5, 3, 3), torch.tensor([0.0, 0.5, 1.0])

    def solve(w: Tensor) -> Tensor:
        return fm.odeint(lambda t, y: torch.tanh(y @ w), y0, t, method=method)

    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(solve)(w), torch.stack([solve(one) for one in w]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cached", [True, False])
def test_parameters_that_autocast_has_cast_before_are_parameters(cached: bool) -> None:
    net, x = torch.nn.Linear(3, 3), torch.rand(4, 3)
    grads = []
    for gradient in ("direct", "reversible"):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
            net(x)
            samples, _ = fm.sample(lambda x, t: net(x), x, method="rk4", steps=4, gradient=gradient)
        grads.append(torch.autograd.grad(samples.sum(), net.weight)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=3e-2, atol=3e-2)


def test_conditions_of_a_reversible_solve_have_their_gradient_once() -> None:
    """An encoder that is a part of the network, whose output is an argument; an argument made of another."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.layer = (torch.nn.Linear(3, 3, dtype=D) for _ in range(2))

        def forward(self, x: Tensor, t: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return torch.tanh(self.layer(x) + first * second)

    net, data, x = Network(), torch.rand(4, 3, dtype=D), torch.rand(4, 3, dtype=D)
    leaf = torch.rand(4, 3, dtype=D, requires_grad=True)
    grads = []
    for gradient in ("direct", "reversible"):
        first = net.encoder(data) + leaf
        given = {"first": first, "second": first.sin()}
        samples, _ = fm.sample(net, x, method="rk4", steps=20, gradient=gradient, **given)
        grads.append(torch.autograd.grad(samples.square().mean(), [leaf, *net.parameters()]))
    for got, want in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_parameters_of_an_adjoint_are_apart() -> None:
    raw = torch.rand(2, dtype=D, requires_grad=True)
    made = raw.sin()
    x, t = torch.rand(2, dtype=D), times(0.0, 1.0)
    for params in ((made, raw), (raw, made), (made, made.exp())):
        with pytest.raises(
            ValueError, match=r"adjoint_params: expected tensors of which none is computed from another"
        ):
            fm.odeint_adjoint(lambda t, y: made * y, x, t, adjoint_params=params)
    first, second = raw.unbind()
    y = fm.odeint_adjoint(lambda t, y: first * y + second, x, t, adjoint_params=(first, second))
    want = fm.odeint(lambda t, y: raw[0] * y + raw[1], x, t)
    got, want = (torch.autograd.grad(z[-1].sum(), raw)[0] for z in (y, want))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("solve", ["sample", "odeint"])
def test_the_way_back_runs_under_the_autocast_of_the_way_there(solve: str) -> None:
    net, x, seen = torch.nn.Linear(3, 3), torch.rand(4, 3), []

    def field(x: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return net(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        if solve == "sample":
            y = fm.sample(lambda x, t: field(x), x, method="rk4", steps=4, gradient="reversible")[0]
        else:
            y = fm.odeint_adjoint(
                lambda t, y: field(y), x, torch.tensor([0.0, 1.0]), adjoint_params=tuple(net.parameters()), rtol=1e-2
            )
    there = len(seen)
    y.float().sum().backward()
    assert len(seen) > there
    assert set(seen) == {(True, torch.bfloat16)}


@pytest.mark.parametrize("kept", [False, True])
def test_checkpointed_solves_that_are_dropped_are_freed(kept: bool) -> None:
    weight, states = torch.tensor(0.5, requires_grad=True), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        states.append(weakref.ref(x))
        return weight * x

    def solves() -> None:
        for steps in (1, 9):
            for trajectory in (False, True):
                y, _ = fm.sample(
                    model, torch.rand(3, 2), steps=steps, gradient="checkpoint", return_trajectory=trajectory
                )
                if kept:
                    y.sum().backward(retain_graph=True)
        for method, options in (("rk4", {"step_size": 0.1, "checkpoint": True}), ("dopri5", {"checkpoint": True})):
            y = fm.odeint(
                lambda t, y: model(y, t), torch.rand(3, 2), torch.tensor([0.0, 1.0]), method=method, options=options
            )
            if kept:
                y.sum().backward(retain_graph=True)

    solves()
    fm.clear_caches()  # which keep steppers with states of their own
    gc.collect()
    assert not [ref for ref in states if ref() is not None]
