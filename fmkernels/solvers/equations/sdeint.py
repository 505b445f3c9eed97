"""Stochastic differential equations with any drift and any noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ..._checks import (
    check_choice,
    check_float_tensor,
    check_function,
    check_has_values,
    check_int,
    check_number,
    type_error,
    value_error,
)
from ..._torch import transform_active, untraced
from ...ops._operands import compute_dtype
from ...ops.random.op import randn
from ...paths import CondOT
from ...random import as_seed
from ..methods.sde import heun_step
from ..programs.builder import Builder
from ..programs.draws import Draw, Transform, check_transform, transformed
from ..programs.expressions import ZERO, Expr, Number, as_grid
from ..programs.ownership import reading
from ..programs.run import Run
from ..programs.tables import numbers_for

Drift = Callable[[Tensor, Tensor], Tensor]
NoiseLevel = float | Tensor | Callable[..., Tensor | float]

NOISES = ("additive", "diagonal", "matrix")
CALCULI = ("ito", "stratonovich")
# The methods of a kind of noise and a calculus, which agree where the noise does not depend on the state.
METHODS: dict[tuple[str, str], tuple[str, ...]] = {
    ("additive", "ito"): ("euler", "heun"),
    ("additive", "stratonovich"): ("euler", "heun"),
    ("diagonal", "ito"): ("euler", "milstein"),
    ("diagonal", "stratonovich"): ("heun", "midpoint", "milstein"),
    ("matrix", "ito"): ("euler",),
    ("matrix", "stratonovich"): ("heun", "midpoint"),
}


@untraced
def sdeint(
    drift: Drift,
    diffusion: NoiseLevel,
    y0: Tensor,
    t: Tensor,
    *,
    method: str | None = None,
    noise: str = "additive",
    calculus: str = "ito",
    dt: float | None = None,
    seed: Tensor | int | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    noise_transform: Transform | None = None,
) -> Tensor:
    r"""Solves dy = f(t, y) dt + g dW, as torchsde's function of this name does.

    ========== ======================================== ============= =================== =========================
    noise      g                                        calculus      methods             strong, weak order
    ========== ======================================== ============= =================== =========================
    additive   a number, a tensor that broadcasts to    either        euler               1, 1
               y0's shape, or a function g(t) to one                  heun                1, 2
    diagonal   g(t, y), of y's shape: element i has     ito           euler               1/2, 1
               noise g_i dW_i of its own                              milstein            1, 1
                                                        stratonovich  heun, midpoint      1, 1
                                                                      milstein            1, 1
    matrix     g(t, y), (\*y's shape, m): sample b has  ito           euler               1/2, 1
               noise sum_j g_ij dW_j, m of its own      stratonovich  heun, midpoint      1/2, 1 (1, 1 where the noise
                                                                                          commutes, e.g. m = 1)
    ========== ======================================== ============= =================== =========================

    "euler" is Euler-Maruyama, :math:`y + h f + g \Delta W`. "milstein" adds :math:`\frac{1}{2} g g' (\Delta W^2 - h)`
    (Stratonovich: without h), g' being the derivative of g_i by y_i, which is all that g_i may depend on (Kloeden and
    Platen 1992, sec. 10.3). "heun" takes the mean of both ends of f and g, the far one at y + h f + g dW (Rumelin
    1982); with additive noise g dW is one term, of the mean variance. "midpoint" takes f and g at
    :math:`y + \frac{1}{2} (h f + g \Delta W)`. "euler" and "milstein" call f and g once a step, the others twice;
    "milstein" looks whether g needs a gradient by a call more, where gradients are enabled and y has none.

    Gradients flow through the solve (discretise, then optimise) where they are enabled; else no step of the drift
    allocates.

    Args:
        drift: f(t, y), t a 0-dim tensor of y0's dtype (float32 for half precision), y of y0's shape.
        diffusion: g, see above; t is a 0-dim tensor on y0's device, for g(t) float64, for g(t, y) as for the drift.
        y0: the initial state, shape (B, ...), floating.
        t: increasing times, shape (T,), without a gradient.
        method: see above; the first of its kind if None.
        noise: "additive", "diagonal" or "matrix".
        calculus: "ito" or "stratonovich": the sense of g dW.
        dt: the longest step between two of the times, > 0; None takes one step an interval.
        seed: of the noise (see :func:`fmkernels.draw_seed`); drawn from ``generator`` if None. Step n draws stream n:
            ``fm.randn(y0.shape, seed=seed, stream=n)``, or (B, m).
        generator: torch's default one if None.
        row_offset: the index of the first sample in the whole batch: shards draw what the whole batch would.
        noise_transform: from the noise z = dW / sqrt(h) to what is used in its place, e.g. an ``fm.MaskedNoise``.

    Returns:
        The states at the times, shape (T, \*y0), the first being y0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    check_function("drift", drift, "a function f(t, y)")
    check_float_tensor("y0", y0)
    if y0.dim() == 0:
        raise value_error("y0", "at least one dimension, of samples", y0)
    check_choice("noise", noise, NOISES)
    check_choice("calculus", calculus, CALCULI)
    if isinstance(diffusion, Tensor) and noise == "additive":
        check_has_values("diffusion", diffusion)
        if diffusion.is_complex() or not bool(diffusion.isfinite().all()):
            raise value_error("diffusion", "finite real numbers", diffusion)
    elif noise != "additive" or isinstance(diffusion, type):
        check_function("diffusion", diffusion, f"a function g(t, y) with {noise} noise")
    choices = METHODS[noise, calculus]
    method = choices[0] if method is None else method
    if method not in choices:
        check_choice("method", method, choices)
    if dt is not None:
        check_number("dt", dt, above=0.0)
    check_int("row_offset", row_offset, low=0)
    check_transform(noise_transform)
    seeds = as_seed(seed, y0.device, generator)
    grid, stops = _subdivide(_times(t), dt)
    builder = Builder(grid, CondOT())  # linear expressions in the drift's values: no path is asked for anything
    builder.output("y", builder.x)
    if noise == "additive":
        AdditiveNoise(diffusion, method, stops, y0)(builder)
    else:
        StateNoise(Level(diffusion, noise == "matrix"), method, calculus, stops)(builder)  # type: ignore[arg-type]
    program = builder.program()
    run = Run(
        program,
        {"": reading("drift", drift, time_first=True)},
        y0,
        numbers_for(program, y0, compute_dtype(y0), "scalar", keep=False),  # the program is this call's own
        seed=seeds,
        row_offset=row_offset,
        noise_transform=noise_transform,
        reuse=not torch.is_grad_enabled(),
        lends=True,
    )
    run.function_name = "drift"
    run.all()
    return torch.stack(run.extras()["y"])


