"""What an expert writes in plain PyTorch, and beside it the formula as it stands in a paper.

The expert's form makes no tensor that it need not make: ``torch.lerp``, ``addcmul``, sums in place. Losses are taken in
float32, as training scripts and autocast do; ``half_loss`` is the mean squared error in the data's own dtype, which
moves fewer bytes and rounds more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def per_row(c: Tensor, data: Tensor) -> Tensor:
    return c.to(data.dtype).view(-1, *[1] * (data.dim() - 1))


def path(x_1: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    return torch.lerp(x_0, x_1, per_row(t, x_1))


def naive_path(x_1: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    t = per_row(t, x_1)
    return t * x_1 + (1 - t) * x_0


def loss(pred: Tensor, x_1: Tensor, x_0: Tensor) -> Tensor:
    return F.mse_loss(pred.float(), (x_1 - x_0).float())


def half_loss(pred: Tensor, x_1: Tensor, x_0: Tensor) -> Tensor:
    return F.mse_loss(pred, x_1 - x_0)


def masked_loss(pred: Tensor, x_1: Tensor, x_0: Tensor, mask: Tensor) -> Tensor:
    square = F.mse_loss(pred.float(), (x_1 - x_0).float(), reduction="none")
    m = mask.unsqueeze(-1)
    return (square * m).sum() / (m.sum() * square.shape[-1])


def combine(operands: list[Tensor], coefficients: list[float]) -> Tensor:
    y = operands[0] * coefficients[0]
    for c, k in zip(coefficients[1:], operands[1:], strict=True):
        y.add_(k, alpha=c)
    return y


def naive_combine(operands: list[Tensor], coefficients: list[float]) -> Tensor:
    y = coefficients[0] * operands[0]
    for c, k in zip(coefficients[1:], operands[1:], strict=True):
        y = y + c * k
    return y


def randn(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(size, dtype=dtype, device=device)


def gradient(loss: Tensor, pred: Tensor) -> Tensor:
    return torch.autograd.grad(loss, pred)[0]
