"""`combine` on the compiled library: addresses in, status out; serves CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _memory, _native
from .._operands import TENSOR, compute_dtype, evenly_spaced, in_one_order, lookups, row_elements


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
    y = _memory.empty_like(data) if out is None else out
    results = [y]
    noises = [0] * len(tensors)
    has_noise = max(streams) > TENSOR
    if store_noise:
        for i, stream in enumerate(streams):
            if stream != TENSOR:
                results.append(_memory.empty(data.shape, data.dtype, data.device))
                noises[i] = results[-1].data_ptr()
    elements = data.numel()
    samples = 1
    norm = workspace = None
    library = _native.library()
    device = _native.DEVICE_CODE[data.device.type]
    if want_norm:
        samples = data.shape[0]
        norm = torch.empty(samples, dtype=compute_dtype(data), device=data.device)
        results.append(norm)
    if elements == 0:
        if norm is not None:
            norm.zero_()
        return results
    if norm is not None:
        workspace = _native.workspace(data, samples)

    coefs = evenly_spaced(coefs)
    error_coefs = evenly_spaced(error_coefs)
    leading = [*coefs, *error_coefs]
    if has_noise:
        plain = [i for i, s in enumerate(streams) if s == TENSOR]
        ordered = in_one_order([*(tensors[i] for i in plain), y], leading, True)
        operands = list(tensors)
        for i, tensor in zip(plain, ordered[:-1], strict=True):
            operands[i] = tensor
    else:
        ordered = in_one_order([*tensors, y], leading, False)
        operands = ordered[:-1]
    target = ordered[-1]  # y itself, or a scratch in contiguous order where y is laid out otherwise

    inner = row_elements(elements, leading, samples)
    _native.launch(
        library.combine,
        data,
        device,
        _native.DTYPE_CODE[data.dtype],
        target.data_ptr(),
        elements // inner,
        inner,
        [t.data_ptr() for t in operands],
        streams,
        offsets,
        noises,
        lookups(coefs, values, elements, inner),
        lookups(error_coefs, error_values, elements, inner) if error_values else [],
        atol,
        rtol,
        0 if norm is None else norm.data_ptr(),
        samples,
        0 if workspace is None else workspace.data_ptr(),
    )
    if target is not y:
        y.copy_(target)
    return results
