"""`step_control` on the compiled library: addresses in; serves CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _native
from .._operands import compute_dtype, row_stride


def wanted_times(wanted: Tensor | None) -> tuple[int, int, int]:
    """(address, count, distance of two rows) of requested times, each row of which is dense."""
    if wanted is None:
        return 0, 0, 0
    stride = row_stride(wanted)
    if stride is None:
        raise ValueError(f"wanted: expected dense rows, got strides {wanted.stride()}")
    return wanted.data_ptr(), wanted.shape[1], stride


def run(
    clock: Tensor,
    count: Tensor,
    step: Tensor,
    times: Tensor,
    error: Tensor,
    rules: Sequence[float],
    nodes: Sequence[float],
    wanted: Tensor | None,
    start: bool,
) -> None:
    """See step_control."""
    error = error.to(compute_dtype(step)).contiguous()
    if wanted is not None and row_stride(wanted) is None:
        wanted = wanted.contiguous()
    _native.launch(
        _native.library().step_control,
        clock,
        _native.on_host(clock),
        clock.shape[1],
        clock.data_ptr(),
        count.data_ptr(),
        _native.DTYPE_CODE[step.dtype],
        error.data_ptr(),
        step.data_ptr(),
        _native.DTYPE_CODE[times.dtype],
        times.data_ptr(),
        nodes,
        rules,
        wanted_times(wanted),
        start,
    )
