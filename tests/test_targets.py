"""What conversions and schedules give at the ends of the path, in every grad mode and in narrow dtypes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from path_problems import Plain
from rounding import assert_rounded

import fmkernels as fm
from fmkernels import times, weightings
from fmkernels.paths import (
    VE,
    VP,
    CondOT,
    ConstantBridge,
    Cosine,
    LinearVP,
    OptimalTransport,
    Path,
    Polynomial,
    SchrodingerBridge,
)


class Constants(Path):
    """Values that are not of t's shape: a number and a 0-dim tensor."""

    def alpha(self, t):
        return 1

    def sigma(self, t):
        return torch.tensor(2.0)


PATHS = [
    CondOT(),
    OptimalTransport(0.1),
    Polynomial(1),
    Polynomial(2.5),
    Polynomial(6),
    Cosine(),
    LinearVP(),
    VP(),
    VE(),
    Plain(),
]
TARGETS = ("velocity", "x_1", "x_0", "score", "v", "edm")
TINY = [0.0, 1e-7, 1e-4, 1 - 1e-4, 1 - 2.0**-24, 1.0]
paths = pytest.mark.parametrize("path", PATHS, ids=repr)


def schedule_roundings(path: Path) -> float:
    """Of a coefficient: four, and for e^-x x times as many, as rounding x changes it by that."""
    exponent = {VP: 10.05, VE: math.log(5000)}.get(type(path), 0.0)
    return 4 * (1 + exponent)


def rows(path: Path, t: torch.Tensor, *targets: str) -> list[list[float]]:
    """The rows (coefficient of x_1, of x_0) of x_t and of each target at one time, as numbers."""
    pairs = [path.interpolation_coefficients(t)[:2]] + [path.target_coefficients(t, name)[:2] for name in targets]
    return [[float(getattr(c, "value", lambda c=c: c)()) for c in pair] for pair in pairs]


def weights(x_t: list[float], source: list[float], target: list[float]) -> tuple[float, float] | None:
    """Those of x_t's row and the prediction's that give a target's; None where it is not in their span, up to
    well-conditioned coefficients."""
    known = torch.tensor([x_t, source], dtype=torch.float64)
    largest = known.abs().amax(1).clamp(min=1e-300)
    wanted = torch.tensor(target, dtype=torch.float64)
    turned, values, basis = torch.linalg.svd(known / largest[:, None])
    kept = values > 1e-6
    within = basis[kept] @ wanted
    if (wanted - basis[kept].T @ within).abs().max() > 1e-9 * wanted.abs().max():
        return None
    a, b = (turned[:, kept] @ (within / values[kept]) / largest).tolist()
    return a, b


@paths
@pytest.mark.parametrize("at", TINY)
def test_what_is_determined_is_exact_up_to_the_ends(path: Path, at: float) -> None:
    torch.manual_seed(0)
    x_1, x_0 = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    t = torch.full((3,), at, dtype=torch.float64)
    batch = path.sample(x_1, x_0, t)
    checked = 0
    for source, target in itertools.permutations(TARGETS, 2):
        # below 1e-30, where quotients are held, a velocity is as good as none
        row_t, row_p, row_u = rows(path, t[0], source, target)
        pair = weights(row_t, row_p, row_u)
        if pair is None or 0 < max(map(abs, row_p)) < 1e-30:
            continue
        checked += 1
        prediction = batch.target(source)
        got, want = path.convert(prediction, batch.x_t, t, source, target), batch.target(target)
        # of the schedule, and of the two products, on either side
        size = sum(abs(c) * x.abs().max() for c, x in zip(pair, (batch.x_t, prediction), strict=True))
        assert_rounded(got, want, 2 * schedule_roundings(path) + 8, size=size)
    assert checked >= 6


