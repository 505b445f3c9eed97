"""Weightings and time samplers: known values, laws, ends, generators, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rounding import assert_rounded, roundings_of_sum
from scipy import stats

import fmkernels as fm
from fmkernels import times, weightings
from fmkernels.paths import VE, VP, CondOT, Cosine

T = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
PATHS = [CondOT(), Cosine(), VP()]
NAMES = [name for name in weightings.WEIGHTINGS if name != "uniform"]


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_finite_everywhere(path, name) -> None:
    for t in (T, T.float()):
        w = weightings.resolve(name, path, t)
        assert w.shape == t.shape
        assert w.dtype == t.dtype
        assert torch.isfinite(w).all()
        assert (w >= 0).all()


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("snr", lambda t: (t / (1 - t)) ** 2),
        ("truncated_snr", lambda t: max((t / (1 - t)) ** 2, 1)),
        ("min_snr", lambda t: min((t / (1 - t)) ** 2, 5)),
        ("sigma_sqrt", lambda t: (1 - t) ** -2),
        ("cosmap", lambda t: 2 / (math.pi * (1 - 2 * (1 - t) + 2 * (1 - t) ** 2))),
        ("sigmoid", lambda t: 1 / (1 + (t / (1 - t)) ** 2)),
        ("likelihood", lambda t: t / (1 - t)),
        ("x_1", lambda t: (1 - t) ** -2),
    ],
)
def test_known_values(name, formula) -> None:
    t = torch.tensor([0.1, 0.25, 0.6, 0.8], dtype=torch.float64)
    want = torch.tensor([formula(x) for x in t.tolist()], dtype=torch.float64)
    assert_rounded(weightings.resolve(name, CondOT(), t), want, 16)  # eight on either side


def test_weights_are_exact_up_to_where_they_are_held() -> None:
    """Standard deviations, and distances from the end, count as at least 1e-4: their squares as at least 1e-8."""
    t = torch.tensor([0.0, 1e-9, 1 - 2e-4, 1 - 1e-4, 1 - 1e-6, 1.0], dtype=torch.float64)
    sigma = (1 - t).clamp(min=1e-4)
    for name, want in {
        "snr": (t / sigma).square(),
        "truncated_snr": (t / sigma).square().clamp(min=1),
        "sigma_sqrt": sigma**-2,
        "x_1": sigma**-2,
        "likelihood": t / (sigma * (sigma + t)),
    }.items():
        torch.testing.assert_close(weightings.resolve(name, CondOT(), t), want, rtol=1e-12, atol=0)
    path = VE(1e-3, 1.0)  # half g^2 = sigma^2 log(sigma_max / sigma_min): 6.9e-6 at the end
    t = torch.tensor([0.9, 1.0], dtype=torch.float64)
    want = 1 / (path.sigma(t).square() * math.log(1e3))
    torch.testing.assert_close(weightings.resolve("likelihood", path, t), want, rtol=1e-12, atol=0)


def test_likelihood_is_the_score_bound() -> None:
    """2 / g^2 times the velocity's squared error is g^2 / 2 times the score's: v = d alpha / alpha x + g^2 / 2 s."""
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    for path in PATHS:
        c = path.coefficients(t)
        half_g2 = c.sigma_t * (c.sigma_t * c.d_alpha_t / c.alpha_t - c.d_sigma_t)
        # two coefficients on either side, of VP eleven times four each: test_targets.py
        assert_rounded(weightings.resolve("likelihood", path, t), 1 / half_g2, 100)
        a, b = fm.paths.targets.conversion_coefficients(path, t, "score", "velocity")
        assert_rounded(b, half_g2, 100)
        assert_rounded(a, c.d_alpha_t / c.alpha_t, 100)


def test_equivalent_losses() -> None:
    """On CondOT the velocity's loss is the data prediction's with weight 1 / (1 - t)^2, and noise's with SNR."""
    torch.manual_seed(0)
    x_1, t = torch.randn(50, 4, dtype=torch.float64), torch.rand(50, dtype=torch.float64) * 0.9 + 0.05
    batch = CondOT().sample(x_1, t=t)
    v = torch.randn_like(x_1)
    as_data = CondOT().convert(v, batch.x_t, t, "velocity", "x_1")
    as_noise = CondOT().convert(v, batch.x_t, t, "velocity", "x_0")
    loss = fm.cfm_loss(v, batch)
    # of the residuals on either side, which are up to 20 times smaller than what they are formed of
    roundings = 20 * 4 + 2 * roundings_of_sum(200)
    assert_rounded(fm.cfm_loss(as_data, batch, target="x_1", weight="x_1"), loss, roundings)
    by_snr = fm.cfm_loss(as_data, batch, target="x_1", weight="snr")
    assert_rounded(fm.cfm_loss(as_noise, batch, target="x_0"), by_snr, roundings)


