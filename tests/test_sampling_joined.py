"""`fm.sample` with everything together: adaptive steps, guidance, SDEs, predictions, gradients, torch.compile."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fmkernels as fm
from fmkernels.solvers.methods import registry as methods


class Conditional(torch.nn.Module):
    """A smooth velocity that depends on a class; it counts its rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2)).double()
        self.calls = self.rows = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.rows += x.shape[0]
        return self.layers(torch.cat([x, t.to(x.dtype)[:, None], y[:, None]], dim=1))


@pytest.fixture
def x_0() -> Tensor:
    return torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def y() -> Tensor:
    return torch.linspace(-1, 1, 6, dtype=torch.float64)


def guided(model: Conditional, y: Tensor, null: float, w: float):
    return lambda x, t: (1 - w) * model(x, t, torch.full_like(y[: len(x)], null)) + w * model(x, t, y[: len(x)])


# ---------------------------------------------------------------- adaptive


@pytest.mark.parametrize("method", [name for name in methods.names() if methods.find(name).kind == "adaptive"])
def test_adaptive_methods_reach_their_tolerance(method: str, x_0: Tensor, y: Tensor) -> None:
    model = Conditional()
    exact, _ = fm.sample(model, x_0, method=methods.resolve("dopri8"), steps=200, y=y)
    tolerance = 1e-4 if method in ("heun_euler", "adaptive_heun", "fehlberg2") else 1e-8
    samples, result = fm.sample(model, x_0, method=method, rtol=tolerance, atol=tolerance, y=y)
    assert (samples - exact).abs().max() < 30 * tolerance
    assert (result.status == fm.Status.SUCCESS).all()
    assert result.steps.shape == (6,)
    assert result.nfe > 0


def test_adaptive_guidance_counts_its_branches_and_follows_its_samples(x_0: Tensor) -> None:
    model = Conditional()
    # samples that finish at different times, so that labels and scales must move with them
    y = torch.tensor([-40.0, 0.1, 0.2, 0.3, 0.4, 60.0], dtype=torch.float64)
    scales = torch.tensor([1.0, 2.0, 1.5, 0.5, 3.0, 2.0], dtype=torch.float64)
    for scale in (2.0, scales):
        guidance = fm.guidance.CFG(scale, negative={"y": 0.0})
        samples, result = fm.sample(model, x_0, method="dopri5", rtol=1e-8, atol=1e-8, guidance=guidance, y=y)
        w = torch.as_tensor(scale, dtype=torch.float64).expand(6)[:, None]

        def plain(x, t, w=w):
            null = torch.zeros_like(y)
            return (1 - w) * model(x, t, null) + w * model(x, t, y)

        exact, _ = fm.sample(plain, x_0, method=methods.resolve("dopri8"), steps=200)
        assert (samples - exact).abs().max() < 1e-6
        assert result.nfe % 2 == 0


def test_adaptive_trajectory_has_the_times_asked_for(x_0: Tensor, y: Tensor) -> None:
    model = Conditional()
    grid = [0.0, 0.11, 0.5, 0.93, 1.0]
    samples, result = fm.sample(
        model, x_0, method="dopri5", rtol=1e-9, atol=1e-9, time_grid=grid, return_trajectory=True, y=y
    )
    fine = fm.sample(model, x_0, method="rk4", time_grid=np.linspace(0, 1, 101), return_trajectory=True, y=y)[1]
    assert torch.equal(result.trajectory[-1], samples)
    for i, t in enumerate(grid):
        assert (result.trajectory[i] - fine.trajectory[round(100 * t)]).abs().max() < 1e-7
    assert torch.equal(result.times, torch.tensor(grid, dtype=torch.float64))


def test_reaching_max_steps_returns_the_samples_with_a_warning(x_0: Tensor, y: Tensor) -> None:
    with pytest.warns(UserWarning, match="max_steps=3"):
        samples, result = fm.sample(Conditional(), x_0, method="dopri5", rtol=1e-12, atol=1e-12, max_steps=3, y=y)
    assert (result.status == fm.Status.MAX_STEPS).all()
    assert samples.isfinite().all()
    assert (result.steps == 3).all()