@pytest.mark.parametrize("t", [0.02, 0.05, 0.1, 0.5])
def test_a_faint_prediction_is_taken_at_its_word(t: float) -> None:
    """The velocity of VP(0.1, 100) at t = 0.05 is 7e-9 x_1: x_1 is that velocity over 7e-9, not over 1e-8."""
    path, x_1 = VP(0.1, 100.0), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    batch = path.sample(x_1, torch.tensor([[0.5, 0.25]], dtype=torch.float64), torch.tensor([t], dtype=torch.float64))
    assert_rounded(path.convert(batch.target(), batch.x_t, batch.t, "velocity", "x_1"), x_1, 1e5)


@pytest.mark.parametrize("gap", [1e-9, 1e-12])
def test_the_noise_next_to_the_data_is_a_quotient_like_any_other(gap: float) -> None:
    x_1, x_0 = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    batch = CondOT().sample(x_1, x_0, torch.tensor([1.0 - gap], dtype=torch.float64))
    got = CondOT().convert(x_1, batch.x_t, batch.t, "x_1", "x_0")
    assert (got - x_0).abs().item() <= 4 * torch.finfo(torch.float64).eps / gap


@paths
@pytest.mark.parametrize("at", [0.0, 1e-7, 0.3, 1.0])
def test_noise_and_score_are_one_prediction(path: Path, at: float) -> None:
    """score = -x_0 / sigma needs no x_t: even next to t = 0, where x_0 nearly is x_t, all comes from the prediction."""
    torch.manual_seed(0)
    prediction, x_t, t = torch.randn(5, 3), torch.randn(5, 3), torch.full((5,), at)
    sigma, held = (path.coefficients(s).sigma_t[:, None] for s in (t.double(), t.double().clamp(1e-4, 1 - 1e-4)))
    sigma = torch.maximum(sigma, held.clamp(max=1e-4)).float()
    # of sigma and of the quotient or product, on either side
    roundings = schedule_roundings(path) + 3
    assert_rounded(path.convert(prediction, x_t, t, "x_0", "score"), -prediction / sigma, roundings)
    assert_rounded(path.convert(prediction, x_t, t, "score", "x_0"), -prediction * sigma, roundings)


@paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_prediction_converts_to_something_finite(path: Path, dtype: torch.dtype) -> None:
    """Also where the prediction contradicts x_t, as a network's does."""
    torch.manual_seed(0)
    t = torch.tensor(TINY)
    for source, target in itertools.product(TARGETS, TARGETS):
        prediction, x_t = torch.randn(len(t), 8).to(dtype), torch.randn(len(t), 8).to(dtype)
        out = path.convert(prediction, x_t, t, source, target)
        assert out.dtype == dtype
        assert torch.isfinite(out).all(), (source, target)


def test_half_conversions_are_as_accurate_as_half() -> None:
    torch.manual_seed(0)
    v, x_t, t = torch.randn(6, 5), torch.randn(6, 5), torch.rand(6)
    terms = x_t.half().double(), (1 - t.double())[:, None] * v.half().double()
    got = CondOT().convert(v.half(), x_t.half(), t, "velocity", "x_1")
    assert_rounded(got, sum(terms), 3, size=terms[0].abs() + terms[1].abs(), of=torch.float32)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", ["velocity", "score"])
def test_conversions_of_mixed_dtypes_are_computed_in_the_wider_one(narrow, wide, source) -> None:
    """x_t is not rounded to a narrow prediction's dtype: only the result is, once."""
    torch.manual_seed(0)
    t = 0.1 + 0.8 * torch.rand(64, dtype=torch.float64)
    for a, b in ((narrow, wide), (wide, narrow)):
        prediction, x_t = torch.randn(64, 5).to(a), torch.randn(64, 5).to(b)
        times = t.to(torch.float64 if wide == torch.float64 else torch.float32)
        got = Cosine().convert(prediction, x_t, times, source, "x_1")
        want = Cosine().convert(prediction.double(), x_t.double(), times.double(), source, "x_1")
        assert got.dtype == a
        unit = torch.finfo(a).eps / 2 if a != wide else torch.finfo(wide).eps * 8
        error = (got.double() - want).abs() / want.abs().clamp(min=want.abs().max() * 2.0**-6)
        assert error.max() <= 1.01 * unit + 1e-6 * (wide == torch.float32), (a, b)


