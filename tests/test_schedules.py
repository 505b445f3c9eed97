"""A schedule of one's own: learnable, not differentiable, infinite at an end, used first under some mode; equality."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import pytest
import torch
from path_problems import EXACT, Learned, Mine
from rounding import assert_rounded
from torch._subclasses.fake_tensor import FakeTensorMode

import fmkernels as fm
from fmkernels.paths import (
    Path,
    Polynomial,
)


class WithDerivatives(Learned):
    def d_alpha(self, t):
        return self.n * t ** (self.n - 1)

    def d_sigma(self, t):
        return -self.n * t ** (self.n - 1)


def loss_gradients(path: Learned, learn_t: bool, compiled: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_1, x_0, w = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    t = (0.1 + 0.8 * torch.rand(6, generator=generator, dtype=torch.float64)).requires_grad_(learn_t)

    def loss(t):
        batch = path.sample(x_1, x_0, t)
        return fm.cfm_loss(torch.tanh(w * batch.x_t), batch)

    value = (torch.compile(loss, fullgraph=True) if compiled else loss)(t)
    return list(torch.autograd.grad(value, [path.n, *([t] if learn_t else [])]))


@pytest.mark.parametrize("learn_t", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_learnable_schedule_and_learnable_times_have_their_gradients(learn_t: bool, compiled: bool) -> None:
    """The velocity's coefficients depend on the exponent and on t too: closed derivatives are the reference."""
    want = loss_gradients(WithDerivatives(1.7), learn_t, False)
    got = loss_gradients(Learned(1.7), learn_t, compiled)
    for a, b in zip(got, want, strict=True):
        assert_rounded(
            a, b, 1000, size=b.abs().max()
        )  # powers and logarithms, some thirty, in a sum of terms of both signs


def test_derivatives_of_a_schedule_require_grad_only_where_something_is_learnt() -> None:
    t = torch.rand(3, dtype=torch.float64)
    assert Learned(2.0).d_alpha(t).requires_grad
    assert not Learned(2.0).requires_grad_(False).d_alpha(t).requires_grad
    with torch.no_grad():
        assert not Learned(2.0).d_alpha(t).requires_grad
    leaf = t.clone().requires_grad_()
    (second,) = torch.autograd.grad(Learned(3.0).requires_grad_(False).d_alpha(leaf).sum(), leaf)
    assert_rounded(second, 6 * t, 8)


def test_a_parameter_updated_in_place_is_seen_at_the_next_call() -> None:
    path, t = Learned(2.0), torch.rand(4, dtype=torch.float64)
    path.coefficients(t)
    with torch.no_grad():
        path.n.fill_(3.0)
    assert_rounded(path.coefficients(t).d_alpha_t, 3 * t**2, 8)


def schedule(function, name: str = "alpha") -> Path:
    """A path of which one function is given."""
    functions = {"alpha": lambda self, t: t, "sigma": lambda self, t: 1 - t, name: lambda self, t: function(t)}
    return type("Mine", (Path,), functions)()


TABLE = torch.linspace(0, 1, 1001)
NOT_DIFFERENTIABLE = {
    "table": lambda t: TABLE[(1000 * t).round().long()],
    "round": lambda t: torch.round(10 * t) / 10,
    "detach": lambda t: t.detach() ** 2,
    "integer": lambda t: (4 * t).long(),
    "searchsorted": lambda t: torch.searchsorted(TABLE, t.detach().float()) / 1000,
}


@pytest.mark.parametrize("name", ["alpha", "sigma", "gamma"])
@pytest.mark.parametrize("kind", NOT_DIFFERENTIABLE)
def test_a_schedule_without_derivative_is_refused_not_a_velocity_of_zero(name: str, kind: str) -> None:
    path = schedule(NOT_DIFFERENTIABLE[kind], name)
    x = torch.rand(5, 2)
    with pytest.raises((TypeError, ValueError), match=rf"Mine\.{name}.*expected"):
        fm.cfm_loss(x, x_1=x, x_0=x, z=x if name == "gamma" else None, t=torch.rand(5), path=path)
    if kind != "integer":
        with pytest.raises(ValueError, match=rf"or a method d_{name}\(t\) beside it"):
            getattr(path, f"d_{name}")(torch.rand(5))


def test_a_schedule_without_derivative_is_refused_under_compile_too() -> None:
    path, x = schedule(NOT_DIFFERENTIABLE["round"]), torch.rand(5, 2)
    with pytest.raises(ValueError, match=r"or a method d_alpha\(t\) beside it"):
        torch.compile(lambda x, t: fm.cfm_loss(x, x_1=x, x_0=x, t=t, path=path))(x, torch.rand(5))


