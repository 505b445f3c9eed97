r"""Implicit Runge-Kutta methods for stiff fields and small states.

A stage's state :math:`Z = g + h a_{ii} f(t_i, Z)`, with g from the stages before it, is found by Newton's iteration on
z = Z - g with the Jacobian J of the step's beginning (simplified Newton; Hairer and Wanner 1996, IV.8):

.. math:: (I - h a_{ii} J)\, \Delta z = h a_{ii} f(t_i, g + z) - z,

and its derivative is k = z / (h a_ii), which does not multiply what is left of the iteration by J as f(Z) would. The
stages of a fully implicit method are solved together, with :math:`I - h A \otimes J` and k = (h A)^-1 z. The iteration
has converged where the root mean square of the expected remainder over atol + rtol |y| is at most 0.01. J is dense,
made by one call of the field and as many (batched) backward passes as the state has components.

Gradients need no record of the iteration. By the implicit function theorem, at the solution

.. math:: \mathrm dk = (I - h A \circ J)^{-1}\, \mathrm df, \qquad (A \circ J)_{ij} = a_{ij} J_i,

for what f(t_i, y + h \sum_j a_ij k_j) depends on besides k: a linear solve with the transposed matrix in the backward
pass.

The host looks at each iteration's convergence: unlike the explicit solvers these wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..._checks import check_number
from ...ops.step_control.op import Clock, Count, Rules, Status, new_state, step_control
from ..adaptive.gradient_watch import FoundGradient
from ..adaptive.options import STEP_CONTROL, AdaptiveOptions, step_control_arguments
from ..adaptive.solve import warn_of_failures
from ..methods.implicit_tableaus import IMPLICIT_TABLEAUS, ImplicitTableau
from ..methods.runge_kutta import combination
from .newton import FULL_ITERATIONS, Attempt, Point, Stepper
from .system import Field, Norm, System, linear_solve

FIXED_OPTIONS = ("step_size", "per_sample", "interp", "perturb")
ADAPTIVE_OPTIONS = ("per_sample", *STEP_CONTROL)
_NOT_CONVERGED = 1e10  # the error norm of such a step: any that makes the next one smaller
# Steps without an end before a solve to t = inf gives up.
MAX_STEPS = 20_000


class ImplicitStep(NamedTuple):
    """A step that was judged.

    Attributes:
        t, u: (R,) float64, its ends; with gradients where those are wanted, as y and y_new.
        y, y_new: (R, N), the states there.
        accepted: (R,) bool; y_new is y for the others.
    """

    t: Tensor
    u: Tensor
    y: Tensor
    y_new: Tensor
    accepted: Tensor


class Watch:
    """What is told of a solve; this one does nothing with it."""

    def before(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        """Before each step is tried: its time and size, (R,) float64, and the state, (R, N)."""

    def after(self, step: ImplicitStep, h: Tensor) -> Any:
        """After it was judged; a true answer ends the solve."""

    def again(self) -> None:
        """A solve that turns out to need gradients begins again."""


def option_names(method: str, options: dict[str, Any]) -> tuple[str, ...]:
    """The options that a method has."""
    return ADAPTIVE_OPTIONS if is_adaptive(method, options) else FIXED_OPTIONS


def is_adaptive(method: str, options: dict[str, Any]) -> bool:
    return IMPLICIT_TABLEAUS[method].error is not None and options.get("step_size") is None


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
    watch: Watch | None = None,
) -> Tensor:
    """Solves dy/dt = field(t, y), y(t[0]) = y0, at the times t, each of which ends a step.

    A method with an error estimate controls its steps unless ``step_size`` is given: a step whose Newton iteration does
    not converge is tried again with a smaller size. First derivatives flow to y0, t and what the field uses; a second
    differentiation is an error.

    Args:
        field: (t, y) to a tensor like y; t is 0-dim in y's dtype, or (B,) with ``per_sample``.
        y0: float32 or float64 of any shape, of at most MAX_SIZE = 2048 elements; with ``per_sample`` (B, ...) of at
            most as many elements a sample.
        t: (T,) strictly monotone; the last one may be infinite where ``watch`` ends the solve.
        method: one of IMPLICIT.
        options: per_sample=True says that each index of dimension 0 has a derivative of its own state alone: the
            Jacobians are then (B, D, D) in place of (B D, B D), and each sample has its own step sizes and error
            control. A field of which that is not true gets wrong gradients. step_size: the largest step size; without
            it, and without an error estimate, the steps go from one of the times t to the next. perturb=True: the
            field sees the ends of such a step from inside, at the next numbers of y's dtype. With step control:
            first_step, min_step, max_step, max_num_steps, safety, ifactor, dfactor or controller, norm.
        rtol, atol: tolerances of the error and of Newton's iteration; rtol is at least 100 times the dtype's epsilon.
        norm: of the tensor of error ratios, to (), or to (B,) with ``per_sample``; None for the root mean square.
        watch: what is told of the steps.

    Returns:
        (T, *y0.shape), less the times behind the step after which ``watch`` ended the solve. Where step control fails a
        warning tells, and the times not reached are NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value, or an output of the field unlike y.
        RuntimeError: a fixed step that cannot be solved, or failed step control where a gradient is wanted.
    """
    tableau, options, watch = IMPLICIT_TABLEAUS[method], dict(options or {}), watch or Watch()
    system = System(field, y0, bool(options.get("per_sample", False)), rtol, atol, norm, len(tableau.blocks[0]))
    if t.shape[0] == 1 or y0.numel() == 0:
        return y0.expand(t.shape[0], *y0.shape).clone()
    solve: type[_Solve] = _Adaptive if is_adaptive(method, options) else _Fixed
    start = y0.reshape(system.rows, system.size)
    gradient = torch.is_grad_enabled() and (t.requires_grad or y0.requires_grad)
    system.watching = torch.is_grad_enabled() and not gradient
    try:
        rows = solve(system, tableau, gradient, watch).run(start, t, options)
    except FoundGradient:
        watch.again()
        system.watching = False
        rows = solve(system, tableau, True, watch).run(start, t, options)
    return rows.reshape(-1, *y0.shape)


class _Solve(Stepper):
    """What solves with fixed and with controlled steps have in common."""

    def __init__(self, system: System, tableau: ImplicitTableau, gradient: bool, watch: Watch) -> None:
        super().__init__(system, tableau, gradient)
        self.watch = watch

    def run(self, y0: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor:
        """(T, R, N)."""
        raise NotImplementedError


@final
class _Fixed(_Solve):
    """Equal steps between two times."""

    full_newton = True

    def run(self, y0: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor:
        step_size = options.get("step_size")
        if step_size is not None:
            check_number("step_size", step_size, above=0.0)
        self.perturb = bool(options.get("perturb", False))
        times = (t if self.gradient else t.detach()).to(y0.device, torch.float64, copy=True)
        rows = self.system.rows
        point = Point(y0, times[0].expand(rows))
        ys = [y0]
        everyone = torch.ones(rows, dtype=torch.bool, device=y0.device)
        for end, is_output in _ends(times, t.detach().double().tolist(), step_size):
            u = end.expand(rows)
            size = u.detach() - point.t.detach()
            self.watch.before(point.t.detach(), point.y, size)
            attempt = self.attempt(point, u.detach())
            self._check(point, attempt, u)
            before, point = point, self.moved(point, attempt, u, everyone)
            if is_output:
                ys.append(point.y)
            if self.watch.after(ImplicitStep(before.t, u, before.y, point.y, everyone), size):
                break
        return torch.stack(ys)

    def _check(self, point: Point, attempt: Attempt, to: Tensor) -> None:
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
            f"{where} did not converge in {FULL_ITERATIONS} Newton iterations{which}; take a smaller step_size, or a "
            f"method with step control ({', '.join(map(repr, _PAIRS))}) without one"
        )


def _ends(times: Tensor, numbers: list[float], step_size: float | None) -> Iterator[tuple[Tensor, bool]]:
    """The ends of the steps, and whether they are output times."""
    for number in range(1, len(numbers)):
        start, end = times[number - 1], times[number]
        gap = numbers[number] - numbers[number - 1]
        if math.isinf(gap):
            assert step_size is not None
            for i in range(1, MAX_STEPS + 1):
                yield start + math.copysign(step_size, gap) * i, False
            return
        count = 1 if step_size is None else max(1, math.ceil(abs(gap) / step_size - 1e-9))
        for i in range(1, count):
            yield start + (end - start) * (i / count), False
        yield end, True


_PAIRS = tuple(name for name, tableau in IMPLICIT_TABLEAUS.items() if tableau.error is not None)


@final
class _Adaptive(_Solve):
    """Steps whose error estimate, multiplied by (I - h a J)^-1 for its stiff part (Hosea and Shampine 1996), is within
    the tolerance."""

    def run(self, y0: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor:
        system, settings = self.system, AdaptiveOptions(**step_control_arguments(options))
        rules = self._rules(settings)
        times = (t if self.gradient else t.detach()).to(y0.device, torch.float64, copy=True)
        fixed = times.detach()
        point = Point(y0, times[0].expand(system.rows))
        clock, count = new_state(point.t.detach(), fixed[-1].expand(system.rows))
        buffers = y0.new_empty(system.rows), y0.new_empty(len(rules.nodes), system.rows)
        size = self._first_step(point, settings)
        ys = [y0]
        ended: Any = False
        for number in range(1, t.shape[0]):
            status = count[Count.STATUS]
            clock[Clock.T_END] = fixed[number]
            status.masked_fill_(status == Status.SUCCESS, Status.RUNNING)
            step_control(clock, count, *buffers, size, rules, start=True)
            while bool((status == Status.RUNNING).any()):
                start, h, end = (clock[i].clone() for i in (Clock.T, Clock.H, Clock.T_END))
                last = h == end - start
                self.watch.before(start, point.y, h)
                attempt = self.attempt(point, torch.where(last, end, start + h))
                running, proposed = status == Status.RUNNING, clock[Clock.H_NEXT].abs()
                step_control(clock, count, *buffers, self._error(point, attempt, h), rules)
                accept = count[Count.ACCEPT] == 1
                # an accepted step that was cut to end at a time says nothing about the largest one
                larger = torch.maximum(clock[Clock.H_NEXT].abs(), torch.where(accept, proposed, 0.0))
                size = torch.where(running, larger, size)
                before, to = point, torch.where(accept, torch.where(last, times[number], start + h), point.t)
                if bool(accept.any()):
                    point = self.moved(point, attempt, to, accept)
                ended = self.watch.after(ImplicitStep(before.t, to, before.y, point.y, accept), h)
                if ended:
                    return torch.stack(ys)
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
    def _first_step(self, point: Point, settings: AdaptiveOptions) -> Tensor:
        """(R,) a step in which Euler's method changes y by a hundredth (Hairer, Norsett, Wanner 1993, II.4); NaN where
        the field is not finite."""
        y = point.y.detach()
        self.linearise(point, point.t)
        assert point.f is not None
        scale = self.system.tolerances(y)
        d0, d1 = (self.system.error_norm(x / scale).double() for x in (y, point.f))
        first = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        if settings.first_step is not None:
            first = torch.full_like(first, settings.first_step)
        return first + 0.0 * (d0 + d1)

    @torch.no_grad()
    def _error(self, point: Point, attempt: Attempt, h: Tensor) -> Tensor:
        system, y = self.system, point.y.detach()
        assert self.tableau.error is not None
        estimate = combination(torch.zeros_like(y), h.to(y.dtype)[:, None], self.tableau.error, attempt.k)
        error = system.error_norm(linear_solve(attempt.factors, estimate) / system.tolerances(y, attempt.y))
        finite = attempt.y.isfinite().all(1)
        return torch.where(attempt.ok, error, torch.where(finite, _NOT_CONVERGED, math.nan))

    def _tell(self, status: Tensor, settings: AdaptiveOptions) -> None:
        status = status.cpu()
        warn_of_failures(status, settings)
        if self.gradient and bool((status != Status.SUCCESS).any()):
            raise RuntimeError("odeint: expected a solve that succeeds where its gradient is wanted; see the warning")
