"""The derivatives of the fused loss: of any order in pred, without a second pass over its operands.

The forward pass has written the slope G = d loss / d pred; backward multiplies it by grad_output. G is a function of
pred whose own derivative the penalties give by G itself (see :func:`curvature`), so that with ``create_graph`` a node
that knows G and the weights, but neither pred nor the operands, is differentiable as often as is wanted.

Of a penalty that bends, a slope of half precision says too little: 1 - (G / f)^2 is all rounding, and many residuals
lie on the bend itself. There pred and the operands are kept, and the derivative is that of the residual, formed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from ... import _dispatch, _memory, _native, _torch
from .._operands import TENSOR, compute_dtype, expand_leading
from ..combine.op import combine_into
from . import reference, schema
from .kinds import KINDS, bend


class Target(NamedTuple):
    """How the target is formed, but for its tensors."""

    streams: Sequence[int]
    offsets: Sequence[int]
    values: Sequence[float]
    noise_dtype: torch.dtype


class Rule(NamedTuple):
    """The loss but for its tensors."""

    kind: int
    delta: float
    scale: float | None  # where there is no tensor of it; None: 1 / the number of elements
    impl: str
    target: Target | None = None  # where the derivative of the slope is that of the residual


def bends_by_residual(pred: Tensor, kind: int) -> bool:
    """Whether the derivative of the slope needs pred and the operands again."""
    return kind in _BENT and pred.dtype in (torch.bfloat16, torch.float16)


_BENT = (KINDS["huber"], KINDS["pseudo_huber"])


def curvature(slope: Tensor, dtype: torch.dtype, rule: Rule, factor: Tensor) -> Tensor:
    r"""The derivative of the slope :math:`G = f \rho'(d)` in pred, by G, with f = weight times scale.

    Squared: 2 f. Huber: f where |G| < |f| delta, else 0. Pseudo-Huber, where :math:`\rho' = d / \sqrt{d^2 + \delta^2}`:
    :math:`f (1 - (G / f)^2)^{3/2} / \delta`. L1: 0. G was stored in ``dtype``.
    """
    if rule.kind == KINDS["squared"]:
        return 2.0 * factor
    if rule.kind == KINDS["huber"]:
        # beyond the bend G is |f| delta, rounded; the product's own rounding may differ
        limit = (1.0 - 4.0 * torch.finfo(slope.dtype).eps) * bend(rule.delta, slope.dtype) * factor.abs()
        return torch.where(slope.abs() >= limit.to(dtype).to(slope.dtype), 0.0, factor)
    if rule.kind == KINDS["pseudo_huber"]:
        ratio = slope / torch.where(factor == 0.0, 1.0, factor)
        return factor * (1.0 - ratio.square()).clamp(min=0.0) ** 1.5 / bend(rule.delta, slope.dtype)
    return torch.zeros_like(factor)


def curvature_of_residual(d: Tensor, rule: Rule, factor: Tensor) -> Tensor:
    r"""The same by the residual d: f where |d| <= delta (Huber), :math:`f \delta^2 (d^2 + \delta^2)^{-3/2}`."""
    delta = bend(rule.delta, d.dtype)
    if rule.kind == KINDS["huber"]:
        return torch.where(d.abs() > delta, 0.0, factor)
    largest = torch.finfo(d.dtype).max  # infinity over itself would be NaN
    d = d.clamp(-largest, largest)
    unit = d.detach().abs().clamp(min=delta)  # of both, so that no square leaves the range
    x, b = d / unit, delta / unit
    return factor * (b.square() / (x.square() + b.square()) ** 1.5 / unit)


def kept(mask: Tensor | None, value: Tensor) -> Tensor:
    """A value with 0 for what is masked out, whatever it is there: an infinite grad_output times 0 is NaN."""
    return value if mask is None else torch.where(expand_leading(mask, value), value, 0.0)


class SlopeFunction(Function):
    """The stored slope as a function of pred; ``edge`` is what leads to pred in the graph, its values are not read, or
    pred itself where the rule has a target."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, slope: Tensor, rule: Rule, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        slope = slope.detach()
        ctx.rule, ctx.dtype = rule, edge.dtype
        ctx.save_for_backward(slope if rule.target is None else edge, *tensors)
        return slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        rule = ctx.rule
        saved, weight, scale, mask, *rest = ctx.saved_tensors
        if rule.target is None:
            wide = saved.to(compute_dtype(saved))
        else:
            streams, offsets, values, noise_dtype = rule.target
            tensors, coefs = rest[: len(streams)], rest[len(streams) :]
            wide = kept(mask, reference.residual(saved, tensors, streams, offsets, coefs, values, noise_dtype))
        if scale is None:
            number = 1.0 / wide.numel() if rule.scale is None else rule.scale
            scale = torch.full((), number, dtype=wide.dtype, device=wide.device)
        factor = expand_leading(scale, wide)
        if weight is not None:
            factor = factor * expand_leading(weight, wide)
        if rule.target is None:
            bent = curvature(wide, saved.dtype, rule, factor)
        else:
            bent = curvature_of_residual(wide, rule, factor)
        result = kept(mask, grad.to(wide.dtype) * bent).to(ctx.dtype)
        return result, None, None, *[None for _ in range(3 + len(rest))]


