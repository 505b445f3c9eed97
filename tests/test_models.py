"""Models along other schedules, of timesteps and of noise levels: Gaussian data, whose every prediction is known."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor

import fmkernels as fm
from fmkernels import models
from fmkernels.paths import (
    TARGETS,
    VE,
    VP,
    CondOT,
    ConstantBridge,
    Cosine,
    DiscreteVP,
    LinearVP,
    OptimalTransport,
    Path,
    Polynomial,
)

MEAN, SPREAD = 1.5, 0.4
COUNT = 1000
TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, COUNT, dtype=torch.float64), 0)
PATHS: list[Path] = [
    CondOT(),
    VP(),
    Cosine(),
    LinearVP(),
    Polynomial(2.0),
    OptimalTransport(1e-3),
    VE(),
    DiscreteVP(TABLE),
]


def means(alpha: Tensor, sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior means of x_1 ~ N(MEAN, SPREAD^2) and x_0 ~ N(0, 1) given x = alpha x_1 + sigma x_0."""
    alpha, sigma = (c.reshape(c.shape + (1,) * (x.dim() - c.dim())) for c in (alpha, sigma))
    gain = (x - alpha * MEAN) / ((alpha * SPREAD).square() + sigma.square())
    return MEAN + alpha * SPREAD**2 * gain, sigma * gain


def model_of(path: Path, prediction: str = "velocity") -> Callable[..., Tensor]:
    """The exact model of a path, in the dtype of x."""

    def model(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        at = path.coefficients(t.double())
        x_1, x_0 = means(at.alpha_t, at.sigma_t, x.double())
        c_1, c_0, _ = path.target_coefficients(t.double(), prediction)
        parts = [torch.as_tensor(c, dtype=torch.float64).expand(t.shape) for c in (c_1, c_0)]
        parts = [c.reshape(c.shape + (1,) * (x.dim() - c.dim())) for c in parts]
        return (parts[0] * x_1 + parts[1] * x_0 + shift).to(x.dtype)

    return model


@pytest.mark.parametrize(("old", "new"), itertools.permutations(PATHS, 2), ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("prediction", ["velocity", "x_0", "v"])
def test_any_schedule_from_any(old: Path, new: Path, prediction: str) -> None:
    """Within the signal-to-noise ratios that both have, exact in float64; finite everywhere in every dtype."""
    wrapped = models.ScheduleChange(model_of(old, prediction), old, new, prediction=prediction)
    t = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.95], dtype=torch.float64)
    ratios = [path.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)) for path in (old, new)]
    inside = (new.log_snr(t) > ratios[0][0]) & (new.log_snr(t) < ratios[0][1])
    x = torch.randn(5, 3, dtype=torch.float64)
    want = model_of(new)(x, t)
    error = ((wrapped(x, t) - want) / (1 + want.abs()))[inside]
    assert inside.sum() >= 2
    assert error.abs().max() < 1e-8
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ends = torch.tensor([0.0, 1e-6, 0.5, 1.0 - 1e-6, 1.0])
        out = wrapped(x.to(dtype), ends)
        assert out.dtype == dtype
        if prediction == "velocity" or dtype is not torch.float16:
            assert torch.isfinite(out).all(), dtype


@pytest.mark.parametrize("returns", [t for t in TARGETS if t not in ("edm",)])
def test_what_is_asked_for_along_the_new_path(returns: str) -> None:
    old, new = VP(), CondOT()
    x, t = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    got = models.ScheduleChange(model_of(old, "x_0"), old, new, prediction="x_0", returns=returns)(x, t)
    assert (got - model_of(new, returns)(x, t)).abs().max() < 1e-9


