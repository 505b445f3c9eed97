"""Guidance that is a weighted sum of network outputs: its weights become coefficients of the solver's updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .._arguments import Named, names_of
from .._checks import check_callable, tensor_of, type_error, value_error
from ..paths.schedule import tensor_at
from ..solvers.programs.builder import Builder
from ..solvers.programs.expressions import Expr, Number, as_number
from .base import (
    CONDITIONAL,
    GIVEN,
    NETWORK,
    UNCONDITIONAL,
    Guidance,
    Interval,
    Scale,
    batching_of,
    check_batched,
    check_kwargs,
    checked_interval,
    checked_scale,
    is_number,
    labels_of,
    mixture,
    said_of,
    scale_at,
)
from .calls import Batched, Batching, Branches, Model, overridden


@final
@dataclass(frozen=True, eq=False)
class AutoGuidance(Guidance):
    r"""Guidance by a weaker version of the model (Karras et al. 2024, "Guiding a diffusion model with a bad version of
    itself", eq. 5): :math:`v = v_{weak} + w (v - v_{weak})`.

    Args:
        weak_model: called like the model; smaller, less trained or otherwise worse, and with the same prediction.
        scale: w; at the number 1 the weak model is not called. See :class:`fmkernels.guidance.CFG`.
        weak_kwargs: keyword arguments of the weak model's calls in place of the model's.
        interval: times (low, high) beyond which the scale is 1.
    """

    weak_model: Model = field(metadata=NETWORK)
    scale: Scale
    weak_kwargs: Mapping[str, Any] | None = field(default=None, kw_only=True, metadata=NETWORK)
    interval: Interval = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_callable("weak_model", "a callable model(x, t, **model_kwargs)", self.weak_model)
        check_kwargs("weak_kwargs", self.weak_kwargs)
        object.__setattr__(self, "scale", checked_scale("scale", self.scale))
        object.__setattr__(self, "interval", checked_interval(self.interval))

    def branches(self, model: Model, model_kwargs: Mapping[str, Any]) -> Branches:
        weak = self.weak_model, overridden(model_kwargs, self.weak_kwargs, argument="weak_kwargs")
        return {CONDITIONAL: (model, model_kwargs), "weak": weak}

    def velocity(self, builder: Builder, x: Expr, t: Number) -> Expr:
        w = scale_at(builder, self.scale, t, self.interval)
        return mixture(builder, x, t, {CONDITIONAL: w, "weak": 1.0 - w}, batched=False)


@final
@dataclass(frozen=True, eq=False)
class MultiCondition(Guidance):
    r"""Several conditions with a weight each (Liu et al. 2022, "Compositional visual generation with composable
    diffusion models", eq. 11 and 13): :math:`v = u + \sum_i w_i (c_i - u)`.

    A negative weight leads away from its condition. One condition of weight w is CFG of scale w; a branch whose weight
    is the number 0, the unconditional one too where the weights add up to 1, is not evaluated.

    Args:
        conditions: pairs of the keyword arguments that the condition's call has in place of the caller's, and the
            weight: a number, a tensor with one for each sample, or a function of t.
        negative: the same for the unconditional call; None: the caller's own keyword arguments are unconditional.
        batched: one network call for all branches, see :class:`fmkernels.guidance.CFG`.
        shared: names of keyword arguments that have no entry for each sample, whatever their shape.
    """

    conditions: Sequence[tuple[Mapping[str, Any], Scale]] = field(metadata=GIVEN)
    negative: Mapping[str, Any] | None = field(default=None, kw_only=True, metadata=NETWORK)
    batched: Batched = field(default="auto", kw_only=True)
    shared: Sequence[str] = field(default=(), kw_only=True)
    # the conditions' parts: what the programs read, and what the network calls do
    weights: tuple[Scale, ...] = field(init=False, repr=False)
    overrides: tuple[dict[str, Any], ...] = field(init=False, repr=False, metadata=NETWORK)

    def __post_init__(self) -> None:
        check_batched(self.batched)
        names_of("shared", self.shared)
        check_kwargs("negative", self.negative)
        if not isinstance(self.conditions, (list, tuple)):
            raise type_error("conditions", "a list of pairs (keyword arguments, weight)", self.conditions)
        if not self.conditions:
            raise value_error("conditions", "at least one pair (keyword arguments, weight)", self.conditions)
        pairs = []
        for i, pair in enumerate(self.conditions):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], Mapping):
                raise type_error(f"conditions[{i}]", "a pair (keyword arguments, weight)", pair)
            check_kwargs(f"conditions[{i}]", pair[0])
            pairs.append((dict(pair[0]), checked_scale(f"conditions[{i}]", pair[1])))
        object.__setattr__(self, "conditions", tuple(pairs))
        object.__setattr__(self, "weights", tuple(weight for _, weight in pairs))
        object.__setattr__(self, "overrides", tuple(kwargs for kwargs, _ in pairs))

    @property
    def said(self) -> Named:
        names = [name for other in (self.negative, *self.overrides) for name in labels_of(other)]
        return said_of(self.batched, self.shared, names)

    @property
    def batching(self) -> Batching:
        return batching_of(self.batched)

    def branches(self, model: Model, model_kwargs: Mapping[str, Any]) -> Branches:
        calls = {
            str(i): (model, overridden(model_kwargs, kwargs, self.shared, argument=f"conditions[{i}]"))
            for i, kwargs in enumerate(self.overrides)
        }
        unconditional = overridden(model_kwargs, self.negative, self.shared)
        return {**calls, UNCONDITIONAL: (model, unconditional), CONDITIONAL: (model, unconditional)}

    def velocity(self, builder: Builder, x: Expr, t: Number) -> Expr:
        weights = {str(i): scale_at(builder, weight, t) for i, weight in enumerate(self.weights)}
        weights[UNCONDITIONAL] = 1.0 - sum(weights.values())
        return mixture(builder, x, t, weights, self.batching)


@final
@dataclass(frozen=True, eq=False)
class ClassifierGuidance(Guidance):
    r"""Guidance by the gradient of a classifier (Dhariwal & Nichol 2021, eq. 10 and algorithm 2).

    The score becomes :math:`s + w \nabla_x \log p(y | x_t)`, so that the velocity gains :math:`w \frac{dv}{ds} \nabla_x
    \log p(y | x_t)`, where :math:`dv / ds = (\dot\alpha / \alpha\, \sigma - \dot\sigma) \sigma` on an affine path. At
    pure noise (alpha = 0), which knows nothing of y, the gradient is 0 and dv/ds infinite: there the term is left out.

    Args:
        gradient: ``gradient(x, t, **gradient_kwargs)``, the gradient of log p(y | x_t) in x, of x's shape and dtype.
        scale: w; where it is the number 0 the gradient is not evaluated. See :class:`fmkernels.guidance.CFG`.
        gradient_kwargs: keyword arguments of ``gradient``; the model's go to the model alone.
        interval: times (low, high) beyond which the scale is 0.
    """

    gradient: Callable[..., Tensor] = field(metadata=NETWORK)
    scale: Scale
    gradient_kwargs: Mapping[str, Any] | None = field(default=None, kw_only=True, metadata=NETWORK)
    interval: Interval = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_callable("gradient", "a callable gradient(x, t, **gradient_kwargs)", self.gradient)
        check_kwargs("gradient_kwargs", self.gradient_kwargs)
        object.__setattr__(self, "scale", checked_scale("scale", self.scale))
        object.__setattr__(self, "interval", checked_interval(self.interval))

    def branches(self, model: Model, model_kwargs: Mapping[str, Any]) -> Branches:
        return {CONDITIONAL: (model, model_kwargs), "gradient": (self.gradient, self.gradient_kwargs or {})}

    def velocity(self, builder: Builder, x: Expr, t: Number) -> Expr:
        v = builder.evaluate(x, t, CONDITIONAL)
        weight = scale_at(builder, self.scale, t, self.interval, outside=0.0) * self._slope(builder, t)
        if is_number(weight, 0.0):
            return v
        # the gradient is no prediction of the network: it comes as it is
        (gradient,) = builder.evaluate_all(x, t, "gradient", 1, "velocity")
        return v + gradient * weight

    def _slope(self, builder: Builder, t: Number) -> Number:
        """dv/ds, 0 at pure noise."""
        slope = builder.conversion(t, "score", "velocity")[1]
        times = t if isinstance(t, Tensor) else tensor_of(t, torch.float64)
        alpha = tensor_at(builder.path, "alpha", times)
        if isinstance(slope, Tensor):
            return torch.where(alpha == 0.0, torch.zeros_like(slope), slope)
        return np.where(as_number(alpha, "path") == 0.0, 0.0, slope)[()]


def scale_of_weight(weight: Scale) -> Scale:
    """The scale w of u + w (c - u) for the weight of (1 + weight) c - weight u: 1 + weight."""
    checked_scale("weight", weight)
    return shifted(weight, 1.0)


def weight_of_scale(scale: Scale) -> Scale:
    """The weight of (1 + weight) c - weight u for the scale w of u + w (c - u): w - 1."""
    checked_scale("scale", scale)
    return shifted(scale, -1.0)


def shifted(scale: Scale, shift: float) -> Scale:
    """A scale plus a number."""
    if callable(scale) and not isinstance(scale, (Tensor, np.ndarray)):
        function = scale
        return lambda t: function(t) + shift
    return scale + shift
