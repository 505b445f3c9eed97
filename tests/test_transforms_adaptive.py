"""Adaptive solves within torch.func's transforms: what loops, analytic Jacobians and autograd find, and no residue."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as outer_hessian
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import fmkernels as fm
from fmkernels import _torch
from fmkernels.solvers.adaptive.controllers import PIController

D = torch.float64
A = torch.tensor([[0.3, -0.5, 0.1], [0.2, 0.1, 0.4], [-0.3, 0.2, 0.0]], dtype=D)
Y0 = torch.tensor([0.3, -0.2, 0.5], dtype=D)
YS = torch.stack([Y0, -2.0 * Y0, 0.1 * Y0, 0.3 + Y0])
SCALES = torch.tensor([1.0, -0.4, 2.5], dtype=D)
T = torch.linspace(0.0, 1.0, 4, dtype=D)
ENDS = T[[0, -1]]
TIGHT = {"rtol": 1e-8, "atol": 1e-9}
CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # between solves of different steps
SAME = {"rtol": 1e-10, "atol": 1e-11}  # of the same steps
TWO = [ENDS, T]
IDS = ["ends", "between"]


def field(scale: float | Tensor = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, y: torch.tanh(y @ A) * scale + s * y


def solve(y: Tensor, t: Tensor = ENDS, scale: float | Tensor = 1.0, **options: Any) -> Tensor:
    return fm.odeint(field(scale), y, t, **{**TIGHT, **options})


def loop(f: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    return torch.stack([f(*entry) for entry in zip(*arguments, strict=True)])


# ---------------------------------------------------------------------- vmap


@pytest.mark.parametrize("t", TWO, ids=IDS)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_vmap_is_a_loop(method: str, t: Tensor) -> None:
    def f(y: Tensor) -> Tensor:
        return solve(y, t, method=method, rtol=1e-8, atol=1e-9)

    assert_close(vmap(f)(YS), loop(f, YS), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("t", TWO, ids=IDS)
def test_vmap_over_what_the_function_closes_over(t: Tensor) -> None:
    """A hidden dimension that the state lacks shows in the function's output alone."""
    assert_close(vmap(lambda s: solve(Y0, t, s))(SCALES), loop(lambda s: solve(Y0, t, s), SCALES), **CLOSE)

    def late(s: Tensor) -> Tensor:
        options = {"jump_t": torch.tensor([0.5])}
        return fm.odeint(lambda u, y: -y if u < 0.5 else y * s, Y0, t, options=options, **TIGHT)

    assert_close(vmap(late)(SCALES), loop(late, SCALES), **CLOSE)


def test_vmap_over_a_networks_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(D)
    several = {name: torch.stack([p.detach() * s for s in SCALES]) for name, p in net.named_parameters()}

    def f(parameters: dict[str, Tensor]) -> Tensor:
        return fm.odeint(lambda s, y: functional_call(net, parameters, (y,)), Y0, T, **TIGHT)

    expected = torch.stack([f({name: p[i] for name, p in several.items()}) for i in range(len(SCALES))])
    assert_close(vmap(f)(several), expected, **CLOSE)


def test_vmap_within_vmap_in_either_order() -> None:
    expected = torch.stack([loop(lambda y, s=s: solve(y, T, s), YS) for s in SCALES])
    inner_y = vmap(vmap(lambda y, s: solve(y, T, s), (0, None)), (None, 0))(YS, SCALES)
    inner_s = vmap(vmap(lambda y, s: solve(y, T, s), (None, 0)), (0, None))(YS, SCALES)
    assert_close(inner_y, expected, **CLOSE)
    assert_close(inner_s, expected.transpose(0, 1), **CLOSE)