def test_bfloat16_to_its_rounding() -> None:
    """The wrapper's own work is float32's: the state's and the output's roundings are all there are."""
    old, new = VP(), Cosine()
    x, t = torch.randn(64, 8).bfloat16(), torch.linspace(0.1, 0.9, 64)

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return model_of(old)(x.float(), t)

    got = models.ScheduleChange(exact, old, new)(x, t)
    want = model_of(new)(x.double(), t)
    assert_rounded(got, want, 8, size=10 * (1 + want.abs()), of=torch.bfloat16)


def test_keyword_arguments_parameters_and_compilation() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x: Tensor, t: Tensor, *, scale: float = 1.0) -> Tensor:
            return scale * self.layer(x) * t.reshape(-1, 1)

    net = Net()
    wrapped = models.ScheduleChange(net, CondOT(), VP())
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in net.parameters()}
    x, t = torch.randn(4, 3), torch.rand(4)
    plain = wrapped(x, t, scale=2.0)
    plain.sum().backward()
    assert net.layer.weight.grad is not None
    assert not torch.equal(plain, wrapped(x, t))
    compiled = torch.compile(wrapped, fullgraph=True)
    assert_rounded(compiled(x, t, scale=2.0), plain, 64, size=10 * (1 + plain.abs()))
    samples, _ = fm.sample(copy.deepcopy(wrapped), (6, 3), path=VP(), steps=5, method="dpmpp_2m")
    assert torch.isfinite(samples).all()


@pytest.mark.parametrize("old", [VP(), DiscreteVP(TABLE)], ids=lambda p: type(p).__name__)
def test_samples_along_straight_lines_are_the_datas(old: Path) -> None:
    torch.manual_seed(0)
    wrapped = models.ScheduleChange(model_of(old, "x_0"), old, CondOT(), prediction="x_0")
    x, _ = fm.sample(wrapped, (20000, 1), path=CondOT(), steps=50, method="midpoint", dtype=torch.float64)
    assert abs(x.mean() - MEAN) < 0.02
    assert abs(x.std() - SPREAD) < 0.02


# The two statements of "flow is diffusion" (Gao et al. 2024).


def test_ddim_is_euler_along_straight_lines() -> None:
    """DDIM (Song et al. 2021, eq. 12, eta = 0) of a VP model, its states over alpha + sigma, is Euler's method of the
    same model along CondOT at the times alpha / (alpha + sigma)."""
    path = VP()
    grid = torch.linspace(0.02, 0.98, 12, dtype=torch.float64)
    at = path.coefficients(grid)
    alpha, sigma = at.alpha_t, at.sigma_t
    model = model_of(path, "x_0")
    x = torch.randn(6, 2, dtype=torch.float64)
    straight = x / (alpha[0] + sigma[0])
    flow = models.ScheduleChange(model, path, CondOT(), prediction="x_0")
    times = alpha / (alpha + sigma)
    for i in range(len(grid) - 1):
        noise = model(x, grid[i])
        x = alpha[i + 1] * (x - sigma[i] * noise) / alpha[i] + sigma[i + 1] * noise
        straight = straight + (times[i + 1] - times[i]) * flow(straight, times[i])
        assert (x / (alpha[i + 1] + sigma[i + 1]) - straight).abs().max() < 1e-12


def test_ddim_does_not_depend_on_a_linear_scaling_of_the_schedule() -> None:
    """Deterministic first-order sampling in the noise-to-signal ratio: all paths at equal ratios give one x_1."""
    ratios = torch.logspace(1.2, -1.6, 15, dtype=torch.float64)  # sigma / alpha
    start = torch.randn(5, 2, dtype=torch.float64)
    ends = []
    for path in (CondOT(), VP(), VE(0.005, 200.0), Cosine()):
        t = path.log_snr_inverse(-2 * torch.log(ratios))
        first = path.coefficients(t[0])
        x = start * first.alpha_t
        x, _ = fm.sample(model_of(path), x_0=x, path=path, time_grid=t, method="ddim")
        ends.append(x / path.coefficients(t[-1]).alpha_t)
    for other in ends[1:]:
        assert (other - ends[0]).abs().max() < 1e-9


