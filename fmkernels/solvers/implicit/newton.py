r"""Diagonally implicit Runge-Kutta methods for stiff fields and small states.

A stage's state :math:`Z = g + h a_{ii} f(t_i, Z)`, with g from the stages before it, is found by Newton's iteration on
z = Z - g with the Jacobian J of the step's beginning (simplified Newton; Hairer and Wanner 1996, IV.8):

.. math:: (I - h a_{ii} J)\, \Delta z = h a_{ii} f(t_i, g + z) - z,

and its derivative is k = z / (h a_ii), which does not multiply what is left of the iteration by J as f(Z) would. It has
converged where the root mean square of the expected remainder over atol + rtol |y| is at most 0.01. J is dense, made by
one call of the field and as many (batched) backward passes as the state has components.

Gradients need no record of the iteration. By the implicit function theorem, at the solution

.. math:: \mathrm dk = (I - h a_{ii} J)^{-1}\, \mathrm df

for what f(t_i, g + h a_ii k) depends on besides k: a linear solve with the transposed matrix in the backward pass.

The host looks at each iteration's convergence: unlike the explicit solvers these wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..._checks import check_number
from ...ops.step_control.op import Clock, Count, Rules, Status, new_state, step_control
from ..adaptive.options import STEP_CONTROL, AdaptiveOptions, step_control_arguments
from ..adaptive.solve import warn_of_failures
from ..methods.implicit_tableaus import IMPLICIT_TABLEAUS, ImplicitTableau
from .system import Factors, Field, Norm, Stage, System, factorise, linear_solve, rms

FIXED_OPTIONS = ("step_size", "per_sample")
ADAPTIVE_OPTIONS = ("per_sample", *STEP_CONTROL)
_NEWTON_TOLERANCE = 0.01  # of the error tolerance
_SIMPLIFIED_ITERATIONS = 8
_FULL_ITERATIONS = 50
_NOT_CONVERGED = 1e10  # the error norm of such a step: any that makes the next one smaller


def option_names(method: str, options: dict[str, Any]) -> tuple[str, ...]:
    """The options that a method has."""
    return ADAPTIVE_OPTIONS if is_adaptive(IMPLICIT_TABLEAUS[method], options) else FIXED_OPTIONS


def is_adaptive(tableau: ImplicitTableau, options: dict[str, Any]) -> bool:
    return tableau.error is not None and options.get("step_size") is None


def solve_implicit(
    field: Field,
    y0: Tensor,
    t: Tensor,
    method: str,
    options: dict[str, Any] | None = None,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    norm: Norm | None = None,
) -> Tensor:
    """Solves dy/dt = field(t, y), y(t[0]) = y0, at the times t, each of which ends a step.

    A method with an error estimate controls its steps unless ``step_size`` is given: a step whose Newton iteration does
    not converge is tried again with a smaller size. First derivatives flow to y0, t and what the field uses; a second
    differentiation is an error.

    Args:
        field: (t, y) to a tensor like y; t is 0-dim in y's dtype, or (B,) with ``per_sample``.
        y0: float32 or float64 of any shape, of at most MAX_SIZE = 2048 elements; with ``per_sample`` (B, ...) of at
            most as many elements a sample.
        t: (T,) strictly monotone.
        method: one of IMPLICIT.
        options: per_sample=True says that each index of dimension 0 has a derivative of its own state alone: the
            Jacobians are then (B, D, D) in place of (B D, B D), and each sample has its own step sizes and error
            control. A field of which that is not true gets wrong gradients. step_size: the largest step size; without
            it, and without an error estimate, the steps go from one of the times t to the next. With step control:
            first_step, min_step, max_step, max_num_steps, safety, ifactor, dfactor or controller, norm.
        rtol, atol: tolerances of the error and of Newton's iteration; rtol is at least 100 times the dtype's epsilon.
        norm: of the tensor of error ratios, to (), or to (B,) with ``per_sample``; None for the root mean square.

    Returns:
        (T, *y0.shape). Where step control fails a warning tells, and the times not reached are NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value, or an output of the field unlike y.
        RuntimeError: a fixed step that cannot be solved, or failed step control where a gradient is wanted.
    """
    tableau, options = IMPLICIT_TABLEAUS[method], dict(options or {})
    system = System(field, y0, bool(options.get("per_sample", False)), rtol, atol, norm)
    if t.shape[0] == 1 or y0.numel() == 0:
        return y0.expand(t.shape[0], *y0.shape).clone()
    gradient = system.needs_gradient(t, y0)
    solve = _Adaptive if is_adaptive(tableau, options) else _Fixed
    rows = solve(system, tableau, gradient).run(y0.reshape(system.rows, system.size), t, options)
    return rows.reshape(t.shape[0], *y0.shape)


@dataclass
class _Point:
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
class _Attempt:
    """A step.

    Attributes:
        y: (R, N) at its end.
        k: its stages.
        ok: (R,) whether all of them converged.
        factors: of I - h a J, of the last stage.
    """

    y: Tensor
    k: list[Tensor]
    ok: Tensor
    factors: Factors


class _Solve:
    """What solves with fixed and with controlled steps have in common: the step."""

    full_newton = False  # whether what the simplified iteration cannot solve is tried with a Jacobian an iteration

    def __init__(self, system: System, tableau: ImplicitTableau, gradient: bool) -> None:
        self.system, self.tableau, self.gradient = system, tableau, gradient

    def run(self, y0: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor:
        """(T, R, N)."""
        raise NotImplementedError

    def stage_time(self, t0: Tensor, t1: Tensor, c: float) -> Tensor:
        return t1 if c == 1.0 else t0 + c * (t1 - t0)

    def solution(self, y: Tensor, h: Tensor, k: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        for weight, derivative in zip(weights, k, strict=False):
            if weight != 0.0:
                y = y + (weight * h) * derivative
        return y

    @torch.no_grad()
    def attempt(self, point: _Point, t1: Tensor) -> _Attempt:
        """A step to t1, without a graph; rows with t1 = t stay."""
        system, tableau = self.system, self.tableau
        y, t0 = point.y.detach(), point.t.detach()
        if point.jacobian is None:
            point.f, point.jacobian = system.linearise(t0, y)
        h = (t1 - t0).to(y.dtype)[:, None]
        active = h[:, 0] != 0.0
        ok = torch.ones_like(active)
        stages: list[Tensor] = []
        factors: dict[float, Factors] = {}
        state = y
        for row, c in zip(tableau.a, tableau.c, strict=True):
            base, t = self.solution(y, h, stages, row[:-1]), self.stage_time(t0, t1, c)
            if row[-1] == 0.0:
                known = point.f if point.k is None else point.k.detach()
                stages.append(known if not stages and known is not None else system(t, base))
                state = base
                continue
            step = row[-1] * h
            if row[-1] not in factors:
                factors[row[-1]] = factorise(system.matrix(step, point.jacobian))
            z, converged = self._newton(t, base, state - base, step, active & ok, factors[row[-1]])
            if self.full_newton and not bool((converged | ~ok | ~active).all()):
                failed = active & ok & ~converged
                again, rescued = self._newton(t, base, state - base, step, failed, None)
                z, converged = torch.where(failed[:, None], again, z), converged | rescued
            ok = ok & (converged | ~active)
            stages.append(torch.where(active[:, None], z / torch.where(step == 0.0, 1.0, step), 0.0))
            state = base + z
        y1 = state if tableau.stiffly_accurate else self.solution(y, h, stages, tableau.b)
        return _Attempt(torch.where(active[:, None], y1, y), stages, ok, factors[tableau.a[-1][-1]])

    def _newton(
        self, t: Tensor, base: Tensor, z: Tensor, step: Tensor, rows: Tensor, factors: Factors | None
    ) -> tuple[Tensor, Tensor]:
        """Solves z = step f(t, base + z) for the given rows from a first guess: z, and which rows have converged.

        Without factors the Jacobian is made at each iterate.
        """
        system = self.system
        running, converged = rows, torch.zeros_like(rows)
        before = None
        for _ in range(_SIMPLIFIED_ITERATIONS if factors is not None else _FULL_ITERATIONS):
            state = base + z
            if factors is None:
                f, jacobian = system.linearise(t, state)
                change = linear_solve(factorise(system.matrix(step, jacobian)), step * f - z)
            else:
                change = linear_solve(factors, step * system(t, state) - z)
            z = torch.where(running[:, None], z + change, z)
            rounding = 4.0 * system.epsilon * torch.maximum(base, state).abs().amax(1, keepdim=True)
            size = rms(change / (_NEWTON_TOLERANCE * system.tolerances(base, state) + rounding))
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

    def moved(self, point: _Point, attempt: _Attempt, t1: Tensor, accept: Tensor) -> _Point:
        """Where the rows stand after a step that some of them accept; t1 = t for the others."""
        y1, k = self._attached(point, attempt, t1, accept) if self.gradient else (attempt.y, attempt.k)
        column = accept[:, None]
        last = torch.where(column, k[-1], k[0]) if self.tableau.first_same_as_last else None
        return _Point(torch.where(column, y1, point.y), t1, last)

    def _attached(self, point: _Point, attempt: _Attempt, t1: Tensor, accept: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The accepted rows' step again, as a function of where it began, of its times and of what the field uses.

        The other rows take a step of size 0, whose derivatives are finite.
        """
        system, tableau = self.system, self.tableau
        h = (t1 - point.t).to(point.y.dtype)[:, None]
        stages: list[Tensor] = []
        for row, c, found in zip(tableau.a, tableau.c, attempt.k, strict=True):
            t = self.stage_time(point.t, t1, c)
            base = self.solution(point.y, h, stages, row[:-1])
            if row[-1] == 0.0:
                stages.append(system(t, base) if stages or point.k is None else point.k)
                continue
            found = torch.where(accept[:, None], found, 0.0)
            f, jacobian = system.linearise(t, base + (row[-1] * h) * found, graph=True)
            stages.append(Stage.apply(f, found, system.matrix((row[-1] * h).detach(), jacobian)))
        return self.solution(point.y, h, stages, tableau.b), stages


