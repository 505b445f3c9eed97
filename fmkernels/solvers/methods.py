"""Fixed-grid methods by name."""

from __future__ import annotations

from collections.abc import Callable

from .._checks import type_error, value_error
from . import tableaus
from .program import Method
from .runge_kutta import AdamsBashforth, AdamsMoulton, RungeKutta
from .stochastic import SDE

METHODS: dict[str, Callable[[], Method]] = {
    "ab2": lambda: AdamsBashforth(2),
    "ab3": lambda: AdamsBashforth(3),
    "ab4": lambda: AdamsBashforth(4),
    "am2": lambda: AdamsMoulton(2),
    "am3": lambda: AdamsMoulton(3),
    "am4": lambda: AdamsMoulton(4),
    "euler_maruyama": lambda: SDE(),
    "heun_sde": lambda: SDE(method="heun"),
    "exponential_sde": lambda: SDE(method="exponential"),
}


def method_names() -> list[str]:
    """The names of all fixed-grid methods."""
    return [*tableaus.TABLEAUS, *METHODS]


def resolve(method: str | Method) -> Method:
    """A method by its name, or as it is given."""
    if not isinstance(method, str):
        if not callable(method):
            raise type_error("method", "a name or a method", method)
        return method
    tableau = tableaus.tableau(method)
    if tableau is not None:
        return RungeKutta(tableau)
    if method in METHODS:
        return METHODS[method]()
    raise value_error("method", f"one of {', '.join(map(repr, method_names()))}", method)
