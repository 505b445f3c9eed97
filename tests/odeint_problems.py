"""Problems of the tests of `fm.odeint`: the cubic spiral, a linear one with its solution, a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

D = torch.float64
SPIRAL = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=D)


def times(*values: float, dtype: torch.dtype = D) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def spiral(t: Tensor, y: Tensor) -> Tensor:
    """The cubic spiral of torchdiffeq's ode_demo."""
    return (y**3) @ SPIRAL.to(y.dtype)


def spiral_y0(dtype: torch.dtype = D) -> Tensor:
    return torch.tensor([[2.0, 0.0]], dtype=dtype)


class Linear:
    """y' = A y + b t with a solution by the matrix exponential of the state with (t, 1) appended."""

    def __init__(self, dtype: torch.dtype = D) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn(3, 3, dtype=D, generator=generator) * 0.7
        self.b = torch.randn(3, dtype=D, generator=generator)
        self.y0 = torch.randn(4, 3, dtype=D, generator=generator).to(dtype)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.a.to(y.dtype).T + self.b.to(y.dtype) * t.to(y.dtype)

    def exact(self, t: Tensor) -> Tensor:
        whole = torch.zeros(5, 5, dtype=D)
        whole[:3, :3], whole[:3, 3], whole[3, 4] = self.a, self.b, 1.0
        rows = []
        for now in t.double():
            start = torch.cat([self.y0.double(), torch.full((4, 1), float(t[0])), torch.ones(4, 1)], 1).double()
            rows.append((start @ torch.linalg.matrix_exp(whole * (now - t[0])).T)[:, :3])
        return torch.stack(rows)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(3, 4, dtype=D, generator=generator))
        self.v = nn.Parameter(torch.randn(4, 2, dtype=D, generator=generator) * 0.5)
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        t = t.to(y.dtype).reshape(-1, *[1] * (y.dim() - 1)).expand(*y.shape[:-1], 1)
        return torch.tanh(torch.cat([y, t], -1) @ self.w) @ self.v
