"""The continuous adjoint: its gradients, against differences and the peer, and what it keeps."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from adjoint_problems import D, Net, assert_all_close, loss_of, needs_peer, peer
from torch import Tensor, nn

import fmkernels as fm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def directional_differences(function: Any, inputs: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """Central differences along one direction of each input."""
    step, slopes = 1e-5, []
    with torch.no_grad():
        for x, direction in zip(inputs, directions, strict=True):
            kept, values = x.detach().clone(), []
            for sign in (1.0, -1.0):
                x.copy_(kept + sign * step * direction)
                values.append(function())
            x.copy_(kept)
            slopes.append((values[0] - values[1]) / (2 * step))
    return slopes


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
    assert_all_close(adjoint, direct, 2e-6)
    directions = [torch.randn_like(x) for x in inputs]
    expected = directional_differences(solve, inputs, directions)
    assert_all_close([(g * d).sum() for g, d in zip(direct, directions, strict=True)], expected, 2e-6)


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


@pytest.mark.parametrize("forward", [(1e-3, 1e-8), (1e-8, 1e-3)], ids=["loose_rtol", "loose_atol"])
def test_the_backward_solve_has_the_forward_ones_tolerances(forward: tuple[float, float]) -> None:
    net, t = Net(), torch.tensor([0.0, 1.0, 2.0], dtype=D)
    y0 = torch.randn(2, 2, dtype=D, requires_grad=True)
    rtol, atol = forward

    def grads(**settings: Any) -> list[Tensor]:
        y = fm.odeint_adjoint(net, y0, t, rtol=rtol, atol=atol, **settings)
        return list(torch.autograd.grad(loss_of(y), [y0, *net.used()]))

    default, swapped = grads(), grads(adjoint_rtol=atol, adjoint_atol=rtol)
    for settings in ({"adjoint_rtol": rtol}, {"adjoint_atol": atol}, {"adjoint_rtol": rtol, "adjoint_atol": atol}):
        assert all(map(torch.equal, default, grads(**settings))), settings
    assert not any(map(torch.equal, default, swapped))


@pytest.mark.parametrize("name", ["adjoint_rtol", "adjoint_atol"])
def test_each_backward_tolerance_is_its_own(name: str) -> None:
    """With the other one at nothing it alone decides how many calls the backward solve makes."""
    net, y0 = Net(), torch.randn(2, 2, dtype=D, requires_grad=True)
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(0))
    counts = []
    for tol in (1e-3, 1e-9):
        settings = {"adjoint_rtol": 1e-13, "adjoint_atol": 1e-13, name: tol}
        y = fm.odeint_adjoint(net, y0, torch.tensor([0.0, 2.0], dtype=D), **settings)
        calls.clear()
        loss_of(y).backward()
        counts.append(len(calls))
    assert counts[1] > 3 * counts[0], counts


def test_y_is_set_to_the_forward_solution_at_each_output() -> None:
    """Bit for bit, so that what a backward solve loses does not go beyond an output time."""
    net, t = Net(), torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=D)
    seen: list[tuple[float, Tensor]] = []
    net.register_forward_pre_hook(lambda _, args: seen.append((float(args[0]), args[1].detach().clone())))
    y = fm.odeint_adjoint(net, torch.randn(2, 2, dtype=D, requires_grad=True), t, rtol=1e-3, atol=1e-3)
    seen.clear()
    loss_of(y).backward()
    for time, state in zip(t[1:].tolist(), y[1:].detach(), strict=True):
        assert any(at == time and torch.equal(x, state) for at, x in seen), time


def test_seminorm_leaves_the_parameters_out() -> None:
    """Where only the parameters' gradient changes with time, only it asks for small steps."""

    class Driven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strength, self.calls = nn.Parameter(torch.zeros(1, dtype=D)), 0

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return self.strength * torch.sin(40.0 * t) + 0.0 * y

    calls = []
    for norm in (None, "seminorm"):
        func = Driven()
        options = None if norm is None else {"norm": norm}
        y = fm.odeint_adjoint(func, torch.ones(1, dtype=D), torch.tensor([0.0, 1.0], dtype=D), adjoint_options=options)
        func.calls = 0
        y[-1].sum().backward()
        calls.append(func.calls)
    assert calls[0] > 3 * calls[1], calls