def _times(t: Any) -> list[float]:
    if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
        raise value_error("t", "times without a gradient (there is none for them)", t)
    times = as_grid(t, name="t", unit=0.0)
    if any(isinstance(time, np.ndarray) for time in times):
        raise value_error("t", "one dimension", t)
    if len(times) > 1 and times[1] < times[0]:
        raise value_error("t", "increasing times: the noise of a step against time has no meaning", t)
    return [float(time) for time in times]


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


# ---------------------------------------------------------------------- noise that does not depend on the state


@final
class AdditiveNoise:
    """The methods for g(t)."""

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
            g = g(torch.full((), t, dtype=torch.float64, device=self.y0.device))
        if isinstance(g, Tensor):
            shape = self.y0.shape
            if g.dim() > len(shape) or any(a not in (1, b) for a, b in zip(g.shape[::-1], shape[::-1], strict=False)):
                raise value_error("diffusion", f"a tensor that broadcasts to y0's shape, {tuple(shape)}", g)
            return g
        check_number("diffusion", g)
        return torch.tensor(float(g), dtype=torch.float64, device="cpu")

    def _noise(self, builder: Builder, noise: Expr, g: Tensor, h: float) -> Expr:
        """g sqrt(h) z: one more term of the update where g is a number."""
        if g.dim() == 0 and not g.requires_grad:
            return ZERO if g == 0.0 else math.sqrt(h) * float(g) * noise

        def scaled(draw: Draw) -> tuple[Tensor]:
            z = draw.tensor()
            return (((g * math.sqrt(h)).to(z) * z).to(draw.like.dtype),)

        (term,) = builder.compute(scaled, [noise], 1)
        return term


# ---------------------------------------------------------------------- noise that depends on the state


