"""Solves of a packed state with controlled steps, and the accepted steps again for a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._checks import value_error
from ..._torch import is_differentiated, requires_grad, transform_active, transform_kinds
from ...ops.step_control.op import Status
from ...paths import CondOT
from ..adaptive.gradient_watch import FoundGradient, watched
from ..adaptive.lowered import Lowered
from ..adaptive.options import AdaptiveOptions
from ..adaptive.rows import Batch
from ..adaptive.solve import AdaptiveResult, OnStep, solve_adaptive
from ..adaptive.stepper import AdaptiveStep
from ..methods.tableaus import Tableau
from ..programs.builder import Builder
from ..programs.expressions import Number
from .callbacks import Callbacks
from .fixed import numbers_of, run_program
from .options import Segment, Settings, adaptive_options, per_sample_of, segments
from .outputs import Replay, value_of
from .packed import Packed


def asks_gradient(packed: Packed, t: Tensor) -> bool:
    """Whether y0, t or a module's parameters show that a gradient can be asked of the solution."""
    if transform_active():  # in what its derivatives are taken shows nowhere
        kinds = transform_kinds()
        if "Jvp" in kinds or ("Grad" in kinds and torch.is_grad_enabled()):
            return True
        if torch.is_grad_enabled() and requires_grad(packed.y0):  # times are not transformed
            return True
    if not torch.is_grad_enabled():
        return False
    if packed.y0.requires_grad or t.requires_grad:
        return True
    return isinstance(packed.func, nn.Module) and any(p.requires_grad for p in packed.func.parameters())


@dataclass(eq=False)
class Control:
    """Solves parts of an interval, one after another.

    Attributes:
        engine: the options of the next part.
        gradient: whether a gradient can be asked of the solution so far.
        on_step: called after each step; a true answer ends the solve.
    """

    packed: Packed
    tableau: Tableau
    settings: Settings
    engine: AdaptiveOptions
    gradient: bool
    on_step: OnStep | None = None

    @staticmethod
    def of(packed: Packed, t: Tensor, tableau: Tableau, settings: Settings) -> Control:
        gradient = asks_gradient(packed, t)
        return Control(packed, tableau, settings, adaptive_options(packed, settings, gradient), gradient)

    def __post_init__(self) -> None:
        self.callbacks = Callbacks(self.packed)
        self.norm = self.packed.norm(self.settings.options.get("norm"))
        self.lowered = Lowered(0 if self.engine.shared else 1) if transform_active() else None

    def part(self, here: Packed, segment: Segment, t_eval: np.ndarray | None = None) -> AdaptiveResult:
        """Solves a part without a graph, from the state of ``here``; with the accepted steps where they are wanted for
        a gradient, as :attr:`gradient` then tells."""
        self.callbacks.begin()
        watching = torch.is_grad_enabled() and not self.gradient
        try:
            result = self._solve(here, segment, t_eval, watching)
        except FoundGradient:
            self.gradient, self.engine = True, replace(self.engine, record=True)
            self.callbacks.again()
            result = self._solve(here, segment, t_eval, False)
        if self.engine.first_step is not None:
            self.engine = replace(self.engine, first_step=None)
        return result

    def _solve(self, here: Packed, segment: Segment, t_eval: np.ndarray | None, watching: bool) -> AdaptiveResult:
        end: float | Tensor = segment.end
        if math.isinf(end):  # until on_step ends it
            end = torch.tensor(end, dtype=torch.float64, device="cpu")
        watch: dict[str, Any] = {
            "t_eval": None if t_eval is None else torch.from_numpy(t_eval),
            "norm": self.norm,
            "on_step": self._after if self.callbacks.judges else self.on_step,
            "before_step": self._before if self.callbacks.on_try is not None else None,
        }
        task = (segment.start, end, self.tableau, self.engine)
        if self.lowered is not None:
            return self.lowered.solve(here.call, here.y0, *task, watching=watching, again=self.callbacks.again, **watch)
        func = watched(here.call) if watching else here.call
        return solve_adaptive(func, here.y0.detach(), *task, enable_grad=watching, **watch)

    def _before(self, batch: Batch) -> None:
        if self.lowered is None:
            self.callbacks.before_step(batch)
        else:
            with self.lowered.within():
                self.callbacks.tried(batch.time, self.lowered.above(batch.y), batch.next_size)

    def _after(self, step: AdaptiveStep) -> Any:
        if self.lowered is None:
            self.callbacks.after_step(step)
        else:
            with self.lowered.within():
                self.callbacks.judged(step.t, self.lowered.above(step.y), step.h, step.accepted)
        return None if self.on_step is None else self.on_step(step)

    def again(self, here: Packed, result: AdaptiveResult, start: Number, end: Number, wanted: list[Number]) -> Tensor:
        """The accepted steps of a part recorded for the gradient: the states at the times wanted.

        Args:
            start, end, wanted: tensors where they need a gradient; ``wanted`` from start on.
        """
        return replayed(here, self.tableau, result.steps or [], start, end, wanted, self.settings.options)


