"""Draws from categorical distributions."""

from __future__ import annotations

import torch
from torch import Tensor


def categorical(probs: Tensor) -> Tensor:
    """Draws indices from probabilities, or weights, along the last dimension: shape probs.shape[:-1]."""
    return torch.multinomial(probs.flatten(0, -2), 1, replacement=True).view(*probs.shape[:-1])


__all__ = ["categorical"]
