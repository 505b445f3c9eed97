r"""Solves that carry the log-determinant of their map: the integral of div v along dx/dt = v(x, t).

On a fixed grid, every Runge-Kutta and Adams method is x' = x + sum_i c_i v_i, and the same method's integral of the
divergence is sum_i c_i div_i: the divergences of all evaluations are kept, B numbers each, and one product with
the weights at the end of the solve gives the integral, without a pass over the states. Adaptive methods carry the
integral as one more column of the state, so that its error is controlled too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from .._cache import Cache
from .._checks import as_state, tensor_of, value_error
from ..ops._operands import compute_dtype
from ..ops.step_control.op import Status
from ..paths import CondOT
from ..paths.targets import conversion_coefficients
from ..random import Noise
from ..solvers.adaptive.options import AdaptiveOptions
from ..solvers.adaptive.solve import solve_adaptive
from ..solvers.methods.runge_kutta import RungeKutta
from ..solvers.methods.tableaus import Tableau
from ..solvers.programs.builder import Builder, Method
from ..solvers.programs.expressions import Number
from ..solvers.programs.program import Compute, EndStep, Evaluate, Program
from ..solvers.programs.run import Run
from ..solvers.programs.tables import for_program, numbers_for, place
from ..solvers.sampling.settings import FlowSettings
from ..solvers.sampling.velocity import FOLLOW, Model, Velocity
from .divergence import Divergence

_COND_OT = CondOT()


def log_det_weights(program: Program) -> list[Number]:
    """The weight of each evaluation's divergence in the log-determinant of a program's map.

    Raises:
        ValueError: a step is not x' = x + sum_i c_i v_i (an exponential integrator, noise, a nonlinear step).
    """
    contents: dict[int, dict[int, Number]] = {0: {0: 1.0}}
    state = 0
    order: list[int] = []
    weights: dict[int, Number] = {}
    for instruction in program.instructions:
        if isinstance(instruction, Evaluate):
            if len(instruction.results) != 1:
                raise _not_a_sum("several outputs in one call of the model")
            (result,) = instruction.results
            order.append(result)
            contents[result] = {result: 1.0}
            weights[result] = 0.0
        elif isinstance(instruction, Compute):
            raise _not_a_sum("a step that is not linear")
        elif isinstance(instruction, EndStep):
            for base, coefficient in contents[instruction.state].items():
                if base in weights:
                    weights[base] = weights[base] + coefficient
                elif not np.allclose(coefficient, 1.0 if base == state else 0.0, rtol=0.0, atol=1e-9):
                    raise _not_a_sum(f"{coefficient} times a state")
            state = instruction.state
            contents[state] = {state: 1.0}
        else:
            total: dict[int, Number] = {}
            for source, coefficient in zip(instruction.sources, instruction.coefficients, strict=True):
                if source < 0:
                    raise _not_a_sum("noise")
                for base, inner in contents[source].items():
                    total[base] = total.get(base, 0.0) + coefficient * inner
            contents[instruction.result] = total
    return [weights[result] for result in order]


def _not_a_sum(found: str) -> ValueError:
    return ValueError(
        "method: expected one whose steps are x + sum_i c_i v_i (Runge-Kutta or Adams methods), as log-densities need, "
        f"got one with {found}"
    )


_WEIGHTS: Cache[Tensor] = Cache("weights")


def weight_table(program: Program, like: Tensor) -> Tensor:
    """(evaluations,) or (evaluations, B) weights on the divergences' device."""

    def make() -> Tensor:
        numbers = np.asarray(np.broadcast_arrays(*log_det_weights(program)), np.float64)
        if numbers.ndim > 2:
            raise value_error("time_grid", "times of the whole batch or of each sample", numbers.shape)
        return torch.from_numpy(numbers).to(like.dtype).to(like.device, non_blocking=True)

    return for_program(_WEIGHTS, program, (place(like), like.dtype), make)


def plan(method: Method, grid: list[Number]) -> Program:
    """The program of a method for a velocity on a grid; the same object for equal arguments, where that can be told."""
    return Builder(grid, _COND_OT).plan(method)


