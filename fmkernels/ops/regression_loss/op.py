"""The weighted, masked regression loss against a target that is never materialised, with its gradient in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import _dispatch
from ..._checks import (
    FLOATING,
    check_choice,
    check_float_tensor,
    check_like,
    check_number,
    check_tensor,
    leading_shape,
    type_error,
    value_error,
)
from ...random import check_noise
from .._operands import (
    IN_PLACE,
    TENSOR,
    Coefficient,
    Operand,
    Operands,
    compute_dtype,
    expand_leading,
    pack_coefficient,
    pack_coefficients,
)
from ..combine.op import needs_grad
from ..library import LIBRARY, sum_trailing
from . import reference
from .kinds import KINDS

REDUCTIONS = ("mean", "sum", "none")
MAX_OPERANDS = 3

LIBRARY.define(
    "regression_loss(Tensor pred, Tensor[] tensors, int[] streams, int[] offsets, Tensor?[] coefs, float[] values, "
    "ScalarType noise_dtype, Tensor? weight, Tensor? scale, float scale_value, Tensor? mask, int kind, float delta, "
    "bool per_sample, bool need_grad, bool scale_grad, str impl) -> (Tensor, Tensor)"
)


def _regression_loss(pred: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, impl = args
    return _dispatch.implementation("regression_loss", pred.device.type, impl).run(pred, *rest)


def _regression_loss_fake(
    pred: Tensor, tensors: list[Tensor], streams: list[int], offsets: list[int], *args: Any
) -> tuple[Tensor, Tensor]:
    noise_dtype, (per_sample, need_grad) = args[2], args[-4:-2]
    dtype = loss_dtype(pred, noise_dtype)
    loss = pred.new_empty(pred.shape[:1] if per_sample else (), dtype=dtype)
    return loss, torch.empty_like(pred) if need_grad else pred.new_empty(0)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("regression_loss", _regression_loss, _key)
torch.library.register_fake("fmkernels::regression_loss", _regression_loss_fake, lib=LIBRARY)


def loss_dtype(pred: Tensor, noise_dtype: torch.dtype) -> torch.dtype:
    """float64 where pred or the operands are, else float32."""
    # operands, drawn or not, are of noise_dtype
    return torch.float64 if noise_dtype is torch.float64 or pred.dtype is torch.float64 else torch.float32


def _call(pred: Tensor, args: tuple) -> tuple[Tensor, Tensor]:
    tensors, coefs, weight, mask = args[0], args[3], args[6], args[9]
    if _dispatch.plain(pred, *tensors, *coefs, weight, mask):
        return _regression_loss(pred, *args)
    return torch.ops.fmkernels.regression_loss(pred, *args)


class RegressionLossFunction(Function):
    """The forward pass has written d loss / d pred; backward scales it in place by grad_output, on the device."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, scale: Tensor | None, args: tuple) -> Tensor:  # type: ignore[override]
        loss, grad = _call(pred, args)
        scale_grad = args[-2]
        ctx.impl = args[-1]
        ctx.waiting = None if scale_grad else args[8] if scale is None else scale
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        return scaled_gradient(ctx, grad_output), None, None


def scaled_gradient(ctx: Any, grad_output: Tensor) -> Tensor:
    """The saved gradient times grad_output, in place; untouched where that is 1."""
    (grad,) = ctx.saved_tensors
    if ctx.waiting is not None:
        grad_output = grad_output * ctx.waiting
    if torch.compiler.is_compiling() or _dispatch.legacy_batched(grad_output):
        return (grad.to(grad_output.dtype) * expand_leading(grad_output, grad)).to(grad.dtype)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "regression_loss: the fused loss has no second derivative; "
            "pass impl='reference' to differentiate twice (create_graph=True)"
        )
    if grad_output.is_cpu and grad_output.dim() == 0 and grad_output.item() == 1.0:
        return grad
    packed: Any = ([0], [grad_output.to(compute_dtype(grad))], [0.0], [], [], 0.0, 0.0, False)
    if torch._C._autograd._get_current_graph_task_keep_graph():  # the gradient is needed again, unscaled
        return torch.ops.fmkernels.combine([grad], [TENSOR], *packed, False, ctx.impl)[0]
    torch.ops.fmkernels.combine_into(grad, [], [IN_PLACE], *packed, ctx.impl)
    return grad