@final
@dataclass(frozen=True)
class Level:
    """g(t, y), and its product with the noise.

    Args:
        function: g.
        matrix: whether it has a dimension of noises behind y's.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    matrix: bool

    def at(self, t: float, y: Tensor) -> Tensor:
        """g, checked, in the dtype of sums."""
        dtype = compute_dtype(y)
        g = reading("diffusion", self.function, time_first=True)(y, torch.full((), t, dtype=dtype, device=y.device))
        if not isinstance(g, Tensor) or not g.is_floating_point():
            raise type_error("diffusion(t, y)", "a floating tensor", g)
        if self.matrix:
            if g.dim() != y.dim() + 1 or g.shape[:-1] != y.shape:
                raise value_error("diffusion(t, y)", f"y's shape and a dimension of noises, {(*y.shape, 'm')}", g)
        elif g.shape != y.shape:
            raise value_error("diffusion(t, y)", f"y's shape, {tuple(y.shape)}", g)
        if g.device != y.device:
            raise value_error("diffusion(t, y)", f"a tensor on {y.device}", g)
        return g.to(dtype)

    def noise(self, draw: Draw, g: Tensor) -> Tensor:
        """z, of g's kind."""
        if not self.matrix:
            return draw.tensor()
        stream, shape = draw.noise, (g.shape[0], g.shape[-1])
        z = randn(
            shape,
            seed=stream.seed,
            stream=stream.stream,
            row_offset=stream.row_offset,
            dtype=g.dtype,
            device=g.device,
        )
        return transformed(draw.transform, z)

    def times(self, g: Tensor, z: Tensor) -> Tensor:
        """g z."""
        if not self.matrix:
            return g * z
        return (g.flatten(1, -2) @ z[..., None]).reshape(g.shape[:-1]) if g.dim() > 2 else (g * z).sum(-1)

    def with_slope(self, t: float, y: Tensor) -> tuple[Tensor, Tensor]:
        """g and g g' of a diagonal g, with a gradient where y or what g uses has one."""
        if transform_active():  # which would not see how g' depends on anything
            raise RuntimeError(
                "sdeint: method 'milstein' with noise='diagonal' does not run within torch.func's transforms (vmap, "
                "grad, jacrev, jvp, ...) and forward-mode AD; take 'euler', 'heun' or 'midpoint', or torch.autograd"
            )
        recorded = torch.is_grad_enabled() and (y.requires_grad or self.at(t, y).requires_grad)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = y if recorded and y.requires_grad else y.detach().clone().requires_grad_()
            g = self.at(t, leaf)
            slope = None
            if g.requires_grad:
                weights = g if recorded else g.detach()
                (slope,) = torch.autograd.grad(g, leaf, weights, create_graph=recorded, allow_unused=True)
        g = g if recorded else g.detach()
        return g, torch.zeros_like(g) if slope is None else slope.to(g.dtype)


@final
class StateNoise:
    """The methods for g(t, y)."""

    def __init__(self, level: Level, method: str, calculus: str, stops: set[int]) -> None:
        self.level, self.method, self.stops = level, method, stops
        self.ito = calculus == "ito"

    def __call__(self, builder: Builder) -> None:
        take = {"euler": self._euler, "milstein": self._milstein, "heun": self._heun, "midpoint": self._midpoint}
        for step in builder.steps():
            t, u = float(step.t), float(step.u)
            builder.advance(take[self.method](builder, builder.x, t, u, builder.noise()))
            if step.number in self.stops:
                builder.output("y", builder.x)

    def _noise(self, builder: Builder, x: Expr, t: float, h: float, noise: Expr) -> Expr:
        """g(t, x) dW."""
        level = self.level

        def product(y: Tensor, draw: Draw) -> tuple[Tensor]:
            g = level.at(t, y)
            return ((math.sqrt(h) * level.times(g, level.noise(draw, g))).to(y.dtype),)

        (term,) = builder.compute(product, [x, noise], 1)
        return term

    def _euler(self, builder: Builder, x: Expr, t: float, u: float, noise: Expr) -> Expr:
        return x + (u - t) * builder.evaluate(x, t) + self._noise(builder, x, t, u - t, noise)

    def _milstein(self, builder: Builder, x: Expr, t: float, u: float, noise: Expr) -> Expr:
        level, h, less = self.level, u - t, 1.0 if self.ito else 0.0

        def terms(y: Tensor, draw: Draw) -> tuple[Tensor]:
            g, slope = level.with_slope(t, y)
            z = draw.tensor()
            return ((math.sqrt(h) * g * z + (0.5 * h) * slope * (z * z - less)).to(y.dtype),)

        f = builder.evaluate(x, t)
        (term,) = builder.compute(terms, [x, noise], 1)
        return x + h * f + term

    def _heun(self, builder: Builder, x: Expr, t: float, u: float, noise: Expr) -> Expr:
        first = (u - t) * builder.evaluate(x, t) + self._noise(builder, x, t, u - t, noise)
        end = builder.keep(x + first)
        second = (u - t) * builder.evaluate(end, u) + self._noise(builder, end, u, u - t, noise)
        return x + 0.5 * first + 0.5 * second

    def _midpoint(self, builder: Builder, x: Expr, t: float, u: float, noise: Expr) -> Expr:
        half = t + 0.5 * (u - t)
        first = (u - t) * builder.evaluate(x, t) + self._noise(builder, x, t, u - t, noise)
        middle = builder.keep(x + 0.5 * first)
        return x + (u - t) * builder.evaluate(middle, half) + self._noise(builder, middle, half, u - t, noise)
