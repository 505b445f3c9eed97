"""`row_dots` in plain PyTorch: the oracle, and what vmap, jvp and double backward run on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._operands import compute_dtype
from ..library import sum_trailing


def run(tensors: Sequence[Tensor], first: Sequence[int], second: Sequence[int]) -> Tensor:
    """Entry [b, p] is the sum over row b of tensors[first[p]] * tensors[second[p]], index -1 being ones."""
    data = tensors[0]
    wide = [tensor.to(compute_dtype(data)) for tensor in tensors]
    columns = []
    for i, j in zip(first, second, strict=True):
        present = [wide[k] for k in (i, j) if k >= 0]
        if present:
            columns.append(sum_trailing(math.prod(present[1:], start=present[0]), 1))
        else:
            columns.append(wide[0].new_full(data.shape[:1], math.prod(data.shape[1:])))
    return torch.stack(columns, dim=1)
