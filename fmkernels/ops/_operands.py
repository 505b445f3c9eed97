"""What the operations share: operands (tensors or noise), their coefficients, and how both lie in memory.

An operation's schema carries operands as a flat list of tensors with two parallel lists of integers: ``streams[i]``
is TENSOR for an ordinary tensor, IN_PLACE for the output buffer itself, otherwise the operand is noise, the tensor
its seed, ``streams[i]`` its stream and ``offsets[i]`` the index of its first element. Coefficient i is ``coefs[i]``,
a float32 (float64) tensor whose shape is a leading part of the data's shape, or ``values[i]`` where that is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, final

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
from .._torch import is_static, is_zero
from ..random import Noise, check_noise

TENSOR = -1
IN_PLACE = -2
MAX_TENSORS = 16


@final
class Affine:
    """The coefficient shift + slope * tensor, formed in the kernels of plain calls: there 1 - t costs no operation."""

    __slots__ = ("shift", "slope", "tensor")

    def __init__(self, shift: float, slope: float, tensor: Tensor) -> None:
        self.shift, self.slope, self.tensor = shift, slope, tensor

    def value(self) -> Tensor:
        return self.shift + self.slope * self.tensor


Coefficient = float | Tensor | Affine
Operand = Tensor | Noise


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of coefficients and accumulation: float64 if any data is, else float32."""
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


class Operands(NamedTuple):
    tensors: list[Tensor]
    streams: list[int]
    offsets: list[int]


def pack_operands(names: Sequence[str], operands: Sequence[Operand], data_name: str, data: Tensor) -> Operands:
    """Checks the operands against the data's shape, device and dtype and lays them out for a schema."""
    tensors: list[Tensor] = []
    streams: list[int] = []
    offsets: list[int] = []
    for i, operand in enumerate(operands):
        name = names[i]
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


def traced_number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A symbol of a graph that is being recorded, as a tensor: among an operator's numbers it would become a constant.

    As a product, since of torch.full the compiler makes a constant as well.
    """
    return torch.ones((), dtype=dtype, device=device) * value


def pack_coefficient(name: str, value: Coefficient, data: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """A coefficient as (tensor in the compute dtype, 0.0) or (None, number)."""
    if isinstance(value, Affine):
        value = value.value()
    if isinstance(value, Tensor):
        check_float_tensor(name, value)
        leading_shape(name, value, "the data", data)
        return (value if value.dtype is dtype else value.to(dtype)), 0.0
    if torch.compiler.is_compiling() and isinstance(value, (int, float)) and not is_static(value):
        return traced_number(value, dtype, data.device), 0.0
    if not torch.compiler.is_compiling() and (type(value) is not float or not -math.inf < value < math.inf):
        check_number(name, value)
    return None, float(value)


def pack_coefficients(
    name: str,
    values: Sequence[Coefficient] | Tensor,
    count: int,
    data: Tensor,
    dtype: torch.dtype,
    names: Sequence[str] | None = None,
) -> tuple[list[Tensor | None], list[float]]:
    """``count`` coefficients: a sequence of numbers and tensors, or one table whose last dimension is ``count``.

    ``names`` are those of single coefficients where they have their own.
    """
    if isinstance(values, Tensor):
        check_float_tensor(name, values)
        if values.dim() == 0 or values.shape[-1] != count:
            raise value_error(name, f"a last dimension of {count}, one coefficient for each operand", values)
        values = values.unbind(-1)
    elif not isinstance(values, (list, tuple)):
        raise type_error(name, "a list or tuple of coefficients, or a tensor", values)
    if len(values) != count:
        raise value_error(name, f"{count} coefficients, one for each operand", values)
    tensors: list[Tensor | None] = []
    numbers: list[float] = []
    for i, value in enumerate(values):
        tensor, number = pack_coefficient(names[i] if names else f"{name}[{i}]", value, data, dtype)
        tensors.append(tensor)
        numbers.append(number)
    return tensors, numbers


# Where a kernel finds a coefficient: (address, rows_per_entry, stride, 0.0), entry row // rows_per_entry lying
# ``stride`` elements apart; or (0, 1, 0, number).
Lookup = tuple[int, int, int, float]


def entry_stride(tensor: Tensor) -> int | None:
    """The distance in memory between consecutive entries, in elements, or None where it is not one number.

    Every kernel's stride comes from here. The stride of a dimension of size 1 says nothing: PyTorch lets it be any
    number, so it is passed over. One entry has distance 0.
    """
    if tensor.dim() == 1:
        return tensor.stride(0)
    distance, expected = 0, None
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size == 1:
            continue
        if expected is None:
            distance = expected = stride
        elif stride != expected:
            return None
        expected *= size
    return distance


def row_stride(table: Tensor) -> int | None:
    """The distance of two rows of a 2-d table in memory, if the entries of a row lie next to each other; else None."""
    rows, columns = table.shape
    if columns > 1 and table.stride(1) != 1:
        return None
    return table.stride(0) if rows > 1 else 0


def memory_length(tensor: Tensor) -> int:
    """How far a tensor reaches from where it begins, in elements."""
    elements = tensor.numel()
    if elements == 0 or tensor.is_contiguous():
        return elements
    if tensor.dim() == 1:
        return 1 + (elements - 1) * tensor.stride(0)
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def memory(tensor: Tensor) -> tuple[int, int]:
    """The addresses at which a tensor begins and ends."""
    start = tensor.data_ptr()
    return start, start + memory_length(tensor) * tensor.element_size()


def meets(tensor: Tensor, begin: int, end: int) -> bool:
    """Whether a tensor reaches into memory: by address, since not all that share memory share a storage."""
    start = tensor.data_ptr()
    return start < end and (start >= begin or memory(tensor)[1] > begin)


def operands_apart(tensors: Sequence[Tensor], begin: int, end: int) -> list[Tensor]:
    """The operands, copied where a kernel that writes that memory could destroy what it has yet to read.

    One that is not dense is copied before the kernel runs anyway.
    """
    return [t.clone() if meets(t, begin, end) and memory_length(t) == t.numel() else t for t in tensors]


def coefficients_apart(tensors: Sequence[Tensor | None], begin: int, end: int) -> list[Tensor | None]:
    """The same of coefficients, which are read where they lie however their entries are spaced."""
    return [t if t is None or not meets(t, begin, end) else t.clone() for t in tensors]


def is_lazy(tensor: Tensor) -> bool:
    """True where a tensor's memory does not hold its values: a negation waits (x.conj().imag), or it is a lazy zero.

    PyTorch's dispatcher resolves that for an operator's tensors, but not for those in an optional list.
    """
    return tensor.is_neg() or is_zero(tensor)


def evenly_spaced(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same coefficients, copied where their entries are not evenly spaced in memory."""
    return [
        t if t is None or (not is_lazy(t) and entry_stride(t) is not None) else t.clone().contiguous() for t in tensors
    ]


