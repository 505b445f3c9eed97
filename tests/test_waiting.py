"""Samples and tokens that wait: what a method starts, ends and counts over a grid goes by each one's own steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels.guidance import APG, CFG
from fmkernels.solvers.methods import registry
from fmkernels.solvers.methods.adams import AdamsBashforth, AdamsMoulton
from fmkernels.solvers.methods.diffusion import DEIS, DPMSolverPP, UniPC
from fmkernels.solvers.methods.edm import EDM, Restart, RestartInterval
from fmkernels.solvers.methods.own_steps import OwnSteps
from fmkernels.solvers.programs.program import Update

INNER = [0.1, 0.2, 0.35, 0.6, 0.8, 0.9, 0.96, 0.98]
WHOLE = [0.0, 0.15, 0.3, 0.55, 0.8, 0.9, 0.96, 1.0]
SHORT = [0.1, 0.4, 0.9]
LENGTH = 12  # of the padded grids
CASES: dict[str, Any] = {
    **{name: entry.make() for name, entry in registry.METHODS.items() if entry.make is not None},
    **{f"ab{order}": AdamsBashforth(order) for order in (2, 3, 4, 5)},
    **{f"am{order}": AdamsMoulton(order) for order in (2, 3, 4, 5)},
    **{f"am{order} reused": AdamsMoulton(order, reuse=True) for order in (2, 3, 4, 5)},
    **{
        f"{method.__name__}({order}) {final}": method(order, lower_order_final=final)
        for method in (DPMSolverPP, UniPC, DEIS)
        for order in (2, 3)
        for final in (True, False)
    },
    "dpmpp_3m exact": DPMSolverPP(3, solver_type="exact"),
    "unipc predictor": UniPC(3, corrector=False),
    "unipc_3 bh1": UniPC(3, "bh1"),
    "deis_t final": DEIS(3, "t", True),
    "churn": EDM(s_churn=3.0, s_tmin=0.1, s_tmax=2.0),
    "restarts": Restart((RestartInterval(0.06, 0.3), RestartInterval(0.5, 2.0, 3, 2)), heun=False),
    "restart with a wait inside": Restart((RestartInterval(0.03, 1.0),)),
    **{
        f"{method} last step": fm.SDE(method=method, last_step_size=0.03) for method in ("euler", "heun", "exponential")
    },
}


def model(x: Tensor, t: Tensor) -> Tensor:
    """Each element for itself."""
    return torch.tanh(0.7 * x + torch.sin(3.0 * t).reshape(t.shape + (1,) * (x.dim() - t.dim()))) - 0.4 * x


def padded(own: list[float], front: int = 0, middle: int = 0) -> np.ndarray:
    """A grid of one length, whose rest are waits at the end."""
    at = len(own) // 2
    times = [own[0]] * front + own[:at] + [own[at - 1]] * middle + own[at:]
    return np.array(times + [own[-1]] * (LENGTH - len(times)))


def solve(method: Any, x: Tensor, grid: Any, row: int = 0, noise: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    seeded = torch.Generator().manual_seed(3)
    return fm.sample(
        model, x, method=method, time_grid=grid, generator=seeded, row_offset=row, noise_transform=noise, compact=False
    )[0]


def states(count: int) -> Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("own", [INNER, WHOLE, SHORT], ids=["inner", "whole", "short"])
@pytest.mark.parametrize("case", CASES)
def test_a_padded_sample_is_what_it_is_alone(case: str, own: list[float]) -> None:
    method = CASES[case]
    columns = [padded(own), padded(own, 3), padded(own, 1, 2), padded(own, 0, 1), np.linspace(0.05, 0.95, LENGTH)]
    x = states(1).expand(5, 2).contiguous()
    # the noise of a step is that of its row: of what waited before, others
    together = solve(method, x, np.stack(columns, 1), noise=torch.zeros_like)
    alone = solve(method, x[:1], own, noise=torch.zeros_like).expand(4, 2)
    torch.testing.assert_close(together[:4], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", [DPMSolverPP(3), UniPC(3), DEIS(3)])
def test_a_wide_step_is_not_lowered_for_anothers_last_step(method: Any) -> None:
    wide, other = [0.1, 0.2, 0.3, 0.8, 0.9], [0.1, 0.3, 0.5, 0.7, 0.7]
    x = states(2)
    together = solve(method, x, np.stack([wide, other], 1))
    torch.testing.assert_close(together[:1], solve(method, x[:1], wide), rtol=1e-11, atol=1e-11)


NOISY = {
    name: method for name, method in CASES.items() if fm.Solver(model, method=method, time_grid=WHOLE).plan().streams
}


def test_there_are_methods_with_noise() -> None:
    assert {name for name, entry in registry.METHODS.items() if entry.kind == "sde"} < set(NOISY)


@pytest.mark.parametrize("case", NOISY)
def test_a_sample_padded_at_its_end_has_the_noise_that_it_has_alone(case: str) -> None:
    method = CASES[case]
    x = states(3)
    grid = np.stack([np.linspace(0.0, 1.0, LENGTH), padded(WHOLE), padded(INNER)], 1)
    together = solve(method, x, grid)
    for row, own in ((1, WHOLE), (2, INNER)):
        alone = solve(method, x[row : row + 1], own, row)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", NOISY)
def test_shards_of_grids_of_each_sample_draw_what_the_whole_draws(case: str) -> None:
    """Streams were numbered by what the batch needed: of those that all waited a shard had another's noise."""
    method = CASES[case]
    x = states(4)
    columns = [padded(WHOLE), padded(WHOLE, 3), padded(INNER, 1, 2), np.linspace(0.0, 1.0, LENGTH)]
    grid = np.stack(columns, 1)
    together = solve(method, x, grid)
    for row in range(4):
        alone = solve(method, x[row : row + 1], grid[:, row : row + 1], row)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", ["euler", "heun2", "dpmpp_2m"])
