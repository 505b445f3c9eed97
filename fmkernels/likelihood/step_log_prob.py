"""The log-density of a step of an SDE, of a given next state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._checks import (
    as_state,
    check_choice,
    check_float_tensor,
    check_like,
    check_number,
    leading_shape,
    type_error,
    value_error,
)
from ..ops._operands import compute_dtype
from ..ops.combine.op import combine
from ..paths import TARGETS, Path
from ..paths.targets import conversion_coefficients
from ..solvers.methods.sde import SDE
from ..solvers.methods.step_density import _log_density, _no_noise, _normaliser, _reciprocal


def sde_step_log_prob(
    model: Callable[..., Tensor],
    x: Tensor,
    x_next: Tensor,
    t: Tensor | float,
    t_next: Tensor | float,
    *,
    sde: SDE,
    path: Path,
    prediction: str = "velocity",
    reduction: str = "sum",
    last: bool | None = None,
    **model_kwargs: Any,
) -> Tensor:
    r"""The log-density log N(x_next; mean(x, t), std^2) of a sampling step, differentiable in the model and in x.

    What :class:`SDE` with ``log_prob=True`` reports for the step, computed again for given states: the ratio of
    policies in DDPO (Black et al. 2023) and Flow-GRPO (Liu et al. 2025, eq. 5).

    Args:
        model: ``model(x, t, **model_kwargs)``, t of shape (B,) or of t's own; a guided model returns what guidance
            makes of its outputs.
        x, x_next: states before and after the step, shape (B, ...).
        t, t_next: the step's times: numbers, or tensors of one leading shape of x's, e.g. (B,), so that a batch may
            mix steps. Numbers reach the model as float32 (float64 for float64 x).
        sde: with method "euler" or "exponential".
        path: the probability path.
        prediction: what the model returns, a target of :mod:`fmkernels.paths.targets`.
        reduction: "sum" over a sample's elements, or "mean".
        last: whether it is the last step, to which ``sde.last_step`` applies; None: where t_next is the path's end, 1.
        model_kwargs: for the model.

    Returns:
        (B,), float32 (float64 for float64 x). 0 for a step, sample or token without noise (std 0, as where
        t = t_next).

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape, or method "heun".
    """
    check_float_tensor("x", x)
    check_like("x_next", x_next, "x", x)
    check_choice("reduction", reduction, ("sum", "mean"))
    check_choice("prediction", prediction, TARGETS)
    if not isinstance(sde, SDE):
        raise type_error("sde", "an SDE", sde)
    if sde.method == "heun":
        raise value_error("sde", "method 'euler' or 'exponential': the others' steps are not Gaussian", sde)
    if x.dim() == 0:
        raise value_error("x", "at least one dimension, of samples", x)
    if last and sde.last_step != "none":
        return _no_noise(x)[0]
    if last is False:
        sde = replace(sde, last_step="none")
    dtype = compute_dtype(x)
    start, end = (_times(name, value, x) for name, value in (("t", t), ("t_next", t_next)))
    times = start if isinstance(t, Tensor) else start.to(dtype)
    output = as_state("model", model(x, times.expand(x.shape[0]) if times.dim() == 0 else times, **model_kwargs), x)
    start, end = torch.broadcast_tensors(start.double(), end.double())
    a, b, std = sde.transition(path, start, end)
    if TARGETS[prediction] is not TARGETS["velocity"]:
        a_v, b_v = conversion_coefficients(path, start, prediction, "velocity")
        a, b = a + b * a_v, b * b_v
    inverse = _reciprocal(std)
    z = combine([x_next, x, output], [c.to(dtype) for c in (inverse, -inverse * a, -inverse * b)])
    log_prob = _log_density(z, _normaliser(std).to(dtype))
    return log_prob / math.prod(x.shape[1:]) if reduction == "mean" else log_prob


def _times(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        check_number(name, value)
        return torch.full((), float(value), dtype=torch.float64, device=x.device)
    check_float_tensor(name, value)
    leading_shape(name, value, "x", x)
    return value