class LossFunction(Function):
    """(loss, slope). The slope is an output for the sake of its edge: what is differentiated again starts there, unless
    pred is kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, pred: Tensor, arguments: tuple, rule: Rule, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``tensors``: weight, scale and mask, then the operands and coefficients of the rule's target."""
        loss, slope = schema.call(pred, arguments)
        ctx.rule, ctx.dtype = rule, pred.dtype
        ctx.owned = not _torch.saved_tensor_hooks_active()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slope, None if rule.target is None else pred, *tensors)
        return loss, slope

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_slope: Tensor | None) -> Any:  # type: ignore[override]
        slope, pred, *tensors = ctx.saved_tensors
        result = None
        if grad_output is not None and torch.is_grad_enabled():
            edge = slope if pred is None else pred
            result = differentiable_gradient(edge, slope, ctx.rule, grad_output, ctx.dtype, *tensors)
        elif grad_output is not None:
            result = scaled_slope(slope.detach(), ctx.owned, ctx.rule.impl, grad_output, ctx.dtype, tensors[2])
        if grad_slope is not None:
            grad_slope = grad_slope.to(ctx.dtype)
            result = grad_slope if result is None else result + grad_slope
        return result, None, None, *[None for _ in tensors]


class PlainLossFunction(Function):
    """The same for a small loss that is computed already, where a second output would cost more than keeping pred.

    Pred is kept beside what autograd saves, which would refuse the first derivative too after a change in place; so it
    is let go here where autograd lets go of the rest. Not where hooks see what is saved: they would not see pred.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, pred: Tensor, results: tuple[Tensor, Tensor], weight: Tensor | None, rule: tuple
    ) -> Tensor:
        loss, slope = results
        ctx.state = pred, pred._version, rule
        ctx.save_for_backward(slope, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        slope, weight = ctx.saved_tensors
        pred, version, rule = ctx.state
        if not _torch.graph_is_kept():
            ctx.state = None
        if not torch.is_grad_enabled():
            return scaled_slope(slope, True, "auto", grad_output, pred.dtype), None, None, None
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
    return kept(tensors[2], slope * expand_leading(grad_output, slope)).to(dtype)


def scaled_slope(
    slope: Tensor, owned: bool, impl: str, grad_output: Tensor, dtype: torch.dtype, mask: Tensor | None = None
) -> Tensor:
    """The stored slope times grad_output, and 0 for what is masked out.

    In place where this is the last backward pass and nobody else can hold it (``owned``: no hook saw it when it was
    saved); untouched where grad_output is 1.
    """
    if _torch.intercepted() or _torch.legacy_batched(grad_output) or slope.dtype is not dtype:
        product = slope.to(grad_output.dtype) * expand_leading(grad_output, slope)
        if mask is None or _torch.intercepted() or _torch.legacy_batched(grad_output):
            return kept(mask, product).to(dtype)
        return product.masked_fill_(expand_leading(mask, product).logical_not(), 0.0).to(dtype)  # of slope's layout
    last = owned and not _torch.graph_is_kept()
    if last and _native.on_host(grad_output) and grad_output.dim() == 0 and grad_output.item() == 1.0:
        return slope
    out = slope if last else _memory.empty_like(slope)
    if mask is None and (library := _dispatch.plain_library(impl)) and library.scale_plain(out, slope, grad_output):
        increment_version(out)
        return out
    factor = grad_output.to(compute_dtype(slope))
    # the slope is 0 where masked out, and a finite factor leaves it so; on a device no one can look
    if mask is not None and _native.on_host(grad_output) and math.isfinite(grad_output.sum().item()):
        mask = None
    by_element = mask is not None and mask.dim() == slope.dim()
    if mask is not None and not by_element:
        wider = mask if mask.dim() > factor.dim() else factor
        factor = kept(mask, expand_leading(factor, wider).expand(wider.shape))
    combine_into(out, [slope], [TENSOR], [0], [factor], [0.0], impl)
    return out.masked_fill_(mask.logical_not(), 0.0) if mask is not None and by_element else out


class TracedLossFunction(Function):
    """The same for torch.compile, which differentiates once and takes its own care of memory."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, arguments: tuple) -> Tensor:  # type: ignore[override]
        loss, slope = torch.ops.fmkernels.regression_loss(pred, *arguments)
        ctx.dtype = pred.dtype
        ctx.save_for_backward(slope, arguments[schema.MASK])
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        slope, mask = ctx.saved_tensors
        return kept(mask, slope.to(grad_output.dtype) * expand_leading(grad_output, slope)).to(ctx.dtype), None