# Timesteps.


def test_a_table_is_a_path() -> None:
    path = DiscreteVP(TABLE)
    k = torch.arange(COUNT, dtype=torch.float64)
    t = 1 - (k + 1) / COUNT
    at = path.coefficients(t)
    assert (at.alpha_t - TABLE.sqrt()).abs().max() < 1e-15
    assert (at.sigma_t - (1 - TABLE).sqrt()).abs().max() < 1e-15
    assert (path.timesteps(t) - k).abs().max() < 1e-9
    between = torch.rand(50, dtype=torch.float64, requires_grad=True)
    for name in ("alpha", "sigma"):
        (slope,) = torch.autograd.grad(getattr(path, name)(between).sum(), between)
        assert (slope - getattr(path, f"d_{name}")(between)).abs().max() < 1e-9
    assert (path.log_snr_inverse(path.log_snr(between)) - between).abs().max() < 1e-12
    end = path.coefficients(torch.tensor([0.0, 1.0]))
    assert all(torch.isfinite(value).all() for value in end[:4] if value is not None)
    assert end.alpha_t[1] == 1
    assert end.sigma_t[1] == 0
    again = DiscreteVP(TABLE.tolist())
    assert again == path
    assert hash(again) == hash(path)
    assert pickle.loads(pickle.dumps(path)) == path
    assert path != DiscreteVP(TABLE**1.01)
    for wrong in (torch.tensor([0.5, 0.7]), [0.5, 0.5], [1.0, 0.5], [], [[0.5]], [0.5, float("nan")], [0.5, 0.0]):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            DiscreteVP(wrong)
    with pytest.raises(TypeError, match="alphas_cumprod"):
        DiscreteVP("linear")


def unet(prediction: str, kind: str = "tensor") -> Callable[..., Any]:
    """An exact network of timesteps, which it may be given with fractions."""
    path, seen = DiscreteVP(TABLE), []

    def network(x: Tensor, timestep: Tensor) -> Any:
        assert timestep.shape == x.shape[:1]
        seen.append(timestep)
        out = model_of(path, prediction)(x, 1 - (timestep.double() + 1) / COUNT)
        return {"tensor": out, "tuple": (out,), "object": SimpleNamespace(sample=out)}[kind]

    network.seen = seen  # type: ignore[attr-defined]
    return network


@pytest.mark.parametrize("kind", ["tensor", "tuple", "object"])
@pytest.mark.parametrize("name", models.timesteps.PREDICTION_TYPES)
def test_networks_of_diffusers(name: str, kind: str) -> None:
    scheduler = SimpleNamespace(alphas_cumprod=TABLE.float(), config=SimpleNamespace(prediction_type=name))
    network = unet(models.timesteps.PREDICTION_TYPES[name], kind)
    model, path, prediction = models.from_diffusers(network, scheduler)
    torch.manual_seed(0)
    x, _ = fm.sample(
        model, (4000, 1), path=path, prediction=prediction, method="dpmpp_2m", steps=30, dtype=torch.float64
    )
    assert abs(x.mean() - MEAN) < 0.05
    assert abs(x.std() - SPREAD) < 0.05
    stochastic, _ = fm.sample(model, (4000, 1), path=path, prediction=prediction, sde=fm.SDE("sbdm"), steps=100)
    assert abs(stochastic.mean() - MEAN) < 0.05
    assert abs(stochastic.std() - SPREAD) < 0.05


