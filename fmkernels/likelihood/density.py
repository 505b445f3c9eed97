r"""Log-densities of flows by the continuous change of variables (Chen et al. 2018, Grathwohl et al. 2019).

Along dx/dt = v(x, t) the density of x changes by :math:`d \log p / dt = -\operatorname{div} v`, so that

.. math:: \log p_1(x_1) = \log p_0(x_0) - \int_0^1 \operatorname{div} v(x_t, t)\, dt.

See :mod:`fmkernels.likelihood.log_det` for how the integral is taken along with the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .._checks import (
    check_choice,
    check_float_dtype,
    check_float_tensor,
    check_int,
    check_number,
    type_error,
    value_error,
)
from ..ops._operands import compute_dtype
from ..ops.row_dots.op import row_dots
from ..ops.step_control.op import Status
from ..paths import CondOT, Path
from ..paths.targets import TARGETS
from ..random import Noise, draw_seed
from ..solvers.adaptive.controllers import Controller, IController
from ..solvers.adaptive.options import AdaptiveOptions
from ..solvers.methods import registry as methods
from ..solvers.programs.builder import Method
from ..solvers.programs.expressions import Number
from ..solvers.sampling import grids
from ..times import Shift
from .divergence import Divergence
from .log_det import Flow, Model, solve_adaptively, solve_fixed

LogDensity = Callable[[Tensor], Tensor]
DEFAULT_STEPS = 50


@final
@dataclass(frozen=True)
class LogProb:
    """Log-densities of samples, and what led to them.

    Args:
        log_prob: (B,), log p_1(x_1), float32 (float64 for float64 data).
        x_0: (B, ...), the samples at the noise end.
        x_1: (B, ...), the samples at the data end.
        delta_log_p: (B,), log p_1(x_1) - log p_0(x_0), minus the integral of the divergence from noise to data.
        nfe: evaluations of the velocity a sample; of an adaptive solve the calls made. Each took one divergence.
        status: int tensor (B,) of :class:`fmkernels.Status`.
    """

    log_prob: Tensor
    x_0: Tensor
    x_1: Tensor
    delta_log_p: Tensor
    nfe: int
    status: Tensor

    def bits_per_dim(self, scale: float = 1.0) -> Tensor:
        """(B,): see :func:`bits_per_dim`."""
        return bits_per_dim(self.log_prob, self.x_1.shape[1:], scale)


def bits_per_dim(log_prob: Tensor, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    r"""The negative log-likelihood in bits a dimension, :math:`\log_2(scale) - \log p / (D \ln 2)`.

    With 8-bit data and noise uniform over a level added to it (dequantisation), this bounds the bits that a lossless
    code needs from above (Theis et al. 2016): ``scale`` is then the number of levels in a unit of x, 256 for data in
    [0, 1] and 127.5 for data in [-1, 1]. With 1 it is that of the density itself.

    Args:
        log_prob: log-densities in nats, any shape.
        shape: of one sample; D is its number of elements.
        scale: > 0, see above.

    Returns:
        log_prob's shape and dtype.
    """
    check_float_tensor("log_prob", log_prob)
    check_number("scale", scale, above=0.0)
    dims = math.prod(shape)
    if dims == 0:
        raise value_error("shape", "at least one element", tuple(shape))
    return log_prob * (-1.0 / (dims * math.log(2.0))) + math.log2(scale)


def standard_normal(x: Tensor) -> Tensor:
    """log N(x; 0, 1) of each sample: (B,), float32 (float64 for float64 data)."""
    if x.numel() == 0:
        return torch.zeros(x.shape[0], dtype=compute_dtype(x), device=x.device)
    return -0.5 * row_dots([x], [(0, 0)])[:, 0] - 0.5 * math.log(2.0 * math.pi) * math.prod(x.shape[1:])


@dataclass
class _Problem:
    """The arguments that both directions share, checked."""

    model: Model
    method: str | Method
    steps: int | None
    schedule: str | Shift | grids.Schedule
    time_grid: Tensor | np.ndarray | Sequence[float] | None
    t_0: float
    t_1: float
    path: Path | None
    prediction: str
    log_p0: LogDensity | None
    rtol: float
    atol: float
    controller: Controller | None
    max_steps: int
    how: Divergence
    fresh: bool
    gradient: bool
    generator: torch.Generator | None
    row_offset: int
    time_shape: str
    time_dtype: torch.dtype | None
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise type_error("model", "a callable model(x, t, **model_kwargs)", self.model)
        if self.path is not None and not isinstance(self.path, Path):
            raise type_error("path", "a path of fm.paths", self.path)
        check_choice("prediction", self.prediction, TARGETS)
        check_choice("time_shape", self.time_shape, ("batch", "scalar"))
        for name in ("t_0", "t_1", "rtol", "atol"):
            check_number(name, getattr(self, name), low=0.0)
        if self.t_0 >= self.t_1:
            raise value_error("t_1", "a time after t_0", self.t_1)
        check_int("max_steps", self.max_steps, low=1)
        if self.time_dtype is not None:
            check_float_dtype("time_dtype", self.time_dtype)
        check_int("row_offset", self.row_offset, low=0)
        if self.steps is not None and self.time_grid is not None:
            raise ValueError("steps, time_grid: expected at most one of them, got both")

    def grid(self, backward: bool) -> list[Number]:
        """Times from where the solve begins to where it ends."""
        times = grids.make_grid(DEFAULT_STEPS if self.steps is None else self.steps, self.schedule, self.time_grid)
        if self.time_grid is None:
            width = self.t_1 - self.t_0
            times = [self.t_0, *(self.t_0 + width * t for t in times[1:-1]), self.t_1][: max(len(times), 1)]
        descending = len(times) > 1 and bool(np.all(np.asarray(times[0]) > np.asarray(times[-1])))
        return times[::-1] if len(times) > 1 and descending != backward else times

    def solve(self, x: Tensor, backward: bool) -> LogProb:
        check_float_tensor("x_1" if backward else "x_0", x)
        if x.dim() == 0:
            raise value_error("x_1" if backward else "x_0", "at least one dimension, of samples", x)
        with_gradient = self.gradient and torch.is_grad_enabled()
        with torch.set_grad_enabled(with_gradient):
            return self._solve(x if with_gradient else x.detach(), backward, with_gradient)

    def _solve(self, x: Tensor, backward: bool, with_gradient: bool) -> LogProb:
        noise = None
        if self.how.method != "exact":
            noise = Noise(draw_seed(x.device, self.generator), row_offset=self.row_offset)
        flow = Flow(
            self.model,
            CondOT() if self.path is None else self.path,
            self.prediction,
            self.how,
            noise,
            self.fresh and noise is not None,
            with_gradient,
            self.kwargs,
        )
        grid = self.grid(backward)
        tableau = None
        if self.steps is None:
            tableau = methods.adaptive_tableau(self.method, methods.LOG_PROB)
        if tableau is None:
            method, time_dtype = methods.resolve(self.method, methods.LOG_PROB), self.time_dtype or compute_dtype(x)
            solution = solve_fixed(flow, method, grid, x, self.time_shape, time_dtype)
        else:
            options = AdaptiveOptions(
                rtol=self.rtol,
                atol=self.atol,
                controller=IController() if self.controller is None else self.controller,
                max_steps=self.max_steps,
                time_shape=self.time_shape,
                time_dtype=self.time_dtype,
                record=with_gradient,
            )
            solution = solve_adaptively(flow, tableau, options, grid[0], grid[-1], x)
        x_0, x_1 = (solution.x, x) if backward else (x, solution.x)
        # the integral runs from where the solve began
        delta = solution.integral if backward else -solution.integral
        log_p0 = standard_normal(x_0) if self.log_p0 is None else self.log_p0(x_0)
        if not isinstance(log_p0, Tensor) or log_p0.shape != delta.shape:
            raise value_error(
                "log_p0", f"a function from states to log-densities of shape {tuple(delta.shape)}", log_p0
            )
        # what did not reach the other end has no log-density
        reached = solution.status == int(Status.SUCCESS)
        log_prob = torch.where(reached, log_p0.to(delta.dtype) + delta, math.nan)
        return LogProb(log_prob, x_0, x_1, delta, solution.nfe, solution.status)


def log_prob(
    model: Model,
    x_1: Tensor,
    *,
    log_p0: LogDensity | None = None,
    method: str | Method = "dopri5",
    steps: int | None = None,
    schedule: str | Shift | grids.Schedule = "uniform",
    time_grid: Tensor | np.ndarray | Sequence[float] | None = None,
    t_0: float = 0.0,
    t_1: float = 1.0,
    path: Path | None = None,
    prediction: str = "velocity",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    controller: Controller | None = None,
    max_steps: int = 10_000,
    divergence: str = "exact",
    probes: int = 1,
    distribution: str = "rademacher",
    fresh: bool = False,
    mode: str = "reverse",
    chunk: int | None = None,
    gradient: bool = False,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    time_shape: str = "batch",
    time_dtype: torch.dtype | None = None,
    **model_kwargs: Any,
) -> LogProb:
    r"""log p_1(x_1) of a flow model, from data (t = 1) back to noise (t = 0).

    .. math:: \log p_1(x_1) = \log p_0(x_0) - \int_0^1 \operatorname{div} v(x_t, t)\, dt, \quad \dot x_t = v(x_t, t)

    (Chen et al. 2018). A fixed grid gives the log-density of the method's own discretisation of the two equations.

    Args:
        model: any callable model(x, t, **model_kwargs) that returns a tensor of x's shape and dtype, whose samples do
            not depend on each other (batch normalisation in evaluation mode).
        x_1: data (B, ...), floating.
        log_p0: the source's log-density, a function from (B, ...) to (B,); the standard normal's if None.
        method: a name or a method object. "dopri5", "tsit5", "dopri8", "bosh3", "fehlberg" and "heun_euler" take
            adaptive steps where ``steps`` is None; Runge-Kutta and Adams methods a fixed grid.
        steps: steps of a fixed grid; 50 if None.
        schedule, time_grid: the grid, as in :func:`fmkernels.sample`; a ``time_grid`` may run in either direction, and
            its ends are then the interval.
        t_0, t_1: the interval, 0 <= t_0 < t_1: log_p0 is the density at t_0, and the result that at t_1. Predictions
            whose velocity is singular at an end need one inside: t_1 < 1 for "x_1".
        path, prediction: what the model predicts, as in :func:`fmkernels.sample`.
        rtol, atol, controller, max_steps: of an adaptive method, as in :func:`fmkernels.sample`. Each sample's error
            norm is the larger one of its state's and its log-determinant's. What fails has NaN and its status.
        divergence: "exact", one derivative for each dimension at each evaluation, or "hutchinson", one for each probe:
            an unbiased estimate of log p.
        probes, distribution, mode, chunk: see :func:`fmkernels.likelihood.divergence.divergence`.
        fresh: draw probes anew at each evaluation. The default keeps a sample's probes over the solve (as many states
            of memory as there are probes), so that the estimate is the integral of a smooth function (Grathwohl et al.
            2019); fresh ones average over the steps of a fixed grid but leave an adaptive method nothing smooth.
        gradient: record the solve, for derivatives with respect to x_1 and to the model's parameters.
        generator: torch.Generator of the probes' seed.
        row_offset: x_1's place in a larger batch, so that shards draw the probes that the whole would.
        time_shape: the shape of t for the model: "batch", (B,), or "scalar", ().
        time_dtype: of t; float32 (float64 for float64 data) if None.
        model_kwargs: handed to the model at each call.

    Returns:
        A :class:`LogProb`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; a method that is not a sum of velocities.
    """
    how = Divergence(divergence, probes, distribution, mode, chunk)
    problem = _Problem(
        model,
        method,
        steps,
        schedule,
        time_grid,
        t_0,
        t_1,
        path,
        prediction,
        log_p0,
        rtol,
        atol,
        controller,
        max_steps,
        how,
        fresh,
        gradient,
        generator,
        row_offset,
        time_shape,
        time_dtype,
        model_kwargs,
    )
    return problem.solve(x_1, backward=True)


def sample_with_log_prob(
    model: Model,
    x_0: Tensor,
    *,
    log_p0: LogDensity | None = None,
    method: str | Method = "dopri5",
    steps: int | None = None,
    schedule: str | Shift | grids.Schedule = "uniform",
    time_grid: Tensor | np.ndarray | Sequence[float] | None = None,
    t_0: float = 0.0,
    t_1: float = 1.0,
    path: Path | None = None,
    prediction: str = "velocity",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    controller: Controller | None = None,
    max_steps: int = 10_000,
    divergence: str = "exact",
    probes: int = 1,
    distribution: str = "rademacher",
    fresh: bool = False,
    mode: str = "reverse",
    chunk: int | None = None,
    gradient: bool = False,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    time_shape: str = "batch",
    time_dtype: torch.dtype | None = None,
    **model_kwargs: Any,
) -> tuple[Tensor, LogProb]:
    r"""Samples x_1 from noise x_0 (t = 0 to t = 1), and their log-densities from the same evaluations.

    .. math:: \log p_1(x_1) = \log p_0(x_0) - \int_0^1 \operatorname{div} v(x_t, t)\, dt

    Args:
        model: any callable model(x, t, **model_kwargs).
        x_0: noise (B, ...), floating, drawn from the density ``log_p0``.
        log_p0, method, ...: as in :func:`log_prob`.

    Returns:
        (x_1, result): the samples, and a :class:`LogProb`.

    Raises:
        TypeError, ValueError: see :func:`log_prob`.
    """
    how = Divergence(divergence, probes, distribution, mode, chunk)
    problem = _Problem(
        model,
        method,
        steps,
        schedule,
        time_grid,
        t_0,
        t_1,
        path,
        prediction,
        log_p0,
        rtol,
        atol,
        controller,
        max_steps,
        how,
        fresh,
        gradient,
        generator,
        row_offset,
        time_shape,
        time_dtype,
        model_kwargs,
    )
    result = problem.solve(x_0, backward=False)
    return result.x_1, result
