"""Adaptive solves that can be asked for any time afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..._cache import is_plain_context
from ..._checks import check_has_values, check_number, type_error, value_error
from ..._torch import beneath, transform_active, untraced
from ...ops.combine.op import combine
from ...ops.step_control.op import Status
from ..methods import registry as methods
from ..methods.runge_kutta import take_stages
from ..methods.tableaus import Tableau
from ..programs.expressions import Number
from ..programs.ownership import owned_state, references_of
from .controlled import Control
from .options import (
    ADAPTIVE_OPTIONS,
    adaptive_options,
    check_func,
    check_options,
    segments,
    settings_of,
)
from .packed import Field, Packed, State


@final
class DenseSolution:
    """A solution as a function of time: calling it with times of shape S gives states of shape (\\*S, \\*y0.shape).

    Attributes:
        times: float64 (steps + 1,), on the CPU: the ends of the accepted steps.
    """

    def __init__(self, packed: Packed, times: Tensor, coefficients: Tensor) -> None:
        # coefficients (steps, degree + 1, ...) of the powers of the share of a step
        self._packed, self.times, self._coefficients = packed, times, coefficients

    def __call__(self, t: Tensor | float) -> Any:
        """With gradients to t too."""
        if isinstance(t, Tensor) and (t.is_complex() or t.dtype == torch.bool):
            raise type_error("t", "real times", t)
        if isinstance(t, Tensor) and transform_active() and beneath(t)[1]:
            raise value_error("t", "all times in one tensor: vmap hides them from the search for their steps", t)
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        sign = 1.0 if bool(self.times[-1] >= self.times[0]) else -1.0
        flat, times = sign * t.reshape(-1), sign * self.times
        if not bool(((flat >= times[0]) & (flat <= times[-1])).all()):
            raise value_error("t", f"times from {float(self.times[0])} to {float(self.times[-1])}", t)
        step = torch.searchsorted(times, flat.detach(), side="right").sub_(1).clamp_(0, times.shape[0] - 2)
        share = (flat - times[step]) / (times[step + 1] - times[step])
        chosen = self._coefficients[step.to(self._coefficients.device)]
        share = share.to(chosen).reshape(-1, *[1] * (chosen.dim() - 2))
        y = chosen[:, -1]
        for power in range(chosen.shape[1] - 2, -1, -1):
            y = y * share + chosen[:, power]
        return self._packed.unpack(y.reshape(*t.shape, *y.shape[1:]), lead=t.dim())


@untraced
def odeint_dense(
    func: Field,
    y0: State,
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> DenseSolution:
    """Solves dy/dt = func(t, y), y(t0) = y0, and returns the solution on [t0, t1] as a function, as torchdiffeq does.

    The steps are found without recording them and the accepted ones taken again, with gradients to y0 and to what func
    uses. Each is kept as the polynomial of the method's dense output.

    Args:
        func, y0, rtol, atol, options: as in :func:`fmkernels.odeint` with an adaptive method.
        t0, t1: the interval, in either direction.
        method: an adaptive method; "dopri5" if None.

    Within torch.func's transforms it is what :func:`fmkernels.odeint` is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
        RuntimeError: a solve that does not reach t1.
    """
    check_func(func)
    packed, settings = Packed(func, y0), settings_of(rtol, atol, method, options)
    tableau = methods.adaptive_tableau(settings.method, methods.DENSE)
    if tableau is None or settings.options.get("per_sample"):
        raise value_error("method", "an adaptive one, with a step size for all samples", method)
    check_options(packed, settings, ADAPTIVE_OPTIONS, judges=True)
    first, last = (_time(name, value) for name, value in (("t0", t0), ("t1", t1)))
    if first == last:
        raise value_error("t1", "a time other than t0", t1)
    check_has_values("y0", packed.y0)
    control = Control(packed, tableau, settings, adaptive_options(packed, settings, record=True), gradient=True)
    y, ends, coefficients = packed.y0, [first], []
    for segment in segments(settings.options, first, last, y.dtype):
        here = packed.part(y, segment.limits)
        result = control.part(here, segment)
        if bool((result.status != Status.SUCCESS).any()):
            raise RuntimeError("odeint_dense: expected a solve that reaches t1; see the warning")
        starts = [float(t) for t, _ in result.steps or []] or [segment.start]  # one step, where y0 is empty
        ends += [*starts[1:], segment.end]
        k: Tensor | None = None
        for start, end in zip(starts, ends[-len(starts) :], strict=True):
            y, k, rows = _step(here, tableau.adaptive(), y, k, start, end)
            coefficients.append(rows)
    times = torch.tensor(ends, dtype=torch.float64, device="cpu")
    return DenseSolution(packed, times, torch.stack(coefficients))


def _time(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        if value.requires_grad and torch.is_grad_enabled():
            raise value_error(name, "a time without gradient", value)
        value = value.item()
    check_number(name, value)
    return float(value)


def _step(
    packed: Packed, tableau: Tableau, y: Tensor, k: Tensor | None, start: float, end: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A step from y, whose derivative is k if known: the new state, its derivative, and the interpolant's powers."""
    h, look = end - start, is_plain_context()

    def state(row: Sequence[float], ks: list[Tensor]) -> Tensor:
        return combine([y, *ks], [1.0, *(h * a for a in row)]) if row else y

    def evaluate(y: Tensor, time: Number) -> Tensor:
        output = packed.field(torch.tensor(float(time), dtype=y.dtype, device=y.device), y)
        references = references_of(output) if look else 0
        return owned_state("func", output, y, references, look)  # the next call may write to the same buffer

    ks, last = take_stages(tableau, start, end, state, evaluate, first=k)
    powers = [combine(ks, [h * w for w in column]) for column in zip(*tableau.interpolant, strict=True)]
    return last, ks[-1], torch.stack([y, *powers])


__all__ = ["DenseSolution", "odeint_dense"]
