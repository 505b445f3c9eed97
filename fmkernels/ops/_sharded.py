"""DTensors in the operations: each rank's part by the same kernels, no values moved that need not be.

The first tensor (x_1, pred, operands[0]) says how the work is sharded; Partial sums are formed first. The others follow
it: operands are redistributed to its placements, and coefficients, weights and masks, plain tensors of the whole's
shape as well as DTensors, are cut where it is cut in one of their dimensions. Noise is numbered by the whole's rows, so
that a batch may be sharded in its first dimension alone where noise is drawn; a row's norm, and the loss of each
sample, need whole rows, which are gathered. A loss of all samples, and inner products, come out as Partial sums.

Every plain tensor and every seed must be the same on all ranks; a seed that nobody gives is the first rank's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _torch
from .._checks import check_number, leading_shape, type_error, value_error
from ..random import Noise, draw_seed
from ._operands import Affine, Coefficient, Operand

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


def is_sharded(*values: Any) -> bool:
    """True where one is a DTensor; whoever has one has loaded its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(value, module.DTensor) for value in values)


def common_seed(data: Any, generator: torch.Generator | None) -> Tensor:
    """A fresh seed for what is drawn beside data: for a DTensor the first rank's, sent to all of its mesh."""
    seed = draw_seed(data.device, generator)
    if is_sharded(data):
        mesh = data.device_mesh
        for group in map(mesh.get_group, range(mesh.ndim)):
            torch.distributed.broadcast(seed, torch.distributed.get_global_rank(group, 0), group=group)
    return seed


class Layout:
    """How the first tensor is sharded, and how the others follow."""

    def __init__(self, name: str, data: Any, *, whole_rows: bool = False, noise: bool = False) -> None:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if not isinstance(data, DTensor):
            raise type_error(name, "a DTensor, as another argument is one", data)
        keep = [not p.is_partial() and not (whole_rows and p.is_shard() and not p.is_shard(0)) for p in data.placements]
        self.mesh = data.device_mesh
        self.placements: list[Placement] = [p if k else Replicate() for p, k in zip(data.placements, keep, strict=True)]
        if noise and any(p.is_shard() and not p.is_shard(0) for p in self.placements):
            raise value_error(
                name,
                "a DTensor that is sharded in its first dimension alone, as noise is drawn (give x_0, and z)",
                data,
            )
        self.name, self.data = name, data
        self._replicate, self._partial = Replicate(), Partial()

    def local(self, name: str, value: Tensor, *, leading: bool = False) -> Tensor:
        """This rank's part of a tensor of the data's shape, or of a leading part of it."""
        from torch.distributed.tensor import DTensor

        if leading:
            leading_shape(name, value, self.name, self.data)
        elif value.shape != self.data.shape:
            raise value_error(name, f"the shape of {self.name}, {tuple(self.data.shape)}", value)
        if not isinstance(value, DTensor):
            whole = [self._replicate] * self.mesh.ndim
            value = DTensor.from_local(value, self.mesh, whole, run_check=False)
        elif value.device_mesh != self.mesh:
            raise ValueError(f"{name}: expected a DTensor on {self.name}'s mesh, {self.mesh}, got {value.device_mesh}")
        dims = value.dim()
        placed = [p if any(map(p.is_shard, range(dims))) else self._replicate for p in self.placements]
        # what all ranks hold has its gradient from all the parts of the data
        grads = [
            self._partial if q.is_replicate() and p.is_shard() else q
            for p, q in zip(self.placements, placed, strict=True)
        ]
        return value.redistribute(self.mesh, placed).to_local(grad_placements=grads)

    def operand(self, name: str, value: Operand) -> Operand:
        if isinstance(value, Noise):
            first = _torch.first_local_row(self.data.shape, self.mesh, self.placements)
            return Noise._of(value.seed, value.stream, value.row_offset + first)
        return self.local(name, value)

    def coefficient(self, name: str, value: Coefficient | None) -> Any:
        if isinstance(value, Affine):
            value = value.value()
        return self.local(name, value, leading=True) if isinstance(value, Tensor) else value

    def coefficients(self, name: str, values: Sequence[Coefficient] | Tensor) -> Any:
        if isinstance(values, Tensor) and values.dim():
            values = values.unbind(-1)
        if not isinstance(values, (list, tuple)):
            return values
        return [self.coefficient(f"{name}[{i}]", value) for i, value in enumerate(values)]

    def whole(self, local: Tensor) -> DTensor:
        """A result of the data's shape."""
        from torch.distributed.tensor import DTensor

        shape, stride = self.data.shape, self.data.stride()
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def rows(self, local: Tensor) -> DTensor:
        """A result with one entry, or row, a sample: a Partial sum where rows are cut."""
        from torch.distributed.tensor import DTensor

        placed = [self._partial if p.is_shard() and not p.is_shard(0) else p for p in self.placements]
        shape = torch.Size((self.data.shape[0], *local.shape[1:]))
        stride = local.new_empty((1, *local.shape[1:])).stride()
        return DTensor.from_local(local, self.mesh, placed, run_check=False, shape=shape, stride=stride)

    def on_all(self, total: DTensor) -> Tensor:
        """A sum's value on every rank, each of which uses it for its own part."""
        grads = [self._partial if p.is_shard() else self._replicate for p in self.placements]
        return total.full_tensor(grad_placements=grads)

    def total(self, local: Tensor) -> DTensor:
        """A sum over all elements."""
        from torch.distributed.tensor import DTensor

        placed = [self._partial if p.is_shard() else p for p in self.placements]
        return DTensor.from_local(local, self.mesh, placed, run_check=False)