def test_vmaps_own_arguments() -> None:
    expected = loop(lambda y: solve(y, T), YS)
    assert_close(vmap(lambda y: solve(y, T), in_dims=1, out_dims=2)(YS.t()), expected.permute(1, 2, 0), **CLOSE)
    assert_close(vmap(lambda y: solve(y, T), chunk_size=3)(YS), expected, **CLOSE)
    for randomness in ("error", "same", "different"):
        assert_close(vmap(lambda y: solve(y, T), randomness=randomness)(YS), expected, **CLOSE)
    # what maps over nothing has no hidden dimension
    assert_close(vmap(lambda y: solve(Y0, T), out_dims=None)(YS), solve(Y0, T), **SAME)
    assert_close(vmap(lambda y: solve(y, T.flip(0)))(YS), loop(lambda y: solve(y, T.flip(0)), YS), **CLOSE)


def test_states_of_every_kind_within_vmap() -> None:
    numbers = torch.tensor([0.5, -1.0, 2.0], dtype=D)
    assert_close(vmap(lambda y: solve_scalar(y))(numbers), loop(solve_scalar, numbers), **CLOSE)
    pair = vmap(lambda y: fm.odeint(lambda s, y: (y[1], -y[0]), (y, 2.0 * y), T, **TIGHT))(YS)
    for got, angle in zip(pair, ((1.0, 2.0), (2.0, -1.0)), strict=True):
        rotated = angle[0] * torch.cos(T)[:, None] + angle[1] * torch.sin(T)[:, None]
        assert_close(got, YS[:, None] * rotated, **CLOSE)
    turned = vmap(lambda y: fm.odeint(lambda s, y: 1j * y, y + 0j, T, **TIGHT))(YS)
    assert_close(turned, YS[:, None] * torch.exp(1j * T)[:, None], **CLOSE)
    empty = vmap(lambda y: solve(y[:0, None].expand(0, 3), T))(YS)
    assert empty.shape == (4, 4, 0, 3)


def solve_scalar(y: Tensor) -> Tensor:
    return fm.odeint(lambda s, y: torch.sin(y) * s, y, T, **TIGHT)


def test_the_step_control_is_that_of_the_largest_norm() -> None:
    """Each entry meets the tolerances as by itself, though a thousand others have no error."""
    ys = torch.zeros(1000, 1, dtype=D)
    ys[0] = 1.0

    def f(y: Tensor, **options: Any) -> Tensor:
        return fm.odeint(lambda s, y: torch.sin(20.0 * s) * y, y, ENDS, rtol=0.0, atol=1e-7, **options)[-1]

    steps: list[float] = []
    assert_close(vmap(f)(ys)[0], f(ys[0]), rtol=0.0, atol=1e-12)
    assert_close(vmap(lambda y: f(y, options={"norm": largest(steps)}))(ys)[0], f(ys[0]), rtol=0.0, atol=1e-12)
    assert steps


def largest(seen: list[float]) -> Callable[[Tensor], Tensor]:
    def norm(ratio: Tensor) -> Tensor:
        seen.append(1.0)
        assert ratio.shape == (1,)
        return ratio.abs().amax()

    return norm


def test_options_within_vmap() -> None:
    def f(y: Tensor, **more: Any) -> Tensor:
        return solve(y, T, **more)

    for more in (
        {"rtol": torch.tensor([1e-9, 1e-10, 1e-9], dtype=D)},
        {"atol": torch.tensor(1e-10)},
        {"options": {"step_t": torch.tensor([0.4])}},
        {"options": {"jump_t": torch.tensor([0.4]), "first_step": 1e-2, "max_step": 0.2}},
        {"options": {"norm": lambda ratio: ratio.abs().max()}},
        {"options": {"controller": PIController()}},
    ):
        assert_close(vmap(lambda y, more=more: f(y, **more))(YS), loop(lambda y, more=more: f(y, **more), YS), **CLOSE)


@pytest.mark.parametrize("rtol", [1e-7, torch.tensor([[1e-7], [1e-8]], dtype=D), torch.tensor([1e-7] * 3)])
def test_step_sizes_of_each_sample_within_vmap(rtol: Any) -> None:
    """Each index of dimension 0 has its own, shared by the entries of the vmap."""
    ys, scale = torch.stack([YS[:2], YS[2:], 2.0 * YS[:2]]), torch.tensor([[1.0], [6.0]], dtype=D)
    times = []

    def f(y: Tensor) -> Tensor:
        def velocity(s: Tensor, y: Tensor) -> Tensor:
            times.append(s.shape)
            return torch.tanh(y @ A) * torch.sin(scale * s[:, None])

        return fm.odeint(velocity, y, T, rtol=rtol, atol=1e-9, options={"per_sample": True})

    assert_close(vmap(f)(ys), loop(f, ys), rtol=1e-5, atol=1e-6)
    assert set(times) == {(2,)}
    ys = ys[:2]
    assert_close(vmap(jacrev(f))(ys), loop(lambda y: jacobian(f, y), ys), rtol=1e-5, atol=1e-6)


