"""flow_matching's names on our paths and solvers: formulas, shapes, ends, and beside the peer where it is right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor

from fmkernels.compat.flow_matching.path import AffineProbPath, CondOTProbPath
from fmkernels.compat.flow_matching.path.scheduler import (
    CondOTScheduler,
    ConvexScheduler,
    CosineScheduler,
    LinearVPScheduler,
    PolynomialConvexScheduler,
    Scheduler,
    SchedulerOutput,
    ScheduleTransformedModel,
    VPScheduler,
)
from fmkernels.compat.flow_matching.solver import ODESolver
from fmkernels.compat.flow_matching.utils import (
    ModelWrapper,
    categorical,
    expand_tensor_like,
    gradient,
    unsqueeze_to_match,
)

theirs = pytest.importorskip("flow_matching")


class Own(ConvexScheduler):
    """kappa = t^2, by a user."""

    def __call__(self, t: Tensor) -> SchedulerOutput:
        return SchedulerOutput(alpha_t=t**2, sigma_t=1 - t**2, d_alpha_t=2 * t, d_sigma_t=-2 * t)

    def kappa_inverse(self, kappa: Tensor) -> Tensor:
        return kappa**0.5


Values = tuple[Callable[[float], float], ...]
SCHEDULERS: dict[str, tuple[Callable[[], Scheduler], Values]] = {
    "CondOT": (CondOTScheduler, (lambda t: t, lambda t: 1 - t, lambda t: 1.0, lambda t: -1.0)),
    "Polynomial": (
        lambda: PolynomialConvexScheduler(3),
        (lambda t: t**3, lambda t: 1 - t**3, lambda t: 3 * t**2, lambda t: -3 * t**2),
    ),
    "Cosine": (
        CosineScheduler,
        (
            lambda t: math.sin(math.pi * t / 2),
            lambda t: math.cos(math.pi * t / 2),
            lambda t: math.pi / 2 * math.cos(math.pi * t / 2),
            lambda t: -math.pi / 2 * math.sin(math.pi * t / 2),
        ),
    ),
    "LinearVP": (
        LinearVPScheduler,
        (lambda t: t, lambda t: math.sqrt(1 - t * t), lambda t: 1.0, lambda t: -t / math.sqrt(1 - t * t)),
    ),
    "VP": (
        VPScheduler,
        (
            lambda t: math.exp(-_vp(t)[0] / 2),
            lambda t: math.sqrt(1 - math.exp(-_vp(t)[0])),
            lambda t: -_vp(t)[1] / 2 * math.exp(-_vp(t)[0] / 2),
            lambda t: _vp(t)[1] * math.exp(-_vp(t)[0]) / (2 * math.sqrt(1 - math.exp(-_vp(t)[0]))),
        ),
    ),
    "Own": (Own, (lambda t: t**2, lambda t: 1 - t**2, lambda t: 2 * t, lambda t: -2 * t)),
}
schedulers = pytest.mark.parametrize("name", SCHEDULERS)


def _vp(t: float) -> tuple[float, float]:
    """T and its derivative, beta_min = .1, beta_max = 20."""
    return 0.5 * (1 - t) ** 2 * 19.9 + (1 - t) * 0.1, -(1 - t) * 19.9 - 0.1


def formulas(name: str, t: Tensor) -> list[Tensor]:
    return [torch.tensor([f(x) for x in t.double().tolist()], dtype=torch.float64) for f in SCHEDULERS[name][1]]


@schedulers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_schedulers_are_their_formulas(name: str, dtype: torch.dtype) -> None:
    scheduler, t = SCHEDULERS[name][0](), torch.linspace(0.05, 0.95, 19, dtype=torch.float64).to(dtype)
    if name == "Own" and dtype is torch.bfloat16:
        pytest.skip("a user's own arithmetic")
    found = scheduler(t)
    for value, want in zip(vars(found).values(), formulas(name, t), strict=True):
        assert value.dtype == dtype
        assert value.shape == t.shape
        assert_rounded(value, want, 40, size=1 + want.abs())


@schedulers
def test_schedulers_invert_alpha_over_sigma(name: str) -> None:
    scheduler, t = SCHEDULERS[name][0](), torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    found = scheduler(t)
    assert (scheduler.snr_inverse(found.alpha_t / found.sigma_t) - t).abs().max() < 1e-12
    if isinstance(scheduler, ConvexScheduler):
        assert (scheduler.kappa_inverse(found.alpha_t) - t).abs().max() < 1e-12


@schedulers
@pytest.mark.parametrize("shape", [(7,), (7, 7), (7, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_and_conversions(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    path = AffineProbPath(SCHEDULERS[name][0]())
    generator = torch.Generator().manual_seed(1)
    x_0, x_1 = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.linspace(0.1, 0.9, 7).to(dtype)
    sample = path.sample(x_0, x_1, t)
    assert sample.t is t
    assert sample.x_0 is x_0
    assert sample.x_1 is x_1
    assert sample.x_t.dtype == dtype
    alpha, sigma, d_alpha, d_sigma = (c.reshape(7, *[1] * (len(shape) - 1)) for c in formulas(name, t))
    wide_0, wide_1 = x_0.double(), x_1.double()
    size = (wide_0.abs() + wide_1.abs()) * (1 + d_alpha.abs() + d_sigma.abs())
    if not (name == "Own" and dtype is torch.bfloat16):
        assert_rounded(sample.x_t, alpha * wide_1 + sigma * wide_0, 20, size=size)
        assert_rounded(sample.dx_t, d_alpha * wide_1 + d_sigma * wide_0, 20, size=size)
    if dtype is torch.bfloat16:
        return
    values = {"target": x_1, "epsilon": x_0, "velocity": sample.dx_t}
    for source, target in itertools.permutations(values, 2):
        for times in (t, t.reshape(7, *[1] * (len(shape) - 1)), t.reshape(7, *[1] * (len(shape) - 1)).expand(shape)):
            got = getattr(path, f"{source}_to_{target}")(values[source], sample.x_t, times)
            assert_rounded(got, values[target].double(), 4000, size=10 * size + 1)


def test_dtypes_together_as_the_peer_has_them() -> None:
    from flow_matching.path import CondOTProbPath as Theirs

    x_0, x_1, t = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    for a, b, c in itertools.product([torch.float32, torch.bfloat16, torch.float64], repeat=3):
        ours, want = (kind().sample(x_0.to(a), x_1.to(b), t.to(c)) for kind in (CondOTProbPath, Theirs))
        assert ours.x_t.dtype == want.x_t.dtype
        assert ours.dx_t.dtype == (want.dx_t.dtype if b == a else ours.dx_t.dtype)


def test_the_ends_are_finite_where_the_peers_are_not() -> None:
    x_0, x_1, t = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0.0, 1.0])
    for make, _ in SCHEDULERS.values():
        path = AffineProbPath(make())
        sample = path.sample(x_0, x_1, t)
        assert torch.isfinite(sample.dx_t).all()
        assert torch.isfinite(sample.x_t).all()
        assert torch.isfinite(path.target_to_velocity(x_1, sample.x_t, t)).all()


def test_wrong_shapes() -> None:
    path, x = CondOTProbPath(), torch.randn(4, 2)
    with pytest.raises(AssertionError, match=r"t: expected times of shape \(batch_size,\), got shape \(4, 1\)"):
        path.sample(x, x, torch.rand(4, 1))
    with pytest.raises(AssertionError, match="t: expected one time for each sample of x_0 and x_1, got 3 for 4 and 4"):
        path.sample(x, x, torch.rand(3))
    with pytest.raises(AssertionError, match="n: expected a number > 0, got -1"):
        PolynomialConvexScheduler(-1)


@pytest.mark.parametrize("pair", itertools.permutations(list(SCHEDULERS), 2), ids="-".join)
def test_a_model_along_another_schedule(pair: tuple[str, str]) -> None:
    """Gaussian data: the velocity of one path becomes that of the other, everywhere and finite at the ends."""
    old, new = (SCHEDULERS[name][0]() for name in pair)
    mean, spread = 1.5, 0.4

    def field(scheduler: Scheduler) -> Callable[..., Tensor]:
        def velocity(x: Tensor, t: Tensor, **extras: Any) -> Tensor:
            c = [v.reshape(-1, *[1] * (x.dim() - 1)) for v in vars(scheduler(t)).values()]
            total = (c[0] * spread) ** 2 + c[1] ** 2
            x_1 = mean + c[0] * spread**2 / total * (x - c[0] * mean)
            return c[2] * x_1 + c[3] * c[1] / total * (x - c[0] * mean)

        return velocity

    x, t = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0.25, 0.3, 0.6, 0.9, 0.99], dtype=torch.float64)
    model = ScheduleTransformedModel(field(old), old, new)
    want = field(new)(x, t)
    assert ((model(x=x, t=t) - want) / (1 + want.abs())).abs().max() < 1e-9
    for end in (0.0, 1.0):
        assert torch.isfinite(model(x=x.float(), t=torch.tensor(end))).all()


class Line(ModelWrapper):
    """dx/dt = a x + 3 t^2."""

    def __init__(self) -> None:
        super().__init__(None)
        self.a = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        assert t.dim() == 0
        return self.a * x + 3 * t**2 + extras.get("shift", 0.0)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "heun3", "dopri5"])
@pytest.mark.parametrize("grid", [[0.0, 1.0], [0.0, 0.3, 1.0], [1.0, 0.4, 0.0]], ids=str)
@pytest.mark.parametrize("step_size", [None, 0.07])
def test_solutions_are_the_peers(method: str, grid: list[float], step_size: float | None) -> None:
    from flow_matching.solver import ODESolver as Theirs

    if method == "dopri5" and step_size is not None:
        pytest.skip("step_size must be None for adaptive methods")
    model, x = Line(), torch.randn(4, 3)
    for intermediates in (False, True):
        arguments = {
            "method": method,
            "time_grid": torch.tensor(grid),
            "return_intermediates": intermediates,
            "shift": 0.25,
        }
        ours, want = (kind(model).sample(x, step_size, **arguments) for kind in (ODESolver, Theirs))
        assert ours.shape == want.shape
        assert not ours.requires_grad
        if method == "dopri5":  # to the tolerances: float32's rounding decides about steps
            assert (ours - want).abs().max() < 10 * 1e-5 * (1 + want.abs().max())
        else:
            assert_rounded(ours, want, 50, size=1 + want.abs())


def test_gradients_are_asked_for() -> None:
    model, x = Line(), torch.ones(2, 3)
    ODESolver(model).sample(x, 0.1, enable_grad=True).sum().backward()
    assert model.a.grad is not None
    assert model.a.grad > 0


@pytest.mark.parametrize("shape", [(6, 2), (3, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_likelihoods_of_a_linear_field(shape: tuple[int, ...], exact: bool) -> None:
    """div = a d: log p_1(x_1) = log p_0(x_0) - a d, exact for a Rademacher probe too; also of images."""
    model, dims = Line().double(), math.prod(shape[1:])

    def log_p0(x: Tensor) -> Tensor:
        return -0.5 * x.flatten(1).square().sum(1)

    x_1 = torch.randn(shape, dtype=torch.float64)
    x_0, log_p = ODESolver(model).compute_likelihood(
        x_1, log_p0, 0.01, method="midpoint", exact_divergence=exact, time_grid=torch.tensor([1.0, 0.0]).double()
    )
    assert isinstance(x_0, Tensor)
    assert x_0.shape == x_1.shape
    assert (log_p - (log_p0(x_0) - 0.5 * dims)).abs().max() < 1e-9
    back = ODESolver(model).sample(x_0, 0.001, method="midpoint", time_grid=torch.tensor([0.0, 1.0]).double())
    assert (back - x_1).abs().max() < 1e-3
    states, again = ODESolver(model).compute_likelihood(
        x_1, log_p0, None, time_grid=torch.tensor([1.0, 0.5, 0.0]).double(), return_intermediates=True, enable_grad=True
    )
    assert len(states) == 3
    assert again.requires_grad
    with pytest.raises(AssertionError, match=r"time_grid: expected times from 1.0 to 0.0, got \[0.0, 1.0\]"):
        ODESolver(model).compute_likelihood(x_1, log_p0, 0.1, time_grid=torch.tensor([0.0, 1.0]))


def test_helpers() -> None:
    t, x = torch.rand(4), torch.randn(4, 2, 3)
    assert torch.equal(expand_tensor_like(t, x), t[:, None, None].expand(4, 2, 3))
    assert unsqueeze_to_match(t, x).shape == (4, 1, 1)
    assert unsqueeze_to_match(t, x, how="prefix").shape == (1, 1, 4)
    leaf = x.clone().requires_grad_()
    assert torch.equal(gradient(leaf.square(), leaf), 2 * x)
    assert gradient(leaf**3, leaf, create_graph=True).requires_grad
    with pytest.raises(AssertionError, match="input_tensor: expected 4 numbers"):
        expand_tensor_like(t[:3], x)
    with pytest.raises(AssertionError, match="how"):
        unsqueeze_to_match(t, x, how="middle")
    torch.manual_seed(0)
    drawn = categorical(torch.tensor([0.0, 0.25, 0.75]).expand(200, 100, 3))
    assert drawn.shape == (200, 100)
    counts = torch.bincount(drawn.flatten(), minlength=3) / 20000
    assert counts[0] == 0
    assert abs(counts[1] - 0.25) < 0.02