def test_a_table_with_its_own_derivative_is_a_schedule() -> None:
    path = type(schedule(NOT_DIFFERENTIABLE["table"]))
    path.d_alpha = lambda self, t: 1.0
    assert (path().coefficients(torch.rand(5)).d_alpha_t == 1).all()


@pytest.mark.parametrize(
    "constant",
    [lambda t: 1, lambda t: 0.5, lambda t: torch.tensor(2.0), torch.ones_like, lambda t: torch.full_like(t, 0.3)],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_constant_has_the_derivative_zero(constant, shape) -> None:
    c = schedule(constant).coefficients(torch.rand(shape))
    assert c.d_alpha_t.shape == shape
    assert (c.d_alpha_t == 0).all()


@pytest.mark.parametrize("path", EXACT, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differentiating_a_schedule_gives_its_closed_derivative_up_to_the_ends(path: Path, dtype: torch.dtype) -> None:
    """So that learnable times have finite gradients, the velocity, at 0 and 1 too."""
    t = torch.tensor([0.0, 1e-9, 1e-6, 0.1, 0.49, 0.51, 0.9, 1 - 1e-6, 1.0], dtype=dtype, requires_grad=True)
    for name in ("alpha", "sigma", "gamma"):
        value, want = getattr(path, name)(t), getattr(path, f"d_{name}")(t.detach())
        if value is None:
            continue
        plain = getattr(path, name)(t.detach())
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(plain), rtol=0, atol=0)
        if isinstance(value, torch.Tensor):
            (slope,) = torch.autograd.grad(value.sum(), t)
            want = torch.as_tensor(want, dtype=dtype).expand(t.shape)
            torch.testing.assert_close(slope, want, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-5)
            forward = torch.func.jvp(lambda t, name=name: getattr(path, name)(t), (t.detach(),), (torch.ones_like(t),))
            torch.testing.assert_close(forward[1], slope)


def test_a_second_derivative_without_limit_is_held_at_a_distance_from_the_end() -> None:
    t = torch.tensor([0.0, 1e-6, 1e-4, 0.3], dtype=torch.float64, requires_grad=True)
    (second,) = torch.autograd.grad(Polynomial(1.5).d_alpha(t).sum(), t)
    torch.testing.assert_close(second, 0.75 * t.detach().clamp(min=1e-4) ** -0.5)


@pytest.mark.parametrize("path", EXACT, ids=repr)
def test_learnable_times_at_the_ends_have_finite_gradients(path: Path) -> None:
    x_1, x_0 = torch.randn(2, 3), torch.randn(2, 3)
    for target in ("velocity", "x_1", "x_0", "score"):
        t = torch.tensor([0.0, 1.0], requires_grad=True)
        batch = path.sample(x_1, x_0, t, store_noise=True)
        fm.cfm_loss(batch.x_t, batch, target=target).backward()
        assert torch.isfinite(t.grad).all(), target


INFINITE = {
    "pole at 0": (lambda t: torch.ones_like(t), lambda t: 1 / t - 1),
    "tangent": (lambda t: 1.0, lambda t: torch.tan(0.5 * math.pi * (1 - t))),
    "root at 0": (lambda t: torch.sqrt(t), lambda t: 1 - torch.sqrt(t)),
    "logarithm": (lambda t: 1.0, lambda t: -torch.log(t)),
}


def infinite(name: str) -> Path:
    alpha, sigma = INFINITE[name]
    return type("Mine", (Path,), {"alpha": lambda self, t: alpha(t), "sigma": lambda self, t: sigma(t)})()


@pytest.mark.parametrize("name", INFINITE)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_schedule_infinite_at_an_end_is_held_at_a_distance_from_it(name: str, compiled: bool) -> None:
    path, ends = infinite(name), torch.tensor([0.0, 1.0])
    coefficients = torch.compile(path.coefficients, fullgraph=True) if compiled else path.coefficients
    at_ends = coefficients(ends)
    for field, value in zip(at_ends._fields, at_ends, strict=True):
        if value is not None:
            assert torch.isfinite(value).all(), field
    held = path.coefficients(torch.tensor([1e-4]))
    for field in ("sigma_t", "d_sigma_t"):
        got, at_zero = getattr(held, field)[0], getattr(at_ends, field)[0]
        assert torch.isclose(at_zero, got) or torch.isfinite(getattr(path, field[:-2])(torch.zeros(()))), field
    inside = torch.linspace(0.01, 0.99, 7)
    torch.testing.assert_close(path.coefficients(inside).sigma_t, path.sigma(inside))
    x = torch.randn(2, 3)
    batch = path.sample(x, x, ends)
    assert torch.isfinite(batch.x_t).all()
    for target in ("velocity", "score", "edm", "v"):
        assert torch.isfinite(fm.cfm_loss(x, batch, target=target)), target
        assert torch.isfinite(path.convert(x, batch.x_t, ends, "velocity", target)).all(), target


@pytest.mark.parametrize("mode", ["eager", "vmap", "compile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_next_to_an_infinite_end_are_held_and_no_others(dtype: torch.dtype, mode: str) -> None:
    path = infinite("root at 0")
    t = torch.tensor([0.0, 1e-45, 1e-30, 1e-8, 9e-5, 1e-4, 2e-4, 0.5, 1 - 1e-6, 1.0], dtype=dtype)
    transforms = {"vmap": torch.vmap, "compile": lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)}
    alpha, _, d_alpha, _ = transforms.get(mode, lambda f: f)(lambda t: path.coefficients(t)[:4])(t)
    torch.testing.assert_close(alpha, t.sqrt())  # finite there: not held
    torch.testing.assert_close(d_alpha, 0.5 * t.clamp(min=1e-4).rsqrt())
    x = torch.ones(10, 2, dtype=dtype)
    batch = path.sample(x, x, t)
    for target in ("velocity", "score", "edm", "v"):
        assert torch.isfinite(fm.cfm_loss(x, batch, target=target)), target
    one = path.coefficients(torch.tensor(1e-45, dtype=dtype))
    torch.testing.assert_close(one.d_alpha_t, torch.tensor(50.0, dtype=dtype))
    learnt = torch.tensor([1e-9, 0.25], dtype=dtype, requires_grad=True)
    path.coefficients(learnt).d_alpha_t.sum().backward()
    torch.testing.assert_close(learnt.grad, torch.tensor([0.0, -2.0], dtype=dtype))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda t: "1", TypeError, r"Mine\.alpha\(t\): expected a tensor of t's shape, or a number"),
        (lambda t: None, TypeError, r"Mine\.alpha\(t\): expected a tensor of t's shape, or a number"),
        (lambda t: True, TypeError, r"Mine\.alpha\(t\): expected a tensor of t's shape, or a number"),
        (lambda t: math.inf, ValueError, r"Mine\.alpha\(t\): expected a finite number"),
        (lambda t: torch.ones(2), ValueError, r"Mine\.alpha\(t\): expected t's shape, \(5,\)"),
        (lambda t: torch.ones(2, 5), ValueError, r"Mine\.alpha\(t\): expected t's shape, \(5,\)"),
        (lambda t: torch.ones(5, dtype=torch.int64), TypeError, r"Mine\.alpha\(t\): expected a floating tensor"),
    ],
)
def test_what_a_schedule_returns_is_checked(function, error, message) -> None:
    path, t = schedule(function), torch.rand(5)
    for call in (path.coefficients, path.interpolation_coefficients, lambda t: path.sample(torch.rand(5, 2), t=t)):
        with pytest.raises(error, match=message):
            call(t)


