"""`fm.odeint` and `fm.odeint_dense`: torchdiffeq's interface and numbers, options, callbacks, gradients, errors."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmkernels as fm

try:
    import torchdiffeq as peer  # type: ignore[import-not-found]
except ImportError:
    peer = None
needs_peer = pytest.mark.skipif(peer is None, reason="torchdiffeq is not installed")

D = torch.float64
ADAPTIVE = ["dopri5", "tsit5", "dopri8", "bosh3", "fehlberg", "heun_euler"]
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4", "ab3", "am4", "explicit_adams", "implicit_adams"]
SPIRAL = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=D)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def times(*values: float, dtype: torch.dtype = D) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def spiral(t: Tensor, y: Tensor) -> Tensor:
    """The cubic spiral of torchdiffeq's ode_demo."""
    return (y**3) @ SPIRAL.to(y.dtype)


def spiral_y0(dtype: torch.dtype = D) -> Tensor:
    return torch.tensor([[2.0, 0.0]], dtype=dtype)


class Linear:
    """y' = A y + b t with a solution by the matrix exponential of the state with (t, 1) appended."""

    def __init__(self, dtype: torch.dtype = D) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn(3, 3, dtype=D, generator=generator) * 0.7
        self.b = torch.randn(3, dtype=D, generator=generator)
        self.y0 = torch.randn(4, 3, dtype=D, generator=generator).to(dtype)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.a.to(y.dtype).T + self.b.to(y.dtype) * t.to(y.dtype)

    def exact(self, t: Tensor) -> Tensor:
        whole = torch.zeros(5, 5, dtype=D)
        whole[:3, :3], whole[:3, 3], whole[3, 4] = self.a, self.b, 1.0
        rows = []
        for now in t.double():
            start = torch.cat([self.y0.double(), torch.full((4, 1), float(t[0])), torch.ones(4, 1)], 1).double()
            rows.append((start @ torch.linalg.matrix_exp(whole * (now - t[0])).T)[:, :3])
        return torch.stack(rows)


# ---------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (D, 1e-8)])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_accuracy(method: str, dtype: torch.dtype, tol: float, backward: bool) -> None:
    if method in ("heun_euler", "fehlberg"):
        tol = max(tol, 1e-6)
    problem = Linear(dtype)
    t = times(0.3, 0.5, 1.7, 2.0, dtype=dtype)
    t = t.flip(0) if backward else t
    y = fm.odeint(problem, problem.y0, t, rtol=tol, atol=tol, method=method)
    assert y.dtype is dtype
    assert y.shape == (4, 4, 3)
    error = (y - problem.exact(t)).abs().max() / problem.exact(t).abs().max()
    # a quartic between the ends of a step of order 8 is not as accurate as they are
    assert error < (5000 if method == "dopri8" else 100) * tol


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, D])
@pytest.mark.parametrize("method", FIXED)
def test_fixed_accuracy(method: str, dtype: torch.dtype, backward: bool) -> None:
    problem = Linear(dtype)
    t = torch.linspace(1.0, 0.0, 33, dtype=D) if backward else torch.linspace(0.0, 1.0, 33, dtype=D)
    y = fm.odeint(problem, problem.y0, t, method=method)
    assert y.dtype is dtype
    bounds = {"euler": 0.1, "midpoint": 2e-3, "heun2": 2e-3, "heun3": 5e-5, "ab3": 3e-4}
    tolerance = max(bounds.get(method, 1e-5), 100 * torch.finfo(dtype).eps)
    assert (y - problem.exact(t)).abs().max() / problem.exact(t).abs().max() < tolerance


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


# ---------------------------------------------------------------------- torchdiffeq's numbers

# torchdiffeq 0.2.5 in float64
_DEMO = {
    100: (-1.189918530657, -0.394276207255),
    500: (-0.631556075222, 0.21428302089),
    999: (-0.4436234866, 0.279440641949),
}
_GRID = {
    "midpoint": ((-1.105779556023832, 1.7223454278688137), (1.1329168151081384, -1.4168267910603225)),
    "heun2": ((-1.0420939051252405, 1.694798831331862), (0.9297018045914704, -1.4498687121662914)),
    "heun3": ((-0.8853921838630755, 1.741809250307005), (0.5989963443369624, -1.5001580077220575)),
    "rk4": ((-0.90782738548572, 1.7475033173706327), (0.7048144829620873, -1.5043640090667638)),
}


