"""The network calls of a guidance's branches, one for each or one for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from .._arguments import NOTHING, PLAIN, Kind, Named, kind_of, leaves, structure, tree_map
from .._cache import is_plain_context
from .._checks import describe, type_error, value_error
from ..solvers.programs.ownership import reading
from ..solvers.programs.run import Call, JoinedCall

Model = Callable[..., Any]
# For each branch the network and its keyword arguments.
Branches = Mapping[str, tuple[Model, Mapping[str, Any]]]
Batching = bool | Literal["auto"]
# The same with names of arguments that have an entry for each sample.
Batched = Batching | Sequence[str]


def is_plain_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def overridden(
    model_kwargs: Mapping[str, Any],
    other: Mapping[str, Any] | None,
    shared: Sequence[str] = (),
    *,
    argument: str = "negative",
) -> dict[str, Any]:
    """model_kwargs with other entries in place; a number for a tensor's stands for a tensor full of it, and a tensor
    with one entry for one with that entry for each sample, unless it is ``shared``.

    Args:
        argument: what the caller calls the other entries.

    Raises:
        ValueError: a number that is none of the dtype of the tensor.
    """
    result = dict(model_kwargs)
    for name, value in (other or {}).items():
        old = result.get(name)
        if isinstance(old, Tensor) and is_plain_number(value):
            _check_holds(argument, name, value, old.dtype)
            value = torch.full_like(old, value)
        elif isinstance(old, Tensor) and _is_one_for_all(value, old) and name not in shared:
            value = value.expand(old.shape[0], *value.shape[1:])
        result[name] = value
    return result


def _check_holds(argument: str, name: str, value: float, dtype: torch.dtype) -> None:
    """That a dtype holds a number, up to the rounding of floating ones."""
    if dtype is torch.bool:
        holds = value in (0, 1)
    elif dtype.is_floating_point or dtype.is_complex:
        # infinities and NaN too; torch.compile does not trace math.isfinite of a number that changes
        holds = not torch.finfo(dtype).max < abs(value) < math.inf
    else:
        limits = torch.iinfo(dtype)
        holds = limits.min <= value <= limits.max and value == int(value)
    if not holds:
        raise value_error(argument, f"a number for {name} that its dtype, {dtype}, holds", value)


def _is_one_for_all(value: Any, old: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() == old.dim() > 0 and value.shape[0] == 1


class Calls(dict[str, Call]):
    """The network call of each branch; of several, joined by "|", one call on a batch of all of them, if it can be."""

    def __init__(
        self,
        branches: Branches,
        said: Named = NOTHING,
        batching: Batching = True,
        leads: Sequence[tuple[str, tuple]] = (),
    ) -> None:
        super().__init__()
        self._branches, self._said, self._batching, self._leads = branches, said, batching, leads

    def __missing__(self, branch: str) -> Call:
        names = branch.split("|")
        models = [self._branches[name] for name in names]
        if len(names) > 1:
            call: Call = _Joined(models, self._said, self._batching)
        else:
            call = reading("model", *models[0])
        self[branch] = call = _guarded(call, self._leads) if self._leads else call
        return call


def _guarded(call: Call, leads: Sequence[tuple[str, tuple]]) -> Call:
    def guarded(x: Tensor, t: Tensor) -> Tensor | tuple[Tensor, ...]:
        check_leads(leads, x)
        return call(x, t)

    return guarded


def check_leads(leads: Sequence[tuple[str, tuple]], x: Tensor) -> None:
    for name, shape in leads:
        if shape != tuple(x.shape[: len(shape)]):
            raise ValueError(
                f"{name}: expected a number or a leading part of the state's shape {tuple(x.shape)}, got shape {shape}"
            )


class _CannotJoin(ValueError):
    """Why several calls cannot be one."""


@final
class _Joined(JoinedCall):
    """Several calls of a network as one, on their rows one after the other; or apart, where it is not known how."""

    def __init__(self, models: Sequence[tuple[Model, Mapping[str, Any]]], said: Named, batching: Batching) -> None:
        self.model, self.kwargs = models[0][0], [kwargs for _, kwargs in models]
        self.said, self.batching = said, batching
        self.apart = [reading("model", *pair) for pair in models]
        # how the arguments are joined for a number of rows, None where they cannot be
        self.joins: dict[int, Callable[[], dict[str, Any]] | None] = {}
        self.looked = self.writes_to_input = False

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        count = len(self.kwargs)
        kwargs = self._kwargs(x.shape[0])
        if kwargs is None:
            # each with times of its own, to which the network may write, and each output before the next call, which
            # may write to the same buffer
            *first, last = self.apart
            return (*(self._copy(call(x, t.clone())) for call in first), last(x, t.clone()))  # type: ignore[arg-type]
        every = torch.cat([x] * count)
        v = self._output(every, t if t.dim() == 0 else torch.cat([t] * count), kwargs)
        if not self.looked and is_plain_context():
            self.looked = True
            unchanged = torch.equal(every[: x.shape[0]], x) if every.is_inference() else every._version == 0
            self.writes_to_input = not unchanged
        return v.unflatten(0, (count, x.shape[0])).unbind(0)

    @staticmethod
    def _copy(output: Any) -> Any:
        return output.clone() if isinstance(output, Tensor) else output  # what is no tensor is told by the caller

    def on_all(self, x: Tensor, t: Tensor) -> Tensor | None:
        if self.writes_to_input:
            return None
        kwargs = self._kwargs(x.shape[0] // len(self.kwargs))
        return None if kwargs is None else self._output(x, t, kwargs)

    def _kwargs(self, rows: int) -> dict[str, Any] | None:
        known = self.joins
        if rows not in known:
            self.joins = known = {rows: self._join(rows)}
        join = known[rows]
        return None if join is None else join()

    def _output(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The network's, at the rows of all branches."""
        v = self.model(x, t, **kwargs)
        if not isinstance(v, Tensor):
            raise type_error("model", "a tensor from model(x, t)", v)
        if v.dim() == 0 or v.shape[0] != x.shape[0]:
            count = len(self.kwargs)
            raise value_error(
                "model", f"an output of {x.shape[0]} rows for {count} branches of {x.shape[0] // count}", v
            )
        return v

    def _join(self, rows: int) -> Callable[[], dict[str, Any]] | None:
        try:
            return joined_at_each_call(self.kwargs, rows, self.said)
        except _CannotJoin:
            if self.batching is True:
                raise
            return None


