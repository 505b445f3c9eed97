"""What the tests of adaptive steps share: a stiff problem with a known solution, and short calls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fmkernels import _dispatch
from fmkernels.solvers.adaptive.options import AdaptiveOptions
from fmkernels.solvers.adaptive.solve import AdaptiveResult, solve_adaptive
from fmkernels.solvers.methods.tableaus import TABLEAUS, Tableau

IMPLS = ["reference"] + (["auto"] if _dispatch.unavailable("native", "cpu") is None else [])
DOPRI5 = TABLEAUS["dopri5"]


def solve(func: Any, y0: Tensor, t0: Any, t1: Any, tableau: Tableau = DOPRI5, **options: Any) -> AdaptiveResult:
    outer = {k: options.pop(k) for k in ("t_eval", "arguments", "follow", "on_step", "norm", "graph") if k in options}
    outer.setdefault("follow", tuple(outer.get("arguments", ())))
    if "tol" in options:
        options["rtol"] = options["atol"] = options.pop("tol")
    return solve_adaptive(func, y0, t0, t1, tableau, AdaptiveOptions(**options), **outer)


def columns(t: Tensor, y: Tensor) -> Tensor:
    return t.reshape(t.shape + (1,) * (y.dim() - t.dim()))


class Prothero:
    """y' = -rate (y - cos t) - sin t, with a rate for each sample: y = (y0 - 1) exp(-rate t) + cos t from t = 0."""

    def __init__(self, rates: list[float], dtype: torch.dtype = torch.float64) -> None:
        self.rate = torch.tensor(rates, dtype=dtype)
        self.y0 = torch.linspace(-1.0, 2.0, 3 * len(rates), dtype=dtype).reshape(len(rates), 3)
        self.evaluations = 0

    def __call__(self, t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        self.evaluations += y.shape[0]
        t = columns(t, y).to(y.dtype)
        return -rate[:, None] * (y - torch.cos(t)) - torch.sin(t)

    def exact(self, t: float) -> Tensor:
        return (self.y0 - 1.0) * torch.exp(-self.rate * t)[:, None] + math.cos(t)

    def solve(self, t1: float = 2.0, tableau: Tableau = DOPRI5, **options: Any) -> AdaptiveResult:
        return solve(self, self.y0, 0.0, t1, tableau, arguments={"rate": self.rate}, **options)