def test_the_times_and_states_that_a_function_keeps_stay() -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def velocity(s: Tensor, y: Tensor) -> Tensor:
        kept.append((s, y.sum()))
        return -y

    vmap(lambda y: fm.odeint(velocity, y, T))(YS)
    times = [float(s) for s, _ in kept]
    assert len(set(times)) > 6
    assert max(times) == 1.0


def test_functions_that_return_one_buffer_or_their_input() -> None:
    assert_close(vmap(lambda y: fm.odeint(lambda s, y: y, y, T, **TIGHT))(YS)[:, -1], YS * torch.e, **CLOSE)
    static = torch.empty(4, 3, dtype=D)  # hidden dimension first, as vmap makes it

    def velocity(s: Tensor, y: Tensor) -> Tensor:
        static.copy_(torch.sin(s) * torch.ones(4, 3, dtype=D))
        return static

    got = vmap(lambda y: fm.odeint(velocity, y.expand(4, 3), ENDS, **TIGHT)[-1])(YS)
    assert_close(got, (YS + 1.0 - torch.cos(ENDS[1]))[:, None].expand(4, 4, 3), **CLOSE)


def test_callbacks_see_the_states_of_the_entries() -> None:
    seen: list[tuple[str, Any, float]] = []

    class Field:
        def __call__(self, s: Tensor, y: Tensor) -> Tensor:
            return -50.0 * y * scale

        def callback_step(self, s: Tensor, y: Tensor, h: Tensor) -> None:
            seen.append(("step", tuple(y.shape), float(s)))

        def callback_accept_step(self, s: Tensor, y: Tensor, h: Tensor) -> None:
            seen.append(("accept", tuple(y.shape), float(s)))

        def callback_reject_step(self, s: Tensor, y: Tensor, h: Tensor) -> None:
            seen.append(("reject", tuple(y.shape), float(s)))

    scale = 1.0
    options = {"first_step": 0.5}
    vmap(lambda y: fm.odeint(Field(), y, ENDS, options=options))(YS)
    assert {name for name, *_ in seen} == {"step", "accept", "reject"}
    assert {shape for _, shape, _ in seen} == {(3,)}
    once = [entry for entry in seen if entry[0] == "accept"]
    assert len({at for *_, at in once}) == len(once)


def test_a_solve_that_fails_within_vmap_gives_nan() -> None:
    with pytest.warns(UserWarning, match="max_steps"):
        got = vmap(lambda y: fm.odeint(field(), y, T, options={"max_num_steps": 3}, **TIGHT))(YS)
    assert torch.equal(got[:, 0], YS)
    assert bool(got[:, -1].isnan().all())


