"""Fixed-grid sampling: order of every method, grids, shapes, times, gradients, plans, graphs and errors."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from tracing import traces_objects

import fmkernels as fm
from fmkernels.solvers.methods import registry as methods
from fmkernels.solvers.methods.adams import AdamsBashforth, AdamsMoulton
from fmkernels.solvers.methods.runge_kutta import RungeKutta
from fmkernels.solvers.methods.tableaus import TABLEAUS
from fmkernels.solvers.programs import captures
from fmkernels.solvers.programs.program import Update

FIXED = methods.names()
# those for any field; what is made for a probability path is tested with one
GENERAL = [n for n in FIXED if isinstance(methods.resolve(n), (RungeKutta, AdamsBashforth, AdamsMoulton))]


def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth nonlinear field on every shape."""
    t = t.reshape(t.shape + (1,) * (x.dim() - t.dim()))
    return (torch.sin(5 * t) - x * x * torch.cos(3 * t)).to(x.dtype)


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2))
        self.calls = 0

    def forward(self, x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        v = self.layers(torch.cat([x, t.to(x.dtype).expand(x.shape[0])[:, None]], dim=1))
        return v if shift is None else v + shift


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize("name", GENERAL)
def test_converges_with_its_order(name: str) -> None:
    method = methods.resolve(name)
    order = method.order
    x_0 = torch.tensor([[1.0, 0.3], [0.5, -0.2]], dtype=torch.float64)
    exact = fm.sample(field, x_0, time_grid=np.linspace(0.1, 0.9, 401), method=methods.resolve("dopri8"))[0]
    counts = (8, 16, 32) if order >= 5 else (40, 80, 160)
    errors = []
    for steps in counts:
        # a smooth, uneven grid: multistep weights must know the steps
        grid = 0.1 + 0.8 * np.linspace(0, 1, steps + 1) ** 1.2
        errors.append((fm.sample(field, x_0, method=method, time_grid=grid)[0] - exact).abs().max().item())
    if errors[-1] > 1e-13:
        measured = math.log2(errors[-2] / errors[-1])
        assert measured > order - 0.35, (name, errors)
    assert errors[-1] < errors[0] / 3 ** min(order, 3)


@pytest.mark.parametrize("name", [n for n, tableau in TABLEAUS.items() if tableau.stages > 1])
def test_tableaus_are_consistent(name: str) -> None:
    tableau = TABLEAUS[name]
    assert abs(sum(tableau.b) - 1) < 1e-12
    assert abs(sum(b * c for b, c in zip(tableau.b, tableau.c, strict=True)) - 0.5) < 1e-12
    if tableau.error is not None:
        full = tableau.adaptive()
        assert full.first_same_as_last
        assert abs(sum(full.error)) < 1e-12
        # the interpolant meets the new state and, at both ends, the derivatives
        for i, row in enumerate(full.interpolant):
            assert abs(sum(row) - full.b[i]) < 1e-12
            assert abs(row[0] - (i == 0)) < 1e-12
            slope = sum((n + 1) * c for n, c in enumerate(row))
            assert abs(slope - (i == full.stages - 1)) < 1e-9


def test_heun_matches_a_loop_in_every_dtype() -> None:
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 3e-2)):
        x = torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4)
        samples, result = fm.sample(field, x, steps=10, method="heun2")
        y, h = x.double(), 0.1
        for i in range(10):
            t = torch.full((3,), i * h, dtype=torch.float64)
            k1 = field(y, t)
            k2 = field(y + h * k1, t + h)
            y = y + h / 2 * (k1 + k2)
        assert samples.dtype == dtype
        assert (samples.double() - y).abs().max() < bound
        assert (result.nfe, result.steps) == (20, 10)


def test_backward_time_returns_to_the_start() -> None:
    x_0 = torch.linspace(-0.5, 0.5, 8, dtype=torch.float64).reshape(4, 2)
    grid = np.linspace(0, 1, 101)
    there = fm.sample(field, x_0, method="rk4", time_grid=grid)[0]
    back = fm.sample(field, there, method="rk4", time_grid=grid[::-1].copy())[0]
    assert (back - x_0).abs().max() < 1e-8


