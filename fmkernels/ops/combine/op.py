"""y = sum_i c_i k_i: one pass over memory for every path, solver stage, guidance rule and noise term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from ... import _dispatch
from ..._checks import check_float_tensor, check_like, check_number, type_error, value_error
from ..._torch import apply_traced
from .. import _sharded
from .._operands import (
    IN_PLACE,
    MAX_TENSORS,
    TENSOR,
    Coefficient,
    Operand,
    Operands,
    coefficients_apart,
    compute_dtype,
    memory,
    memory_length,
    operands_apart,
    pack_coefficients,
    pack_operands,
)
from ..library import LIBRARY, sum_trailing
from . import reference

LIBRARY.define(
    "combine(Tensor[] tensors, SymInt[] streams, SymInt[] offsets, Tensor?[] coefs, float[] values, "
    "Tensor?[] error_coefs, float[] error_values, float atol, float rtol, bool want_norm, bool store_noise, str impl)"
    " -> Tensor[]"
)
LIBRARY.define(
    "combine_into(Tensor(a!) out, Tensor[] tensors, SymInt[] streams, SymInt[] offsets, Tensor?[] coefs, "
    "float[] values, Tensor?[] error_coefs, float[] error_values, float atol, float rtol, bool want_norm, str impl)"
    " -> Tensor"
)


def _combine(tensors: list[Tensor], *args: Any) -> list[Tensor]:
    *rest, impl = args
    return _dispatch.implementation("combine", tensors[0].device.type, impl).run(tensors, *rest)


def _combine_into(
    out: Tensor,
    tensors: Sequence[Tensor],
    streams: Sequence[int],
    offsets: Sequence[int],
    coefs: Sequence[Tensor | None],
    values: Sequence[float],
    error_coefs: Sequence[Tensor | None],
    *args: Any,
) -> Tensor:
    *rest, want_norm, impl = args
    # here, where the tensors are there: what torch.compile traces does not say what shares memory
    written = memory(out)
    tensors = operands_apart(tensors, *written)
    coefs, error_coefs = coefficients_apart(coefs, *written), coefficients_apart(error_coefs, *written)
    if streams[0] == IN_PLACE:
        tensors, streams = [out, *tensors], [TENSOR, *streams[1:]]
    run = _dispatch.implementation("combine", out.device.type, impl).run
    results = run(tensors, streams, offsets, coefs, values, error_coefs, *rest, want_norm, False, out=out)
    return results[1] if want_norm else _no_norm(out)


def _no_norm(data: Tensor) -> Tensor:
    return data.new_empty(0, dtype=compute_dtype(data))


def _fake_norm(data: Tensor) -> Tensor:
    return data.new_empty(data.shape[0], dtype=compute_dtype(data))


def _combine_fake(tensors: list[Tensor], streams: list[int], *args: Any) -> list[Tensor]:
    want_norm, store_noise = args[-3], args[-2]
    data = tensors[0]
    results = [torch.empty_like(data)]
    if store_noise:
        results += [torch.empty_like(data, memory_format=torch.contiguous_format) for s in streams if s != TENSOR]
    return [*results, _fake_norm(data)] if want_norm else results


def _combine_into_fake(out: Tensor, tensors: list[Tensor], streams: list[int], *args: Any) -> Tensor:
    return _fake_norm(out) if args[-2] else _no_norm(out)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("combine", _combine, _key)
    LIBRARY.impl("combine_into", _combine_into, _key)
torch.library.register_fake("fmkernels::combine", _combine_fake, lib=LIBRARY)
torch.library.register_fake("fmkernels::combine_into", _combine_into_fake, lib=LIBRARY)


class CombineFunction(Function):
    """combine with a derivative: the gradient of operand i is c_i grad, of coefficient i the sum of k_i grad."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        count: int,
        streams: list[int],
        offsets: list[int],
        values: list[float],
        options: tuple,
        *flat: Any,
    ) -> Any:
        tensors, coefs, error_coefs = (
            list(flat[:count]),
            list(flat[count : 2 * count]),
            list(flat[2 * count :]),
        )
        results = torch.ops.fmkernels.combine(tensors, streams, offsets, coefs, values, error_coefs, *options)
        ctx.count, ctx.streams, ctx.offsets, ctx.values, ctx.impl = (
            count,
            streams,
            offsets,
            values,
            options[-1],
        )
        # Coefficients are small; an operand is kept only for its coefficient's gradient (for noise that is the seed).
        needs = ctx.needs_input_grad[5 + count : 5 + 2 * count]
        kept = [tensor if need else None for tensor, need in zip(tensors, needs, strict=True)]
        ctx.save_for_backward(*kept, *coefs)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        count, grad = ctx.count, grads[0]
        impl = ctx.impl if grad is None else _dispatch.backward_impl(ctx.impl, grad)
        saved = ctx.saved_tensors  # once: what checkpoints recompute is unpacked at each access
        tensors, coefs = saved[:count], saved[count:]
        needs = ctx.needs_input_grad[5:]
        results: list[Tensor | None] = [None] * len(needs)
        for i in range(count) if grad is not None else ():
            if needs[i]:
                results[i] = combine([grad], [ctx.values[i] if coefs[i] is None else coefs[i]], impl=impl)
            if needs[count + i]:
                operand = reference.materialise([tensors[i]], [ctx.streams[i]], [ctx.offsets[i]], grad)[0]
                product = grad.to(coefs[i].dtype) * operand.to(coefs[i].dtype)
                results[count + i] = sum_trailing(product, coefs[i].dim())
        return None, None, None, None, None, *results