def row_elements(elements: int, leading: Sequence[Tensor | None], groups: int = 1) -> int:
    """Elements of a row: the finest part of the data over which every coefficient is one number."""
    inner = elements // groups
    for tensor in leading:
        if tensor is not None:
            covered = elements // tensor.numel()
            if covered < inner:
                inner = covered
    return inner


def lookups(tensors: Sequence[Tensor | None], values: Sequence[float], elements: int, inner: int) -> list[Lookup]:
    """The addresses and distances of evenly spaced coefficients, which the caller keeps alive."""
    return [
        (0, 1, 0, value)
        if tensor is None
        else (
            tensor.data_ptr(),
            elements // tensor.numel() // inner,
            entry_stride(tensor) or 0,
            0.0,
        )
        for tensor, value in zip(tensors, values)  # noqa: B905 - equally long by construction, on the hot path
    ]


def in_one_order(tensors: list[Tensor], leading: Sequence[Tensor | None], has_noise: bool) -> list[Tensor]:
    """The same tensors in one dense order of elements.

    Channels-last data stays as it is where nothing depends on the order within a sample: noise is numbered in
    contiguous order, and per-token coefficients follow it.
    """
    for tensor in tensors:
        if not tensor.is_contiguous() or is_lazy(tensor):
            break
    else:
        return tensors
    tensors = [t.clone() if is_lazy(t) else t for t in tensors]
    if not has_noise and all(c is None or c.dim() <= 1 for c in leading):
        for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if tensors[0].dim() == ndim and all(t.is_contiguous(memory_format=memory_format) for t in tensors):
                return tensors
    return [t.contiguous() for t in tensors]


def expand_leading(tensor: Tensor, data: Tensor) -> Tensor:
    """A tensor of leading shape, viewed so that it broadcasts against the data."""
    return tensor.reshape(tensor.shape + (1,) * (data.dim() - tensor.dim()))
