"""Minibatch optimal transport plans with torchcfm's names, random numbers and numbers; they are POT's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._checks import warn

Plan = np.ndarray


def _pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            "optimal transport plans are those of POT, which is not installed: pip install POT"
        ) from error
    return ot


def _method_error(method: object, known: str) -> ValueError:
    return ValueError(f"method: expected one of {known}, got {method!r}. Unknown method: {method}")


def _costs(x0: Tensor, x1: Tensor, power: int) -> Tensor:
    """The matrix of Euclidean distances to a power, in a dtype that torch.cdist knows."""
    x0, x1 = (x.reshape(x.shape[0], -1) if x.dim() > 2 else x for x in (x0, x1))
    if x0.dtype in (torch.bfloat16, torch.float16) or x1.dtype in (torch.bfloat16, torch.float16):
        x0, x1 = x0.float(), x1.float()  # which raise in torchcfm
    distances = torch.cdist(x0, x1)
    return distances**2 if power == 2 else distances


class OTPlanSampler:
    r"""Couplings of two minibatches by an optimal transport plan for the squared Euclidean cost (Tong et al. 2023,
    eq. 17): the plan is POT's, indices are drawn from it by numpy's global generator, as torchcfm does.

    Args:
        method: "exact", "sinkhorn" (entropic), "unbalanced" or "partial".
        reg: entropic regularisation.
        reg_m: of "unbalanced", that of the marginals.
        normalize_cost: divide the costs by the largest one.
        num_threads: of the exact solver, an int or "max".
        warn: warn where a plan lost its mass and the uniform one is taken.

    Raises:
        ValueError: an unknown method.
        ImportError: POT is not installed.
    """

    def __init__(
        self,
        method: str,
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool = False,
        num_threads: int | str = 1,
        warn: bool = True,
    ) -> None:
        pot = _pot()
        methods: dict[str, tuple[Callable[..., Plan], dict[str, Any]]] = {
            "exact": (pot.emd, {"numThreads": num_threads}),
            "sinkhorn": (pot.sinkhorn, {"reg": reg}),
            "unbalanced": (pot.unbalanced.sinkhorn_knopp_unbalanced, {"reg": reg, "reg_m": reg_m}),
            "partial": (pot.partial.entropic_partial_wasserstein, {"reg": reg}),
        }
        if not isinstance(method, str) or method not in methods:
            raise _method_error(method, ", ".join(map(repr, methods)))
        self._solve, self._options = methods[method]
        self.reg, self.reg_m, self.normalize_cost, self.warn = reg, reg_m, normalize_cost, warn

    def ot_fn(self, a: np.ndarray, b: np.ndarray, M: np.ndarray) -> Plan:
        """The plan of marginals a and b and costs M."""
        return self._solve(a, b, M, **self._options)

    def get_map(self, x0: Tensor, x1: Tensor) -> Plan:
        """The plan between two minibatches, an array (B_0, B_1) that sums to 1.

        Args:
            x0, x1: (B_0, ...) and (B_1, ...); more dimensions than 2 are flattened.

        Raises:
            ValueError: the samples, or the plan, are not finite (torchcfm prints them and draws from it all the same).
        """
        pot = _pot()
        costs = _costs(x0, x1, 2).detach()
        if self.normalize_cost:
            costs = costs / costs.max()
        plan = self.ot_fn(pot.unif(x0.shape[0]), pot.unif(x1.shape[0]), costs.cpu().numpy())
        if not np.isfinite(plan).all():
            low, high = costs.min().item(), costs.max().item()
            raise ValueError(f"x0, x1: expected a finite plan, got one that is not, of costs from {low} to {high}")
        if abs(plan.sum()) < 1e-8:
            if self.warn:
                warn("Numerical errors in OT plan, reverting to uniform plan.")
            plan = np.ones_like(plan) / plan.size
        return plan

    def sample_map(self, pi: Plan, batch_size: int, replace: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of indices (i, j), drawn from a plan by numpy's global generator.

        Args:
            pi: the plan, (B_0, B_1).
            batch_size: how many pairs.
            replace: whether a pair may be drawn again.
        """
        chances = pi.flatten()
        chances = chances / chances.sum()
        drawn = np.random.choice(chances.size, p=chances, size=batch_size, replace=replace)  # noqa: NPY002 (its stream)
        return np.divmod(drawn, pi.shape[1])

    def sample_plan(self, x0: Tensor, x1: Tensor, replace: bool = True) -> tuple[Tensor, Tensor]:
        """Coupled minibatches (x0[i], x1[j]) of x0's size, (i, j) drawn from the plan."""
        i, j = self.sample_map(self.get_map(x0, x1), x0.shape[0], replace=replace)
        return x0[i], x1[j]

    def sample_plan_with_labels(
        self, x0: Tensor, x1: Tensor, y0: Tensor | None = None, y1: Tensor | None = None, replace: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(x0[i], x1[j], y0[i], y1[j]); labels that are None stay None."""
        i, j = self.sample_map(self.get_map(x0, x1), x0.shape[0], replace=replace)
        return x0[i], x1[j], None if y0 is None else y0[i], None if y1 is None else y1[j]

    def sample_trajectory(self, X: Tensor) -> np.ndarray:
        """Trajectories through populations, each coupled to the next by the plan between them.

        Args:
            X: (B, times, ...).

        Returns:
            An array of X's shape whose rows are trajectories.
        """
        times = X.shape[1]
        plans = [self.get_map(X[:, t], X[:, t + 1]) for t in range(times - 1)]
        indices = [np.arange(X.shape[0])]
        for plan in plans:
            rows = (plan[i] / plan[i].sum() for i in indices[-1])
            indices.append(np.array([np.random.choice(plan.shape[1], p=row) for row in rows]))  # noqa: NPY002
        return np.stack([X[:, t][index] for t, index in enumerate(indices)], axis=1)


def wasserstein(
    x0: Tensor, x1: Tensor, method: str | None = None, reg: float = 0.05, power: int = 2, **kwargs: Any
) -> float:
    """The Wasserstein distance between two empirical distributions, for the Euclidean distance.

    Args:
        x0, x1: (B_0, ...) and (B_1, ...); more dimensions than 2 are flattened.
        method: "exact" or None, or "sinkhorn" (entropic).
        reg: entropic regularisation.
        power: 1 or 2.
        kwargs: not looked at, as in torchcfm.

    Raises:
        ValueError: an unknown method.
        AssertionError: another power.
        ImportError: POT is not installed.
    """
    if power not in (1, 2):
        raise AssertionError(f"power: expected 1 or 2, got {power!r}")
    pot = _pot()
    a, b = pot.unif(x0.shape[0]), pot.unif(x1.shape[0])
    if method == "exact" or method is None:
        value = pot.emd2(a, b, _costs(x0, x1, power).detach().cpu().numpy(), numItermax=10**7)
    elif method == "sinkhorn":
        value = pot.sinkhorn2(a, b, _costs(x0, x1, power).detach().cpu().numpy(), reg=reg, numItermax=10**7)
    else:
        raise _method_error(method, "'exact', 'sinkhorn' or None")
    return math.sqrt(value) if power == 2 else value


__all__ = ["OTPlanSampler", "wasserstein"]
