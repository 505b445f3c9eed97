"""Gradients and events: the continuous adjoint, the reversible scheme, and the implicit function theorem."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmkernels as fm
from fmkernels.solvers import methods
from fmkernels.solvers.reversible import Scheme

try:
    import torchdiffeq as peer  # type: ignore[import-not-found]
except ImportError:
    peer = None
needs_peer = pytest.mark.skipif(peer is None, reason="torchdiffeq is not installed")

D = torch.float64


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = D) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, dtype=dtype))
        self.v = nn.Parameter(torch.randn(6, 2, dtype=dtype) * 0.5)
        self.unused = nn.Parameter(torch.randn(2, dtype=dtype))

    def forward(self, t: Tensor, y: Any) -> Any:
        if not isinstance(y, Tensor):
            a, b = y
            return self(t, a), -b * a.mean()
        return torch.tanh(torch.cat([y, t.expand(*y.shape[:-1], 1)], -1) @ self.w) @ self.v

    def used(self) -> list[Tensor]:
        return [self.w, self.v]


def loss_of(y: Any) -> Tensor:
    parts = (y,) if isinstance(y, Tensor) else y
    return sum(((i + 1) * (part**2)[1:].sum() + part[1].sin().sum() for i, part in enumerate(parts)), torch.zeros(()))


def finite_differences(function: Any, inputs: list[Tensor], step: float = 1e-5) -> list[Tensor]:
    """Central differences in each component."""
    grads = []
    with torch.no_grad():
        for x in inputs:
            grad = torch.zeros_like(x)
            for i in range(x.numel()):
                flat, values = x.detach().reshape(-1), []
                kept = flat[i].clone()
                for sign in (1.0, -1.0):
                    flat[i] = kept + sign * step
                    values.append(function())
                flat[i] = kept
                grad.view(-1)[i] = (values[0] - values[1]) / (2 * step)
            grads.append(grad)
    return grads


def assert_all_close(ours: Any, theirs: Any, tol: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ---------------------------------------------------------------------- adjoint


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("tuples", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize(
    ("method", "options"), [("dopri5", None), ("rk4", {"step_size": 0.02, "interp": "cubic"})], ids=str
)
def test_adjoint_direct_and_differences_agree(
    method: str, options: dict[str, Any] | None, tuples: bool, backward: bool
) -> None:
    net = Net()
    t = torch.tensor([0.0, 0.3, 1.1], dtype=D)
    t = (t.flip(0) if backward else t).clone().requires_grad_()
    parts = (torch.randn(1, 2, dtype=D).requires_grad_(), torch.randn(2, dtype=D).requires_grad_())
    y0 = parts if tuples else parts[0]
    inputs = [*(parts if tuples else parts[:1]), t, *net.used()]

    def solve(interface: Any = fm.odeint) -> Tensor:
        return loss_of(interface(net, y0, t, method=method, options=options, rtol=1e-9, atol=1e-9))

    adjoint = torch.autograd.grad(solve(fm.odeint_adjoint), inputs)
    direct = torch.autograd.grad(solve(), inputs)
    expected = finite_differences(solve, inputs)
    assert_all_close(direct, expected, 2e-6)
    assert_all_close(adjoint, expected, 2e-6)


@needs_peer
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adjoint_options": {"norm": "seminorm"}},
        {"adjoint_options": {"norm": lambda state: torch.stack([x.abs().max() for x in state if x.numel()]).max()}},
        {"options": {"norm": lambda y: (y if isinstance(y, Tensor) else y[0]).abs().max()}},
        {"method": "rk4", "options": {"step_size": 0.05}},
        {"adjoint_method": "midpoint", "adjoint_options": {"step_size": 0.02}},
        {"adjoint_rtol": 1e-5, "adjoint_atol": 1e-6},
    ],
    ids=lambda s: ",".join(s) or "default",
)
@pytest.mark.parametrize("tuples", [False, True], ids=["tensor", "tuple"])
def test_adjoint_equals_the_peer(settings: dict[str, Any], tuples: bool) -> None:
    net, t = Net(), torch.tensor([0.0, 0.3, 1.1], dtype=D, requires_grad=True)
    parts = (torch.randn(2, 2, dtype=D).requires_grad_(), torch.randn(3, dtype=D).requires_grad_())
    inputs = [*(parts if tuples else parts[:1]), t, *net.parameters()]
    grads = []
    for lib in (fm, peer):
        y = lib.odeint_adjoint(net, parts if tuples else parts[0], t, **settings)
        grads.append(torch.autograd.grad(loss_of(y), inputs))
    tol = 1e-11 if settings.get("method") or "adjoint_method" in settings else 1e-5
    if "adjoint_method" in settings:
        tol = 1e-6
    assert_all_close(*grads, max(tol, settings.get("adjoint_rtol", 0.0)))


class Recorded:
    """Counts the tensors that autograd keeps."""

    def __init__(self) -> None:
        self.count = self.size = 0

    def __enter__(self) -> Recorded:
        def pack(x: Tensor) -> Tensor:
            self.count += 1
            self.size += x.numel()
            return x

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.hooks.__exit__(*args)


@pytest.mark.parametrize("kind", ["adjoint", "reversible", "sample"])
def test_memory_is_constant_in_the_steps(kind: str) -> None:
    net, y0, t = Net(), torch.randn(2, 2, dtype=D, requires_grad=True), torch.tensor([0.0, 1.0], dtype=D)

    def kept(steps: int) -> tuple[int, int]:
        with Recorded() as record:
            if kind == "adjoint":
                y = fm.odeint_adjoint(net, y0, t, method="rk4", options={"step_size": 1 / steps})
            elif kind == "reversible":
                options = {"step_size": 1 / steps, "reversible": True}
                y = fm.odeint(net, y0, t, method="rk4", options=options)
            else:
                settings: Any = {"steps": steps, "gradient": "reversible", "time_shape": "scalar"}
                y, _ = fm.sample(lambda x, t: net(t, x), y0, method="rk4", **settings)
        y.sum().backward()
        return record.count, record.size - (steps if kind != "adjoint" else 0)  # the times, a number a step

    assert kept(5) == kept(200)
    with Recorded() as direct:
        fm.odeint(net, y0, t, method="rk4", options={"step_size": 1 / 200})
    assert direct.count > 100 * kept(5)[0]


def test_adjoint_parameters_and_errors() -> None:
    net, t = Net(), torch.tensor([0.0, 1.0], dtype=D)
    y0 = torch.randn(2, 2, dtype=D, requires_grad=True)
    func = lambda t, y: net(t, y)  # noqa: E731
    with pytest.raises(ValueError, match="adjoint_params: expected tensors"):
        fm.odeint_adjoint(func, y0, t)
    with pytest.raises(ValueError, match="adjoint_options: expected a dict"):
        fm.odeint_adjoint(net, y0, t, method="dopri5", options={"first_step": 0.1}, adjoint_method="rk4")
    whole = torch.autograd.grad(fm.odeint_adjoint(net, y0, t).sum(), [y0, net.w, net.v])
    given = torch.autograd.grad(fm.odeint_adjoint(func, y0, t, adjoint_params=iter([net.w])).sum(), [y0, net.w])
    assert_all_close(given, whole[:2], 1e-5)
    y = fm.odeint_adjoint(func, y0, t, adjoint_params=())
    (grad,) = torch.autograd.grad(y.sum(), y0, retain_graph=True)
    torch.testing.assert_close(grad, whole[0], rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad((y**2).sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    net.v.requires_grad_(False)
    norm = lambda state: state[1].abs().max()  # noqa: E731
    with pytest.warns(UserWarning, match="adjoint_params"):
        fm.odeint_adjoint(net, y0, t, adjoint_options={"norm": norm})


def test_adjoint_of_parameters_made_by_others() -> None:
    raw = torch.randn(2, 2, dtype=D, requires_grad=True)
    made = raw.sin()
    y0, t = torch.randn(3, 2, dtype=D), torch.tensor([0.0, 0.5, 1.0], dtype=D)
    func = lambda t, y: y @ made  # noqa: E731
    y = fm.odeint_adjoint(func, y0, t, adjoint_params=(made,), rtol=1e-10, atol=1e-10)
    exact = torch.stack([y0 @ torch.linalg.matrix_exp(s * made) for s in t])
    grads = [torch.autograd.grad(loss_of(x), raw, retain_graph=True) for x in (y, exact)]
    assert_all_close(*grads, 1e-7)


def test_adjoint_of_complex_states_and_parameters() -> None:
    rate = torch.tensor(0.3 + 1.5j, dtype=torch.complex128, requires_grad=True)
    y0 = torch.tensor([1.0 + 0.5j, -2.0j], dtype=torch.complex128, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=D)
    func = lambda t, y: rate * y  # noqa: E731
    y = fm.odeint_adjoint(func, y0, t, adjoint_params=(rate,), rtol=1e-10, atol=1e-10)
    exact = y0 * torch.exp(rate * t[:, None])
    weight = torch.randn(3, 2, dtype=torch.complex128)
    grads = [torch.autograd.grad((x * weight).real.sum(), [y0, rate], retain_graph=True) for x in (y, exact)]
    assert_all_close(*grads, 1e-7)


def test_adjoint_in_half_precision_with_float_parameters() -> None:
    net, y0 = Net(torch.float32), torch.randn(4, 2).bfloat16().requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        assert y.dtype is torch.bfloat16
        return net(t.float(), y.float()).bfloat16()

    t = torch.tensor([0.0, 1.0])
    settings: Any = {"method": "rk4", "options": {"step_size": 0.25}}
    adjoint = fm.odeint_adjoint(func, y0, t, adjoint_params=net.used(), **settings)
    grads = [
        torch.autograd.grad(y[1].float().sum(), [y0, net.w]) for y in (adjoint, fm.odeint(func, y0, t, **settings))
    ]
    assert [g.dtype for g in grads[0]] == [torch.bfloat16, torch.float32]
    assert_all_close(*grads, 0.1)


def test_adjoint_callbacks() -> None:
    seen: dict[str, int] = {}

    class Told(Net):
        def callback_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            seen["forward"] = seen.get("forward", 0) + 1

        def callback_accept_step_adjoint(self, t: Tensor, y: Any, h: Tensor) -> None:
            assert h < 0
            assert len(y) == 3 + 3
            seen["backward"] = seen.get("backward", 0) + 1

    y0, t = torch.randn(2, 2, dtype=D, requires_grad=True), torch.tensor([0.0, 1.0], dtype=D)
    y = fm.odeint_adjoint(Told(), y0, t)
    assert seen["forward"] > 3
    assert "backward" not in seen
    y.sum().backward()
    assert seen["backward"] > 3


# ---------------------------------------------------------------------- the reversible scheme


@pytest.mark.parametrize("coupling", [True, 0.8])
@pytest.mark.parametrize("size", [None, 0.04])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "ralston"])
def test_reversible_gradients_are_those_of_the_plain_scheme(method: str, size: float | None, coupling: Any) -> None:
    net = Net()
    y0 = torch.randn(3, 2, dtype=D, requires_grad=True)
    t = torch.tensor([1.0, 0.7, 0.3, 0.0], dtype=D, requires_grad=True)
    options = {"reversible": coupling} if size is None else {"reversible": coupling, "step_size": size}
    y = fm.odeint(net, y0, t, method=method, options=options)

    tableau = methods.resolve({"rk4": "rk4_38"}.get(method, method)).tableau  # type: ignore[attr-defined]
    scheme = Scheme(net, tableau, [], 0.999 if coupling is True else coupling)
    a = b = y0
    states = [y0]
    for start, end in itertools.pairwise(t):
        count = 1 if size is None else math.ceil(float((start - end).detach()) / size - 1e-9)
        grid = [start + (end - start) * (i / count) for i in range(count + 1)]
        for now, later in itertools.pairwise(grid):
            a, b = scheme.forward(now, later, a, b)
        states.append(a)
    plain = torch.stack(states)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss_of(x), [y0, t, *net.used()]) for x in (y, plain)]
    assert_all_close(*grads, 1e-10 if coupling is True else 1e-8)


def test_reversible_scheme_keeps_its_order_and_reverses() -> None:
    net, t = Net(), torch.tensor([0.0, 1.0], dtype=D)
    y0 = torch.randn(3, 2, dtype=D)
    net.requires_grad_(False)
    exact = fm.odeint(net, y0, t, rtol=1e-12, atol=1e-12)[1]
    for method, order in (("euler", 1), ("midpoint", 2), ("heun3", 3), ("rk4", 4)):
        errors = []
        for h in (1 / 20, 1 / 40):
            y = fm.odeint(net, y0, t, method=method, options={"reversible": True, "step_size": h})
            errors.append(float((y[1] - exact).norm()))
        assert math.log2(errors[0] / errors[1]) > order - 0.35
    a = b = y0
    scheme = Scheme(net, methods.resolve("rk4").tableau, [])  # type: ignore[attr-defined]
    grid = torch.linspace(0, 1, 31, dtype=D)
    with torch.no_grad():
        for now, later in itertools.pairwise(grid):
            a, b = scheme.forward(now, later, a, b)
        for later, now in zip(grid.flip(0)[:-1], grid.flip(0)[1:], strict=True):
            b = b + scheme.increment(later, now, a)
            a = (a - 0.001 * b - scheme.increment(now, later, b)) / 0.999
    torch.testing.assert_close(a, y0, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(b, y0, rtol=0.0, atol=1e-12)


def test_reversible_samples() -> None:
    net = Net()
    raw = torch.randn(4, 2, dtype=D, requires_grad=True)
    shift = torch.randn(2, dtype=D, requires_grad=True)  # held by the model, no parameter of it

    def model(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        assert t.shape == (4,)
        time = t[:, None]
        return torch.tanh(torch.cat([x, time], -1) @ net.w) @ net.v + condition * time + shift.sin()

    x_0 = torch.randn(4, 2, dtype=D, requires_grad=True)
    inputs = [x_0, raw, shift, *net.used()]
    settings: Any = {"method": "rk4", "steps": 40}
    ours, result = fm.sample(model, x_0, gradient="reversible", condition=raw.exp(), **settings)
    direct, _ = fm.sample(model, x_0, gradient="direct", condition=raw.exp(), **settings)
    torch.testing.assert_close(ours, direct, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad((x**2).sum(), inputs) for x in (ours, direct)]
    assert_all_close(*grads, 1e-5)
    assert result.nfe == 2 * 4 * 40 + 1  # one call looks for what the model uses
    with torch.no_grad():
        settings["return_trajectory"] = True
        same, result = fm.sample(model, x_0, gradient="reversible", condition=raw.exp(), **settings)
    assert torch.equal(same, ours)
    assert result.trajectory is not None
    assert result.trajectory.shape == (41, 4, 2)
    assert torch.equal(result.trajectory[-1], same)


def test_reversible_with_times_of_each_sample_and_guidance() -> None:
    class Model(Net):
        def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
            return scale * torch.tanh(torch.cat([x, t[:, None]], -1) @ self.w) @ self.v

    model, x_0 = Model(), torch.randn(3, 2, dtype=D, requires_grad=True)
    grid = torch.linspace(0, 1, 31, dtype=D)[:, None] * torch.tensor([1.0, 0.5, 0.8], dtype=D)
    guidance = fm.guidance.CFG(1.5, negative={"scale": 0.5}, batched=False)
    settings: Any = {"method": "heun3", "time_grid": grid, "guidance": guidance}
    pairs = [fm.sample(model, x_0, gradient=gradient, **settings)[0] for gradient in ("reversible", "direct")]
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad((x**2).sum(), [x_0, model.w, model.v]) for x in pairs]
    assert_all_close(*grads, 1e-3)


def test_reversible_refuses_what_it_cannot_do() -> None:
    y0, t = torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    func = lambda t, y: -y  # noqa: E731
    for method, options in (
        ("ab2", {"reversible": True}),
        ("rk4", {"reversible": 1.5}),
        ("rk4", {"reversible": True, "interp": "cubic"}),
        ("rk4", {"reversible": True, "grid_constructor": lambda f, y, t: t}),
    ):
        with pytest.raises(ValueError, match="expected"):
            fm.odeint(func, y0, t, method=method, options=options)
    with pytest.raises(ValueError, match="method: expected an explicit Runge-Kutta"):
        fm.sample(lambda x, t: x, (2, 2), steps=2, method="dpmpp_2m", gradient="reversible")
    with pytest.raises(ValueError, match="gradient: expected no callback"):
        fm.sample(lambda x, t: x, (2, 2), steps=2, gradient="reversible", callback=lambda *a: None)


# ---------------------------------------------------------------------- events


class Ball(nn.Module):
    """torchdiffeq's bouncing ball: height, speed and the logarithm of its radius."""

    def __init__(self) -> None:
        super().__init__()

        def parameter(value: float) -> nn.Parameter:
            return nn.Parameter(torch.tensor([value], dtype=D))

        self.gravity, self.t0, self.position, self.speed = map(parameter, (9.8, 0.0, 10.0, 0.0))
        self.log_radius, self.absorption = parameter(math.log(0.2)), parameter(0.2)

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, speed, log_radius = state
        return speed, -self.gravity + 0.0 * speed, torch.zeros_like(log_radius)

    def event_fn(self, t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        return state[0] - torch.exp(state[2])

    def bounces(self, count: int, interface: Any, solve: Any = fm.odeint_event, **settings: Any) -> Tensor:
        """The times of the collisions."""
        t, state, times = self.t0, (self.position, self.speed, self.log_radius), []
        settings = {"atol": 1e-9, "rtol": 1e-9, **settings}
        for _ in range(count):
            t, solution = solve(
                self, state, t, event_fn=self.event_fn, reverse_time=False, odeint_interface=interface, **settings
            )
            times.append(t)
            position, speed, log_radius = (part[-1] for part in solution)
            state = (position + 1e-7, -speed * (1 - self.absorption), log_radius)
        return torch.stack([t.reshape(()) for t in times])

    def exact(self, count: int) -> Tensor:
        height = self.position - self.log_radius.exp()
        speed = (self.speed**2 + 2 * self.gravity * height).sqrt()
        times = [self.t0 + (speed + self.speed) / self.gravity]
        for _ in range(count - 1):
            speed = speed * (1 - self.absorption)
            times.append(times[-1] + 2 * speed / self.gravity)
        return torch.cat(times)


@pytest.mark.parametrize(
    ("interface", "settings", "tol"),
    [
        (fm.odeint, {}, 1e-6),
        (fm.odeint, {"method": "bosh3"}, 1e-6),
        (fm.odeint_adjoint, {}, 1e-6),
        (fm.odeint, {"method": "rk4", "options": {"step_size": 0.05, "interp": "cubic"}}, 1e-6),
        (fm.odeint_adjoint, {"method": "rk4", "options": {"step_size": 0.05, "interp": "cubic"}}, 1e-6),
        (fm.odeint, {"method": "explicit_adams", "options": {"step_size": 0.02}}, 1e-2),
    ],
    ids=str,
)
def test_bouncing_ball(interface: Any, settings: dict[str, Any], tol: float) -> None:
    ball = Ball()
    times, exact = ball.bounces(2, interface, **settings), ball.exact(2)
    torch.testing.assert_close(times, exact, rtol=0.0, atol=tol)
    # torchdiffeq 0.2.5's numbers
    recorded = torch.tensor([1.4142135624, 3.6769552744], dtype=D)
    torch.testing.assert_close(times.detach(), recorded, rtol=0.0, atol=max(tol, 1e-6))
    grads = [
        torch.autograd.grad((x * torch.tensor([1.0, -0.5], dtype=D)).sum(), list(ball.parameters()))
        for x in (times, exact)
    ]
    assert_all_close(*grads, 100 * tol)


@needs_peer
@pytest.mark.parametrize("settings", [{}, {"method": "rk4", "options": {"step_size": 0.1}}], ids=str)
@pytest.mark.parametrize("adjoint", [False, True])
def test_bouncing_ball_equals_the_peer(settings: dict[str, Any], adjoint: bool) -> None:
    results = []
    for lib in (fm, peer):
        ball = Ball()
        interface = lib.odeint_adjoint if adjoint else lib.odeint
        times = ball.bounces(2, interface, lib.odeint_event, **settings)
        results.append([times, *torch.autograd.grad(times.sum(), list(ball.parameters()))])
    assert_all_close(*results, 1e-7)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("reverse", [False, True])
def test_events_in_both_directions(method: str, reverse: bool) -> None:
    sign = -1.0 if reverse else 1.0
    options = {"step_size": 0.03, "interp": "cubic"} if method == "rk4" else {}
    y0, t0 = torch.tensor([1.0], dtype=D, requires_grad=True), torch.tensor(0.5, dtype=D, requires_grad=True)
    seen = []

    def event(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t.detach()))
        return y - 2.0 + 0.1 * t

    def func(t: Tensor, y: Tensor) -> Tensor:
        return sign * y + 0.3 * torch.cos(t)

    def find(y0: Tensor, t0: Tensor) -> tuple[Tensor, Tensor]:
        return fm.odeint_event(
            func, y0, t0, event_fn=event, reverse_time=reverse, method=method, options=options, rtol=1e-11, atol=1e-11
        )

    t, solution = find(y0, t0)
    assert (t - t0) * sign > 0
    assert all((s - 0.5) * sign >= 0 for s in seen)
    assert abs(float((solution[1] - 2.0 + 0.1 * t).detach())) < 1e-8
    # the plain solve to that time
    plain = fm.odeint(func, y0, torch.stack([t0, t]).detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(solution, plain, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda *x: find(*x), (y0, t0), atol=1e-4, eps=1e-5)


def test_the_first_of_several_events() -> None:
    y0 = torch.tensor([0.0, 0.0], dtype=D)
    func = lambda t, y: torch.tensor([1.0, 2.0], dtype=D)  # noqa: E731
    event = lambda t, y: torch.stack([y[0] - 1.0, 1.4 - y[1], t - 3.0])  # noqa: E731
    for settings in ({}, {"method": "rk4", "options": {"step_size": 0.3}}):
        t, solution = fm.odeint(func, y0, torch.tensor([0.0, 1.0], dtype=D), event_fn=event, **settings)
        assert abs(float(t) - 0.7) < 1e-8
        torch.testing.assert_close(solution[1], torch.tensor([0.7, 1.4], dtype=D), rtol=0.0, atol=1e-7)


def test_events_with_jumps_in_the_field() -> None:
    rate = torch.tensor([1.0], dtype=D, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 1.0, rate, 3.0 * rate)

    y0 = torch.zeros(1, dtype=D, requires_grad=True)
    t, solution = fm.odeint_event(func, y0, 0.0, event_fn=lambda t, y: y - 4.0, options={"jump_t": [1.0, 50.0]})
    assert abs(float(t.detach()) - 2.0) < 1e-8
    grads = torch.autograd.grad(t, [rate, y0])
    # y0 + rate (1 + 3 (t - 1)) = 4
    assert_all_close(grads, [torch.tensor([-4 / 3], dtype=D), torch.tensor([-1 / 3], dtype=D)], 1e-7)
    assert solution.shape == (2, 1)


def test_gradients_of_what_the_event_function_uses() -> None:
    level = torch.tensor(2.0, dtype=D, requires_grad=True)
    t, solution = fm.odeint_event(
        lambda t, y: y, torch.ones(1, dtype=D), 0.0, event_fn=lambda t, y: y - level, rtol=1e-10, atol=1e-10
    )
    (of_time,) = torch.autograd.grad(t, level, retain_graph=True)
    (of_state,) = torch.autograd.grad(solution[1].sum(), level)
    assert abs(float(t.detach()) - math.log(2.0)) < 1e-8
    assert abs(float(of_time) - 0.5) < 1e-7
    assert abs(float(of_state) - 1.0) < 1e-7


def test_events_at_the_start_without_end_and_wrong() -> None:
    y0, t = torch.ones(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    event_t, solution = fm.odeint(lambda t, y: y, y0, t, event_fn=lambda t, y: y - 1.0)
    assert float(event_t) == 0.0
    assert torch.equal(solution, torch.stack([y0, y0]))
    never = lambda t, y: y + 1.0  # noqa: E731
    with pytest.warns(UserWarning, match="max_steps"), pytest.raises(RuntimeError, match="event_fn: expected a sign"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=never, options={"max_num_steps": 30})
    with pytest.raises(RuntimeError, match="within 20000 steps"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=never, method="euler", options={"step_size": 0.1})
    with pytest.raises(ValueError, match="step_size with event_fn"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=never, method="euler")
    with pytest.raises(ValueError, match=r"t: expected shape \(2,\)"):
        fm.odeint(lambda t, y: -y, y0, torch.linspace(0, 1, 3), event_fn=never)
    with pytest.raises(TypeError, match="event_fn: expected a tensor"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=lambda t, y: 1.0)
    with pytest.raises(TypeError, match="event_fn: expected a callable"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=3)
    with pytest.raises(ValueError, match="per_sample"):
        fm.odeint(lambda t, y: -y, y0, t, event_fn=never, options={"per_sample": True})


def test_events_in_single_precision_have_the_dtype_of_the_times() -> None:
    t, solution = fm.odeint_event(
        lambda t, y: torch.ones_like(y), torch.zeros(3), torch.tensor([0.25]), event_fn=lambda t, y: y.sum() - 3.0
    )
    assert t.dtype is torch.float32
    assert t.shape == ()
    assert solution.dtype is torch.float32
    assert abs(float(t) - 1.25) < 1e-6