# ---------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("t", TWO, ids=IDS)
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians_are_those_of_autograd(transform: Any, t: Tensor) -> None:
    assert_close(transform(lambda y: solve(y, t))(Y0), jacobian(lambda y: solve(y, t), Y0), **SAME)
    scale = torch.tensor(1.2, dtype=D)
    of_scale = jacobian(lambda s: solve(Y0, t, s), scale)
    assert_close(transform(lambda s: solve(Y0, t, s))(scale), of_scale, **SAME)
    assert_close(transform(lambda t: solve(Y0, t))(t), jacobian(lambda t: solve(Y0, t), t), **SAME)
    options = {"step_t": torch.tensor([0.25]), "jump_t": torch.tensor([0.5])}
    parts = [
        f(lambda y: solve(y, t, rtol=1e-5, options=options)) for f in (transform, lambda f: lambda y: jacobian(f, y))
    ]
    assert_close(parts[0](Y0), parts[1](Y0), **SAME)


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_the_jacobian_of_a_linear_field_is_the_exponential(transform: Any) -> None:
    exact = torch.linalg.matrix_exp(A)
    assert_close(transform(lambda y: fm.odeint(lambda s, y: A @ y, y, ENDS, **TIGHT)[-1])(Y0), exact, **CLOSE)
    of_a = transform(lambda a: fm.odeint(lambda s, y: a @ y, Y0, ENDS, **TIGHT)[-1])(A)
    assert_close(of_a, jacobian(lambda a: torch.linalg.matrix_exp(a) @ Y0, A), **CLOSE)
    rate = transform(lambda t: fm.odeint(lambda s, y: A @ y, Y0, t, **TIGHT)[-1])(ENDS)
    assert_close(rate, torch.stack([-A @ exact @ Y0, A @ exact @ Y0], 1), **CLOSE)


def energy(y: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    return solve(y, T[1:], scale).square().sum()


def test_gradients_of_each_kind() -> None:
    expected = jacobian(energy, Y0)
    assert_close(grad(energy)(Y0), expected, **SAME)
    assert_close(vjp(energy, Y0)[1](torch.tensor(1.0, dtype=D))[0], expected, **SAME)
    assert_close(jvp(energy, (Y0,), (YS[3],))[1], expected @ YS[3], **SAME)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(energy(forward_ad.make_dual(Y0, YS[3])))
        assert_close(got.tangent, expected @ YS[3], **SAME)
    with torch.no_grad():  # forward mode goes on there
        assert_close(jvp(energy, (Y0,), (YS[3],))[1], expected @ YS[3], **SAME)


def test_hessians() -> None:
    expected = outer_hessian(energy, Y0)
    assert_close(hessian(energy)(Y0), expected, **SAME)
    assert_close(jacrev(jacrev(energy))(Y0), expected, **SAME)
    assert_close(jacfwd(jacfwd(energy))(Y0), expected, **SAME)


def test_nested_transforms() -> None:
    rows = loop(lambda y: jacobian(energy, y), YS)
    assert_close(vmap(grad(energy))(YS), rows, **CLOSE)
    assert_close(vmap(jacfwd(energy))(YS), rows, **CLOSE)
    blocks = torch.block_diag(*loop(lambda y: jacobian(solve_end, y), YS)).reshape(4, 3, 4, 3)
    for transform in (jacrev, jacfwd):
        assert_close(transform(vmap(solve_end))(YS), blocks, **CLOSE)
    assert_close(vmap(hessian(energy))(YS[:2]), loop(lambda y: outer_hessian(energy, y), YS[:2]), **CLOSE)
    # over a parameter that the state does not know of
    of_scales = loop(lambda s: jacobian(lambda s: energy(Y0, s), s), SCALES)
    assert_close(vmap(grad(lambda s: energy(Y0, s)))(SCALES), of_scales, **CLOSE)
    assert_close(grad(lambda s: vmap(lambda s: energy(Y0, s))(s).sum())(SCALES), of_scales, **CLOSE)
    assert_close(jvp(vmap(solve_end), (YS,), (YS,))[1], loop(lambda y: jacobian(solve_end, y) @ y, YS), **CLOSE)


def solve_end(y: Tensor) -> Tensor:
    return solve(y)[-1]


def test_per_sample_gradients_of_a_networks_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(D)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], y: Tensor) -> Tensor:
        return fm.odeint(lambda s, y: functional_call(net, parameters, (y,)), y, ENDS, **TIGHT)[-1].square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, YS)
    for i, y in enumerate(YS):
        expected = torch.autograd.grad(
            fm.odeint(lambda s, y: net(y), y, ENDS, **TIGHT)[-1].square().sum(), [*net.parameters()]
        )
        for name, want in zip(parameters, expected, strict=True):
            assert_close(got[name][i], want, **CLOSE)


