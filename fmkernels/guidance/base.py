"""What all guidance shares: scales, the network calls of its branches, and its two ways of being used.

A guidance writes its velocity once, in the expressions of :mod:`fmkernels.solvers.programs.expressions`. In a
fixed-grid solve these become part of the solver's own updates; in an adaptive one, where times are known only when it
runs, the same lines are evaluated at once by :class:`fmkernels.solvers.programs.immediate.Immediate`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._arguments import NOTHING, PLAIN, Named, all_kwargs, check_named, named, names_of
from .._cache import is_plain_context
from .._checks import (
    check_callable,
    check_choice,
    check_number,
    is_word,
    own_times,
    real_array,
    tensor_of,
    type_error,
    value_error,
)
from .._keys import attributes, is_ours, key_or_none
from ..paths import CondOT, Path
from ..paths.targets import TARGETS
from ..solvers.programs.builder import Builder
from ..solvers.programs.expressions import Expr, Number, as_number
from ..solvers.programs.immediate import Immediate
from ..solvers.programs.run import Call
from .calls import Batched, Batching, Branches, Calls, Model, is_plain_number

# A number, one for each sample (or token), or a function of the time, given as a tensor.
Scale = float | Tensor | np.ndarray | Callable[[Tensor], Tensor | float]
Interval = tuple[float, float] | None
# The branch with the caller's own keyword arguments: what an unguided solver calls.
CONDITIONAL = ""
UNCONDITIONAL = "unconditional"
# Fields that the network calls read and the program does not.
NETWORK = {"network": True}
# Fields as the caller gave them, of which others are made, for the programs and for the network calls.
GIVEN = {"network": True, "given": True}
_PREFIX = "guidance:"
_COND_OT = CondOT()


def checked_scale(name: str, scale: Scale) -> Scale:
    """A float, a float64 array of the host, or a function; arrays are copied, and written to no more.

    Raises:
        TypeError, ValueError: it is none of them.
    """
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise value_error(name, "numbers without a gradient, as there is none for them: scale.detach()", scale)
    if isinstance(scale, (Tensor, np.ndarray, np.generic)):
        array = np.array(real_array(name, _SCALE, scale if isinstance(scale, Tensor) else np.asarray(scale)))
        if not np.isfinite(array).all():
            raise value_error(name, "finite numbers", scale)
        if not torch.compiler.is_compiling():
            array.setflags(write=False)  # torch.compile takes its numbers for constants
        return array if array.ndim else float(array)
    if callable(scale) and not isinstance(scale, type):
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise type_error(name, _SCALE, scale)
    check_number(name, scale)
    return float(scale)


_EDGE = 1e-6  # a few units in the last place of float32
_SCALE = "a number, a tensor with one for each sample, or a function of t"


def check_batched(value: Batched) -> None:
    if not isinstance(value, bool) and not is_word(value, "auto"):
        if isinstance(value, str):
            raise value_error("batched", "True, False, 'auto' or a sequence of names of keyword arguments", value)
        names_of("batched", value)


def said_of(batched: Batched, shared: Sequence[str], labels: Iterable[str] = ()) -> Named:
    """What the fields ``batched`` and ``shared`` say."""
    names = () if isinstance(batched, (bool, str)) else batched
    return Named(frozenset(names), frozenset(shared), frozenset(labels))


def batching_of(batched: Batched) -> Batching:
    """Names ask for one call."""
    return batched if isinstance(batched, bool) else "auto" if isinstance(batched, str) else True


def labels_of(negative: Mapping[str, Any] | None) -> list[str]:
    """Arguments in whose place a number stands, which are class labels if they look like them."""
    return [name for name, value in (negative or {}).items() if is_plain_number(value)]


def check_kwargs(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise type_error(name, "a dict of keyword arguments", value)


def checked_interval(interval: Interval) -> Interval:
    if interval is None:
        return None
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise type_error("interval", "two times (low, high)", interval)
    for time in interval:
        check_number("interval", time)
    low, high = (float(time) for time in interval)
    if low > high:
        raise value_error("interval", "low <= high", interval)
    return low, high


def scale_at(builder: Builder, scale: Scale, t: Number, interval: Interval = None, outside: float = 1.0) -> Number:
    """The scale at time t, ``outside`` beyond the interval; a float where it is the same for all samples.

    Beside an array of times an array of scales stands for the leading dimensions of it.
    """
    value: Number
    if callable(scale):
        value = _checked_value(scale(own_times(t)))
        if isinstance(value, Tensor) and not isinstance(t, Tensor):
            value = as_number(value, "scale")
    else:
        value = scale
    shape = () if isinstance(t, float) else t.shape
    dims = len(shape)
    if not isinstance(value, float):
        if isinstance(t, Tensor) and not isinstance(value, Tensor):
            value = tensor_of(value, t.dtype).to(t.device)
        if dims and value.ndim > dims:
            raise value_error("scale", f"no more dimensions than the times, whose shape is {tuple(shape)}", value)
        if dims:
            value = _spread(value.reshape((*value.shape, *(1,) * (dims - value.ndim))), tuple(shape))
    if interval is None:
        return value
    if not dims and not isinstance(builder, Immediate):  # the host knows
        return value if within(float(t), interval) else outside
    if isinstance(t, Tensor):
        value = value if isinstance(value, Tensor) else t.new_full((), float(value))
        return torch.where(within(t, interval), value, t.new_full((), outside))
    inside = np.asarray(within(t, interval))
    if not inside.any():
        return outside
    return value if inside.all() else np.where(inside, value, outside)


def _spread(value: Any, shape: tuple) -> Any:
    """Numbers of a shape of so many dimensions, each repeated over what it stands for; others are told by the calls."""
    if tuple(value.shape) == shape or any(n not in (1, size) for n, size in zip(value.shape, shape, strict=True)):
        return value
    return value.expand(shape) if isinstance(value, Tensor) else np.broadcast_to(value, shape)


def within(t: Number, interval: tuple[float, float]) -> Any:
    """Whether a time is in the interval. Its ends belong to it whatever the rounding, float32's too, of a grid: 0.7 is
    0.1 * 7 = 0.7000000000000001."""
    low, high = interval
    return (t >= low - _EDGE * max(1.0, abs(low))) & (t <= high + _EDGE * max(1.0, abs(high)))


def _checked_value(value: Any) -> Number:
    """What a scale's function returned."""
    if isinstance(value, Tensor) and not (value.is_complex() or value.dtype == torch.bool):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    array = value if isinstance(value, (np.ndarray, np.generic)) else None
    if array is None or array.dtype.kind not in "iuf":
        raise type_error("scale(t)", "a number, or a tensor of t's shape", value)
    return np.asarray(array, dtype=np.float64) if array.ndim else float(array)