def combine_packed(
    operands: Operands,
    coefs: list[Tensor | None],
    values: list[float],
    error_coefs: list[Tensor | None],
    error_values: list[float],
    atol: float,
    rtol: float,
    want_norm: bool,
    store_noise: bool,
    impl: str,
) -> Sequence[Tensor]:
    """combine on checked arguments: [y, *noise drawn (if stored), norm (if wanted)]."""
    tensors, streams, offsets = operands
    impl = _dispatch.wanted(impl)
    options = (error_values, atol, rtol, want_norm, store_noise)
    if impl == "reference":
        return reference.run(tensors, streams, offsets, coefs, values, error_coefs, *options)
    if torch.is_grad_enabled() and needs_grad(tensors, coefs):
        arguments = (len(tensors), streams, offsets, values, (*options, impl), *tensors, *coefs, *error_coefs)
        return apply_traced(CombineFunction, *arguments)
    call = _combine if _dispatch.plain(*tensors, *coefs) else torch.ops.fmkernels.combine
    return call(tensors, streams, offsets, coefs, values, error_coefs, *options, impl)


def combine_into(
    out: Tensor,
    tensors: Sequence[Tensor],
    streams: Sequence[int],
    offsets: Sequence[int],
    coefs: Sequence[Tensor | None],
    values: Sequence[float],
    impl: str,
    error_coefs: Sequence[Tensor | None] = (),
    error_values: Sequence[float] = (),
    atol: float = 0.0,
    rtol: float = 0.0,
    want_norm: bool = False,
) -> Tensor:
    """combine on checked arguments into ``out``, which may be the first tensor. Returns the norm, if wanted."""
    options = (error_values, atol, rtol, want_norm)
    impl = _dispatch.wanted(impl)
    if impl == "reference":
        return reference.run(tensors, streams, offsets, coefs, values, error_coefs, *options, False, out=out)[-1]
    if tensors[0] is out:
        tensors, streams = tensors[1:], [IN_PLACE, *streams[1:]]
    call = _combine_into if _dispatch.plain(out, *tensors, *coefs) else torch.ops.fmkernels.combine_into
    norm = call(out, tensors, streams, offsets, coefs, values, error_coefs, *options, impl)
    if not torch.compiler.is_compiling():
        increment_version(out)
    return norm


def needs_grad(tensors: Sequence[Tensor], coefs: Sequence[Tensor | None]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in (*tensors, *coefs))