@dataclass
class Unhashable(Mine):
    n: float = 2.0


def check_mine(path: Path) -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    c = path.coefficients(t)
    torch.testing.assert_close(c.d_alpha_t, 2 * t)
    with pytest.raises(ValueError, match="beside it"):
        schedule(NOT_DIFFERENTIABLE["round"]).coefficients(t)


@pytest.mark.parametrize("first", ["inference", "fake", "meta", "float64", "vmap", "compile", "threads"])
def test_what_is_known_of_a_schedule_does_not_depend_on_where_it_was_used_first(first: str) -> None:
    path = Mine(2.0, name=first)  # a value of its own
    t = torch.rand(3)
    if first == "inference":
        with torch.inference_mode():
            path.coefficients(t)
    elif first == "fake":
        with FakeTensorMode():
            assert path.coefficients(torch.rand(3)).d_alpha_t.shape == (3,)
    elif first == "meta":
        with torch.device("meta"):
            path.coefficients(t)
            path.coefficients(torch.rand(3))
    elif first == "float64":
        torch.set_default_dtype(torch.float64)
        try:
            assert path.coefficients(t).d_alpha_t.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)
    elif first == "vmap":
        torch.testing.assert_close(torch.func.vmap(lambda t: path.coefficients(t).d_alpha_t)(t), 2 * t)
    elif first == "compile":
        torch.compile(lambda t: path.coefficients(t).d_alpha_t, fullgraph=True)(t)
    else:
        threads = [threading.Thread(target=lambda: path.coefficients(t)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    check_mine(path)


def test_a_schedule_that_cannot_be_hashed_works_and_nothing_of_it_is_kept() -> None:
    path = Unhashable(2.0)
    torch.testing.assert_close(path.coefficients(torch.tensor([0.5])).d_alpha_t, torch.tensor([1.0]))


class Learnt(Path):
    """An exponent that may be changed in three ways, none of which two equal paths would show."""

    shared = 1.0

    def __init__(self) -> None:
        self.exponent = torch.ones(1)
        self.reads = [1.0]

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return t ** (self.exponent * self.shared * self.reads[0])

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return 1.0 - t


class Shared(Learnt):
    def __init__(self) -> None:
        pass

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return t**self.shared


@pytest.mark.parametrize("kind", [Learnt, Shared])
def test_what_a_schedule_reads_may_change_between_calls(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """t^1 has a derivative everywhere, t^(1/2) not at 0."""
    t = torch.tensor([0.0, 0.25])

    def half(path: Path, way: str) -> None:
        if way == "class":
            monkeypatch.setattr(kind, "shared", 0.5)
        elif way == "tensor":
            path.exponent.fill_(0.5)
        else:
            path.reads[0] = 0.5

    for way in ("class",) if kind is Shared else ("class", "tensor", "list"):
        monkeypatch.setattr(kind, "shared", 1.0)
        path = kind()
        torch.testing.assert_close(path.coefficients(t).d_alpha_t, torch.ones(2))
        half(path, way)
        torch.testing.assert_close(path.coefficients(t).d_alpha_t, torch.tensor([50.0, 1.0]))


def test_a_schedule_that_loses_or_gains_its_derivative_is_asked_again() -> None:
    functions = {"alpha": lambda self, t: t.round() if torch.is_tensor(digits) else t**digits}
    path = type("Mine", (Path,), {**functions, "sigma": lambda self, t: 1 - t})()
    t = torch.tensor([0.25, 0.5])
    for digits in (2, torch.ones(()), 2):
        if torch.is_tensor(digits):
            with pytest.raises(ValueError, match="beside it"):
                path.coefficients(t)
        else:
            torch.testing.assert_close(path.coefficients(t).d_alpha_t, 2 * t)


def test_derivatives_at_one_time_keep_its_dtype_under_compile_and_transforms() -> None:
    path, t = Mine(2.0), torch.tensor(0.5)
    for value in (
        torch.compile(lambda t: path.coefficients(t).d_sigma_t, fullgraph=True, backend="eager")(t),
        torch.func.vmap(lambda t: path.coefficients(t).d_sigma_t)(t[None])[0],
        torch.func.grad(lambda t: path.sigma(t))(t),
    ):
        torch.testing.assert_close(value, torch.tensor(-1.0))


def test_schedules_under_transforms() -> None:
    """vmap, grad, jvp, jacrev through path.sample and the loss: those of plain PyTorch."""
    generator = torch.Generator().manual_seed(0)
    x_1, x_0, pred = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.rand(4, generator=generator, dtype=torch.float64)
    path = Mine(2.5)

    def ours(t, x_1, x_0, pred):
        batch = path.sample(x_1, x_0, t)
        return fm.cfm_loss(pred * batch.x_t, batch)

    def plain(t, x_1, x_0, pred):
        s = t[:, None]
        x_t = s**2.5 * x_1 + (1 - s**2.5) * x_0
        return (pred * x_t - 2.5 * s**1.5 * (x_1 - x_0)).square().mean()

    arguments = (t, x_1, x_0, pred)
    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1, 2, 3))(*arguments),
        lambda f: torch.func.jvp(f, arguments, arguments),
        lambda f: torch.func.jacrev(f, argnums=(0, 3))(*arguments),
        lambda f: torch.func.vmap(f)(*(a[:, None] if a.dim() == 1 else a[:, None, :] for a in arguments)),
        lambda f: torch.func.vmap(torch.func.grad(f))(*(a[:, None] for a in arguments)),
    ):
        for got, want in zip(transform(ours), transform(plain), strict=True):
            torch.testing.assert_close(got, want)


def test_log_snr_below_the_range_of_float32() -> None:
    """alpha = t^7.5."""
    t = torch.tensor([1e-7, 1e-6, 1e-3], requires_grad=True)
    exact = t.detach().double()
    got = fm.paths.Polynomial(7.5).log_snr(t)
    want = 2.0 * (7.5 * exact.log() - torch.log1p(-(exact**7.5)))
    torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=0.0)
    (slope,) = torch.autograd.grad(got.sum(), t)
    torch.testing.assert_close(slope, (15.0 / exact).float(), rtol=1e-5, atol=0.0)
