"""Log-densities on fixed grids: closed forms, a plain solve, a peer, failures."""

from __future__ import annotations

import math

import pytest
import torch
from likelihood_problems import DTYPE, data, expand, field, network, normal_flow, shapes
from torch import Tensor, nn

from fmkernels.likelihood.density import bits_per_dim, log_prob, sample_with_log_prob, standard_normal
from fmkernels.likelihood.divergence import divergence
from fmkernels.likelihood.log_det import log_det_weights, plan
from fmkernels.ops.step_control.op import Status
from fmkernels.paths import CondOT, Cosine
from fmkernels.solvers.methods import registry as methods
from fmkernels.solvers.methods.tableaus import TABLEAUS

FIXED = [*TABLEAUS, "ab2", "ab3", "ab4", "am2", "am3", "am4"]


@shapes
def test_normal_to_normal_flow_on_a_fixed_grid(shape: tuple[int, ...]) -> None:
    mean, std = 0.7, 0.4
    x_1 = mean + std * data(shape)
    result = log_prob(normal_flow(mean, std), x_1, method="rk4", steps=40)
    target = torch.distributions.Normal(torch.tensor(mean, dtype=DTYPE), std)
    expected = target.log_prob(x_1).reshape(shape[0], -1).sum(1)
    torch.testing.assert_close(result.log_prob, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.x_0, (x_1 - mean) / std, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(result.delta_log_p, expected - standard_normal(result.x_0))
    dims = math.prod(shape[1:])
    torch.testing.assert_close(
        result.bits_per_dim(256.0), 8.0 - result.log_prob / (dims * math.log(2.0)), rtol=1e-13, atol=1e-13
    )
    assert (result.status == Status.SUCCESS).all()
    assert result.nfe == 160
    assert torch.equal(result.x_1, x_1)
    assert not result.log_prob.requires_grad


@pytest.mark.parametrize("method", FIXED)
def test_every_sum_of_velocities_integrates_the_divergence_as_it_does_the_state(method: str) -> None:
    """A plain solve of the system (x, l) by the same method gives the same numbers."""
    shape = (3, 2)
    model, x = network(shape), data(shape)
    grid = [1.0, 0.8, 0.65, 0.3, 0.0]
    result = log_prob(model, x, method=methods.resolve(method), time_grid=grid)

    from fmkernels.solvers.programs.run import Run
    from fmkernels.solvers.programs.tables import numbers_for

    program = plan(methods.resolve(method), grid)

    def joint(state: Tensor, t: Tensor) -> Tensor:
        v, div = divergence(field(model), t, state[:, :2])
        return torch.cat([v, div[:, None]], 1)

    state = torch.cat([x, torch.zeros(3, 1, dtype=DTYPE)], 1)
    run = Run(program, {"": joint}, state, numbers_for(program, state, DTYPE, "batch"))
    run.all()
    torch.testing.assert_close(result.x_0, run.result[:, :2], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.delta_log_p, run.result[:, 2], rtol=1e-13, atol=1e-14)
    assert result.nfe == program.evaluations


def test_grids_of_each_sample_and_of_either_direction() -> None:
    model, x = network((3, 2)), data((3, 2))
    grids = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.5, 0.7], [1.0, 1.0, 1.0]], dtype=DTYPE)
    whole = log_prob(model, x, method="heun2", time_grid=grids)
    for i in range(3):
        one = log_prob(model, x[i : i + 1], method="heun2", time_grid=grids[:, i].flip(0))
        torch.testing.assert_close(one.log_prob, whole.log_prob[i : i + 1], rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="time_grid"):
        log_prob(lambda x, t: x, data((3, 2, 2)), method="euler", time_grid=grids[:, :, None].expand(3, 3, 2))


def test_sampling_and_scoring_agree() -> None:
    model, x_0 = network((6, 3)), data((6, 3))
    x_1, forward = sample_with_log_prob(model, x_0, method="rk4", steps=30)
    backward = log_prob(model, x_1, method="rk4", steps=30)
    torch.testing.assert_close(backward.x_0, x_0, rtol=2e-11, atol=2e-12)
    torch.testing.assert_close(backward.log_prob, forward.log_prob, rtol=5e-12, atol=5e-13)
    assert forward.x_1 is x_1
    torch.testing.assert_close(forward.log_prob, standard_normal(x_0) + forward.delta_log_p, rtol=1e-13, atol=1e-13)


