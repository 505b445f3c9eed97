"""Whose memory a tensor is: networks that return their own buffers, callers who keep what they were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels.solvers.methods import registry as methods

FIXED = methods.names()
# below and above the sizes at which outputs are copied, and beyond which they are written through the operation
SHAPES = [(3, 3), (3, 1400)]


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(2.0 * x) + t.reshape(-1, 1).to(x.dtype)


class StaticBuffer:
    """Returns one buffer at each call, as a captured graph or an inference engine does."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.buffer is None:
            self.buffer = torch.empty_like(x)
        return self.buffer.copy_(velocity(x, t))

    expected = staticmethod(velocity)


class ViewOfStaticBuffer(StaticBuffer):
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return super().__call__(x, t).detach().view(-1).view(x.shape)


class NumpyBuffer:
    """A new tensor at each call, of one array."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.array is None:
            self.array = np.empty(tuple(x.shape), np.float32)
        self.array[...] = velocity(x, t).numpy()
        return torch.from_numpy(self.array)

    expected = staticmethod(velocity)


class Parameter:
    def __init__(self) -> None:
        self.value = torch.nn.Parameter(torch.tensor([0.5]))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.value.expand(x.shape)

    def expected(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 0.5)


class WholeParameter(Parameter):
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.value.shape != x.shape:
            self.value = torch.nn.Parameter(torch.full_like(x, 0.5))
        return self.value


class Identity:
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return x

    def expected(self, x: Tensor, t: Tensor) -> Tensor:
        return x.clone()


class ViewOfInput(Identity):
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return x.view(-1).view(x.shape)


class Transposed:
    """A view of its input with other strides."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return x.t() if x.shape[0] == x.shape[1] else x

    def expected(self, x: Tensor, t: Tensor) -> Tensor:
        return self(x, t).clone()


NETWORKS = [
    StaticBuffer,
    ViewOfStaticBuffer,
    NumpyBuffer,
    Parameter,
    WholeParameter,
    Identity,
    ViewOfInput,
    Transposed,
]


def solve(model: Callable[..., Tensor], x: Tensor, method: Any, **options: Any) -> tuple[Tensor, fm.SampleResult]:
    torch.manual_seed(0)
    return fm.sample(model, x, method=method, steps=7, **options)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", FIXED)
def test_any_method_with_any_owner_of_the_output(method: str, network: type) -> None:
    for shape in SHAPES:
        x = torch.linspace(-1.0, 1.0, shape[0] * shape[1]).reshape(shape)
        start = x.clone()
        model = network()
        samples, result = solve(model, x, method, return_trajectory=True)
        expected, other = solve(model.expected, x, method, return_trajectory=True)
        torch.testing.assert_close(samples, expected, rtol=0.0, atol=1e-6)
        torch.testing.assert_close(result.trajectory, other.trajectory, rtol=0.0, atol=1e-6)
        assert torch.equal(solve(model, x, method)[0], samples)  # without a trajectory
        assert torch.equal(x, start)
        # what was handed out stays as it is
        held = [samples, result.trajectory, result.trajectory[-1]]
        kept = [tensor.clone() for tensor in held]
        solve(model, x + 1.0, method, return_trajectory=True)
        samples.zero_()
        assert all(torch.equal(a, b) for a, b in zip(held[1:], kept[1:], strict=True))


@pytest.mark.parametrize("method", FIXED)
def test_states_given_to_a_callback_are_its_own(method: str) -> None:
    for shape in SHAPES:
        x = torch.rand(shape)
        kept: list[Tensor] = []
        copies: list[Tensor] = []

        def keep(step: int, t: float, state: Tensor) -> None:
            kept.append(state)  # noqa: B023
            copies.append(state.clone())  # noqa: B023

        samples, result = solve(velocity, x, method, callback=keep, return_trajectory=True)
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
        assert torch.equal(torch.stack(kept), result.trajectory[1:])
        # and are nothing of the solve's
        spoilt, _ = solve(velocity, x, method, callback=lambda step, t, state: state.fill_(7.0))
        assert torch.equal(spoilt, samples)


@pytest.mark.parametrize("method", FIXED)
def test_a_network_that_writes_into_its_input_is_told(method: str) -> None:
    for columns in (2, 1400):
        with pytest.raises(ValueError, match="model: expected a function that leaves its input as it is"):
            solve(lambda x, t: x.mul_(0.5), torch.rand(3, columns), method)
        solve(lambda x, t: x.clone().mul_(0.5), torch.rand(3, columns), method)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("method", ["euler", "heun2", "rk4", "ab3", "dpmpp_2m", "unipc", "dopri5"])
