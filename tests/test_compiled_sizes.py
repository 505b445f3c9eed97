"""One compilation serves all batch sizes, and all numbers that are given as arguments."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.export import Dim, export
from tracing import traces_objects

import fmkernels as fm
from fmkernels import times, weightings
from fmkernels.paths import VP, CondOT, Path, SchrodingerBridge

SIZES = [2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64]
REDUCTION = "mean"
WEIGHT = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))


class Mine(Path):
    def alpha(self, t):
        return t**2

    def sigma(self, t):
        return 1 - t**2


def compilations(function, arguments, backend: str = "eager", dynamic: bool | None = True, eager: bool = False) -> int:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    for given in arguments:
        result = compiled(*given)
        if eager:
            torch.testing.assert_close(result, function(*given))
        assert torch.isfinite(result).all()
    return counter.frame_count


def data(size: int) -> torch.Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(size))


def train(path: Path, **options):
    sampling = {name: options.pop(name) for name in ("time_sampler", "checks", "store_noise") if name in options}

    def step(x):
        batch = path.sample(x, **sampling)
        return fm.cfm_loss(batch.x_t @ WEIGHT, batch, **{"reduction": REDUCTION, **options})

    return step


def together(*steps):
    return lambda x: torch.stack([step(x).sum() for step in steps])


STEPS = {
    "targets": together(*(train(VP(), target=name) for name in ("velocity", "x_1", "x_0", "score", "v", "edm"))),
    "weights": together(*(train(VP(), weight=name) for name in weightings.WEIGHTINGS)),
    "paths": together(train(Mine()), train(SchrodingerBridge(0.3)), train(SchrodingerBridge(0.3), store_noise=False)),
    "samplers": together(
        *(
            train(CondOT(), time_sampler=sampler)
            for sampler in (
                times.Uniform(0.1, 0.9),
                times.Uniform(stratified=True),
                times.LogitNormal(),
                times.Mode(),
                times.Beta(2.0, 3.0),
                times.Shifted(times.UShaped(), times.Shift(2.0)),
            )
        )
    ),
    "checks": together(train(CondOT(), checks=True), train(CondOT())),
}


@pytest.mark.parametrize("name", STEPS)
def test_one_compilation_serves_all_batch_sizes(name: str) -> None:
    assert compilations(STEPS[name], [(data(size),) for size in SIZES]) == 1


def test_without_saying_dynamic_the_second_size_is_the_last_compilation() -> None:
    arguments = [(data(size),) for size in SIZES]
    assert compilations(train(CondOT()), arguments, "aot_eager", dynamic=None) <= 2


def numbers(x, t, weight, sigma_data):
    batch = CondOT().sample(x, x, t)
    loss = fm.cfm_loss(batch.x_t @ WEIGHT, batch, weight=lambda t: weight, reduction=REDUCTION)
    edm = fm.cfm_loss(batch.x_t @ WEIGHT, batch, target="edm", sigma_data=sigma_data, reduction=REDUCTION)
    shape = CondOT().coefficients(t).alpha_t + CondOT().snr(t)
    data = CondOT().convert(batch.x_t, x, t, "velocity", "x_1")
    return torch.stack((loss, edm, shape, data.square().mean(), CondOT().snr_inverse(weight)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_changing_numbers_are_variables_of_one_compilation(backend: str) -> None:
    arguments = [(data(size), 0.2 + 0.01 * size, 1.0 + size, 0.3 + 0.01 * size) for size in SIZES]
    assert compilations(numbers, arguments, backend, eager=True) <= 2


def seeded(x, seed, row_offset):
    batch = SchrodingerBridge(0.3).sample(x, seed=seed, row_offset=row_offset, store_noise=False)
    return torch.cat((batch.x_t.flatten(), batch.x_0.flatten(), batch.t))


def test_seeds_and_offsets_are_variables_of_one_compilation() -> None:
    arguments = [(data(size), torch.tensor(size), 2 + size) for size in SIZES]
    assert compilations(seeded, arguments, eager=True) == 1


def drawn(x, generator):
    first, second = (CondOT().sample(x, generator=generator) for _ in range(2))
    return torch.stack((first.x_t, first.x_0, second.x_t, second.x_0))


@traces_objects
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_draw_from_a_generator_is_the_eager_one(backend: str) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 7, 7)]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(drawn, fullgraph=True, backend=counter, dynamic=True)
    for size in SIZES:
        torch.testing.assert_close(compiled(data(size), generators[0]), drawn(data(size), generators[1]))
    assert counter.frame_count == 1
    for size in SIZES[:2]:
        torch.testing.assert_close(compiled(data(size), generators[2]), drawn(data(size), generators[3]))
        torch.testing.assert_close(compiled(data(size), generators[0]), drawn(data(size), generators[1]))


@traces_objects
def test_a_compiled_training_step_with_a_generator_has_the_eager_gradients() -> None:
    """The noise of the backward pass is that of the forward pass."""

    def step(x, weight, generator):
        batch = CondOT().sample(x, generator=generator, store_noise=False)
        return fm.cfm_loss(torch.tanh(batch.x_t @ weight), batch)

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        weight = WEIGHT.clone().requires_grad_()
        function(data(6), weight, torch.Generator().manual_seed(1)).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_checks_hold_in_compiled_code() -> None:
    compiled = torch.compile(lambda x, t: CondOT().sample(x, x, t, checks=True).x_t, fullgraph=True, backend="eager")
    compiled(data(3), torch.tensor([0.0, 0.5, 1.0]))
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(RuntimeError, match=r"t: expected finite times in \[0, 1\]"):
            compiled(data(3), torch.tensor([0.0, 0.5, bad]))


def test_export_with_a_dynamic_batch() -> None:
    class Step(torch.nn.Module):
        def forward(self, x_1, x_0, t):
            batch = CondOT().sample(x_1, x_0, t)
            return fm.cfm_loss(batch.x_t @ WEIGHT, batch, target="edm", weight="min_snr", reduction=REDUCTION)

    shapes = {"x_1": {0: Dim("batch")}, "x_0": {0: Dim("batch")}, "t": {0: Dim("batch")}}
    arguments = data(5), data(6)[:5], torch.rand(5)
    program = export(Step(), arguments, dynamic_shapes=shapes)
    for size in (2, 5, 33):
        given = data(size), data(size + 1)[:size], torch.rand(size)
        torch.testing.assert_close(program.module()(*given), Step()(*given))


PENALTIES = ["mean", "sum", "none", "weighted_mean"]


def loss_of_numbers(x, y, t, mask, numbers):
    """regression_loss with every number that may change, and combine, interpolate and noise beside it."""
    coefficient, weight, count, delta = numbers
    point = fm.interpolate(x, y, alpha=coefficient, sigma=1.0 - coefficient).x_t
    moved = fm.combine([point, y], [weight, t], atol=0.1)[1]
    pred = point @ WEIGHT
    losses = [fm.regression_loss(pred, [x, y], [coefficient, -1.0], weight=weight, reduction=r) for r in PENALTIES]
    losses += [fm.regression_loss(pred, [x], [1.0], mask=mask, weight=t, reduction=r) for r in PENALTIES]
    losses.append(fm.regression_loss(pred, [x], [1.0], mask=mask, count=count))
    losses.append(fm.regression_loss(pred, [x], [1.0], kind="huber", delta=delta))
    return torch.cat([loss.reshape(-1) for loss in (*losses, moved)])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_operations_of_any_size_and_number_are_one_compilation(backend: str) -> None:
    def arguments(size):
        given = (0.3 + 0.01 * size, 1.5 + size, 2.0 * size + 1.0, 0.5 + 0.01 * size)
        return data(size), 2 * data(size), torch.rand(size), torch.arange(size) % 2 == 0, given

    # the first call sees its numbers as constants
    assert compilations(loss_of_numbers, [arguments(size) for size in SIZES], backend, eager=True) <= 2


def test_a_compiled_mean_follows_the_size_in_its_gradient() -> None:
    def step(x, weight):
        return fm.regression_loss(x @ weight, [x], [1.0])

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for size in SIZES:
        found = []
        for function in (compiled, step):
            weight = WEIGHT.clone().requires_grad_()
            found.append(torch.autograd.grad(function(data(size), weight), weight)[0])
        torch.testing.assert_close(*found)
    assert counter.frame_count <= 2  # the compiler may begin anew once


def noisy(x, seed, stream, row_offset):
    noise = fm.Noise(seed, stream, row_offset)
    drawn = fm.combine([x, noise], [1.0, 0.5])
    loss = fm.regression_loss(drawn, [x, noise], [1.0, -1.0])
    return loss + fm.randn(x.shape[0], 2, seed=seed, stream=stream, row_offset=row_offset).sum()


def test_streams_and_row_offsets_are_variables_of_one_compilation() -> None:
    arguments = [(data(size), torch.tensor(size), size, 3 * size) for size in SIZES[:6]]
    assert compilations(noisy, arguments, "aot_eager", eager=True) <= 2


class NoisyStep:
    """Streams that are an object's state, as a training loop counts its steps."""

    def __init__(self) -> None:
        self.stream = 0

    def __call__(self, x, seed):
        return noisy(x, seed, self.stream, 2)


