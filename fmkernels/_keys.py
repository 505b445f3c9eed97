"""What tells a value from every other one that could give another result: the keys of what is kept between calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from enum import Enum
from functools import cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A tensor of the host up to this size is part of a key by its values.
MOST_KEY_BYTES = 1 << 16


class NoKey(Exception):
    """A value that may change without its key changing."""


def key_of(value: Any) -> Hashable:
    """What tells a value from every other one that could give another result, now or after it was changed.

    Numbers, strings and containers of them by type and value; arrays and small tensors of the host by their contents;
    objects of this package by class and all of their attributes; functions that read nothing but their arguments by
    their code.

    Raises:
        NoKey: anything else: functions that read what no key sees, objects of other classes, modules.
    """
    make = _KEYS.get(type(value))
    return _object_key(value) if make is None else make(value)


def key_or_none(*values: Any) -> Hashable | None:
    """One key of all values, or None where one of them has none."""
    try:
        return tuple(map(key_of, values))
    except (NoKey, RecursionError):
        return None


def _float_key(value: float) -> Hashable:
    # 0.0 == -0.0, and nan is not itself
    return (float, value) if value * value > 0.0 else (float, str(value))


def _array_key(value: np.ndarray) -> Hashable:
    if value.dtype.hasobject or value.nbytes > MOST_KEY_BYTES:
        raise NoKey
    return np.ndarray, value.dtype.str, value.shape, value.tobytes()


def _tensor_key(value: Tensor) -> Hashable:
    plain = value.device.type == "cpu" and value.layout is torch.strided and not value.requires_grad
    if not plain or value.numel() * value.element_size() > MOST_KEY_BYTES or value.is_neg() or value.is_conj():
        raise NoKey
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Tensor, value.dtype, tuple(value.shape), flat.tobytes()


def _sequence_key(value: Sequence[Any]) -> Hashable:
    return (type(value), *map(key_of, value))


def _dict_key(value: dict[Any, Any]) -> Hashable:
    return (dict, *((key_of(k), key_of(v)) for k, v in value.items()))


# What a function may name and still give the same for the same arguments: modules, what it calls of them, methods.
_MODULES = {"math": "math", "torch": "torch", "np": "numpy", "numpy": "numpy"}
# fmt: off
_PURE = frozenset({
    "abs", "acos", "arange", "arccos", "arcsin", "arctan", "array", "asarray", "asin", "atan", "atleast_1d", "ceil",
    "clamp", "clip", "cos", "cosh", "cumsum", "double", "e", "exp", "exp2", "expm1", "flip", "float", "float32",
    "float64", "floor", "full_like", "heaviside", "int", "len", "linspace", "log", "log10", "log1p", "log2", "max",
    "maximum", "min", "minimum", "ndim", "ones_like", "pi", "pow", "range", "reciprocal", "relu", "rsqrt", "shape",
    "sigmoid", "sign", "sin", "sinh", "softplus", "sqrt", "square", "stack", "sum", "tan", "tanh", "where",
    "zeros_like",
})
# fmt: on


def _function_key(value: FunctionType) -> Hashable:
    if value.__closure__ or value.__defaults__ or value.__kwdefaults__ or vars(value):
        raise NoKey
    codes = [value.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for name in code.co_names:
            if name not in value.__globals__:
                known = name in _PURE
            else:
                module = value.__globals__[name]
                known = isinstance(module, ModuleType) and _MODULES.get(name) == module.__name__
            if not known:
                raise NoKey
    return FunctionType, value.__code__


_KEYS: dict[type, Callable[[Any], Hashable]] = {
    FunctionType: _function_key,
    type(None): lambda value: None,
    str: lambda value: value,
    bool: lambda value: (bool, value),
    int: lambda value: (int, value),
    float: _float_key,
    bytes: lambda value: (bytes, value),
    torch.dtype: lambda value: (torch.dtype, value),
    torch.device: lambda value: (torch.device, str(value)),
    torch.Size: lambda value: (torch.Size, *value),
    np.ndarray: _array_key,
    Tensor: _tensor_key,
    tuple: _sequence_key,
    list: _sequence_key,
    dict: _dict_key,
    set: lambda value: (set, frozenset(map(key_of, value))),
    frozenset: lambda value: (frozenset, frozenset(map(key_of, value))),
}


def is_ours(cls: type) -> bool:
    """Whether a class is this package's, so that its methods are known to read nothing but the object."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _object_key(value: Any) -> Hashable:
    cls = type(value)
    if cls in _LAYOUTS:
        return _attributes_key(cls, value)
    if isinstance(value, np.generic) and cls.__module__ == "numpy":
        return cls, value.tobytes()
    if not is_ours(cls) or isinstance(value, type):
        raise NoKey
    if isinstance(value, Enum):
        return cls, value.name
    if isinstance(value, tuple):
        return (cls, *map(key_of, value))
    return _attributes_key(cls, value)


def _attributes_key(cls: type, value: Any) -> Hashable:
    if "cache_key" in cls.__dict__:
        return cls, value.cache_key
    held = attributes(value)
    return (cls, *[(name, key_of(held[name])) for name in sorted(held)]) if held else cls


class HashedKey:
    """A long key whose hash is computed once: for the ``cache_key`` of objects that never change."""

    __slots__ = ("_hash", "key")

    def __init__(self, key: Hashable) -> None:
        self.key, self._hash = key, hash(key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, HashedKey) and self.key == other.key)


def attributes(value: Any) -> dict[str, Any]:
    """All that an object of this package holds, also what its comparison leaves out: __dict__ and slots."""
    cls = type(value)
    layout = _LAYOUTS.get(cls)
    if layout is None:
        slots = tuple(name for base in cls.__mro__ for name in base.__dict__.get("__slots__", ()))
        made = {n for base in cls.__mro__ for n, v in base.__dict__.items() if isinstance(v, cached_property)}
        layout = slots, made
        if is_ours(cls):
            _LAYOUTS[cls] = layout
    slots, made = layout
    held = getattr(value, "__dict__", {})
    found = {n: v for n, v in held.items() if n not in made} if made else dict(held)  # made from the others
    for name in slots:
        if hasattr(value, name):
            found[name] = getattr(value, name)
    return found


_LAYOUTS: dict[type, tuple[tuple[str, ...], set[str]]] = {}  # of classes of this package
