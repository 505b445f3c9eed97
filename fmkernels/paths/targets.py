r"""Regression targets and the conversions between them.

Every target is linear, u = c_1 x_1 + c_0 x_0 (+ c_z z), so that a target is three coefficients, and a new one is a
function that fills them:

=========== ============================================ =======================================================
velocity    d alpha x_1 + d sigma x_0 (+ d gamma z)       dx/dt (Lipman et al. 2022, eq. 14)
x_1         x_1                                           data prediction; also called "data"
x_0         x_0                                           noise prediction; also called "noise"
score       -x_0 / sigma; on a bridge -z / gamma          gradient of log p(x_t | x_1), Gaussian source; none where
                                                          sigma (gamma) is the number 0
v           alpha x_0 - sigma x_1                         v-prediction (Salimans & Ho 2022, section 4)
edm         sigma/(s r) x_1 - alpha s / r x_0,            what EDM's F learns (Karras et al. 2022, eq. 8; F is in
            r = sqrt(alpha^2 s^2 + sigma^2)               eq. 7, c_skip and c_out in table 1), with noise level
                                                          sigma/alpha and data deviation s = sigma_data
=========== ============================================ =======================================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import check_choice, check_float_tensor, check_like, check_number, leading_shape, type_error, value_error
from ..ops._operands import Coefficient, compute_dtype
from ..ops.combine.op import combine
from .derivatives import as_tensor, filled
from .schedule import Schedule, at, divisor, promoted, tensor_at

Triple = tuple[Coefficient, Coefficient, Coefficient | None]


def _no_bridge(path: Schedule, t: Tensor, target: str) -> None:
    if at(path, "gamma", t) is not None:
        raise value_error("target", f"one that is defined on a bridge ({path!r}): velocity, x_1, x_0, score", target)


def _velocity(path: Schedule, t: Tensor) -> Triple:
    if path._exact:  # at() without its calls: this is on the way of every training step
        return path.d_alpha(t), path.d_sigma(t), path.d_gamma(t)
    return at(path, "d_alpha", t), at(path, "d_sigma", t), at(path, "d_gamma", t)


def _x_1(path: Schedule, t: Tensor) -> Triple:
    return 1.0, 0.0, None


def _x_0(path: Schedule, t: Tensor) -> Triple:
    return 0.0, 1.0, None


def _score(path: Schedule, t: Tensor) -> Triple:
    bridge = at(path, "gamma", t) is not None
    deviation = divisor(path, "gamma" if bridge else "sigma", t)
    if isinstance(deviation, float) and deviation == 0.0:
        raise value_error("target", f"one that exists without noise ({path!r}): velocity, x_1, x_0", "score")
    factor = -1.0 / deviation
    return (0.0, 0.0, factor) if bridge else (0.0, factor, None)


def _v(path: Schedule, t: Tensor) -> Triple:
    _no_bridge(path, t, "v")
    return -tensor_at(path, "sigma", t), at(path, "alpha", t), None


def _edm(path: Schedule, t: Tensor, sigma_data: float = 0.5) -> Triple:
    _no_bridge(path, t, "edm")
    if not torch.compiler.is_compiling():  # there a number may be symbolic: it has no value to check
        check_number("sigma_data", sigma_data, above=0.0)
        sigma_data = float(sigma_data)
    alpha, sigma = tensor_at(path, "alpha", t), tensor_at(path, "sigma", t)
    root = torch.sqrt((alpha * sigma_data).square() + sigma.square())
    return sigma / (sigma_data * root), -sigma_data * alpha / root, None


TARGETS: dict[str, Callable[..., Triple]] = {
    "velocity": _velocity,
    "x_1": _x_1,
    "x_0": _x_0,
    "score": _score,
    "v": _v,
    "edm": _edm,
    "data": _x_1,
    "noise": _x_0,
}


def coefficients(path: Schedule, t: Tensor, target: str, **parameters: float) -> Triple:
    """(c_1, c_0, c_z) of a target at times t: numbers, tensors of t's shape, or None for no z."""
    if type(target) is not str or target not in TARGETS:
        check_choice("target", target, TARGETS)
    if parameters:
        _check_parameters(parameters, target)
    return TARGETS[target](path, t, **parameters)


def _check_parameters(parameters: dict[str, float], *targets: str) -> None:
    for name in parameters:
        if name != "sigma_data":
            raise TypeError(f"{name}: expected no parameter but sigma_data, got one of this name")
    if "edm" not in targets:
        raise value_error("sigma_data", "none but for the target 'edm'", targets[0] if len(targets) == 1 else targets)


_EPSILON = 4 * torch.finfo(torch.float64).eps  # what a difference of two roundings of one number may be
_LEAST = 1e-30  # that is divided by, so that quotients are finite in float32
Row = tuple[Tensor, Tensor]  # coefficients of (x_1, x_0), float64


