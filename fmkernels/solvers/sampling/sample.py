"""`fm.sample`: from noise to data by any method; `fm.Solver` keeps plans, buffers and graphs between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...paths import CondOT, Path
from ...times import Shift
from ..adaptive.controllers import Controller, IController
from ..programs.builder import Method
from ..programs.draws import Transform
from . import grids
from .result import SampleResult
from .solver import Callback, Solver
from .velocity import Model

_COND_OT, _I_CONTROLLER = CondOT(), IController()


def sample(
    model: Model,
    x_0: Tensor | Sequence[int],
    *,
    steps: int | None = None,
    method: str | Method = "euler",
    path: Path | None = None,
    prediction: str = "velocity",
    guidance: Any = None,
    sde: Any = None,
    schedule: str | Shift | grids.Schedule = "uniform",
    time_grid: Tensor | np.ndarray | Sequence[float] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    controller: Controller | None = None,
    max_steps: int = 10_000,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    noise_transform: Transform | None = None,
    return_trajectory: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    cuda_graph: bool | Literal["auto"] = "auto",
    gradient: str = "none",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    time_shape: str = "batch",
    time_dtype: torch.dtype | None = None,
    **model_kwargs: Any,
) -> tuple[Tensor, SampleResult]:
    r"""Solves dx/dt = v(x, t) (or an SDE with the same marginals) from x_0 at t = 0, noise, to t = 1, data.

    Fixed grids run as one program of linear updates, one launch each; adaptive methods control each sample's steps on
    the device.

    Args:
        model: any callable model(x, t, **model_kwargs) that returns a tensor of x's shape and dtype: a new one, its own
            static buffer, x, a parameter. x is a buffer that later steps write to, unless gradients are recorded: a
            model that keeps it must clone it. It must not write to x (an error); t is its own.
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
        schedule: "uniform", "power", "cosine", "log", "karras", an :class:`fmkernels.times.Shift`, or any function of
            the number of steps to its times.
        time_grid: times instead: (S + 1,) strictly monotone, from the start to the end; or (S + 1, B) or
            (S + 1, B, T) for times of each sample or token, of which some may wait: what has no time to pass in a step,
            or in all, stays as it is, bit for bit. With an adaptive method its ends are the interval, and
            its times those of ``trajectory``.
        rtol, atol, controller, max_steps: of an adaptive method; each sample's error norm is kept at 1, see
            :func:`fmkernels.combine`. A sample that reaches ``max_steps`` is returned as it is, with its status.
        generator: torch.Generator of what is drawn.
        row_offset: the first sample's index in a larger batch, so that shards draw what the whole would.
        noise_transform: a function from noise to what is used in its place, in the steps and for an x_0 that is drawn:
            ``fm.MaskedNoise`` for padding, ``fm.ZeroMeanNoise`` for a fixed centre of mass, or any orthogonal
            projection, see :mod:`fmkernels.solvers.methods.noise_transforms`.
        return_trajectory: also return the states at all times.
        callback: called as callback(step, t, x) after each step of a fixed grid; x is the callback's own copy.
        progress: show a bar (needs tqdm).
        cuda_graph: True captures the whole solve of a fixed grid, or the step of an adaptive method, the network
            included, and replays it at the next calls; "auto" does so from the second call with the same model and
            shapes on; False does not. The model is taken for what its arguments, parameters and modes make of it:
            Python numbers that it reads elsewhere are fixed with the capture. Samples of captured adaptive steps do not
            leave the batch when they finish.
        gradient: "none" runs without gradients; "direct" records the solve; "checkpoint" keeps sqrt(steps) states and
            computes the rest again in the backward pass. "reversible" takes the steps of
            :mod:`fmkernels.solvers.methods.reversible` (Runge-Kutta methods only, twice the calls) and keeps one state.
            For the adjoint method see :func:`fmkernels.odeint_adjoint`.
        dtype, device: of the state; x_0's, and for a shape float32 and the model's device, if None.
        time_shape: the shape of t for the model: "batch", (B,), or "scalar", ().
        time_dtype: of t; float32 (float64 for a float64 state) if None.
        model_kwargs: handed to the model at each call. Those of an adaptive method whose first dimension is the batch
            follow their samples when finished ones leave the batch.

    Returns:
        (samples, result): x at the last time, and a :class:`SampleResult`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; a model output unlike the state.
    """
    solver = Solver(
        model,
        steps=steps,
        method=method,
        path=_COND_OT if path is None else path,
        prediction=prediction,
        guidance=guidance,
        sde=sde,
        schedule=schedule,
        time_grid=time_grid,
        rtol=rtol,
        atol=atol,
        controller=_I_CONTROLLER if controller is None else controller,
        max_steps=max_steps,
        dtype=dtype,
        device=device,
        cuda_graph=cuda_graph,
        gradient=gradient,
        time_shape=time_shape,
        time_dtype=time_dtype,
    )
    return solver.sample(
        x_0,
        generator=generator,
        row_offset=row_offset,
        noise_transform=noise_transform,
        return_trajectory=return_trajectory,
        callback=callback,
        progress=progress,
        **model_kwargs,
    )
