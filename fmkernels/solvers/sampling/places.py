"""The places of a stream's batch: what is taken in, steps, finishes, and fails, each sample by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..._arguments import leaves, structure, tree_map
from ..._checks import check_float_tensor, check_like, check_values, tensor_of, type_error, value_error
from ...ops.step_control.op import Clock, Count, Status, new_state
from ..adaptive.compaction import Watch, gather, select_rows
from ..adaptive.native_stepper import make_stepper
from ..adaptive.options import AdaptiveOptions
from ..adaptive.rows import Batch, Field, to_device
from ..adaptive.stepper import Stepper
from ..methods.tableaus import Tableau

# From the requests' own keyword arguments, stacked, and their states to the arguments of func.
Arrange = Callable[[dict[str, Any], Tensor], dict[str, Any]]


class _Result(NamedTuple):
    request: int
    sample: Tensor | None
    status: Status | None
    n_steps: int
    n_accepted: int
    error: Exception | None = None


class StreamResult(_Result):
    """One sample of a stream.

    Attributes:
        request: its number in the queue.
        sample: the sample where its solve ended: at the end if status is SUCCESS. None of a request that failed.
        status: an :class:`fmkernels.Status`. None of a request that failed.
        n_steps: steps tried.
        n_accepted: steps taken.
        error: why the request failed: what was wrong with it, or what the network raised for it alone. None else.
    """

    __slots__ = ()

    @property
    def x(self) -> Tensor:
        """The sample.

        Raises:
            Exception: the request's error, if it failed.
        """
        if self.error is not None:
            raise self.error
        assert self.sample is not None
        return self.sample

    @classmethod
    def failed(cls, request: int, error: Exception) -> StreamResult:
        return cls(request, None, None, 0, 0, error)


class Newcomer(NamedTuple):
    """A request in memory of its own, its numbers as tensors."""

    request: int
    state: Tensor
    own: dict[str, Any]


@final
class Places:
    """A batch whose rows are places of samples.

    Args:
        func: func(t, y, **arguments).
        arrange: see :data:`Arrange`.
        follow: names of the arguments of func that have an entry for each sample.
    """

    def __init__(
        self,
        func: Field,
        tableau: Tableau,
        options: AdaptiveOptions,
        interval: tuple[float, float],
        arrange: Arrange,
        follow: Callable[[], Collection[str]],
    ) -> None:
        self.func, self.tableau, self.options, self.interval = func, tableau, options, interval
        self.arrange, self.follow = arrange, follow
        self.stepper: Stepper | None = None
        self.indices: list[int | None] = []  # the request in each place; None: free
        self.watch = Watch(delay=1)
        self.like: Newcomer | None = None  # the first request

    @property
    def free(self) -> list[int]:
        return [place for place, index in enumerate(self.indices) if index is None]

    # ------------------------------------------------------------------ taking in

    def take(self, newcomers: Sequence[Newcomer]) -> list[StreamResult]:
        """Puts requests in free places, or in new ones where there are none; returns those that fail at once."""
        if not newcomers:
            return []
        stepper, begun, failed = self._begin_all(newcomers)
        if stepper is None:
            return failed
        numbers = [newcomer.request for newcomer in begun]
        self.watch.forget()  # what was asked for before is of those who left
        if self.stepper is None:
            self.stepper, self.indices = stepper, list(numbers)
            return failed
        places = self.free[: len(numbers)]
        rows = to_device(tensor_of(places), stepper.batch.y.device)
        batch, new = self.stepper.batch, stepper.batch
        self.stepper.replace(rows, stepper)
        batch.kwargs = {
            name: _put(value, new.kwargs[name], rows) if name in self.follow() else value
            for name, value in batch.kwargs.items()
        }
        for place, number in zip(places, numbers, strict=True):
            self.indices[place] = number
        return failed

    def checked(self, number: int, request: Any) -> Newcomer:
        """A copy of a request, which must be like the first one.

        Raises:
            TypeError, ValueError: it is none, or unlike the first.
        """
        name, state, extra = f"requests[{number}]", request, {}
        if not isinstance(request, Tensor):
            if not isinstance(request, (tuple, list)) or len(request) != 2 or not isinstance(request[1], Mapping):
                raise type_error(name, "a tensor or a pair (x_0, keyword arguments)", request)
            state, extra = request
        check_float_tensor(name, state)
        check_values(name, state)
        state = state.clone()
        own = {key: tree_map(lambda leaf: _own_tensor(name, leaf, state), value) for key, value in extra.items()}
        if self.like is None:
            self.like = Newcomer(number, state, own)
        first, like = f"requests[{self.like.request}]", self.like
        check_like(name, state, first, like.state)
        if set(own) != set(like.own):
            raise value_error(name, f"the keyword arguments of {first}, {sorted(like.own)}", sorted(own))
        for key, value in own.items():
            if structure(value) != structure(like.own[key]):
                raise value_error(name, f"{key} of the structure that it has in {first}", value)
            for mine, theirs in zip(leaves(value), leaves(like.own[key]), strict=True):
                if mine.shape != theirs.shape:
                    raise value_error(name, f"{key} of the shape that it has in {first}, {tuple(theirs.shape)}", mine)
        return Newcomer(number, state, {key: own[key] for key in like.own})

    def _begin_all(
        self, newcomers: Sequence[Newcomer]
    ) -> tuple[Stepper | None, Sequence[Newcomer], list[StreamResult]]:
        """A stepper with the newcomers that the network takes, those, and the others with what it raised for them."""
        try:
            return self._begin(newcomers), newcomers, []
        except Exception:
            good, errors = [], []
            for newcomer in newcomers:
                try:
                    self._begin([newcomer])
                    good.append(newcomer)
                except Exception as error:
                    errors.append(StreamResult.failed(newcomer.request, error))
            if not errors:
                raise
            return (self._begin(good) if good else None), good, errors

    def _begin(self, newcomers: Sequence[Newcomer]) -> Stepper:
        """Derivatives and first steps."""
        y = torch.stack([newcomer.state for newcomer in newcomers])
        own = {
            key: tree_map(lambda *values: torch.stack(values), *(newcomer.own[key] for newcomer in newcomers))
            for key in newcomers[0].own
        }
        t0, t1 = (torch.full((len(newcomers),), t, dtype=torch.float64, device=y.device) for t in self.interval)
        batch = Batch(y, *new_state(t0, t1), self.arrange(own, y))
        stepper = make_stepper(self.options.problem(self.func, self.tableau, y.dtype), batch)
        stepper.begin(self.options.first_step)
        return stepper

    # ------------------------------------------------------------------ steps

    def step(self) -> list[StreamResult]:
        """Steps, and the samples that have finished or failed; their places become free."""
        assert self.stepper is not None
        for _ in range(self.options.chunk):
            try:
                self.stepper.step()
            except Exception:
                failed = self._drop_failed()
                if not failed:
                    raise
                return failed
            if self.stepper.running == 0:
                break
        if self.stepper.running == len(self.indices) - len(self.free):  # known without looking: nobody has finished
            return []
        status = self.watch.look(self.stepper.batch.count)
        if status is None:
            return []
        return self._collect(
            [p for p, s in enumerate(status.tolist()) if s != Status.RUNNING and self.indices[p] is not None]
        )

    def _collect(self, places: Sequence[int]) -> list[StreamResult]:
        if not places:
            return []
        assert self.stepper is not None
        batch = self.stepper.batch
        rows = to_device(tensor_of(places), batch.y.device)
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

    def _drop_failed(self) -> list[StreamResult]:
        """After the network has raised: the samples for which it does so alone leave their places."""
        failed: dict[int, StreamResult] = {}
        for place, index in enumerate(self.indices):
            if index is not None:
                try:
                    self._gathered([place]).step()
                except Exception as error:
                    failed[place] = StreamResult.failed(index, error)
        good = [place for place in range(len(self.indices)) if place not in failed]
        if not failed:
            return []
        if not good:
            self.stepper = None
            self.indices = []
            return list(failed.values())
        # their places hold a finished copy of another sample until they are taken
        stepper = self._gathered([good[0] if place in failed else place for place in range(len(self.indices))])
        for place in failed:
            self.indices[place] = None
            stepper.batch.count[Count.STATUS, place] = Status.SUCCESS
            stepper.batch.clock[Clock.H, place] = 0.0
            stepper.step_size[place] = 0.0
        self.stepper = stepper
        self.watch.forget()
        return list(failed.values())

    def _gathered(self, places: Sequence[int]) -> Stepper:
        """A stepper that goes on with some places."""
        stepper = self.stepper
        assert stepper is not None
        rows = to_device(tensor_of(places), stepper.batch.y.device)
        kwargs = select_rows(stepper.batch.kwargs, self.follow(), rows, len(self.indices))
        smaller = make_stepper(stepper.problem, gather(stepper.batch, rows, rows, kwargs), copy=stepper.copies_outputs)
        smaller.resume(stepper, rows)
        return smaller

    def shrink(self) -> None:
        """Lets free places go, where few are left that are not."""
        assert self.stepper is not None
        free = set(self.free)
        keep = [place for place in range(len(self.indices)) if place not in free]
        if not keep:
            self.stepper, self.indices = None, []
        elif len(keep) <= len(self.indices) * self.options.compact_below(self.stepper.batch.y):
            self.stepper = self._gathered(keep)
            self.indices = [self.indices[place] for place in keep]
            self.watch.forget()


def _own_tensor(name: str, leaf: Any, like: Tensor) -> Tensor:
    if isinstance(leaf, Tensor):
        if leaf.device != like.device:
            raise value_error(name, f"keyword arguments on the device of x_0, {like.device}", leaf)
        return leaf.clone()
    if isinstance(leaf, float):
        dtype = torch.promote_types(torch.get_default_dtype(), like.dtype)
        return torch.tensor(leaf, dtype=dtype, device=like.device)
    if isinstance(leaf, (bool, int)):
        return torch.tensor(leaf, device=like.device)
    raise type_error(name, "keyword arguments that are tensors or numbers", leaf)


def _put(value: Any, new: Any, rows: Tensor) -> Any:
    """Batched arguments with the entries of others in some rows, of a dtype that has room for both."""

    def put(old: Any, other: Any) -> Any:
        if not isinstance(old, Tensor) or old.dim() == 0:
            return old
        dtype = torch.promote_types(old.dtype, other.dtype)
        return old.to(dtype).index_copy_(0, rows, other.to(dtype))

    return tree_map(put, value, new)
