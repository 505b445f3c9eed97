r"""Log-densities of flows by the continuous change of variables (Chen et al. 2018, Grathwohl et al. 2019).

Along dx/dt = v(x, t) the density of x changes by :math:`d \log p / dt = -\operatorname{div} v`, so that

.. math:: \log p_1(x_1) = \log p_0(x_0) - \int_0^1 \operatorname{div} v(x_t, t)\, dt.

See :mod:`fmkernels.likelihood.log_det` for how the integral is taken along with the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .._checks import (
    check_bool,
    check_callable,
    check_float_tensor,
    check_int,
    check_number,
    check_same_device,
    leading_shape,
    type_error,
    value_error,
)
from .._gradients import check_unrecorded
from .._torch import untraced
from ..ops._operands import compute_dtype
from ..ops.row_dots.op import row_dots
from ..ops.step_control.op import Status
from ..paths import Path
from ..random import Noise, draw_seed
from ..solvers.adaptive.controllers import Controller
from ..solvers.methods import registry as methods
from ..solvers.programs.builder import Method
from ..solvers.programs.expressions import Number, shape_of
from ..solvers.sampling import grids
from ..solvers.sampling.settings import (
    Compact,
    FlowSettings,
    check_generator,
    check_state,
    check_time,
    network_kwargs,
    start_state,
)
from ..solvers.sampling.solver import adaptive_options
from ..solvers.sampling.velocity import Model, Rule
from ..times import Shift
from .divergence import Divergence
from .log_det import Flow, Solution, elements_of, solve_adaptively, solve_fixed

LogDensity = Callable[[Tensor], Tensor]


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
        dims: elements of a sample that count: an int, or with a mask an int tensor (B,).
        compaction: see :class:`fmkernels.SampleResult`.
    """

    log_prob: Tensor
    x_0: Tensor
    x_1: Tensor
    delta_log_p: Tensor
    nfe: int
    status: Tensor
    dims: int | Tensor
    compaction: str | None = None

    def bits_per_dim(self, scale: float = 1.0) -> Tensor:
        """(B,): see :func:`bits_per_dim`; of the elements that the mask keeps."""
        if isinstance(self.dims, int):
            return bits_per_dim(self.log_prob, (self.dims,), scale)
        return bits_per_dim(self.log_prob / self.dims, (1,), scale)


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
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise type_error("shape", "a sequence of ints", shape)
    for size in shape:
        check_int("shape", size, low=1)
    dims = math.prod(shape)
    return log_prob * (-1.0 / (dims * math.log(2.0))) + math.log2(scale)