def joined_at_each_call(
    kwargs: Sequence[Mapping[str, Any]], rows: int, said: Named = NOTHING
) -> Callable[[], dict[str, Any]]:
    """:func:`join_kwargs` of what the arguments are at each call: tensors are written to in place, by a callback or an
    optimizer, and nothing tells of all ways to do that."""
    result = join_kwargs(kwargs, rows, said)
    if any(structure(value) is not None for k in kwargs for value in k.values()):
        return lambda: join_kwargs(kwargs, rows, said)  # lists and dicts may have other entries
    columns = {name: [k[name] for k in kwargs] for name in result}
    kept = {name: values[0] for name, values in columns.items() if result[name] is values[0]}
    whole: dict[str, list[Tensor]] = {}
    others: dict[str, list[Any]] = {}
    for name, values in columns.items():
        if name not in kept:
            (whole if _are_whole(values, rows) else others)[name] = values

    def join() -> dict[str, Any]:
        joined = kept.copy()
        for name, values in whole.items():
            joined[name] = torch.cat(values)
        for name, values in others.items():
            joined[name] = _rows_of(name, values, rows)
        return joined

    return join


def join_kwargs(kwargs: Sequence[Mapping[str, Any]], rows: int, said: Named = NOTHING) -> dict[str, Any]:
    """The keyword arguments of one call in place of several, the entries of batched ones one after the other.

    Raises:
        ValueError: an argument of which it is not known whether it has an entry for each sample, or that differs
            between the calls and has none; or the calls have different ones.
    """
    names = list(kwargs[0])
    for other in kwargs[1:]:
        if set(other) != set(names):
            odd = sorted(set(names) ^ set(other))
            raise _CannotJoin(f"{odd[0]}: expected the same keyword arguments {_HINT}; it is not given to all")
    return {name: _join(name, [k[name] for k in kwargs], rows, said) for name in names}


_HINT = "in one call for all branches; batched=False makes one call each"


def _join(name: str, values: Sequence[Any], rows: int, said: Named) -> Any:
    kinds: set[Kind] = {kind_of(name, value, rows, said) for value in values}
    first = values[0]
    if "batched" in kinds and kinds <= {"batched", "shared"}:
        if any(structure(value) != structure(first) for value in values[1:]):
            raise _CannotJoin(f"{name}: expected the same structure {_HINT}")
        return tree_map(lambda *leaves: _rows_of(name, leaves, rows), *values)
    if "unknown" in kinds:
        raise _CannotJoin(
            f"{name}: expected to be named in batched=, as it has an entry for each of {rows} samples, or in shared=, "
            f"as it has none, {_HINT}"
        )
    if not _same(values):
        raise _CannotJoin(f"{name}: expected tensors with a row for each of {rows} samples, or equal values, {_HINT}")
    return first


def _are_whole(values: Sequence[Any], rows: int) -> bool:
    """Whether all are plain tensors of one shape with a row for each sample."""
    first = values[0]
    return all(type(value) is Tensor and value.shape == first.shape for value in values) and first.shape[:1] == (rows,)


def _rows_of(name: str, values: Sequence[Any], rows: int) -> Any:
    """Leaves with an entry for each sample, or one for all, one after the other."""
    first = values[0]
    if _are_whole(values, rows):
        return torch.cat(list(values))
    if _same(values) and not (isinstance(first, (Tensor, np.ndarray)) and first.shape[:1] == (rows,)):
        return first
    arrays = all(isinstance(value, np.ndarray) for value in values)
    if not arrays and not all(isinstance(value, Tensor) for value in values):
        raise _CannotJoin(f"{name}: expected tensors, or equal values, {_HINT}; got {describe(values[-1])}")
    try:
        if len({value.ndim for value in values if value.ndim}) > 1:
            raise RuntimeError("a dimension more is not a dimension of size 1")
        shape = torch.broadcast_shapes((rows,), *(value.shape[:1] for value in values))
        inner = torch.broadcast_shapes(*(value.shape[1:] for value in values))
    except RuntimeError:
        shapes = " and ".join(str(tuple(value.shape)) for value in values)
        raise _CannotJoin(
            f"{name}: expected tensors with a row for each of {rows} samples {_HINT}; got shapes {shapes}"
        ) from None
    if arrays:
        return np.concatenate([np.broadcast_to(value, (*shape, *inner)) for value in values])
    return torch.cat([value.expand(*shape, *inner) for value in values])


def _same(values: Sequence[Any]) -> bool:
    """Whether all are one object, or plain values that are equal."""
    first = values[0]
    if all(value is first for value in values):
        return True
    if any(structure(value) != structure(first) for value in values):
        return False
    pairs = [zip(leaves(first), leaves(value), strict=True) for value in values[1:]]
    return all(
        a is b or (isinstance(a, PLAIN) and type(a) is type(b) and bool(a == b)) for pair in pairs for a, b in pair
    )