def test_float64_conversions_at_float32_times_are_of_float64() -> None:
    x_t, v, t = torch.randn(6, 3).double(), torch.randn(6, 3).double(), torch.rand(6)
    for path in (CondOT(), Cosine()):  # 1 - t of a float32 t has no rounding, a sine has
        got = path.convert(v, x_t, t, "velocity", "x_1")
        want = path.convert(v, x_t, t.double(), "velocity", "x_1")
        assert_rounded(got, want, 8, size=want.abs().max())


@paths
def test_coefficients_in_float32_are_accurate_to_rounding(path: Path) -> None:
    """Relative to float64 at the same times, at the ends too."""
    t = torch.tensor([*TINY, 1e-2, 0.3, 0.5, 0.9, 0.999])
    got, want = path.coefficients(t), path.coefficients(t.double())
    for a, b in zip(got, want, strict=True):
        if a is not None:
            assert a.dtype == torch.float32
            assert_rounded(a, b, schedule_roundings(path), size=b.abs().clamp(min=1e-30))


SIGMA_ROUNDINGS = 8  # of e^x at x = -3t, three products and two sums
D_SIGMA = torch.tensor([-math.exp(-0.3) * (1 + 3 * 0.9), -math.exp(-1.5) * (1 + 3 * 0.5)])


def check_derivatives(path: Path, t: torch.Tensor) -> None:
    c = path.coefficients(t)
    assert torch.equal(c.d_alpha_t, 2 * t)
    assert_rounded(c.d_sigma_t, D_SIGMA, SIGMA_ROUNDINGS)
    assert not c.d_sigma_t.requires_grad


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_users_schedule_has_its_derivatives_in_every_grad_mode(mode) -> None:
    before = torch.tensor([0.1, 0.5])
    with mode():
        check_derivatives(Plain(), before)
        check_derivatives(Plain(), torch.tensor([0.1, 0.5]))
        made = torch.tensor([0.1, 0.5])
    check_derivatives(Plain(), made)


