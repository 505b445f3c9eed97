"""Values and derivatives of schedules: checked, differentiated by autograd, and held where they have no limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .._checks import FLOATING, own_times, type_error, value_error
from .._dispatch import plain, untraced
from .._torch import constant_while_compiling, func_transform_active, has_tangent, transform_active

# Below this, a standard deviation that vanishes at an end of the path, or a distance from the end, counts as this:
# quotients by it stay finite in float32 and bfloat16 (1e-4 squared is 1e-8, and float32 resolves t next to 1 to 6e-8).
# The schedules themselves are exact; only quantities whose limit at an end is infinite (a score at sigma = 0, a
# derivative of sqrt(1 - t)) are held here, at the end and nearer to it than this.
SMALL = 1e-4


def filled(number: float, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one number, which torch.compile may take for a variable: a fill would be compiled for each number."""
    if torch.compiler.is_compiling():
        return torch.zeros(shape, dtype=dtype, device=device) + number
    return torch.full(shape, number, dtype=dtype, device=device)


def as_tensor(value: Tensor | float, t: Tensor) -> Tensor:
    """A schedule's value as a tensor of t's shape."""
    if isinstance(value, Tensor):
        return value if value.shape == t.shape else value.expand(t.shape)
    return filled(value, t.shape, t.dtype, t.device)


# Of a schedule's function: whether it is finite at both ends, and whether autograd sees its derivative (a constant has
# one); None where the question could not be put.
Facts = tuple[bool, bool | None]
_UNKNOWN: Facts = (False, None)
_PROBES = (0.0, 0.137, 0.291, 0.5, 0.618, 0.857, 1.0)


@constant_while_compiling
def _facts(owner: Any, name: str, dtype: torch.dtype) -> Facts:
    """Found out by calling the function on the CPU at a few times: now, as what it reads may change."""
    with torch.inference_mode(False), torch.enable_grad():
        t = torch.tensor(_PROBES, dtype=dtype, device="cpu", requires_grad=True)
        try:
            value = getattr(owner, name)(own_times(t))
            if not isinstance(value, Tensor):
                return True, True
            finite = bool(torch.isfinite(value).all())
            if bool((value == value.reshape(-1)[0]).all()):
                return finite, True
            if not value.requires_grad:
                return finite, False
            (slope,) = torch.autograd.grad(value.sum(), t, allow_unused=True)
            return finite, slope is not None and bool((slope != 0).any())
        except Exception:  # a schedule of one device, one batch size, a network's dtype: it runs where it can
            return _UNKNOWN


def _facts_if_plain(owner: Any, name: str, t: Tensor) -> Facts:
    if not torch.compiler.is_compiling() and (not untraced() or transform_active()):
        return _UNKNOWN
    return _facts(owner, name, t.dtype)


@constant_while_compiling
def _is_of_numbers(owner: Any) -> bool:
    """Whether what a schedule's functions return depends on numbers of its own alone, of which torch.compile sees when
    they change: one of ours, without tensors. What another reads, a parameter or whatever it closes over, may change
    under compiled code."""
    ours = type(owner).__module__.startswith(__package__)
    return ours and not any(isinstance(value, Tensor) for value in getattr(owner, "__dict__", {}).values())


def _readable(value: Tensor) -> bool:
    """Whether a tensor's values can be looked at without waiting for a device."""
    return value.is_cpu and plain(value) and not transform_active()


def checked(owner: Any, name: str, value: Any, t: Tensor) -> Tensor | float:
    """What a schedule's function returned at t: a float, or a floating tensor that broadcasts to t's shape; nearer than
    SMALL to an end of the path where it has no finite value, that at a distance of SMALL from it."""
    label = f"{type(owner).__name__}.{name}(t)"
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise type_error(label, "a tensor of t's shape, or a number for a constant", value)
        if not torch.compiler.is_compiling() and not math.isfinite(value):
            raise value_error(label, "a finite number", value)
        return float(value)
    if value.dtype not in FLOATING:
        raise type_error(label, "a floating tensor", value)
    if value.shape != t.shape and not _expands(value.shape, t.shape):
        raise value_error(label, f"t's shape, {tuple(t.shape)}", value)
    if value.dtype != t.dtype:
        value = value.to(t.dtype)
    compiling = torch.compiler.is_compiling()
    if (_is_of_numbers(owner) and _facts(owner, name, t.dtype)[0]) if compiling else _inside(t):
        return value
    function = getattr(owner, name)
    with torch.no_grad():
        end = function(nearest_end(t))
    if not compiling and _readable(end) and math.isfinite(end.sum().item()):
        return value
    held: Tensor = function(torch.where(torch.isfinite(end), t, t.clamp(SMALL, 1.0 - SMALL)))
    return held.to(t.dtype)


def _inside(t: Tensor) -> bool:
    """Whether all times are known to be at least SMALL away from both ends."""
    if not _readable(t):
        return False
    if t.numel() == 0:
        return True
    low, high = t.detach().aminmax()
    return low.item() >= SMALL and high.item() <= 1.0 - SMALL


