"""Adaptive solves that can be asked for any time afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from ..._checks import check_number, value_error
from ...ops.combine.op import combine
from ...ops.step_control.op import Status
from ..adaptive.solve import solve_adaptive
from ..methods import registry as methods
from ..methods.runge_kutta import take_stages
from ..methods.tableaus import Tableau
from .options import adaptive_options, check_options, segments
from .packed import Field, Packed, State
from .solves import watcher


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
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu").detach()
        sign = 1.0 if bool(self.times[-1] >= self.times[0]) else -1.0
        flat, times = sign * t.reshape(-1), sign * self.times
        if not bool(((flat >= times[0]) & (flat <= times[-1])).all()):
            raise value_error("t", f"times from {float(self.times[0])} to {float(self.times[-1])}", t)
        step = torch.searchsorted(times, flat, side="right").sub_(1).clamp_(0, times.shape[0] - 2)
        share = (flat - times[step]) / (times[step + 1] - times[step])
        chosen = self._coefficients[step.to(self._coefficients.device)]
        share = share.to(chosen).reshape(-1, *[1] * (chosen.dim() - 2))
        y = chosen[:, -1]
        for power in range(chosen.shape[1] - 2, -1, -1):
            y = y * share + chosen[:, power]
        return self._packed.unpack(y.reshape(*t.shape, *y.shape[1:]), lead=t.dim())


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

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
        RuntimeError: a solve that does not reach t1.
    """
    packed, options = Packed(func, y0), dict(options or {})
    tableau = methods.adaptive_tableau(method or "dopri5", methods.DENSE)
    if tableau is None or options.get("per_sample"):
        raise value_error("method", "an adaptive one, with a step size for all samples", method)
    check_options(packed, tableau.name, options, adaptive=True)
    first, last = (float(t.detach()) if isinstance(t, Tensor) else float(t) for t in (t0, t1))
    for name, number in (("t0", first), ("t1", last)):
        check_number(name, number)
    if first == last:
        raise value_error("t1", "a time other than t0", t1)
    engine = adaptive_options(packed, rtol, atol, options, record=True)
    norm, watch, tableau = packed.norm(options.get("norm")), watcher(packed), tableau.adaptive()
    y, ends, coefficients = packed.y0, [first], []
    for segment in segments(options, first, last, y.dtype):
        here = packed.part(y, segment.limits)
        result = solve_adaptive(
            here.field, y.detach(), segment.start, segment.end, tableau, engine, norm=norm, on_step=watch
        )
        engine = replace(engine, first_step=None)
        if bool((result.status != Status.SUCCESS).any()):
            raise RuntimeError("odeint_dense: expected a solve that reaches t1; see the warning")
        starts = [float(t) for t, _ in result.steps or []]
        ends += [*starts[1:], segment.end]
        k: Tensor | None = None
        for start, end in zip(starts, ends[-len(starts) :], strict=True):
            y, k, rows = _step(here, tableau, y, k, start, end)
            coefficients.append(rows)
    return DenseSolution(packed, torch.tensor(ends, dtype=torch.float64), torch.stack(coefficients))


def _step(
    packed: Packed, tableau: Tableau, y: Tensor, k: Tensor | None, start: float, end: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A step from y, whose derivative is k if known: the new state, its derivative, and the interpolant's powers."""
    h = end - start

    def state(row: Sequence[float], ks: list[Tensor]) -> Tensor:
        return combine([y, *ks], [1.0, *(h * a for a in row)]) if row else y

    def evaluate(y: Tensor, time: float) -> Tensor:
        return packed.field(torch.tensor(time, dtype=y.dtype, device=y.device), y)

    ks, last = take_stages(tableau, start, end, state, evaluate, first=k)
    powers = [combine(ks, [h * w for w in column]) for column in zip(*tableau.interpolant, strict=True)]
    return last, ks[-1], torch.stack([y, *powers])


__all__ = ["DenseSolution", "odeint_dense"]