@pytest.mark.parametrize("rule", ["zero_init", "momentum"])
def test_guidance_counts_and_sums_over_ones_own_steps(rule: str, method: str) -> None:
    """The first steps without a velocity were those of the batch, and steps in which one waited added momentum."""

    def conditional(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t) + 0.3 * torch.sin(y[:, None] + x)

    def guided(x: Tensor, grid: Any) -> Tensor:
        y = torch.ones(x.shape[0], dtype=torch.float64)
        negative = {"y": torch.zeros_like(y)}
        by = CFG(2.0, negative=negative, zero_star=True, zero_init=2)
        if rule == "momentum":
            by = APG(2.0, negative=negative, momentum=-0.5)
        return fm.sample(conditional, x, method=method, time_grid=grid, guidance=by, y=y)[0]

    x = states(1).expand(5, 2).contiguous()
    columns = [
        padded(INNER),
        padded(INNER, 3),
        padded(INNER, 1, 2),
        padded(INNER, 0, 1),
        np.linspace(0.05, 0.95, LENGTH),
    ]
    together = guided(x, np.stack(columns, 1))
    torch.testing.assert_close(together[:4], guided(x[:1], INNER).expand(4, 2), rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------------- tokens that see each other


def seeing(x: Tensor, t: Tensor) -> Tensor:
    """Tokens (B, 3): what one does changes the others' fields."""
    return torch.cos(3.0 * t) * x + 0.5 * torch.sin(2.0 * x.roll(1, 1) + t)


def seen_grid(n: int) -> np.ndarray:
    """(3 n + 1, 1, 3): a token without waits, one that starts late and ends soon, one that waits between."""
    k = np.arange(3 * n + 1)
    late = np.clip((k - n) / n, 0.0, 1.0)
    twice = np.where(k <= 2 * n, np.minimum(k, n), k - n) / (2 * n)
    return np.stack([k / (3 * n), late, twice], 1)[:, None]


@pytest.mark.parametrize("case", ["ab2", "ab3", "ab4", "am3", "am4", "am4 reused", "ab5"])
def test_a_past_from_before_a_wait_is_no_past_where_others_moved_meanwhile(case: str) -> None:
    """Order 2, for the bends where a neighbour starts or stops; with nodes from before the wait it were 1."""
    method = CASES[case]
    x = torch.tensor([[0.5, -0.3, 1.0]], dtype=torch.float64)
    exact = fm.sample(seeing, x, method="rk4", time_grid=seen_grid(400))[0]
    errors = [
        float((fm.sample(seeing, x, method=method, time_grid=seen_grid(n))[0] - exact).abs().max()) for n in (32, 64)
    ]
    assert math.log2(errors[0] / errors[1]) > 1.8
    assert errors[1] < 1e-4


def test_own_steps() -> None:
    """Of two samples of two tokens: their own steps, and which waits leave the past as it was."""
    columns = [[0, 1, 2, 2, 3, 4], [0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 3]]
    grid = list(np.array(columns, dtype=float).T.reshape(6, 2, 2))
    own = OwnSteps(grid)
    assert own.total.tolist() == [[4, 2], [5, 3]]
    each = lambda rows: np.stack(rows).reshape(5, 4).T.tolist()  # noqa: E731
    assert each(own.left) == [[4, 3, 2, 2, 1], [2, 2, 1, 1, 0], [5, 4, 3, 2, 1], [3, 3, 2, 2, 1]]
    # the second sample's second token waits while the first moves: the past is another field's then
    assert each(own.before) == [[0, 1, 2, 2, 3], [0, 0, 1, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 0, 1]]
    assert own.resumed is not None
    assert np.argwhere(own.resumed).tolist() == [[2, 0, 0], [2, 0, 1]]
    plain = OwnSteps([0.0, 0.5, 1.0])
    assert plain.moving is None
    assert plain.resumed is None
    assert (plain.total, list(plain.before), list(plain.left)) == (2, [0, 1], [2, 1])


@pytest.mark.parametrize("method", [DPMSolverPP(3), UniPC(3), AdamsBashforth(4), AdamsMoulton(4)])
def test_a_sample_that_waits_costs_no_update_of_its_past_but_between_its_steps(method: Any) -> None:
    """At the beginning and the end of a grid, where most waits are."""
    x = states(2)

    def launches(columns: list[np.ndarray]) -> int:
        program = fm.Solver(model, method=method, time_grid=np.stack(columns, 1)).plan()
        return sum(isinstance(i, Update) for i in program.instructions) - program.calls

    none = launches([np.linspace(0.1, 0.9, LENGTH)] * 2)
    assert launches([np.linspace(0.1, 0.9, LENGTH), padded(INNER)]) == none
    assert launches([np.linspace(0.1, 0.9, LENGTH), padded(INNER, 0, 1)]) > none
    assert solve(method, x, np.stack([padded(INNER, 0, 1)] * 2, 1)).isfinite().all()


# ---------------------------------------------------------------------- times apart by rounding


@pytest.mark.parametrize("method", ["euler", "ab3", "dpmpp_3m", "unipc", "unipc_3", "deis", "lms"])
def test_a_step_of_rounding_is_a_wait(method: str) -> None:
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own = [0.0, 0.1, 0.3, 0.45, 0.8, 1.0]
    exact = np.array([*own[:3], 0.3, *own[3:], 1.0])
    for gap in (0.3 - 0.1 * 3, np.spacing(0.3), 4 * np.spacing(1.0)):
        for sign in (1.0, -1.0):
            rounded = exact.copy()
            rounded[3] += sign * gap
            rounded[-2] = 1.0 - abs(gap)
            found, expected = (
                fm.sample(model, x, time_grid=np.repeat(grid[:, None], 3, 1), method=method)[0]
                for grid in (rounded, exact)
            )
            # a token beside that has other times
            tokens = np.stack([np.repeat(grid[:, None], 2, 1) for grid in (rounded, exact, exact)], 1)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            beside = fm.sample(model, x, time_grid=tokens, method=method)[0]
            torch.testing.assert_close(beside, expected, rtol=1e-12, atol=1e-12)


def test_a_shared_grid_with_times_apart_by_rounding_names_them() -> None:
    x = torch.zeros(3, 2, dtype=torch.float64)
    for times in ([0.0, 0.3, 0.1 + 0.2, 1.0], [0.0, 0.3, 0.3, 1.0], [1.0, 0.1 + 0.2, 0.3, 0.0]):
        with pytest.raises(ValueError, match=f"time_grid: .*got {times[1]!r} and then {times[2]!r}"):
            fm.sample(model, x, time_grid=times)
    steep = fm.solvers.sampling.grids.Power(10.0)  # whose first step, 1e-17, is none of rounding
    assert fm.sample(model, x, steps=50, schedule=steep)[1].steps == 50
    assert fm.sdeint(lambda t, y: -y, 0.1, x, torch.tensor([0.0, 1e-18, 2e-18], dtype=torch.float64)).shape[0] == 3
