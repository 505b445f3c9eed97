"""Continuous batching of adaptive solves: places of finished samples are refilled from a queue of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..._checks import check_float_tensor, check_int, check_like, check_number, type_error, value_error
from ...ops.step_control.op import Count, Status, new_state
from ...paths import CondOT, Path
from ..adaptive.compaction import Watch, gather
from ..adaptive.controllers import Controller, IController
from ..adaptive.native_stepper import make_stepper
from ..adaptive.options import AdaptiveOptions
from ..adaptive.rows import Batch, Problem, to_device
from ..adaptive.stepper import Stepper
from ..methods import registry as methods
from ..methods.tableaus import Tableau
from .solver import Solver
from .velocity import Velocity

Request = Tensor | tuple[Tensor, Mapping[str, Any]]


class StreamResult(NamedTuple):
    """One sample of a stream.

    Attributes:
        request: its number in the queue.
        x: the sample where its solve ended: at the end if status is SUCCESS.
        status: an :class:`fmkernels.Status`.
        n_steps: steps tried.
        n_accepted: steps taken.
    """

    request: int
    x: Tensor
    status: Status
    n_steps: int
    n_accepted: int


@final
class Stream:
    """A batch of places, samples on their way in them, and the queue.

    Args:
        requests: (y0 of one sample, its keyword arguments of func).
        capacity: places.
        refill_at: free places at which new samples are taken in, by two network calls with as many samples.
        kwargs: keyword arguments of func that all samples share.
    """

    def __init__(
        self,
        make_problem: Callable[[torch.dtype], Problem],
        options: AdaptiveOptions,
        requests: Iterator[tuple[Tensor, Mapping[str, Any]]],
        interval: tuple[float, float],
        capacity: int,
        refill_at: int,
        kwargs: Mapping[str, Any],
    ) -> None:
        self.make_problem, self.options, self.interval = make_problem, options, interval
        self.requests, self.capacity, self.refill_at, self.kwargs = requests, capacity, refill_at, dict(kwargs)
        self.taken = 0
        self.more = True
        self.calls = self.row_calls = 0
        self.stepper: Stepper | None = None
        self.indices: list[int | None] = []  # the request in each place; None: free
        self.like: Tensor | None = None  # the first request's state
        self.own: tuple[str, ...] = ()  # keyword arguments of single samples
        self.watch = Watch(delay=1)

    def _share(self) -> float:
        """The share of running samples at which the batch shrinks."""
        assert self.stepper is not None
        return self.options.compact_below(self.stepper.batch.y)

    @torch.no_grad()
    def advance(self) -> list[StreamResult]:
        """Steps until something has finished; nothing when all is done."""
        while True:
            if self.stepper is None:
                newcomers = self._take(self.capacity)
                if newcomers is None:
                    return []
                self.stepper = newcomers
                self.indices = list(range(self.taken - newcomers.batch.rows, self.taken))
                self.watch.forget()
            self._steps(self.stepper)
            status = self._look(self.stepper)
            if status is None:
                continue
            done = [p for p, s in enumerate(status.tolist()) if s != Status.RUNNING and self.indices[p] is not None]
            results = self._collect(self.stepper.batch, done)
            self._fill()
            if results:
                return results

    def _steps(self, stepper: Stepper) -> None:
        for _ in range(self.options.chunk):
            stepper.step()
            self._count(stepper.problem.tableau.stages - 1, stepper.batch.rows)
            if stepper.running == 0:
                return

    def _count(self, calls: int, rows: int) -> None:
        self.calls += calls
        self.row_calls += calls * rows

    def _look(self, stepper: Stepper) -> Tensor | None:
        occupied = sum(index is not None for index in self.indices)
        if stepper.running == occupied:  # known without looking: nobody has finished
            return None
        return self.watch.look(stepper.batch.count)

    def _take(self, number: int) -> Stepper | None:
        """Up to so many requests as a batch of their own, with derivatives and first steps; None without any."""
        states: list[Tensor] = []
        extras: list[Mapping[str, Any]] = []
        while self.more and len(states) < number:
            request = next(self.requests, None)
            if request is None:
                self.more = False
                break
            states.append(request[0])
            extras.append(request[1])
        if not states:
            return None
        for i, (state, extra) in enumerate(zip(states, extras, strict=True)):
            name = f"requests[{self.taken + i}]"
            check_float_tensor(name, state)
            if self.like is None:
                self.like, self.own = state, tuple(extra)
            check_like(name, state, "requests[0]", self.like)
            if set(extra) != set(self.own):
                raise value_error(name, f"the keyword arguments of requests[0], {sorted(self.own)}", sorted(extra))
        self.taken += len(states)
        y = torch.stack(states)
        t0, t1 = (torch.full((len(states),), t, dtype=torch.float64, device=y.device) for t in self.interval)
        own = {name: _stack([extra[name] for extra in extras], y.device) for name in self.own}
        batch = Batch(y, *new_state(t0, t1), {**self.kwargs, **own})
        stepper = make_stepper(self.make_problem(y.dtype), batch)
        self._count(stepper.begin(self.options.first_step), len(states))
        return stepper

    def _kwargs_of(self, batch: Batch, rows: Tensor) -> dict[str, Any]:
        return {
            name: value.index_select(0, rows) if name in self.own else value for name, value in batch.kwargs.items()
        }

    def _collect(self, batch: Batch, places: Sequence[int]) -> list[StreamResult]:
        """The finished samples; their places become free."""
        if not places:
            return []
        rows = to_device(torch.tensor(places), batch.y.device)
        states = batch.y.index_select(0, rows)
        counts = batch.count.index_select(1, rows).t().tolist()
        results = []
        for place, x, count in zip(places, states.unbind(0), counts, strict=True):
            index = self.indices[place]
            assert index is not None
            self.indices[place] = None
            status = Status(count[Count.STATUS])
            results.append(StreamResult(index, x.clone(), status, count[Count.STEPS], count[Count.ACCEPTED]))
        return results

    def _fill(self) -> None:
        """Takes in new samples where places are free; without any left, shrinks the batch."""
        stepper = self.stepper
        assert stepper is not None
        free = [place for place, index in enumerate(self.indices) if index is None]
        if not free:
            return
        if self.more and len(free) >= min(self.refill_at, len(self.indices)):
            first = self.taken
            newcomers = self._take(len(free))
            if newcomers is not None:
                places = free[: newcomers.batch.rows]
                rows = to_device(torch.tensor(places), newcomers.batch.y.device)
                stepper.replace(rows, newcomers)
                for name in self.own:
                    stepper.batch.kwargs[name].index_copy_(0, rows, newcomers.batch.kwargs[name])
                for number, place in enumerate(places):
                    self.indices[place] = first + number
                self.watch.forget()  # what was asked for before is of those who left
                return
        if len(free) == len(self.indices):
            self.stepper = None
        elif not self.more and len(self.indices) - len(free) <= len(self.indices) * self._share():
            keep = [place for place, index in enumerate(self.indices) if index is not None]
            rows = to_device(torch.tensor(keep), stepper.batch.y.device)
            batch = gather(stepper.batch, rows, rows, self._kwargs_of(stepper.batch, rows))
            smaller = make_stepper(stepper.problem, batch, copy=stepper.copies_outputs)
            smaller.resume(stepper, rows)
            self.stepper, self.indices = smaller, [self.indices[place] for place in keep]
            self.watch.forget()


def _stack(values: Sequence[Any], device: torch.device) -> Tensor:
    """A keyword argument of several samples: tensors, or numbers."""
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    if isinstance(values[0], (bool, int, float)):
        return torch.tensor(values, device=device)
    raise type_error("requests", "keyword arguments that are tensors or numbers", values[0])


def _queue(requests: Iterable[Request]) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    for request in requests:
        if isinstance(request, Tensor):
            yield request, {}
        elif isinstance(request, tuple) and len(request) == 2:
            yield request
        else:
            raise type_error("requests", "tensors or pairs (x_0, keyword arguments)", request)


def stream(
    func: Callable[..., Tensor],
    requests: Iterable[Request],
    tableau: Tableau,
    options: AdaptiveOptions,
    *,
    capacity: int,
    t0: float = 0.0,
    t1: float = 1.0,
    refill_at: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[StreamResult]:
    """sample_stream for func(t, y, **kwargs), as :func:`fmkernels.solvers.adaptive.solve.solve_adaptive` calls it."""
    check_int("capacity", capacity, low=1)
    if refill_at is None:
        refill_at = max(1, capacity // 8)
    check_int("refill_at", refill_at, low=1, high=capacity)
    for name, t in (("t0", t0), ("t1", t1)):
        check_number(name, t)
    if options.shared or options.record:
        raise value_error("options", "steps of each sample, not recorded", options)
    run = Stream(
        partial(options.problem, func, tableau),
        options,
        _queue(requests),
        (t0, t1),
        capacity,
        refill_at,
        model_kwargs or {},
    )
    return _results(run)


def _results(run: Stream) -> Iterator[StreamResult]:
    # no_grad holds within advance() only, not in the code between two results
    while results := run.advance():
        yield from results


def sample_stream(
    model: Callable[..., Tensor],
    requests: Iterable[Request],
    *,
    capacity: int = 64,
    method: str = "dopri5",
    path: Path | None = None,
    prediction: str = "velocity",
    guidance: Any = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    controller: Controller | None = None,
    max_steps: int = 10_000,
    t0: float = 0.0,
    t1: float = 1.0,
    refill_at: int | None = None,
    time_dtype: torch.dtype | None = None,
    **model_kwargs: Any,
) -> Iterator[StreamResult]:
    """Samples requests as they come, in a batch whose places are refilled as samples finish.

    Every sample takes its own adaptive steps, so that some finish long before others. In a fixed batch their places
    would idle until the slowest is done; here a waiting request takes them over at the next step. A sample is what it
    would be alone, as far as the network treats the samples of a batch alone.

    Args:
        model: any callable model(x, t, **kwargs), as of :func:`fmkernels.sample`.
        requests: any iterable, read as places become free: x_0 of one sample, without a batch dimension, or pairs
            (x_0, keyword arguments of the model), tensors without a batch dimension or numbers, which are stacked.
        capacity: places in the batch.
        method: an adaptive method: "heun_euler", "bosh3", "fehlberg", "dopri5", "tsit5", "dopri8".
        path, prediction, guidance: as of :func:`fmkernels.sample`.
        rtol, atol, controller, max_steps: as of :func:`fmkernels.sample`.
        t0, t1: the interval.
        refill_at: free places at which requests are taken in, by two network calls with as many samples; an eighth of
            the capacity if None.
        time_dtype: of t; float32 (float64 for a float64 state) if None.
        model_kwargs: shared by all samples.

    Yields:
        A :class:`StreamResult` for each request, in the order in which they finish.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; a model output unlike the state.
    """
    solver = Solver(
        model,
        method=method,
        path=CondOT() if path is None else path,
        prediction=prediction,
        guidance=guidance,
        rtol=rtol,
        atol=atol,
        controller=IController() if controller is None else controller,
        max_steps=max_steps,
        time_dtype=time_dtype,
    )
    tableau = methods.adaptive_tableau(method, methods.STREAM)
    if tableau is None:
        raise value_error("method", "an adaptive method", method)
    options = AdaptiveOptions(
        rtol=rtol,
        atol=atol,
        controller=solver.controller,
        max_steps=max_steps,
        time_dtype=time_dtype,
    )
    return stream(
        Velocity(model, guidance, solver.path, prediction),
        requests,
        tableau,
        options,
        capacity=capacity,
        t0=t0,
        t1=t1,
        refill_at=refill_at,
        model_kwargs=model_kwargs,
    )


__all__ = ["StreamResult", "sample_stream", "stream"]
