"""One compilation serves all batch sizes, and all numbers that are given as arguments."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.export import Dim, export

import fmkernels as fm
from fmkernels import times, weightings
from fmkernels.paths import VP, CondOT, Path, SchrodingerBridge

SIZES = [2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64]
REDUCTION = "sum"
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
    arguments = [(data(size), torch.tensor(size), 2) for size in SIZES]
    assert compilations(seeded, arguments, eager=True) == 1


def drawn(x, generator):
    first, second = (CondOT().sample(x, generator=generator) for _ in range(2))
    return torch.stack((first.x_t, first.x_0, second.x_t, second.x_0))


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
