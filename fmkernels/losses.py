"""The conditional flow-matching loss."""

from __future__ import annotations

from torch import Tensor

from . import weightings
from ._checks import check_like, type_error
from .ops._operands import Operand
from .ops.regression_loss.op import regression_loss
from .paths.batch import Batch, as_times, target_terms
from .paths.schedule import Schedule


def cfm_loss(
    pred: Tensor,
    batch: Batch | None = None,
    *,
    target: str = "velocity",
    weight: weightings.Weight = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    kind: str = "squared",
    delta: float = 1.0,
    sigma_data: float | None = None,
    x_0: Operand | None = None,
    x_1: Tensor | None = None,
    z: Operand | None = None,
    t: Tensor | float | None = None,
    path: Schedule | None = None,
    checks: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""The conditional flow-matching loss and, in the same pass over memory, its gradient.

    .. math:: L = \frac{1}{N} \sum m\, w(t)\, \rho\big(\mathrm{pred} - u(x_0, x_1, t)\big)

    with the target u = c_1 x_1 + c_0 x_0 (+ c_z z): the velocity d alpha/dt x_1 + d sigma/dt x_0 of the path (Lipman
    et al. 2022, eq. 9 and 14; Tong et al. 2023, eq. 9), or one of the targets of :mod:`fmkernels.paths.targets`. The
    target is never materialised.

    Either a batch, from ``path.sample``, or ``x_1``, ``t``, ``path`` and, where the target needs it, ``x_0`` (and
    ``z``).

    Args:
        pred: the model's output, of the data's shape (B, ...); its dtype may differ (autocast).
        batch: what ``path.sample`` returned.
        target: "velocity", "x_1", "x_0", "score", "edm" or "v".
        weight: None, a name of :mod:`fmkernels.weightings`, a callable of t, or a tensor of t's shape or of another
            leading part of the data's shape.
        mask: boolean, its shape a leading part of the data's: (B,), (B, T) or all of it; True is kept. What is masked
            out adds 0 to the loss and to the gradient, even where it is NaN.
        reduction: "mean" divides by the number of unmasked elements, "sum" does not, "none" returns the mean over
            each sample's unmasked elements, shape (B,). A fully masked sample gives 0.
        kind: the penalty rho: "squared", "huber", "pseudo_huber" or "l1", see :func:`fmkernels.regression_loss`.
        delta: > 0, the bend of "huber" and "pseudo_huber".
        sigma_data: > 0, the data's standard deviation in the target "edm"; 0.5 if None.
        x_0, x_1, z: tensors of pred's shape and of one dtype; ``x_0`` and ``z`` may be :class:`fmkernels.Noise`.
        t: times, a number or a tensor whose shape is a leading part of the data's.
        path: the probability path.
        checks: also check that t is finite and in [0, 1] (waits for the device).
        impl: "auto", "reference", "native" or "triton".

    Returns:
        The loss in float32 (float64 for float64 data), 0-dim or (B,).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, missing, or given twice.
    """
    if batch is not None:
        if not isinstance(batch, Batch):
            raise type_error("batch", "what path.sample returned", batch)
        for name, value in (("x_0", x_0), ("x_1", x_1), ("z", z), ("t", t), ("path", path)):
            if value is not None:
                raise type_error(name, "None beside a batch", value)
        x_1, x_0, z, path, times = batch.x_1, batch.source, batch.bridge, batch.path, batch.t
        if checks:
            as_times(times, "x_1", x_1, checks)
    else:
        if not isinstance(path, Schedule):
            raise type_error("path", "a path of fm.paths, or a batch", path)
        if x_1 is None:
            raise type_error("x_1", "a tensor, or a batch", x_1)
        check_like("x_1", x_1, "pred", pred, dtype=False)
        if t is None:
            raise type_error("t", "a tensor or a number, or a batch", t)
        times = as_times(t, "x_1", x_1, checks)
    parameters = {} if sigma_data is None else {"sigma_data": sigma_data}
    names, operands, coefficients = target_terms(path, times, target, x_1, x_0, z, **parameters)
    return regression_loss(
        pred,
        operands,
        coefficients,
        weight=None if weight is None else weightings.resolve(weight, path, times),
        mask=mask,
        reduction=reduction,
        kind=kind,
        delta=delta,
        noise_dtype=x_1.dtype,
        impl=impl,
        _names=names,
    )
