"""Fixed-grid methods by name."""

from __future__ import annotations

from collections.abc import Callable

from ..._checks import type_error, value_error
from ..programs.builder import Method
from . import tableaus
from .adams import AdamsBashforth, AdamsMoulton
from .diffusion import DDIM, DEIS, LCM, LMS, Ancestral, DPMSolverPP, DPMSolverPP2S, UniPC
from .edm import EDM, Restart
from .runge_kutta import RungeKutta
from .sde import SDE

METHODS: dict[str, Callable[[], Method]] = {
    "ab2": lambda: AdamsBashforth(2),
    "ab3": lambda: AdamsBashforth(3),
    "ab4": lambda: AdamsBashforth(4),
    "am2": lambda: AdamsMoulton(2),
    "am3": lambda: AdamsMoulton(3),
    "am4": lambda: AdamsMoulton(4),
    "ddim": lambda: DDIM(),
    "ddim_sde": lambda: DDIM(eta=1.0),
    "ancestral": lambda: Ancestral(),
    "lcm": lambda: LCM(),
    "dpmpp_1s": lambda: DPMSolverPP(1),
    "dpmpp_2s": lambda: DPMSolverPP2S(),
    "dpmpp_2m": lambda: DPMSolverPP(2),
    "dpmpp_3m": lambda: DPMSolverPP(3),
    "dpmpp_1s_sde": lambda: DPMSolverPP(1, eta=1.0),
    "dpmpp_2s_sde": lambda: DPMSolverPP2S(eta=1.0),
    "dpmpp_2m_sde": lambda: DPMSolverPP(2, eta=1.0),
    "dpmpp_3m_sde": lambda: DPMSolverPP(3, eta=1.0),
    "unipc": lambda: UniPC(),
    "unipc_bh1": lambda: UniPC(variant="bh1"),
    "unipc_3": lambda: UniPC(3),
    "deis": lambda: DEIS(),
    "deis_t": lambda: DEIS(variable="t"),
    "lms": lambda: LMS(),
    "edm_euler": lambda: EDM(heun=False),
    "edm_heun": lambda: EDM(),
    "edm_churn": lambda: EDM(s_churn=40.0),
    "restart": lambda: Restart(),
    "euler_maruyama": lambda: SDE(),
    "heun_sde": lambda: SDE(method="heun"),
    "exponential_sde": lambda: SDE(method="exponential"),
}


def method_names() -> list[str]:
    """The names of all fixed-grid methods."""
    return [*tableaus.TABLEAUS, *METHODS]


# Names that mean step control where no number of steps is given: heun2 is a fixed-grid name, heun_euler is not.
ADAPTIVE = ("heun_euler", "adaptive_heun", "bosh3", "fehlberg", "fehlberg2", "dopri5", "tsit5", "dopri8")


def adaptive_tableau(method: str) -> tableaus.Tableau | None:
    """The tableau of an adaptive method's name, or None."""
    return tableaus.tableau(method) if method in ADAPTIVE else None


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