@overload
def combine(
    operands: Sequence[Operand],
    coefficients: Sequence[Coefficient] | Tensor,
    *,
    error_coefficients: None = None,
    atol: None = None,
    rtol: None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor: ...


@overload
def combine(
    operands: Sequence[Operand],
    coefficients: Sequence[Coefficient] | Tensor,
    *,
    error_coefficients: Sequence[Coefficient] | Tensor | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def combine(
    operands: Sequence[Operand],
    coefficients: Sequence[Coefficient] | Tensor,
    *,
    error_coefficients: Sequence[Coefficient] | Tensor | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The linear combination :math:`y = \sum_i c_i k_i` in one pass over memory, with an optional error norm.

    Any solver stage, multistep update, guidance rule, DDIM or Euler-Maruyama step is this with other coefficients.
    The sum is accumulated in float32 (float64 for float64 data) and rounded once.

    Where the first operand is a DTensor so is the result, of the same placements (Partial sums are formed first).

    With ``atol`` or ``rtol`` the same pass returns, for each sample (index of dimension 0), the error norm of adaptive
    solvers (Hairer, Norsett, Wanner 1993, II.4.11),

    .. math:: \sqrt{\operatorname{mean}_j \left( \frac{e_j}{atol + rtol \max(|k_{0,j}|, |y_j|)} \right)^2},

    where e is the combination with ``error_coefficients``, or y itself without them. The norm has no derivative.

    Args:
        operands: 1 to 16 tensors of one shape (B, ...), floating dtype and device, and any number of
            :class:`fmkernels.Noise`, which are drawn in the kernel. The first one is a tensor.
        coefficients: one number or tensor for each operand; a tensor's shape is a leading part of the operands' shape:
            () or (B,) or (B, T), .... Or one table of shape (..., K), whose last dimension runs over the operands.
        error_coefficients: the same, for e.
        atol: absolute tolerance >= 0 of the norm (0 where only ``rtol`` is given).
        rtol: relative tolerance >= 0 of the norm.
        out: tensor to write y into, of the operands' shape and dtype; may be an operand, or overlap one: in
            place for the first, others are copied, and so are coefficients in its memory. Not differentiable.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        y of the first operand's shape, dtype and memory format; with a tolerance, (y, norm), norm of shape (B,) in
        float32 (float64 for float64 data).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    simple = out is None and atol is None and rtol is None and error_coefficients is None
    if simple and (library := _dispatch.plain_library(impl)) is not None:
        results = library.combine_plain(operands, coefficients, False)
        if results is not None:
            return results[0]
    if not isinstance(operands, Sequence):
        raise type_error("operands", "a sequence of tensors and fm.Noise", operands)
    if _sharded.is_sharded(*operands):
        return _sharded.combine(combine, operands, coefficients, error_coefficients, atol, rtol, out, impl)
    if not operands or not isinstance(operands[0], Tensor):
        raise type_error("operands", "a tensor first", operands[0] if operands else operands)
    data = operands[0]
    check_float_tensor("operands[0]", data)
    tensor_count = sum(isinstance(k, Tensor) for k in operands)
    if tensor_count > MAX_TENSORS or len(operands) > MAX_TENSORS + 1:
        raise value_error("operands", f"at most {MAX_TENSORS} tensors and one fm.Noise", len(operands))
    packed = pack_operands([f"operands[{i}]" for i in range(len(operands))], operands, "operands[0]", data)
    dtype = compute_dtype(data)
    coefs, values = pack_coefficients("coefficients", coefficients, len(operands), data, dtype)
    error_coefs: list[Tensor | None] = []
    error_values: list[float] = []
    want_norm = atol is not None or rtol is not None
    if error_coefficients is not None:
        if not want_norm:
            raise value_error("error_coefficients", "atol or rtol beside it", error_coefficients)
        error_coefs, error_values = pack_coefficients(
            "error_coefficients", error_coefficients, len(operands), data, dtype
        )
    for name, tolerance in (("atol", atol), ("rtol", rtol)):
        if tolerance is not None:
            check_number(name, tolerance, low=0.0)
    if want_norm and data.dim() == 0:
        raise value_error("operands[0]", "at least one dimension, of samples, for the error norm", data)
    atol, rtol = float(atol or 0.0), float(rtol or 0.0)
    if out is None:
        results = combine_packed(packed, coefs, values, error_coefs, error_values, atol, rtol, want_norm, False, impl)
        return (results[0], results[1]) if want_norm else results[0]

    check_like("out", out, "operands[0]", data)
    if torch.is_grad_enabled() and needs_grad((out, *packed.tensors), coefs):
        raise value_error("out", "no operand that requires grad when it is given", out)
    if out.numel() > memory_length(out):
        raise value_error("out", "a tensor whose elements have a place in memory each", out)
    errors = (error_coefs, error_values, atol, rtol, want_norm)
    norm = combine_into(out, packed.tensors, packed.streams, packed.offsets, coefs, values, impl, *errors)
    return (out, norm) if want_norm else out
