"""Divergences and their probes: full Jacobians, documented variances, memory, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from likelihood_problems import DTYPE, data, field, jacobians, network, shapes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fmkernels as fm
from fmkernels.likelihood.divergence import Divergence, divergence, draw_probes


@shapes
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_exact_divergence_is_the_trace_of_the_jacobian(shape: tuple[int, ...], mode: str, chunk: int | None) -> None:
    model, x = network(shape), data(shape)
    v, div = divergence(field(model), 0.3, x, mode=mode, chunk=chunk)
    torch.testing.assert_close(v, model(x, torch.tensor(0.3, dtype=DTYPE)).detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(div, jacobians(model, x, 0.3).diagonal(dim1=1, dim2=2).sum(1), rtol=1e-13, atol=2e-14)
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
    torch.testing.assert_close(div, expected, rtol=1e-13, atol=1e-13)


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
    torch.testing.assert_close(div, singles.mean(0), rtol=1e-13, atol=1e-14)
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


@pytest.mark.parametrize(("distribution", "count"), [("gaussian", 3), ("rademacher", 40)])
def test_evaluations_with_fresh_probes_share_none(distribution: str, count: int) -> None:
    how, like = Divergence("hutchinson", count, distribution), torch.zeros(2, 64)
    noise = fm.Noise(torch.tensor(3))
    drawn = [probe for evaluation in range(3) for probe in how.draw(like, noise, evaluation)]
    assert len(drawn) == 3 * count
    assert len({tuple(probe.flatten().tolist()) for probe in drawn}) == len(drawn)


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
        torch.testing.assert_close(estimate, exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(exact, 0.7 * torch.cos(x).sum((1, 2)), rtol=1e-13, atol=1e-13)


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
        torch.testing.assert_close(div, (scale * (1 - torch.tanh(x * scale) ** 2)).sum(1), rtol=1e-13, atol=1e-13)
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
    torch.testing.assert_close(
        divergence(lambda t, x: Square.apply(x), 0.0, x)[1], 2.0 * x.sum(1), rtol=1e-13, atol=1e-13
    )
    with pytest.raises(RuntimeError):
        divergence(lambda t, x: Square.apply(x), 0.0, x, chunk=8)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_divergence_in_every_grad_mode_and_dtype(mode: str) -> None:
    x = data((3, 4))
    model = network((3, 4))
    expected = divergence(field(model), 0.2, x)[1]
    with torch.no_grad():
        torch.testing.assert_close(divergence(field(model), 0.2, x, mode=mode)[1], expected, rtol=1e-13, atol=2e-14)
    with torch.inference_mode():
        torch.testing.assert_close(
            divergence(field(model), 0.2, x * 1.0, mode=mode)[1], expected, rtol=1e-13, atol=2e-14
        )
        inside = divergence(field(model), 0.2, x * 1.0, mode=mode, method="hutchinson")[1]
        assert inside.shape == (3,)
    for dtype, tol in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.float32, 1e-6)):
        v, div = divergence(lambda t, x: torch.sin(x), 0.2, x.to(dtype), mode=mode)
        assert (v.dtype, div.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(div.double(), torch.cos(x).sum(1), rtol=tol, atol=tol)
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