def not_below(value: Tensor, limit: float) -> bool:
    """Whether all magnitudes are known to be at least a limit."""
    return _readable(value) and (value.numel() == 0 or value.detach().abs().amin().item() >= limit)


def nearest_end(t: Tensor) -> Tensor:
    """0 or 1 for each time, whichever is nearer."""
    return t.detach().round().clamp(0.0, 1.0)


def _expands(shape: torch.Size, wanted: torch.Size) -> bool:
    lead = len(wanted) - len(shape)
    return lead >= 0 and all(size in (1, other) for size, other in zip(shape, wanted[lead:], strict=True))


# Functions, by the schedule that has them, whose derivative was seen where no one can look at each: on a device. What
# is kept says only that an error need not be looked for again.
_SEEN: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def _seen(owner: Any) -> set[str]:
    try:
        return _SEEN.setdefault(owner, set())
    except TypeError:  # not hashable: nothing is kept
        return set()


def _check_differentiable(owner: Any, name: str, value: Any, slope: Tensor | None, t: Tensor) -> None:
    """That autograd sees the derivative of a schedule's function, which was ``slope`` where its value was at times t.

    Raises:
        ValueError: it does not, and the function is no constant.
    """
    if not torch.compiler.is_compiling():
        if not isinstance(value, Tensor):
            return
        if slope is not None and _readable(slope) and slope.detach().sum().item() != 0.0:
            return
        if slope is not None and not slope.is_cpu and name in _seen(owner):
            return
    differentiable = _facts_if_plain(owner, name, t)[1]
    if differentiable is None and untraced() and isinstance(value, Tensor) and value.dim():
        differentiable = value.requires_grad
    if differentiable is False:
        raise value_error(
            f"{type(owner).__name__}.{name}",
            f"a function of t that autograd can differentiate (a table, a rounding or a detached t has no derivative), "
            f"or a method d_{name}(t) beside it",
            value,
        )
    if differentiable and slope is not None and not slope.is_cpu:
        _seen(owner).add(name)


def derivative(owner: Any, name: str, t: Tensor) -> Tensor:
    """d function / d t of a schedule's function, which acts on each time alone, by automatic differentiation.

    Differentiable itself, with respect to t and to what else the function depends on.
    """
    function: Callable[[Tensor], Any] = getattr(owner, name)
    if torch.compiler.is_compiling() or func_transform_active():
        # autograd.grad can be neither traced nor transformed; forward mode can, at five times the cost in plain calls
        if torch.compiler.is_compiling():
            _check_differentiable(owner, name, None, None, t)

        def values(times: Tensor) -> Tensor:
            return as_tensor(function(own_times(times)), times)

        slope = torch.func.jvp(values, (t,), (torch.ones_like(t),))[1]
        return slope.to(t.dtype)  # of a 0-dim t times a number forward mode makes float64
    wanted = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    # inference mode would record nothing and make every derivative 0, enable_grad notwithstanding
    with torch.inference_mode(False), torch.enable_grad():
        if wanted and t.requires_grad:
            leaf = t.view_as(t)
        else:
            with torch.no_grad():  # a view keeps t's tangent, which detach drops
                leaf = t.clone() if t.is_inference() else t.view_as(t) if has_tangent(t) else t.detach()
            leaf.requires_grad_()
        value = function(own_times(leaf))
        if not isinstance(value, Tensor) or not value.requires_grad:  # a constant
            _check_differentiable(owner, name, value, None, t)
            return torch.zeros_like(t)
        keep = wanted and _has_other_leaf(value, leaf)
        (slope,) = torch.autograd.grad(as_tensor(value, leaf).sum(), leaf, create_graph=keep, allow_unused=True)
        _check_differentiable(owner, name, value, slope, t)
    return torch.zeros_like(t) if slope is None else slope


def _has_other_leaf(value: Tensor, leaf: Tensor) -> bool:
    """Whether a graph ends in a tensor besides the leaf: a learnable parameter, or times that leaf is a view of."""
    seen: set[Any] = set()
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", leaf) is not leaf:
            return True
        stack += [parent for parent, _ in node.next_functions]
    return False


def _tracked(x: Tensor) -> bool:
    return x.requires_grad or torch.compiler.is_compiling() or transform_active()


def root(x: Tensor) -> Tensor:
    """sqrt(x) for x >= 0, whose derivative counts the root as at least SMALL, as the closed derivatives do."""
    if not _tracked(x):
        return torch.sqrt(x)
    low = x < SMALL * SMALL
    held = torch.sqrt(x.detach()) + (0.5 / SMALL) * (x - x.detach())
    return torch.where(low, held, torch.sqrt(torch.where(low, SMALL * SMALL, x)))


def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for x >= 0 and exponent >= 0, whose derivative counts x as at least SMALL where it has no limit."""
    if exponent >= 1.0 or exponent == 0.0 or not _tracked(x):
        return x**exponent
    low = x < SMALL
    held = x.detach() ** exponent + exponent * SMALL ** (exponent - 1.0) * (x - x.detach())
    return torch.where(low, held, torch.where(low, SMALL, x) ** exponent)
