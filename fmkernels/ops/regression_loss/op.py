"""The weighted, masked regression loss against a target that is never materialised, with its gradient in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _dispatch, _torch
from ..._checks import (
    FLOATING,
    check_choice,
    check_float_tensor,
    check_like,
    check_number,
    check_same_device,
    check_tensor,
    leading_shape,
    type_error,
    value_error,
)
from ...random import check_noise
from .. import _sharded
from .._operands import (
    TENSOR,
    Coefficient,
    Operand,
    Operands,
    expand_leading,
    pack_coefficient,
    pack_coefficients,
    traced_number,
)
from ..combine.op import needs_grad
from ..library import sum_trailing
from . import reference, schema
from .autograd import LossFunction, PlainLossFunction, Rule, Target, TracedLossFunction, bends_by_residual
from .kinds import KINDS

REDUCTIONS = ("mean", "weighted_mean", "sum", "none")
MAX_OPERANDS = 3


def _plain_loss(
    library: Any,
    pred: Tensor,
    operands: Any,
    coefficients: Any,
    weight: Tensor | None,
    reduction: str,
    kind: str,
    delta: float,
) -> Tensor | None:
    """The loss by python/plain.h, or None where the call is not plain enough (or wrong)."""
    if type(kind) is not str or kind not in KINDS or type(delta) is not float or not 0.0 < delta < math.inf:
        return None
    mean = reduction != "sum"
    need_grad = torch.is_grad_enabled() and isinstance(pred, Tensor) and pred.requires_grad
    if need_grad and (bends_by_residual(pred, KINDS[kind]) or _torch.saved_tensor_hooks_active()):
        return None  # which keeps more than the slope, or must keep what hooks see alone
    results = library.regression_loss_plain(pred, operands, coefficients, weight, KINDS[kind], delta, mean, need_grad)
    if results is None:
        return None
    if not need_grad:
        return results[0]
    return _torch.apply_function(PlainLossFunction, pred, results, weight, (KINDS[kind], delta, None if mean else 1.0))


def _is_of_dtype(operands: Any, dtype: torch.dtype) -> bool:
    """True where the first of a list of operands is a tensor of this dtype."""
    return type(operands) is list and len(operands) > 0 and getattr(operands[0], "dtype", None) is dtype


def _check_count(count: Any, reduction: str, pred: Tensor) -> None:
    if count is None:
        return
    if reduction != "mean":
        raise value_error("count", f"None for reduction={reduction!r}: it is what 'mean' divides by", count)
    if isinstance(count, Tensor):
        check_tensor("count", count)
        if count.dtype.is_complex or count.dtype is torch.bool:
            raise type_error("count", "a tensor of real numbers", count)
        if count.numel() != 1:
            raise value_error("count", "a tensor with one element", count)
        check_same_device("count", count, "pred", pred)
    else:
        check_number("count", count, above=0.0)


def _check_operands(
    operands: Sequence[Operand], names: Sequence[str] | None, pred: Tensor, noise_dtype: torch.dtype | None
) -> tuple[Operands, torch.dtype]:
    """Operands of pred's shape and of one dtype, which may differ from pred's."""
    if not isinstance(operands, Sequence):
        raise type_error("operands", "a sequence of tensors and fm.Noise", operands)
    if not 1 <= len(operands) <= MAX_OPERANDS:
        raise value_error("operands", f"1 to {MAX_OPERANDS} operands", len(operands))
    tensors: list[Tensor] = []
    streams: list[int] = []
    offsets: list[int] = []
    if noise_dtype is not None and not (isinstance(noise_dtype, torch.dtype) and noise_dtype in FLOATING):
        raise type_error("noise_dtype", f"one of {', '.join(map(str, FLOATING))}", noise_dtype)
    given = names is None and noise_dtype is not None
    for i, operand in enumerate(operands):
        name = f"operands[{i}]" if names is None else names[i]
        if isinstance(operand, Tensor):
            check_like(name, operand, "pred", pred, dtype=False)
            if noise_dtype is None:
                noise_dtype = operand.dtype
            elif operand.dtype is not noise_dtype:
                if given:
                    raise type_error("noise_dtype", f"the dtype of {name}, {operand.dtype}", noise_dtype)
                raise type_error(name, f"the dtype of the other data, {noise_dtype}", operand)
            tensors.append(operand)
            streams.append(TENSOR)
            offsets.append(0)
        else:
            check_noise(name, operand, "pred", pred)
            tensors.append(operand.seed)
            streams.append(operand.stream)
            offsets.append(operand.offset(pred))
    return Operands(tensors, streams, offsets), pred.dtype if noise_dtype is None else noise_dtype


def _reciprocal(total: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / total, and 0 where nothing counts."""
    total = total.to(dtype)
    return torch.where(total == 0.0, 0.0, 1.0 / torch.where(total == 0.0, 1.0, total))