@dataclass(frozen=True, eq=False)
class Guidance(ABC):
    """A rule that makes one velocity from several network outputs; immutable, compared by identity."""

    @abstractmethod
    def velocity(self, builder: Builder, x: Expr, t: Number) -> Expr:
        """The guided velocity at the state x and time t, written down in a builder."""

    @abstractmethod
    def branches(self, model: Model, model_kwargs: Mapping[str, Any]) -> Branches:
        """For each branch the network and its keyword arguments."""

    @property
    def said(self) -> Named:
        """What the guidance says of keyword arguments: which have an entry for each sample, and which have none."""
        return Named(shared=frozenset(getattr(self, "shared", ())))

    @property
    def batching(self) -> Batching:
        """Whether one network call serves all branches; "auto": where it is known how."""
        return True

    def joined(self, branches: Branches, said: Named = NOTHING) -> Mapping[str, Call]:
        """The network calls of branches, for an executor of programs."""
        return Calls(branches, self.said | said, self.batching, list(self._leads()))

    def calls(self, model: Model, model_kwargs: Mapping[str, Any], said: Named = NOTHING) -> Mapping[str, Call]:
        """The network calls of the branches."""
        branches = self.branches(model, model_kwargs)
        check_named(said, (name for _, kwargs in branches.values() for name in kwargs))
        return self.joined(branches, said)

    def at(
        self,
        model: Model,
        model_kwargs: Mapping[str, Any] | None = None,
        path: Path = _COND_OT,
        prediction: str = "velocity",
        *,
        batched: Sequence[str] = (),
        shared: Sequence[str] = (),
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided velocity as a function of tensors (x, t), as adaptive solvers and likelihoods call it.

        t has shape (), (B,), ... and is not looked at by the host: beyond an interval the velocity is the conditional
        one (and the unconditional branch is evaluated all the same). A function of (x, t) has no past and no steps: APG
        goes without its momentum, CFG-Zero* without its zero-init, and CFG++, which is defined by steps, raises.

        Args:
            model: any callable model(x, t, **model_kwargs).
            model_kwargs: of the model.
            path: for rules that need more than velocities.
            prediction: what the model returns, as in :func:`fmkernels.sample`.
            batched, shared: names of keyword arguments, as in :func:`fmkernels.sample`.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value.
        """
        check_callable("model", "a callable model(x, t, **model_kwargs)", model)
        if not isinstance(path, Path):
            raise type_error("path", "a path of fm.paths", path)
        check_choice("prediction", prediction, TARGETS)
        given, said = all_kwargs({}, model_kwargs), named(batched, shared)
        calls = self.calls(model, given, said)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            own = calls if is_plain_context() else self.calls(model, given, said)  # transforms have calls of their own
            builder = Immediate(own, x, t, path, prediction)
            return builder.tensor(self.velocity(builder, builder.x, t))

        return velocity

    def scales(self) -> dict[str, np.ndarray | Tensor]:
        """The arrays with an entry for each sample (or token) among what the programs read."""
        leaves = enumerate(self._flat(network=False)[0])
        return {str(i): leaf for i, leaf in leaves if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim}

    def with_scales(self, scales: Mapping[str, Tensor]) -> Guidance:
        """The same guidance with other arrays, as :meth:`scales` names them."""
        if not scales:
            return self
        leaves, spec = self._flat(network=False)
        for name, value in scales.items():
            leaves[int(name)] = value
        result = copy.copy(self)
        for name, value in pytree.tree_unflatten(leaves, spec).items():
            object.__setattr__(result, name, value)
        return result

    def _flat(self, network: bool | None = None) -> tuple[list[Any], Any]:
        """The fields, or those alone that the network calls or the programs read, as leaves."""
        kept = [f.name for f in fields(self) if network in (None, f.metadata.get("network", False))]
        return pytree.tree_flatten({name: getattr(self, name) for name in kept})

    def _leads(self) -> Iterator[tuple[str, tuple]]:
        """Names and shapes of the arrays of scales."""
        for f in fields(self):
            value = getattr(self, f.name)
            if not (isinstance(value, PLAIN) or f.metadata.get("network")):
                for leaf in pytree.tree_leaves(value):
                    if isinstance(leaf, (Tensor, np.ndarray)):
                        yield f.name, tuple(leaf.shape)

    @property
    def plan_key(self) -> Hashable | None:
        """What the programs written with this guidance depend on; those of equal keys (and one class) are shared.

        None, so that each solve writes its own program: for functions as scales, which may change, and for classes of
        one's own, which a subclass that returns its key vouches for.
        """
        if not is_ours(type(self)):
            return None
        network = {f.name for f in fields(self) if f.metadata.get("network", False)}
        held = sorted(attributes(self).items())
        return key_or_none(*(pair for pair in held if pair[0] not in network))


def outputs(builder: Builder, x: Expr, t: Number, names: Sequence[str], batched: Batching) -> list[Expr]:
    """The velocities of branches, from one call of the network or from one each."""
    if batched and len(names) > 1:
        return builder.evaluate_all(x, t, "|".join(names), len(names))
    return [builder.evaluate(x, t, name) for name in names]


def is_number(value: Number, number: float) -> bool:
    return isinstance(value, float) and value == number


def mixture(builder: Builder, x: Expr, t: Number, weights: Mapping[str, Number], batched: Batching) -> Expr:
    """The weighted sum of the branches' velocities; a branch whose weight is the number 0 is not evaluated."""
    names = [name for name, weight in weights.items() if not is_number(weight, 0.0)]
    total = Expr({})
    for name, v in zip(names, outputs(builder, x, t, names, batched), strict=True):
        total = total + v * weights[name]
    return total
