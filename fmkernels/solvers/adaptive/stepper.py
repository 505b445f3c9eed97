"""One adaptive step of a batch after another, on buffers that are made once, with all decisions on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._cache import is_plain_context
from ..._checks import as_state
from ..._torch import same_memory
from ...ops._operands import compute_dtype
from ...ops.combine.op import combine
from ...ops.step_control.op import Clock, Count, step_control
from ...ops.step_control.rows import copy_rows, dense_output, dense_weights
from ..programs.ownership import is_kept, ordinary_copy, ordinary_memory, owned_memory, references_of
from .rows import Batch, Problem, row_norm, to_device


class Restart(Exception):
    """A network output lies in the memory of an earlier one of the same step."""


class AdaptiveStep:
    """What a caller may look at after a step was judged and before it is taken: see ``on_step``.

    Attributes:
        t: (R,) float64, where the step began.
        h: (R,) float64, its signed size; 0 for a row that takes none.
        accepted: (R,) bool.
        y, y_new: states at both ends; buffers, which are written again.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        batch = stepper.batch
        self.t, self.h = batch.clock[Clock.T_FROM], batch.clock[Clock.H_TAKEN]
        self.accepted = batch.count[Count.ACCEPT] == 1
        self.y, self.y_new = batch.y, stepper.y1

    def interpolate(self, t: Tensor | float) -> Tensor:
        """The states at times within the step, a number or one a row."""
        theta = (torch.as_tensor(t, dtype=torch.float64, device=self.t.device) - self.t) / self.h
        theta = torch.where(self.h == 0.0, 0.0, theta)
        polynomials = self._stepper.problem.tableau.interpolant
        weights = [w.to(compute_dtype(self.y)) for w in dense_weights(theta, self.h, polynomials)]
        flat = [self._stepper.flat(x) for x in (self.y, *self._stepper.stages)]
        return self._stepper.unflat(combine(flat, [1.0, *weights], impl=self._stepper.problem.impl))


