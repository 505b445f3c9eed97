r"""Adaptive Runge-Kutta steps: every sample its own step size, error control and status, all of it on the device.

A step of the whole batch is, for each stage, one linear combination and one network call; then one combination that
gives the error norms, the control (:mod:`fmkernels.ops.step_control`), and a copy of the rows that accept. Finished
rows have step 0 and stay as they are; where enough have finished, the others move together into a smaller batch. The
host learns who has finished from a copy of the statuses that it looks at later, so that the device never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import check_float_tensor, check_number, type_error, value_error, warn
from ...ops.step_control.op import Clock, Count, Status, new_state
from ..methods.tableaus import Tableau
from . import kept_steppers as idle
from .compaction import Watch, gather, select_rows
from .native_stepper import make_stepper
from .options import AdaptiveOptions
from .rows import Batch, Dense, Field, Norm, Problem, own_copy, to_device
from .step_graph import CapturedSteps, StepGraph, captured_steps
from .stepper import AdaptiveStep, Stepper

OnStep = Callable[[AdaptiveStep], Any]
BeforeStep = Callable[[Batch], object]


class AdaptiveResult(NamedTuple):
    """What a solve gives.

    Attributes:
        y: the state of each sample where it ended, at t1 if its status is SUCCESS.
        ys: (T, *y0.shape), states at the requested times; NaN at those that a sample did not reach. None without.
        t: (B,) float64, the times reached.
        status: (B,) int32, of :class:`Status`.
        n_steps: (B,) int32, steps tried.
        n_accepted: (B,) int32.
        n_f_evals: calls of func.
        n_row_evals: samples that these calls had, all together.
        next_step: (B,) float64, the signed step size that would have been next.
        graph: how the steps ran: "eager", "captured", "replayed", or "eager: " and why no graph was used.
        steps: with ``record``, accepted step number i of each row as (t, h), float64 (R,) tensors; h = 0 for a row that
            has no such step. None without.
    """

    y: Tensor
    ys: Tensor | None
    t: Tensor
    status: Tensor
    n_steps: Tensor
    n_accepted: Tensor
    n_f_evals: int
    n_row_evals: int
    next_step: Tensor
    steps: list[tuple[Tensor, Tensor]] | None
    graph: str = "eager"


def solve_adaptive(
    func: Field,
    y0: Tensor,
    t0: float | Tensor,
    t1: float | Tensor,
    tableau: Tableau,
    options: AdaptiveOptions,
    *,
    t_eval: Tensor | None = None,
    arguments: Mapping[str, Any] | None = None,
    follow: Collection[str] = (),
    on_step: OnStep | None = None,
    norm: Norm | None = None,
    graph: StepGraph | None = None,
    before_step: BeforeStep | None = None,
    enable_grad: bool = False,
) -> AdaptiveResult:
    """Solves dy/dt = func(t, y, **arguments) from y0 at t0 to t1, without gradients.

    Args:
        func: returns a tensor of y's shape and dtype. y is a buffer that is written again later.
        y0: (B, ...); any shape where ``options.shared``.
        t0, t1: numbers, or (B,) tensors (not where shared); forward and backward samples may stand in one batch.
        tableau: with an error estimate.
        t_eval: times of ``ys`` in the order of the solve, from t0 to t1 each: (T,), or (B, T).
        arguments: handed to func.
        follow: names of those that have an entry for each sample: their tensors, also those within lists, tuples,
            dictionaries and dataclasses, follow the samples where finished ones leave the batch.
        on_step: called with an :class:`AdaptiveStep` after each step was judged; a true answer ends the solve. Rows
            then keep their places.
        norm: of the tensor of error ratios, to () where shared, else (B,); None for the root mean square.
        graph: asks for steps captured as a CUDA graph. Rows then keep their places too.
        before_step: called with the :class:`Batch` before each step is tried.
        enable_grad: calls func as the caller has set gradients, not without them; nothing of it is recorded.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; an output of func unlike y.
    """
    check_float_tensor("y0", y0)
    if not options.shared and y0.dim() == 0:
        raise value_error("y0", "at least one dimension, of samples", y0)
    with torch.set_grad_enabled(enable_grad and torch.is_grad_enabled()):
        rows = 1 if options.shared else y0.shape[0]
        problem, kwargs = options.problem(func, tableau, y0.dtype, norm), dict(arguments or {})
        key = None
        if t_eval is None and type(t0) is float and type(t1) is float:
            key = idle.key_of(problem, y0, rows)
            kept = idle.take(key, problem, y0, (t0, t1), kwargs)
            if kept is not None:
                return _Solve(problem, options, kept.batch, follow, on_step, before_step, key, kept).run(graph)
        start, end = (_times(name, t, rows, y0.device) for name, t in (("t0", t0), ("t1", t1)))
        y = own_copy(y0)
        dense = None if t_eval is None else _dense(t_eval, start, end, y)
        batch = Batch(y, *new_state(start, end), kwargs, dense)
        kept = None
        if key is not None:
            stepper = make_stepper(problem, batch)
            kept = idle.Kept(stepper, batch, (float(t0), float(t1)), batch.clock.clone())
        return _Solve(problem, options, batch, follow, on_step, before_step, key, kept).run(graph)


def _times(name: str, t: float | Tensor, rows: int, device: torch.device) -> Tensor:
    """(R,) float64."""
    if not isinstance(t, Tensor):
        check_number(name, t)
        return torch.full((rows,), float(t), dtype=torch.float64, device=device)
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != rows):
        raise value_error(name, f"a number or a tensor of shape () or ({rows},)", t)
    times = t.detach().double()
    return (to_device(times, device) if times.is_cpu else times.to(device)).expand(rows).clone()


def _dense(t_eval: Tensor, start: Tensor, end: Tensor, y0: Tensor) -> Dense:
    """y0: in dense memory."""
    rows = start.shape[0]
    if not isinstance(t_eval, Tensor):
        raise type_error("t_eval", "a tensor of times", t_eval)
    if t_eval.dim() not in (1, 2) or (t_eval.dim() == 2 and t_eval.shape[0] != rows):
        raise value_error("t_eval", f"shape (T,) or ({rows}, T)", t_eval)
    wanted = t_eval.detach().double()
    if not wanted.is_cuda:  # looking would make the host wait
        low, high = (x.to(wanted.device)[:, None] for x in (torch.minimum(start, end), torch.maximum(start, end)))
        steps = wanted.diff(dim=-1) * (end - start).sign().to(wanted.device)[:, None]
        if not bool(((wanted >= low) & (wanted <= high)).all()) or not bool((steps >= 0).all()):
            raise value_error("t_eval", "times from t0 to t1, in the order of the solve", t_eval)
    wanted = to_device(wanted, y0.device) if wanted.is_cpu else wanted.to(y0.device)
    wanted = wanted.contiguous() if wanted.dim() == 2 else wanted.contiguous().expand(rows, -1)
    # each time's states laid out like the state
    size, strides = (wanted.shape[1], *y0.shape), (y0.numel(), *y0.stride())
    return Dense(wanted, None, torch.empty_strided(size, strides, dtype=y0.dtype, device=y0.device))


def first_outputs(batch: Batch) -> None:
    """The requested times at which the solve begins."""
    if batch.dense is None:
        return
    wanted, ids, out = batch.dense
    at_start = wanted == batch.clock[Clock.T][:, None]
    mask = at_start.t().reshape(out.shape[:1] + (-1,) + (1,) * max(batch.y.dim() - 1, 0))
    mask = mask if batch.y.dim() else mask.reshape(-1)
    assert ids is None
    torch.where(mask, batch.y, batch.y.new_zeros(()), out=out)


class _Solve:
    """One solve: the loop over steps, the batch that shrinks, and the results."""

    def __init__(
        self,
        problem: Problem,
        options: AdaptiveOptions,
        batch: Batch,
        follow: Collection[str],
        on_step: OnStep | None,
        before_step: BeforeStep | None = None,
        key: Hashable = None,
        kept: idle.Kept | None = None,
    ) -> None:
        self.problem, self.options, self.batch = problem, options, batch
        self.follow, self.on_step, self.before_step = follow, on_step, before_step
        self.key, self.kept = key, kept  # the stepper, and under what it goes to the next solve
        self.whole = batch
        self.size = batch.y.shape[0] if batch.y.dim() else 1
        self.places: Tensor | None = None  # of the batch's rows, where it is not the whole any more
        self.host_places: Tensor | None = None  # the same on the host
        self.host_status: Tensor | None = None  # of all rows, as the host saw them last
        self.calls = self.row_calls = 0
        self.graph = "eager"
        self.record: list[tuple[Tensor, Tensor]] = []

    def run(self, graph: StepGraph | None) -> AdaptiveResult:
        batch, options = self.batch, self.options
        first_outputs(batch)
        if batch.y.numel() == 0:
            batch.clock[Clock.T].copy_(batch.clock[Clock.T_END])
            batch.count[Count.STATUS].fill_(Status.SUCCESS)
            self.host_status = torch.full(batch.count.shape[1:], Status.SUCCESS, dtype=torch.int32, device="cpu")
            return self.result()
        entry = None
        if graph is not None and self.on_step is None and self.before_step is None and not options.record:
            entry, self.graph = captured_steps(graph, self.problem, batch, options.first_step, options.chunk)
        if entry is None:
            self._run()
        else:
            with entry as captured, captured.solving(self.problem, batch.kwargs):
                self._replay(captured)
        return self.result()

    def _run(self) -> None:
        options = self.options
        share = options.compact_below(self.batch.y)
        stepper = make_stepper(self.problem, self.batch) if self.kept is None else self.kept.stepper
        self._count(stepper.begin(options.first_step))
        watch = Watch(delay=1)
        answer: Any = None
        while not answer and stepper.running != 0:
            status = None
            if stepper.running is None or stepper.running <= self.batch.rows * share:
                status = watch.look(self.batch.count)
            if status is not None:
                running = self._see(status)
                if running == 0:
                    return
                if running <= self.batch.rows * share and self.on_step is None:
                    stepper = self._compact(stepper, (status == Status.RUNNING).nonzero()[:, 0])
                    watch.forget()
            for _ in range(options.chunk):
                if self.before_step is not None:
                    self.before_step(self.batch)
                answer = stepper.step(self.on_step)
                self._count(self.problem.tableau.stages - 1)
                if options.record:
                    clock, count = self.batch.clock, self.batch.count
                    self.record.append((clock[Clock.T_FROM].clone(), clock[Clock.H_TAKEN] * count[Count.ACCEPT]))
                if answer or stepper.running == 0:
                    break
        self._see(self.batch.count[Count.STATUS].cpu())

    def _replay(self, captured: CapturedSteps) -> None:
        captured.load(self.batch)
        self._count(captured.stepper.begin(self.options.first_step))
        watch = Watch(delay=1)
        while (status := watch.look(captured.batch.count)) is None or self._see(status):
            captured.replay()
            self._count(self.options.chunk * (self.problem.tableau.stages - 1))
        captured.unload(self.batch)

    def _see(self, status: Tensor) -> int:
        """Keeps the statuses of the batch on the host; returns how many rows still run."""
        if self.host_places is None or self.host_status is None:
            self.host_status = status
        else:
            self.host_status[self.host_places] = status
        return int((status == Status.RUNNING).sum())

    def _count(self, calls: int) -> None:
        self.calls += calls
        self.row_calls += calls * (self.batch.y.shape[0] if self.batch.y.dim() else 1)

    def _compact(self, stepper: Stepper, keep: Tensor) -> Stepper:
        assert self.host_status is not None
        if self.host_places is None:
            self.host_places, self.host_status = keep, self.host_status.clone()
        else:
            self.host_places = self.host_places[keep]
        keep = to_device(keep, self.batch.y.device)
        self._scatter()
        self.places = keep if self.places is None else self.places.index_select(0, keep)
        kwargs = select_rows(self.whole.kwargs, self.follow, self.places, self.size)
        self.batch = gather(self.batch, keep, self.places, kwargs)
        smaller = make_stepper(self.problem, self.batch, copy=stepper.copies_outputs)
        smaller.resume(stepper, keep)
        return smaller

    def _scatter(self) -> None:
        """Writes the batch to its places in the results."""
        if self.places is None:
            return
        whole, batch = self.whole, self.batch
        whole.y.index_copy_(0, self.places, batch.y)
        whole.clock.index_copy_(1, self.places, batch.clock)
        whole.count.index_copy_(1, self.places, batch.count)

    def result(self) -> AdaptiveResult:
        self._scatter()
        y, clock, count, dense = self.whole.y, self.whole.clock, self.whole.count, self.whole.dense
        if self.kept is not None and self.places is None and not self.kept.stepper.copies_outputs:
            y, clock, count = y.clone(), clock.clone(), count.clone()  # the batch goes to the next solve
            idle.put(self.key, self.kept)
        assert self.host_status is not None
        all_well = bool((self.host_status == Status.SUCCESS).all())
        ys = None
        if dense is not None:
            ys = dense.out
            if not all_well:
                number = torch.arange(ys.shape[0], device=ys.device)[:, None]
                missing = number >= count[Count.NEXT_OUTPUT]
                shape = missing.shape[:1] + missing.shape[1 : ys.dim()] + (1,) * (ys.dim() - 2)  # y may be 0-dim
                ys.masked_fill_(missing.reshape(shape), math.nan)
        if not all_well:
            warn_of_failures(self.host_status, self.options)
        if self.problem.shared and self.size != 1:
            clock, count = clock.expand(-1, self.size), count.expand(-1, self.size)
        clocks, counts = clock.unbind(0), count.unbind(0)
        return AdaptiveResult(
            y,
            ys,
            clocks[Clock.T],
            counts[Count.STATUS],
            counts[Count.STEPS],
            counts[Count.ACCEPTED],
            self.calls,
            self.row_calls,
            clocks[Clock.H_NEXT],
            packed_steps(self.record) if self.options.record else None,
            self.graph,
        )


def packed_steps(record: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The accepted steps (h != 0) of each row moved together, so that there are as many as of the row with most."""
    if not record:
        return []
    t, h = (torch.stack(values) for values in zip(*record, strict=True))
    order = (h == 0.0).to(torch.int8).sort(dim=0, stable=True).indices
    t, h = t.gather(0, order), h.gather(0, order)
    most = int((h != 0.0).sum(0).max())
    return list(zip(t[:most].unbind(0), h[:most].unbind(0), strict=True))


_ENDINGS = {
    Status.MAX_STEPS: "reached max_steps={0.max_steps}",
    Status.NON_FINITE: "met values that are not finite",
    Status.MIN_STEP: "need steps below min_step={0.min_step} or what float64 time resolves",
}


def warn_of_failures(status: Tensor, options: AdaptiveOptions) -> None:
    """Tells of rows that did not succeed; their statuses are on the host."""
    parts = [
        f"{number} of {status.numel()} rows of the batch {text.format(options)}"
        for ending, text in _ENDINGS.items()
        if (number := int((status == ending).sum()))
    ]
    if parts:
        text = ", ".join(parts)
        warn(f"fmkernels: adaptive solve: {text}; they are returned as they are")
