"""The network calls of a guidance's branches, one for each or one for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._checks import type_error, value_error
from ..solvers.programs.run import Call

Model = Callable[..., Any]
Branches = dict[str, tuple[Model, Mapping[str, Any]]]


def overridden(model_kwargs: Mapping[str, Any], other: Mapping[str, Any] | None) -> dict[str, Any]:
    """model_kwargs with other entries in place; a number for a tensor's stands for a tensor full of it."""
    result = dict(model_kwargs)
    for name, value in (other or {}).items():
        old = result.get(name)
        if isinstance(old, Tensor) and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = torch.full_like(old, value)
        result[name] = value
    return result


class Calls(dict[str, Call]):
    """The network call of each branch; of several, joined by "|", one call on a batch of all of them."""

    def __init__(self, branches: Branches, shared: Sequence[str] = (), leads: Sequence[tuple[str, tuple]] = ()) -> None:
        super().__init__()
        self._branches, self._shared, self._leads = branches, shared, leads

    def __missing__(self, branch: str) -> Call:
        names = branch.split("|")
        models = [self._branches[name] for name in names]
        if len(names) > 1:
            call: Call = _Batched(models[0][0], [kwargs for _, kwargs in models], self._shared)
        else:
            call = _bound(*models[0])
        self[branch] = call = _guarded(call, self._leads) if self._leads else call
        return call


def _bound(model: Model, kwargs: Mapping[str, Any]) -> Call:
    return (lambda x, t: model(x, t, **kwargs)) if kwargs else model


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


@final
class _Batched:
    """Several calls of a network as one, on their rows one after the other."""

    def __init__(self, model: Model, kwargs: list[Mapping[str, Any]], shared: Sequence[str]) -> None:
        self.model, self.kwargs, self.shared = model, kwargs, shared
        self.merged: dict[int, dict[str, Any]] = {}  # for each number of rows

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        count, rows = len(self.kwargs), x.shape[0]
        merged = self.merged.get(rows)
        if merged is None:
            self.merged[rows] = merged = merge_kwargs(self.kwargs, rows, self.shared)
        v = self.model(torch.cat([x] * count), t if t.dim() == 0 else torch.cat([t] * count), **merged)
        if not isinstance(v, Tensor):
            raise type_error("model", "a tensor from model(x, t)", v)
        if v.dim() == 0 or v.shape[0] != count * rows:
            raise value_error("model", f"an output of {count * rows} rows for {count} branches of {rows}", v)
        return v.unflatten(0, (count, rows)).unbind(0)


def merge_kwargs(kwargs: Sequence[Mapping[str, Any]], rows: int, shared: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of one call in place of several: what differs is concatenated, samples are repeated."""
    hint = "in one call for all branches; batched=False makes one call each"
    names = list(kwargs[0])
    merged = {}
    for other in kwargs[1:]:
        if set(other) != set(names):
            odd = sorted(set(names) ^ set(other))
            raise ValueError(f"{odd[0]}: expected the same keyword arguments {hint}; it is not given to all")
    for name in names:
        flat = [pytree.tree_flatten(k[name]) for k in kwargs]
        if any(spec != flat[0][1] for _, spec in flat[1:]):
            raise ValueError(f"{name}: expected the same structure {hint}")
        leaves = [
            _merge(name, values, rows, name in shared, hint)
            for values in zip(*(leaves for leaves, _ in flat), strict=True)
        ]
        merged[name] = pytree.tree_unflatten(leaves, flat[0][1])
    return merged


def _merge(name: str, values: Sequence[Any], rows: int, shared: bool, hint: str) -> Any:
    first = values[0]
    if all(value is first for value in values):
        per_sample = isinstance(first, Tensor) and first.dim() > 0 and first.shape[0] == rows and not shared
        return torch.cat([first] * len(values)) if per_sample else first
    if all(isinstance(value, Tensor) for value in values):
        try:
            shape = torch.broadcast_shapes(*(value.shape for value in values))
        except RuntimeError:
            shape = torch.Size()
        if not shared and shape and shape[0] in (1, rows):
            return torch.cat([value.expand(rows, *shape[1:]) for value in values])
        shapes = " and ".join(str(tuple(value.shape)) for value in values)
        raise ValueError(f"{name}: expected tensors with a row for each of {rows} samples {hint}; got shapes {shapes}")
    if any(isinstance(value, Tensor) for value in values) or not all(
        type(value) is type(first) and bool(value == first) for value in values
    ):
        raise ValueError(f"{name}: expected tensors, or equal values, {hint}; got {values[0]!r} and {values[-1]!r}")
    return first