def test_whole_timesteps() -> None:
    network = unet("x_0")
    model = models.TimestepModel(network, DiscreteVP(TABLE), rounded=True)
    t = torch.tensor([0.0, 0.12345, 0.5, 1.0])
    model(torch.randn(4, 2), t)
    (k,) = network.seen  # type: ignore[attr-defined]
    assert k.dtype == torch.int64
    assert k.tolist() == [999, 876, 499, 0]
    with pytest.raises(ValueError, match="t: expected one time, or one for each of 4 samples"):
        model(torch.randn(4, 2), torch.rand(4, 2))
    with pytest.raises(TypeError, match="scheduler: expected a diffusers scheduler with alphas_cumprod"):
        models.from_diffusers(network, object())
    odd = SimpleNamespace(alphas_cumprod=TABLE, config=SimpleNamespace(prediction_type="flow_prediction"))
    with pytest.raises(ValueError, match="prediction_type"):
        models.from_diffusers(network, odd)


@pytest.mark.parametrize("name", models.timesteps.PREDICTION_TYPES)
def test_a_flow_model_as_a_network_of_timesteps(name: str) -> None:
    predictor = models.TimestepPredictor(model_of(CondOT()), CondOT(), TABLE, prediction_type=name)
    x = torch.randn(5, 2, dtype=torch.float64)
    for k in (1, 300, torch.tensor(700), torch.tensor([1, 200, 400, 600, 900])):
        times = 1 - (torch.as_tensor(k, dtype=torch.float64) + 1) / COUNT
        want = model_of(DiscreteVP(TABLE), models.timesteps.PREDICTION_TYPES[name])(x, times)
        assert (predictor(x, k) - want).abs().max() < 1e-9
    with pytest.raises(ValueError, match="prediction_type"):
        models.TimestepPredictor(model_of(CondOT()), CondOT(), TABLE, prediction_type="score")


# Noise levels.


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_denoisers_both_ways(path: Path) -> None:
    x, sigma = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0.05, 0.5, 2.0, 9.0], dtype=torch.float64)
    denoise = models.Denoiser(model_of(path), path)
    want = means(torch.ones_like(sigma), sigma, x)[0]
    assert (denoise(x, sigma) - want).abs().max() < 1e-9
    assert torch.isfinite(denoise(x.float(), torch.tensor([0.0, 1e-3, 500.0, 1e4]))).all()

    def exact(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == x.shape[:1]
        return means(torch.ones_like(sigma), sigma.to(x.dtype), x)[0]

    model = models.FromDenoiser(exact, path)
    t = path.log_snr_inverse(-2 * torch.log(sigma))
    assert (model(x, t) - model_of(path, "x_1")(x, t)).abs().max() < 1e-9
    out = path.convert(model(x.float(), torch.tensor([0.0, 0.3, 0.9, 1.0])), x.float(), 0.5, "x_1", "velocity")
    assert torch.isfinite(out).all()


def test_wrong_arguments() -> None:
    net = model_of(CondOT())
    with pytest.raises(TypeError, match=r"trained: expected a path of fm.paths"):
        models.ScheduleChange(net, "VP", CondOT())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="path: expected a path without a gamma term"):
        models.ScheduleChange(net, CondOT(), ConstantBridge(0.1))
    with pytest.raises(ValueError, match="returns"):
        models.ScheduleChange(net, CondOT(), VP(), returns="noise?")
    with pytest.raises(TypeError, match="model: expected a callable"):
        models.ScheduleChange(3, CondOT(), VP())
    with pytest.raises(ValueError, match=r"model: expected a floating tensor of x's shape \(2, 3\)"):
        models.ScheduleChange(lambda x, t: x[:1], CondOT(), VP())(torch.randn(2, 3), torch.rand(2))
    with pytest.raises(ValueError, match="sigma_max"):
        models.FromDenoiser(net, CondOT(), sigma_min=1.0, sigma_max=0.5)


def test_a_float32_network_is_told_float32_times() -> None:
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.dtype)
        return x * t.reshape(-1, 1)

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        out = models.TimestepPredictor(network, CondOT(), TABLE)(torch.randn(2, 3).to(dtype), torch.tensor([3, 700]))
        assert out.dtype == torch.promote_types(dtype, torch.float32)
    assert seen == [torch.float32, torch.float64, torch.float32]
