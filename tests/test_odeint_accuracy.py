"""Accuracy of `fm.odeint`, and torchdiffeq's interface and numbers."""

from __future__ import annotations

import pytest
import torch
from odeint_problems import D, Linear, Net, spiral, spiral_y0, times

import fmkernels as fm

try:
    import torchdiffeq as peer  # type: ignore[import-not-found]
except ImportError:
    peer = None
needs_peer = pytest.mark.skipif(peer is None, reason="torchdiffeq is not installed")

ADAPTIVE = ["dopri5", "tsit5", "dopri8", "bosh3", "fehlberg", "heun_euler"]
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4", "ab3", "am4", "explicit_adams", "implicit_adams"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
    torch.testing.assert_close(y[1:, 0], torch.tensor(_GRID[method], dtype=D), rtol=1e-13, atol=1e-13)


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
