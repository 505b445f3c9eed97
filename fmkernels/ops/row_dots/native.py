"""`row_dots` on the compiled library: addresses in, status out; serves CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _native
from .._operands import compute_dtype, in_one_order


def run(tensors: Sequence[Tensor], first: Sequence[int], second: Sequence[int]) -> Tensor:
    """Entry [b, p] is the sum over row b of tensors[first[p]] * tensors[second[p]], index -1 being ones."""
    data = tensors[0]
    rows, elements, pairs = data.shape[0], data.numel(), len(first)
    out = torch.empty((rows, pairs), dtype=compute_dtype(data), device=data.device)
    if elements == 0:
        return out.zero_()
    ordered = in_one_order(list(tensors), (), False)
    workspace = _native.workspace(data, rows, pairs)
    _native.launch(
        _native.library().row_dots,
        data,
        _native.DEVICE_CODE[data.device.type],
        _native.DTYPE_CODE[data.dtype],
        rows,
        elements // rows,
        [tensor.data_ptr() for tensor in ordered],
        first,
        second,
        out.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
    )
    return out
