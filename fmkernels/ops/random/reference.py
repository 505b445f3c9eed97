"""Philox words, uniforms and normals in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...random import normals, philox_words, uniforms
from . import kinds


def run(size: Sequence[int], seed: Tensor, kind: int, stream: int, offset: int, dtype: torch.dtype) -> Tensor:
    count = math.prod(size)
    if kind == kinds.WORDS:
        flat = philox_words(seed, stream, offset, count)
    else:
        flat = (normals if kind == kinds.NORMAL else uniforms)(seed, stream, offset, count, dtype)
    return flat.reshape(tuple(size))
