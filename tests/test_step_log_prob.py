"""Log-densities of sampling steps: what sampling reports, and its differentiable recomputation."""

from __future__ import annotations

import pytest
import torch
from gaussian_problem import Gaussian, run, uniform

from fmkernels.likelihood.step_log_prob import sde_step_log_prob
from fmkernels.paths import VP, CondOT, Path
from fmkernels.solvers.methods.sde import SDE
from fmkernels.solvers.programs.expressions import as_grid

each_path = pytest.mark.parametrize("path", [CondOT(), VP()], ids=repr)
each_method = pytest.mark.parametrize("method", ["euler", "exponential"])


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
        torch.testing.assert_close(reported[i], plain.detach(), rtol=1e-8, atol=1e-8)
        again = sde_step_log_prob(*step, sde=sde, path=path)
        torch.testing.assert_close(again.detach(), reported[i], rtol=1e-10, atol=1e-10)
        mean = sde_step_log_prob(*step, sde=sde, path=path, reduction="mean")
        torch.testing.assert_close(mean, again / 18)
        (wanted,) = torch.autograd.grad((plain * torch.arange(4)).sum(), network.weight)
        (got,) = torch.autograd.grad((again * torch.arange(4)).sum(), network.weight)
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)
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
        torch.testing.assert_close(together[i : i + 1], alone)
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
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_prob_in_low_precision(dtype: torch.dtype) -> None:
    network, path, grid = Network(dtype), CondOT(), uniform(10)
    x = torch.randn(8, 6, 6).to(dtype)
    states = torch.empty(11, *x.shape, dtype=dtype)
    states[0] = x
    sde = SDE("sigma", log_prob=True)
    with torch.no_grad():
        reported = run(sde, grid, path, network, x, trajectory=states).extras()["log_prob"]
    for i in range(9):
        step = (states[i], states[i + 1], grid[i], grid[i + 1])
        again = sde_step_log_prob(network, *step, sde=sde, path=path)
        assert again.dtype == reported[i].dtype == torch.float32
        # what a policy ratio needs: the same policy gives the same density, rounding of the states included
        torch.testing.assert_close(again.detach(), reported[i], rtol=1e-4, atol=1e-3)


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
            torch.testing.assert_close(again.detach(), reported[i], rtol=1e-9, atol=1e-9)
            a, b, std = sde.transition(path, t, u)
            dims = (...,) + (None,) * (x.dim() - t.dim())
            mean = a[dims] * states[i] + b[dims] * network(states[i], t)
            normal = torch.distributions.Normal(mean, std[dims].expand_as(mean))
            torch.testing.assert_close(reported[i], normal.log_prob(states[i + 1]).flatten(1).sum(1).detach())


def test_errors() -> None:
    x = torch.zeros(2, 3)
    step = {"model": Gaussian(CondOT()), "x": x, "x_next": x, "t": 0.1, "t_next": 0.2, "sde": SDE(), "path": CondOT()}
    for change, error, name in (
        ({"x": [1.0]}, TypeError, "x"),
        ({"x_next": x[:1]}, ValueError, "x_next"),
        ({"reduction": "none"}, ValueError, "reduction"),
        ({"prediction": "curl"}, ValueError, "prediction"),
        ({"sde": "sigma"}, TypeError, "sde"),
        ({"sde": SDE(method="heun")}, ValueError, "sde"),
        ({"t": torch.zeros(3)}, ValueError, "t"),
        ({"model": lambda x, t: x[:1]}, ValueError, "model"),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            sde_step_log_prob(**{**step, **change})
