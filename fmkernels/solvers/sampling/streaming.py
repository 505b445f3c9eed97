"""Continuous batching of adaptive solves: places of finished samples are refilled from a queue of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ..._arguments import Named, tree_map
from ..._checks import check_float_tensor, check_int, check_number, check_values, type_error, value_error
from ...paths import Path
from ..adaptive.controllers import Controller
from ..adaptive.options import AdaptiveOptions
from ..methods import registry as methods
from ..methods.tableaus import Tableau
from .places import Newcomer, Places, StreamResult
from .settings import FlowSettings, check_time, network_kwargs
from .velocity import FOLLOW, Model, Rule, Velocity

Request = Tensor | tuple[Tensor, Mapping[str, Any]]


class _StreamSettings(FlowSettings):
    interface = methods.STREAM


@final
class Stream:
    """Places, and the queue that fills them.

    Args:
        refill_at: free places at which new samples are taken in, by two network calls with as many samples.
    """

    def __init__(self, places: Places, requests: Iterator[Any], capacity: int, refill_at: int) -> None:
        self.places, self.requests, self.capacity, self.refill_at = places, requests, capacity, refill_at
        self.taken = 0
        self.more = True
        self.failure: Exception | None = None  # of the queue

    def results(self) -> Iterator[StreamResult]:
        """All samples as they finish; then what the queue has raised."""
        while True:
            with torch.no_grad():  # not in the code between two results
                found = self._advance()
            if found is None:
                break
            yield from found
        if self.failure is not None:
            raise self.failure

    def _advance(self) -> list[StreamResult] | None:
        """What finishes or fails next; None when all is done."""
        failed = self._fill()
        if failed:
            return failed
        if self.places.stepper is None:
            return None
        while True:
            found = self.places.step()
            if found:
                return found

    def _fill(self) -> list[StreamResult]:
        """Takes in new samples where places are free; without any left, shrinks the batch."""
        places = self.places
        free = len(places.free)
        if free == len(places.indices):  # also where there are none
            places.stepper, places.indices = None, []
            free = self.capacity
        elif free < min(self.refill_at, len(places.indices)):
            free = 0
        newcomers, failed = self._read(free) if free else ([], [])
        failed += places.take(newcomers)
        if not self.more and places.stepper is not None and places.free:
            places.shrink()
        return failed

    def _read(self, number: int) -> tuple[list[Newcomer], list[StreamResult]]:
        """Up to so many requests, and those among them that are wrong; what the queue raises is kept until the others
        are done. Each is looked at and copied before the next is read, which may be in the same memory."""
        newcomers: list[Newcomer] = []
        failed: list[StreamResult] = []
        while self.more and len(newcomers) + len(failed) < number:
            try:
                request = next(self.requests)
            except StopIteration:
                self.more = False
            except Exception as error:
                self.more, self.failure = False, error
            else:
                try:
                    newcomers.append(self.places.checked(self.taken, request))
                except Exception as error:
                    failed.append(StreamResult.failed(self.taken, error))
                self.taken += 1
        return newcomers, failed


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
    arguments: Mapping[str, Any] | None = None,
) -> Iterator[StreamResult]:
    """sample_stream for a func(t, y, **arguments) of :func:`fmkernels.solvers.adaptive.solve.solve_adaptive`."""
    for name, t in (("t0", t0), ("t1", t1)):
        check_number(name, t)
    if options.shared or options.record:
        raise value_error("options", "steps of each sample, not recorded", options)
    shared = dict(arguments or {})
    own: set[str] = set()

    def arrange(stacked: dict[str, Any], y: Tensor) -> dict[str, Any]:
        own.update(stacked)
        return {**shared, **stacked}

    places = Places(func, tableau, options, (t0, t1), arrange, lambda: own)
    return _streamed(places, requests, capacity, refill_at)


def _streamed(
    places: Places, requests: Iterable[Request], capacity: int, refill_at: int | None
) -> Iterator[StreamResult]:
    check_int("capacity", capacity, low=1)
    if refill_at is None:
        refill_at = max(1, capacity // 8)
    check_int("refill_at", refill_at, low=1, high=capacity)
    if isinstance(requests, Tensor):
        check_float_tensor("requests", requests)
        check_values("requests", requests)
    none = isinstance(requests, (str, bytes, Mapping)) or not isinstance(requests, Iterable)
    if none or (isinstance(requests, (Tensor, np.ndarray)) and requests.ndim == 0):
        raise type_error("requests", "an iterable of tensors or pairs (x_0, keyword arguments)", requests)
    return Stream(places, iter(requests), capacity, refill_at).results()


def sample_stream(
    model: Model,
    requests: Iterable[Request],
    *,
    capacity: int = 64,
    method: str = "dopri5",
    path: Path | None = FlowSettings.path,
    prediction: str = FlowSettings.prediction,
    guidance: Rule | None = FlowSettings.guidance,
    rtol: float = FlowSettings.rtol,
    atol: float = FlowSettings.atol,
    controller: Controller | None = FlowSettings.controller,
    max_steps: int = FlowSettings.max_steps,
    t0: float = 0.0,
    t1: float = 1.0,
    refill_at: int | None = None,
    time_dtype: torch.dtype | None = FlowSettings.time_dtype,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Iterator[StreamResult]:
    """Samples requests as they come, in a batch whose places are refilled as samples finish.

    Every sample takes its own adaptive steps, so that some finish long before others. In a fixed batch their places
    would idle until the slowest is done; here a waiting request takes them over at the next step. A sample is what it
    would be alone, as far as the network treats the samples of a batch alone.

    No request harms another: one that is wrong, or for which alone the network raises, ends with a
    :class:`StreamResult` whose ``error`` says why (and whose ``x`` raises it), and what the queue itself raises comes
    after the results of all requests before it. What the network raises for no sample alone (out of memory) ends the
    stream; what has finished before was yielded.

    Args:
        model: any callable model(x, t, **model_kwargs), as of :func:`fmkernels.sample`.
        requests: any iterable, read as places become free: x_0 of one sample, without a batch dimension, or pairs
            (x_0, keyword arguments of the model), tensors without a batch dimension or numbers (also within lists,
            tuples and dictionaries), which are stacked; mixed dtypes become one that has room for all, and a
            Python float has x_0's or a wider one. Each is copied as it is read: the next may be in its memory.
        capacity: places in the batch.
        method: an adaptive method: "heun_euler", "bosh3", "fehlberg", "dopri5", "tsit5", "dopri8".
        path, prediction, guidance: as of :func:`fmkernels.sample`. Scales of guidance are numbers or functions.
        rtol, atol, controller, max_steps: as of :func:`fmkernels.sample`.
        t0, t1: the interval, within [0, 1].
        refill_at: free places at which requests are taken in, by two network calls with as many samples; an eighth of
            the capacity if None.
        time_dtype: of t; float32 (float64 for a float64 state) if None.
        model_kwargs: shared by all samples, whatever their shape; those that have none of our names may stand by
            themselves.

    Yields:
        A :class:`StreamResult` for each request, in the order in which they finish.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value; a keyword argument that resembles one of
            ours.
    """
    settings = _StreamSettings(
        model,
        method=method,
        path=path,  # type: ignore[arg-type]  # None is CondOT()
        prediction=prediction,
        guidance=guidance,
        rtol=rtol,
        atol=atol,
        controller=controller,  # type: ignore[arg-type]  # None is IController()
        max_steps=max_steps,
        time_dtype=time_dtype,
    )
    tableau = settings.tableau()
    if tableau is None:
        raise value_error("method", "the name of an adaptive method", method)
    if guidance is not None and guidance.scales():
        raise value_error("guidance", "scales that are numbers or functions of t, as requests come and go", guidance)
    check_time("t0", t0)
    check_time("t1", t1)
    shared = network_kwargs((sample_stream,), settings, kwargs, model_kwargs)
    velocity = Velocity(model, guidance, settings.path, prediction)

    def arrange(own: dict[str, Any], y: Tensor) -> dict[str, Any]:
        twice = sorted(set(own) & set(shared))
        if twice:
            raise value_error("requests", "keyword arguments that are not shared by all samples too", twice)
        velocity.said = Named(batched=frozenset(own), shared=frozenset(shared))
        found = velocity.arguments({**shared, **own}, y)
        # each entry in memory of the batch's own, where those of later requests will be put
        batched = tree_map(lambda leaf: _in_full(leaf, len(y)), found.pop("batched", {}))
        return {**found, "batched": batched} if batched else found

    # a network whose rows are places of requests that come and go holds nothing of theirs
    options = settings.options(compact="auto")
    places = Places(velocity, tableau, options, (t0, t1), arrange, lambda: FOLLOW)
    return _streamed(places, requests, capacity, refill_at)


def _in_full(leaf: Any, rows: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.expand(rows, *leaf.shape[1:]).clone()


__all__ = ["StreamResult", "sample_stream", "stream"]
