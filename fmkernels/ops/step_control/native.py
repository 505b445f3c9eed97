"""`step_control` on the compiled library: addresses in; serves CPU and CUDA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _native
from .._operands import compute_dtype


def wanted_times(wanted: Tensor | None) -> tuple[int, int, int]:
    """(address, count, distance of two rows) of requested times."""
    if wanted is None:
        return 0, 0, 0
    # one row has no distance to the next: torch may give it any stride
    return wanted.data_ptr(), wanted.shape[1], wanted.stride(0) if wanted.shape[0] > 1 else 0


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
    error = error.to(compute_dtype(step))
    _native.launch(
        _native.library().step_control,
        clock,
        clock.is_cpu,
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
