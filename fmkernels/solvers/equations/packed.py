"""The user's state of `odeint` as one real tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._checks import (
    FLOATING,
    check_dense,
    check_has_values,
    check_number,
    check_same_device,
    check_unmapped,
    type_error,
    value_error,
)
from ...ops._operands import compute_dtype
from ..programs.ownership import reading

Field = Callable[[Tensor, Any], Any]
State = Tensor | tuple[Tensor, ...]


class Packed:
    """A state as one real tensor, and the right-hand side on it: tuples are concatenated, complex numbers split."""

    def __init__(self, func: Field, y0: State) -> None:
        parts = (y0,) if isinstance(y0, Tensor) else y0
        if not isinstance(parts, (tuple, list)) or not parts or not all(isinstance(p, Tensor) for p in parts):
            raise type_error("y0", "a tensor or a tuple of tensors", y0)
        for i, part in enumerate(parts):
            name = "y0" if isinstance(y0, Tensor) else f"y0[{i}]"
            if part.dtype not in FLOATING and not part.is_complex():
                raise type_error(name, "a floating or complex tensor", part)
            check_dense(name, part)
            check_same_device(name, part, "y0[0]", parts[0])
        self.func, self.is_tuple = func, not isinstance(y0, Tensor)
        self.complex = any(p.is_complex() for p in parts)
        self.dtype = parts[0].dtype
        for part in parts[1:]:
            self.dtype = torch.promote_types(self.dtype, part.dtype)
        self.shapes = [p.shape for p in parts]
        self.sizes = [p.numel() for p in parts]
        self.plain = not self.is_tuple and not self.complex
        self.limits: tuple[float, float] | None = None
        self.y0 = self.pack(parts if self.is_tuple else parts[0])

    def part(self, y0: Tensor, limits: tuple[float, float] | None = None) -> Packed:
        """The same problem from another packed state on, with times for func kept within limits."""
        other = copy.copy(self)
        other.y0, other.limits = y0, limits
        return other

    def pack(self, y: State) -> Tensor:
        if self.plain:
            return y  # type: ignore[return-value]
        parts = (y,) if isinstance(y, Tensor) else y
        flat = torch.cat([p.reshape(-1).to(self.dtype) for p in parts]) if self.is_tuple else parts[0].to(self.dtype)
        # a conjugate or negative that is not yet formed has no real numbers to be seen as
        return torch.view_as_real(flat.resolve_conj().resolve_neg()) if self.complex else flat

    def unpack(self, y: Tensor, lead: int = 0) -> State:
        """The user's state; the first ``lead`` dimensions are the solver's own."""
        if self.plain:
            return y
        if self.complex:
            y = y.contiguous()
            y = torch.view_as_complex(y.clone() if y.storage_offset() % 2 else y)
        if not self.is_tuple:
            return y
        parts = y.split(self.sizes, dim=lead)
        return tuple(p.reshape(y.shape[:lead] + shape) for p, shape in zip(parts, self.shapes, strict=True))

    def tolerance(self, name: str, value: Any) -> float | Tensor:
        """A tolerance for the packed state: a number, or one for each tensor of a tuple, or a tensor like y0."""
        if isinstance(value, Tensor):
            check_has_values(name, value)
            check_unmapped(name, value)
            if value.requires_grad:
                raise value_error(name, "a tolerance without gradient", value)
        if isinstance(value, (tuple, list)) or (isinstance(value, Tensor) and value.dim() == 1 and self.is_tuple):
            if len(value) != len(self.sizes):
                raise value_error(name, f"a number, or {len(self.sizes)} of them, one for each tensor of y0", value)
            numbers = [_number(f"{name}[{i}]", x) for i, x in enumerate(value)]
            if len(numbers) == 1:
                return numbers[0]
            parts = [torch.full((n,), x, device=self.y0.device) for x, n in zip(numbers, self.sizes, strict=True)]
            flat = torch.cat(parts).to(compute_dtype(self.y0))
            return flat[:, None] if self.complex else flat
        if not isinstance(value, Tensor) or value.dim() == 0:
            return _number(name, value)
        if value.is_complex() or value.dtype == torch.bool:
            raise type_error(name, "real numbers", value)
        shape = self.y0.shape[:-1] if self.complex else self.y0.shape
        if value.dim() > len(shape) or any(
            a not in (1, b) for a, b in zip(value.shape[::-1], shape[::-1], strict=False)
        ):
            raise value_error(name, f"a number, or a tensor that broadcasts to y0's shape, {tuple(shape)}", value)
        if not bool(((value >= 0.0) & value.isfinite()).all()):
            raise value_error(name, "finite numbers >= 0", value)
        value = value.to(self.y0.device, compute_dtype(self.y0))
        return value[..., None] if self.complex else value

    def norm(self, given: Callable[[Any], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
        """The error norm: the user's on the user's state; for a tuple the largest root mean square of its tensors."""
        if given is not None:
            return lambda ratio: given(self.unpack(ratio))
        if not self.is_tuple:
            return None
        return lambda ratio: torch.stack(
            [part.abs().square().mean().sqrt() for part in self.unpack(ratio) if part.numel()]  # type: ignore[union-attr]
        ).max()

    @property
    def call(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The right-hand side on a packed state that func may write to: a copy, in the quickest form."""
        return self.func if self.plain and self.limits is None else self._value

    @property
    def reading(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(y, t) to the right-hand side on a packed state that func may not write to."""
        return reading("func", self.call, time_first=True)

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        """The right-hand side on a packed state that func may not write to."""
        return self.reading(y, t)

    def _value(self, t: Tensor, y: Tensor) -> Tensor:
        if self.limits is not None:
            t = t.clamp(*self.limits)
        if self.plain:
            return self.func(t, y)
        result = self.func(t, self.unpack(y))
        parts = result if isinstance(result, (tuple, list)) else (result,)
        if len(parts) != len(self.shapes):
            raise value_error("func", f"{len(self.shapes)} tensors like y0", len(parts))
        for i, (part, shape) in enumerate(zip(parts, self.shapes, strict=True)):
            name = f"func: output {i}" if self.is_tuple else "func"
            if not isinstance(part, Tensor):
                raise type_error(name, "a tensor like y0", part)
            if part.shape != shape:
                raise value_error(name, f"y0's shape, {tuple(shape)}", part)
            if part.dtype not in FLOATING and not (part.is_complex() and self.complex):
                raise type_error(name, f"a floating output, as the state is {self.dtype}", part)
        return self.pack(tuple(parts) if self.is_tuple else parts[0])


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool:
        value = value.item()
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise type_error(name, "a number, or one for each tensor of y0", value)
    check_number(name, value, low=0.0)
    return float(value)
