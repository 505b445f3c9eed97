"""The conditional flow-matching loss, and what it is at different times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from . import weightings
from ._checks import (
    check_bool,
    check_device,
    check_float_tensor,
    check_int,
    check_like,
    check_tensor,
    type_error,
    value_error,
)
from ._torch import compiling
from .ops._operands import Operand
from .ops.regression_loss.op import regression_loss
from .paths.batch import Batch, as_times, check_times, target_terms
from .paths.schedule import Schedule, at


def cfm_loss(
    pred: Tensor,
    batch: Batch | None = None,
    *,
    target: str = "velocity",
    weight: weightings.Weight = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    count: Tensor | float | None = None,
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
        reduction: "mean" divides by the number of unmasked elements, "weighted_mean" by their weights' sum, "sum" does
            not divide, "none" returns the mean over each sample's unmasked elements, shape (B,). A fully masked sample
            gives 0.
        count: what "mean" divides by instead, see :func:`fmkernels.regression_loss`.
        kind: the penalty rho: "squared", "huber", "pseudo_huber" or "l1", see :func:`fmkernels.regression_loss`.
        delta: > 0, the bend of "huber" and "pseudo_huber".
        sigma_data: > 0, the data's standard deviation in the target "edm"; 0.5 if None.
        x_0, x_1, z: tensors of pred's shape and of one dtype; ``x_0`` and ``z`` may be :class:`fmkernels.Noise`.
        t: times, a number or a tensor whose shape is a leading part of the data's.
        path: the probability path.
        checks: also check that t is finite and in [0, 1] (waits for the device).
        impl: "auto", "reference", "native" or "triton".

    Returns:
        The loss in float32 (float64 where pred or the data is float64), 0-dim or (B,).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, missing, or given twice.
    """
    if type(checks) is not bool:
        check_bool("checks", checks)
    if batch is not None:
        if not isinstance(batch, Batch):
            raise type_error("batch", "what path.sample returned", batch)
        for name, value in (("x_0", x_0), ("x_1", x_1), ("z", z), ("t", t), ("path", path)):
            if value is not None:
                raise type_error(name, "None beside a batch", value)
        batch.check_unwritten()
        x_1, x_0, z, path, times = batch.x_1, batch.source, batch.bridge, batch.path, batch.t
        table = batch._table
        if checks:
            check_times("t", times)
    else:
        table = None
        if not isinstance(path, Schedule):
            raise type_error("path", "a path of fm.paths, or a batch", path)
        if x_1 is None:
            raise type_error("x_1", "a tensor, or a batch", x_1)
        check_float_tensor("x_1", x_1)
        check_like("pred", pred, "x_1", x_1, dtype=False)
        if t is None:
            raise type_error("t", "a tensor or a number, or a batch", t)
        times = as_times(t, "x_1", x_1, checks)
        if z is not None and at(path, "gamma", times) is None:
            raise value_error("z", f"None, as {path!r} has no gamma term", z)
    parameters = {} if sigma_data is None else {"sigma_data": sigma_data}
    names, operands, coefficients = target_terms(path, times, target, x_1, x_0, z, table, impl, **parameters)
    try:
        return regression_loss(
            pred,
            operands,
            coefficients,
            weight=None if weight is None else weightings.resolve(weight, path, times),
            mask=mask,
            reduction=reduction,
            count=count,
            kind=kind,
            delta=delta,
            noise_dtype=x_1.dtype,
            impl=impl,
            _names=names,
        )
    except (TypeError, ValueError):
        check_like("pred", pred, "x_1", x_1, dtype=False)  # the data is what pred must be like
        raise


_COMPARISONS = 1 << 22  # of times with bins at once


