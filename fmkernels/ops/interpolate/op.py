"""x_t = alpha x_1 + sigma x_0 (+ gamma z): a probability path, with noise drawn in the kernel where it is not given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _dispatch
from ..._checks import check_bool, check_float_tensor, check_int, type_error, value_error
from ...random import Noise
from .. import _sharded
from .._operands import Coefficient, Operand, compute_dtype, pack_coefficients, pack_operands
from ..combine.op import combine_packed

X_0_STREAM = 0
Z_STREAM = 1


class Interpolation(NamedTuple):
    """What :func:`interpolate` returns; ``x_0`` and ``z`` are what was used: tensors, or noise that was not stored."""

    x_t: Tensor
    x_0: Operand
    z: Operand | None


def _check_drawing(generator: Any, row_offset: Any) -> None:
    """What is for drawn noise, where all is given: a generator may stand beside, an offset has no meaning."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise type_error("generator", "a torch.Generator", generator)
    if type(row_offset) is not int or row_offset != 0:
        check_int("row_offset", row_offset, low=0)
        raise value_error("row_offset", "0 where no noise is drawn (fm.Noise has its own)", row_offset)


def interpolate(
    x_1: Tensor,
    x_0: Operand | None = None,
    *,
    alpha: Coefficient,
    sigma: Coefficient,
    gamma: Coefficient | None = None,
    z: Operand | None = None,
    generator: torch.Generator | None = None,
    row_offset: int = 0,
    store_noise: bool = False,
    impl: str = "auto",
) -> Interpolation:
    r"""The point :math:`x_t = \alpha x_1 + \sigma x_0 (+ \gamma z)` of a probability path.

    Lipman et al. 2022, eq. 10 (affine Gaussian paths); Albergo et al. 2023, eq. 1.1 (the bridge term gamma z).

    Args:
        x_1: data, any shape (B, ...), floating.
        x_0: source samples like ``x_1``; or :class:`fmkernels.Noise`; None draws standard normal noise in the kernel.
        alpha: coefficient of x_1: a number, or a tensor whose shape is a leading part of x_1's, e.g. (B,) or (B, T).
        sigma: coefficient of x_0, likewise.
        gamma: coefficient of z, likewise; None for no such term.
        z: the noise of the gamma term, like ``x_0``; None draws it.
        generator: torch.Generator from which the seed of drawn noise comes.
        row_offset: index of the first sample within the whole batch, for drawn noise: shards of a batch draw what the
            whole batch would under the same seed.
        store_noise: write drawn noise out, so that it is returned as tensors.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        Interpolation(x_t, x_0, z): x_t has x_1's shape and dtype; x_0 and z are the given ones, or the drawn noise, as
        tensors with ``store_noise``, else as :class:`fmkernels.Noise` that any later kernel draws again.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    if not isinstance(x_1, Tensor):
        check_float_tensor("x_1", x_1)
    if z is not None and gamma is None:
        raise value_error("z", "None without gamma, its coefficient", z)
    if x_0 is None or (gamma is not None and z is None):
        seed = _sharded.common_seed(x_1, generator)
        x_0 = Noise._of(seed, X_0_STREAM, row_offset) if x_0 is None else x_0
        z = Noise._of(seed, Z_STREAM, row_offset) if gamma is not None and z is None else z
    else:  # nothing is drawn
        _check_drawing(generator, row_offset)
    if _sharded.is_sharded(x_1, x_0, z):
        check_bool("store_noise", store_noise)
        given = (alpha, sigma, gamma)
        return Interpolation(*_sharded.interpolate(interpolate, x_1, x_0, z, given, store_noise, impl))
    operands: list[Operand] = [x_1, x_0]
    coefficients = [alpha, sigma]
    if gamma is not None and z is not None:
        operands.append(z)
        coefficients.append(gamma)
    results = None
    if (library := _dispatch.plain_library(impl)) is not None:
        results = library.combine_plain(operands, coefficients, store_noise)
    if results is None:
        check_float_tensor("x_1", x_1)
        check_bool("store_noise", store_noise)
        packed = pack_operands(("x_1", "x_0", "z"), operands, "x_1", x_1)
        coefs, values = pack_coefficients(
            "coefficients", coefficients, len(operands), x_1, compute_dtype(x_1), ("alpha", "sigma", "gamma")
        )
        results = combine_packed(packed, coefs, values, [], [], 0.0, 0.0, False, store_noise, impl)
    if store_noise:  # what was drawn follows x_t, in the operands' order
        drawn = [i for i in (1, 2) if i < len(operands) and not isinstance(operands[i], Tensor)]
        for position, i in enumerate(drawn, start=1):
            operands[i] = results[position]
    return Interpolation(results[0], operands[1], operands[2] if gamma is not None else z)