@pytest.mark.parametrize("t", TWO, ids=IDS)
def test_autograd_around_vmap(t: Tensor) -> None:
    """vmap does not show that what it maps over needs a gradient."""
    w, ys = A.clone().requires_grad_(), YS.clone().requires_grad_()

    def f(y: Tensor, t: Tensor = t) -> Tensor:
        return fm.odeint(lambda s, y: torch.tanh(y @ w), y, t, **TIGHT).square().sum()

    mapped, looped = (torch.autograd.grad(total(f, ys), (w, ys)) for total in (over_entries, in_a_loop))
    assert_close(mapped, looped, **CLOSE)
    assert_close(torch.autograd.grad(vmap(f)(YS).sum(), w)[0], looped[0], **CLOSE)
    frozen = torch.autograd.grad(vmap(lambda y: solve(y, t).square().sum())(ys).sum(), ys)[0]
    assert_close(frozen, loop(lambda y: jacobian(lambda y: solve(y, t).square().sum(), y), YS), **CLOSE)
    leaf = t.clone().requires_grad_()
    of_t = torch.autograd.grad(vmap(lambda y: f(y, leaf))(YS).sum(), leaf)[0]
    assert_close(of_t, torch.autograd.grad(sum(f(y, leaf) for y in YS), leaf)[0], **CLOSE)


def over_entries(f: Callable[[Tensor], Tensor], ys: Tensor) -> Tensor:
    return vmap(f)(ys).sum()


def in_a_loop(f: Callable[[Tensor], Tensor], ys: Tensor) -> Tensor:
    return torch.stack([f(y) for y in ys]).sum()


def test_dense_solutions_within_transforms() -> None:
    def between(y: Tensor) -> Tensor:
        return fm.odeint_dense(field(), y, 0.0, 1.0, **TIGHT)(torch.tensor([0.3, 0.9], dtype=D))

    times = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=D)
    assert_close(vmap(between)(YS), loop(lambda y: solve(y, times)[1:3], YS), rtol=1e-6, atol=1e-6)
    for transform in (jacrev, jacfwd):
        assert_close(transform(between)(Y0), jacobian(between, Y0), **SAME)


# ---------------------------------------------------------------------- fm.sample


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(A.clone())

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        assert t.shape == x.shape[:1]
        v = torch.tanh(x @ self.w) * (1.0 + t[:, None])
        return v if c is None else v + c


XS = torch.stack([YS, YS.flip(0) * 0.5])


def samples(x: Tensor, **options: Any) -> Tensor:
    return fm.sample(Net(), x, method="dopri5", time_dtype=D, **TIGHT, **options)[0]


def test_vmap_over_adaptive_sampling() -> None:
    assert_close(vmap(samples)(XS), loop(samples, XS), **CLOSE)
    conditions = XS + 1.0
    assert_close(vmap(lambda c: samples(YS, c=c))(conditions), loop(lambda c: samples(YS, c=c), conditions), **CLOSE)
    both = loop(lambda x, c: samples(x, c=c), XS, conditions)
    assert_close(vmap(lambda x, c: samples(x, c=c))(XS, conditions), both, **CLOSE)

    compactions = []

    def trajectory(x: Tensor) -> Tensor:
        result = fm.sample(Net(), x, method="tsit5", **TIGHT, time_grid=[0.0, 0.3, 1.0], return_trajectory=True)[1]
        compactions.append(result.compaction)
        assert result.steps.shape == (4,)
        return result.trajectory

    assert_close(vmap(trajectory)(XS), loop(trajectory, XS), **CLOSE)
    assert compactions[0] == "off: within torch.func's transforms"


def test_vmap_over_guided_sampling() -> None:
    guidance = fm.guidance.CFG(1.5, negative={"c": -YS})
    conditions = XS + 1.0

    def f(c: Tensor) -> Tensor:
        return samples(YS, guidance=guidance, c=c)

    assert_close(vmap(f)(conditions), loop(f, conditions), **CLOSE)


@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("gradient", ["none", "direct"])
def test_vmap_over_model_kwargs_alone_on_fixed_grids(gradient: str, trajectory: bool) -> None:
    def f(c: Tensor) -> Tensor:
        x, result = fm.sample(
            Net(), YS, method="heun2", steps=4, gradient=gradient, return_trajectory=trajectory, time_dtype=D, c=c
        )
        return result.trajectory if trajectory else x

    assert_close(vmap(f)(XS), loop(f, XS), **SAME)