def test_a_stream_that_is_counted_outside_is_no_constant() -> None:
    step = NoisyStep()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x, seed: step(x, seed), fullgraph=True, backend=counter)
    for step.stream in range(12):
        torch.testing.assert_close(compiled(data(4), torch.tensor(1)), step(data(4), torch.tensor(1)))
    assert counter.frame_count <= 2


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.func.vmap(lambda row: f(row[None]))(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("operation", ["regression_loss", "cfm_loss", "combine", "interpolate", "row_dots"])
def test_transforms_within_compiled_code_are_the_eager_ones(operation: str, name: str) -> None:
    y, t = data(3), torch.tensor([0.2, 0.5, 0.9])

    def function(x):
        if operation == "regression_loss":
            return fm.regression_loss(x.tanh(), [y[: len(x)]], [1.0], kind="pseudo_huber")
        if operation == "cfm_loss":
            given = {"x_1": y[: len(x)], "x_0": x.sin(), "t": t[: len(x)], "path": VP()}
            return fm.cfm_loss(x.tanh(), weight="min_snr", **given)
        if operation == "combine":
            return fm.combine([x.sin(), y[: len(x)]], [x.mean(1), 0.5]).square().sum()
        if operation == "interpolate":
            return fm.interpolate(x.sin(), y[: len(x)], alpha=t[: len(x)], sigma=0.5).x_t.square().sum()
        return fm.row_dots([x.sin(), y[: len(x)]], [(0, 0), (0, 1)]).square().sum()

    torch._dynamo.reset()
    want = TRANSFORMS[name](function, data(4)[:3])
    assert want.abs().max() > 0
    got = torch.compile(lambda x: TRANSFORMS[name](function, x), fullgraph=True, backend="aot_eager")(data(4)[:3])
    torch.testing.assert_close(got, want)


def test_export_of_a_loss_with_any_batch() -> None:
    class Loss(torch.nn.Module):
        def forward(self, pred, x_1, mask):
            one = fm.regression_loss(pred, [x_1], [1.0])
            return one + fm.regression_loss(pred, [x_1], [0.5], mask=mask, reduction="none").sum()

    for strict in (True, False):
        shapes = {name: {0: Dim("batch")} for name in ("pred", "x_1", "mask")}
        program = export(Loss(), (data(5), data(6)[:5], data(5)[:, 0] > 0), dynamic_shapes=shapes, strict=strict)
        for size in (2, 5, 33):
            given = data(size), data(size + 1)[:size], data(size)[:, 0] > 0
            torch.testing.assert_close(program.module()(*given), Loss()(*given))