@final
class Flow:
    """The velocity and divergence of a (guided) model's prediction, and the probes of a solve.

    Args:
        settings: whose model, guidance, path and prediction they are.
        noise: of the probes; None where the divergence is exact.
        fresh: whether each evaluation has probes of its own.
        mask: of x's number of dimensions, True for what moves and counts.
        kwargs: of the model.
    """

    def __init__(
        self,
        settings: FlowSettings,
        how: Divergence,
        noise: Noise | None,
        fresh: bool,
        gradient: bool,
        mask: Tensor | None,
        kwargs: Mapping[str, Any],
        x: Tensor,
    ) -> None:
        self.how, self.noise, self.fresh, self.gradient = how, noise, fresh, gradient
        self.path, self.prediction = settings.path, settings.prediction
        # Without guidance the divergence of the network's output is enough: the velocity is affine in it.
        self.affine = settings.guidance is None and self.prediction != "velocity"
        prediction = "velocity" if self.affine else self.prediction
        self.velocity = Velocity(settings.model, settings.guidance, settings.path, prediction, settings.said)
        self.arguments = self.velocity.arguments(kwargs, x)
        if settings.guidance is not None and how.mode == "reverse":
            self.velocity.wrap(_recorded)
        if mask is not None:
            self.arguments["mask"] = mask
        self.evaluations = 0

    @property
    def fixed(self) -> bool:
        """Whether all evaluations share their probes."""
        return self.noise is not None and not self.fresh

    def probes(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The probes of the next evaluation."""
        if self.noise is None:
            return []
        probes = self.how.draw(x, self.noise, self.evaluations if self.fresh else 0)
        return probes if mask is None else [torch.where(mask, probe, 0.0) for probe in probes]

    def __call__(
        self, t: Tensor, x: Tensor, probes: Sequence[Tensor], /, mask: Tensor | None = None, **arguments: Any
    ) -> tuple[Tensor, Tensor]:
        if self.fresh:
            probes = self.probes(x, mask)
        self.evaluations += 1
        field = self.velocity if mask is None else _Masked(self.velocity, mask)
        output, div = self.how(field, t, x, probes, self.gradient, arguments)
        if not self.affine:
            return output, div
        # v = a x + b output, so that div v = a D + b div output
        times = t.to(div.dtype)
        a, b = conversion_coefficients(self.path, times, self.prediction, "velocity")
        v = self.path.convert(output, x, t, self.prediction, "velocity")
        if mask is None:
            return v, a * math.prod(x.shape[1:]) + b * div
        return torch.where(mask, v, 0.0), a * elements_of(mask, x) + b * div


class _Masked:
    """A field that is 0 where a mask is False."""

    def __init__(self, field: Callable[..., Tensor], mask: Tensor) -> None:
        self.field, self.mask = field, mask

    def __call__(self, t: Tensor, x: Tensor, /, **arguments: Any) -> Tensor:
        return torch.where(self.mask, as_state("model", self.field(t, x, **arguments), x), 0.0)


def _recorded(model: Model) -> Model:
    """The same network; an output whose derivative is not recorded is an error."""

    def call(x: Tensor, t: Tensor, /, **kwargs: Any) -> Tensor:
        v = model(x, t, **kwargs)
        if x.requires_grad and torch.is_grad_enabled() and isinstance(v, Tensor) and not v.requires_grad:
            raise ValueError(
                "guidance: expected networks whose outputs depend on x by differentiable operations, got one whose "
                "derivative is not recorded (a classifier's gradient needs create_graph=True; add 0 * x to a field "
                "that does not depend on x)"
            )
        return v

    return call


def elements_of(mask: Tensor, x: Tensor) -> Tensor:
    """(B,) elements of each sample that a mask keeps, in the dtype that x is computed in: products of integers and
    numbers have PyTorch's default one."""
    return mask.expand(x.shape).reshape(x.shape[0], math.prod(x.shape[1:])).sum(1).to(compute_dtype(x))


class Solution(NamedTuple):
    """A state at the end of a solve, the integral (B,) of the divergence, the network calls, and the status (B,)."""

    x: Tensor
    integral: Tensor
    nfe: int
    status: Tensor


def solve_fixed(
    flow: Flow, method: Method, grid: list[Number], x: Tensor, time_shape: str, time_dtype: torch.dtype
) -> Solution:
    """Along a grid of times."""
    program = plan(method, grid)
    like = torch.zeros(0, dtype=compute_dtype(x), device=x.device)
    weights = weight_table(program, like)
    divergences: list[Tensor] = []
    mask = flow.arguments.get("mask")
    probes = flow.probes(x, mask) if flow.fixed else []

    def call(state: Tensor, t: Tensor) -> Tensor:
        v, div = flow(t, state, probes, **flow.arguments)
        divergences.append(div)
        return v

    run = Run(
        program,
        {"": call},
        x,
        numbers_for(program, x, time_dtype, time_shape, keep=not flow.gradient),
        reuse=not flow.gradient,
    )
    run.all()
    if not divergences:
        end, integral = x.clone(), like.new_zeros(x.shape[0])
    else:
        table = torch.stack(divergences)
        end, integral = run.result, (table * (weights if weights.dim() == 2 else weights[:, None])).sum(0)
    return Solution(end, integral, program.evaluations, status_of(end, integral, mask))


def status_of(x: Tensor, integral: Tensor, mask: Tensor | None = None) -> Tensor:
    """SUCCESS, or NON_FINITE where a sample's state or integral is not: int32 (B,)."""
    x = x.detach() if mask is None else torch.where(mask, x.detach(), 0.0)
    states = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    finite = torch.isfinite(integral.detach()) & torch.isfinite(states).all(1)
    return torch.where(finite, int(Status.SUCCESS), int(Status.NON_FINITE)).to(torch.int32)


def solve_adaptively(
    flow: Flow, tableau: Tableau, options: AdaptiveOptions, start: Number, end: Number, x: Tensor
) -> Solution:
    """By adaptive steps of each sample, the larger of the errors of the state and of the integral under control.

    The state is (B, D + 1): the samples, and the integral as the last column. With gradients, the accepted steps are
    taken again, as a grid of times for each sample.
    """
    shape, dims = x.shape[1:], math.prod(x.shape[1:])
    dtype = compute_dtype(x)

    plain = copy.copy(flow)
    plain.gradient = False
    norm = _JointNorm()

    def func(
        t: Tensor,
        y: Tensor,
        /,
        *,
        probes: Sequence[Tensor] = (),
        mask: Tensor | None = None,
        padded: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        state = y[:, :dims].to(x.dtype).contiguous().view(len(y), *shape)
        if mask is not None:
            assert padded is not None
            state = torch.where(mask, state, padded)
            norm.counts = mask.expand(state.shape).reshape(len(y), dims)
            norm.share = (elements_of(mask, state) / max(dims, 1)).clamp(min=1.0 / max(dims, 1))
        v, div = plain(t, state, probes, mask, **arguments)
        return torch.cat([v.reshape(len(y), dims).to(dtype), div[:, None].to(dtype)], 1)

    arguments = dict(flow.arguments)
    if flow.fixed:
        arguments["probes"] = flow.probes(x.detach(), arguments.get("mask"))
    begin, mask = x.detach(), arguments.get("mask")
    if mask is not None:  # whatever the padding is, the network sees it and the solve does not
        arguments["padded"], begin = begin, torch.where(mask, begin, 0.0)
    y0 = torch.cat([begin.reshape(x.shape[0], dims).to(dtype), x.new_zeros(x.shape[0], 1, dtype=dtype)], 1)
    t0, t1 = (tensor_of(t) if isinstance(t, np.ndarray) else t for t in (start, end))
    follow = (*FOLLOW, "probes", "mask", "padded")
    result = solve_adaptive(func, y0, t0, t1, tableau, options, arguments=arguments, follow=follow, norm=norm)
    if flow.gradient:
        assert result.steps is not None
        grid = _grid_of(result.steps, start, x.shape[0])
        again = solve_fixed(flow, RungeKutta(tableau), grid, x, "batch", options.time_dtype or dtype)
        return again._replace(nfe=again.nfe + result.n_f_evals, status=result.status)
    state = result.y[:, :dims].to(x.dtype).contiguous().view(x.shape)
    if mask is not None:
        state = torch.where(mask, state, x.detach())
    return Solution(state, result.y[:, dims].clone(), result.n_f_evals, result.status)


@final
class _JointNorm:
    """The larger one of the state's root mean square and the integral: no number of dimensions hides its error.

    Attributes:
        share: (R,) of the elements of each sample that count, of the rows that the field saw last; None: all.
        counts: (R, D), which these are.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.share: Tensor | None = None

    def __call__(self, ratio: Tensor) -> Tensor:
        state = ratio[:, :-1]
        if self.counts is not None:
            state = torch.where(self.counts, state, 0.0)
        square = state.square().sum(1) / max(ratio.shape[1] - 1, 1)
        if self.share is not None:
            square = square / self.share
        return torch.maximum(square.sqrt(), ratio[:, -1].abs())


def _grid_of(steps: list[tuple[Tensor, Tensor]], start: Number, batch: int) -> list[Number]:
    """Accepted steps (t, h) of each sample as times (B,); a sample with fewer stays where it is."""
    times = np.broadcast_to(np.asarray(start, np.float64), (batch,))
    grid: list[Number] = [times]
    for t, h in steps:
        size = h.cpu().numpy()
        times = np.where(size == 0.0, times, t.cpu().numpy() + size)
        grid.append(times)
    return grid
