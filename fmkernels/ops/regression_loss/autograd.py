"""The derivatives of the fused loss: of any order in pred, without a second pass over its operands.

The forward pass has written the slope G = d loss / d pred; backward multiplies it by grad_output. G is a function of
pred whose own derivative the penalties give by G itself (see :func:`curvature`), so that with ``create_graph`` a node
that knows G and the weights, but neither pred nor the operands, is differentiable as often as is wanted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ... import _memory, _torch
from .._operands import TENSOR, compute_dtype, expand_leading
from ..combine.op import combine_into
from . import schema
from .kinds import KINDS, bend


class Rule(NamedTuple):
    """The loss but for its tensors."""

    kind: int
    delta: float
    scale: float | None  # where there is no tensor of it; None: 1 / the number of elements
    impl: str


def curvature(
    slope: Tensor, dtype: torch.dtype, rule: Rule, weight: Tensor | None, scale: Tensor | None, mask: Tensor | None
) -> Tensor:
    r"""The derivative of the slope :math:`G = f \rho'(d)` in pred, by G, with f = weight times scale.

    Squared: 2 f. Huber: f where |G| < |f| delta, else 0. Pseudo-Huber, where :math:`\rho' = d / \sqrt{d^2 + \delta^2}`:
    :math:`f (1 - (G / f)^2)^{3/2} / \delta`. L1: 0. G was stored in ``dtype``.
    """
    if scale is None:
        number = 1.0 / slope.numel() if rule.scale is None else rule.scale
        scale = torch.full((), number, dtype=slope.dtype, device=slope.device)
    factor = expand_leading(scale, slope)
    if weight is not None:
        factor = factor * expand_leading(weight, slope)
    if rule.kind == KINDS["squared"]:
        result = 2.0 * factor
    elif rule.kind == KINDS["huber"]:
        # beyond the bend G is |f| delta, rounded; the product's own rounding may differ
        limit = (1.0 - 4.0 * torch.finfo(slope.dtype).eps) * bend(rule.delta, slope.dtype) * factor.abs()
        result = torch.where(slope.abs() < limit.to(dtype).to(slope.dtype), factor, 0.0)
    elif rule.kind == KINDS["pseudo_huber"]:
        ratio = slope / torch.where(factor == 0.0, 1.0, factor)
        result = factor * (1.0 - ratio.square()).clamp(min=0.0) ** 1.5 / bend(rule.delta, slope.dtype)
    else:
        result = torch.zeros_like(factor)
    return result if mask is None else torch.where(expand_leading(mask, slope), result, 0.0)


class SlopeFunction(Function):
    """The stored slope as a function of pred; ``edge`` is what leads to pred in the graph, its values are not read."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, slope: Tensor, rule: Rule, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        slope = slope.detach()
        ctx.rule, ctx.dtype = rule, edge.dtype
        ctx.save_for_backward(slope, *tensors)
        return slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        slope, *tensors = ctx.saved_tensors
        wide = slope.to(compute_dtype(slope))
        bent = curvature(wide, slope.dtype, ctx.rule, *tensors)
        return (grad.to(wide.dtype) * bent).to(ctx.dtype), None, None, None, None, None


class LossFunction(Function):
    """(loss, slope). The slope is an output for the sake of its edge: what is differentiated again starts there."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        pred: Tensor,
        arguments: tuple,
        rule: Rule,
        weight: Tensor | None,
        scale: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        loss, slope = schema.call(pred, arguments)
        ctx.rule, ctx.dtype = rule, pred.dtype
        ctx.owned = not _torch.saved_tensor_hooks_active()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slope, weight, scale, mask)
        return loss, slope

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_slope: Tensor | None) -> Any:  # type: ignore[override]
        slope, *tensors = ctx.saved_tensors
        result = None
        if grad_output is not None and torch.is_grad_enabled():
            result = differentiable_gradient(slope, slope, ctx.rule, grad_output, ctx.dtype, *tensors)
        elif grad_output is not None:
            result = scaled_slope(slope.detach(), ctx.owned, ctx.rule.impl, grad_output, ctx.dtype)
        if grad_slope is not None:
            grad_slope = grad_slope.to(ctx.dtype)
            result = grad_slope if result is None else result + grad_slope
        return result, None, None, None, None, None


class PlainLossFunction(Function):
    """The same for a small loss that is computed already, where a second output would cost more than keeping pred."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, pred: Tensor, results: tuple[Tensor, Tensor], weight: Tensor | None, rule: tuple
    ) -> Tensor:
        loss, slope = results
        ctx.state = pred, pred._version, rule, not _torch.saved_tensor_hooks_active()
        ctx.save_for_backward(slope, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        slope, weight = ctx.saved_tensors
        pred, version, rule, owned = ctx.state
        if not torch.is_grad_enabled():
            return scaled_slope(slope, owned, "auto", grad_output, pred.dtype), None, None, None
        if pred._version != version:
            raise RuntimeError("regression_loss: pred was changed in place, so that its second derivative is lost")
        kind, delta, scale = rule
        rule, tensors = Rule(kind, delta, scale, "auto"), (weight, None, None)
        return differentiable_gradient(pred, slope, rule, grad_output, pred.dtype, *tensors), None, None, None


def differentiable_gradient(
    edge: Tensor, slope: Tensor, rule: Rule, grad_output: Tensor, dtype: torch.dtype, *tensors: Tensor | None
) -> Tensor:
    """The slope times grad_output as a function of both."""
    slope = SlopeFunction.apply(edge, slope, rule, *tensors)
    return (slope * expand_leading(grad_output, slope)).to(dtype)


def scaled_slope(slope: Tensor, owned: bool, impl: str, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored slope times grad_output.

    In place where this is the last backward pass and nobody else can hold it (``owned``: no hook saw it when it was
    saved); untouched where grad_output is 1.
    """
    if _torch.intercepted() or _torch.legacy_batched(grad_output) or slope.dtype is not dtype:
        return (slope.to(grad_output.dtype) * expand_leading(grad_output, slope)).to(dtype)
    last = owned and not _torch.graph_is_kept()
    if last and grad_output.is_cpu and grad_output.dim() == 0 and grad_output.item() == 1.0:
        return slope
    out = slope if last else _memory.empty_like(slope)
    combine_into(out, [slope], [TENSOR], [0], [grad_output.to(compute_dtype(slope))], [0.0], impl)
    return out


class TracedLossFunction(Function):
    """The same for torch.compile, which differentiates once and takes its own care of memory."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, arguments: tuple) -> Tensor:  # type: ignore[override]
        loss, slope = torch.ops.fmkernels.regression_loss(pred, *arguments)
        ctx.dtype = pred.dtype
        ctx.save_for_backward(slope)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return (slope.to(grad_output.dtype) * expand_leading(grad_output, slope)).to(ctx.dtype), None
