"""Penalties rho(d) of a residual d = pred - target; the codes of csrc/regression_loss/penalty.h."""

import torch

KINDS = {"squared": 0, "huber": 1, "pseudo_huber": 2, "l1": 3}


def bend(delta: float, dtype: torch.dtype) -> float:
    """delta within the normal numbers of the dtype in which the loss is formed."""
    limits = torch.finfo(dtype)
    return min(max(delta, limits.tiny), limits.max)
