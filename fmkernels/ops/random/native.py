"""The random operation on the compiled library; serves CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _memory, _native
from . import kinds


def run(size: Sequence[int], seed: Tensor, kind: int, stream: int, offset: int, dtype: torch.dtype) -> Tensor:
    shape = size if type(size) is torch.Size else torch.Size(size)
    out = _memory.empty(shape, dtype, seed.device)
    if shape.numel():
        _native.launch(
            _native.library().random,
            out,
            _native.DEVICE_CODE[out.device.type],
            _native.DTYPE_CODE[dtype] if kind != kinds.WORDS else 0,
            kind,
            out.data_ptr(),
            shape.numel(),
            seed.data_ptr(),
            stream,
            offset,
        )
    return out