@final
class LossBins:
    """The mean loss in equal bins of time, accumulated on the device without waiting for it::

        bins = fm.LossBins(10)
        per_sample = fm.cfm_loss(pred, batch, reduction="none")
        bins.update(batch.t, per_sample)
        bins.all_reduce().mean     # (10,), of all ranks; NaN where there was no sample

    Sums are in float64 and of fixed order. Bin i holds the times in [i / bins, (i + 1) / bins), the last one 1 too; a
    time outside [0, 1], or NaN, counts nowhere, and neither does a loss of weight 0, even where it is infinite or NaN.

    Args:
        bins: int from 1 to 2^20.
        device: where the sums live; that of the first update if None.
    """

    def __init__(self, bins: int = 10, *, device: torch.device | str | None = None) -> None:
        check_int("bins", bins, low=1, high=2**20)
        self.bins = bins
        self._sums: Tensor | None = None  # (2, bins): weights times losses, weights
        if device is not None:
            self._sums = self._zeros(check_device("device", device))

    def _zeros(self, device: torch.device | str | None = None) -> Tensor:
        with torch.inference_mode(False):  # tensors made in it cannot be written outside
            return torch.zeros(2, self.bins, dtype=torch.float64, device=device)

    def _held(self) -> Tensor:
        return self._zeros("cpu") if self._sums is None else self._sums

    @property
    def edges(self) -> Tensor:
        """The bins' ends i / bins, bins + 1 times, float64; a time equal to one is in the bin that begins there."""
        return torch.arange(self.bins + 1, dtype=torch.float64, device=self._held().device) / self.bins

    @property
    def total(self) -> Tensor:
        """The sum of weighted losses in each bin, (bins,), float64."""
        return self._held()[0].clone()

    @property
    def count(self) -> Tensor:
        """The number of samples, or sum of their weights, in each bin, (bins,), float64."""
        return self._held()[1].clone()

    @property
    def mean(self) -> Tensor:
        """The mean loss in each bin, (bins,), float64; NaN where the count is 0."""
        total, count = self._held()
        return total / count

    def update(self, t: Tensor, loss: Tensor, weight: Tensor | None = None) -> None:
        """Adds losses.

        Args:
            t: times, floating, any shape.
            loss: of t's shape, e.g. ``cfm_loss(..., reduction="none")``.
            weight: of t's shape, e.g. the number of unmasked tokens; 1 if None.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or device.
        """
        check_float_tensor("t", t)
        check_like("loss", loss, "t", t, dtype=False)
        if weight is not None:
            check_tensor("weight", weight)
            if weight.shape != t.shape or weight.device != t.device:
                raise value_error("weight", f"the shape and device of t, {tuple(t.shape)} on {t.device}", weight)
        if self._sums is None:
            self._sums = self._zeros(t.device)
        elif self._sums.device != t.device:
            raise value_error("t", f"a tensor on {self._sums.device}, where the sums are", t)
        elif not compiling() and self._sums.is_inference() and not torch.is_inference_mode_enabled():
            self._sums = self._sums.clone()  # copied or unpickled in inference mode
        with torch.no_grad():
            times, losses = t.detach().double().flatten(), loss.detach().double().flatten()
            if weight is None:
                rows = torch.stack((losses, torch.ones_like(losses)))
            else:
                share = weight.detach().double().flatten()
                rows = torch.stack((torch.where(share == 0.0, 0.0, share * losses), share))
            self._add(times, rows)

    def _add(self, times: Tensor, rows: Tensor) -> None:
        """Adds (2, N) losses and weights to the bins of their times, in fixed order."""
        assert self._sums is not None
        inside = (times >= 0.0) & (times <= 1.0)  # a NaN is not
        times = torch.where(inside, times, 0.0)
        place = (times * self.bins).floor()  # or its neighbour, as the product was rounded: the edges decide
        place += (times >= (place + 1.0) / self.bins).double() - (times < place / self.bins).double()
        place.clamp_(max=self.bins - 1)
        rows = torch.where(inside, rows, 0.0)
        if times.is_cpu:
            self._sums.index_add_(1, place.long(), rows)
            return
        # a device adds by index in any order; its comparisons with all bins are made part by part
        bins = torch.arange(self.bins, dtype=torch.float64, device=times.device)[:, None]
        size = max(1, _COMPARISONS // self.bins)
        for part, values in zip(place.split(size), rows.split(size, 1), strict=True):
            self._sums += torch.where(part == bins, values[:, None], 0.0).sum(-1)

    def reset(self) -> None:
        """Back to no losses."""
        if self._sums is not None:
            with torch.no_grad():
                self._sums.zero_()

    def all_reduce(self, group: Any = None) -> LossBins:
        """The bins of all ranks together, as new bins: these go on counting their own rank's.

        Args:
            group: a process group of torch.distributed; the default one if None.
        """
        if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
            raise type_error("group", "a process group of torch.distributed, or None", group)
        result = LossBins(self.bins)
        result._sums = self._held().clone()
        torch.distributed.all_reduce(result._sums, group=group)
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of ``total`` and ``count``."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave; the sums stay on their device.

        Raises:
            TypeError, ValueError: no such state, or that of another number of bins.
        """
        if not isinstance(state, Mapping) or set(state) != {"total", "count"}:
            raise type_error("state", "a mapping with total and count", state)
        for name, value in state.items():
            check_float_tensor(f"state[{name!r}]", value)
            if value.shape != (self.bins,):
                raise value_error(f"state[{name!r}]", f"the shape ({self.bins},)", value)
        if self._sums is None:
            self._sums = self._zeros(state["total"].device)
        with torch.no_grad():
            self._sums.copy_(torch.stack((state["total"], state["count"])))

    def __repr__(self) -> str:
        return f"LossBins({self.bins})"