@pytest.mark.parametrize(("dtype", "tol", "bound"), [(torch.float32, 1e-7, 2e-5), (D, 1e-11, 2e-7)])
def test_ode_demo(dtype: torch.dtype, tol: float, bound: float) -> None:
    y = fm.odeint(spiral, spiral_y0(dtype), torch.linspace(0.0, 25.0, 1000, dtype=dtype), rtol=tol, atol=tol)
    for index, expected in _DEMO.items():
        torch.testing.assert_close(y[index, 0].double(), times(*expected), rtol=0.0, atol=bound)


@pytest.mark.parametrize("method", _GRID)
def test_fixed_grids_give_recorded_numbers(method: str) -> None:
    y = fm.odeint(spiral, spiral_y0(), times(0.0, 0.33, 1.0), method=method, options={"step_size": 0.05})
    torch.testing.assert_close(y[1:, 0], torch.tensor(_GRID[method], dtype=D), rtol=1e-12, atol=1e-12)


@needs_peer
@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("interp", [None, "linear", "cubic"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
def test_fixed_grids_equal_the_peer(method: str, interp: str | None, direction: float) -> None:
    y0 = 0.6 * spiral_y0()
    t = direction * torch.tensor([0.0, 0.11, 0.5, 0.83], dtype=D)
    options = {} if interp is None else {"step_size": 0.03, "interp": interp}
    ours, theirs = (lib.odeint(spiral, y0, t, method=method, options=dict(options)) for lib in (fm, peer))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@needs_peer
@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8", "adaptive_heun", "fehlberg2"])
def test_adaptive_solves_equal_the_peer(method: str, direction: float) -> None:
    problem = Linear()
    t = direction * times(0.0, 0.4, 1.0)
    tol = 1e-8 if method in ("dopri5", "dopri8", "bosh3") else 1e-5
    ours, theirs = (lib.odeint(problem, problem.y0, t, method=method, rtol=tol, atol=tol) for lib in (fm, peer))
    exact = problem.exact(t)
    assert (ours - theirs).abs().max() < 50 * tol + 2 * (theirs - exact).abs().max()
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max() + 10 * tol


@needs_peer
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_equal_the_peer(method: str) -> None:
    net = Net()
    y0, t = torch.randn(3, 2, dtype=D, requires_grad=True), times(0.0, 0.4, 1.0).requires_grad_()
    options = {} if method == "dopri5" else {"step_size": 0.05}
    grads = []
    for lib in (fm, peer):
        y = lib.odeint(net, y0, t, method=method, options=dict(options), rtol=1e-9, atol=1e-9)
        grads.append(torch.autograd.grad((y**2)[:, :, 0].sum(), [y0, *net.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_documented_snippet_with_an_event() -> None:
    # torchdiffeq's README: a terminal event, and the state there
    event_t, solution = fm.odeint_event(
        lambda t, y: torch.ones_like(y), torch.zeros(1, dtype=D), times(0.0)[0], event_fn=lambda t, y: y - 0.75
    )
    assert abs(float(event_t) - 0.75) < 1e-8
    assert solution.shape == (2, 1)
    assert abs(float(solution[1, 0]) - 0.75) < 1e-8


# ---------------------------------------------------------------------- gradients


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(3, 4, dtype=D, generator=generator))
        self.v = nn.Parameter(torch.randn(4, 2, dtype=D, generator=generator) * 0.5)
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        t = t.to(y.dtype).reshape(-1, *[1] * (y.dim() - 1)).expand(*y.shape[:-1], 1)
        return torch.tanh(torch.cat([y, t], -1) @ self.w) @ self.v


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("euler", {}),
        ("rk4", {}),
        ("rk4", {"step_size": 0.15, "interp": "cubic"}),
        ("ab3", {}),
        ("rk4", {"checkpoint": True}),
        ("rk4", {"reversible": True}),
        ("midpoint", {"reversible": 0.9, "step_size": 0.13}),
        ("dopri5", {}),
        ("dopri5", {"checkpoint": True}),
        ("dopri5", {"jump_t": [0.25]}),
    ],
    ids=str,
)
def test_gradcheck_in_the_state_and_the_times(method: str, options: dict[str, Any]) -> None:
    net = Net()
    y0, t = torch.randn(2, 2, dtype=D).requires_grad_(), times(0.0, 0.2, 0.7, 0.8).requires_grad_()

    def solve(y0: Tensor, t: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            net.w.copy_(w)
        object.__setattr__(net, "_w", w)
        return fm.odeint(
            lambda t, y: torch.tanh(torch.cat([y, t.expand(2, 1)], -1) @ w) @ net.v,
            y0,
            t,
            method=method,
            options=options,
            rtol=1e-11,
            atol=1e-11,
        )

    w = net.w.detach().clone().requires_grad_()
    tolerance = 1e-5 if method == "dopri5" else 1e-6
    assert torch.autograd.gradcheck(solve, (y0, t, w), atol=tolerance, rtol=1e-4, nondet_tol=0.0)


def test_gradcheck_per_sample() -> None:
    net = Net()
    y0 = torch.randn(3, 2, dtype=D, requires_grad=True)

    def solve(y0: Tensor) -> Tensor:
        return fm.odeint(net, y0, times(0.0, 0.3, 1.0), options={"per_sample": True}, rtol=1e-10, atol=1e-10)

    assert torch.autograd.gradcheck(solve, (y0,), atol=1e-6)


def test_per_sample_control_is_of_each_sample() -> None:
    rate = times(1.0, 30.0)[:, None]

    def func(t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == (2,)
        return -rate * (y - t.cos()[:, None])

    t, y0 = times(0.0, 0.5, 2.0), torch.ones(2, 1, dtype=D)
    y = fm.odeint(func, y0, t, options={"per_sample": True}, rtol=1e-8, atol=1e-8)
    for i in range(2):
        alone = fm.odeint(lambda t, y, i=i: -rate[i] * (y - t.cos()), y0[i], t, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(y[:, i], alone, rtol=0.0, atol=1e-9)
    with pytest.raises(ValueError, match="per_sample"):
        fm.odeint(lambda t, y: y, (y0, y0), t, options={"per_sample": True})


def test_no_gradient_is_recorded_where_none_is_asked() -> None:
    net = Net()
    with torch.no_grad():
        assert not fm.odeint(net, torch.randn(2, 2, dtype=D), times(0.0, 1.0)).requires_grad
    frozen = Net().requires_grad_(False)
    assert not fm.odeint(frozen, torch.randn(2, 2, dtype=D), times(0.0, 1.0)).requires_grad


# ---------------------------------------------------------------------- options


def relay(t: Tensor, y: Tensor) -> Tensor:
    """A slope that jumps at t = 0.5."""
    return torch.where(t < 0.5, torch.ones_like(y), -2.0 * torch.ones_like(y))


@pytest.mark.parametrize("strict", [False, True], ids=["at_or_after", "after"])
@pytest.mark.parametrize("backward", [False, True])
def test_jump_t(strict: bool, backward: bool) -> None:
    calls = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(float(t))
        before = t <= 0.5 if strict else t < 0.5
        return torch.where(before, torch.ones_like(y), -2.0 * torch.ones_like(y))

    t, y0 = times(0.0, 0.25, 0.5, 1.0), torch.zeros(1, dtype=D)
    expected = times(0.0, 0.25, 0.5, -0.5)[:, None]
    if backward:
        t, y0, expected = t.flip(0), expected[-1], expected.flip(0)
    y = fm.odeint(func, y0, t, options={"jump_t": times(0.5)}, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y, expected, rtol=0.0, atol=1e-12)
    assert 0.5 not in calls
    with_jump = len(calls)
    calls.clear()
    fm.odeint(func, y0, t, rtol=1e-9, atol=1e-9)
    assert len(calls) > 2 * with_jump


def test_jump_t_in_gradients() -> None:
    slope = times(1.5).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.5, slope * y, -2.0 * slope * y)

    t = times(0.0, 0.5, 1.0).requires_grad_()
    y = fm.odeint(func, torch.ones(1, dtype=D), t, options={"jump_t": [0.5]}, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(y[2, 0], [slope, t])
    exact = math.exp(-0.75)
    assert abs(float(y[2, 0].detach()) - exact) < 1e-8
    assert abs(float(grads[0]) + 0.5 * exact) < 1e-7
    torch.testing.assert_close(grads[1], times(-1.5 * exact, 0.0, -3.0 * exact), rtol=1e-6, atol=1e-7)


def test_step_t_ends_steps() -> None:
    seen: list[float] = []

    class Watched(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def callback_accept_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            seen.append(float(t))

    fm.odeint(Watched(), torch.ones(1, dtype=D), times(0.0, 1.0), options={"step_t": times(0.3, 0.7, 1.4)})
    assert 0.3 in seen
    assert 0.7 in seen


def test_grid_constructor() -> None:
    made = []

    def constructor(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        made.append((func, y0.shape))
        return torch.linspace(float(t[0]), float(t[-1]), 11, dtype=D)

    t = times(0.0, 0.5, 1.0)
    y = fm.odeint(spiral, spiral_y0(), t, method="rk4", options={"grid_constructor": constructor})
    same = fm.odeint(spiral, spiral_y0(), t, method="rk4", options={"step_size": 0.1})
    torch.testing.assert_close(y, same, rtol=1e-12, atol=1e-12)
    assert made[0][0] is spiral
    assert made[0][1] == (1, 2)
    with pytest.raises(ValueError, match="grid_constructor"):
        fm.odeint(spiral, spiral_y0(), t, method="rk4", options={"grid_constructor": lambda f, y, t: t[:-1]})
    both = {"grid_constructor": constructor, "step_size": 0.1}
    with pytest.raises(ValueError, match="step_size, grid_constructor"):
        fm.odeint(spiral, spiral_y0(), t, method="rk4", options=both)


def test_interp_of_fixed_grids() -> None:
    t = torch.linspace(0.0, 1.0, 14, dtype=D)
    problem = Linear()
    errors = {
        interp: (
            fm.odeint(problem, problem.y0, t, method="rk4", options={"step_size": 0.1, "interp": interp})
            - problem.exact(t)
        ).abs()
        for interp in ("linear", "cubic")
    }
    assert errors["cubic"].max() < 1e-4 < 1e-3 < errors["linear"].max()
    with pytest.raises(ValueError, match="interp"):
        fm.odeint(problem, problem.y0, t, method="rk4", options={"step_size": 0.1, "interp": "quintic"})


class Told(nn.Module):
    """Notes what its callbacks are told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, list[tuple[float, float, float]]] = {"step": [], "accept": [], "reject": []}
        self.kept: list[Tensor] = []

    def forward(self, t: Tensor, y: Any) -> Any:
        f = lambda y: -50.0 * (y - torch.cos(20.0 * t))  # noqa: E731
        return f(y) if isinstance(y, Tensor) else tuple(f(part) for part in y)

    def _note(self, kind: str, t: Tensor, y: Any, h: Tensor) -> None:
        first = y if isinstance(y, Tensor) else y[0]
        self.told[kind].append((float(t), float(first.reshape(-1)[0]), float(h)))
        self.kept.append(first)

    def callback_step(self, t: Tensor, y: Any, h: Tensor) -> None:
        self._note("step", t, y, h)


class ToldAll(Told):
    def callback_accept_step(self, t: Tensor, y: Any, h: Tensor) -> None:
        self._note("accept", t, y, h)

    def callback_reject_step(self, t: Tensor, y: Any, h: Tensor) -> None:
        self._note("reject", t, y, h)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("tuples", [False, True])
def test_callbacks_of_adaptive_solves(sign: float, tuples: bool) -> None:
    func, y0 = ToldAll(), torch.ones(1, dtype=D)
    fm.odeint(func, (y0, y0) if tuples else y0, sign * times(0.0, 0.05), rtol=1e-5, atol=1e-5)
    told = func.told
    assert len(told["step"]) == len(told["accept"]) + len(told["reject"])
    assert told["reject"]
    time = 0.0
    for t, _, h in told["accept"]:
        assert t == pytest.approx(time, abs=1e-12)
        assert h * sign > 0.0
        time = t + h
    assert time == pytest.approx(0.05 * sign)
    # what was handed out stays as it was
    values = [note[1] for note in told["accept"]]
    assert len(set(values)) == len(values)
    assert {float(y.reshape(-1)[0]) for y in func.kept} >= set(values)


@pytest.mark.parametrize("gradient", [False, True])
def test_callbacks_of_fixed_grids(gradient: bool) -> None:
    func, y0 = Told(), torch.ones(1, dtype=D)
    with torch.set_grad_enabled(gradient):
        y = fm.odeint(func, y0, torch.linspace(0.0, 0.1, 6, dtype=D), method="heun2")
    assert [note[0] for note in func.told["step"]] == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08])
    assert [note[2] for note in func.told["step"]] == pytest.approx([0.02] * 5)
    assert torch.equal(torch.stack(func.kept), y[:-1])
    with pytest.warns(UserWarning, match="callback_accept_step, callback_reject_step"):
        fm.odeint(ToldAll(), y0, times(0.0, 0.1), method="heun2")


def test_min_and_max_step() -> None:
    func, y0, t = ToldAll(), torch.ones(1, dtype=D), times(0.0, 1.0)
    fm.odeint(func, y0, t, options={"max_step": 0.003}, rtol=1e-2, atol=1e-2)
    assert max(note[2] for note in func.told["step"]) <= 0.003 * (1 + 1e-12)
    func = ToldAll()
    fm.odeint(func, y0, t, options={"min_step": 0.01, "first_step": 0.02}, rtol=1e-10, atol=1e-10)
    sizes = [note[2] for note in func.told["accept"]]
    assert min(sizes[:-1]) == pytest.approx(0.01)
    assert func.told["step"][0][2] == pytest.approx(0.02)


def test_max_num_steps_warns_and_fills() -> None:
    with pytest.warns(UserWarning, match="max_steps"):
        y = fm.odeint(Told(), torch.ones(1, dtype=D), times(0.0, 1e-4, 5.0), options={"max_num_steps": 20})
    assert y[:2].isfinite().all()
    assert y[2].isnan().all()
    options = {"max_num_steps": 20, "jump_t": [2.0]}
    with pytest.warns(UserWarning, match="max_steps"):
        y = fm.odeint(Told(), torch.ones(1, dtype=D), times(0.0, 1e-4, 1.0, 3.0, 5.0), options=options)
    assert y.shape == (5, 1)
    assert y[:2].isfinite().all()
    assert y[2:].isnan().all()
    y0 = torch.ones(1, dtype=D, requires_grad=True)
    with pytest.warns(UserWarning, match="max_steps"), pytest.raises(RuntimeError, match="a solve that succeeds"):
        fm.odeint(Told(), y0, times(0.0, 5.0), options={"max_num_steps": 20})


def test_a_right_hand_side_that_is_not_finite_ends() -> None:
    for bad in (math.nan, math.inf):
        with pytest.warns(UserWarning, match="not finite"):
            y = fm.odeint(lambda t, y, bad=bad: y * bad, torch.ones(2, dtype=D), times(0.0, 1.0))
        assert y[1].isnan().all()


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
    with pytest.raises(ValueError, match="rtol: expected a number, or 2 numbers"):
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
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(TypeError, match="func: expected a callable"):
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
        (lambda t, y: y.float(), TypeError),
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
    torch.testing.assert_close(solution(ordered), problem.exact(ordered), rtol=0.0, atol=1e-6)
    assert solution(direction).shape == (4, 3)
    with pytest.raises(ValueError, match="t: expected times from"):
        solution(1.1 * direction)
    y0 = torch.randn(2, 2, dtype=D, requires_grad=True)
    t = direction * times(0.0, 0.3, 0.9, 1.0)
    pairs = (
        fm.odeint(net, y0, t, rtol=1e-9, atol=1e-9),
        fm.odeint_dense(net, y0, 0.0, direction, rtol=1e-9, atol=1e-9)(t),
    )
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad((y**2).sum(), [y0, *net.parameters()]) for y in pairs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