def combination(point: Row, prediction: Row, target: Row) -> tuple[Tensor, Tensor]:
    """(A, B) with target = A point + B prediction, all of them rows of coefficients of the same x_1 and x_0."""
    (alpha, sigma), (c_1, c_0), (d_1, d_0) = point, prediction, target
    # [x_t; p] = [[alpha, sigma], [c_1, c_0]] [x_1; x_0], solved for d_1 x_1 + d_0 x_0 by elimination. The prediction's
    # row is scaled to 1 first, so that a row which vanishes at an end (the velocity of t^n) keeps its direction up to
    # it, and its larger entry is the pivot, so that what the prediction gives alone (the score from x_0) divides by
    # nothing that vanishes.
    scale = torch.maximum(c_1.abs(), c_0.abs())
    swap = c_1.abs() > c_0.abs()  # the pivot is x_1's entry
    pivot = torch.where(swap, c_1, c_0)
    silent = pivot == 0  # the prediction says nothing
    other = torch.where(swap, c_0, c_1) / torch.where(silent, 1.0, pivot)
    r_pivot, r_other = torch.where(swap, alpha, sigma), torch.where(swap, sigma, alpha)
    d_pivot, d_other = torch.where(swap, d_1, d_0), torch.where(swap, d_0, d_1)
    # Where x_t and the prediction say the same, as far as float64 can tell of x_t's row, the other sample is
    # undetermined, and counts as 0: that is the limit of the mean of x_0 next to the data, where a quotient would be
    # one of roundings. A small difference that is one divides like any other.
    left = r_other - r_pivot * other
    same = left.abs() <= _EPSILON * torch.maximum(alpha.abs(), sigma.abs())
    left = torch.where(left < 0, -1.0, 1.0) * left.abs().clamp(min=_LEAST)
    a = torch.where(same, 0.0, (d_other - d_pivot * other) / left)
    b = (d_pivot - r_pivot * a) * torch.sign(pivot) / scale.clamp(min=_LEAST)
    # x_t alone gives what is along its own row exactly, and nothing across it
    alone = (d_1 * alpha + d_0 * sigma) / (alpha.square() + sigma.square())
    return torch.where(silent, alone, a), torch.where(silent, 0.0, b)


def conversion_coefficients(
    path: Schedule, t: Tensor, source: str, target: str, **parameters: float
) -> tuple[Tensor, Tensor]:
    """(A, B) with target = A x_t + B source, in float64 on the way.

    Raises:
        ValueError: the path has a gamma term, of whose noise the source says nothing.
    """
    if at(path, "gamma", t) is not None:
        raise value_error("path", "one without a gamma term, of which a prediction says nothing that converts it", path)
    if parameters:
        _check_parameters(parameters, source, target)
    dtype, t = t.dtype, t.double()
    parts = []
    for name in (source, target):
        extra = parameters if name == "edm" else {}
        c_1, c_0, _ = coefficients(path, t, name, **extra)
        parts += [as_tensor(c, t) for c in (c_1, c_0)]  # type: ignore[arg-type]
    alpha, sigma = tensor_at(path, "alpha", t), tensor_at(path, "sigma", t)
    a, b = combination((alpha, sigma), (parts[0], parts[1]), (parts[2], parts[3]))
    return a.to(dtype), b.to(dtype)


def convert(
    path: Schedule,
    prediction: Tensor,
    x_t: Tensor,
    t: Tensor | float,
    source: str,
    target: str,
    **parameters: float,
) -> Tensor:
    r"""A prediction of one target at (x_t, t) as a prediction of another.

    Two linear relations, x_t = alpha x_1 + sigma x_0 and prediction = c_1 x_1 + c_0 x_0, give x_1 and x_0 and thereby
    any other target: target = A x_t + B prediction, one pass over memory. Finite at both ends of the path. Where x_t
    and the prediction do not determine the other sample (x_1 from x_0 at t = 0, where x_t = x_0; x_0 from x_1 at t =
    1), it counts as 0, its mean; where they barely do (x_1 from the velocity 6 t^5 (x_1 - x_0) of t^6 at t = 0.01), the
    quotient is the formula's, and multiplies the prediction's error by what the formula says.

    Args:
        path: an affine path, without a gamma term.
        prediction: of x_t's shape; floating.
        x_t: shape (B, ...), floating, of prediction's dtype or not.
        t: a number, or a tensor whose shape is a leading part of x_t's, e.g. (B,).
        source, target: names of targets.
        parameters: ``sigma_data`` of "edm".

    Returns:
        A tensor of prediction's shape and dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device, an unknown target, or a bridge.
    """
    if not isinstance(path, Schedule):
        raise type_error("path", "a path of fm.paths", path)
    check_float_tensor("x_t", x_t)
    check_like("prediction", prediction, "x_t", x_t, dtype=False)
    for name, value in (("source", source), ("target", target)):
        check_choice(name, value, TARGETS)
    if parameters:
        _check_parameters(parameters, source, target)
    if isinstance(t, Tensor):
        check_float_tensor("t", t)
        leading_shape("t", t, "x_t", x_t)
        times = promoted("t", t)
        if compute_dtype(x_t, prediction) is torch.float64:
            times = times.double()
    else:
        if not torch.compiler.is_compiling():  # there a number may be symbolic: it has no value to check
            check_number("t", t, low=0.0, high=1.0)
        times = filled(t, (), compute_dtype(x_t, prediction), x_t.device)
    if at(path, "gamma", times) is not None:
        raise value_error("path", "a path without a gamma term", path)
    if TARGETS[source] is TARGETS[target]:
        return prediction.clone()
    a, b = conversion_coefficients(path, times, source, target, **parameters)
    half = prediction.dtype is torch.float16
    if prediction.dtype == x_t.dtype and not half:
        return combine([prediction, x_t], [b, a])
    wide = torch.promote_types(torch.float32 if half else prediction.dtype, x_t.dtype)
    result = combine([prediction.to(wide), x_t.to(wide)], [b, a])
    if half:  # held quotients exceed float16's range
        limit = torch.finfo(torch.float16).max
        result = result.clamp(-limit, limit)
    return result.to(prediction.dtype)
