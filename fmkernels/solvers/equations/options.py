"""torchdiffeq's methods and options in our words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import gt, lt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import check_choice, check_function, check_has_values, check_unmapped, type_error, value_error, warn
from ..._torch import transform_active
from ..adaptive.options import STEP_CONTROL, AdaptiveOptions, number_option, step_control_arguments
from ..methods import registry as methods
from ..methods.adams import MAX_ORDER, AdamsBashforth, AdamsMoulton
from ..methods.runge_kutta import inside
from ..programs.builder import Method
from .callbacks import Callbacks
from .packed import Packed

FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb", "checkpoint", "max_order", "reversible")
ADAPTIVE_OPTIONS = (*STEP_CONTROL, "step_t", "jump_t", "per_sample", "checkpoint")
_IGNORED_OPTIONS = ("dtype", "norm", "perturb", "max_iters")  # torchdiffeq's, where they have no meaning


@dataclass(frozen=True, eq=False)
class Settings:
    """How an equation is solved: the arguments of :func:`fmkernels.odeint` of these names."""

    rtol: Any
    atol: Any
    method: Any
    options: dict[str, Any]


def settings_of(rtol: Any, atol: Any, method: Any, options: Any, prefix: str = "") -> Settings:
    """The arguments as settings, as far as they can be checked without a problem; ``prefix`` is of their names."""
    if options is not None and not isinstance(options, dict):
        raise type_error(f"{prefix}options", "a dict", options)
    if method is not None and not isinstance(method, str) and (isinstance(method, type) or not callable(method)):
        raise type_error(f"{prefix}method", "a name, or a method of fixed steps", method)
    options = dict(options or {})
    for name in options:
        if not isinstance(name, str):
            raise type_error(f"{prefix}options", "names as keys", name)
    for name in ("norm", "grid_constructor"):
        value = options.get(name)
        if value is not None and not (name == "norm" and isinstance(value, str) and value == "seminorm"):
            check_function(f"{prefix}options: {name}", value, "a function")
    if options.get("dtype") is not None and not isinstance(options["dtype"], torch.dtype):
        raise type_error(f"{prefix}options: dtype", "a torch.dtype", options["dtype"])
    if options.get("max_order") is not None:
        number_option("max_order", options["max_order"], low=1.0)
    reversible = options.get("reversible")
    if reversible is not None and not isinstance(reversible, bool):
        number_option("reversible", reversible)
    for name in ("perturb", "per_sample", "checkpoint"):
        value = options.get(name)
        if value is not None and not isinstance(value, bool):
            raise type_error(f"{prefix}options: {name}", "a bool", value)
    return Settings(rtol, atol, "dopri5" if method is None else method, options)


def check_func(func: Any) -> None:
    check_function("func", func, "a function func(t, y)")


def check_times(t: Any) -> Tensor:
    """Times as torchdiffeq takes them: (T,) and strictly monotone."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise type_error("t", "a floating tensor", t)
    check_has_values("t", t)
    if t.dim() != 1 or t.shape[0] == 0:
        raise value_error("t", "times of shape (T,), T >= 1", t)
    try:
        times = t.detach().tolist()
    except RuntimeError:
        if not transform_active():
            raise
        check_unmapped("t", t)
        raise value_error("t", "times whose values can be read, which torch.func.functionalize hides", t) from None
    monotone = all(map(lt, times, times[1:])) or all(map(gt, times, times[1:]))  # a NaN is neither
    if not (monotone and math.isfinite(times[0]) and math.isfinite(times[-1])):
        raise value_error("t", "finite, strictly increasing or decreasing times", t)
    return t


def refuse_transforms(method: Any, why: str = "it chooses its steps by values that they hide") -> None:
    """Raises within torch.func's transforms and forward-mode AD."""
    if transform_active():
        raise RuntimeError(
            f"odeint: method {method!r} does not run within torch.func's transforms (vmap, grad, jacrev, jvp, ...) and "
            f"forward-mode AD: {why}; take odeint with an explicit method, e.g. 'dopri5' or 'rk4', or torch.autograd "
            "(torch.autograd.functional.jacobian)"
        )


