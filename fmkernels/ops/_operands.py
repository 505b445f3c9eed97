"""What the operations share: operands (tensors or noise), their coefficients, and how both lie in memory.

An operation's schema carries operands as a flat list of tensors with two parallel lists of integers: ``streams[i]``
is TENSOR for an ordinary tensor, IN_PLACE for the output buffer itself, otherwise the operand is noise, the tensor
its seed, ``streams[i]`` its stream and ``offsets[i]`` the index of its first element. Coefficient i is ``coefs[i]``,
a float32 (float64) tensor whose shape is a leading part of the data's shape, or ``values[i]`` where that is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import (
    check_float_tensor,
    check_like,
    check_number,
    leading_shape,
    type_error,
    value_error,
)
from ..random import Noise, check_noise

TENSOR = -1
IN_PLACE = -2
MAX_TENSORS = 16

Coefficient = float | Tensor
Operand = Tensor | Noise


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of coefficients and accumulation: float64 if any data is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class Operands(NamedTuple):
    tensors: list[Tensor]
    streams: list[int]
    offsets: list[int]


def pack_operands(names: Sequence[str], operands: Sequence[Operand], data_name: str, data: Tensor) -> Operands:
    """Checks the operands against the data's shape, device and dtype and lays them out for a schema."""
    tensors: list[Tensor] = []
    streams: list[int] = []
    offsets: list[int] = []
    for name, operand in zip(names, operands, strict=True):
        if isinstance(operand, Tensor):
            if operand is not data:
                check_like(name, operand, data_name, data)
            tensors.append(operand)
            streams.append(TENSOR)
            offsets.append(0)
        else:
            check_noise(name, operand, data_name, data)
            tensors.append(operand.seed)
            streams.append(operand.stream)
            offsets.append(operand.offset(data))
    return Operands(tensors, streams, offsets)


def pack_coefficient(name: str, value: Coefficient, data: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """A coefficient as (tensor in the compute dtype, 0.0) or (None, number)."""
    if isinstance(value, Tensor):
        check_float_tensor(name, value)
        leading_shape(name, value, "the data", data)
        return (value if value.dtype == dtype else value.to(dtype)), 0.0
    if type(value) is not float:
        check_number(name, value)
    return None, float(value)


def pack_coefficients(
    name: str, values: Sequence[Coefficient] | Tensor, count: int, data: Tensor, dtype: torch.dtype
) -> tuple[list[Tensor | None], list[float]]:
    """``count`` coefficients: a sequence of numbers and tensors, or one table whose last dimension is ``count``."""
    if isinstance(values, Tensor):
        check_float_tensor(name, values)
        if values.dim() == 0 or values.shape[-1] != count:
            raise value_error(name, f"a last dimension of {count}, one coefficient for each operand", values)
        values = values.unbind(-1)
    elif not isinstance(values, Sequence):
        raise type_error(name, "a sequence of coefficients or a tensor", values)
    if len(values) != count:
        raise value_error(name, f"{count} coefficients, one for each operand", values)
    packed = [pack_coefficient(f"{name}[{i}]", value, data, dtype) for i, value in enumerate(values)]
    return [tensor for tensor, _ in packed], [number for _, number in packed]


class Lookup(NamedTuple):
    """Where a kernel finds a coefficient: entry ``row // rows_per_entry``, ``stride`` elements apart; or ``value``."""

    tensor: Tensor | None
    rows_per_entry: int
    stride: int
    value: float


def _flat_stride(tensor: Tensor) -> int | None:
    """The distance between consecutive entries in memory if it is one number, else None."""
    if tensor.dim() == 0:
        return 0
    stride = tensor.stride(-1)
    expected = stride
    for size, actual in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size != 1 and actual != expected:
            return None
        expected *= size
    return stride


def row_elements(data: Tensor, leading: Sequence[Tensor | None], groups: int = 1) -> int:
    """Elements of a row: the finest part of the data over which every coefficient is one number."""
    inner = data.numel() // groups
    for tensor in leading:
        if tensor is not None and tensor.dim() > 0:
            inner = min(inner, math.prod(data.shape[tensor.dim() :]))
    return inner


def lookup(tensor: Tensor | None, value: float, data: Tensor, inner: int) -> Lookup:
    if tensor is None:
        return Lookup(None, 1, 0, value)
    stride = _flat_stride(tensor)
    if stride is None:
        tensor, stride = tensor.contiguous(), 1
    return Lookup(tensor, math.prod(data.shape[tensor.dim() :]) // inner, stride, 0.0)


def in_one_order(tensors: Sequence[Tensor], leading: Sequence[Tensor | None], has_noise: bool) -> list[Tensor]:
    """The same tensors in one dense order of elements.

    Channels-last data stays as it is where nothing depends on the order within a sample: noise is numbered in
    contiguous order, and per-token coefficients follow it.
    """
    if all(t.is_contiguous() for t in tensors):
        return list(tensors)
    if not has_noise and all(c is None or c.dim() <= 1 for c in leading):
        for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if tensors[0].dim() == ndim and all(t.is_contiguous(memory_format=memory_format) for t in tensors):
                return list(tensors)
    return [t.contiguous() for t in tensors]


def expand_leading(tensor: Tensor, data: Tensor) -> Tensor:
    """A tensor of leading shape, viewed so that it broadcasts against the data."""
    return tensor.reshape(tensor.shape + (1,) * (data.dim() - tensor.dim()))