def test_derivatives_of_adaptive_sampling_are_told_to_be_absent() -> None:
    of_kwargs = jacrev(lambda c: samples(YS, c=c)), jacrev(lambda c: fm.sample(Net(), YS, steps=3, c=c)[0])
    for f in (jacrev(samples), jacrev(lambda x: vmap(samples)(x[None])), *of_kwargs):
        with pytest.raises(ValueError, match=r"^gradient: expected .direct. within torch\.func"):
            f(YS)
    for f in (jacfwd(samples), jacfwd(lambda x: vmap(samples)(x[None])), jacfwd(lambda c: samples(YS, c=c))):
        with pytest.raises(ValueError, match=r"^gradient: expected steps= or a method of fixed steps"):
            f(YS)
    # a leaf outside of vmap has none without a word, as ever
    assert not vmap(samples)(XS.clone().requires_grad_()).requires_grad


# ---------------------------------------------------------------------- what cannot be, and what stays behind


def test_values_that_vmap_maps_over_are_told() -> None:
    several = torch.tensor([1e-3, 1e-4], dtype=D)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "t": lambda v: solve(Y0, torch.stack([0.0 * v, v])),
        "rtol": lambda v: solve(Y0, rtol=v),
        "atol": lambda v: solve(Y0, atol=v * torch.ones(3, dtype=D)),
        "options: step_t": lambda v: solve(Y0, options={"step_t": v[None]}),
        "options: first_step": lambda v: solve(Y0, options={"first_step": v}),
    }
    for name, f in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: expected values that torch.vmap does not map over"):
            vmap(f)(several)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_checkpoints_within_transforms_are_told(method: str) -> None:
    w = A.clone().requires_grad_()

    def f(y: Tensor) -> Tensor:
        return fm.odeint(lambda s, y: y @ w, y, ENDS, method=method, options={"checkpoint": True})[-1]

    for call in (lambda: jacrev(f)(Y0), lambda: jacfwd(f)(Y0), lambda: vmap(f)(YS)):
        with pytest.raises(ValueError, match=r"^options: checkpoint: expected False within torch\.func's transforms"):
            call()


def test_checkpointed_sampling_within_transforms_is_told() -> None:
    def f(x: Tensor) -> Tensor:
        return fm.sample(Net(), x, steps=4, gradient="checkpoint", time_dtype=D)[0]

    for call in (lambda: jacrev(f)(YS), lambda: vmap(f)(XS)):
        with pytest.raises(ValueError, match=r"^gradient: expected 'direct' within torch.func's transforms"):
            call()


@pytest.mark.parametrize("transform", [lambda f: vmap(f)(YS), lambda f: jacrev(f)(Y0), lambda f: jacfwd(f)(Y0)])
def test_a_transform_that_raises_leaves_nothing_behind(transform: Any) -> None:
    class Stop(Exception):
        pass

    class Until:
        def __call__(self, s: Tensor, y: Tensor) -> Tensor:
            if s > 0.3:
                raise Stop
            return field()(s, y)

    def attempt() -> weakref.ref[Until]:
        until = Until()
        with pytest.raises(Stop):
            transform(lambda y: fm.odeint(until, y, ENDS, **TIGHT))
        return weakref.ref(until)

    expected = solve(Y0)
    before = fm.cache_info()["stepper"].entries
    function = attempt()
    assert not _torch.transform_active()
    gc.collect()
    assert function() is None
    assert fm.cache_info()["stepper"].entries <= before
    assert torch.equal(solve(Y0), expected)
    transform(solve)
    gc.collect()
    assert torch.equal(solve(Y0), expected)


def test_outputs_unlike_the_state_are_told_in_the_entries_shape() -> None:
    with pytest.raises(ValueError, match=r"func: expected an output of the state's shape, \(3,\)"):
        vmap(lambda y: fm.odeint(lambda s, y: y[:2], y, ENDS))(YS)
