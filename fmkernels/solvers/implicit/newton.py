r"""Steps of implicit Runge-Kutta methods: Newton's iteration for stages, and their gradients.

Stages that are solved together, a block, are :math:`z = h (A \otimes I) f(t, g + z)` for what z adds to g, which the
stages before them make. A diagonally implicit method has a block for each stage, a fully implicit one has one block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..methods.implicit_tableaus import ImplicitTableau
from ..methods.runge_kutta import combination, inside, stage_time
from .system import Factors, Stage, System, factorise, linear_solve, rms

_NEWTON_TOLERANCE = 0.01  # of the error tolerance
_SIMPLIFIED_ITERATIONS = 8
FULL_ITERATIONS = 50


@dataclass
class Point:
    """Where the rows stand.

    Attributes:
        y: (R, N).
        t: (R,) float64; carries a gradient where t does.
        k: the derivative there where the last step has found it, else None.
        jacobian: there, (R, N, N), or None where not yet made; with it f.
    """

    y: Tensor
    t: Tensor
    k: Tensor | None = None
    jacobian: Tensor | None = None
    f: Tensor | None = None


@dataclass
class Attempt:
    """A step.

    Attributes:
        y: (R, N) at its end.
        k: its stages.
        ok: (R,) whether all of them converged.
        factors: of I - h (A x J), of the last block.
    """

    y: Tensor
    k: list[Tensor]
    ok: Tensor
    factors: Factors


@final
class _Block:
    """z = h (A x I) f(t, base + z) with z (R, S, N), of S stages.

    Args:
        times: (R,) of each stage.
        base: (R, S, N).
        a: (S, S).
        h: (R, 1).
    """

    def __init__(self, system: System, times: Sequence[Tensor], base: Tensor, a: Tensor, h: Tensor) -> None:
        self.system, self.times, self.base, self.a, self.h = system, times, base, a, h
        self.scaled = h[:, :, None] * a  # (R, S, S)

    def values(self, state: Tensor) -> Tensor:
        """f at states (R, S, N)."""
        return torch.stack([self.system(t, y) for t, y in zip(self.times, state.unbind(1), strict=True)], 1)

    def image(self, values: Tensor) -> Tensor:
        return self.scaled @ values

    def derivatives(self, z: Tensor) -> Tensor:
        """The k of which z is h A k; rows of step 0 get 0 / 1."""
        h = torch.where(self.h == 0.0, 1.0, self.h)[:, :, None]
        return z / (self.a * h) if self.a.numel() == 1 else torch.linalg.solve(self.a, z) / h

    def matrix(self, jacobians: Sequence[Tensor], *, by_row: bool = False) -> Tensor:
        """(R, S N, S N), I - h a_ij J_j, or with J_i ``by_row``."""
        stages, size = len(self.times), self.base.shape[-1]
        if stages == 1:
            return self.system.matrix(self.scaled[:, 0], jacobians[0])
        j = torch.stack(tuple(jacobians), 1)
        products = self.scaled[..., None, None] * (j[:, :, None] if by_row else j[:, None])
        whole = products.permute(0, 1, 3, 2, 4).reshape(-1, stages * size, stages * size)
        return torch.eye(stages * size, dtype=whole.dtype, device=whole.device) - whole

    def change(self, z: Tensor, values: Tensor, factors: Factors) -> Tensor:
        return linear_solve(factors, (self.image(values) - z).flatten(1)).reshape(z.shape)


class Stepper:
    """Steps of a method; ``gradient`` records those that are taken.

    Attributes:
        full_newton: what the simplified iteration cannot solve is tried with a Jacobian an iteration.
        perturb: the field sees the ends of a step from inside the step: the next numbers of the state's dtype.
    """

    full_newton = False
    perturb = False

    def __init__(self, system: System, tableau: ImplicitTableau, gradient: bool) -> None:
        self.system, self.tableau, self.gradient = system, tableau, gradient
        dtype, device = system.dtype, system.eye.device
        self._blocks: list[tuple[tuple[int, ...], Tensor]] = []
        for block in tableau.blocks:
            rows = [tableau.a[i][block[0] : block[-1] + 1] for i in block]
            self._blocks.append((block, torch.tensor(rows, dtype=dtype, device=device)))

    def stage_time(self, t: Tensor, u: Tensor, c: float) -> Tensor:
        if self.perturb and c in (0.0, 1.0):
            time = inside(t, u, self.system.dtype) if c == 0.0 else inside(u, t, self.system.dtype)
        else:
            time = stage_time(t, u, c)
        assert isinstance(time, Tensor)
        return time

    def linearise(self, point: Point, u: Tensor) -> None:
        """Gives the point its derivative and Jacobian, where it has none yet."""
        if point.jacobian is None:
            time = self.stage_time(point.t.detach(), u.detach(), 0.0)
            point.f, point.jacobian = self.system.linearise(time, point.y.detach())

    @torch.no_grad()
    def attempt(self, point: Point, u: Tensor) -> Attempt:
        """A step to u, without a graph; rows with u = t stay."""
        system, tableau = self.system, self.tableau
        y, t = point.y.detach(), point.t.detach()
        self.linearise(point, u)
        assert point.jacobian is not None
        h = (u - t).to(y.dtype)[:, None]
        active = h[:, 0] != 0.0
        ok = torch.ones_like(active)
        ks: list[Tensor] = []
        factors: dict[float, Factors] = {}
        state = y
        for numbers, a in self._blocks:
            first, diagonal = numbers[0], float(a[0, 0])
            base = torch.stack([combination(y, h, tableau.a[i][:first], ks) for i in numbers], 1)
            times = [self.stage_time(t, u, tableau.c[i]) for i in numbers]
            if len(numbers) == 1 and diagonal == 0.0:
                # a watched field shows its gradient where y has none
                known = (None if system.watching else point.f) if point.k is None else point.k.detach()
                state = base[:, 0]
                ks.append(known if not ks and known is not None else system(times[0], state))
                continue
            block = _Block(system, times, base, a, h)
            if diagonal not in factors:
                factors[diagonal] = factorise(block.matrix([point.jacobian] * len(numbers)))
            # the last stage's state is near where it is the only one before
            start = state[:, None] - base if len(numbers) == 1 else torch.zeros_like(base)
            z, converged = self._newton(block, start, active & ok, factors[diagonal])
            if self.full_newton and not bool((converged | ~ok | ~active).all()):
                failed = active & ok & ~converged
                again, rescued = self._newton(block, start, failed, None)
                z, converged = torch.where(failed[:, None, None], again, z), converged | rescued
            ok = ok & (converged | ~active)
            ks += torch.where(active[:, None, None], block.derivatives(z), 0.0).unbind(1)
            state = (base + z)[:, -1]
        y1 = state if tableau.stiffly_accurate else combination(y, h, tableau.b, ks)
        return Attempt(torch.where(active[:, None], y1, y), ks, ok, factors[float(self._blocks[-1][1][0, 0])])

    def _newton(self, block: _Block, z: Tensor, rows: Tensor, factors: Factors | None) -> tuple[Tensor, Tensor]:
        """Solves a block for the given rows from a first guess: z, and which rows have converged.

        Without factors the Jacobians are made at each iterate.
        """
        system, base = self.system, block.base
        running, converged = rows, torch.zeros_like(rows)
        before = None
        for _ in range(_SIMPLIFIED_ITERATIONS if factors is not None else FULL_ITERATIONS):
            state = base + z
            if factors is None:
                parts = [system.linearise(t, y) for t, y in zip(block.times, state.unbind(1), strict=True)]
                values = torch.stack([f for f, _ in parts], 1)
                change = block.change(z, values, factorise(block.matrix([jacobian for _, jacobian in parts])))
            else:
                change = block.change(z, block.values(state), factors)
            z = torch.where(running[:, None, None], z + change, z)
            magnitude = torch.maximum(base.abs(), state.abs())
            rounding = 4.0 * system.epsilon * magnitude.amax((1, 2), keepdim=True)
            size = rms((change / (_NEWTON_TOLERANCE * system.tolerance_of(magnitude) + rounding)).flatten(1))
            # the rest of a geometric series, once its rate is known
            rate = 0.5 * torch.ones_like(size) if before is None else size / before
            left = torch.where(rate < 1.0, size * rate / (1.0 - rate), math.inf)
            enough = left <= 1.0
            if before is not None:
                enough |= torch.maximum(size, before) <= 1.0  # both are rounding errors
            hopeless = ~size.isfinite()
            if factors is not None:
                hopeless |= rate > 2.0
            converged = converged | (running & enough)
            running = running & ~enough & ~hopeless
            if not bool(running.any()):
                break
            before = size
        return z, converged

    def moved(self, point: Point, attempt: Attempt, u: Tensor, accept: Tensor) -> Point:
        """Where the rows stand after a step that some of them accept; u = t for the others."""
        y1, k = self._attached(point, attempt, u, accept) if self.gradient else (attempt.y, attempt.k)
        column = accept[:, None]
        last = torch.where(column, k[-1], k[0]) if self.tableau.first_same_as_last and not self.perturb else None
        return Point(torch.where(column, y1, point.y), u, last)

    def _attached(self, point: Point, attempt: Attempt, u: Tensor, accept: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The accepted rows' step again, as a function of where it began, of its times and of what the field uses.

        The other rows take a step of size 0, whose derivatives are finite.
        """
        system, tableau = self.system, self.tableau
        h = (u - point.t).to(point.y.dtype)[:, None]
        ks: list[Tensor] = []
        for numbers, a in self._blocks:
            first = numbers[0]
            times = [self.stage_time(point.t, u, tableau.c[i]) for i in numbers]
            bases = [combination(point.y, h, tableau.a[i][:first], ks) for i in numbers]
            if len(numbers) == 1 and float(a[0, 0]) == 0.0:
                ks.append(system(times[0], bases[0]) if ks or point.k is None else point.k)
                continue
            found = [torch.where(accept[:, None], attempt.k[i], 0.0) for i in numbers]
            parts = []
            for i, time, base in zip(numbers, times, bases, strict=True):
                state = combination(base, h, tableau.a[i][first:], found)
                parts.append(system.linearise(time, state, graph=True))
            block = _Block(system, times, torch.stack(bases, 1).detach(), a, h.detach())
            matrix = block.matrix([jacobian for _, jacobian in parts], by_row=True)
            solved = Stage.apply(torch.cat([f for f, _ in parts], 1), torch.cat(found, 1), matrix)
            ks += solved.split(point.y.shape[1], 1)
        return combination(point.y, h, tableau.b, ks), ks