def test_a_sample_that_is_not_finite_does_not_disturb_the_others(x_0: Tensor, y: Tensor) -> None:
    model = Conditional()

    def broken(x, t, y):
        v = model(x, t, y)
        return torch.where((y[:, None] > 0.9) & (t[:, None] > 0.3), math.nan, v)

    with pytest.warns(UserWarning, match="not finite"):
        samples, result = fm.sample(broken, x_0, method="dopri5", y=y)
    alone, _ = fm.sample(model, x_0, method="dopri5", y=y)
    assert result.status[:-1].eq(fm.Status.SUCCESS).all()
    assert result.status[-1] == fm.Status.NON_FINITE
    assert torch.allclose(samples[:-1], alone[:-1], rtol=1e-6, atol=1e-6)


def test_adaptive_steps_from_predictions(x_0: Tensor) -> None:
    path = fm.paths.Cosine()

    def field(x, t):
        return torch.sin(3 * t)[:, None] - x

    def data(x, t):
        return path.convert(field(x, t), x, t, "velocity", "x_1")

    grid = [0.1, 0.9]
    a, _ = fm.sample(field, x_0, method="dopri5", rtol=1e-9, atol=1e-9, time_grid=grid)
    b, _ = fm.sample(data, x_0, method="dopri5", rtol=1e-9, atol=1e-9, time_grid=grid, prediction="x_1", path=path)
    assert (a - b).abs().max() < 1e-7


def test_no_gradients_with_adaptive_steps(x_0: Tensor) -> None:
    with pytest.raises(ValueError, match="gradient: expected 'none' with adaptive steps"):
        fm.sample(lambda x, t: x, x_0, method="dopri5", gradient="direct")


def test_no_callbacks_with_adaptive_steps(x_0: Tensor) -> None:
    with pytest.raises(ValueError, match="callback: expected none with adaptive steps"):
        fm.sample(lambda x, t: x, x_0, method="dopri5", callback=print)


# ---------------------------------------------------------------- guidance and SDEs on fixed grids


@pytest.mark.parametrize("method", ["euler", "heun2", "rk4", "ab3", "dpmpp_2m", "unipc"])
def test_guidance_is_applied_at_every_stage_and_costs_no_update(method: str, x_0: Tensor, y: Tensor) -> None:
    model = Conditional()
    guidance = fm.guidance.CFG(2.5, negative={"y": 0.0})
    solver = fm.Solver(model, method=method, steps=8, guidance=guidance)
    samples, result = solver.sample(x_0, y=y)
    plain = fm.Solver(guided(model, y, 0.0, 2.5), method=method, steps=8)
    expected, reference = plain.sample(x_0)
    assert (samples - expected).abs().max() < 1e-11
    assert result.nfe == 2 * reference.nfe
    updates = [sum(type(i).__name__ == "Update" for i in s.plan().instructions) for s in (solver, plain)]
    assert updates[0] == updates[1]


def test_guidance_with_times_of_each_sample(x_0: Tensor, y: Tensor) -> None:
    model = Conditional()
    grid = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None] * torch.linspace(0.5, 1, 6, dtype=torch.float64)
    guidance = fm.guidance.CFG(2.5, negative={"y": 0.0}, interval=(0.2, 0.7))
    together, _ = fm.sample(model, x_0, method="heun2", time_grid=grid, guidance=guidance, y=y)
    for b in range(6):
        alone, _ = fm.sample(
            model, x_0[b : b + 1], method="heun2", time_grid=grid[:, b], guidance=guidance, y=y[b : b + 1]
        )
        assert (together[b] - alone[0]).abs().max() < 1e-12


def test_checkpoints_keep_what_is_put_out_after_the_last_step(x_0: Tensor) -> None:
    sde = fm.SDE(diffusion="sigma", log_prob=True, last_step="none")
    results = []
    for gradient in ("none", "direct", "checkpoint"):
        generator = torch.Generator().manual_seed(3)
        x_1, result = fm.sample(
            lambda x, t: -x, x_0, steps=7, sde=sde, gradient=gradient, generator=generator, return_trajectory=True
        )
        assert result.log_prob.shape == (7, *x_0.shape[:1])
        results.append((x_1, result.log_prob, result.trajectory))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got.detach(), wanted)


