r"""Step size controllers as data: how the next step size follows from the errors of the last steps.

With e the error norm of a step of a method of order p (accepted where e <= 1) and e_1, e_2 those of the accepted steps
before it, the next step size is the last one times

.. math:: \mathrm{clamp}\left(\mathrm{safety} \cdot e^{-(k_I + k_P + k_D)/p}\, e_1^{(k_P + 2 k_D)/p}\, e_2^{-k_D/p},
    \ \mathrm{dfactor},\ \mathrm{ifactor}\right),

and at most ``safety`` times it after a rejected step (Soderlind 2003, Digital filters in adaptive time-stepping). A
controller is three numbers k_P, k_I, k_D and these bounds; :mod:`fmkernels.ops.step_control` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ..._checks import check_number


@dataclass(frozen=True, kw_only=True)
class Controller:
    """What all controllers have.

    Args:
        safety: aim at this fraction of the step size that the error estimate allows.
        ifactor: the step size grows at most by this factor in one step.
        dfactor: it shrinks at most by this factor.
    """

    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2

    def __post_init__(self) -> None:
        check_number("safety", self.safety, above=0.0, high=1.0)
        check_number("ifactor", self.ifactor, low=1.0)
        check_number("dfactor", self.dfactor, above=0.0, high=1.0)
        for name, value in zip(("pcoeff", "icoeff", "dcoeff"), self.gains, strict=True):
            check_number(name, value)

    @property
    def gains(self) -> tuple[float, float, float]:
        """(k_P, k_I, k_D)."""
        raise NotImplementedError

    @property
    def least_growth(self) -> float:
        """The least factor after an accepted step with e < 1."""
        return self.dfactor

    def exponents(self, order: int) -> tuple[float, float, float]:
        """Those of e, e_1 and e_2, for a method of this order."""
        p, i, d = self.gains
        return -(i + p + d) / order, (p + 2.0 * d) / order, -d / order


@final
@dataclass(frozen=True)
class IController(Controller):
    """safety e^(-1/p): the rule of torchdiffeq, whose steps never shrink after an accepted one (least factor 1)."""

    @property
    def gains(self) -> tuple[float, float, float]:
        return 0.0, 1.0, 0.0

    @property
    def least_growth(self) -> float:
        return 1.0


@final
@dataclass(frozen=True)
class PIController(Controller):
    """Proportional-integral control: smoother step sizes, fewer rejections where stability limits the step.

    Args:
        pcoeff, icoeff: k_P and k_I; the defaults are Gustafsson's PI.3.4 (Soderlind 2003).
    """

    pcoeff: float = 0.4
    icoeff: float = 0.3

    @property
    def gains(self) -> tuple[float, float, float]:
        return self.pcoeff, self.icoeff, 0.0


@final
@dataclass(frozen=True)
class PIDController(Controller):
    """Proportional-integral-derivative control.

    Args:
        pcoeff, icoeff, dcoeff: k_P, k_I and k_D; the defaults are those of ARKODE, e^(-0.58/p) e_1^(0.21/p)
            e_2^(-0.1/p) (Reynolds et al. 2023).
    """

    pcoeff: float = 0.01
    icoeff: float = 0.47
    dcoeff: float = 0.1

    @property
    def gains(self) -> tuple[float, float, float]:
        return self.pcoeff, self.icoeff, self.dcoeff


__all__ = ["Controller", "IController", "PIController", "PIDController"]