def check_options(
    packed: Packed, settings: Settings, known: Sequence[str], *, judges: bool, steps: bool = True
) -> None:
    """Warns of options, and of callbacks, that the method does not have.

    Args:
        known: the names of its options.
        judges: whether it accepts and rejects steps.
        steps: whether its steps are known.
    """
    method, options = settings.method, settings.options
    for name in ("rtol", "atol"):
        packed.tolerance(name, getattr(settings, name))
    unknown = [name for name in options if name not in known and name not in _IGNORED_OPTIONS]
    if unknown:
        warn(f"options: method {method!r} has no {', '.join(map(repr, unknown))}")
    unused = Callbacks(packed).unused(steps, judges)
    if unused:
        warn(f"func: method {method!r} does not call {', '.join(unused)}")


def named_method(method: Any, options: dict[str, Any]) -> Method:
    """A method of fixed steps by its name in torchdiffeq or here, or as it is given."""
    found, order = methods.resolve(method, methods.ODEINT), options.get("max_order")
    if order is not None and isinstance(found, (AdamsBashforth, AdamsMoulton)):
        order = int(number_option("max_order", order, low=1.0))
        least = 1 if isinstance(found, AdamsBashforth) else 2
        return replace(found, order=min(max(order, least), MAX_ORDER))
    return found


def interp_of(options: dict[str, Any]) -> str:
    interp = options.get("interp", "linear")
    check_choice("interp", interp, ("linear", "cubic"))
    return str(interp)


def step_size_of(options: Any) -> float | None:
    size = options.get("step_size")
    return None if size is None else number_option("step_size", size, above=0.0)


def per_sample_of(packed: Packed, options: dict[str, Any]) -> bool:
    per_sample = bool(options.get("per_sample", False))
    if per_sample and packed.is_tuple:
        raise value_error("options: per_sample", "a tensor y0, whose dimension 0 is the batch", packed.shapes)
    return per_sample


def adaptive_options(packed: Packed, settings: Settings, record: bool) -> AdaptiveOptions:
    """The settings in the engine's words."""
    per_sample = per_sample_of(packed, settings.options)
    return AdaptiveOptions(
        **step_control_arguments(settings.options),
        rtol=packed.tolerance("rtol", settings.rtol),
        atol=packed.tolerance("atol", settings.atol),
        shared=not per_sample,
        force_min_step=True,
        time_shape="batch" if per_sample else "scalar",
        time_dtype=packed.y0.dtype,
        record=record,
        lends=True,
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
        points.update((x, name == "jump_t") for x in _points(name, options.get(name)))
    inner = sorted((x for x in points if low < x < high), reverse=last < first)

    def beside(time: float, towards: float) -> float:
        return float(inside(time, towards, dtype)) if points.get(time, False) and low < time < high else time

    parts = []
    for start, end in pairwise([first, *inner, last]):
        limits = sorted((beside(start, end), beside(end, start)))
        plain = limits == sorted((start, end))
        parts.append(Segment(start, end, None if plain else (limits[0], limits[1])))
    return parts


def _points(name: str, given: Any) -> list[float]:
    if given is None:
        return []
    try:
        points = torch.as_tensor(given, device=None if isinstance(given, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError):
        raise type_error(f"options: {name}", "a tensor of times", given) from None
    check_has_values(f"options: {name}", points)
    check_unmapped(f"options: {name}", points)
    if points.is_complex() or points.dtype == torch.bool:
        raise type_error(f"options: {name}", "a tensor of times", given)
    if points.requires_grad:
        raise value_error(f"options: {name}", "times without gradient", given)
    numbers: list[float] = points.double().reshape(-1).tolist()
    if any(map(math.isnan, numbers)):
        raise value_error(f"options: {name}", "times that are numbers", given)
    return numbers
