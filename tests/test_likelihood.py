"""Divergences and log-densities: closed forms, full Jacobians, and a plain implementation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fmkernels as fm
from fmkernels.likelihood import bits_per_dim, log_prob, sample_with_log_prob, standard_normal
from fmkernels.ops.step_control.op import Status
from fmkernels.paths import CondOT, Cosine
from fmkernels.solvers import methods
from fmkernels.solvers.divergence import divergence, draw_probes
from fmkernels.solvers.log_det import log_det_weights, plan
from fmkernels.solvers.tableaus import TABLEAUS

DTYPE = torch.float64
SHAPES = [(5,), (4, 2), (3, 2, 4, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expand(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(t.shape + (1,) * (x.dim() - t.dim()))


def normal_flow(mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact velocity of the optimal-transport path from N(0, 1) to N(mean, std^2), samples being independent.

    x_t = t x_1 + (1 - t) x_0 has mean t m and variance w = t^2 s^2 + (1 - t)^2;
    E[x_1 - x_0 | x_t] = m + (t s^2 - (1 - t)) / w (x_t - t m).
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = expand(t, x)
        variance = t**2 * std**2 + (1.0 - t) ** 2
        return mean + (t * std**2 - (1.0 - t)) / variance * (x - t * mean)

    return velocity


class Network(nn.Module):
    """A small network on any shape, with a full Jacobian that depends on the time."""

    def __init__(self, dims: int, hidden: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(dims + 1, hidden), nn.SiLU(), nn.Linear(hidden, dims)).to(DTYPE)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        column = t.expand(x.shape[0]).to(x.dtype)[:, None]
        return self.net(torch.cat([flat, column], 1)).reshape(x.shape)


def network(shape: tuple[int, ...], **options: int) -> Network:
    return Network(math.prod(shape[1:]), **options)


def field(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: model(x, t)


def jacobians(model: nn.Module, x: Tensor, t: float) -> Tensor:
    """(B, D, D)"""
    time = torch.tensor(t, dtype=x.dtype)
    rows = [torch.func.jacrev(lambda one: model(one[None], time)[0])(one) for one in x]
    dims = math.prod(x.shape[1:])
    return torch.stack(rows).reshape(x.shape[0], dims, dims).detach()


def data(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=DTYPE)


# ---------------------------------------------------------------------- divergence


@shapes
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_exact_divergence_is_the_trace_of_the_jacobian(shape: tuple[int, ...], mode: str, chunk: int | None) -> None:
    model, x = network(shape), data(shape)
    v, div = divergence(field(model), 0.3, x, mode=mode, chunk=chunk)
    torch.testing.assert_close(v, model(x, torch.tensor(0.3, dtype=DTYPE)).detach())
    torch.testing.assert_close(div, jacobians(model, x, 0.3).diagonal(dim1=1, dim2=2).sum(1))
    assert not v.requires_grad
    assert not div.requires_grad


@shapes
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_hutchinson_is_the_mean_of_its_probes(
    shape: tuple[int, ...], mode: str, distribution: str, chunk: int | None
) -> None:
    model, x = network(shape), data(shape)
    noise = fm.Noise(torch.tensor(7), stream=3)
    _, div = divergence(
        field(model),
        0.3,
        x,
        method="hutchinson",
        probes=5,
        distribution=distribution,
        noise=noise,
        mode=mode,
        chunk=chunk,
    )
    probes = torch.stack(draw_probes(x, noise, 5, distribution)).reshape(5, shape[0], -1)
    expected = torch.einsum("pbi,bij,pbj->pb", probes, jacobians(model, x, 0.3), probes).mean(0)
    torch.testing.assert_close(div, expected)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_with_the_variance_that_is_documented(distribution: str) -> None:
    shape, count = (3, 6), 4096
    model, x = network(shape), data(shape)
    jacobian = jacobians(model, x, 0.5)
    probes = draw_probes(x, fm.Noise(torch.tensor(11)), count, distribution)
    singles = torch.stack([torch.einsum("bi,bij,bj->b", e, jacobian, e) for e in probes])
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    symmetric = 0.5 * (jacobian + jacobian.mT)
    variance = 2.0 * symmetric.square().sum((1, 2))
    if distribution == "rademacher":
        variance -= 2.0 * symmetric.diagonal(dim1=1, dim2=2).square().sum(1)
    _, div = divergence(field(model), 0.5, x, method="hutchinson", noise=probes)
    torch.testing.assert_close(div, singles.mean(0))
    assert ((div - trace).abs() < 4.5 * (variance / count).sqrt()).all()
    torch.testing.assert_close(singles.var(0), variance, rtol=0.15, atol=0.0)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes_have_mean_0_and_covariance_1(distribution: str) -> None:
    like = torch.empty(2, 3, dtype=DTYPE)
    count = 8192
    probes = torch.stack(draw_probes(like, fm.Noise(torch.tensor(5)), count, distribution)).reshape(count, -1)
    assert (probes.mean(0).abs() < 4.5 / math.sqrt(count)).all()
    covariance = probes.mT @ probes / count
    assert ((covariance - torch.eye(6, dtype=DTYPE)).abs() < 4.5 * math.sqrt(2.0 / count)).all()
    if distribution == "rademacher":
        assert torch.equal(probes.abs(), torch.ones_like(probes))


def test_probes_of_a_shard_are_those_of_the_whole_batch() -> None:
    like = torch.empty(6, 5, dtype=torch.float32)
    for distribution in ("rademacher", "gaussian"):
        whole = draw_probes(like, fm.Noise(torch.tensor(5)), 40, distribution)
        shard = draw_probes(like[2:], fm.Noise(torch.tensor(5), row_offset=2), 40, distribution)
        later = draw_probes(like, fm.Noise(torch.tensor(5)), 8, distribution, first=30)
        assert all(torch.equal(a[2:], b) for a, b in zip(whole, shard, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(whole[30:38], later, strict=True))


def test_rademacher_is_exact_for_a_diagonal_jacobian() -> None:
    x = data((4, 3, 5))
    exact = divergence(lambda t, x: torch.sin(x) * t, 0.7, x)[1]
    for seed in range(3):
        noise = fm.Noise(torch.tensor(seed))
        estimate = divergence(lambda t, x: torch.sin(x) * t, 0.7, x, method="hutchinson", noise=noise)[1]
        torch.testing.assert_close(estimate, exact)
    torch.testing.assert_close(exact, 0.7 * torch.cos(x).sum((1, 2)))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in numbers."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                # expanded tensors hold what their storage holds
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_memory_of_exact_divergence_does_not_grow_with_the_number_of_dimensions(mode: str) -> None:
    saved: dict[int, int] = {}
    for dims in (64, 256):
        shape = (128, dims)
        x, scale = data(shape), data((dims,))
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return tensor

        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, div = divergence(lambda t, x, scale=scale: torch.tanh(x * scale), 0.0, x, mode=mode)
        torch.testing.assert_close(div, (scale * (1 - torch.tanh(x * scale) ** 2)).sum(1))
        assert largest.size <= max(x.numel(), 1 << 14)
        saved[dims] = count
    assert saved[64] == saved[256]


def test_a_model_that_vmap_does_not_take_is_met_one_direction_at_a_time() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            assert float(grad.sum()) == float(grad.sum())  # reads numbers: vmap cannot
            return 2.0 * ctx.saved_tensors[0] * grad

    x = data((3, 8))
    torch.testing.assert_close(divergence(lambda t, x: Square.apply(x), 0.0, x)[1], 2.0 * x.sum(1))
    with pytest.raises(RuntimeError):
        divergence(lambda t, x: Square.apply(x), 0.0, x, chunk=8)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_divergence_in_every_grad_mode_and_dtype(mode: str) -> None:
    x = data((3, 4))
    model = network((3, 4))
    expected = divergence(field(model), 0.2, x)[1]
    with torch.no_grad():
        torch.testing.assert_close(divergence(field(model), 0.2, x, mode=mode)[1], expected)
    with torch.inference_mode():
        torch.testing.assert_close(divergence(field(model), 0.2, x * 1.0, mode=mode)[1], expected)
        inside = divergence(field(model), 0.2, x * 1.0, mode=mode, method="hutchinson")[1]
        assert inside.shape == (3,)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        v, div = divergence(lambda t, x: torch.sin(x), 0.2, x.to(dtype), mode=mode)
        assert (v.dtype, div.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(div.double(), torch.cos(x).sum(1), rtol=0.0, atol=0.05)
    empty = divergence(field(model), 0.2, x[:0], mode=mode)
    assert (empty[0].shape, empty[1].shape) == ((0, 4), (0,))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("method", ["exact", "hutchinson"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_gradients_of_the_divergence(mode: str, method: str, chunk: int) -> None:
    x = data((2, 3)).requires_grad_()
    model = network((2, 3), hidden=4)
    noise = fm.Noise(torch.tensor(3))

    def both(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        return divergence(
            lambda t, x: torch.func.functional_call(model, named, (x, t)),
            0.4,
            x,
            method=method,
            probes=3,
            noise=noise,
            mode=mode,
            gradient=True,
            chunk=chunk,
        )

    assert torch.autograd.gradcheck(both, (x, *model.parameters()))


def test_divergence_rejects() -> None:
    x = data((2, 3))
    with pytest.raises(ValueError, match="derivative is not recorded"):
        divergence(lambda t, x: torch.ones_like(x), 0.0, x)
    with pytest.raises(ValueError, match="derivative is not recorded"):
        divergence(lambda t, x: torch.ones_like(x), 0.0, x, mode="forward")
    with pytest.raises(ValueError, match="output of the state's shape"):
        divergence(lambda t, x: x[:, :2], 0.0, x)
    with pytest.raises(TypeError, match="x: expected a float"):
        divergence(lambda t, x: x, 0.0, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"noise\[0\]"):
        divergence(lambda t, x: x, 0.0, x, method="hutchinson", noise=[x[:1]])
    for options in ({"method": "trace"}, {"mode": "both"}, {"distribution": "uniform"}, {"probes": 0}, {"chunk": 0}):
        with pytest.raises(ValueError, match="expected"):
            divergence(lambda t, x: x, 0.0, x, **options)


# ---------------------------------------------------------------------- log-densities


FIXED = [*TABLEAUS, "ab2", "ab3", "ab4", "am2", "am3", "am4"]


@shapes
def test_normal_to_normal_flow_on_a_fixed_grid(shape: tuple[int, ...]) -> None:
    mean, std = 0.7, 0.4
    x_1 = mean + std * data(shape)
    result = log_prob(normal_flow(mean, std), x_1, method="rk4", steps=40)
    target = torch.distributions.Normal(torch.tensor(mean, dtype=DTYPE), std)
    expected = target.log_prob(x_1).reshape(shape[0], -1).sum(1)
    torch.testing.assert_close(result.log_prob, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.x_0, (x_1 - mean) / std, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.delta_log_p, expected - standard_normal(result.x_0))
    dims = math.prod(shape[1:])
    torch.testing.assert_close(result.bits_per_dim(256.0), 8.0 - result.log_prob / (dims * math.log(2.0)))
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

    from fmkernels.solvers.run import Run, coefficients_of, time_rows

    program = plan(methods.resolve(method), grid)

    def joint(state: Tensor, t: Tensor) -> Tensor:
        v, div = divergence(field(model), t, state[:, :2])
        return torch.cat([v, div[:, None]], 1)

    state = torch.cat([x, torch.zeros(3, 1, dtype=DTYPE)], 1)
    times = time_rows(program, state, DTYPE, "batch")
    run = Run(program, {"": joint}, state, times, coefficients_of(program, state))
    run.all()
    torch.testing.assert_close(result.x_0, run.result[:, :2])
    torch.testing.assert_close(result.delta_log_p, run.result[:, 2])
    assert result.nfe == program.evaluations


def test_grids_of_each_sample_and_of_either_direction() -> None:
    model, x = network((3, 2)), data((3, 2))
    grids = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.5, 0.7], [1.0, 1.0, 1.0]], dtype=DTYPE)
    whole = log_prob(model, x, method="heun2", time_grid=grids)
    for i in range(3):
        one = log_prob(model, x[i : i + 1], method="heun2", time_grid=grids[:, i].flip(0))
        torch.testing.assert_close(one.log_prob, whole.log_prob[i : i + 1])
    with pytest.raises(ValueError, match="time_grid"):
        log_prob(lambda x, t: x, data((3, 2, 2)), method="euler", time_grid=grids[:, :, None].expand(3, 3, 2))


def test_sampling_and_scoring_agree() -> None:
    model, x_0 = network((6, 3)), data((6, 3))
    x_1, forward = sample_with_log_prob(model, x_0, method="rk4", steps=30)
    backward = log_prob(model, x_1, method="rk4", steps=30)
    torch.testing.assert_close(backward.x_0, x_0, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(backward.log_prob, forward.log_prob, rtol=1e-5, atol=1e-6)
    assert forward.x_1 is x_1
    torch.testing.assert_close(forward.log_prob, standard_normal(x_0) + forward.delta_log_p)


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
        torch.testing.assert_close(result.log_prob, expected.log_prob, rtol=1e-6, atol=1e-6)
        hutchinson = log_prob(prediction, x_1, prediction=target, divergence="hutchinson", **options)
        torch.testing.assert_close(hutchinson.log_prob, expected.log_prob, rtol=1e-6, atol=1e-6)


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
    torch.testing.assert_close(bits_per_dim(torch.zeros(3), (3, 4, 4), 256.0), torch.full((3,), 8.0))
    log_p = torch.tensor([-10.0, 3.0], dtype=DTYPE)
    torch.testing.assert_close(bits_per_dim(log_p, (5,)), -log_p / 5 / math.log(2.0))
    # the same density for data stretched to [-1, 1]
    torch.testing.assert_close(
        bits_per_dim(log_p, (5,), 256.0), bits_per_dim(log_p - 5 * math.log(2.0), (5,), 127.5) + math.log2(256 / 255)
    )
    with pytest.raises(ValueError, match="shape"):
        bits_per_dim(log_p, (0,))
    with pytest.raises(ValueError, match="scale"):
        bits_per_dim(log_p, (1,), 0.0)


# ---------------------------------------------------------------------- adaptive steps


@shapes
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_adaptive_normal_to_normal_flow(shape: tuple[int, ...], method: str) -> None:
    mean, std = 0.7, 0.2
    x_1 = mean + std * data(shape)
    target = torch.distributions.Normal(torch.tensor(mean, dtype=DTYPE), std)
    expected = target.log_prob(x_1).reshape(shape[0], -1).sum(1)
    for estimate in ("exact", "hutchinson"):  # Rademacher is exact here
        result = log_prob(
            normal_flow(mean, std), x_1, method=method, rtol=1e-7, atol=1e-7, divergence=estimate, generator=rng()
        )
        torch.testing.assert_close(result.log_prob, expected, rtol=2e-6, atol=2e-6)
        assert (result.status == Status.SUCCESS).all()
        back, forward = sample_with_log_prob(normal_flow(mean, std), result.x_0, method=method, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(back, x_1, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(forward.log_prob, expected, rtol=4e-6, atol=4e-6)


def test_adaptive_steps_bound_the_error_of_the_log_density_in_many_dimensions() -> None:
    """A state at rest with a large divergence: only control of the integral itself takes small steps."""
    dims = 2500

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cos(20.0 * expand(t, x)) * x

    x = torch.zeros(2, dims, dtype=DTYPE)
    for tolerance in (1e-4, 1e-7):
        # Rademacher probes are exact for this diagonal Jacobian
        result = log_prob(model, x, rtol=0.0, atol=tolerance, divergence="hutchinson")
        exact = -dims * math.sin(20.0) / 20.0
        assert (result.delta_log_p - exact).abs().max() < 5.0 * tolerance


def test_samples_with_their_keyword_arguments_and_probes_leave_the_batch_as_they_finish() -> None:
    """A stiff sample does not change the others, whose probes and conditions move with them."""
    base, x = network((6, 3)), data((6, 3))
    scale = torch.tensor([40.0, 1.0, 0.2, 1.0, 0.5, 30.0], dtype=DTYPE)

    def model(x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        return base(x, t) * scale[:, None]

    options = {"divergence": "hutchinson", "probes": 2, "distribution": "gaussian", "rtol": 1e-6, "atol": 1e-6}
    whole = log_prob(model, x, scale=scale, generator=rng(3), **options)
    for i in range(6):
        own = slice(i, i + 1)
        one = log_prob(model, x[own], scale=scale[own], generator=rng(3), row_offset=i, **options)
        torch.testing.assert_close(one.log_prob, whole.log_prob[own], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(one.x_0, whole.x_0[own], rtol=1e-9, atol=1e-9)
    fixed = log_prob(model, x, scale=scale, generator=rng(3), **(options | {"method": "rk4", "steps": 400}))
    torch.testing.assert_close(whole.log_prob, fixed.log_prob, rtol=1e-3, atol=1e-3)


def test_gradients_through_adaptive_steps() -> None:
    model, x = network((3, 2)), data((3, 2)).requires_grad_()
    inputs = (x, *model.parameters())
    for prediction in ("exact", "hutchinson"):
        options = {"divergence": prediction, "gradient": True}
        adaptive = log_prob(model, x, rtol=1e-8, atol=1e-8, generator=rng(1), **options)
        fixed = log_prob(model, x, method="rk4", steps=40, generator=rng(1), **options)
        torch.testing.assert_close(adaptive.log_prob, fixed.log_prob, rtol=1e-6, atol=1e-6)
        plain = log_prob(model, x, rtol=1e-8, atol=1e-8, generator=rng(1), divergence=prediction)
        torch.testing.assert_close(adaptive.log_prob, plain.log_prob, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(
            torch.autograd.grad(adaptive.log_prob.sum(), inputs),
            torch.autograd.grad(fixed.log_prob.sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adaptive_steps_of_half_precision_data() -> None:
    mean, std = 0.7, 0.4
    x_1 = (mean + std * data((5, 4))).to(torch.bfloat16)
    result = log_prob(normal_flow(mean, std), x_1, time_dtype=torch.bfloat16, rtol=1e-2, atol=1e-2)
    assert (result.x_0.dtype, result.log_prob.dtype) == (torch.bfloat16, torch.float32)
    target = torch.distributions.Normal(torch.tensor(mean, dtype=DTYPE), std)
    torch.testing.assert_close(result.log_prob.double(), target.log_prob(x_1.double()).sum(1), rtol=0.1, atol=0.3)


# ---------------------------------------------------------------------- probes over a solve


class Recorder(nn.Module):
    """Records the gradients that reach the model's output: the probes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        v = self.model(x, t)
        v.register_hook(lambda grad: self.seen.append(grad.clone()))
        return v


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes_are_fixed_over_the_solve_or_fresh(distribution: str) -> None:
    model, x = Recorder(network((3, 4))), data((3, 4))
    options = {"divergence": "hutchinson", "method": "heun2", "steps": 3, "distribution": distribution}
    log_prob(model, x, generator=rng(1), **options)
    assert len(model.seen) == 6
    assert all(torch.equal(seen, model.seen[0]) for seen in model.seen)
    fixed, model.seen = model.seen[0], []
    log_prob(model, x, generator=rng(1), fresh=True, **options)
    assert len(model.seen) == 6
    assert len({tuple(seen.flatten().tolist()) for seen in model.seen}) == 6
    assert torch.equal(model.seen[0], fixed)


