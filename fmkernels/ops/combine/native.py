"""`combine` on the compiled library: addresses in, status out; serves CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _native
from .._operands import TENSOR, compute_dtype, in_one_order, lookup, row_elements


def run(
    tensors: Sequence[Tensor],
    streams: Sequence[int],
    offsets: Sequence[int],
    coefs: Sequence[Tensor | None],
    values: Sequence[float],
    error_coefs: Sequence[Tensor | None],
    error_values: Sequence[float],
    atol: float,
    rtol: float,
    want_norm: bool,
    store_noise: bool,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Returns [y, *noise drawn (if stored), norm (if wanted)]; y is ``out`` where that is given."""
    data = tensors[0]
    dtype = compute_dtype(data)
    y = torch.empty_like(data) if out is None else out
    norm = torch.empty(data.shape[0], dtype=dtype, device=data.device) if want_norm else None
    noises = [
        torch.empty(data.shape, dtype=data.dtype, device=data.device) if store_noise and s != TENSOR else None
        for s in streams
    ]
    results = [y, *(z for z in noises if z is not None), *([] if norm is None else [norm])]
    if data.numel() == 0:
        return results if norm is None else [*results[:-1], norm.zero_()]

    leading = [*coefs, *error_coefs]
    plain = [t for t, s in zip(tensors, streams, strict=True) if s == TENSOR]
    ordered = in_one_order([*plain, y], leading, len(plain) < len(tensors))
    *plain, target = ordered  # target is y itself, or a scratch in contiguous order where y is laid out otherwise
    rest = iter(plain)
    operands = [next(rest) if s == TENSOR else t for t, s in zip(tensors, streams, strict=True)]

    samples = data.shape[0] if want_norm else 1
    inner = row_elements(data, leading, samples)
    lookups = [lookup(c, v, data, inner) for c, v in zip(coefs, values, strict=True)]
    errors = [lookup(c, v, data, inner) for c, v in zip(error_coefs, error_values, strict=True)]
    library = _native.library()
    device = _native.DEVICE_CODE[data.device.type]
    workspace = None
    if norm is not None:
        count = library.workspace_elements(device, data.numel(), samples)
        workspace = torch.empty(count, dtype=torch.float64, device=data.device)
    library.combine(
        device,
        _native.DTYPE_CODE[data.dtype],
        target.data_ptr(),
        data.numel() // inner,
        inner,
        [t.data_ptr() for t in operands],
        streams,
        offsets,
        [0 if z is None else z.data_ptr() for z in noises],
        [(0 if c.tensor is None else c.tensor.data_ptr(), c.rows_per_entry, c.stride, c.value) for c in lookups],
        [(0 if c.tensor is None else c.tensor.data_ptr(), c.rows_per_entry, c.stride, c.value) for c in errors],
        atol,
        rtol,
        0 if norm is None else norm.data_ptr(),
        samples,
        0 if workspace is None else workspace.data_ptr(),
        _native.stream_of(data),
    )
    if target is not y:
        y.copy_(target)
    return results
