"""torchdiffeq's options of step control, which explicit and implicit adaptive methods share."""

from __future__ import annotations

import math
from typing import Any

from .controllers import IController

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
MOST_STEPS = 2**31 - 1


def step_control_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`AdaptiveOptions` that they mean."""
    first = options.get("first_step")
    return {
        "controller": options.get("controller")
        or IController(
            safety=float(options.get("safety", 0.9)),
            ifactor=float(options.get("ifactor", 10.0)),
            dfactor=float(options.get("dfactor", 0.2)),
        ),
        "first_step": None if first is None else abs(float(first)),
        "min_step": float(options.get("min_step", 0.0)),
        "max_step": float(options.get("max_step", math.inf)),
        "max_steps": min(int(options.get("max_num_steps", MOST_STEPS)), MOST_STEPS),
    }