def test_hutchinson_log_density_is_unbiased_and_reproducible() -> None:
    model, x = network((4, 6)), data((4, 6))
    options = {"method": "heun2", "steps": 5}
    exact = log_prob(model, x, **options).log_prob
    # many probes at once, as more samples of the same point
    many = 512
    repeated = x.repeat_interleave(many, 0)
    for fresh in (False, True):
        estimates = log_prob(
            model, repeated, divergence="hutchinson", generator=rng(4), fresh=fresh, **options
        ).log_prob.reshape(4, many)
        error = (estimates.mean(1) - exact).abs()
        assert (error < 4.5 * estimates.std(1) / math.sqrt(many)).all()
    several = [
        log_prob(model, x, divergence="hutchinson", probes=8, generator=rng(4), **options).log_prob for _ in range(2)
    ]
    assert torch.equal(*several)
    shard = log_prob(
        model, x[2:], divergence="hutchinson", probes=8, generator=rng(4), row_offset=2, **options
    ).log_prob
    torch.testing.assert_close(shard, several[0][2:])


# ---------------------------------------------------------------------- gradients


def plain_log_prob(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Euler from 1 to 0 with full Jacobians, as a textbook has it."""
    total = torch.zeros(x.shape[0], dtype=x.dtype)
    h = 1.0 / steps
    for i in range(steps):
        t = torch.tensor(1.0 - i * h, dtype=x.dtype)
        jacobian = torch.stack([torch.func.jacrev(lambda one, t=t: model(one[None], t)[0])(one) for one in x])
        total = total - h * jacobian.diagonal(dim1=1, dim2=2).sum(1)
        x = x - h * model(x, t)
    return -0.5 * x.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi) + total


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_gradients_are_those_of_a_plain_implementation(mode: str) -> None:
    model, x = network((3, 2)), data((3, 2)).requires_grad_()
    inputs = (x, *model.parameters())
    expected = plain_log_prob(model, x, 4)
    result = log_prob(model, x, method="euler", steps=4, gradient=True, mode=mode).log_prob
    torch.testing.assert_close(result, expected)
    # the last bias moves no divergence, but the state
    for ours, plain in zip(
        torch.autograd.grad(result.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_gradcheck_and_nothing_recorded_without_gradient() -> None:
    model, x = network((2, 2), hidden=4), data((2, 2)).requires_grad_()

    def score(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        return log_prob(
            lambda x, t: torch.func.functional_call(model, named, (x, t)),
            x,
            method="midpoint",
            steps=2,
            gradient=True,
            divergence="hutchinson",
            probes=2,
            generator=rng(2),
        ).log_prob

    assert torch.autograd.gradcheck(score, (x, *model.parameters()))
    result = log_prob(model, x, method="midpoint", steps=2)
    assert not result.log_prob.requires_grad
    assert not result.x_0.requires_grad
    with torch.no_grad():
        assert not log_prob(model, x, method="midpoint", steps=2, gradient=True).log_prob.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_maximum_likelihood_training_lowers_the_loss() -> None:
    model = network((64, 2), hidden=16)
    x_1 = 0.5 * data((64, 2)) + 1.0
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -log_prob(model, x_1, method="midpoint", steps=3, gradient=True).log_prob.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_without_gradient_no_graph_outlives_its_evaluation() -> None:
    alive: list[int] = []
    count = 0

    class Token:
        def __del__(self) -> None:
            nonlocal count
            count -= 1

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal count
            count += 1
            ctx.token = Token()
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad

    base = network((2, 3))

    def model(x: Tensor, t: Tensor) -> Tensor:
        alive.append(count)
        return base(Counted.apply(x), t)

    log_prob(model, data((2, 3)), method="rk4", steps=5)
    assert max(alive) <= 1
    assert count == 0


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
    torch.testing.assert_close(result.log_prob, standard_normal(x))
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
        torch.testing.assert_close(result.x_0, x_0, rtol=1e-10, atol=1e-10)
        # its time runs in float32 or float64 as torchdiffeq decides
        torch.testing.assert_close(result.log_prob, theirs.to(DTYPE), rtol=1e-6, atol=1e-6)