def test_long_grids() -> None:
    x_0 = torch.ones(2, 1, dtype=torch.float64)
    samples, result = fm.sample(lambda x, t: -x, x_0, steps=20_000)
    assert result.steps == 20_000
    assert (samples - math.exp(-1)).abs().max() < 1e-4


# ---------------------------------------------------------------- times and grids


def test_times_that_the_model_sees() -> None:
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    fm.sample(model, torch.zeros(3, 2), steps=2)
    assert [t.shape for t in seen] == [(3,)] * 2
    assert seen[1].dtype == torch.float32
    assert (seen[1] == 0.5).all()
    seen.clear()
    fm.sample(model, torch.zeros(3, 2), steps=2, time_shape="scalar", time_dtype=torch.float64)
    assert [t.shape for t in seen] == [()] * 2
    assert seen[0].dtype == torch.float64
    seen.clear()
    fm.sample(model, torch.zeros(3, 2, dtype=torch.bfloat16), steps=2)
    assert seen[0].dtype == torch.float32
    seen.clear()
    fm.sample(model, torch.zeros(3, 2, dtype=torch.float64), steps=2)
    assert seen[0].dtype == torch.float64


def test_times_of_each_sample_and_token() -> None:
    x_0 = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 4, 2)
    ends = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    grid = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None] * ends
    for method in ("rk4", "ab3", "heun2"):
        together = fm.sample(field, x_0, method=method, time_grid=grid)[0]
        for b in range(3):
            alone = fm.sample(field, x_0[b : b + 1], method=method, time_grid=grid[:, b])[0]
            assert (together[b] - alone[0]).abs().max() < 1e-13
    tokens = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None, None] * torch.rand(3, 4, dtype=torch.float64)
    together = fm.sample(
        field, x_0, method="midpoint", time_grid=tokens.add(torch.linspace(0, 1e-3, 6).view(-1, 1, 1))
    )[0]
    assert together.shape == x_0.shape


@pytest.mark.parametrize(
    "grid", [[0.0, 0.5, 0.5, 1.0], [0.0, 0.7, 0.4], [0.0, math.nan], [0.0, math.inf], [], torch.tensor(0.5)]
)
def test_bad_grids_are_named(grid) -> None:
    with pytest.raises(ValueError, match="time_grid: expected"):
        fm.sample(field, torch.zeros(2, 2), time_grid=grid)


# ---------------------------------------------------------------- shapes, outputs and errors


def test_zero_steps_one_time_and_empty_batches() -> None:
    x_0 = torch.ones(3, 2)
    for samples, result in (fm.sample(field, x_0, steps=0), fm.sample(field, x_0, time_grid=[0.5])):
        assert torch.equal(samples, x_0)
        assert samples is not x_0
        assert (result.nfe, result.steps) == (0, 0)
    samples, result = fm.sample(field, torch.zeros(0, 2), steps=3, method="rk4")
    assert samples.shape == (0, 2)
    assert result.nfe == 12


def test_shapes_are_drawn() -> None:
    generator = torch.Generator().manual_seed(5)
    a, _ = fm.sample(field, (4, 3), steps=2, generator=generator)
    b, _ = fm.sample(field, (4, 3), steps=2, generator=generator)
    generator.manual_seed(5)
    c, _ = fm.sample(field, (4, 3), steps=2, generator=generator)
    assert torch.equal(a, c)
    assert not torch.equal(a, b)
    assert fm.sample(lambda x, t: x, (4, 3), steps=1, dtype=torch.float64)[0].dtype == torch.float64