def test_forms_of_a_weight() -> None:
    t = torch.rand(6)
    assert weightings.resolve(None, CondOT(), t) is None
    assert weightings.resolve("uniform", CondOT(), t) is None
    assert weightings.resolve(t, CondOT(), t) is t
    assert torch.equal(weightings.resolve(lambda t: 1 + t, CondOT(), t), 1 + t)
    assert torch.equal(weightings.resolve(lambda t: 2.0, CondOT(), t), torch.full_like(t, 2.0))
    assert weightings.resolve(weightings.MinSNR(1.0), CondOT(), t).max() <= 1
    for wrong in (3, object()):
        with pytest.raises(TypeError, match="weight: expected None, a name"):
            weightings.resolve(wrong, CondOT(), t)
    with pytest.raises(TypeError, match=r"weight\(t\): expected a tensor"):
        weightings.resolve(lambda t: "heavy", CondOT(), t)
    with pytest.raises(ValueError, match="gamma"):
        weightings.MinSNR(0.0)


def u_shaped(a):
    return lambda t: 0.5 + np.sinh(a * (2 * t - 1)) / (2 * math.sinh(a))


# A sampler and its distribution function, on our side of time: 0 is noise.
SAMPLERS = [
    (times.Uniform(), stats.uniform.cdf),
    (times.Uniform(0.2, 0.7), stats.uniform(0.2, 0.5).cdf),
    (times.Uniform(stratified=True), stats.uniform.cdf),
    (times.LogitNormal(), lambda t: stats.norm.cdf(np.log(t / (1 - t)))),
    (times.LogitNormal(0.5, 2.0), lambda t: stats.norm.cdf((np.log(t / (1 - t)) + 0.5) / 2)),
    (times.CosMap(), lambda t: 1 - 2 / math.pi * np.arctan(1 / t - 1)),
    (times.UShaped(), u_shaped(4.0)),
    (times.Beta(), lambda t: 1 - np.clip((1 - t - 0.001) / 0.999, 0, 1) ** 1.5),
    (times.Beta(2.0, 3.0, 1.0, 0.0), lambda t: stats.beta(3.0, 2.0).cdf(t)),
    (times.Shifted(times.Uniform(), times.Shift(3.0)), lambda t: 3 * t / (1 - t + 3 * t)),
]


@pytest.mark.parametrize(("sampler", "law"), SAMPLERS, ids=[repr(s) for s, _ in SAMPLERS])
def test_laws(sampler, law) -> None:
    generator = torch.Generator().manual_seed(0)
    t = sampler(20_000, generator=generator)
    assert t.dtype == torch.float32
    assert t.shape == (20_000,)
    assert t.min() >= 0
    assert t.max() <= 1
    assert stats.kstest(t.double().clamp(1e-9, 1 - 1e-7).numpy(), law).pvalue > 1e-3
    again = sampler((20_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(t, again)
    assert sampler((3, 4)).shape == (3, 4)
    assert sampler(0).shape == (0,)


def test_mode_is_diffusers_after_turning_time() -> None:
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(1)).double()
    sigma = 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)  # compute_density_for_timestep_sampling
    t = times.Mode(1.29)(20_000, generator=torch.Generator().manual_seed(2)).double()
    assert stats.ks_2samp((1 - t).numpy(), sigma.numpy()).pvalue > 1e-3