def test_a_users_schedule_has_its_derivatives_under_transforms_and_compile() -> None:
    path, t = Plain(), torch.tensor([0.1, 0.5])
    assert_rounded(torch.func.vmap(path.d_sigma)(t), D_SIGMA, SIGMA_ROUNDINGS)
    x_1, x_0, t_0, h = torch.randn(2, 3), torch.randn(2, 3), t, 1e-4
    t = t.double()
    # sigma's fourth derivative is below 200
    second = torch.func.jvp(path.d_sigma, (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(
        second, (path.d_sigma(t + h) - path.d_sigma(t - h)) / (2 * h), rtol=0, atol=200 * h**2 / 6
    )

    @torch.compile(fullgraph=True)
    def loss(pred):
        return fm.cfm_loss(pred, x_1=x_1, x_0=x_0, t=t_0, path=path)

    assert_rounded(loss(x_0), fm.cfm_loss(x_0, x_1=x_1, x_0=x_0, t=t_0, path=path), 2 * (SIGMA_ROUNDINGS + 8))


class OfSigma(Path):
    """alpha = 0 and any sigma."""

    def __init__(self, function):
        self.function = function

    def alpha(self, t):
        return 0.0

    def sigma(self, t):
        return self.function(t)


@pytest.mark.parametrize(
    ("path", "deviation"),
    [
        (ConstantBridge(1e-5), lambda t: 1e-5 + 0 * t),
        (SchrodingerBridge(1e-5), lambda t: 1e-5 * (t * (1 - t)).sqrt()),
        (SchrodingerBridge(1e-3, VE()), lambda t: 1e-3 * (t * (1 - t)).sqrt()),
        (OptimalTransport(1e-6), lambda t: (1 - t) + 1e-6 * t),
        (VE(1e-6, 1e-5), lambda t: 1e-6 * 10 ** (1 - t)),
        (OfSigma(lambda t: 1e-6 * (1 - t)), lambda t: 1e-6 * (1 - t)),
        (OfSigma(lambda t: (1e-12 + 1 - t).sqrt()), lambda t: (1e-12 + 1 - t).sqrt()),
        (OfSigma(lambda t: -1e-5), lambda t: -1e-5 + 0 * t),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "vmap"])
def test_a_score_is_held_only_where_it_is_infinite_at_an_end(path: Path, deviation, mode: str) -> None:
    t = torch.tensor([0.0, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-5, 1.0], dtype=torch.float64)
    bridge = path.gamma(t) is not None

    def score(t: torch.Tensor) -> torch.Tensor:
        coefficient = path.target_coefficients(t, "score")[2 if bridge else 1]
        return coefficient if isinstance(coefficient, torch.Tensor) else coefficient + 0 * t

    got = (torch.vmap(score) if mode == "vmap" else score)(t)
    want = -1 / deviation(t)
    assert torch.isfinite(got).all()
    exact = torch.isfinite(-1 / deviation(t.round())) | ((t > 2e-4) & (t < 1 - 2e-4))
    assert_rounded(got[exact], want[exact], 16)  # of the schedule, a root or a power and a quotient, on either side
    x = torch.ones(6, 2, dtype=torch.float64)
    batch = path.sample(x, x, t, z=x if bridge else None)
    assert_rounded(batch.target("score")[:, 0], got, 2)


@pytest.mark.parametrize("path", [ConstantBridge(0.0), SchrodingerBridge(0.0), OfSigma(lambda t: 0.0)])
def test_without_noise_there_is_no_score(path: Path) -> None:
    x = torch.ones(2, 2)
    batch = path.sample(x, x, 0.5)
    assert torch.equal(batch.x_t, x if path.gamma(batch.t) is not None else 0 * x)
    with pytest.raises(ValueError, match="target: expected one that exists without noise"):
        fm.cfm_loss(x, batch, target="score")
    assert torch.isfinite(fm.cfm_loss(x, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_small_deviations_are_what_they_are(dtype: torch.dtype) -> None:
    t = torch.tensor([0.0, 0.3, 1.0], dtype=dtype)
    for path in (VE(1e-6, 1e-5), OptimalTransport(1e-6)):
        alpha, sigma, d_alpha, d_sigma = path.coefficients(t.double())[:4]
        want = {
            "snr": (alpha / sigma) ** 2,
            "sigma_sqrt": sigma**-2,
            "likelihood": alpha / (sigma * (sigma * d_alpha - alpha * d_sigma)),
        }
        for name, value in want.items():
            got = weightings.resolve(name, path, t)
            # both coefficients, squared or as two products
            assert_rounded(got, value, 4 * 4 * (1 + math.log(10)) + 4)


def test_coefficients_have_the_shape_of_t() -> None:
    for shape in ((), (3,), (2, 3), (0,)):
        c = Constants().coefficients(torch.rand(shape))
        assert all(value.shape == shape for value in c[:4])
        assert (c.d_alpha_t == 0).all()
        assert (c.d_sigma_t == 0).all()


@paths
def test_the_inverse_of_an_extreme_snr_is_an_end(path: Path) -> None:
    got = path.snr_inverse(torch.tensor([0.0, math.inf]))
    assert_rounded(got, torch.tensor([0.0, 1.0]), 1, size=1.0)


def test_a_module_with_a_parameter_called_weight_is_a_callable_weight() -> None:
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, t):
            return self.weight * t

    t = torch.rand(4)
    assert torch.equal(weightings.resolve(Learned(), CondOT(), t), 3 * t)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CondOT().coefficients("0.5"), TypeError, "t: expected a tensor or a number"),
        (lambda: CondOT().snr(None), TypeError, "t: expected a tensor or a number"),
        (lambda: times.Shift.dynamic(800.0), ValueError, "mu: expected a finite number"),
        (lambda: weightings.Sigmoid(800.0), ValueError, "bias: expected a finite number"),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
