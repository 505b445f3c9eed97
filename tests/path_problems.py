"""Schedules that several tests share."""

from __future__ import annotations

import torch

from fmkernels.paths import (
    VE,
    VP,
    CondOT,
    ConstantBridge,
    Cosine,
    LinearVP,
    OptimalTransport,
    Path,
    Polynomial,
    SchrodingerBridge,
)

# Built-in paths whose derivatives autograd finds up to the ends.
EXACT = [
    CondOT(),
    OptimalTransport(0.1),
    Polynomial(1),
    Polynomial(1.5),
    Polynomial(3),
    Cosine(),
    LinearVP(),
    VP(),
    VE(),
    SchrodingerBridge(0.7),
    ConstantBridge(0.2, base=Cosine()),
]


class Plain(Path):
    """A user's own schedule: two functions, no derivatives."""

    def alpha(self, t):
        return t**2

    def sigma(self, t):
        return torch.exp(-3 * t) * (1 - t)


class Mine(Path):
    """One with parameters."""

    def __init__(self, n: float = 2.0, name: str = "mine", base: Path | None = None) -> None:
        self.n, self.name, self.base = n, name, base

    def alpha(self, t):
        return t**self.n

    def sigma(self, t):
        return 1 - t**self.n


class Learned(Path, torch.nn.Module):
    """alpha = t^n, sigma = 1 - t^n with a learnable exponent."""

    def __init__(self, n: float, dtype: torch.dtype = torch.float64) -> None:
        torch.nn.Module.__init__(self)
        self.n = torch.nn.Parameter(torch.tensor(n, dtype=dtype))

    def alpha(self, t):
        return t**self.n

    def sigma(self, t):
        return 1 - t**self.n