@final
class _Fixed(_Solve):
    """Equal steps between two times."""

    full_newton = True

    def run(self, y0: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor:
        step_size = options.get("step_size")
        if step_size is not None:
            check_number("step_size", step_size, above=0.0)
        times = (t if self.gradient else t.detach()).to(y0.device, torch.float64)
        numbers = t.detach().double().tolist()
        rows = self.system.rows
        point = _Point(y0, times[0].expand(rows))
        ys = [y0]
        everyone = torch.ones(rows, dtype=torch.bool, device=y0.device)
        for number in range(1, len(numbers)):
            start, end = times[number - 1], times[number]
            gap = abs(numbers[number] - numbers[number - 1])
            count = 1 if step_size is None else max(1, math.ceil(gap / step_size - 1e-9))
            for i in range(1, count + 1):
                to = (end if i == count else start + (end - start) * (i / count)).expand(rows)
                attempt = self.attempt(point, to.detach())
                self._check(point, attempt, to)
                point = self.moved(point, attempt, to, everyone)
            ys.append(point.y)
        return torch.stack(ys)

    def _check(self, point: _Point, attempt: _Attempt, to: Tensor) -> None:
        finite = attempt.y.isfinite().all(1)
        good = attempt.ok & finite
        if bool(good.all()):
            return
        start, end = float(point.t[0]), float(to[0])
        where = f"odeint: method {self.tableau.name!r}: the step from t = {start:.6g} to {end:.6g}"
        which = f" ({int((~good).sum())} of {self.system.rows} samples)" if self.system.per_sample else ""
        if not bool(finite.all()):
            raise RuntimeError(f"{where} met values that are not finite{which}")
        raise RuntimeError(
            f"{where} did not converge in {_FULL_ITERATIONS} Newton iterations{which}; take a smaller step_size, or a "
            f"method with step control ({', '.join(map(repr, _PAIRS))}) without one"
        )


_PAIRS = tuple(name for name, tableau in IMPLICIT_TABLEAUS.items() if tableau.error is not None)


@final
class _Adaptive(_Solve):
    """Steps whose error estimate, multiplied by (I - h a J)^-1 for its stiff part (Hosea and Shampine 1996), is within
    the tolerance."""

    def run(self, y0: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor:
        system, settings = self.system, AdaptiveOptions(**step_control_arguments(options))
        rules = self._rules(settings)
        times = (t if self.gradient else t.detach()).to(y0.device, torch.float64)
        fixed = times.detach()
        point = _Point(y0, times[0].expand(system.rows))
        clock, count = new_state(point.t.detach(), fixed[-1].expand(system.rows))
        buffers = y0.new_empty(system.rows), y0.new_empty(len(rules.nodes), system.rows)
        size = self._first_step(point, settings)
        ys = [y0]
        for number in range(1, t.shape[0]):
            status = count[Count.STATUS]
            clock[Clock.T_END] = fixed[number]
            status.masked_fill_(status == Status.SUCCESS, Status.RUNNING)
            step_control(clock, count, *buffers, size, rules, start=True)
            while bool((status == Status.RUNNING).any()):
                start, h, end = (clock[i].clone() for i in (Clock.T, Clock.H, Clock.T_END))
                last = h == end - start
                attempt = self.attempt(point, torch.where(last, end, start + h))
                running, proposed = status == Status.RUNNING, clock[Clock.H_NEXT].abs()
                step_control(clock, count, *buffers, self._error(point, attempt, h), rules)
                accept = count[Count.ACCEPT] == 1
                # an accepted step that was cut to end at a time says nothing about the largest one
                larger = torch.maximum(clock[Clock.H_NEXT].abs(), torch.where(accept, proposed, 0.0))
                size = torch.where(running, larger, size)
                if bool(accept.any()):
                    to = torch.where(accept, torch.where(last, times[number], start + h), point.t)
                    point = self.moved(point, attempt, to, accept)
            ys.append(point.y.masked_fill((status != Status.SUCCESS)[:, None], math.nan))
        self._tell(count[Count.STATUS], settings)
        return torch.stack(ys)

    def _rules(self, settings: AdaptiveOptions) -> Rules:
        controller = settings.controller
        return Rules(
            controller.exponents(self.tableau.error_order),
            controller.safety,
            controller.ifactor,
            controller.dfactor,
            controller.least_growth,
            settings.min_step,
            settings.max_step,
            settings.max_steps,
            False,
            self.tableau.c,
        )

    @torch.no_grad()
    def _first_step(self, point: _Point, settings: AdaptiveOptions) -> Tensor:
        """(R,) a step in which Euler's method changes y by a hundredth (Hairer, Norsett, Wanner 1993, II.4); NaN where
        the field is not finite."""
        y = point.y.detach()
        point.f, point.jacobian = self.system.linearise(point.t.detach(), y)
        scale = self.system.tolerances(y)
        d0, d1 = (self.system.error_norm(x / scale).double() for x in (y, point.f))
        first = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        if settings.first_step is not None:
            first = torch.full_like(first, settings.first_step)
        return first + 0.0 * (d0 + d1)

    @torch.no_grad()
    def _error(self, point: _Point, attempt: _Attempt, h: Tensor) -> Tensor:
        system, y = self.system, point.y.detach()
        assert self.tableau.error is not None
        column = h.to(y.dtype)[:, None]
        estimate = self.solution(torch.zeros_like(y), column, attempt.k, self.tableau.error)
        error = system.error_norm(linear_solve(attempt.factors, estimate) / system.tolerances(y, attempt.y))
        finite = attempt.y.isfinite().all(1)
        return torch.where(attempt.ok, error, torch.where(finite, _NOT_CONVERGED, math.nan))

    def _tell(self, status: Tensor, settings: AdaptiveOptions) -> None:
        status = status.cpu()
        warn_of_failures(status, settings)
        if self.gradient and bool((status != Status.SUCCESS).any()):
            raise RuntimeError("odeint: expected a solve that succeeds where its gradient is wanted; see the warning")
