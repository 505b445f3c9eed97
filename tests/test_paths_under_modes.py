"""Paths, batches, weightings and times under PyTorch's modes and transforms, at the ends, and on odd data."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fmkernels as fm
from fmkernels import times
from fmkernels.paths import VE, VP, CondOT, Cosine, LinearVP, Path, SchrodingerBridge


class Mine(Path):
    def __init__(self, n: float = 2.5) -> None:
        self.n = n

    def alpha(self, t):
        return t**self.n

    def sigma(self, t):
        return 1 - t**self.n


PATHS = [CondOT(), Cosine(), LinearVP(), VP(), VE(), SchrodingerBridge(0.3), Mine()]
SAMPLERS = [None, times.LogitNormal(), times.Beta(2.0, 3.0), times.Uniform(0.1, 0.9, stratified=True)]
WEIGHTS = [None, "snr", "min_snr", "sigma_sqrt", "likelihood", "x_1", lambda t: 2.0]
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
paths = pytest.mark.parametrize("path", PATHS, ids=repr)


def targets(path: Path) -> tuple[str, ...]:
    everywhere = ("velocity", "x_1", "x_0", "score")
    return everywhere if isinstance(path, SchrodingerBridge) else (*everywhere, "v", "edm")


def use(path: Path, x: torch.Tensor) -> list[torch.Tensor]:
    """What a training loop does; all tensors that come out."""
    results = []
    for sampler in SAMPLERS:
        batch = path.sample(x, time_sampler=sampler, seed=None if sampler is None else 5)
        results += [batch.t, batch.x_t, batch.x_0, batch[1:].x_0]
        bins = fm.LossBins(3)
        bins.update(batch.t, fm.cfm_loss(x, batch, reduction="none"))
        results.append(bins.mean)
    batch = path.sample(x, t=0.5)
    results += [fm.cfm_loss(x, batch, target="x_1", weight=weight) for weight in WEIGHTS]
    results += [batch.target(), batch.t, *(c for c in path.coefficients(batch.t) if c is not None)]
    if not isinstance(path, SchrodingerBridge):
        results.append(path.convert(x, batch.x_t, 0.5, "velocity", "x_1"))
    return results


@paths
def test_the_default_dtype_changes_nothing(path: Path) -> None:
    torch.manual_seed(0)
    want = use(path, X)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        got = use(path, X)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, equal_nan=True)


@paths
@pytest.mark.parametrize("mode", ["meta", "autocast", "inference", "no_grad", "fake"])
def test_modes_change_no_device_and_no_dtype(path: Path, mode: str) -> None:
    modes = {
        "meta": torch.device("meta"),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "fake": FakeTensorMode(),
    }
    want = [(tensor.dtype, tensor.device, tensor.shape) for tensor in use(path, X)]
    with modes[mode]:
        x = torch.randn(4, 3, device="cpu") if mode == "fake" else X
        got = [(tensor.dtype, tensor.device, tensor.shape) for tensor in use(path, x)]
    assert got == want


@paths
def test_a_batch_made_in_inference_mode_trains_outside(path: Path) -> None:
    with torch.inference_mode():
        batch = path.sample(X, store_noise=False)
        part = batch[1:]
    pred = X.clone().requires_grad_()
    fm.cfm_loss(pred, batch).backward()
    assert torch.isfinite(pred.grad).all()
    assert torch.equal(part.x_0, batch.x_0[1:])


@paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_losses_at_the_ends_are_finite_in_every_dtype(path: Path, dtype: torch.dtype) -> None:
    batch = path.sample(X.to(dtype), t=torch.tensor([0.0, 1.0, 0.0, 1.0]), seed=1)
    assert torch.isfinite(batch.x_t).all()
    for target in targets(path):
        for weight in WEIGHTS:
            assert torch.isfinite(fm.cfm_loss(X.to(dtype), batch, target=target, weight=weight)), (target, weight)


@paths
def test_a_batch_of_nothing(path: Path) -> None:
    empty = torch.empty(0, 3)
    for sampler in (*SAMPLERS, times.Uniform(stratified=True, size=4)):
        batch = path.sample(empty, time_sampler=sampler)
        assert fm.cfm_loss(empty, batch) == 0
        assert len(batch) == 0
        assert batch.split(2) == []
        assert batch[0:].x_0.shape == (0, 3)


def test_noise_does_not_depend_on_how_data_lies_in_memory() -> None:
    for x in (torch.randn(3, 4).t(), torch.randn(1, 3).expand(4, 3), torch.randn(2, 3, 4, 5).to(
        memory_format=torch.channels_last
    )):  # fmt: skip
        a, b = (CondOT().sample(data, seed=1) for data in (x, x.contiguous()))
        assert torch.equal(a.x_0, b.x_0)
        torch.testing.assert_close(a.x_t, b.x_t)
        shard = CondOT().sample(x[1:], seed=1, row_offset=1)
        assert torch.equal(shard.x_0, b.x_0[1:])
        assert torch.equal(a[1:].x_0, b.x_0[1:])


@paths
def test_vmap_draws_as_it_is_told(path: Path) -> None:
    data = torch.randn(5, 4, 3)

    def draw(x):
        batch = path.sample(x)
        return batch.t, batch.x_0, fm.cfm_loss(x, batch)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(draw)(data)
    t, x_0, loss = torch.func.vmap(draw, randomness="different")(data)
    assert t.unique().numel() == t.numel()
    assert x_0.unique().numel() == x_0.numel()
    assert torch.isfinite(loss).all()
    t, x_0, _ = torch.func.vmap(draw, randomness="same")(data)
    assert (t == t[0]).all()
    assert (x_0 == x_0[0]).all()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_samplers_under_vmap(sampler) -> None:
    t = torch.func.vmap(lambda x: CondOT().sample(x, time_sampler=sampler).t, randomness="different")(
        torch.randn(5, 4, 3)
    )
    assert t.unique().numel() == 20


@paths
def test_gradients_through_a_seeded_draw_are_those_of_plain_pytorch(path: Path) -> None:
    batch = path.sample(X, seed=3)
    w = torch.full((3,), 0.5)

    def ours(w):
        drawn = path.sample(X, seed=3, store_noise=False)
        return fm.cfm_loss(drawn.x_t * w, drawn)

    def plain(w):
        return (batch.x_t * w - batch.target()).square().mean()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(w), transform(plain)(w), rtol=1e-4, atol=1e-5)


def test_checkpointing_draws_the_same_times_and_noise() -> None:
    w = torch.ones(3, requires_grad=True)

    def step(w):
        batch = CondOT().sample(X)
        return fm.cfm_loss(torch.tanh(batch.x_t * w), batch)

    gradients = []
    for run in (step, lambda w: checkpoint(step, w, use_reentrant=False)):
        torch.manual_seed(0)
        gradients += torch.autograd.grad(run(w), w)
    torch.testing.assert_close(*gradients)


def test_threads_share_a_path() -> None:
    path = Mine(3.5)

    def draw() -> list[torch.Tensor]:
        batch = path.sample(X, seed=8)
        return [batch.x_t, batch.t, fm.cfm_loss(X, batch), batch.split(2)[1].target()]

    want, wrong = draw(), []

    def work() -> None:
        for _ in range(10):
            wrong.extend(not torch.equal(a, b) for a, b in zip(draw(), want, strict=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 160
    assert not any(wrong)


def test_a_learnable_path_under_functional_call() -> None:
    class Learned(torch.nn.Module, Path):
        def __init__(self) -> None:
            super().__init__()
            self.n = torch.nn.Parameter(torch.tensor(2.0))

        def alpha(self, t):
            return t**self.n

        def sigma(self, t):
            return 1 - t**self.n

        def forward(self, pred, t):
            return fm.cfm_loss(pred, x_1=X, x_0=-X, t=t, path=self)

    path, t = Learned(), torch.tensor([0.2, 0.4, 0.6, 0.8])
    functional = torch.func.grad(lambda n: torch.func.functional_call(path, {"n": n}, (X, t)))(path.n.detach())
    (plain,) = torch.autograd.grad(path(X, t), path.n)
    h = 1e-2
    shifted = [torch.func.functional_call(path, {"n": path.n.detach() + step}, (X, t)) for step in (h, -h)]
    torch.testing.assert_close(functional, plain)
    torch.testing.assert_close(plain, (shifted[0] - shifted[1]) / (2 * h), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("make", [lambda: Mine(3.0), lambda: VP(0.2, 10.0)])
def test_a_path_made_inside_compiled_code(make) -> None:
    def step(x, t):
        path = make()
        batch = path.sample(x, x, t)
        return fm.cfm_loss(batch.x_t, batch)

    t = torch.rand(4)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(X, t), step(X, t))


def test_a_batch_leaves_compiled_code() -> None:
    draw = torch.compile(lambda x: CondOT().sample(x, store_noise=False), fullgraph=True, backend="eager")
    for size in (4, 5):
        batch = draw(torch.randn(size, 3))
        assert isinstance(batch, fm.paths.Batch)
        assert torch.isfinite(fm.cfm_loss(batch.x_1, batch))
        assert torch.equal(batch[1:3].x_0, batch.x_0[1:3])