class Saved:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Recorded:
    """Counts the tensors that autograd still keeps at the end."""

    def __enter__(self) -> Recorded:
        self.kept: weakref.WeakSet[Saved] = weakref.WeakSet()

        def pack(x: Tensor) -> Saved:
            saved = Saved(x.detach())  # an output would keep the node that keeps it
            self.kept.add(saved)
            return saved

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.hooks.__exit__(*args)
        self.count, self.size = len(self.kept), sum(saved.tensor.numel() for saved in self.kept)


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
        y = fm.odeint(net, y0, t, method="rk4", options={"step_size": 1 / 200})
    assert y.requires_grad
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
    assert_all_close(given, whole[:2], 1e-7)
    y = fm.odeint_adjoint(func, y0, t, adjoint_params=())
    (grad,) = torch.autograd.grad(y.sum(), y0, retain_graph=True)
    torch.testing.assert_close(grad, whole[0], rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad((y**2).sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()
    net.v.requires_grad_(False)
    norm = lambda state: state[1].abs().max()  # noqa: E731
    with pytest.warns(UserWarning, match="adjoint_params"):
        fm.odeint_adjoint(net, y0, t, adjoint_options={"norm": norm})


@pytest.mark.parametrize("made", [False, True], ids=["leaf", "computed"])
def test_a_parameter_that_is_given_twice_counts_once(made: bool) -> None:
    leaf, other = (torch.tensor(value, dtype=D, requires_grad=True) for value in (0.7, 0.2))
    w = leaf.sin() if made else leaf
    lengths = set()

    def norm(parts: Any) -> Tensor:
        lengths.add(len(parts))
        return torch.stack([x.abs().max() for x in parts if x.numel()]).max()

    y0, t = torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    grads = []
    for params in ((w, other), (w, other, w), [w, w, other, other]):
        y = fm.odeint_adjoint(lambda t, y: other - w * y, y0, t, adjoint_params=params, adjoint_options={"norm": norm})
        grads.append(torch.autograd.grad(y[-1].sum(), [leaf, other], retain_graph=True))
    assert grads[0] == grads[1] == grads[2]
    assert len(lengths) == 1


def test_adjoint_of_parameters_made_by_others() -> None:
    raw = torch.randn(2, 2, dtype=D, requires_grad=True)
    made = raw.sin()
    y0, t = torch.randn(3, 2, dtype=D), torch.tensor([0.0, 0.5, 1.0], dtype=D)
    func = lambda t, y: y @ made  # noqa: E731
    y = fm.odeint_adjoint(func, y0, t, adjoint_params=(made,), rtol=1e-10, atol=1e-10)
    exact = torch.stack([y0 @ torch.linalg.matrix_exp(s * made) for s in t])
    grads = [torch.autograd.grad(loss_of(x), raw, retain_graph=True) for x in (y, exact)]
    assert_all_close(*grads, 5e-9)


def test_adjoint_of_complex_states_and_parameters() -> None:
    rate = torch.tensor(0.3 + 1.5j, dtype=torch.complex128, requires_grad=True)
    y0 = torch.tensor([1.0 + 0.5j, -2.0j], dtype=torch.complex128, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=D)
    func = lambda t, y: rate * y  # noqa: E731
    y = fm.odeint_adjoint(func, y0, t, adjoint_params=(rate,), rtol=1e-10, atol=1e-10)
    exact = y0 * torch.exp(rate * t[:, None])
    weight = torch.randn(3, 2, dtype=torch.complex128)
    grads = [torch.autograd.grad((x * weight).real.sum(), [y0, rate], retain_graph=True) for x in (y, exact)]
    assert_all_close(*grads, 5e-10)


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
    assert_all_close(*grads, 0.03)


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