def test_the_density_integrates_to_1() -> None:
    model = network((1, 1), seed=3)
    points = torch.linspace(-12.0, 12.0, 2001, dtype=DTYPE)
    density = log_prob(model, points[:, None], method="rk4", steps=40).log_prob.exp()
    assert abs(torch.trapezoid(density, points).item() - 1.0) < 1e-5


def test_predictions_give_the_velocitys_density() -> None:
    mean, std = 0.3, 0.6
    velocity = normal_flow(mean, std)
    x_1 = mean + std * data((4, 3))
    options = {"method": "rk4", "steps": 60, "t_0": 0.05, "t_1": 0.95}
    expected = log_prob(velocity, x_1, **options)
    for target in ("x_1", "x_0", "score", "v"):

        def prediction(x: Tensor, t: Tensor, target: str = target) -> Tensor:
            return CondOT().convert(velocity(x, t), x, t, "velocity", target)

        result = log_prob(prediction, x_1, prediction=target, **options)
        torch.testing.assert_close(result.log_prob, expected.log_prob, rtol=1e-13, atol=1e-13)
        hutchinson = log_prob(prediction, x_1, prediction=target, divergence="hutchinson", **options)
        torch.testing.assert_close(hutchinson.log_prob, expected.log_prob, rtol=1e-13, atol=1e-13)


def test_another_path_and_source() -> None:
    """The cosine path from N(0, 4) to N(m, s^2): variances and means are those of the sum."""
    mean, std, source = 0.5, 0.3, 2.0
    path = Cosine()

    def predicted_x_1(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(c.to(x.dtype), x) for c in path.coefficients(t)[:2])
        variance = (alpha * std) ** 2 + (sigma * source) ** 2
        return mean + alpha * std**2 / variance * (x - alpha * mean)

    def log_p0(x: Tensor) -> Tensor:
        return torch.distributions.Normal(torch.zeros((), dtype=DTYPE), source).log_prob(x).sum(1)

    x_1 = mean + std * data((4, 3))
    result = log_prob(
        predicted_x_1, x_1, path=path, prediction="x_1", method="rk4", steps=100, t_1=0.999, log_p0=log_p0
    )
    alpha, sigma = (float(c) for c in path.coefficients(torch.tensor(0.999, dtype=DTYPE))[:2])
    deviation = math.sqrt((alpha * std) ** 2 + (sigma * source) ** 2)
    expected = torch.distributions.Normal(torch.tensor(alpha * mean, dtype=DTYPE), deviation).log_prob(x_1).sum(1)
    torch.testing.assert_close(result.log_prob, expected, rtol=1e-5, atol=1e-5)


def test_bits_per_dimension() -> None:
    # a uniform density on [0, 1]^D over 256 levels: 8 bits
    torch.testing.assert_close(
        bits_per_dim(torch.zeros(3), (3, 4, 4), 256.0), torch.full((3,), 8.0), rtol=2e-6, atol=2e-6
    )
    log_p = torch.tensor([-10.0, 3.0], dtype=DTYPE)
    torch.testing.assert_close(bits_per_dim(log_p, (5,)), -log_p / 5 / math.log(2.0), rtol=1e-13, atol=1e-13)
    # the same density for data stretched to [-1, 1]
    torch.testing.assert_close(
        bits_per_dim(log_p, (5,), 256.0),
        bits_per_dim(log_p - 5 * math.log(2.0), (5,), 127.5) + math.log2(256 / 255),
        rtol=1e-13,
        atol=1e-13,
    )
    with pytest.raises(ValueError, match="shape"):
        bits_per_dim(log_p, (0,))
    with pytest.raises(ValueError, match="scale"):
        bits_per_dim(log_p, (1,), 0.0)


# ---------------------------------------------------------------------- failures


