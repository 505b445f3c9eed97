"""The operations within PyTorch: compile, functorch transforms, autograd, autocast, checkpointing, DDP, CUDA graphs."""

from __future__ import annotations

import os

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fmkernels as fm

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (6, 3, 5)):
    generator = torch.Generator().manual_seed(0)
    x_1, x_0, pred = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.rand(shape[:1], generator=generator, dtype=torch.float64)
    coefficient_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return *(x.to(device, dtype) for x in (x_1, x_0, pred)), t.to(device, coefficient_dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [True, False])
def test_compile_fullgraph(device: str, stored: bool) -> None:
    x_1, x_0, pred, t = problem(device)

    def step(pred, x_1, x_0, t):
        point = fm.interpolate(x_1, x_0, alpha=t, sigma=1 - t)
        loss = fm.regression_loss(pred * point.x_t, [x_1, x_0], [1.0, -1.0], weight=t, reduction="none").mean()
        return loss, point.x_t

    def step_drawn(pred, x_1, x_0, t):
        point = fm.interpolate(x_1, alpha=t, sigma=1 - t, store_noise=stored)
        return fm.regression_loss(pred * point.x_t, [x_1, point.x_0], [1.0, -1.0]), point.x_t

    for function in (step, step_drawn):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True)
        leaf, compiled_leaf = pred.clone().requires_grad_(), pred.clone().requires_grad_()
        torch.manual_seed(5)
        loss, _ = function(leaf, x_1, x_0, t)
        loss.backward()
        torch.manual_seed(5)
        compiled_loss, _ = compiled(compiled_leaf, x_1, x_0, t)
        compiled_loss.backward()
        if function is step:  # torch.compile draws seeds from its own stream
            torch.testing.assert_close(compiled_loss, loss, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(compiled_leaf.grad, leaf.grad, rtol=2e-6, atol=5e-7)
        assert torch.isfinite(compiled_leaf.grad).all()


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_compile_explicit_implementation(impl: str) -> None:
    x_1, x_0, pred, _ = problem()

    @torch.compile(fullgraph=True)
    def step(pred, x_1, x_0):
        return fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0], impl=impl), fm.randn(3, 4, impl=impl)

    loss, noise = step(pred, x_1, x_0)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(pred, x_1 - x_0), rtol=2e-6, atol=2e-6)
    assert noise.shape == (3, 4)


