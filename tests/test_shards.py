"""Shards of a batch draw what the whole would: `row_offset` with states, shapes, every method with noise, probes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels.solvers.methods import registry as methods

SHAPE, CUTS = (7, 3), [(0, 3), (3, 4), (4, 7)]
NOISY = [
    name
    for name in methods.names()
    if methods.find(name).kind != "adaptive" and fm.Solver(lambda x, t: x, method=name, steps=6).plan().streams
]
SDES = {
    "euler": fm.SDE(),
    "heun": fm.SDE(method="heun"),
    "exponential": fm.SDE(method="exponential"),
    "log_prob": fm.SDE(log_prob=True),
}


def field(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x + t[:, None])


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def assert_shards(run: Callable[[object, int], Tensor], x_0: Tensor | None = None) -> None:
    """run(x_0 or a shape, row_offset) with one seed each time."""
    whole = run(SHAPE if x_0 is None else x_0, 0)
    for start, stop in CUTS:
        part = run((stop - start, *SHAPE[1:]) if x_0 is None else x_0[start:stop], start)
        assert torch.equal(part, whole[start:stop])
    assert not torch.equal(whole[:3], whole[3:6]), "rows differ"


def test_there_are_methods_with_noise() -> None:
    assert {"ddim_sde", "ancestral", "lcm", "edm_churn", "restart", "euler_maruyama", "dpmpp_2m_sde"} <= set(NOISY)


@pytest.mark.parametrize("given", ["shape", "state"])
@pytest.mark.parametrize("method", [*NOISY, "euler", "dopri5"])
def test_shards_of_a_sample_are_the_wholes(method: str, given: str) -> None:
    steps = None if method == "dopri5" else 6
    x_0 = None if given == "shape" else fm.randn(SHAPE, seed=1)

    def run(x: object, offset: int) -> Tensor:
        return fm.sample(field, x, method=method, steps=steps, generator=rng(), row_offset=offset, compact=False)[0]

    if given == "shape" or method in NOISY:
        assert_shards(run, x_0)
    solver = fm.Solver(field, method=method, steps=steps, compact=False)
    assert_shards(lambda x, offset: solver.sample(x, generator=rng(), row_offset=offset)[0], x_0)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("gradient", ["none", "direct", "checkpoint"])
def test_shards_of_an_sde_are_the_wholes(sde: fm.SDE, gradient: str) -> None:
    def run(x: object, offset: int) -> Tensor:
        return fm.sample(field, x, sde=sde, steps=4, generator=rng(), row_offset=offset, gradient=gradient)[0]

    assert_shards(run)
    assert_shards(run, fm.randn(SHAPE, seed=1))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_shards_of_probes_are_the_wholes(distribution: str, fresh: bool) -> None:
    options = {"divergence": "hutchinson", "probes": 2, "distribution": distribution, "fresh": fresh, "compact": False}
    for steps, method in ((3, "euler"), (None, "bosh3")):
        if fresh and steps is None:
            break  # fresh probes leave adaptive steps nothing smooth
        options.update(steps=steps, method=method)

        def both(x: object, offset: int, options: dict = options) -> Tensor:
            x_1, result = fm.sample_with_log_prob(field, x, generator=rng(), row_offset=offset, **options)
            return torch.cat([x_1, result.log_prob[:, None]], 1)

        assert_shards(both)
        x = fm.randn(SHAPE, seed=1)
        assert_shards(both, x)
        assert_shards(
            lambda x, offset, options=options: (
                fm.log_prob(field, x, generator=rng(), row_offset=offset, **options).log_prob
            ),
            x,
        )


def test_a_shape_with_a_density_of_ones_own_is_told() -> None:
    with pytest.raises(TypeError, match="x_0: expected a tensor of samples of log_p0, got"):
        fm.sample_with_log_prob(field, (4, 2), log_p0=lambda x: x.sum(1))
    x_1, result = fm.sample_with_log_prob(field, (4, 2), generator=rng())
    assert torch.equal(result.x_0, fm.randn(4, 2, generator=rng()))
    assert torch.equal(x_1, result.x_1)
