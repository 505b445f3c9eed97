"""Log-densities of sampling steps: what sampling reports, and its differentiable recomputation."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_problem import Gaussian, run, uniform
from rounding import assert_rounded, roundings_of_sum

import fmkernels as fm
from fmkernels.likelihood.step_log_prob import sde_step_log_prob
from fmkernels.paths import VP, CondOT, Path
from fmkernels.solvers.methods.sde import SDE
from fmkernels.solvers.programs.expressions import as_grid

each_path = pytest.mark.parametrize("path", [CondOT(), VP()], ids=repr)
each_method = pytest.mark.parametrize("method", ["euler", "exponential"])


def assert_same_density(got: torch.Tensor, want: torch.Tensor) -> None:
    """Of some 18 numbers: z = (x_next - mean) / std is of numbers up to 30 times its own."""
    assert_rounded(got, want, 64, size=want.detach().abs().max() + 18.0)


class Network(torch.nn.Module):
    def __init__(self, dtype=torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(0.3 * torch.randn(6, 6, generator=g, dtype=torch.float64).to(dtype))

    def forward(self, x, t, bias=0.0):
        time = t.reshape(t.shape + (1,) * (x.dim() - t.dim())).to(x.dtype)
        return torch.tanh(x @ self.weight + time + bias)


def plain_log_prob(sde: SDE, path: Path, network, x, x_next, t: float, u: float):
    """By torch.distributions, from the formulas of SiT (Euler) and of DDIM (exponential, SBDM)."""
    time = torch.full((x.shape[0],), t, dtype=torch.float64)
    v = network(x, time)
    c, c_u = (path.coefficients(torch.tensor(s, dtype=torch.float64)) for s in (t, u))
    if sde.method == "exponential":
        x_1, x_0 = (path.convert(v, x, time, "velocity", target) for target in ("x_1", "x_0"))
        variance = c_u.sigma_t**2 * (1 - (c.alpha_t * c_u.sigma_t / (c_u.alpha_t * c.sigma_t)) ** 2)
        mean, std = c_u.alpha_t * x_1 + torch.sqrt(c_u.sigma_t**2 - variance) * x_0, variance.sqrt()
    else:
        w = c.sigma_t * (c.sigma_t * c.d_alpha_t / c.alpha_t - c.d_sigma_t)
        mean, std = x + (u - t) * (v + w * path.convert(v, x, time, "velocity", "score")), torch.sqrt(2 * w * (u - t))
    return torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).sum(1)


@each_path
@each_method
def test_log_prob_is_that_of_the_recorded_steps(method: str, path: Path) -> None:
    network, grid = Network(), uniform(12, 0.2, 1.0)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    states = torch.empty(13, *x.shape, dtype=torch.float64)
    states[0] = x
    sde = SDE("sbdm", method=method, log_prob=True)
    with torch.no_grad():
        reported = run(sde, grid, path, network, x, trajectory=states).extras()["log_prob"]
    assert len(reported) == 12
    assert all(value.shape == (4,) for value in reported)
    assert torch.equal(reported[-1], torch.zeros(4, dtype=torch.float64))
    for i in range(11):
        step = (network, states[i], states[i + 1], grid[i], grid[i + 1])
        plain = plain_log_prob(sde, path, *step)
        assert_same_density(reported[i], plain)
        again = sde_step_log_prob(*step, sde=sde, path=path)
        assert_same_density(again, reported[i])
        mean = sde_step_log_prob(*step, sde=sde, path=path, reduction="mean")
        assert_rounded(mean, again / 18, 4)
        (wanted,) = torch.autograd.grad((plain * torch.arange(4)).sum(), network.weight)
        (got,) = torch.autograd.grad((again * torch.arange(4)).sum(), network.weight)
        assert_rounded(got, wanted, 128, size=wanted.abs().max())  # twice as many as of the density
    last = sde_step_log_prob(network, states[11], states[12], grid[11], grid[12], sde=sde, path=path)
    assert torch.equal(last, reported[-1])


def test_the_last_step_is_known_by_its_time() -> None:
    """Sampling reports 0 for it; without being told so the density was 432."""
    network, path, grid = Network(), CondOT(), uniform(5)
    x = torch.randn(4, 6, dtype=torch.float64)
    states = torch.empty(6, *x.shape, dtype=torch.float64)
    states[0] = x
    with torch.no_grad():
        for last_step in ("mean", "tweedie", "euler", "none"):
            sde = SDE(last_step=last_step, log_prob=True)
            reported = run(sde, grid, path, network, x, trajectory=states).extras()["log_prob"]
            for t, u in ((0.8, 1.0), (torch.full((4,), 0.8), torch.ones(4))):
                again = sde_step_log_prob(network, states[4], states[5], t, u, sde=sde, path=path)
                torch.testing.assert_close(again, reported[4], rtol=1e-5, atol=1e-5)
                assert (again == 0.0).all() == (last_step != "none")
        t, u = torch.tensor([0.6, 0.8, 0.8, 0.8]), torch.tensor([0.8, 1.0, 1.0, 1.0])
        sde = SDE()
        mixed = sde_step_log_prob(network, states[4], states[5], t, u, sde=sde, path=path)
        assert (mixed == 0.0).tolist() == [False, True, True, True]
        inside = sde_step_log_prob(network, states[4], states[5], 0.8, 1.0, sde=sde, path=path, last=False)
        assert (inside != 0.0).all()


def test_log_prob_of_a_batch_of_mixed_steps() -> None:
    network, path, sde = Network(), CondOT(), SDE("flow_grpo")
    x, x_next = torch.randn(2, 5, 6, dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.5, 0.5, 0.9], dtype=torch.float64)
    u = torch.tensor([0.1, 0.2, 0.7, 0.5, 1.0], dtype=torch.float64)
    together = sde_step_log_prob(network, x, x_next, t, u, sde=sde, path=path, bias=0.3)
    for i in range(5):
        alone = sde_step_log_prob(
            network, x[i : i + 1], x_next[i : i + 1], float(t[i]), float(u[i]), sde=sde, path=path, bias=0.3
        )
        assert_same_density(together[i : i + 1], alone)
    assert together[3] == 0.0  # no time passes
    together.sum().backward()
    assert network.weight.grad.isfinite().all()


@pytest.mark.parametrize("prediction", ["x_1", "x_0", "score"])
def test_log_prob_of_other_predictions(prediction: str) -> None:
    network, path, sde = Network(), CondOT(), SDE("sigma")
    x, x_next = torch.randn(2, 5, 6, dtype=torch.float64)
    t = torch.full((5,), 0.4, dtype=torch.float64)
    converted = lambda x, t: path.convert(network(x, t), x, t, "velocity", prediction)  # noqa: E731
    wanted = sde_step_log_prob(network, x, x_next, 0.4, 0.5, sde=sde, path=path)
    got = sde_step_log_prob(converted, x, x_next, t, t + 0.1, sde=sde, path=path, prediction=prediction)
    assert_same_density(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_prob_in_low_precision(dtype: torch.dtype) -> None:
    """A solve reports the density of the noise that it drew, before the state is rounded; computed again it is that of
    the states that are given. Noise rounded to bfloat16 before it was squared made both wrong by 1 in 16384."""
    path, grid, size = CondOT(), uniform(4), 16384
    network = lambda x, t: torch.tanh(x)  # noqa: E731
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(4)).to(dtype)
    states = torch.empty(5, *x.shape, dtype=dtype)
    states[0] = x
    sde = SDE("sigma", log_prob=True)
    with torch.no_grad():
        solve = run(sde, grid, path, network, x, seed=8, trajectory=states)
    reported, counts = (solve.extras()[name] for name in ("log_prob", "log_prob_count"))
    normaliser = 0.5 * math.log(2.0 * math.pi)
    for i in range(3):
        t, u = (torch.tensor(time, dtype=torch.float64) for time in grid[i : i + 2])
        a, b, std = (float(c) for c in sde.transition(path, t, u))
        z = fm.randn(x.shape, seed=8, stream=i, dtype=torch.float32).double()
        drawn = -0.5 * z.square().sum(1) - size * (math.log(std) + normaliser)
        assert reported[i].dtype == torch.float32
        assert float((reported[i].double() - drawn).abs().max()) < 0.01
        assert counts[i].tolist() == [size] * 3
        again = sde_step_log_prob(network, states[i], states[i + 1], t, u, sde=sde, path=path)
        away = states[i + 1].double() - a * states[i].double() - b * network(states[i], t).double()
        given = -0.5 * (away / std).square().sum(1) - size * (math.log(std) + normaliser)
        assert again.dtype == torch.float32
        assert float((again.double() - given).abs().max()) < 0.02
        # and the rounding of the state between the two
        rounding = (away - std * z) / std
        assert float((given - drawn + (z * rounding + 0.5 * rounding.square()).sum(1)).abs().max()) < 1e-6
    assert float(reported[3].abs().max()) == counts[3].sum() == 0


def _wants_one_dtype(module, arguments) -> None:
    assert arguments[0].dtype == arguments[1].dtype


def test_reductions_and_counts() -> None:
    network, path = Network(), CondOT()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    results = {}
    for kind in (True, "sum", "mean", "none", False):
        torch.manual_seed(0)
        with torch.no_grad():
            _, results[kind] = fm.sample(network, x, steps=3, sde=SDE(log_prob=kind), return_trajectory=True)
    total, mean, each = (results[kind].log_prob for kind in ("sum", "mean", "none"))
    assert results[False].log_prob is None
    assert results[False].log_prob_count is None
    assert torch.equal(results[True].log_prob, total)
    counts = results["sum"].log_prob_count
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[18] * 4, [18] * 4, [0] * 4]
    assert each.shape == (3, *x.shape)
    assert_rounded(each.flatten(2).sum(2), total, 2 * roundings_of_sum(18), size=each.abs().flatten(2).sum(2))
    assert_rounded(mean, total / 18, 4)
    trajectory, times = results["sum"].trajectory, results["sum"].times
    for i in range(3):
        # times as the result has them, in float64, for a network in float32 too
        for dtype in (torch.float64, torch.float32):
            strict = Network(dtype)
            strict.register_forward_pre_hook(_wants_one_dtype)
            arguments = (strict, trajectory[i].to(dtype), trajectory[i + 1].to(dtype), times[i], times[i + 1])
            for kind, wanted in (("sum", total), ("mean", mean), ("none", each)):
                options = {"sde": SDE(), "path": path, "reduction": kind, "return_count": True}
                with torch.no_grad():
                    got, count = sde_step_log_prob(*arguments, **options)
                assert got.dtype == dtype
                torch.testing.assert_close(got.double(), wanted[i], rtol=1e-3, atol=1e-3)
                assert torch.equal(count, counts[i])
    for bad, error in (("median", ValueError), (1, TypeError), (None, TypeError)):
        with pytest.raises(error, match="log_prob: expected"):
            SDE(log_prob=bad)


# ---------------------------------------------------------------------- subspaces

MASK = torch.tensor([[True, True, True, False, False], [True] * 5, [True, False, False, False, False]])


def centred(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(z)
    for b, points in enumerate(mask):
        result[b, points] = z[b, points] - z[b, points].mean(0)
    return result


@pytest.mark.parametrize("kind", ["padded", "centred", "centred and padded"])
@pytest.mark.parametrize("method", ["ddim_sde", "ancestral", "dpmpp_2s_sde", "edm_churn", "restart", "sde", "heun"])
def test_noise_in_a_subspace_stays_there(method: str, kind: str) -> None:
    """A velocity that stays in the subspace, and a state from it: so do the samples, of every method with noise."""
    mask = MASK if "padded" in kind else torch.ones_like(MASK)
    transform = {
        "padded": fm.MaskedNoise(mask),
        "centred": fm.ZeroMeanNoise(),
        "centred and padded": fm.ZeroMeanNoise(mask),
    }[kind]
    project = (lambda z: z * mask[..., None]) if kind == "padded" else (lambda z: centred(z, mask))
    network = lambda x, t: project(torch.tanh(x + t[:, None, None]))  # noqa: E731
    chosen = {"sde": {"sde": SDE(log_prob=True)}, "heun": {"sde": SDE(method="heun")}}.get(method, {"method": method})
    options = {"steps": 6, "noise_transform": transform, **chosen}
    generator = torch.Generator().manual_seed(1)
    x_1, result = fm.sample(network, (3, 5, 2), dtype=torch.float64, generator=generator, **options)
    torch.testing.assert_close(x_1, project(x_1), rtol=1e-12, atol=1e-12)
    assert float(x_1.abs().max()) > 0.3
    if result.log_prob_count is not None:
        points = mask.sum(1)
        degrees = 2 * (points if kind == "padded" else points - 1)
        assert torch.equal(result.log_prob_count[:-1], degrees.expand(5, 3))


@pytest.mark.parametrize("kind", ["padded", "centred and padded"])
def test_log_prob_in_a_subspace_is_that_in_its_coordinates(kind: str) -> None:
    transform = fm.MaskedNoise(MASK) if kind == "padded" else fm.ZeroMeanNoise(MASK)
    network = lambda x, t: transform(torch.tanh(x + t[:, None, None]))  # noqa: E731
    path, sde, x = CondOT(), SDE(log_prob=True), torch.zeros(3, 5, 2, dtype=torch.float64)
    _, result = fm.sample(network, x, sde=sde, steps=4, noise_transform=transform, return_trajectory=True)
    for i in range(3):
        before, after = result.trajectory[i : i + 2]
        t, u = result.times[i : i + 2]
        again = sde_step_log_prob(network, before, after, t, u, sde=sde, path=path, noise_transform=transform)
        assert_same_density(again, result.log_prob[i])
        a, b, std = sde.transition(path, t, u)
        away = after - a * before - b * network(before, t.expand(3))
        for sample in range(3):
            points = away[sample][MASK[sample]]
            if kind != "padded":
                # an orthonormal basis of the points' positions with their mean at 0
                n = points.shape[0]
                basis = torch.linalg.svd(torch.eye(n, dtype=torch.float64) - 1.0 / n)[0][:, : n - 1]
                points = basis.T @ points
            wanted = torch.distributions.Normal(0.0, std).log_prob(points).sum()
            assert_same_density(result.log_prob[i, sample], wanted)
    mean = fm.sample(network, x, sde=SDE(log_prob="mean"), steps=2, noise_transform=transform)[1]
    assert mean.log_prob.isfinite().all()  # a sample of one point has no noise about its centre


def test_masks_of_tokens_with_times_of_their_own() -> None:
    transform = fm.MaskedNoise(MASK)
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    base = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    grid = base[:, None, None].repeat(1, 3, 5)
    grid[:, 1, 2] = 1.0
    network = lambda x, t: torch.tanh(x)  # noqa: E731
    options = {"time_grid": grid, "noise_transform": transform}
    torch.manual_seed(2)
    _, total = fm.sample(network, x, sde=SDE(log_prob="sum"), **options)
    torch.manual_seed(2)
    _, each = fm.sample(network, x, sde=SDE(log_prob="none"), **options)
    noisy = MASK.clone()
    noisy[1, 2] = False
    assert torch.equal(total.log_prob_count[:-1], (2 * noisy.sum(1)).expand(3, 3))
    sizes = each.log_prob.abs().flatten(2).sum(2)
    assert_rounded(each.log_prob.flatten(2).sum(2), total.log_prob, 2 * roundings_of_sum(10), size=sizes)
    assert torch.equal(each.log_prob[0] != 0.0, noisy[..., None].expand(3, 5, 2))
    with pytest.raises(ValueError, match="noise_transform: expected a mask where the noise differs"):
        fm.sample(network, x, sde=SDE(log_prob=True), time_grid=grid, noise_transform=fm.ZeroMeanNoise())
    with pytest.raises(ValueError, match="log_prob: expected 'sum' or 'mean'"):
        fm.sample(network, x, sde=SDE(log_prob="none"), steps=2, noise_transform=fm.ZeroMeanNoise())
    with pytest.raises(ValueError, match="one with a method degrees"):
        fm.sample(network, x, sde=SDE(log_prob=True), steps=2, noise_transform=lambda z: 0.5 * z)


def test_transformed_noise_belongs_to_its_sample() -> None:
    network = lambda x, t: torch.tanh(x)  # noqa: E731
    x = torch.randn(6, 4, 2)
    options = {"sde": SDE(log_prob=True), "steps": 3, "noise_transform": fm.ZeroMeanNoise()}

    def draw(rows, offset, **more):
        generator = torch.Generator().manual_seed(7)
        return fm.sample(network, rows, generator=generator, row_offset=offset, **options, **more)

    whole, result = draw(x, 0)
    parts = [draw(x[i : i + 3], i) for i in (0, 3)]
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), whole)
    torch.testing.assert_close(torch.cat([r.log_prob for _, r in parts], 1), result.log_prob)
    x.requires_grad_()
    for gradient in ("direct", "checkpoint"):
        torch.testing.assert_close(draw(x, 0, gradient=gradient)[0].detach(), whole)
    plain = fm.sample(network, x.detach(), generator=torch.Generator().manual_seed(7), sde=SDE(), steps=3)[0]
    same = fm.sample(
        network,
        x.detach(),
        generator=torch.Generator().manual_seed(7),
        sde=SDE(),
        steps=3,
        noise_transform=lambda z: z.clone(),
    )[0]
    torch.testing.assert_close(same, plain)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fm.MaskedNoise([True]), TypeError, "mask: expected a torch.Tensor"),
        (lambda: fm.MaskedNoise(torch.ones(2)), TypeError, "mask: expected a bool tensor"),
        (lambda: fm.MaskedNoise(torch.tensor(True)), ValueError, "mask: expected at least one dimension"),
        (lambda: fm.MaskedNoise(torch.ones(3, dtype=torch.bool))(torch.ones(2, 2)), ValueError, "mask: expected"),
        (lambda: fm.ZeroMeanNoise(torch.ones(3, dtype=torch.bool)), ValueError, r"mask: expected shape \(B, N\)"),
        (lambda: fm.ZeroMeanNoise(dim=0), ValueError, "dim: expected"),
        (lambda: fm.ZeroMeanNoise(dim=2)(torch.ones(2, 3)), ValueError, "dim: expected a dimension of the states"),
        (lambda: fm.sample(lambda x, t: x, (2, 2), noise_transform=0.5), TypeError, "noise_transform: expected"),
        (lambda: fm.sample(lambda x, t: x, (2, 2), noise_transform=lambda z: z[0]), ValueError, "noise_transform"),
    ],
    ids=range(9),
)
def test_errors_of_noise_transforms(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_log_prob_gradients_by_finite_differences() -> None:
    network = Network()
    x, x_next = torch.randn(2, 3, 6, dtype=torch.float64)
    x.requires_grad_()

    def function(x, weight):
        model = lambda x, t: torch.tanh(x @ weight + t[:, None])  # noqa: E731
        return sde_step_log_prob(model, x, x_next, 0.3, 0.4, sde=SDE("constant"), path=VP())

    assert torch.autograd.gradcheck(function, (x, network.weight))


@each_method
def test_per_sample_and_per_token_times(method: str) -> None:
    path, sde = CondOT(), SDE("sigma", method=method, log_prob=True, last_step="none")
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    network = Network()
    for shape in ((3,), (3, 4)):
        g = torch.Generator().manual_seed(2)
        start = 0.4 * torch.rand(shape, generator=g, dtype=torch.float64)
        grid = as_grid(torch.stack([start, start + 0.2, start + 0.5]))
        states = torch.empty(3, *x.shape, dtype=torch.float64)
        states[0] = x
        with torch.no_grad():
            reported = run(sde, grid, path, network, x, trajectory=states).extras()["log_prob"]
        for i in range(2):
            t, u = (torch.as_tensor(s) for s in grid[i : i + 2])
            again = sde_step_log_prob(network, states[i], states[i + 1], t, u, sde=sde, path=path)
            assert_same_density(again, reported[i])
            a, b, std = sde.transition(path, t, u)
            dims = (...,) + (None,) * (x.dim() - t.dim())
            mean = a[dims] * states[i] + b[dims] * network(states[i], t)
            normal = torch.distributions.Normal(mean, std[dims].expand_as(mean))
            assert_same_density(reported[i], normal.log_prob(states[i + 1]).flatten(1).sum(1))


def test_errors() -> None:
    x = torch.zeros(2, 3)
    step = {"model": Gaussian(CondOT()), "x": x, "x_next": x, "t": 0.1, "t_next": 0.2, "sde": SDE(), "path": CondOT()}
    for change, error, name in (
        ({"x": [1.0]}, TypeError, "x"),
        ({"x_next": x[:1]}, ValueError, "x_next"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"reduction": None}, TypeError, "reduction"),
        ({"path": "CondOT"}, TypeError, "path"),
        ({"last": 1}, TypeError, "last"),
        ({"t": 1.5}, ValueError, "t"),
        ({"t_next": "1"}, TypeError, "t_next"),
        ({"t_next": torch.ones(2, dtype=torch.int64)}, TypeError, "t_next"),
        ({"model": None}, TypeError, "model"),
        ({"x": torch.tensor(1.0), "x_next": torch.tensor(1.0)}, ValueError, "x"),
        ({"noise_transform": 1}, TypeError, "noise_transform"),
        ({"t": torch.full((2,), 0.1), "t_next": torch.full((2, 3), 0.2)}, ValueError, "t_next"),
        ({"prediction": "curl"}, ValueError, "prediction"),
        ({"sde": "sigma"}, TypeError, "sde"),
        ({"sde": SDE(method="heun")}, ValueError, "sde"),
        ({"t": torch.zeros(3)}, ValueError, "t"),
        ({"model": lambda x, t: x[:1]}, ValueError, "model"),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            sde_step_log_prob(**{**step, **change})


@pytest.mark.parametrize("method", ["euler", "exponential"])
@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler", "none"])
@pytest.mark.parametrize("zero_init", [None, 2])
def test_a_solve_of_one_step_reports_it(method: str, last_step: str, zero_init: int | None) -> None:
    guidance = None if zero_init is None else fm.guidance.CFG(2.0, negative={"s": -1.0}, zero_init=zero_init)
    sde = fm.SDE("sigma", method=method, last_step=last_step, log_prob=True)
    _, result = fm.sample(lambda x, t, s: -x * s, torch.randn(3, 2), steps=1, sde=sde, guidance=guidance, s=1.0)
    assert result.log_prob.shape == (1, 3)
    if last_step != "none":
        assert (result.log_prob == 0.0).all()
