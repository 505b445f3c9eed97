"""`fm.sample`: from noise to data by any method; `fm.Solver` keeps plans, buffers and graphs between calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...paths import Path
from ...times import Shift
from ..adaptive.controllers import Controller
from ..methods.sde import SDE
from ..programs.builder import Method
from ..programs.draws import Transform
from . import grids
from .result import SampleResult
from .settings import Compact, network_kwargs
from .solver import Callback, Solver
from .velocity import Model, Rule


def sample(
    model: Model,
    x_0: Tensor | Sequence[int],
    *,
    steps: int | None = Solver.steps,
    method: str | Method = Solver.method,
    path: Path | None = Solver.path,
    prediction: str = Solver.prediction,
    guidance: Rule | None = Solver.guidance,
    sde: SDE | None = Solver.sde,
    schedule: str | Shift | grids.Schedule = Solver.schedule,
    time_grid: Tensor | np.ndarray | Sequence[float] | None = Solver.time_grid,
    rtol: float = Solver.rtol,
    atol: float = Solver.atol,
    controller: Controller | None = Solver.controller,
    max_steps: int = Solver.max_steps,
    compact: Compact = Solver.compact,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    noise_transform: Transform | None = None,
    return_trajectory: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    cuda_graph: bool | Literal["auto"] = Solver.cuda_graph,
    gradient: str = Solver.gradient,
    dtype: torch.dtype | None = Solver.dtype,
    device: torch.device | str | None = Solver.device,
    time_shape: str = Solver.time_shape,
    time_dtype: torch.dtype | None = Solver.time_dtype,
    batched: Sequence[str] = Solver.batched,
    shared: Sequence[str] = Solver.shared,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, SampleResult]:
    r"""Solves dx/dt = v(x, t) (or an SDE with the same marginals) from x_0 at t = 0, noise, to t = 1, data.

    Fixed grids run as one program of linear updates, one launch each; adaptive methods control each sample's steps on
    the device.

    Args:
        model: any callable model(x, t, **model_kwargs) that returns a tensor of x's shape, of any floating dtype (as
            under autocast, it is taken in x's): a new one, its own static buffer, x, a parameter. x is a buffer that
            later steps write to, unless gradients are recorded: a model that keeps it must clone it. It must not write
            to x (an error); t is its own.
        x_0: initial states (B, ...), or a shape, for which standard normal noise is drawn.
        steps: steps of a fixed grid; 50 if None. An adaptive method takes adaptive steps where None.
        method: a name or a method object. Fixed grid: "euler", "midpoint", "heun2", "ralston", "heun3", "rk4",
            "rk4_38", "ab2" to "ab4", "am2" to "am4", flow and diffusion solvers ("ddim", "dpmpp_2m", "unipc", ...: see
            :mod:`fmkernels.solvers.methods.registry`). Adaptive where steps is None: "heun_euler", "bosh3", "fehlberg",
            "dopri5", "tsit5", "dopri8".
        path: the probability path, for predictions other than the velocity and for methods that use the schedule;
            CondOT() if None.
        prediction: what the model returns: "velocity", "x_1", "x_0", "score", "v", "edm".
        guidance: an object of :mod:`fmkernels.guidance`.
        sde: an :class:`fmkernels.SDE`, in the place of a method.
        schedule: of a fixed grid: "uniform", "power", "cosine", "log", "karras", an :class:`fmkernels.times.Shift`,
            or any function of the number of steps to its times.
        time_grid: times instead: (S + 1,) strictly monotone, from the start to the end; or (S + 1, B) or
            (S + 1, B, T) for times of each sample or token, of which some may wait: what has no time to pass in a step,
            or in all, stays as it is, bit for bit. Times that differ by rounding alone are equal. With an adaptive
            method its ends are the interval, and its times those of ``trajectory``.
        rtol, atol, controller, max_steps: of an adaptive method; each sample's error norm is kept at 1, see
            :func:`fmkernels.combine`. A sample that reaches ``max_steps`` is returned as it is, with its status.
        generator: torch.Generator of what is drawn.
        row_offset: the first sample's index in a larger batch, so that shards draw what the whole would.
        noise_transform: a function from noise to what is used in its place, in the steps and for an x_0 that is drawn:
            ``fm.MaskedNoise`` for padding, ``fm.ZeroMeanNoise`` for a fixed centre of mass, or any orthogonal
            projection, see :mod:`fmkernels.solvers.methods.noise_transforms`.
        return_trajectory: also return the states at all times.
        callback: called as callback(step, t, x) after each step of a fixed grid; t and x are the callback's own.
        progress: show a bar (needs tqdm).
        cuda_graph: True captures the whole solve of a fixed grid, or the step of an adaptive method, the network
            included, and replays it at the next calls; "auto" does so from the second call with the same model and
            shapes on; False does not. The model is taken for what its arguments, parameters and modes make of it:
            Python numbers that it reads elsewhere are fixed with the capture. Samples of captured adaptive steps do not
            leave the batch when they finish.
        gradient: "none" runs without gradients; "direct" records the solve; "checkpoint" keeps sqrt(steps) states and
            computes the rest again in the backward pass, the network's forward with it (what that counts, as batch
            normalisation in training its statistics, is counted twice). "reversible" takes the steps of
            :mod:`fmkernels.solvers.methods.reversible` (Runge-Kutta methods only, twice the calls) and keeps one state.
            With both the network is called again on the way back: what it reads must be as it was, and a generator of
            its own, which nobody sees, would draw other numbers.
            For the adjoint method see :func:`fmkernels.odeint_adjoint`.
        dtype, device: of the state; x_0's, and for a shape float32 and the model's device, if None.
        time_shape: the shape of t for the model: "batch", (B,), or "scalar", (); with times of each sample or token t
            has their shape, and "scalar" is an error.
        time_dtype: of t; float32 (float64 for a float64 state) if None.
        compact: whether samples of an adaptive method leave the batch when they have finished, for fewer rows in the
            network's calls: False; True (where a half has), a share of the batch at which it shrinks, or "auto", for
            states of at least 1024 elements. Only for a model and a guidance that hold nothing of single samples by
            themselves, as a closure ``lambda x, t: net(x, t, y)``, a cache or a target of some rows do: these would
            meet the rows of others. Of keyword arguments it must be known which follow their samples; else "auto" keeps
            the batch whole and another value is an error. ``result.compaction`` says what was done.
        batched, shared: names of the model's keyword arguments that have an entry for each sample, ``batched=("y",)``,
            and of those that have none, for one call of guidance's branches and for ``compact``. A shape does not tell:
            a context of as many rows as there are samples looks like an argument of theirs. Known without being named:
            what has no dimension of the batch's size, class labels (integers, (B,)) that guidance sets to a number, and
            arrays of guidance scales.
        model_kwargs: keyword arguments handed to the model at each call; those that have none of our names may stand
            by themselves (``y=labels``).

    Note:
        torch.func.vmap maps over x_0 and the model's keyword arguments. With an adaptive method sample i of all entries
        has one step size, by the largest error norm among them. Derivatives within torch.func are those of fixed
        grids with ``gradient="direct"``; adaptive steps have none, an error: see :func:`fmkernels.odeint`.

    Returns:
        (samples, result): x at the last time, and a :class:`SampleResult`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; a keyword argument that resembles one of
            ours and that the model's signature has not; a model output unlike the state.
    """
    solver = Solver(
        model,
        steps,
        method,
        path,  # type: ignore[arg-type]  # None is CondOT()
        prediction,
        guidance,
        sde=sde,
        schedule=schedule,
        time_grid=time_grid,
        rtol=rtol,
        atol=atol,
        controller=controller,  # type: ignore[arg-type]  # None is IController()
        max_steps=max_steps,
        compact=compact,
        batched=batched,
        shared=shared,
        dtype=dtype,
        device=device,
        cuda_graph=cuda_graph,
        gradient=gradient,
        time_shape=time_shape,
        time_dtype=time_dtype,
    )
    given = network_kwargs((sample,), solver, kwargs, model_kwargs) if kwargs or model_kwargs is not None else kwargs
    return solver.run(x_0, generator, row_offset, noise_transform, return_trajectory, callback, progress, given)
