"""torchdiffeq's methods and options in our words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from operator import gt, lt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import type_error, value_error
from ..adaptive.options import STEP_CONTROL, AdaptiveOptions, step_control_arguments
from ..methods import registry as methods
from ..methods.adams import MAX_ORDER, AdamsBashforth, AdamsMoulton
from ..programs.builder import Method
from .packed import Packed

_FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "checkpoint", "max_order", "reversible")
_ADAPTIVE_OPTIONS = (*STEP_CONTROL, "step_t", "jump_t", "per_sample", "checkpoint")
_IGNORED_OPTIONS = ("dtype", "norm", "perturb", "max_iters")  # torchdiffeq's, without a meaning here
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def check_times(t: Any, y0: Tensor) -> Tensor:
    """Times as torchdiffeq takes them: (T,) and strictly monotone."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise type_error("t", "a floating tensor", t)
    if t.dim() != 1 or t.shape[0] == 0:
        raise value_error("t", "times of shape (T,), T >= 1", t)
    times = t.detach().tolist()
    monotone = all(map(lt, times, times[1:])) or all(map(gt, times, times[1:]))  # a NaN is neither
    if not (monotone and math.isfinite(times[0]) and math.isfinite(times[-1])):
        raise value_error("t", "finite, strictly increasing or decreasing times", t)
    return t


def check_options(packed: Packed, method: Any, options: dict[str, Any], *, adaptive: bool) -> None:
    """Warns of options and callbacks that the method does not have."""
    _warn_unknown(method, options, _ADAPTIVE_OPTIONS if adaptive else _FIXED_OPTIONS)
    if not adaptive:
        unused = [name for name in CALLBACKS[1:] if getattr(packed.func, name, None) is not None]
        if unused:
            warnings.warn(f"func: method {method!r} does not call {', '.join(unused)}", stacklevel=4)


def _warn_unknown(method: Any, options: dict[str, Any], known: Sequence[str]) -> None:
    unknown = [name for name in options if name not in known and name not in _IGNORED_OPTIONS]
    if unknown:
        warnings.warn(f"options: method {method!r} has no {', '.join(map(repr, unknown))}", stacklevel=5)


def named_method(method: Any, options: dict[str, Any]) -> Method:
    """A method of fixed steps by its name in torchdiffeq or here, or as it is given."""
    found, order = methods.resolve(method, methods.ODEINT), options.get("max_order")
    if order is not None and isinstance(found, (AdamsBashforth, AdamsMoulton)):
        least = 1 if isinstance(found, AdamsBashforth) else 2
        return replace(found, order=min(max(int(order), least), MAX_ORDER))
    return found


def interp_of(options: dict[str, Any]) -> str:
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise value_error("interp", "'linear' or 'cubic'", interp)
    return str(interp)


def _per_sample(packed: Packed, options: dict[str, Any]) -> bool:
    per_sample = bool(options.get("per_sample", False))
    if per_sample and packed.is_tuple:
        raise value_error("options: per_sample", "a tensor y0, whose dimension 0 is the batch", packed.shapes)
    return per_sample


def adaptive_options(packed: Packed, rtol: Any, atol: Any, options: dict[str, Any], record: bool) -> AdaptiveOptions:
    """The options in the engine's words."""
    per_sample = _per_sample(packed, options)
    return AdaptiveOptions(
        **step_control_arguments(options),
        rtol=packed.tolerance("rtol", rtol),
        atol=packed.tolerance("atol", atol),
        shared=not per_sample,
        compact=False,  # func may hold what belongs to the samples
        force_min_step=True,
        time_shape="batch" if per_sample else "scalar",
        time_dtype=packed.y0.dtype,
        record=record,
    )


class Segment(NamedTuple):
    """A part of an adaptive solve between times at which a step must end; ``limits`` of the times that func sees."""

    start: float
    end: float
    limits: tuple[float, float] | None


def segments(options: dict[str, Any], first: float, last: float, dtype: torch.dtype) -> list[Segment]:
    """The parts of a solve from first to last that step_t and jump_t make, where the step control begins anew.

    func never sees the time of a jump itself, but the next one of the dtype on the side where the solver is.
    """
    low, high = min(first, last), max(first, last)
    points: dict[float, bool] = {}
    for name in ("step_t", "jump_t"):
        given = options.get(name)
        if given is not None:
            points.update((x, name == "jump_t") for x in torch.as_tensor(given).double().reshape(-1).tolist())
    inner = sorted((x for x in points if low < x < high), reverse=last < first)
    info = torch.finfo(dtype)

    def beside(time: float, towards: float) -> float:
        if not points.get(time, False) or time in (first, last):
            return time
        return time + math.copysign(max(abs(time) * info.eps, info.tiny), towards - time)

    parts = []
    for start, end in pairwise([first, *inner, last]):
        limits = sorted((beside(start, end), beside(end, start)))
        plain = limits == sorted((start, end))
        parts.append(Segment(start, end, None if plain else (limits[0], limits[1])))
    return parts