def test_status_of_samples_that_are_not_finite() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * torch.where(x.detach() > 5.0, math.inf, 1.0)

    x = torch.tensor([[0.1, 0.2], [9.0, 0.0], [math.nan, 0.0]], dtype=DTYPE)
    result = log_prob(model, x, method="rk4", steps=4)
    assert result.status.tolist() == [Status.SUCCESS, Status.NON_FINITE, Status.NON_FINITE]
    assert torch.isfinite(result.log_prob).tolist() == [True, False, False]
    with pytest.warns(UserWarning, match="not finite"):
        adaptive = log_prob(model, x)
    assert adaptive.status.tolist() == [Status.SUCCESS, Status.NON_FINITE, Status.NON_FINITE]
    assert torch.isfinite(adaptive.log_prob).tolist() == [True, False, False]
    with pytest.warns(UserWarning, match="max_steps"):
        short = log_prob(network((2, 2)), data((2, 2)), max_steps=2, rtol=1e-10, atol=1e-10)
    assert short.status.tolist() == [Status.MAX_STEPS] * 2
    assert short.log_prob.isnan().all()


def test_other_methods_and_arguments_are_rejected() -> None:
    x = data((2, 3))
    velocity = normal_flow(0.0, 0.5)

    def exponential(builder) -> None:
        for step in builder.steps():
            builder.advance(0.9 * builder.x + 0.1 * builder.model(builder.x, step.t))

    def noisy(builder) -> None:
        for step in builder.steps():
            builder.advance(builder.x + 0.1 * builder.model(builder.x, step.t) + 0.1 * builder.noise())

    for method in (exponential, noisy):
        with pytest.raises(ValueError, match="Runge-Kutta or Adams"):
            log_prob(velocity, x, method=method, steps=3)
    with pytest.raises(ValueError, match="at most one"):
        log_prob(velocity, x, method="euler", steps=3, time_grid=[0.0, 1.0])
    with pytest.raises(ValueError, match="t_1"):
        log_prob(velocity, x, method="euler", steps=3, t_0=1.0)
    with pytest.raises(ValueError, match="log_p0"):
        log_prob(velocity, x, method="euler", steps=3, log_p0=lambda x: x)
    with pytest.raises(TypeError, match="x_1"):
        log_prob(velocity, [1.0], method="euler", steps=3)
    with pytest.raises(TypeError, match="x_0"):
        sample_with_log_prob(velocity, [1.0], method="euler", steps=3)
    with pytest.raises(ValueError, match="output of the state's shape"):
        log_prob(lambda x, t: x[:, :1], x, method="euler", steps=3)
    with pytest.raises(ValueError, match="divergence"):
        log_prob(velocity, x, method="euler", steps=3, divergence="trace")


def test_weights_of_a_grid_add_up_to_its_length() -> None:
    for name in FIXED:
        grid = [0.0, 0.1, 0.35, 0.5, 0.9, 1.0]
        assert math.isclose(sum(log_det_weights(plan(methods.resolve(name), grid))), 1.0, rel_tol=1e-12)


def test_zero_steps_and_empty_batch() -> None:
    x = data((2, 3))
    result = log_prob(normal_flow(0.0, 0.5), x, method="euler", time_grid=[1.0])
    torch.testing.assert_close(result.log_prob, standard_normal(x), rtol=1e-13, atol=1e-13)
    assert result.nfe == 0
    empty = log_prob(normal_flow(0.0, 0.5), x[:0], method="euler", steps=2)
    assert (empty.log_prob.shape, empty.x_0.shape) == ((0,), (0, 3))


# ---------------------------------------------------------------------- a peer


def test_against_flow_matching() -> None:
    solver = pytest.importorskip("flow_matching.solver")
    model, x = network((5, 3)), data((5, 3))

    class Model(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return model(x, t)

    for method, ours in (("euler", "euler"), ("midpoint", "midpoint"), ("rk4", "rk4_38")):
        x_0, theirs = solver.ODESolver(Model()).compute_likelihood(
            x,
            standard_normal,
            step_size=0.05,
            method=method,
            exact_divergence=True,
            time_grid=torch.tensor([1.0, 0.0], dtype=DTYPE),
        )
        result = log_prob(model, x, method=ours, steps=20)
        torch.testing.assert_close(result.x_0, x_0, rtol=1e-13, atol=1e-13)
        # its time runs in float32 or float64 as torchdiffeq decides
        torch.testing.assert_close(result.log_prob, theirs.to(DTYPE), rtol=1e-13, atol=1e-13)