def test_logit_normal_is_diffusers_after_turning_the_means_sign() -> None:
    """diffusers draws a place among timesteps that descend from noise: a place u has the noise level 1 - u."""
    u = torch.sigmoid(0.7 + 0.8 * torch.randn(20_000, generator=torch.Generator().manual_seed(1)).double())
    t = times.LogitNormal(-0.7, 0.8)(20_000, generator=torch.Generator().manual_seed(2)).double()
    assert stats.ks_2samp(t.numpy(), u.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("low", "high"), [(0.999, 1.0), (0.3, 0.3000001), (0.7, 0.7 + 2**-24), (0.5, 0.5 + 1e-12)])
@pytest.mark.parametrize("stratified", [False, True])
def test_uniform_times_stay_within_a_half_open_interval(low, high, stratified) -> None:
    t = times.Uniform(low, high, stratified)(50_000, generator=torch.Generator().manual_seed(0)).double()
    assert t.min() >= low
    assert t.max() < high


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000, 100_003])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.25, 0.75)])
def test_strata_are_exact_for_any_count(n, low, high) -> None:
    t = times.Uniform(low, high, stratified=True)(n, seed=1).double()
    assert torch.equal(((t - low) / (high - low) * n).floor().sort().values, torch.arange(n).double())


def test_beta_of_small_and_large_parameters() -> None:
    for a, b in ((0.3, 0.2), (1.0, 2.5), (5.0, 0.7), (50.0, 30.0)):
        noise = 1 - times.Beta(a, b, 1.0, 0.0)(50_000, seed=3).double().numpy()
        law = stats.beta(a, b)
        edges = law.ppf(np.linspace(0.2, 0.8, 25))  # float32 does not resolve the ends of such laws
        seen = np.histogram(noise, np.concatenate([[-1], edges, [2]]))[0]
        assert stats.chisquare(seen, len(noise) * np.diff(law.cdf(np.concatenate([[-1], edges, [2]])))).pvalue > 1e-3


def test_float32_whatever_the_default_dtype() -> None:
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        for sampler, _ in SAMPLERS:
            assert sampler(3).dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


def test_stratified_times_hit_every_stratum_once() -> None:
    t = times.Uniform(stratified=True)(64)
    assert torch.equal((t * 64).floor().sort().values, torch.arange(64.0))
    assert not torch.equal(t, t.sort().values)


def test_shift() -> None:
    shift = times.Shift(3.0)
    t = torch.linspace(0, 1, 11)
    sigma = 1 - t
    torch.testing.assert_close(shift(t), 1 - 3 * sigma / (1 + 2 * sigma))
    torch.testing.assert_close(shift.inverse(shift(t)), t)
    assert shift(t)[0] == 0
    assert shift(t)[-1] == 1
    mu = 0.8
    torch.testing.assert_close(times.Shift.dynamic(mu)(t[:-1]), 1 - math.exp(mu) / (math.exp(mu) + 1 / sigma[:-1] - 1))
    assert times.Shift.for_resolution(256).shift == pytest.approx(math.exp(0.5))
    assert times.Shift.for_resolution(4096).shift == pytest.approx(math.exp(1.15))


