"""The log-density of a step of an SDE, of a given next state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._arguments import all_kwargs, check_names
from .._checks import (
    as_state,
    check_bool,
    check_callable,
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
from ..solvers.methods.step_density import REDUCTIONS, log_density, no_noise, reciprocal
from ..solvers.programs.draws import Transform, check_transform, transformed
from ..solvers.programs.ownership import reading


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
    noise_transform: Transform | None = None,
    return_count: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    r"""The log-density log N(x_next; mean(x, t), std^2) of a sampling step, differentiable in the model and in x.

    What :class:`SDE` with ``log_prob`` reports for the step, computed again for given states: the ratio of policies in
    DDPO (Black et al. 2023) and Flow-GRPO (Liu et al. 2025, eq. 5). From differences in float32 (float64 for float64
    x), exact for the states that are given. Those of a solve in half precision were rounded after their noise was
    drawn, and the density that the solve reported is that of the noise: the two differ by about the sum of
    :math:`z\, \epsilon / \mathrm{std}`, epsilon being the rounding. A ratio needs both of its terms from here, or a
    solve in float32.

    Args:
        model: ``model(x, t, **model_kwargs)``, t of shape (B,) or of t's own; a guided model returns what guidance
            makes of its outputs.
        x, x_next: states before and after the step, shape (B, ...).
        t, t_next: the step's times: numbers, or floating tensors of one leading shape of x's, e.g. (B,), so that a
            batch may mix steps. They reach the model as float32 (float64 for float64 x).
        sde: with method "euler" or "exponential".
        path: the probability path.
        prediction: what the model returns, a target of :mod:`fmkernels.paths.targets`.
        reduction: "sum" over a sample's elements; "mean", that divided by how many of them got noise; "none".
        last: whether it is the last step, to which ``sde.last_step`` applies; None: where t_next is the path's end, 1.
        noise_transform: of the solve, see :mod:`fmkernels.solvers.methods.noise_transforms`: the density is that on the
            subspace, in which x and x_next are taken to be.
        return_count: also return the degrees of freedom of each sample's noise, (B,): elements that got noise.
        model_kwargs: keyword arguments of the model; those that have none of our names may stand by themselves.

    Returns:
        (B,), or x's shape for "none", float32 (float64 for float64 x); with ``return_count`` a pair. 0 for a step,
        sample or token without noise (std 0, as where t = t_next).

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape, or method "heun".
    """
    check_callable("model", "a callable model(x, t, **model_kwargs)", model)
    check_float_tensor("x", x)
    check_like("x_next", x_next, "x", x)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("prediction", prediction, TARGETS)
    check_transform(noise_transform)
    check_bool("return_count", return_count)
    if not isinstance(sde, SDE):
        raise type_error("sde", "an SDE", sde)
    if not isinstance(path, Path):
        raise type_error("path", "a path of fm.paths", path)
    if last is not None and not isinstance(last, bool):
        raise type_error("last", "True, False or None", last)
    if sde.method == "heun":
        raise value_error("sde", "method 'euler' or 'exponential': the others' steps are not Gaussian", sde)
    if x.dim() == 0:
        raise value_error("x", "at least one dimension, of samples", x)
    check_names(kwargs, (sde_step_log_prob,), (model,))
    given = all_kwargs(kwargs, model_kwargs)
    dtype = compute_dtype(x)
    start, end = (_times(name, value, x) for name, value in (("t", t), ("t_next", t_next)))
    if last and sde.last_step != "none":
        result = no_noise(x, reduction)
        return tuple(result) if return_count else result.log_prob
    if last is False:
        sde = replace(sde, last_step="none")
    times = start.to(dtype)
    times = (times.expand(x.shape[0]) if times.dim() == 0 else times).clone()  # the network may write to them
    output = as_state("model", reading("model", model, given)(x, times), x)
    if start.dim() and end.dim() and start.shape != end.shape:
        raise value_error("t_next", f"a number, or the shape of t, {tuple(start.shape)}", t_next)
    start, end = torch.broadcast_tensors(start.double(), end.double())
    a, b, std = sde.transition(path, start, end)
    if TARGETS[prediction] is not TARGETS["velocity"]:
        a_v, b_v = conversion_coefficients(path, start, prediction, "velocity")
        a, b = a + b * a_v, b * b_v
    inverse = reciprocal(std)
    coefficients = [c.to(dtype) for c in (inverse, -inverse * a, -inverse * b)]
    z = transformed(noise_transform, combine([v.to(dtype) for v in (x_next, x, output)], coefficients))
    result = log_density(z, std, noise_transform, reduction, "reduction")
    return tuple(result) if return_count else result.log_prob


def _times(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        check_number(name, value, low=0.0, high=1.0)
        return torch.full((), float(value), dtype=torch.float64, device=x.device)
    check_float_tensor(name, value)
    leading_shape(name, value, "x", x)
    return value
