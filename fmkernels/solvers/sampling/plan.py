"""The program of a solver's settings: kept by their values, and under torch.compile a constant with its guards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..._checks import type_error
from ..._keys import NoKey, attributes, is_ours, key_of
from ..._torch import constant_while_compiling, untraced
from ...paths import Path
from ...times import Shift
from ..methods import registry as methods
from ..programs.builder import Builder, Guidance, Method
from ..programs.plans import planned, settings_key
from ..programs.program import Program
from . import grids

TimeGrid = Tensor | np.ndarray | Sequence[float]


@untraced
def plan(
    method: str | Method,
    steps: int,
    schedule: str | Shift | grids.Schedule,
    time_grid: TimeGrid | None,
    path: Path,
    prediction: str,
    guidance: Guidance | None,
) -> Program:
    """The program of a fixed-grid method: the same object for equal settings."""

    def builder() -> Builder:
        return Builder(grids.make_grid(steps, schedule, time_grid, waiting=True), path, prediction, guidance)

    if not (isinstance(method, str) and isinstance(schedule, str) and time_grid is None):
        return builder().plan(methods.resolve(method))  # kept under its times
    try:
        # names are enough of a key, and quicker to look up than the grid and the method that they stand for
        key = (method, steps, schedule, settings_key(path, prediction, guidance))
    except NoKey:
        key = None
    return planned(key, lambda: builder().write(methods.resolve(method)))


def plan_while_compiling(
    method: str | Method,
    steps: int,
    schedule: str | Shift | grids.Schedule,
    time_grid: TimeGrid | None,
    path: Path,
    prediction: str,
    guidance: Guidance | None,
) -> Program:
    """The program as a constant of a graph that torch.compile traces, guarded by all settings.

    Numbers and names are guarded here by their values, objects by their identity, which is all where they do not
    change; of those that do, the numbers that they hold.

    Raises:
        TypeError: settings that no guard sees: times in a tensor or an array, functions that read more than their
            arguments.
    """
    if isinstance(time_grid, (Tensor, np.ndarray)):
        raise TypeError(
            "time_grid: expected a sequence of Python numbers while torch.compile traces, as no guard would see the "
            "values of a tensor or an array (give grid.tolist(), or call outside of what is compiled)"
        )
    grid = None if time_grid is None else tuple([specialised(t) for t in time_grid])
    held = [specialised(value) for value in _numbers_of(guidance)]
    parts = [_taken_apart(part) for part in (method, schedule, path)]
    return _constant(parts, specialised(steps), grid, prediction, guidance, held)


def specialised(value: Any) -> Any:
    """A number that torch.compile may have taken for a symbol, as a guarded constant."""
    return next(iter({value: None})) if isinstance(value, (int, float)) else value


class _Made:
    """Stands before an object's class, names and values."""


def _taken_apart(part: Any) -> Any:
    """An object of ours as its class and what it holds.

    Of one that is made within what is compiled the tracer would give the class's defaults.
    """
    if isinstance(part, (bool, int, float)):
        return specialised(part)
    if isinstance(part, tuple):
        return tuple([_taken_apart(value) for value in part])
    if part is None or isinstance(part, str) or not is_ours(type(part)) or not hasattr(part, "__dict__"):
        return part
    fields = getattr(type(part), "__dataclass_fields__", None)  # and nothing that was derived from them
    names = list(part.__dict__.keys()) if fields is None else list(fields)
    return (_Made, type(part), tuple(names), tuple([_taken_apart(getattr(part, name)) for name in names]))


def _put_together(part: Any) -> Any:
    if not isinstance(part, tuple):
        return part
    if part[:1] != (_Made,):
        return tuple(_put_together(value) for value in part)
    _, kind, names, values = part
    made = object.__new__(kind)
    made.__dict__.update(zip(names, map(_put_together, values), strict=True))
    return made


def _numbers_of(part: Any) -> list[Any]:
    """The numbers that an object holds and that may change: read, so that they are guarded."""
    if part is None or isinstance(part, str) or not hasattr(part, "__dict__"):
        return []
    return [value for value in part.__dict__.values() if isinstance(value, (bool, int, float, str))]


@constant_while_compiling
def _constant(
    made: Sequence[Any],
    steps: int,
    grid: Sequence[float] | None,
    prediction: str,
    guidance: Guidance | None,
    held: Sequence[Any],
) -> Program:
    """Called while tracing; what it returns is unrolled."""
    method, schedule, path = map(_put_together, made)
    if list(held) != _numbers_of(guidance):
        raise TypeError("guidance: expected an object that is made outside of what torch.compile traces")
    parts = {"method": method, "schedule": schedule, "path": path, "guidance": guidance}
    for name, part in parts.items():
        _check_constant(name, part)
    return plan(method, steps, schedule, grid, path, prediction, guidance).unrolled()


def _check_constant(name: str, part: Any) -> None:
    if part is None or isinstance(part, str):
        return
    if is_ours(type(part)):
        network = {f.name for f in getattr(part, "__dataclass_fields__", {}).values() if f.metadata.get("network")}
        values = {k: v for k, v in attributes(part).items() if k not in network}
    elif callable(part) and not hasattr(type(part), "__dict__"):
        values = {name: part}
    else:
        values = {name: part} if type(part).__module__ == "builtins" else dict(vars(part))
    for label, value in values.items():
        try:
            key_of(value)
        except NoKey:
            expected = "numbers and functions that read nothing but their arguments while torch.compile traces"
            raise type_error(f"{name}: {label}" if label != name else name, expected, value) from None
