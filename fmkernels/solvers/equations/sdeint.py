"""Stochastic differential equations with additive noise and any drift."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import final

import numpy as np
import torch
from torch import Tensor

from ..._checks import check_choice, check_float_tensor, check_number, type_error, value_error
from ...paths import CondOT
from ...random import as_seed
from ..methods.sde import heun_step
from ..programs.builder import Builder
from ..programs.expressions import ZERO, Expr, Number, as_grid
from ..programs.run import Run
from ..programs.tables import numbers_for

Drift = Callable[[Tensor, Tensor], Tensor]
NoiseLevel = float | Tensor | Callable[[Tensor], Tensor | float]


def sdeint(
    drift: Drift,
    diffusion: NoiseLevel,
    y0: Tensor,
    t: Tensor,
    *,
    method: str = "euler",
    dt: float | None = None,
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
) -> Tensor:
    r"""Solves dy = f(t, y) dt + g(t) dW, the components of W independent, as torchsde's function of this name does.

    "euler" is Euler-Maruyama, :math:`y + h f + g \sqrt h z`: one call a step, strong and weak order 1 for additive
    noise. "heun" is the trapezoidal rule of the drift with that step as its predictor and one noise for both, of the
    mean variance: two calls, weak order 2, strong order 1. The noise is drawn in the kernel that adds it.

    Gradients flow through the solve (discretise, then optimise) where they are enabled; else no step allocates.

    Args:
        drift: f(t, y), t a 0-dim tensor of y0's dtype (float32 for half precision), y of y0's shape.
        diffusion: g: a number, a tensor that broadcasts to y0's shape (diagonal noise), or a function of the time, a
            0-dim float64 tensor on y0's device, that returns one of these.
        y0: the initial state, shape (B, ...), floating.
        t: increasing times, shape (T,).
        method: "euler" or "heun".
        dt: the longest step between two of the times, > 0; None takes one step an interval.
        seed: of the noise (see :func:`fmkernels.draw_seed`); drawn from ``generator`` if None.
        generator: torch's default one if None.
        row_offset: the index of the first sample in the whole batch: shards draw what the whole batch would.

    Returns:
        The states at the times, shape (T, \*y0), the first being y0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    if not callable(drift):
        raise type_error("drift", "a function f(t, y)", drift)
    check_float_tensor("y0", y0)
    check_choice("method", method, ("euler", "heun"))
    if dt is not None:
        check_number("dt", dt, above=0.0)
    times = as_grid(t)
    if any(isinstance(time, np.ndarray) for time in times):
        raise value_error("t", "one dimension", t)
    if len(times) > 1 and times[1] < times[0]:  # type: ignore[operator]
        raise value_error("t", "increasing times: the noise of a step against time has no meaning", t)
    seeds = as_seed(seed, y0.device, generator)
    grid, stops = _subdivide([float(time) for time in times], dt)
    builder = Builder(grid, CondOT())  # linear expressions in the drift's values: no path is asked for anything
    builder.output("y", builder.x)
    AdditiveNoise(diffusion, method, stops, y0)(builder)
    program = builder.program()
    dtype = torch.float64 if y0.dtype == torch.float64 else torch.float32
    run = Run(
        program,
        {"": lambda y, time: drift(time, y)},
        y0,
        numbers_for(program, y0, dtype, "scalar", keep=False),  # the program is this call's own
        seed=seeds,
        row_offset=row_offset,
        reuse=not torch.is_grad_enabled(),
    )
    run.all()
    return torch.stack(run.extras()["y"])


def _subdivide(times: list[float], dt: float | None) -> tuple[list[Number], set[int]]:
    """The grid with steps of at most dt, and which of its steps end at a wanted time."""
    grid: list[Number] = [times[0]]
    stops = set()
    for start, end in itertools.pairwise(times):
        # times in float32 may make a whole number of steps a rounding error more
        count = 1 if dt is None else max(1, math.ceil((end - start) / dt * (1.0 - 1e-6)))
        grid += [start + (end - start) * (i / count) for i in range(1, count)]
        grid.append(end)
        stops.add(len(grid) - 2)
    return grid, stops


@final
class AdditiveNoise:
    """The method of :func:`sdeint`."""

    def __init__(self, diffusion: NoiseLevel, method: str, stops: set[int], y0: Tensor) -> None:
        self.diffusion, self.heun, self.stops, self.y0 = diffusion, method == "heun", stops, y0

    def __call__(self, builder: Builder) -> None:
        for step in builder.steps():
            t, u = float(step.t), float(step.u)
            h, x, noise = u - t, builder.x, builder.noise()
            g = self._level(t)
            if self.heun:
                g_u = self._level(u) if callable(self.diffusion) else g
                mean = torch.sqrt(0.5 * (g.square() + g_u.square())) if callable(self.diffusion) else g
                builder.advance(
                    heun_step(
                        builder,
                        lambda y, t=t, h=h: h * builder.evaluate(y, t),  # type: ignore[misc]
                        lambda y, u=u, h=h: h * builder.evaluate(y, u),  # type: ignore[misc]
                        x,
                        self._noise(builder, noise, g, h),
                        self._noise(builder, noise, mean, h),
                    )
                )
            else:
                builder.advance(x + h * builder.evaluate(x, t) + self._noise(builder, noise, g, h))
            if step.number in self.stops:
                builder.output("y", builder.x)

    def _level(self, t: float) -> Tensor:
        """g at time t, a tensor."""
        g = self.diffusion
        if callable(g):
            g = g(torch.tensor(t, dtype=torch.float64, device=self.y0.device))
        if isinstance(g, Tensor):
            shape = self.y0.shape
            if g.dim() > len(shape) or any(a not in (1, b) for a, b in zip(g.shape[::-1], shape[::-1], strict=False)):
                raise value_error("diffusion", f"a tensor that broadcasts to y0's shape, {tuple(shape)}", g)
            return g
        check_number("diffusion", g)
        return torch.tensor(float(g), dtype=torch.float64)

    def _noise(self, builder: Builder, noise: Expr, g: Tensor, h: float) -> Expr:
        """g sqrt(h) z: one more term of the update where g is a number."""
        if g.dim() == 0 and not g.requires_grad:
            return ZERO if g == 0.0 else math.sqrt(h) * float(g) * noise
        (scaled,) = builder.compute(lambda z: ((g * math.sqrt(h)).to(z) * z,), [noise], 1)
        return scaled