def _whole(pred: Tensor, number: float, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """1 / number (1 for none at all); on the device where a graph that is being recorded has no value for it."""
    if isinstance(number, (int, float)) and (not torch.compiler.is_compiling() or _torch.is_static(number)):
        return None, 1.0 / (number or 1)
    return traced_number(number, dtype, pred.device).reciprocal(), 0.0


def _divisor(elements: int, weight: Any, mask: Tensor | None, reduction: str) -> Tensor | int:
    """What the means divide by: the number of elements, or of those unmasked, or the sum of their weights."""
    counted = mask
    if reduction == "weighted_mean" and isinstance(weight, Tensor):
        counted = weight
        if mask is not None:  # both over the leading dimensions that either has
            wider = weight if weight.dim() > mask.dim() else mask
            counted = torch.where(expand_leading(mask, wider), expand_leading(weight, wider), 0.0)
    return elements if counted is None else _total(counted) * (elements // max(counted.numel(), 1))


def _total(counted: Tensor) -> Tensor:
    # on a CPU the sum of booleans is that of a copy in int64
    return torch.count_nonzero(counted) if counted.dtype is torch.bool and counted.is_cpu else counted.sum()


def _scale(
    pred: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    count: Tensor | float | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, float]:
    """1 over what the sum is divided by, as a tensor on the device or as a number."""
    if reduction == "sum":
        return None, 1.0
    if count is not None:
        if not isinstance(count, Tensor):
            return _whole(pred, count, dtype)
        return _reciprocal(count.reshape(()), dtype), 0.0
    elements, samples = pred.numel(), pred.shape[0] if pred.dim() else 1
    if reduction == "none":
        covered = elements // max(samples, 1)
        if mask is None:
            return _whole(pred, covered, dtype)
        entries = sum_trailing(mask if mask.dim() else mask.expand(samples), 1)
        return _reciprocal(entries * (covered // max(math.prod(mask.shape[1:]), 1)), dtype), 0.0
    total = _divisor(elements, weight, mask, reduction)
    return (_reciprocal(total, dtype), 0.0) if isinstance(total, Tensor) else _whole(pred, total, dtype)


def regression_loss(
    pred: Tensor,
    operands: Sequence[Operand],
    coefficients: Sequence[Coefficient] | Tensor,
    *,
    weight: Coefficient | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    count: Tensor | float | None = None,
    kind: str = "squared",
    delta: float = 1.0,
    noise_dtype: torch.dtype | None = None,
    impl: str = "auto",
    _names: Sequence[str] | None = None,
) -> Tensor:
    r"""The loss :math:`\sum w\, m\, \rho(\mathrm{pred} - u)` with target :math:`u = \sum_i c_i k_i`, and its gradient.

    The target is never materialised: the kernel forms it from its operands (data, source samples, or noise that it
    draws again), and writes d loss / d pred in the same pass over memory. backward() multiplies that by grad_output on
    the device, without a host sync, and leaves at once where grad_output is 1.

    A DTensor ``pred`` gives a DTensor: the whole's loss and gradients, however the batch is sharded; the other tensors
    follow its placements, and plain ones must be the whole's, the same on all ranks.

    Derivatives of any order in pred are right, under torch.func as well (there "auto" takes the reference). They need
    neither pred nor the operands again, but for a penalty that bends ("huber", "pseudo_huber") of a pred of half
    precision, whose stored slope says too little: there both are kept until backward.

    The penalty of a residual d is d^2 ("squared"); d^2 / 2 up to |d| = delta and delta (|d| - delta / 2) beyond
    ("huber", Huber 1964); sqrt(d^2 + delta^2) - delta ("pseudo_huber", Charbonnier et al. 1994); |d| ("l1").

    Args:
        pred: the model's output, shape (B, ...), floating; its dtype may differ from the operands'.
        operands: 1 to 3 tensors of pred's shape and of one dtype, or :class:`fmkernels.Noise`.
        coefficients: as in :func:`combine`: numbers, or tensors whose shape is a leading part of pred's, or one table.
        weight: w, a number or a tensor whose shape is a leading part of pred's, e.g. per sample (B,).
        mask: m, boolean, its shape a leading part of pred's: (B,), (B, T), or all of it; True is kept. What is masked
            out adds 0 to the loss and to the gradient, even where pred, the target or the incoming gradient is NaN.
        reduction: "mean" divides the sum by the number of unmasked elements (weights do not count), "weighted_mean" by
            the sum of the unmasked elements' weights, "sum" does not divide, "none" returns the mean over the unmasked
            elements of each sample, shape (B,). Where everything is masked out, or the weights add to 0, the loss is 0.
        count: > 0, what "mean" divides by instead (and no other reduction): a number, or a tensor with one element on
            pred's device. A batch in parts (micro-batches, ranks) has the whole's mean, and gradient, as the sum of its
            parts' where each gives the number of unmasked elements of the whole; the whole's weighted mean where each
            gives the sum of the unmasked elements' weights, with reduction="mean" as well.
        kind: "squared", "huber", "pseudo_huber" or "l1".
        delta: > 0; the bend of "huber" and "pseudo_huber".
        noise_dtype: dtype to which drawn noise is rounded; that of the first tensor operand if None, else pred's.
        impl: "auto", "reference", "native" or "triton". The kernels differentiate with respect to pred only; "auto"
            takes the reference where another argument requires grad.

    Returns:
        The loss in float32 (float64 where pred or an operand is float64; coefficients, weights and counts are taken in
        the loss's dtype, whatever their own), 0-dim or (B,).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    if (
        mask is None
        and count is None
        and type(reduction) is str
        and reduction in (("mean", "weighted_mean", "sum") if weight is None else ("mean", "sum"))
        and (weight is None or type(weight) is Tensor)
        and (noise_dtype is None or _is_of_dtype(operands, noise_dtype))
        and (library := _dispatch.plain_library(impl)) is not None
    ):
        loss = _plain_loss(library, pred, operands, coefficients, weight, reduction, kind, delta)
        if loss is not None:
            return loss
    check_float_tensor("pred", pred)
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none" and pred.dim() == 0:
        raise value_error("pred", "at least one dimension, of samples, for reduction='none'", pred)
    if _sharded.is_sharded(pred, *(operands if isinstance(operands, Sequence) else ()), weight, mask):
        _check_count(count, reduction, pred)
        options = {"kind": kind, "delta": delta, "noise_dtype": noise_dtype, "impl": impl, "_names": _names}
        names = _names or [f"operands[{i}]" for i in range(len(operands))]
        of_pred = (pred, operands, names, coefficients, weight, mask, reduction, count, options)
        return _sharded.regression_loss(regression_loss, _divisor, *of_pred)
    packed, noise_dtype = _check_operands(operands, _names, pred, noise_dtype)
    dtype = schema.loss_dtype(pred, noise_dtype)
    coefs, values = pack_coefficients("coefficients", coefficients, len(operands), pred, dtype)
    check_number("delta", delta, above=0.0)
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise type_error("mask", "a boolean tensor", mask)
        leading_shape("mask", mask, "pred", pred)
    _check_count(count, reduction, pred)
    weight_tensor, number = (None, 1.0) if weight is None else pack_coefficient("weight", weight, pred, dtype)
    scale, scale_value = _scale(pred, weight_tensor, mask, reduction, count, dtype)
    if weight_tensor is None and (reduction != "weighted_mean" or number == 0.0):  # a number goes into the scale
        scale, scale_value = (None if scale is None else scale * number), scale_value * number

    impl = _dispatch.wanted(impl)
    args: list[Any] = [*packed, coefs, values, noise_dtype, weight_tensor, scale, scale_value, mask, KINDS[kind]]
    args += [delta, reduction == "none"]
    grad_mode = torch.is_grad_enabled()
    if grad_mode and impl != "reference" and needs_grad(packed.tensors, [*coefs, weight_tensor, scale]):
        if impl != "auto":
            raise ValueError(
                f"impl: expected 'auto' or 'reference' where an operand, a coefficient or the weight requires grad, "
                f"got {impl!r}: the kernels differentiate with respect to pred only"
            )
        impl = "reference"
    if torch.compiler.is_compiling() and not _torch.is_static(delta):
        impl = "reference"  # the operator's schema takes a number, which a symbol is not yet
    if impl == "reference":
        return reference.loss(pred, *args)
    need_grad = grad_mode and pred.requires_grad
    arguments = (*args, need_grad, impl)
    if not need_grad:
        return schema.call(pred, arguments)[0]
    if torch.compiler.is_compiling():
        return TracedLossFunction.apply(pred, arguments)
    rule, kept = Rule(KINDS[kind], delta, scale_value, impl), [weight_tensor, scale, mask]
    if bends_by_residual(pred, rule.kind):
        rule = rule._replace(target=Target(packed.streams, packed.offsets, values, noise_dtype))
        kept += [*packed.tensors, *coefs]
    return LossFunction.apply(pred, arguments, rule, *kept)[0]
