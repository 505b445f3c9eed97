"""Inner products of the rows of several tensors: norms, projections, traces and row sums in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import _dispatch
from ..._checks import check_float_tensor, check_like, type_error, value_error
from ..._torch import apply_traced
from .. import _sharded
from .._operands import compute_dtype, expand_leading
from ..combine.op import combine, needs_grad
from ..library import LIBRARY
from . import reference

MAX_TENSORS = 6
MAX_PAIRS = 16
ONES = -1

LIBRARY.define("row_dots(Tensor[] tensors, int[] first, int[] second, str impl) -> Tensor")


def _row_dots(tensors: list[Tensor], first: list[int], second: list[int], impl: str) -> Tensor:
    return _dispatch.implementation("row_dots", tensors[0].device.type, impl).run(tensors, first, second)


def _row_dots_fake(tensors: list[Tensor], first: list[int], second: list[int], impl: str) -> Tensor:
    data = tensors[0]
    return data.new_empty((data.shape[0], len(first)), dtype=compute_dtype(data))


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("row_dots", _row_dots, _key)
torch.library.register_fake("fmkernels::row_dots", _row_dots_fake, lib=LIBRARY)


class RowDotsFunction(Function):
    """row_dots with a derivative: tensor i receives, for each pair (i, j), grad[:, p] times tensor j."""

    @staticmethod
    def forward(ctx: Any, first: list[int], second: list[int], impl: str, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.first, ctx.second, ctx.impl = first, second, impl
        ctx.save_for_backward(*tensors)
        return torch.ops.fmkernels.row_dots(tensors, first, second, impl)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        tensors, impl = ctx.saved_tensors, _dispatch.backward_impl(ctx.impl, grad)
        results: list[Tensor | None] = [
            _gradient(i, tensors, ctx.first, ctx.second, grad, impl) if need else None
            for i, need in enumerate(ctx.needs_input_grad[3:])
        ]
        return None, None, None, *results


def _gradient(
    i: int, tensors: Sequence[Tensor], first: Sequence[int], second: Sequence[int], grad: Tensor, impl: str
) -> Tensor | None:
    """The gradient of tensor i: per row, a linear combination of the tensors and of ones."""
    factors: dict[int, Tensor] = {}
    for p in range(len(first)):
        for one, other in ((first[p], second[p]), (second[p], first[p])):
            if one == i:
                factors[other] = factors[other] + grad[:, p] if other in factors else grad[:, p]
    data = tensors[i]
    if not factors:
        return None
    if list(factors) == [ONES]:
        return expand_leading(factors[ONES].to(data.dtype), data).expand_as(data)
    shift = factors.pop(ONES, None)
    operands, coefficients = [tensors[j] for j in factors], list(factors.values())
    if shift is not None:
        operands.append(torch.ones_like(data))
        coefficients.append(shift)
    return combine(operands, coefficients, impl=impl)


def _pack(tensors: Any, pairs: Any) -> tuple[list[Tensor], list[int], list[int]]:
    """The checked arguments of the schema."""
    if not isinstance(tensors, Sequence):
        raise type_error("tensors", "a sequence of tensors", tensors)
    if not 1 <= len(tensors) <= MAX_TENSORS:
        raise value_error("tensors", f"1 to {MAX_TENSORS} tensors", len(tensors))
    data = tensors[0]
    check_float_tensor("tensors[0]", data)
    if data.dim() == 0:
        raise value_error("tensors[0]", "at least one dimension, of rows", data)
    for i in range(1, len(tensors)):
        check_like(f"tensors[{i}]", tensors[i], "tensors[0]", data)
    if not isinstance(pairs, Sequence):
        raise type_error("pairs", "a sequence of pairs of indices", pairs)
    if not 1 <= len(pairs) <= MAX_PAIRS:
        raise value_error("pairs", f"1 to {MAX_PAIRS} pairs", len(pairs))
    for p, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise type_error(f"pairs[{p}]", "two indices (i, j)", pair)
        for index in pair:
            if isinstance(index, bool) or not isinstance(index, int):
                raise type_error(f"pairs[{p}]", "two ints", index)
            if not -1 <= index < len(tensors):
                raise value_error(f"pairs[{p}]", f"indices from -1 (ones) to {len(tensors) - 1}", index)
    return list(tensors), [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def row_dots(tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]], *, impl: str = "auto") -> Tensor:
    r"""Inner products of the rows of several tensors in one pass over memory.

    .. math:: r_{bp} = \sum_j k_{i, bj}\, k_{i', bj}, \quad (i, i') = \mathrm{pairs}[p],

    where j runs over all dimensions but the first, and index -1 stands for a tensor of ones: for tensors x and y,
    pairs (0, 0), (0, 1) and (0, -1) give the squared norm of x, its inner product with y, and its sum. Each tensor is
    read once, however many pairs name it. Guidance takes norms and projections of network outputs from this,
    log-densities squared norms, and Hutchinson's estimator of a trace its products :math:`\epsilon^\top (J \epsilon)`.

    Products are formed and added in float32 (float64 for float64 data), over short stretches whose sums are added in a
    fixed order: two calls are bitwise equal.

    Args:
        tensors: 1 to 6 tensors of one shape (B, ...), floating dtype and device.
        pairs: 1 to 16 pairs (i, i') of indices into ``tensors``, or -1.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        Shape (B, len(pairs)), float32 (float64 for float64 data). Differentiable, also twice.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    if (library := _dispatch.plain_library(impl)) is not None:
        result = library.row_dots_plain(tensors, pairs)
        if result is not None:
            return result
    if isinstance(tensors, Sequence) and _sharded.is_sharded(*tensors):
        return _sharded.row_dots(row_dots, tensors, pairs, impl)
    packed, first, second = _pack(tensors, pairs)
    impl = _dispatch.wanted(impl)
    if impl == "reference":
        return reference.run(packed, first, second)
    if torch.is_grad_enabled() and needs_grad(packed, ()):
        return apply_traced(RowDotsFunction, first, second, impl, *packed)
    call = _row_dots if _dispatch.plain(*packed) else torch.ops.fmkernels.row_dots
    return call(packed, first, second, impl)
