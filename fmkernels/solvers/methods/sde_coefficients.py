r"""Diffusion coefficients w(t): how much noise an SDE adds and takes away on its way along a path.

Every :math:`w \ge 0` in :math:`dx = (v + w s)\,dt + \sqrt{2 w}\,dW` gives the marginals of the path (Ma et al. 2024,
"SiT", section 2.3). A coefficient is a name, an instance of one of the classes below, or any callable of the time.

The score is :math:`s = -\hat x_0 / \sigma`, so that the drift is :math:`v - (w / \sigma) \hat x_0`. A class therefore
gives w / sigma, in which the sigma of most choices cancels: the drift has its finite limit where sigma is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..._cache import Cache, is_plain_context, ordinary_tensors
from ..._checks import check_callable, check_number, own_times, type_error, value_error
from ..._names import Names
from ...paths import Coefficients, Path

# Coefficients are evaluated no nearer to t = 1, where quotients by sigma would be 0 / 0.
_END = 1.0 - 1e-6


# Nodes and weights on [0, 1] of the integral below. They need not resolve singular ends: any value of it belongs to an
# SDE with the right marginals.
def _quadrature(device: torch.device) -> tuple[Tensor, Tensor]:
    def make() -> tuple[Tensor, Tensor]:
        points, masses = np.polynomial.legendre.leggauss(16)
        return torch.from_numpy(0.5 * (points + 1.0)).to(device), torch.from_numpy(0.5 * masses).to(device)

    if not is_plain_context():
        return make()
    with ordinary_tensors():
        return _NODES.get(str(device), make)


_NODES: Cache[tuple[Tensor, Tensor]] = Cache("quadrature")


@runtime_checkable
class Diffusion(Protocol):
    """A diffusion coefficient that depends on the path."""

    def over_sigma(self, at: Coefficients, t: Tensor) -> Tensor:
        """w / sigma at times t, where the path's coefficients are ``at``: float64, of t's shape, maybe infinite."""


@final
@dataclass(frozen=True)
class Constant:
    """w = 1 (SiT's "constant"). Next to the data a step renews the noise more than once: it is limited there."""

    def over_sigma(self, at: Coefficients, t: Tensor) -> Tensor:
        return 1.0 / at.sigma_t


@final
@dataclass(frozen=True)
class Sigma:
    """w = sigma (SiT's "sigma"): w / sigma = 1, a drift without a singularity on any path."""

    def over_sigma(self, at: Coefficients, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@final
@dataclass(frozen=True)
class SBDM:
    r"""w = sigma (sigma d alpha / alpha - d sigma) = g^2 / 2 (SiT's "SBDM"), g being that of the score-based diffusion
    model with the path's marginals (Song et al. 2021). On CondOT (1 - t) / t, on VP beta / 2.

    Infinite where alpha is 0, and limited there. With ``method="exponential"`` its steps are DDPM's (Ho et al. 2020).
    """

    def over_sigma(self, at: Coefficients, t: Tensor) -> Tensor:
        return at.sigma_t * at.d_alpha_t / at.alpha_t - at.d_sigma_t


@final
@dataclass(frozen=True)
class Linear:
    """w = 1 - t (SiT's "linear")."""

    def over_sigma(self, at: Coefficients, t: Tensor) -> Tensor:
        return (1.0 - t) / at.sigma_t


@final
@dataclass(frozen=True)
class Decreasing:
    """w = (cos(pi t) + 1)^2 / 4 (SiT's "decreasing")."""

    def over_sigma(self, at: Coefficients, t: Tensor) -> Tensor:
        # (cos(pi t) + 1) / 2 = sin^2(pi (1 - t) / 2), without cancellation next to t = 1
        return torch.sin((0.5 * math.pi) * (1.0 - t)) ** 4 / at.sigma_t


@final
@dataclass(frozen=True)
class IncreasingDecreasing:
    """w = sin^2(pi t) (SiT's "increasing-decreasing"): no noise at either end."""

    def over_sigma(self, at: Coefficients, t: Tensor) -> Tensor:
        return torch.sin(math.pi * torch.minimum(t, 1.0 - t)).square() / at.sigma_t


@final
@dataclass(frozen=True)
class FlowGRPO:
    r"""w = a^2 sigma / (2 alpha): on CondOT noise of standard deviation :math:`a \sqrt{\sigma / (1 - \sigma)}` per root
    of time (Liu et al. 2025, "Flow-GRPO", eq. 9). Where alpha is 0, that of the step's other end is taken, as in their
    code.

    Args:
        noise_level: a >= 0.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        check_number("noise_level", self.noise_level, low=0.0)

    def over_sigma(self, at: Coefficients, t: Tensor) -> Tensor:
        return 0.5 * self.noise_level**2 / at.alpha_t


@final
@dataclass(frozen=True)
class Function:
    """Any function of the time.

    Args:
        function: maps times, a float64 tensor of any shape, to w >= 0 of that shape, or to a number.
    """

    function: Callable[[Tensor], Tensor | float]

    def __post_init__(self) -> None:
        check_callable("function", "a function of the time", self.function)

    def over_sigma(self, at: Coefficients, t: Tensor) -> Tensor:
        w = self.function(own_times(t))
        if not isinstance(w, Tensor):
            if isinstance(w, bool) or not isinstance(w, (int, float)):
                raise type_error("diffusion(t)", "a tensor or a number", w)
            w = torch.full_like(t, float(w))
        if w.shape != t.shape:
            raise value_error("diffusion(t)", f"a tensor of t's shape, {tuple(t.shape)}", w)
        w = w.to(t)
        if w.device.type == "cpu" and not bool((w >= 0.0).all()):  # elsewhere the question would wait for the device
            raise value_error("diffusion(t)", "numbers >= 0", w)
        return w / at.sigma_t


DIFFUSIONS: Names[Diffusion] = Names(
    "diffusion",
    {
        "constant": Constant(),
        "sigma": Sigma(),
        "sbdm": SBDM(),
        "linear": Linear(),
        "decreasing": Decreasing(),
        "increasing-decreasing": IncreasingDecreasing(),
        "flow_grpo": FlowGRPO(),
    },
)


def resolve(diffusion: str | Diffusion | Callable[[Tensor], Tensor | float]) -> Diffusion:
    """A coefficient by its name, as it is given, or from a function of the time.

    Raises:
        TypeError, ValueError: an unknown name, or neither of these.
    """
    if isinstance(diffusion, str):
        return DIFFUSIONS.find(diffusion)
    if isinstance(diffusion, Diffusion) and not isinstance(diffusion, type):
        return diffusion
    check_callable("diffusion", "a name, a diffusion coefficient or a callable of t", diffusion)
    return Function(diffusion)


def over_sigma(diffusion: Diffusion, path: Path, t: Tensor, other: Tensor) -> Tensor:
    """w / sigma at times t of steps whose other ends are ``other``; infinite where it is unbounded."""
    inner = t.clamp(max=_END)
    at = path.coefficients(inner)
    alpha = torch.where(at.alpha_t == 0.0, path.coefficients(other).alpha_t, at.alpha_t)
    return diffusion.over_sigma(at._replace(alpha_t=alpha), inner)


def renewed(diffusion: Diffusion, path: Path, t: Tensor, u: Tensor) -> Tensor:
    """The integral of w / sigma^2 between times t and u: by how many factors of e the noise in a state is renewed."""
    if isinstance(diffusion, SBDM):
        return torch.where(t == u, 0.0, 0.5 * (path.log_snr(u) - path.log_snr(t)).abs())
    nodes, weights = (a.reshape(-1, *[1] * t.dim()) for a in _quadrature(t.device))
    inside = t + nodes * (u - t)
    rate = over_sigma(diffusion, path, inside, inside) / path.coefficients(inside).sigma_t
    return (u - t).abs() * (weights * rate).sum(0)