def standard_normal(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """log N(x; 0, 1) of each sample, or of those of its elements that a mask keeps: (B,), float32 (float64 for float64
    data).

    Args:
        x: (B, ...), floating.
        mask: bool, of x's number of dimensions, with x's sizes or 1.
    """
    if x.numel() == 0:
        return torch.zeros(x.shape[0], dtype=compute_dtype(x), device=x.device)
    dims: int | Tensor = math.prod(x.shape[1:])
    if mask is not None:
        x, dims = torch.where(mask, x, 0.0), elements_of(mask, x)
    return -0.5 * row_dots([x], [(0, 0)])[:, 0] - 0.5 * math.log(2.0 * math.pi) * dims


@dataclass(eq=False)
class LikelihoodSettings(FlowSettings):
    """The arguments of :func:`log_prob` and :func:`sample_with_log_prob`."""

    method: str | Method = "dopri5"
    _: KW_ONLY
    log_p0: LogDensity | None = None
    t_0: float = 0.0
    t_1: float = 1.0
    divergence: str = "exact"
    probes: int = 1
    distribution: str = "rademacher"
    fresh: bool = False
    mode: str = "reverse"
    chunk: int | None = None
    gradient: bool = False
    mask: Tensor | None = None
    generator: torch.Generator | None = None
    row_offset: int = 0

    interface = methods.LOG_PROB

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> LikelihoodSettings:
        """Those among arguments by name."""
        return cls(**{f.name: arguments[f.name] for f in fields(cls) if f.init})

    def check(self) -> None:
        super().check()
        check_time("t_0", self.t_0)
        check_time("t_1", self.t_1)
        if self.t_0 >= self.t_1:
            raise value_error("t_1", f"a time after t_0 = {self.t_0:g}", self.t_1)
        if self.time_grid is not None and (self.t_0, self.t_1) != (0.0, 1.0):
            raise ValueError("t_0, t_1, time_grid: expected an interval or the times, whose ends it is, got both")
        if self.log_p0 is not None:
            check_callable("log_p0", "a function from states to log-densities", self.log_p0)
        self.how = Divergence(self.divergence, self.probes, self.distribution, self.mode, self.chunk, "model")
        check_bool("fresh", self.fresh)
        check_bool("gradient", self.gradient)
        if self.generator is not None:
            check_generator(self.generator)
        check_int("row_offset", self.row_offset, low=0)
        if self.mask is not None and (not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool):
            raise type_error("mask", "a bool tensor, True for what counts", self.mask)
        if self.tableau() is None:
            self.fixed_method()  # a wrong name is told here

    def times(self, backward: bool) -> list[Number]:
        """Times from where the solve begins to where it ends."""
        if self.time_grid is not None:
            times = self.grid()
        else:  # in a form that is exact at both ends
            grid = [0.0, 1.0] if self.tableau() is not None else self.grid()
            times = [(1.0 - t) * self.t_0 + t * self.t_1 for t in grid]
        descending = len(times) > 1 and bool(np.all(np.asarray(times[0]) > np.asarray(times[-1])))
        return times[::-1] if len(times) > 1 and descending != backward else times

    def solve(self, x: Tensor, backward: bool, kwargs: dict[str, Any]) -> LogProb:
        mask = None
        if self.mask is not None:
            leading_shape("mask", self.mask, "x_1" if backward else "x_0", x)
            mask = self.mask.reshape(self.mask.shape + (1,) * (x.dim() - self.mask.dim()))
        with_gradient = self.gradient and torch.is_grad_enabled()
        if with_gradient:
            self.check_recorded()
        else:
            check_unrecorded("True", self.gradient)
        with torch.set_grad_enabled(with_gradient):
            return self._solve(x if with_gradient else x.detach(), mask, backward, with_gradient, kwargs)

    def _solve(
        self, x: Tensor, mask: Tensor | None, backward: bool, with_gradient: bool, kwargs: dict[str, Any]
    ) -> LogProb:
        noise = None
        if self.how.method != "exact":
            noise = Noise(draw_seed(x.device, self.generator), row_offset=self.row_offset)
        flow = Flow(self, replace(self.how), noise, self.fresh and noise is not None, with_gradient, mask, kwargs, x)
        times, tableau, compaction = self.times(backward), self.tableau(), None
        self.check_times(shape_of(times), x, "x_1" if backward else "x_0", tokens=False)
        if tableau is None:
            time_dtype = self.time_dtype or compute_dtype(x)
            solution = solve_fixed(flow, self.fixed_method(), times, x, self.time_shape, time_dtype)
        else:
            options, compaction = adaptive_options(self, x, flow.velocity.unknown, record=with_gradient)
            if flow.fresh and compaction == "on":  # a row's probes are those of its place
                options, compaction = replace(options, compact=False), "off: probes are drawn afresh"
            solution = solve_adaptively(flow, tableau, options, times[0], times[-1], x)
        return self._result(x, solution, mask, backward, compaction)

    def _result(
        self, x: Tensor, solution: Solution, mask: Tensor | None, backward: bool, compaction: str | None
    ) -> LogProb:
        x_0, x_1 = (solution.x, x) if backward else (x, solution.x)
        # the integral runs from where the solve began
        delta = solution.integral if backward else -solution.integral
        log_p0 = standard_normal(x_0, mask) if self.log_p0 is None else self.log_p0(x_0.clone())  # its own
        if isinstance(log_p0, Tensor):
            check_float_tensor("log_p0", log_p0)
            check_same_device("log_p0", log_p0, "the samples", delta)
        if not isinstance(log_p0, Tensor) or log_p0.shape != delta.shape:
            raise value_error(
                "log_p0", f"a function from states to log-densities of shape {tuple(delta.shape)}", log_p0
            )
        # what did not reach the other end has no log-density
        reached = solution.status == int(Status.SUCCESS)
        log_prob = torch.where(reached, log_p0.to(delta.dtype) + delta, math.nan)
        dims = math.prod(x.shape[1:]) if mask is None else elements_of(mask, x).long()
        return LogProb(log_prob, x_0, x_1, delta, solution.nfe, solution.status, dims, compaction)


@untraced
def log_prob(
    model: Model,
    x_1: Tensor,
    *,
    log_p0: LogDensity | None = LikelihoodSettings.log_p0,
    method: str | Method = LikelihoodSettings.method,
    steps: int | None = LikelihoodSettings.steps,
    schedule: str | Shift | grids.Schedule = LikelihoodSettings.schedule,
    time_grid: Tensor | np.ndarray | Sequence[float] | None = LikelihoodSettings.time_grid,
    t_0: float = LikelihoodSettings.t_0,
    t_1: float = LikelihoodSettings.t_1,
    path: Path | None = LikelihoodSettings.path,
    prediction: str = LikelihoodSettings.prediction,
    guidance: Rule | None = LikelihoodSettings.guidance,
    rtol: float = LikelihoodSettings.rtol,
    atol: float = LikelihoodSettings.atol,
    controller: Controller | None = LikelihoodSettings.controller,
    max_steps: int = LikelihoodSettings.max_steps,
    compact: Compact = LikelihoodSettings.compact,
    divergence: str = LikelihoodSettings.divergence,
    probes: int = LikelihoodSettings.probes,
    distribution: str = LikelihoodSettings.distribution,
    fresh: bool = LikelihoodSettings.fresh,
    mode: str = LikelihoodSettings.mode,
    chunk: int | None = LikelihoodSettings.chunk,
    gradient: bool = LikelihoodSettings.gradient,
    mask: Tensor | None = LikelihoodSettings.mask,
    generator: torch.Generator | None = LikelihoodSettings.generator,
    row_offset: int = LikelihoodSettings.row_offset,
    time_shape: str = LikelihoodSettings.time_shape,
    time_dtype: torch.dtype | None = LikelihoodSettings.time_dtype,
    batched: Sequence[str] = LikelihoodSettings.batched,
    shared: Sequence[str] = LikelihoodSettings.shared,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> LogProb:
    r"""log p_1(x_1) of a flow model, from data (t = 1) back to noise (t = 0).

    .. math:: \log p_1(x_1) = \log p_0(x_0) - \int_0^1 \operatorname{div} v(x_t, t)\, dt, \quad \dot x_t = v(x_t, t)

    (Chen et al. 2018). A fixed grid gives the log-density of the method's own discretisation of the two equations.

    Args:
        model: any callable model(x, t, **model_kwargs) that returns a tensor of x's shape, whose samples do
            not depend on each other (batch normalisation in evaluation mode).
        x_1: data (B, ...), floating.
        log_p0: the source's log-density, a function from (B, ...) to (B,); the standard normal's if None.
        method: a name or a method object. "dopri5", "tsit5", "dopri8", "bosh3", "fehlberg" and "heun_euler" take
            adaptive steps where ``steps`` is None; Runge-Kutta and Adams methods a fixed grid.
        steps: steps of a fixed grid; 50 if None.
        schedule, time_grid: the fixed grid, as in :func:`fmkernels.sample`: (S + 1,), or (S + 1, B) for times of each
            sample, in either direction. log_p0 is the density at its smallest time, and the result that at its largest:
            where it does not span [0, 1], the density of x_1 as a state of that time. An adaptive method goes from end
            to end of a ``time_grid``, and has no schedule.
        t_0, t_1: the interval that stands for a schedule's [0, 1], 0 <= t_0 < t_1: its time s is
            (1 - s) t_0 + s t_1. Predictions whose velocity is singular at an end need one inside: t_1 < 1 for "x_1".
        path, prediction: what the model predicts, as in :func:`fmkernels.sample`.
        guidance: an object of :mod:`fmkernels.guidance`; the density is that of the guided velocity's flow, a function
            of the state and the time: APG goes without its momentum, CFG-Zero* without its zero-init, and CFG++ raises.
            All branches must be differentiable in x (a classifier's gradient with ``create_graph=True``).
        rtol, atol, controller, max_steps, compact: of an adaptive method, as in :func:`fmkernels.sample`. Each sample's
            error norm is the larger one of its state's and its log-determinant's. What fails has NaN and its status.
        divergence: "exact", one derivative for each dimension at each evaluation, or "hutchinson", one for each probe:
            an unbiased estimate of log p.
        probes, distribution, mode, chunk: see :func:`fmkernels.likelihood.divergence.divergence`.
        fresh: draw probes anew at each evaluation. The default keeps a sample's probes over the solve (as many states
            of memory as there are probes), so that the estimate is the integral of a smooth function (Grathwohl et al.
            2019); fresh ones average over the steps of a fixed grid but leave an adaptive method nothing smooth.
        gradient: record the solve, for derivatives with respect to x_1 and to the model's parameters.
        mask: bool, of a leading part of x_1's shape, e.g. (B, T): True for the elements that count, False for padding,
            which has no density: it stays as it is over the solve and is in no norm, and log_prob is the log-density of
            the other elements, given the padding. ``log_p0``, if given, has to leave it out by itself.
        generator: torch.Generator of the probes' seed.
        row_offset: x_1's place in a larger batch, so that shards draw the probes that the whole would.
        time_shape: the shape of t for the model: "batch", (B,), or "scalar", ().
        time_dtype: of t; float32 (float64 for float64 data) if None.
        batched, shared, model_kwargs: the model's keyword arguments, and which of them have an entry for each sample:
            as in :func:`fmkernels.sample`.

    Returns:
        A :class:`LogProb`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; a method that is not a sum of velocities.
    """
    settings = LikelihoodSettings.of(locals())
    check_state("x_1", x_1)
    return settings.solve(x_1, True, network_kwargs((log_prob,), settings, kwargs, model_kwargs))


@untraced
def sample_with_log_prob(
    model: Model,
    x_0: Tensor | Sequence[int],
    *,
    log_p0: LogDensity | None = LikelihoodSettings.log_p0,
    method: str | Method = LikelihoodSettings.method,
    steps: int | None = LikelihoodSettings.steps,
    schedule: str | Shift | grids.Schedule = LikelihoodSettings.schedule,
    time_grid: Tensor | np.ndarray | Sequence[float] | None = LikelihoodSettings.time_grid,
    t_0: float = LikelihoodSettings.t_0,
    t_1: float = LikelihoodSettings.t_1,
    path: Path | None = LikelihoodSettings.path,
    prediction: str = LikelihoodSettings.prediction,
    guidance: Rule | None = LikelihoodSettings.guidance,
    rtol: float = LikelihoodSettings.rtol,
    atol: float = LikelihoodSettings.atol,
    controller: Controller | None = LikelihoodSettings.controller,
    max_steps: int = LikelihoodSettings.max_steps,
    compact: Compact = LikelihoodSettings.compact,
    divergence: str = LikelihoodSettings.divergence,
    probes: int = LikelihoodSettings.probes,
    distribution: str = LikelihoodSettings.distribution,
    fresh: bool = LikelihoodSettings.fresh,
    mode: str = LikelihoodSettings.mode,
    chunk: int | None = LikelihoodSettings.chunk,
    gradient: bool = LikelihoodSettings.gradient,
    mask: Tensor | None = LikelihoodSettings.mask,
    generator: torch.Generator | None = LikelihoodSettings.generator,
    row_offset: int = LikelihoodSettings.row_offset,
    time_shape: str = LikelihoodSettings.time_shape,
    time_dtype: torch.dtype | None = LikelihoodSettings.time_dtype,
    batched: Sequence[str] = LikelihoodSettings.batched,
    shared: Sequence[str] = LikelihoodSettings.shared,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, LogProb]:
    r"""Samples x_1 from noise x_0 (t = 0 to t = 1), and their log-densities from the same evaluations.

    .. math:: \log p_1(x_1) = \log p_0(x_0) - \int_0^1 \operatorname{div} v(x_t, t)\, dt

    Args:
        model: any callable model(x, t, **model_kwargs).
        x_0: noise (B, ...), floating, drawn from the density ``log_p0``; or a shape, for which standard normal noise is
            drawn, float32 and on the model's device.
        log_p0, method, ...: as in :func:`log_prob`. Where ``mask`` is False the samples stay as x_0 is.

    Returns:
        (x_1, result): the samples, and a :class:`LogProb`.

    Raises:
        TypeError, ValueError: see :func:`log_prob`.
    """
    settings = LikelihoodSettings.of(locals())
    if not isinstance(x_0, Tensor) and log_p0 is not None:
        raise type_error("x_0", "a tensor of samples of log_p0", x_0)
    x_0 = start_state(x_0, model, generator, row_offset)
    result = settings.solve(x_0, False, network_kwargs((sample_with_log_prob,), settings, kwargs, model_kwargs))
    return result.x_1, result