def test_sde_log_probabilities_and_times(x_0: Tensor, y: Tensor) -> None:
    sde = fm.SDE(diffusion="sigma", log_prob=True, last_step="mean")
    generator = torch.Generator().manual_seed(7)
    samples, result = fm.sample(Conditional(), x_0, sde=sde, steps=10, generator=generator, return_trajectory=True, y=y)
    assert result.log_prob.shape == (10, 6)
    assert result.log_prob.isfinite().all()
    assert result.trajectory.shape == (11, 6, 2)
    again, _ = fm.sample(Conditional(), x_0, sde=sde, steps=10, generator=generator.manual_seed(7), y=y)
    assert torch.equal(samples, again)
    with pytest.raises(ValueError, match="method: expected none beside sde="):
        fm.sample(Conditional(), x_0, sde=sde, method="heun2", y=y)


def test_shards_of_a_batch_draw_what_the_whole_would(x_0: Tensor, y: Tensor) -> None:
    def run(rows: slice) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return fm.sample(
            Conditional(), x_0[rows], sde=fm.SDE(), steps=6, generator=generator, row_offset=rows.start, y=y[rows]
        )[0]

    assert torch.allclose(torch.cat([run(slice(0, 2)), run(slice(2, 6))]), run(slice(0, 6)), rtol=1e-14, atol=1e-14)


def test_gradients_flow_through_guided_steps(x_0: Tensor, y: Tensor) -> None:
    model = Conditional()
    guidance = fm.guidance.CFG(2.5, negative={"y": 0.0}, rescale=0.5)
    grads = []
    for gradient in ("direct", "checkpoint"):
        model.zero_grad()
        samples, _ = fm.sample(model, x_0, method="heun2", steps=5, guidance=guidance, gradient=gradient, y=y)
        samples.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(*grads, strict=True))
    assert all(g.abs().max() > 0 for g in grads[0])


@pytest.mark.parametrize("kind", ["cfg", "sde"])
def test_torch_compile_takes_guidance_and_sdes(kind: str, x_0: Tensor, y: Tensor) -> None:
    model = Conditional()
    guidance = fm.guidance.CFG(2.5, negative={"y": 0.0}) if kind == "cfg" else None
    sde = fm.SDE() if kind == "sde" else None

    @torch.compile(fullgraph=True, backend="aot_eager")
    def solve(x: Tensor, y: Tensor) -> Tensor:
        return fm.sample(model, x, steps=4, guidance=guidance, sde=sde, y=y)[0]

    with torch.no_grad():
        torch.manual_seed(0)
        a = solve(x_0, y)
        torch.manual_seed(0)
        b = fm.sample(model, x_0, steps=4, guidance=guidance, sde=sde, y=y)[0]
    if kind == "cfg":
        assert torch.allclose(a, b)
    else:
        assert a.isfinite().all()


# ---------------------------------------------------------------- nothing waits for the device


class NoSync(TorchDispatchMode):
    """Fails where an operation would copy a value to the host."""

    FORBIDDEN = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in self.FORBIDDEN, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["euler", "rk4", "ab3", "dpmpp_2m", "unipc", "euler_maruyama", "ddim_sde"])
def test_fixed_grids_never_look_at_the_device(method: str, x_0: Tensor, y: Tensor) -> None:
    solver = fm.Solver(Conditional(), method=method, steps=4, guidance=fm.guidance.CFG(2.0, negative={"y": 0.0}))
    solver.plan()
    with NoSync():
        solver.sample(x_0, y=y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"method": "rk4"}, {"method": "dopri5"}, {"sde": fm.SDE()}], ids=str)
def test_no_host_sync_on_a_gpu(options: dict) -> None:
    model = torch.nn.Linear(2, 2).cuda()
    solver = fm.Solver(lambda x, t: model(x), cuda_graph=False, **options)
    x_0 = torch.randn(64, 2, device="cuda")
    solver.sample(x_0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        solver.sample(x_0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["euler", "rk4", "ab2", "unipc"])
def test_graph_replay_equals_eager_on_a_gpu(method: str) -> None:
    model = torch.nn.Linear(2, 2).cuda()
    x_0 = torch.randn(64, 2, device="cuda")
    eager, _ = fm.sample(model_of(model), x_0, method=method, steps=10, cuda_graph=False)
    field = model_of(model)
    for expected in ("captured", "replayed"):
        samples, result = fm.sample(field, x_0, method=method, steps=10, cuda_graph=True)
        assert result.graph == expected
        assert torch.equal(samples, eager)
    noisy = [fm.sample(field, x_0, sde=fm.SDE(), steps=10, cuda_graph=True)[0] for _ in range(2)]
    assert not torch.equal(*noisy)  # fresh noise at each replay


def model_of(layer: torch.nn.Module):
    return lambda x, t: layer(x)
