"""How an adaptive solve is controlled, in our words and in torchdiffeq's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from ..._checks import (
    check_choice,
    check_int,
    check_number,
    check_unmapped,
    is_infinite,
    is_word,
    type_error,
    value_error,
)
from ...ops.step_control.op import Rules
from ..methods.tableaus import Tableau
from .controllers import Controller, IController
from .rows import Field, Norm, Problem

COMPACT_ELEMENTS = 1024


@final
@dataclass(frozen=True, eq=False)
class AdaptiveOptions:
    """How an adaptive solve is controlled.

    Args:
        rtol, atol: tolerances of the error norm, see :func:`fmkernels.combine`; tensors that broadcast against the
            state take a slower path.
        controller: the rule of the step size.
        shared: one step size for the whole batch, from the norm over all of it.
        first_step: size of the first step; None takes Hairer's rule, one more network call.
        min_step: a row that rejects a step of this size ends with Status.MIN_STEP.
        force_min_step: it accepts such a step instead, as torchdiffeq does.
        max_step: bound of the step size.
        max_steps: of a row, accepted or not; beyond it ends with Status.MAX_STEPS.
        compact: moves the running rows into a smaller batch where they are at most this share of it; True is one
            half, False never, as for a func that holds what belongs to the rows; "auto" one half of states with at
            least 1024 elements (below, the network's cost hardly depends on the batch).
        chunk: steps between two looks at who has finished.
        time_shape: the shape of t for func: "batch", (B,), or "scalar", () (only where shared).
        time_dtype: of t; None for float32 (float64 for a float64 state).
        record: keep the accepted steps, see :class:`AdaptiveResult`.
        impl: of the operations.
        lends: func may keep the times and states that it is given.
    """

    rtol: float | Tensor = 1e-5
    atol: float | Tensor = 1e-5
    controller: Controller = field(default_factory=IController)
    shared: bool = False
    first_step: float | None = None
    min_step: float = 0.0
    force_min_step: bool = False
    max_step: float = math.inf
    max_steps: int = 10_000
    compact: bool | float | Literal["auto"] = False
    chunk: int = 1
    time_shape: str = "batch"
    time_dtype: torch.dtype | None = None
    record: bool = False
    impl: str = "auto"
    lends: bool = False

    def __post_init__(self) -> None:
        for name, tolerance in (("rtol", self.rtol), ("atol", self.atol)):
            if not isinstance(tolerance, Tensor):
                check_number(name, tolerance, low=0.0)
        if not isinstance(self.controller, Controller):
            raise type_error("controller", "an IController, PIController or PIDController", self.controller)
        if self.first_step is not None:
            check_number("first_step", self.first_step, above=0.0)
        check_number("min_step", self.min_step, low=0.0)
        if not is_infinite(self.max_step):
            check_number("max_step", self.max_step, above=0.0, low=self.min_step)
        check_int("max_steps", self.max_steps, low=0)
        if not is_word(self.compact, "auto"):
            check_number("compact", float(self.compact), low=0.0, high=1.0)
        check_int("chunk", self.chunk, low=1)
        check_choice("time_shape", self.time_shape, ("batch", "scalar"))
        if self.time_shape == "scalar" and not self.shared:
            raise value_error("time_shape", "'batch' with step sizes of each sample, whose times differ", "scalar")

    def compact_below(self, y: Tensor) -> float:
        """The share of running rows at which a batch of states y shrinks."""
        if self.shared or self.record:
            return 0.0
        share = y.numel() >= COMPACT_ELEMENTS if self.compact == "auto" else self.compact
        return 0.5 if share is True else float(share)

    def problem(self, func: Field, tableau: Tableau, dtype: torch.dtype, norm: Norm | None = None) -> Problem:
        tableau = tableau.adaptive()
        if tableau.error is None:
            raise value_error("method", "a tableau with an error estimate", tableau.name)
        rules = Rules(
            self.controller.exponents(tableau.order),
            self.controller.safety,
            self.controller.ifactor,
            self.controller.dfactor,
            self.controller.least_growth,
            float(self.min_step),
            float(self.max_step),
            min(self.max_steps, MOST_STEPS),
            self.force_min_step,
            tableau.c,
        )
        return Problem(
            func,
            tableau,
            rules,
            self.atol,
            self.rtol,
            self.shared,
            self.time_shape == "scalar",
            self.time_dtype or (torch.float64 if dtype is torch.float64 else torch.float32),
            norm,
            self.impl,
            self.lends,
        )


STEP_CONTROL = (
    "first_step",
    "min_step",
    "max_step",
    "max_num_steps",
    "safety",
    "ifactor",
    "dfactor",
    "controller",
    "norm",
)
_FACTORS = ("safety", "ifactor", "dfactor")
MOST_STEPS = 2**31 - 1


def number_option(name: str, value: Any, **bounds: float) -> float:
    """A number among options: an int, a float or a 0-dim tensor."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool:
        check_unmapped(f"options: {name}", value)
        value = value.item()
    check_number(f"options: {name}", value, **bounds)
    return float(value)


def step_control_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`AdaptiveOptions` that they mean."""
    numbers = {name: number_option(name, options[name]) for name in _FACTORS if options.get(name) is not None}
    controller = options.get("controller")
    if controller is not None and numbers:
        raise ValueError(f"options: expected a controller or {', '.join(numbers)}, which it has itself, got both")
    first, least = options.get("first_step"), options.get("min_step")
    most, steps = options.get("max_step"), options.get("max_num_steps")
    return {
        "controller": IController(**numbers) if controller is None else controller,
        "first_step": None if first is None else abs(number_option("first_step", first)),
        "min_step": 0.0 if least is None else number_option("min_step", least, low=0.0),
        "max_step": math.inf if most is None or is_infinite(most) else number_option("max_step", most, above=0.0),
        "max_steps": MOST_STEPS
        if steps is None
        else min(int(number_option("max_num_steps", steps, low=0.0)), MOST_STEPS),
    }
