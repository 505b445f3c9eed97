r"""The control of adaptive steps on the device: accept or reject, next step size, status, for each row by itself.

The state of the control is a float64 tensor ``clock`` (len(Clock), R) and an int32 tensor ``count`` (len(Count), R), a
column for each of R rows, so that reading it, gathering rows of it and sending it to a kernel are one operation each.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, final

import torch
from torch import Tensor

from ... import _dispatch
from ..library import LIBRARY


@final
class Status(IntEnum):
    """How the solve of a sample stands, or has ended."""

    RUNNING = 0
    SUCCESS = 1
    MAX_STEPS = 2
    NON_FINITE = 3
    MIN_STEP = 4


@final
class Clock(IntEnum):
    """Rows of the float64 state; the order is that of csrc/step_control/step_control.h."""

    T = 0  # the time reached
    H = 1  # the next step, signed; 0 for a finished row
    T_END = 2
    RATIO_1 = 3  # error norms of the last two accepted steps
    RATIO_2 = 4
    T_FROM = 5  # where the last step began
    H_TAKEN = 6  # its size, accepted or not; 0 where none was taken
    H_NEXT = 7  # the proposed next step before it is cut to the end of the interval


@final
class Count(IntEnum):
    """Rows of the int32 state."""

    STATUS = 0
    STEPS = 1
    ACCEPTED = 2
    FAILURES = 3  # consecutive steps with a non-finite error norm
    ACCEPT = 4  # 1 where the last step was accepted
    FIRST_OUTPUT = 5  # the requested times within the last step are those from here
    NEXT_OUTPUT = 6  # up to here, which is the next one


# Consecutive steps with a non-finite error norm after which a row is given up: with dfactor 0.2 the step has then
# shrunk by 1e14.
MAX_FAILURES = 20


class Rules(NamedTuple):
    """The numbers of the control.

    Attributes:
        exponents: of the error norms e, e_1 and e_2 in the factor of the step size.
        safety, ifactor, dfactor: see :mod:`fmkernels.solvers.adaptive.controllers`.
        least_growth: the least factor where e < 1.
        min_step, max_step: bounds of the step size.
        max_steps: of a row, accepted or not.
        force_min_step: accept a step of at most min_step whatever its error, as torchdiffeq does.
        nodes: the tableau's c.
    """

    exponents: tuple[float, float, float]
    safety: float
    ifactor: float
    dfactor: float
    least_growth: float
    min_step: float
    max_step: float
    max_steps: int
    force_min_step: bool
    nodes: tuple[float, ...]

    def numbers(self) -> list[float]:
        """All but the nodes, in the order of csrc/step_control/step_control.h; integers up to 2^53 are exact."""
        return [
            *self.exponents,
            self.safety,
            self.ifactor,
            self.dfactor,
            self.least_growth,
            self.min_step,
            self.max_step,
            float(self.max_steps),
            float(self.force_min_step),
            float(MAX_FAILURES),
        ]


LIBRARY.define(
    "step_control(Tensor(a!) clock, Tensor(b!) count, Tensor(c!) step, Tensor(d!) times, Tensor error, float[] rules, "
    "float[] nodes, Tensor? wanted, bool start, str impl) -> ()"
)


def _step_control(
    clock: Tensor,
    count: Tensor,
    step: Tensor,
    times: Tensor,
    error: Tensor,
    rules: Sequence[float],
    nodes: Sequence[float],
    wanted: Tensor | None,
    start: bool,
    impl: str,
) -> None:
    run = _dispatch.implementation("step_control", clock.device.type, impl).run
    run(clock, count, step, times, error, rules, nodes, wanted, start)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("step_control", _step_control, _key)
torch.library.register_fake("fmkernels::step_control", lambda *_: None, lib=LIBRARY)


def new_state(t0: Tensor, t1: Tensor) -> tuple[Tensor, Tensor]:
    """(clock, count) of rows that are to go from t0 to t1, float64 tensors (R,)."""
    clock = torch.zeros(len(Clock), t0.shape[0], dtype=torch.float64, device=t0.device)
    clock[Clock.T] = clock[Clock.T_FROM] = t0
    clock[Clock.T_END] = t1
    clock[Clock.RATIO_1 : Clock.RATIO_2 + 1] = 1.0
    return clock, torch.zeros(len(Count), t0.shape[0], dtype=torch.int32, device=t0.device)


def step_control(
    clock: Tensor,
    count: Tensor,
    step: Tensor,
    times: Tensor,
    error: Tensor,
    rules: Rules,
    wanted: Tensor | None = None,
    *,
    start: bool = False,
    impl: str = "auto",
) -> None:
    r"""Judges the step that was just taken and prepares the next one, for each row.

    A row whose error norm is at most 1 moves on to t + h; the next step size follows from the controller's rule and is
    cut to [min_step, max_step] and to the end of the interval, which is reached exactly. A row that has got there, that
    has taken max_steps steps, whose step cannot shrink any more (at most min_step, or too small to change t) or whose
    error norm was not finite too often gets its status, and 0 as its step from then on.

    Args:
        clock: float64 (len(Clock), R), changed in place.
        count: int32 (len(Count), R), changed in place.
        step: (R,), receives the signed size of the next step in the dtype of coefficients.
        times: (S, R) in the dtype of times, receives t + c_s h.
        error: (R,) error norms; with ``start`` sizes of the first step, NaN where the right-hand side is not finite.
        rules: the numbers of the control.
        wanted: float64 (R, T), times at which states are wanted, in the order of the solve; one row of it may stand for
            all (stride 0).
        start: no step was taken yet.
        impl: "auto", "reference" or "native". There is no Triton kernel: "triton" raises, and where the environment
            names it for all operations the reference runs.

    Raises:
        RuntimeError: an implementation that is not there.
    """
    named, impl = impl, _dispatch.wanted(impl)
    if impl == "triton" and named == "auto":
        impl = "reference"
    call = _step_control if _dispatch.plain(clock) else torch.ops.fmkernels.step_control
    call(clock, count, step, times, error, rules.numbers(), list(rules.nodes), wanted, start, impl)