def overlap(k: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether k lies in the memory of another tensor of its size."""
    if type(k) is not Tensor:  # it may have no address, as a fake one
        return any(same_memory(k, other) for other in others)
    start, size = k.data_ptr(), k.numel() * k.element_size()
    return any(abs(start - other.data_ptr()) < size for other in others)


class Stepper:
    """Takes steps of a batch.

    Memory: y, a buffer that holds each stage's state and at last the new one, and the network's outputs, which are
    kept as they come. The derivative at y has memory of its own, because rows that accept overwrite theirs.
    """

    def __init__(self, problem: Problem, batch: Batch, *, copy: bool = False) -> None:
        self.problem, self.batch = problem, batch
        y, tableau, rows = batch.y, problem.tableau, batch.rows
        dtype = compute_dtype(y)
        with ordinary_memory():
            self.y1 = torch.empty_like(y)
        self.k0 = torch.empty_like(y)
        self.stages: list[Tensor] = []
        self.step_size = torch.zeros(rows, dtype=dtype, device=y.device)
        self.times = torch.zeros(tableau.stages, rows, dtype=problem.time_dtype, device=y.device)
        self.time_views = self.views_of(self.times)
        self._copies: list[Tensor] | None = None
        self.running: int | None = None  # rows, where that is known without waiting
        self.gives_copies = False  # to the function, which keeps what it is given
        if copy:
            self.copy_outputs()
        self.prepare()

    def prepare(self) -> None:
        """Makes what steps need: coefficient number n of a table is shifts[n] + h slopes[n], a column a coefficient."""
        shifts: list[float] = []
        slopes: list[float] = []
        self._tables: list[slice] = []
        *rows, error = self.problem.tableau.weights
        for own, row in [*((1.0, row) for row in rows), (0.0, error)]:
            self._tables.append(slice(len(shifts), len(shifts) + 1 + len(row)))
            shifts += [own] + [0.0] * len(row)
            slopes += [0.0, *row]
        device = self.batch.y.device
        self._shifts = to_device(torch.tensor([shifts], dtype=torch.float64, device="cpu"), device)
        self._slopes = to_device(torch.tensor(slopes, dtype=torch.float64, device="cpu"), device)
        self._table = torch.empty(self.batch.rows, len(slopes), dtype=self.step_size.dtype, device=device)

    def copy_outputs(self) -> None:
        """From now on keeps copies of the network's outputs, which overwrite each other."""
        self._copies = [torch.empty_like(self.batch.y) for _ in range(self.problem.tableau.stages)]

    @property
    def copies_outputs(self) -> bool:
        return self._copies is not None

    @property
    def derivative(self) -> Tensor:
        """That at y."""
        return self.k0

    def set_derivative(self, k: Tensor) -> None:
        if k is not self.k0:
            self.k0.copy_(k)

    # ------------------------------------------------------------------ views

    def flat(self, x: Tensor) -> Tensor:
        """A state as the control sees it: one row where it is shared."""
        if not self.problem.shared:
            return x
        return x.as_strided((1, x.numel()), (x.numel(), 1))  # dense, in whatever order

    def unflat(self, x: Tensor) -> Tensor:
        """The state of what :meth:`flat` would make of it."""
        y = self.batch.y
        return x.as_strided(y.shape, y.stride()) if self.problem.shared else x

    def views_of(self, times: Tensor) -> Sequence[Tensor]:
        """Rows of times in func's shape."""
        if self.problem.scalar_time:
            return times[:, 0].unbind(0)
        return [self.time_view(t) for t in times.unbind(0)]

    def time_view(self, t: Tensor) -> Tensor:
        """A row of times in func's shape."""
        if self.problem.scalar_time:
            return t[0]
        return t.expand(self.batch.y.shape[0]) if self.problem.shared and self.batch.y.dim() else t

    # ------------------------------------------------------------------ the network

    def call(self, t: Tensor, y: Tensor) -> Any:
        """The function's value at a time and a state of :attr:`times` and :attr:`y1`; what it keeps is replaced."""
        problem = self.problem
        if not problem.lends:
            return problem.func(t, y, **self.batch.kwargs)
        if self.gives_copies:
            return problem.func(t.clone(), y.clone())
        k, kept = self._lend(t, y)
        if kept:
            self.gives_copies = True
            self.let_go()
        return k

    def _lend(self, t: Tensor, y: Tensor) -> tuple[Any, bool]:
        """The function's value, and whether it keeps t or y."""
        of_t, of_y = owned_memory(t), owned_memory(y)
        before = references_of(t), references_of(y)
        k = self.problem.func(t, y)
        return k, is_kept(t, before[0], of_t) or is_kept(y, before[1], of_y)

    def first_call(self, t: Tensor, y: Tensor) -> Any:
        """The same at the beginning, which shows at the price of two copies whether the function keeps things."""
        if not self.problem.lends:
            return self.call(t, y)
        t, y = t.clone(), y.clone()
        if not is_plain_context():
            self.gives_copies = True
            return self.problem.func(t, y)
        k, self.gives_copies = self._lend(t, y)
        return k

    def let_go(self) -> None:
        """Other memory for what the function was given last."""
        self.y1 = ordinary_copy(self.y1.detach())
        self.times = self.times.detach().clone()
        self.time_views = self.views_of(self.times)

    def evaluate(self, number: int, t: Tensor, y: Tensor, held: Sequence[Tensor]) -> Tensor:
        """A network output in memory that stays as it is while ``held`` are in use."""
        k = self.call(t, y) if number else self.first_call(t, y)
        k = as_state(self.problem.name, k, y)
        if k.requires_grad:
            k = k.detach()
        if self._copies is not None:
            return self._copies[number].copy_(k)
        if k.stride() != y.stride() and not (k.is_contiguous() and y.is_contiguous()):
            return torch.empty_like(y).copy_(k)
        if overlap(k, held):
            raise Restart
        return k.clone() if overlap(k, (y, self.batch.y)) else k

    def begin(self, first_step: float | None) -> int:
        """The derivative at y and the first step, from a given size or Hairer's rule; returns the network calls."""
        t = self.batch.clock[Clock.T]
        self.set_derivative(self.evaluate(0, self.time_view(t.to(self.problem.time_dtype)), self.batch.y, ()))
        if first_step is not None:
            self.control(torch.full_like(t, first_step), start=True)
            return 1
        self.control(self._first_step(), start=True)
        return 2

    def resume(self, other: Stepper, keep: Tensor) -> None:
        """Goes on with rows of another stepper, whose batch this one's was gathered from."""
        self.set_derivative(other.derivative.index_select(0, keep))
        self.step_size.copy_(other.step_size.index_select(0, keep))
        self.times.copy_(other.times.index_select(1, keep))

    def replace(self, places: Tensor, other: Stepper) -> None:
        """Puts the rows of another stepper, with their state of the control, in the places of some of this one's."""
        self.batch.y.index_copy_(0, places, other.batch.y)
        self.batch.clock.index_copy_(1, places, other.batch.clock)
        self.batch.count.index_copy_(1, places, other.batch.count)
        self.step_size.index_copy_(0, places, other.step_size)
        self.times.index_copy_(1, places, other.times)
        derivative = self.derivative
        if derivative is not self.k0:  # then it is the network's own tensor
            self.k0.copy_(derivative)
        self.k0.index_copy_(0, places, other.derivative)
        self.set_derivative(self.k0)

    def _first_step(self) -> Tensor:
        """Hairer, Norsett, Wanner 1993, II.4: from the sizes of y, y' and y''; NaN where y' is not finite.

        Its second network call is at a trial step, which does not leave the interval.
        """
        clock = self.batch.clock
        t, span = clock[Clock.T], clock[Clock.T_END] - clock[Clock.T]
        d0, d1 = self._scaled_norm([1.0, 0.0]), self._scaled_norm([0.0, 1.0])
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        trial = torch.copysign(torch.minimum(h0, span.abs()), span).nan_to_num(0.0)
        y, y1, k0 = (self.flat(x) for x in (self.batch.y, self.y1, self.derivative))
        combine([y, k0], [1.0, trial.to(compute_dtype(y))], out=y1, impl=self.problem.impl)
        time = self.time_view((t + trial).to(self.problem.time_dtype))  # nobody else's
        try:
            f1 = self.evaluate(1, time, self.y1, [k0])
        except Restart:
            self.copy_outputs()
            self.set_derivative(self.evaluate(0, self.time_view(t.to(self.problem.time_dtype)), self.batch.y, ()))
            f1 = self.evaluate(1, time, self.y1, ())
        d2 = self._scaled_norm([0.0, -1.0, 1.0], f1) / h0
        slope = torch.maximum(d1, d2)
        h1 = torch.where(
            slope <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / slope) ** (1.0 / self.problem.tableau.order)
        )
        first = torch.minimum(100.0 * h0, h1)
        # a trial step may leave the domain: then its own size is all that is known
        return torch.where(first.isfinite() & d2.isfinite(), first, h0) + 0.0 * (d0 + d1)

    def _scaled_norm(self, weights: list[float], *more: Tensor) -> Tensor:
        """(R,) norms of a combination of y, k0 and more over the tolerance at y, in float64."""
        tensors = [self.batch.y, self.derivative, *more][: len(weights)]
        flat = [self.flat(x) for x in tensors]
        if self.problem.slow_norm:
            return self._slow_norm(flat, weights, self.batch.y).double()
        _, norm = combine(
            flat,
            [1.0] + [0.0] * (len(flat) - 1),
            error_coefficients=weights,
            atol=self.problem.atol,  # type: ignore[arg-type]
            rtol=self.problem.rtol,  # type: ignore[arg-type]
            out=self.flat(self.y1),
            impl=self.problem.impl,
        )
        return norm.double()

    # ------------------------------------------------------------------ a step

    def step(self, on_step: Callable[[AdaptiveStep], Any] | None = None) -> Any:
        """A step of all rows; returns what on_step does."""
        try:
            error = self._attempt()
        except Restart:
            self.copy_outputs()
            error = self._attempt()
        self.control(error)
        answer = None if on_step is None else on_step(AdaptiveStep(self))
        self.commit()
        return answer

    def control(self, error: Tensor, *, start: bool = False) -> None:
        batch, problem = self.batch, self.problem
        step_control(
            batch.clock,
            batch.count,
            self.step_size,
            self.times,
            error,
            problem.rules,
            None if batch.dense is None else batch.dense.wanted,
            start=start,
            impl=problem.impl,
        )

    def _attempt(self) -> Tensor:
        problem = self.problem
        # in float64, rounded once
        self._table.copy_(torch.addr(self._shifts, self.batch.clock[Clock.H], self._slopes))
        y = self.flat(self.batch.y)
        *stage_columns, last = problem.tableau.columns
        self.stages = stages = [self.k0]
        flat = [self.flat(self.k0)]
        for s, used in enumerate(stage_columns):
            combine(
                [y, *(flat[j] for j in used)],
                self._table[:, self._tables[s]],
                out=self.flat(self.y1),
                impl=problem.impl,
            )
            lent, version = self.y1, self.y1._version
            stages.append(self.evaluate(s + 1, self.time_views[s + 1], self.y1, stages))
            flat.append(self.flat(stages[-1]))
        operands = [y, *(flat[j] for j in last)]
        solution, error = (self._table[:, table] for table in self._tables[-2:])
        if problem.slow_norm:
            if lent._version != version:  # the function has written to the new state
                combine(operands, solution, out=self.flat(self.y1), impl=problem.impl)
            return self._slow_norm(operands[1:], error[:, 1:], self.batch.y, self.y1)
        _, norm = combine(
            operands,
            solution,
            error_coefficients=error,
            atol=problem.atol,  # type: ignore[arg-type]
            rtol=problem.rtol,  # type: ignore[arg-type]
            out=self.flat(self.y1),
            impl=problem.impl,
        )
        return norm

    def _slow_norm(self, operands: Sequence[Tensor], weights: Any, *states: Tensor) -> Tensor:
        """(R,) norms of a combination over the tolerance at the larger one of states, by single operations.

        In the dtype of coefficients, as the fused one: half precision holds neither small tolerances nor squares.
        """
        problem, dtype = self.problem, compute_dtype(self.batch.y)
        error = self.unflat(combine([x.to(dtype) for x in operands], weights, impl=problem.impl))
        size = functools.reduce(torch.maximum, (y.to(dtype).abs() for y in states))
        return row_norm(problem, error / (problem.atol + problem.rtol * size))

    def commit(self) -> None:
        batch = self.batch
        if batch.dense is not None:
            flat = [self.flat(x) for x in (batch.y, self.y1, *self.stages)]
            out = batch.dense.out
            if self.problem.shared:
                out = out.as_strided((out.shape[0], 1, batch.y.numel()), (batch.y.numel(), batch.y.numel(), 1))
            dense_output(
                batch.clock,
                batch.count,
                flat[0],
                flat[1],
                flat[2:],
                self.problem.tableau.interpolant,
                batch.dense.wanted,
                batch.dense.ids,
                out,
            )
        accept = batch.count[Count.ACCEPT] == 1
        for source, target in ((self.y1, batch.y), (self.stages[-1], self.k0)):
            copy_rows(accept, self.flat(source), self.flat(target))
