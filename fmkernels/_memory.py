"""Memory for the outputs of native CPU kernels: large ones come from a pool that keeps freed blocks.

PyTorch's CPU allocator returns large blocks to the system, and the page faults of the next allocation cost more than
a fused kernel. The pool keeps at most 1 GiB of freed blocks (FMKERNELS_CPU_POOL_MB, 0 for none).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import _cache, _native
from ._checks import check_int

# Below, the C library tends to keep freed blocks itself.
POOL_FROM_BYTES = 16 << 20

_limit: int | None = None  # in bytes, once the compiled library knows it


def set_cpu_pool_limit(megabytes: int) -> None:
    """Keeps at most so many MiB of freed large CPU outputs for the next calls; 0 returns all to the system."""
    global _limit
    check_int("megabytes", megabytes, low=0, high=2**42)
    _native.library().pool_limit(megabytes << 20)
    _limit = megabytes << 20


def _pool_info() -> _cache.CacheInfo:
    """Of the pool; does not load the compiled library."""
    if _limit is None:
        return _cache.CacheInfo(None, 0, None, None, _default_megabytes() << 20)
    return _cache.CacheInfo(None, _native.library().pool_cached_bytes(), None, None, _limit)


def _clear_pool() -> None:
    if _limit is not None:
        _native.library().pool_limit(0)
        _native.library().pool_limit(_limit)


_cache.report("cpu_pool", _pool_info, _clear_pool)


def _default_megabytes() -> int:
    return int(os.environ.get("FMKERNELS_CPU_POOL_MB", "1024"))


def _pooled(dtype: torch.dtype, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    elements = size.numel()
    if _limit is None:
        set_cpu_pool_limit(_default_megabytes())
    block = torch.frombuffer(_native.library().Block(elements * dtype.itemsize), dtype=dtype)
    # set_ instead of a view of the block: autograd treats views specially
    return torch.empty(0, dtype=dtype, device="cpu").set_(block.untyped_storage(), 0, size, stride)


def empty(size: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty for an output."""
    if device.type == "cpu" and size.numel() * dtype.itemsize >= POOL_FROM_BYTES:
        return _pooled(dtype, size, torch.empty(size, dtype=dtype, device="meta").stride())
    # PyTorch reads ints twice as fast as a torch.Size
    return torch.empty(*size, dtype=dtype, device=device) if size else torch.empty((), dtype=dtype, device=device)


def empty_like(data: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """torch.empty_like for an output: the same shape, device and memory format, and dtype if none is given."""
    dtype = data.dtype if dtype is None else dtype
    if data.is_cpu and data.numel() * dtype.itemsize >= POOL_FROM_BYTES:
        return _pooled(dtype, data.shape, torch.empty_like(data, device="meta").stride())
    return torch.empty_like(data, dtype=dtype)
