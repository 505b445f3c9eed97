"""A small network as a field, a loss of its solutions, and the peer that gradients are compared with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

try:
    import torchdiffeq as peer  # type: ignore[import-not-found]
except ImportError:
    peer = None
needs_peer = pytest.mark.skipif(peer is None, reason="torchdiffeq is not installed")

D = torch.float64


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = D) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, dtype=dtype))
        self.v = nn.Parameter(torch.randn(6, 2, dtype=dtype) * 0.5)
        self.unused = nn.Parameter(torch.randn(2, dtype=dtype))

    def forward(self, t: Tensor, y: Any) -> Any:
        if not isinstance(y, Tensor):
            a, b = y
            return self(t, a), -b * a.mean()
        return torch.tanh(torch.cat([y, t.expand(*y.shape[:-1], 1)], -1) @ self.w) @ self.v

    def used(self) -> list[Tensor]:
        return [self.w, self.v]


def loss_of(y: Any) -> Tensor:
    parts = (y,) if isinstance(y, Tensor) else y
    return sum(((i + 1) * (part**2)[1:].sum() + part[1].sin().sum() for i, part in enumerate(parts)), torch.zeros(()))


def assert_all_close(ours: Any, theirs: Any, tol: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)