def combine(
    function: Callable[..., Any],
    operands: Sequence[Operand],
    coefficients: Sequence[Coefficient] | Tensor,
    error_coefficients: Sequence[Coefficient] | Tensor | None,
    atol: float | None,
    rtol: float | None,
    out: Tensor | None,
    impl: str,
) -> Any:
    """fmkernels.combine where an operand is a DTensor."""
    if out is not None:
        raise value_error("out", "None where an operand is a DTensor", out)
    want_norm = atol is not None or rtol is not None
    noise = any(isinstance(operand, Noise) for operand in operands)
    layout = Layout("operands[0]", operands[0], whole_rows=want_norm, noise=noise)
    result = function(
        [layout.operand(f"operands[{i}]", operand) for i, operand in enumerate(operands)],
        layout.coefficients("coefficients", coefficients),
        error_coefficients=layout.coefficients("error_coefficients", error_coefficients)
        if error_coefficients is not None
        else None,
        atol=atol,
        rtol=rtol,
        impl=impl,
    )
    return (layout.whole(result[0]), layout.rows(result[1])) if want_norm else layout.whole(result)


def interpolate(
    function: Callable[..., Any],
    x_1: Tensor,
    x_0: Operand,
    z: Operand | None,
    coefficients: Sequence[Coefficient | None],
    store_noise: bool,
    impl: str,
) -> tuple[Tensor, Operand, Operand | None]:
    """fmkernels.interpolate where x_1 is a DTensor and the noise's seed is drawn."""
    layout = Layout("x_1", x_1, noise=isinstance(x_0, Noise) or isinstance(z, Noise))
    alpha, sigma, gamma = (
        layout.coefficient(name, value) for name, value in zip(("alpha", "sigma", "gamma"), coefficients, strict=True)
    )
    given = {"alpha": alpha, "sigma": sigma, "gamma": gamma, "z": None if z is None else layout.operand("z", z)}
    point = function(layout.local("x_1", x_1), layout.operand("x_0", x_0), **given, store_noise=store_noise, impl=impl)

    def back(original: Operand | None, used: Operand | None) -> Operand | None:
        return layout.whole(used) if isinstance(original, Noise) and isinstance(used, Tensor) else original

    return layout.whole(point.x_t), back(x_0, point.x_0), back(z, point.z)  # type: ignore[return-value]


def row_dots(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]], impl: str
) -> Tensor:
    """fmkernels.row_dots where a tensor is a DTensor."""
    layout = Layout("tensors[0]", tensors[0])
    local = [layout.local(f"tensors[{i}]", tensor) for i, tensor in enumerate(tensors)]
    return layout.rows(function(local, pairs, impl=impl))


def regression_loss(
    function: Callable[..., Tensor],
    divisor: Callable[[int, Any, Tensor | None, str], Tensor | int],
    pred: Tensor,
    operands: Sequence[Operand],
    names: Sequence[str],
    coefficients: Sequence[Coefficient] | Tensor,
    weight: Coefficient | None,
    mask: Tensor | None,
    reduction: str,
    count: Tensor | float | None,
    options: dict[str, Any],
) -> Tensor:
    """fmkernels.regression_loss where pred is a DTensor: each part's sum over the whole's divisor.

    ``divisor`` tells by what (elements, weight, mask, reduction) is divided.
    """
    noise = any(isinstance(operand, Noise) for operand in operands)
    layout = Layout("pred", pred, whole_rows=reduction == "none", noise=noise)
    part = layout.local("pred", pred)
    if reduction == "weighted_mean" and weight is not None and not isinstance(weight, (Tensor, Affine)):
        check_number("weight", weight)
        weight = 0.0 if weight == 0.0 else None  # a number among weights cancels, but for 0
    weight = layout.coefficient("weight", weight)
    if is_sharded(count):
        count = count.full_tensor()  # type: ignore[union-attr]
    mask = None if mask is None else layout.local("mask", mask, leading=True)
    given = [layout.operand(name, operand) for name, operand in zip(names, operands, strict=True)]
    cut = layout.coefficients("coefficients", coefficients)
    options = {"weight": weight, "mask": mask, "count": count, **options}
    if reduction == "none":
        return layout.rows(function(part, given, cut, reduction=reduction, **options))
    if reduction == "weighted_mean" or (reduction == "mean" and count is None):
        local_count = divisor(part.numel(), weight, mask, reduction)
        if isinstance(local_count, Tensor):
            options["count"] = layout.on_all(layout.total(local_count))
        else:
            options["count"] = pred.numel()
        reduction = "mean"
    return layout.total(function(part, given, cut, reduction=reduction, **options))