def test_samplers_serve_a_path() -> None:
    x_1 = torch.randn(8, 3)
    batch = CondOT().sample(x_1, time_sampler=times.Shifted(times.LogitNormal(), times.Shift(2.0)))
    assert batch.t.shape == (8,)
    assert batch.t.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: times.Uniform(0.5, 0.5), ValueError, "high"),
        (lambda: times.Uniform(-0.1), ValueError, "low"),
        (lambda: times.LogitNormal(std=0.0), ValueError, "std"),
        (lambda: times.Mode(3.0), ValueError, "scale"),
        (lambda: times.UShaped(0.0), ValueError, "a: expected"),
        (lambda: times.Beta(a=-1.0), ValueError, "a: expected"),
        (lambda: times.Beta(offset=0.5), ValueError, "offset"),
        (lambda: times.Shift(0.0), ValueError, "shift: expected"),
        (lambda: times.Shift("3"), TypeError, "shift: expected a number"),
        (lambda: times.Shift()(torch.ones(3, dtype=torch.int64)), TypeError, "t: expected a float32"),
        (lambda: times.Shifted(3, times.Shift()), TypeError, "sampler"),
        (lambda: times.Shifted(times.Uniform(), 3.0), TypeError, "shift: expected a Shift"),
        (lambda: times.Shift.for_resolution(256, 256, 256), ValueError, "max_seq_len"),
        (lambda: times.Uniform(0.3, 0.3 + 1e-9), ValueError, "high: expected a bound with a float32 number"),
        (lambda: times.Uniform(stratified=1), TypeError, "stratified: expected a bool"),
        (lambda: times.Uniform(size=4), ValueError, "size: expected None but beside stratified"),
        (lambda: times.Uniform(stratified=True, size=0), ValueError, "size: expected an int >= 1"),
        (lambda: times.Uniform(stratified=True)(4, row_offset=2), ValueError, "row_offset: expected 0 for strat"),
        (lambda: times.Uniform(stratified=True, size=5)(4, row_offset=2), ValueError, "size: expected at least the 6"),
        (lambda: times.Uniform()(4, seed="a"), TypeError, "seed: expected an int"),
        (lambda: times.Uniform()(4, seed=2**64), ValueError, "seed: expected an int that fits"),
        (lambda: times.Uniform()(4, seed=torch.ones(2)), ValueError, "seed: expected an int64 tensor"),
        (lambda: times.Uniform()(4, None, torch.Generator(), seed=1), ValueError, "seed, generator: expected at most"),
        (lambda: times.Uniform()(4, row_offset=-1), ValueError, "row_offset: expected an int >= 0"),
        (lambda: times.Uniform()(4, row_offset=1.0), TypeError, "row_offset: expected an int"),
        (lambda: times.Uniform()("44"), TypeError, "shape: expected an int or a sequence"),
        (lambda: times.Sampler()(4), NotImplementedError, r"Sampler: expected a method draw"),
        (lambda: times.Shifted(lambda *a, **k: 1.0, times.Shift())(4), TypeError, r"sampler\(shape\): expected a ten"),
        (lambda: times.Shifted(lambda *a, **k: 1.0, times.Shift())(4, seed=1), TypeError, r"sampler\(shape\): expec"),
        (
            lambda: times.Shifted(lambda s, device, generator: torch.rand(s), times.Shift())(4, seed=1),
            ValueError,
            "sampler: expected one of fm.times, or a function with arguments seed and row_offset",
        ),
        (lambda: times.Uniform()(-3), ValueError, "shape: expected an int >= 0"),
        (lambda: times.Uniform()(2.5), TypeError, "shape: expected an int or a sequence"),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bias", [-2.0, 0.0, 1.5])
def test_the_bias_of_the_sigmoid_weighting(bias: float) -> None:
    """sigmoid(bias - log SNR)."""
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    want = torch.sigmoid(bias - 2.0 * torch.log(t / (1.0 - t)))
    got = fm.weightings.Sigmoid(bias).weight(fm.paths.CondOT(), t)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_shifted_times_are_drawn_as_those_of_any_sampler() -> None:
    shifted = fm.times.Shifted(fm.times.Uniform(), fm.times.Shift(2.0))
    seed = torch.tensor(1)
    expected = shifted.shift(shifted.sampler.draw((5,), seed, 3))
    assert torch.equal(shifted.draw((5,), seed, 3), expected)
    assert torch.equal(shifted((5,), seed=1, row_offset=3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [7.25, 12.0, 60.0])
def test_the_likelihood_weight_where_alpha_underflows(n: float, dtype: torch.dtype) -> None:
    """alpha = t^n, sigma = 1 - t^n: 2 / g^2 = t / (n sigma)."""
    t = torch.tensor([1e-4, 1e-3, 0.1, 0.5], dtype=dtype)
    exact = t.double()
    want = exact / (n * (1.0 - exact**n))
    got = fm.weightings.Likelihood().weight(fm.paths.Polynomial(n), t)
    assert got.dtype is dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=4 * torch.finfo(dtype).eps * n, atol=0.0)


def test_a_weighting_is_not_its_class() -> None:
    with pytest.raises(TypeError, match="weight: expected None, a name, a weighting"):
        fm.weightings.resolve(fm.weightings.MinSNR, fm.paths.CondOT(), torch.rand(3))
