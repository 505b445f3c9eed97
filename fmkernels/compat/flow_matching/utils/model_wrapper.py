"""A model with a forward pass of one's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ModelWrapper(nn.Module):
    """A model with a forward pass of one's own; this one calls it as model(x=x, t=t, **extras).

    Args:
        model: what is wrapped, ``self.model``; any callable, or None.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        """The model's output at x, (B, ...), and times t, () or (B,)."""
        return self.model(x=x, t=t, **extras)  # type: ignore[no-any-return]


__all__ = ["ModelWrapper"]