def test_guided_calls_of_one_buffer(method: str, batched: bool) -> None:
    buffers: dict[torch.Size, Tensor] = {}

    def plain(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cos(x) + t[:, None] + y[:, None]

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        buffer = buffers.setdefault(x.shape, torch.empty_like(x))
        return buffer.copy_(plain(x, t, y))

    guidance = fm.guidance.CFG(3.0, negative={"y": 0.0}, batched=batched)
    options: dict[str, Any] = {} if method == "dopri5" else {"steps": 5}
    for columns in (2, 1400):
        x = torch.linspace(-1.0, 1.0, 4 * columns).reshape(4, columns)
        options["batched"] = ("y",)
        got, wanted = (
            fm.sample(m, x, method=method, guidance=guidance, y=torch.arange(4.0), **options)[0] for m in (model, plain)
        )
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("method", ["heun2", "rk4", "ab3"])
def test_gradients_through_a_buffer_that_is_written_again(method: str, gradient: str) -> None:
    weight = torch.tensor(0.5, requires_grad=True)
    static = torch.empty(3, 2)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([(weight * x)[:, :1], static.copy_(velocity(x.detach(), t))[:, 1:]], 1)

    def detached(x: Tensor, t: Tensor) -> Tensor:
        return static.copy_(velocity(x.detach(), t))

    x = torch.rand(3, 2)
    for network, fresh in ((model, model), (detached, velocity)):
        got, wanted = (fm.sample(n, x, method=method, steps=4, gradient=gradient)[0] for n in (network, fresh))
        torch.testing.assert_close(got, wanted)


def test_a_callback_is_told_of_each_step_once_with_checkpoints() -> None:
    weight, seen = torch.tensor(0.5, requires_grad=True), []
    samples, _ = fm.sample(
        lambda x, t: weight * x,
        torch.rand(3, 2),
        steps=9,
        gradient="checkpoint",
        callback=lambda i, t, x: seen.append(i),
    )
    samples.sum().backward()
    assert seen == list(range(9))


def test_samples_are_nobody_elses_memory() -> None:
    static, x = torch.ones(3, 2), torch.zeros(3, 2)
    for steps in (0, 1, 2):
        for options in ({"method": "euler"}, {"method": "ddim", "prediction": "x_1"}, {"method": "heun2"}):
            samples, _ = fm.sample(lambda x, t: static, x, steps=steps, **options)
            for other in (static, x):
                assert samples.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


@pytest.mark.parametrize("method", ["euler", "rk4", "explicit_adams", "dopri5", "heun2"])
def test_functions_of_odeint_that_return_one_buffer(method: str) -> None:
    buffer = torch.empty(3, 2)
    y0, t = torch.rand(3, 2), torch.linspace(0.0, 1.0, 6)
    with torch.no_grad():
        got = fm.odeint(lambda t, y: buffer.copy_(torch.sin(y) + t), y0, t, method=method)
        wanted = fm.odeint(lambda t, y: torch.sin(y) + t, y0, t, method=method)
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("method", ["euler", "heun2", "ab2", "dpmpp_2m", "dopri5", "heun_euler"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_network_that_writes_to_its_input_does_not_spoil_the_callers(method: str, guided: bool) -> None:
    def writing(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        v = -x
        x.zero_()
        return v

    guidance = fm.guidance.CFG(2.0, negative={"y": 0.0}, batched=False) if guided else None
    x_0 = torch.randn(3, 2)
    kept = x_0.clone()
    options: dict[str, Any] = {} if method in ("dopri5", "heun_euler") else {"steps": 3}
    with pytest.raises(ValueError, match="model: expected a function that leaves its input as it is"):
        fm.sample(writing, x_0, method=method, guidance=guidance, y=torch.ones(3), **options)
    assert torch.equal(x_0, kept)


IMPLICIT = [
    "implicit_euler",
    "implicit_midpoint",
    "trapezoid",
    "gl4",
    "gl6",
    "radauIIA3",
    "radauIIA5",
    "sdirk2",
    "sdirk3",
]


@pytest.mark.parametrize("method", [*IMPLICIT, "trbdf2", "kvaerno3", "kencarp4"])
@pytest.mark.parametrize("way", ["no_grad", "detached"])
@pytest.mark.parametrize("gradient", [False, True])
def test_implicit_methods_take_a_function_with_one_buffer_for_its_answers(
    method: str, way: str, gradient: bool
) -> None:
    y0 = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=gradient)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    buffer = [torch.empty(2, dtype=torch.float64)]

    def field(t: Tensor, y: Tensor) -> Tensor:
        return -y + torch.sin(3 * t)

    def static(t: Tensor, y: Tensor) -> Tensor:
        if way == "no_grad":
            with torch.no_grad():
                return buffer[0].copy_(field(t, y))
        buffer[0] = buffer[0].detach()
        return buffer[0].copy_(field(t, y))

    options: dict[str, Any] = {} if method in ("trbdf2", "kvaerno3", "kencarp4") else {"options": {"step_size": 0.1}}
    with torch.set_grad_enabled(gradient):
        found, expected = (fm.odeint(f, y0, t, method=method, **options)[-1] for f in (static, field))
    tolerance = 1e-9 if way == "detached" else 1e-6  # the former has the field's Jacobian, the latter none
    if not options:  # found by steps of their own
        tolerance = 1e-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if gradient and way == "detached":
        a, b = (torch.autograd.grad(x.sum(), y0, retain_graph=True)[0] for x in (found, expected))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
