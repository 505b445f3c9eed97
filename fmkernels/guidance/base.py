"""What all guidance shares: scales, the network calls of its branches, and its two ways of being used.

A guidance writes its velocity once, in the expressions of :mod:`fmkernels.solvers.program`. In a fixed-grid solve these
become part of the solver's own updates; in an adaptive one, where times are known only when it runs, the same lines are
evaluated at once by :class:`Immediate`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._checks import check_number, type_error, value_error
from ..ops.combine.op import combine
from ..paths import CondOT, Path
from ..solvers.program import Builder, Expr, Number, Operation, Work, as_number, perform
from ..solvers.run import Call

Model = Callable[..., Any]
# A number, one for each sample (or token), or a function of the time, given as a tensor.
Scale = float | Tensor | np.ndarray | Callable[[Tensor], Tensor | float]
Interval = tuple[float, float] | None
Branches = dict[str, tuple[Model, Mapping[str, Any]]]

# The branch with the caller's own keyword arguments: what an unguided solver calls.
CONDITIONAL = ""
UNCONDITIONAL = "unconditional"
# Fields that the network calls read and the program does not.
NETWORK = {"network": True}
_PREFIX = "guidance:"
_COND_OT = CondOT()


# ---------------------------------------------------------------------- scales


def checked_scale(name: str, scale: Scale) -> Scale:
    """A float, a float64 array of the host, or a function; arrays are copied.

    Raises:
        TypeError, ValueError: it is none of them.
    """
    if isinstance(scale, Tensor):
        scale = scale.detach().double().cpu().numpy()
    if isinstance(scale, np.ndarray):
        scale = np.array(scale, dtype=np.float64)
        if not np.isfinite(scale).all():
            raise value_error(name, "finite numbers", scale)
        return scale if scale.ndim else float(scale)
    if callable(scale):
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise type_error(name, "a number, a tensor with one for each sample, or a function of t", scale)
    check_number(name, scale)
    return float(scale)


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
        value = scale(t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64))
        if isinstance(value, Tensor) and not isinstance(t, Tensor):
            value = as_number(value)
        value = float(value) if isinstance(value, int) else value
    else:
        value = scale
    dims = getattr(t, "ndim", 0)
    if not isinstance(value, float):
        if isinstance(t, Tensor) and not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=t.dtype, device=t.device)
        if dims and value.ndim > dims:
            raise value_error("scale", f"no more dimensions than the times, whose shape is {tuple(t.shape)}", value)
        if dims:
            value = value.reshape((*value.shape, *(1,) * (dims - value.ndim)))
    if interval is None:
        return value
    low, high = interval
    if not dims and not isinstance(builder, Immediate):  # the host knows
        return value if low <= float(t) <= high else outside
    inside = (t >= low) & (t <= high)
    if isinstance(t, Tensor):
        value = value if isinstance(value, Tensor) else t.new_full((), value)
        return torch.where(inside, value, t.new_full((), outside))
    if not inside.any():
        return outside
    return value if inside.all() else np.where(inside, value, outside)


# ---------------------------------------------------------------------- network calls


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


# ---------------------------------------------------------------------- guidance


@final
class Immediate(Builder):
    """A builder that does at once what it is told, at times that are tensors on the device; it has no steps.

    Registers are tensors; 0 is the state.
    """

    def __init__(self, calls: Mapping[str, Call], x: Tensor, t: Tensor, path: Path, prediction: str) -> None:
        super().__init__([t, t], path, prediction)
        self._calls, self._tensors = calls, [x]

    def register(self, x: Expr) -> int:
        terms = {base: c for base, c in x.terms.items() if not (isinstance(c, float) and c == 0.0)} or {0: 0.0}
        if len(terms) == 1:
            ((base, coefficient),) = terms.items()
            if isinstance(coefficient, float) and coefficient == 1.0:
                return base
        return self._append(combine([self._tensors[base] for base in terms], list(terms.values())))

    def _append(self, tensor: Tensor) -> int:
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def tensor(self, x: Expr) -> Tensor:
        return self._tensors[self.register(x)]

    def evaluate_all(self, x: Expr, t: Number, branch: str, count: int, prediction: str | None = None) -> list[Expr]:
        state = self.keep(x)
        output = self._calls[branch](self.tensor(state), t)
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        return [
            self.convert(state, Expr({self._append(v): 1.0}), t, "velocity", prediction or self.prediction)
            for v in outputs
        ]

    def compute(self, function: Work | Operation, sources: Sequence[Expr], count: int) -> list[Expr]:
        return [Expr({self._append(v): 1.0}) for v in perform(function, [self.tensor(x) for x in sources])]

    def conversion(self, t: Number, source: str, target: str) -> tuple[Number, Number]:
        key = (id(t), source, target)
        if key not in self._conversions:
            self._conversions[key] = super().conversion(t, source, target)
        return self._conversions[key]


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
    def shared_names(self) -> Sequence[str]:
        """Names of keyword arguments that have no entry for each sample, whatever their shape."""
        return getattr(self, "shared", ())

    def calls(self, model: Model, model_kwargs: Mapping[str, Any]) -> dict[str, Call]:
        """The network calls of the branches, for an executor of programs."""
        return Calls(self.branches(model, model_kwargs), self.shared_names, list(self._leads()))

    def at(
        self,
        model: Model,
        model_kwargs: Mapping[str, Any],
        path: Path = _COND_OT,
        prediction: str = "velocity",
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided velocity as a function of tensors (x, t), as adaptive solvers and likelihoods call it.

        t has shape (), (B,), ... and is not looked at by the host: beyond an interval the scale becomes 1 (and the
        unconditional branch is evaluated all the same). A function of (x, t) has no past and no steps: APG goes
        without its momentum, CFG-Zero* without its zero-init, and CFG++, which is defined by steps, raises.

        Args:
            model_kwargs: of the model; those that :meth:`per_sample` added are taken as the guidance's own.
            path: for rules that need more than velocities.
            prediction: what the model returns, as in :func:`fmkernels.sample`.
        """
        guidance, kwargs = self._with_rows(model_kwargs)
        calls = Calls(guidance.branches(model, kwargs), guidance.shared_names)
        leads = list(guidance._leads())

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            check_leads(leads, x)
            builder = Immediate(calls, x, t, path, prediction)
            return builder.tensor(guidance.velocity(builder, builder.x, t))

        return velocity

    def per_sample(self, model_kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
        """model_kwargs and, beside them, what of the guidance has an entry for each sample of x.

        So that it follows its sample where a solver reorders or drops samples; :meth:`at` takes it back.
        """
        rows = {
            f"{_PREFIX}{i}": torch.as_tensor(leaf).to(x.device)
            for i, leaf in enumerate(self._flat()[0])
            if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim and leaf.shape[0] == x.shape[0]
        }
        return {**model_kwargs, **rows}

    def _with_rows(self, model_kwargs: Mapping[str, Any]) -> tuple[Guidance, Mapping[str, Any]]:
        rows = {name: value for name, value in model_kwargs.items() if name.startswith(_PREFIX)}
        if not rows:
            return self, model_kwargs
        leaves, spec = self._flat()
        for name, value in rows.items():
            leaves[int(name[len(_PREFIX) :])] = value
        result = copy.copy(self)
        for name, value in pytree.tree_unflatten(leaves, spec).items():
            object.__setattr__(result, name, value)
        return result, {name: value for name, value in model_kwargs.items() if name not in rows}

    def _flat(self, network: bool | None = None) -> tuple[list[Any], Any]:
        """The fields, or those alone that the network calls or the programs read, as leaves."""
        kept = [f.name for f in fields(self) if network in (None, f.metadata.get("network", False))]
        return pytree.tree_flatten({name: getattr(self, name) for name in kept})

    def _leads(self) -> Iterator[tuple[str, tuple]]:
        """Names and shapes of the arrays of scales."""
        for f in fields(self):
            if not f.metadata.get("network"):
                for leaf in pytree.tree_leaves(getattr(self, f.name)):
                    if isinstance(leaf, (Tensor, np.ndarray)):
                        yield f.name, tuple(leaf.shape)

    @property
    def plan_key(self) -> Any:
        """What the programs written with this guidance depend on, hashable: two with equal keys share them."""
        leaves, spec = self._flat(network=False)
        return type(self), repr(spec), *((x.shape, x.tobytes()) if isinstance(x, np.ndarray) else x for x in leaves)

    @property
    def network_key(self) -> Any:
        """What the network calls read beside the caller's arguments, hashable: objects by identity.

        Valid while the guidance lives.
        """
        leaves, spec = self._flat(network=True)
        plain = (int, float, str, type(None))
        return type(self), repr(spec), *((type(x), x) if isinstance(x, plain) else id(x) for x in leaves)


def outputs(builder: Builder, x: Expr, t: Number, names: Sequence[str], batched: bool) -> list[Expr]:
    """The velocities of branches, from one call of the network or from one each."""
    if batched and len(names) > 1:
        return builder.evaluate_all(x, t, "|".join(names), len(names))
    return [builder.evaluate(x, t, name) for name in names]


def is_number(value: Number, number: float) -> bool:
    return isinstance(value, float) and value == number


def mixture(builder: Builder, x: Expr, t: Number, weights: Mapping[str, Number], batched: bool) -> Expr:
    """The weighted sum of the branches' velocities; a branch whose weight is the number 0 is not evaluated."""
    names = [name for name, weight in weights.items() if not is_number(weight, 0.0)]
    total = Expr({})
    for name, v in zip(names, outputs(builder, x, t, names, batched), strict=True):
        total = total + v * weights[name]
    return total