class PlainLossFunction(Function):
    """The same derivative for a loss that is computed already."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, results: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        ctx.impl, ctx.waiting = "auto", None
        ctx.save_for_backward(results[1])
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        return scaled_gradient(ctx, grad_output), None


def _plain_loss(
    library: Any, pred: Tensor, operands: Any, coefficients: Any, reduction: str, kind: str, delta: float
) -> Tensor | None:
    """The loss by python/plain_call.h, or None where the call is not plain enough (or wrong)."""
    if kind not in KINDS or reduction not in ("mean", "sum") or type(delta) is not float or not 0.0 < delta < math.inf:
        return None
    need_grad = torch.is_grad_enabled() and isinstance(pred, Tensor) and pred.requires_grad
    results = library.regression_loss_plain(
        pred, operands, coefficients, KINDS[kind], delta, reduction == "mean", need_grad
    )
    if results is None:
        return None
    return PlainLossFunction.apply(pred, results) if need_grad else results[0]


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
    for i, operand in enumerate(operands):
        name = f"operands[{i}]" if names is None else names[i]
        if isinstance(operand, Tensor):
            if operand.shape != pred.shape or operand.device != pred.device:
                check_like(name, operand, "pred", pred, dtype=False)
            if noise_dtype is None:
                check_float_tensor(name, operand)
                noise_dtype = operand.dtype
            elif operand.dtype is not noise_dtype:
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


def _scale(pred: Tensor, mask: Tensor | None, reduction: str, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """1 over the number of (unmasked) elements, as a tensor on the device or as a number."""
    if reduction == "sum":
        return None, 1.0
    covered = pred.numel() if reduction == "mean" else pred.numel() // max(pred.shape[0], 1)
    if mask is None:
        return None, 1.0 / max(covered, 1)
    entries = mask.sum() if reduction == "mean" else sum_trailing(mask, 1)
    per_entry = pred.numel() // max(mask.numel(), 1)
    return 1.0 / (entries * per_entry).clamp(min=1).to(dtype), 0.0


def regression_loss(
    pred: Tensor,
    operands: Sequence[Operand],
    coefficients: Sequence[Coefficient] | Tensor,
    *,
    weight: Coefficient | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
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

    The penalty of a residual d is d^2 ("squared"); d^2 / 2 up to |d| = delta and delta (|d| - delta / 2) beyond
    ("huber", Huber 1964); sqrt(d^2 + delta^2) - delta ("pseudo_huber", Charbonnier et al. 1994); |d| ("l1").

    Args:
        pred: the model's output, shape (B, ...), floating; its dtype may differ from the operands'.
        operands: 1 to 3 tensors of pred's shape and of one dtype, or :class:`fmkernels.Noise`.
        coefficients: as in :func:`combine`: numbers, or tensors whose shape is a leading part of pred's, or one table.
        weight: w, a number or a tensor whose shape is a leading part of pred's, e.g. per sample (B,).
        mask: m, boolean, its shape a leading part of pred's: (B,), (B, T), or all of it; True is kept. What is masked
            out adds 0 to the loss and to the gradient, even where pred or the target is NaN.
        reduction: "mean" divides the sum by the number of unmasked elements (weights do not count), "sum" does not
            divide, "none" returns the mean over the unmasked elements of each sample, shape (B,). Where everything is
            masked out the loss is 0.
        kind: "squared", "huber", "pseudo_huber" or "l1".
        delta: > 0; the bend of "huber" and "pseudo_huber".
        noise_dtype: dtype to which drawn noise is rounded; that of the first tensor operand if None, else pred's.
        impl: "auto", "reference", "native" or "triton". The kernels differentiate with respect to pred only; "auto"
            takes the reference where another argument requires grad.

    Returns:
        The loss in float32 (float64 where any tensor is float64), 0-dim or (B,).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    if weight is None and mask is None and (library := _dispatch.plain_library(impl)) is not None:
        loss = _plain_loss(library, pred, operands, coefficients, reduction, kind, delta)
        if loss is not None:
            return loss
    check_float_tensor("pred", pred)
    packed, noise_dtype = _check_operands(operands, _names, pred, noise_dtype)
    tensors, streams, offsets = packed
    if noise_dtype not in FLOATING:
        raise type_error("noise_dtype", f"one of {', '.join(map(str, FLOATING))}", noise_dtype)
    dtype = loss_dtype(pred, noise_dtype)
    coefs, values = pack_coefficients("coefficients", coefficients, len(operands), pred, dtype)
    if kind not in KINDS:
        check_choice("kind", kind, KINDS)
    if reduction not in REDUCTIONS:
        check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none" and pred.dim() == 0:
        raise value_error("pred", "at least one dimension, of samples, for reduction='none'", pred)
    if type(delta) is not float or not 0.0 < delta < math.inf:
        check_number("delta", delta, above=0.0)
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise type_error("mask", "a boolean tensor", mask)
        leading_shape("mask", mask, "pred", pred)
    scale, scale_value = _scale(pred, mask, reduction, dtype)
    weight_tensor = None
    if weight is not None:
        weight_tensor, number = pack_coefficient("weight", weight, pred, dtype)
        if weight_tensor is None:  # a number goes into the scale
            scale, scale_value = (None if scale is None else scale * number), scale_value * number

    impl = _dispatch.wanted(impl)
    args = (tensors, streams, offsets, coefs, values, noise_dtype, weight_tensor, scale, scale_value)
    options = (mask, KINDS[kind], float(delta), reduction == "none")
    grad_mode = torch.is_grad_enabled()
    if grad_mode and impl != "reference" and needs_grad(tensors, [*coefs, weight_tensor]):
        if impl != "auto":
            raise ValueError(
                f"impl: expected 'auto' or 'reference' where an operand, a coefficient or the weight requires grad, "
                f"got {impl!r}: the kernels differentiate with respect to pred only"
            )
        impl = "reference"
    if impl == "reference":
        return reference.loss(pred, *args, *options)
    if grad_mode and pred.requires_grad:
        # float16 cannot hold a gradient divided by a large count: there the scale waits for backward's factor.
        scale_grad = pred.dtype != torch.float16
        return RegressionLossFunction.apply(pred, scale, (*args, *options, True, scale_grad, impl))
    return _call(pred, (*args, *options, False, True, impl))[0]