def test_functorch_transforms_take_the_reference() -> None:
    x_1, x_0, pred, t = problem(dtype=torch.float64)

    def loss(pred, x_1, x_0):
        return fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0], kind="pseudo_huber")

    def plain(pred, x_1, x_0):
        return (torch.sqrt((pred - x_1 + x_0) ** 2 + 1) - 1).mean()

    torch.testing.assert_close(
        torch.func.vmap(loss)(pred, x_1, x_0), torch.func.vmap(plain)(pred, x_1, x_0), rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(
        torch.func.grad(loss)(pred, x_1, x_0), torch.func.grad(plain)(pred, x_1, x_0), rtol=1e-13, atol=2e-15
    )
    for function in (torch.func.jvp,):
        value, tangent = function(loss, (pred, x_1, x_0), (x_0, pred, x_1))
        want, want_tangent = function(plain, (pred, x_1, x_0), (x_0, pred, x_1))
        torch.testing.assert_close(value, want, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(tangent, want_tangent, rtol=1e-13, atol=1e-13)
        assert tangent != 0
    hessian = torch.func.hessian(lambda p: loss(p, x_1[0, 0], x_0[0, 0]))(pred[0, 0])
    torch.testing.assert_close(
        hessian, torch.func.hessian(lambda p: plain(p, x_1[0, 0], x_0[0, 0]))(pred[0, 0]), rtol=1e-13, atol=1e-14
    )
    # the path, through time: d x_t / d t is the velocity of the conditional path
    _, velocity = torch.func.jvp(
        lambda t: fm.interpolate(x_1, x_0, alpha=t, sigma=1 - t).x_t, (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(velocity, x_1 - x_0, rtol=1e-13, atol=1e-13)


def test_forward_mode_dual_numbers_take_the_reference() -> None:
    x_1, x_0, _, t = problem()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
        x_t = fm.interpolate(x_1, x_0, alpha=dual, sigma=1 - dual).x_t
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(x_t).tangent, x_1 - x_0, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_explicit_kernels_refuse_transforms(impl: str) -> None:
    x_1, x_0, pred, _ = problem()
    with pytest.raises(RuntimeError, match=r"impl: expected 'auto' or 'reference' under a torch\.func transform"):
        torch.func.grad(lambda p: fm.regression_loss(p, [x_1, x_0], [1.0, -1.0], impl=impl))(pred)


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_gradcheck_combine(impl: str) -> None:
    x_1, x_0, pred, t = problem(dtype=torch.float64, shape=(3, 2, 2))
    inputs = [x.clone().requires_grad_() for x in (x_1, x_0, pred, t)]

    def function(a, b, c, t):
        return fm.combine([a, b, c, fm.Noise(torch.tensor(3))], [t, 0.5, 1 - t, t], impl=impl)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("kind", ["squared", "huber", "pseudo_huber", "l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_regression_loss(kind: str, reduction: str) -> None:
    x_1, x_0, pred, t = problem(dtype=torch.float64, shape=(3, 2, 2))
    mask = torch.tensor([[True, False], [True, True], [False, False]])

    def function(pred):
        return fm.regression_loss(
            pred, [x_1, x_0], [t, -1.0], kind=kind, reduction=reduction, delta=0.7, weight=1 + t, mask=mask
        )

    assert gradcheck(function, [pred.requires_grad_()])


def test_gradients_to_every_argument_by_the_reference() -> None:
    x_1, x_0, pred, t = problem(dtype=torch.float64, shape=(3, 2, 2))
    inputs = [x.clone().requires_grad_() for x in (pred, x_1, x_0, t)]

    def function(pred, x_1, x_0, t):
        return fm.regression_loss(pred, [x_1, x_0], [t, -1.0], kind="pseudo_huber", weight=1 + t)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
    with pytest.raises(ValueError, match="impl: expected 'auto' or 'reference' where an operand"):
        fm.regression_loss(inputs[0], [inputs[1]], [1.0], impl="native")


def test_float16_gradient_survives_a_large_count() -> None:
    """2 d / N is below float16's smallest number here; with a loss scale it is not, as in eager PyTorch."""
    pred = torch.randn(1 << 15, 64).half().requires_grad_()
    target = torch.randn(1 << 15, 64).half()
    scaled = 2.0**16 * fm.regression_loss(pred, [target], [1.0])
    (grad,) = torch.autograd.grad(scaled, pred)
    want = 2.0**17 * (pred.double() - target.double()) / pred.numel()
    torch.testing.assert_close(grad.double(), want, rtol=2e-3, atol=1e-6)


def test_autocast_and_mixed_dtypes() -> None:
    x_1, x_0, _, t = problem(shape=(4, 8))
    model = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_t = fm.interpolate(x_1, x_0, alpha=t, sigma=1 - t).x_t
        pred = model(x_t)
        loss = fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0])
    assert pred.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    want = torch.nn.functional.mse_loss(pred.float(), x_1 - x_0)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=1e-6)
    assert model.weight.grad is not None


def test_checkpointing() -> None:
    x_1, x_0, _, t = problem(shape=(4, 8))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU(), torch.nn.Linear(8, 8))
    grads = []
    for wrap in (lambda f: f(), lambda f: checkpoint(f, use_reentrant=False)):
        model.zero_grad()

        def step():
            x_t = fm.interpolate(x_1, x_0, alpha=t, sigma=1 - t).x_t
            return fm.regression_loss(model(x_t), [x_1, x_0], [1.0, -1.0])

        (2 * wrap(step)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=2e-6, atol=2e-6)


def test_checkpointing_redraws_the_same_noise() -> None:
    x_1, _, _, t = problem(shape=(4, 8))
    weight = torch.randn(8, 8, requires_grad=True)

    def step():
        point = fm.interpolate(x_1, alpha=t, sigma=1 - t)
        return fm.regression_loss(point.x_t @ weight, [x_1, point.x_0], [1.0, -1.0])

    grads = []
    for wrap in (lambda f: f(), lambda f: checkpoint(f, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(wrap(step), weight)[0])
    torch.testing.assert_close(*grads, rtol=2e-6, atol=2e-6)


def _ddp_worker(rank: int, store: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    x_1, x_0, _, t = problem(shape=(4, 8))
    half = slice(2 * rank, 2 * rank + 2)
    x_t = fm.interpolate(x_1[half], x_0[half], alpha=t[half], sigma=1 - t[half]).x_t
    fm.regression_loss(model(x_t), [x_1[half], x_0[half]], [1.0, -1.0]).backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], results)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built in")
def test_ddp_equals_the_whole_batch(tmp_path) -> None:
    results = os.fspath(tmp_path / "grads.pt")
    torch.multiprocessing.spawn(_ddp_worker, (os.fspath(tmp_path / "store"), results), nprocs=2)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    x_1, x_0, _, t = problem(shape=(4, 8))
    x_t = fm.interpolate(x_1, x_0, alpha=t, sigma=1 - t).x_t
    fm.regression_loss(model(x_t), [x_1, x_0], [1.0, -1.0]).backward()
    for got, parameter in zip(torch.load(results), model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=2e-6, atol=2e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: graphs, streams and syncs are a device's")
def test_cuda_graph_draws_afresh_and_nothing_synchronises() -> None:
    x_1, _, pred, t = problem("cuda", shape=(64, 33))
    pred.requires_grad_()
    mask = torch.rand(64, device="cuda") > 0.5

    def step():
        point = fm.interpolate(x_1, alpha=t, sigma=1 - t)
        loss = fm.regression_loss(pred, [x_1, point.x_0], [1.0, -1.0], mask=mask, weight=t)
        return point.x_t, loss, torch.autograd.grad(loss, pred)[0]

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x_t, loss, grad = step()
    graph.replay()
    first = x_t.clone(), loss.clone(), grad.clone()
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(first[0], x_t)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("op", ["combine", "combine_into", "regression_loss", "random"])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(op: str, device: str) -> None:
    x_1, x_0, pred, t = problem(device)
    seed = torch.tensor(7, device=device)
    samples = {
        "combine": [
            ([x_1, x_0], [-1, -1], [0, 0], [t, None], [0.0, 0.5], [], [], 0.0, 0.0, False, False, "auto"),
            (
                [x_1, seed],
                [-1, 0],
                [0, 3],
                [t, None],
                [0.0, 0.5],
                [t, t],
                [0.0, 0.0],
                0.1,
                0.1,
                True,
                True,
                "auto",
            ),
        ],
        "combine_into": [
            (x_1.clone(), [x_0], [-2, -1], [0, 0], [t, None], [0.0, 0.5], [], [], 0.0, 0.0, False, "auto"),
            (
                x_1.clone(),
                [x_0, pred],
                [-1, -1],
                [0, 0],
                [t, None],
                [0.0, 0.5],
                [],
                [],
                0.1,
                0.0,
                True,
                "auto",
            ),
        ],
        "regression_loss": [
            (pred, [x_1, seed], [-1, 0], [0, 0], [None, t], [1.0, 0.0], torch.float32, t, None, 0.5, None, *options)
            for options in ((0, 1.0, False, True, "auto"), (2, 1.0, True, True, "auto"))
        ],
        "random": [((3, 5), seed, kind, 0, 1, torch.float32, "auto") for kind in (1, 2)]
        + [((3, 5), seed, 0, 0, 1, torch.int64, "auto")],
    }
    for args in samples[op]:
        torch.library.opcheck(getattr(torch.ops.fmkernels, op).default, args)


@pytest.mark.parametrize("operation", ["combine", "row_dots", "regression_loss"])
def test_batches_of_gradients(operation: str) -> None:
    """autograd.grad(is_grads_batched=True), as torch.autograd.functional.jacobian(vectorize=True) calls it."""
    x, y = torch.rand(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 4, dtype=torch.float64)
    result = {
        "combine": lambda: fm.combine([x, y], [2.0, 1.0]),
        "row_dots": lambda: fm.row_dots([x, y], [(0, 1), (0, 0)]),
        "regression_loss": lambda: fm.regression_loss(x, [y], [1.0], reduction="none"),
    }[operation]()
    weights = torch.rand(5, *result.shape, dtype=result.dtype)
    batched = torch.autograd.grad(result, x, weights, is_grads_batched=True, retain_graph=True)[0]
    for one, weight in zip(batched, weights, strict=True):
        assert torch.allclose(one, torch.autograd.grad(result, x, weight, retain_graph=True)[0])