def solve_controlled(packed: Packed, t: Tensor, tableau: Tableau, settings: Settings) -> Tensor:
    """The packed states at the times t."""
    control = Control.of(packed, t, tableau, settings)
    if per_sample_of(packed, settings.options) and control.gradient and is_differentiated(t):
        raise value_error("t", "times without gradient with per_sample=True", t)
    if t.shape[0] == 1:
        return packed.y0[None].clone()
    times = numbers_of(t)
    first, last = value_of(times[0]), value_of(times[-1])
    parts_of_t = segments(settings.options, first, last, packed.y0.dtype)
    if len(times) == 2 and len(parts_of_t) == 1 and not control.gradient:
        # no time between the ends is asked for
        result = control.part(packed, parts_of_t[0])
        if not control.gradient:
            return torch.stack([packed.y0, _reached(result)])
        _check_success(result)
        return control.again(packed, result, times[0], times[1], times)
    wanted = np.array([value_of(time) for time in times])
    y, parts = packed.y0, []
    for segment in parts_of_t:
        inside = (wanted - segment.start) * (wanted - segment.end) <= 0.0
        if segment.start != first:
            inside &= wanted != segment.start
        here = packed.part(y, segment.limits)
        result = control.part(here, segment, wanted[inside] if inside.any() else None)
        if control.gradient:
            _check_success(result)
            at_first, at_last = segment.start == first, segment.end == last
            start, end = times[0] if at_first else segment.start, times[-1] if at_last else segment.end
            later = [times[i] for i in inside.nonzero()[0][int(at_first) :]]
            marks = [start, *later] if at_last else [start, *later, end]
            ys = control.again(here, result, start, end, marks)
            y = ys[-1]
            parts.append(ys[int(not at_first) : 1 + len(later)])
            continue
        y = result.y
        if result.ys is not None:
            parts.append(result.ys)
        if bool((result.status != Status.SUCCESS).any()):
            break
    ys = torch.cat(parts) if len(parts) > 1 else parts[0]
    missing = t.shape[0] - ys.shape[0]
    return ys if missing == 0 else torch.cat([ys, ys.new_full((missing, *ys.shape[1:]), math.nan)])


def _check_success(result: AdaptiveResult) -> None:
    if bool((result.status != Status.SUCCESS).any()):
        raise RuntimeError("odeint: expected a solve that succeeds where its gradient is wanted; see the warning")


def _reached(result: AdaptiveResult) -> Tensor:
    """The last state, NaN for what did not reach its time."""
    y, failed = result.y, result.status != Status.SUCCESS
    if not bool(failed.any()):
        return y
    return y.masked_fill(failed.reshape(failed.shape + (1,) * (y.dim() - 1)) if y.dim() else failed[0], math.nan)


def replayed(
    packed: Packed,
    tableau: Tableau,
    steps: list[tuple[Tensor, Tensor]],
    start: Number,
    end: Number,
    wanted: list[Number],
    options: dict[str, Any],
) -> Tensor:
    """The accepted steps from start to end again, recorded for the gradient: the states at the times wanted.

    Args:
        packed: with the state at start.
        wanted: from start on; tensors where they need a gradient.
    """
    rows = bool(options.get("per_sample", False))
    grid: list[Number] = [start, *(float(t) for t, _ in steps[1:]), end] if not rows else []
    if rows:  # those with fewer steps stay at their end
        grid = [np.full(packed.y0.shape[0], value_of(start))]
        for _, h in steps:
            grid.append(grid[-1] + np.array(h.tolist()))
        grid[-1] = np.full_like(grid[-1], value_of(end))
    replay = Replay(tableau.adaptive(), wanted, rows=rows)
    return run_program(packed, Builder(grid, CondOT()), replay, options, trajectory=False, told=True)