def test_trajectory_callback_and_progress() -> None:
    x_0 = torch.rand(3, 2)
    seen = []
    samples, result = fm.sample(
        field,
        x_0,
        steps=5,
        method="heun2",
        return_trajectory=True,
        callback=lambda i, t, x: seen.append((i, t, x.clone())),
    )
    assert result.trajectory.shape == (6, 3, 2)
    assert torch.equal(result.trajectory[-1], samples)
    assert torch.equal(result.trajectory[0], x_0)
    assert [i for i, _, _ in seen] == list(range(5))
    assert seen[-1][1] == 1.0
    assert all(torch.equal(x, result.trajectory[i + 1]) for i, _, x in seen)
    assert torch.allclose(result.times, torch.linspace(0, 1, 6, dtype=torch.float64), rtol=1e-15, atol=1e-15)
    pytest.importorskip("tqdm")
    fm.sample(field, x_0, steps=2, progress=True)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x, t: x[:1], ValueError, r"model: expected an output of the state's shape, \(3, 2\)"),
        (lambda x, t: x.long(), TypeError, "model: expected a floating output, as the state is torch.float32"),
        (lambda x, t: None, TypeError, "model: expected a tensor"),
        (lambda x, t: x.sum(), ValueError, "model: expected an output of the state's shape"),
    ],
)
def test_bad_models_are_named(model, error, message: str) -> None:
    with pytest.raises(error, match=message):
        fm.sample(model, torch.zeros(3, 2), steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk5"}, "method: expected one of 'euler'"),
        ({"steps": -1}, "steps: expected an int >= 0"),
        ({"steps": 3, "time_grid": [0.0, 1.0]}, "steps, time_grid: expected at most one"),
        ({"schedule": "cubic"}, "schedule: expected one of"),
        ({"time_shape": "token"}, "time_shape: expected one of"),
        ({"gradient": "adjoint"}, "gradient: expected one of"),
        ({"cuda_graph": "yes"}, "cuda_graph: expected"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fm.sample(field, torch.zeros(3, 2), **options)


def test_a_model_that_returns_its_input_or_a_view_of_it() -> None:
    for method in ("ab3", "rk4", "am3"):
        x_0 = torch.rand(4, 2, dtype=torch.float64)
        for model in (lambda x, t: x, lambda x, t: x.view(-1).view(4, 2)):
            samples, _ = fm.sample(model, x_0, steps=50, method=method)
            fresh, _ = fm.sample(lambda x, t: x.clone(), x_0, steps=50, method=method)
            assert torch.equal(samples, fresh)


def test_channels_last_and_strided_states() -> None:
    x_0 = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    expected = fm.sample(field, x_0, steps=4, method="rk4")[0]
    for laid_out in (x_0.to(memory_format=torch.channels_last), x_0.transpose(0, 1).contiguous().transpose(0, 1)):
        assert (fm.sample(field, laid_out, steps=4, method="rk4")[0] - expected).abs().max() < 1e-14


@pytest.mark.parametrize("prediction", ["x_1", "x_0", "v", "score"])
@pytest.mark.parametrize("path", [fm.paths.CondOT(), fm.paths.VP(), fm.paths.Cosine()])
def test_predictions_are_converted_in_the_update(prediction: str, path) -> None:
    x_0 = torch.rand(3, 2, dtype=torch.float64)
    grid = np.linspace(0.1, 0.9, 9)
    expected = fm.sample(field, x_0, method="heun2", path=path, time_grid=grid)[0]

    def model(x, t):
        return path.convert(field(x, t), x, t, "velocity", prediction)

    samples, result = fm.sample(model, x_0, method="heun2", path=path, time_grid=grid, prediction=prediction)
    assert (samples - expected).abs().max() < 1e-9
    assert result.nfe == 16


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("method", ["euler", "heun2", "rk4", "ab3", "am3"])
def test_gradients_against_a_plain_float64_loop(gradient: str, method: str) -> None:
    network = Network().double()
    x_0 = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    samples, _ = fm.sample(network, x_0, steps=7, method=method, gradient=gradient)
    samples.square().sum().backward()
    grads = [x_0.grad.clone(), *(p.grad.clone() for p in network.parameters())]

    def loss(scale: float) -> float:  # along the gradient's own direction
        moved = Network().double()
        with torch.no_grad():
            for p, q, g in zip(moved.parameters(), network.parameters(), grads[1:], strict=True):
                p.copy_(q + scale * g)
        return fm.sample(moved, (x_0 + scale * grads[0]).detach(), steps=7, method=method)[0].square().sum().item()

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert slope == pytest.approx(sum(g.square().sum().item() for g in grads), rel=1e-6)


def test_checkpoints_call_the_network_twice_and_keep_fewer_tensors() -> None:
    def kept(gradient: str) -> tuple[int, int]:
        network = Network()
        count = 0

        def pack(tensor):
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            samples, _ = fm.sample(network, torch.rand(4, 2), steps=36, gradient=gradient)
        saved = count
        samples.sum().backward()
        return saved, network.calls

    direct, checkpointed = kept("direct"), kept("checkpoint")
    assert direct[1] == 36
    assert checkpointed[1] == 72
    assert checkpointed[0] < direct[0] / 4


def test_no_gradient_by_default() -> None:
    samples, _ = fm.sample(Network(), torch.rand(3, 2, requires_grad=True), steps=2)
    assert not samples.requires_grad


# ---------------------------------------------------------------- plans, buffers, graphs, torch.compile


def test_plans_are_kept_and_slots_are_few() -> None:
    solver = fm.Solver(field, steps=30, method="rk4")
    assert solver.plan() is fm.Solver(field, steps=30, method="rk4").plan()
    assert solver.plan().slot_count == 2  # and the four velocities are the network's own tensors
    for name in FIXED:
        plan = fm.Solver(field, steps=30, method=name).plan()
        assert plan.slot_count <= 6, name


def test_a_solver_reuses_its_buffers_but_gives_its_results_away() -> None:
    solver = fm.Solver(field, steps=4, method="heun2")
    a, _ = solver.sample(torch.ones(3, 2))
    kept = a.clone()
    b, _ = solver.sample(torch.zeros(3, 2))
    assert torch.equal(a, kept)
    assert not torch.equal(a, b)
    assert solver.sample(torch.ones(5, 2))[0].shape == (5, 2)


def test_model_arguments_reach_the_model() -> None:
    network = Network()
    shift = torch.rand(3, 2)
    samples, _ = fm.sample(network, torch.zeros(3, 2), steps=1, shift=shift)
    plain, _ = fm.sample(network, torch.zeros(3, 2), steps=1)
    assert torch.allclose(samples - plain, shift)


@traces_objects
@pytest.mark.parametrize("method", ["euler", "heun2", "ab2", "rk4"])
def test_compiles_as_one_graph(method: str) -> None:
    network = Network()
    x_0 = torch.rand(4, 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def solve(x):
        return fm.sample(network, x, steps=4, method=method)[0]

    with torch.no_grad():
        assert torch.allclose(solve(x_0), fm.sample(network, x_0, steps=4, method=method)[0], atol=1e-6)


@traces_objects
def test_compiles_with_a_trajectory() -> None:
    network = Network()
    x_0 = torch.rand(4, 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def solve(x):
        return fm.sample(network, x, steps=3, return_trajectory=True)[1].trajectory

    with torch.no_grad():
        expected = fm.sample(network, x_0, steps=3, return_trajectory=True)[1].trajectory
        assert torch.allclose(solve(x_0), expected, atol=1e-6)


@pytest.mark.parametrize("columns", [2, 3000])
def test_trajectories_of_small_and_large_states(columns: int) -> None:
    x_0 = torch.rand(4, columns)
    states = [x_0]
    fm.sample(field, x_0, steps=5, method="rk4", callback=lambda i, t, x: states.append(x.clone()))
    _, result = fm.sample(field, x_0, steps=5, method="rk4", return_trajectory=True)
    assert torch.equal(result.trajectory, torch.stack(states))
    # a step that changes nothing, and states that are the network's own tensors
    guidance = fm.guidance.CFG(2.0, negative={"y": 0.0}, zero_star=True, zero_init=2)
    _, result = fm.sample(
        lambda x, t, y: field(x, t) + y[:, None],
        x_0,
        steps=4,
        guidance=guidance,
        return_trajectory=True,
        y=torch.ones(4),
    )
    assert torch.equal(result.trajectory[2], x_0)
    assert not torch.equal(result.trajectory[3], x_0)


class Recorder:
    """Stands in for CUDA graph capture: a replay runs the recorded body again on the same tensors."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, body, *_):
        self.captures += 1
        result = body().clone()

        def replay() -> None:
            result.copy_(body())

        return replay, result


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(captures, "record", recorder)
    monkeypatch.setattr(fm.Solver, "_graph_refusal", lambda *args: None)
    return recorder


def test_graphs_replay_with_new_data_and_numbers(recorder: Recorder) -> None:
    network = Network()
    outputs = []
    for call, (steps, schedule) in enumerate(
        [(6, "uniform"), (6, "uniform"), (6, "uniform"), (6, "cosine"), (7, "uniform")]
    ):
        x_0, shift = torch.rand(4, 2), torch.rand(4, 2)
        samples, result = fm.sample(network, x_0, steps=steps, schedule=schedule, method="heun2", shift=shift)
        eager = fm.Solver(network, steps=steps, schedule=schedule, method="heun2")
        with torch.no_grad():
            expected, _ = eager._sample_fixed(eager.plan(), x_0, None, 0, None, False, None, {"shift": shift})
        assert torch.allclose(samples, expected, atol=1e-6), call
        outputs.append(result.graph.split(":")[0])
    assert outputs == ["eager", "captured", "replayed", "replayed", "eager"]
    assert recorder.captures == 1


def test_a_graph_that_cannot_be_captured_says_why(recorder: Recorder, monkeypatch) -> None:
    def refuse(body, *_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captures, "record", refuse)
    network = Network()
    for expected in ("second call", "not permitted", "not permitted"):
        _, result = fm.sample(network, torch.rand(4, 2), steps=2)
        assert expected in result.graph
    with pytest.raises(RuntimeError, match="not permitted"):
        fm.sample(Network(), torch.rand(4, 2), steps=2, cuda_graph=True)


def test_graphs_are_refused_with_a_reason_on_the_cpu() -> None:
    assert "cpu" in fm.sample(field, torch.zeros(2, 2), steps=1)[1].graph
    with pytest.raises(ValueError, match="cuda_graph: expected a solve that can be captured"):
        fm.sample(field, torch.zeros(2, 2), steps=1, cuda_graph=True)


def test_a_captured_solve_does_not_keep_its_model(recorder: Recorder, monkeypatch) -> None:
    monkeypatch.setattr(captures, "record", lambda body, *_: (lambda: None, body()))  # a graph holds no Python
    network = Network()
    for how in ("eager", "captured", "replayed"):
        assert fm.sample(network, torch.rand(4, 2), steps=3)[1].graph.startswith(how)
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_a_solver_within_itself() -> None:
    inner: list[torch.Tensor] = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if not inner:
            inner.append(torch.zeros(()))
            inner[0] = solver.sample(torch.ones(3, 2))[0]
        return field(x, t)

    solver = fm.Solver(model, method="rk4", steps=6)
    samples, _ = solver.sample(torch.zeros(3, 2))
    assert torch.equal(samples, fm.sample(field, torch.zeros(3, 2), method="rk4", steps=6)[0])
    assert torch.equal(inner[0], fm.sample(field, torch.ones(3, 2), method="rk4", steps=6)[0])


ONE_CALL = [
    *("euler", "ab2", "ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "unipc_3", "deis", "lms"),
    *("euler_maruyama", "dpmpp_2m_sde", "ancestral"),
]


@pytest.mark.parametrize("name", ONE_CALL)
def test_one_update_a_step(name: str) -> None:
    """Schedule, prediction, multistep terms, noise and guidance: all in the coefficients of a single update."""
    guidance = fm.guidance.CFG(3.0, negative={"y": 0.0})
    plan = fm.Solver(field, method=name, steps=12, prediction="x_1", guidance=guidance).plan()
    assert sum(isinstance(i, Update) for i in plan.instructions) == plan.calls == 12
