"""Programs kept for the next solve with the same settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...paths import Path
from .program import Program

_PLANS: dict[Any, Program] = {}
MAX_PLANS = 256


def planned(key: Any, make: Callable[[], Program]) -> Program:
    """The program kept under a key, made at its first use; a key of None, or that holds a tensor, keeps nothing."""
    try:
        program = None if key is None else _PLANS.get(key)
    except TypeError:
        key = program = None
    if program is None:
        program = make()
        if key is not None:
            if len(_PLANS) >= MAX_PLANS:
                del _PLANS[next(iter(_PLANS))]
            _PLANS[key] = program
    return program


def settings_key(path: Path, prediction: str, guidance: Any) -> tuple[Any, ...]:
    """A path by its kind and parameters, and a guidance by what its expressions depend on."""
    parameters = tuple(sorted(vars(path).items())) if hasattr(path, "__dict__") else (path,)
    return type(path), parameters, prediction, getattr(guidance, "plan_key", guidance)
