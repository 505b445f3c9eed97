"""Loads the compiled library on first use and says why when it is missing."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch

# The dtype codes of csrc/common/dtype.h.
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
DEVICE_CODE = {"cpu": 0, "cuda": 1}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fmkernels._C"), None
    except ImportError as error:
        return None, f"the compiled library fmkernels._C did not load ({error})"


def missing(device_type: str) -> str | None:
    """Why native kernels cannot run on a device type, or None if they can."""
    module, reason = _load()
    if module is None:
        return reason
    if device_type == "cuda":
        return missing_architecture(module.cuda_architectures())
    if device_type not in DEVICE_CODE:
        return f"there are no native kernels for device type {device_type!r}"
    return None


def missing_architecture(built: Sequence[str]) -> str | None:
    """Why kernels of some architectures ("80", "90") cannot run on every GPU that is here, or None if they can.

    Machine code runs on devices of its major version and no lower minor one; the newest architecture is there as PTX
    too, which the driver compiles for what is newer.
    """
    if not built:
        return "the compiled library was built without CUDA"
    capabilities = [divmod(int(number), 10) for number in built]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if (major, minor) < max(capabilities) and not any(a == major and b <= minor for a, b in capabilities):
            return (
                f"the compiled library has kernels for CUDA architectures {', '.join(built)}, "
                f"none that runs on cuda:{index}, {torch.cuda.get_device_name(index)}, of {major}{minor}"
            )
    return None


@functools.cache
def library() -> ModuleType:
    """The compiled library; RuntimeError with the reason if it is missing."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def on_host(tensor: torch.Tensor) -> bool:
    """Whether the kernels of a tensor are the host's, which then sees their results at once."""
    return tensor.is_cpu


def stream(tensor: torch.Tensor) -> int:
    """The current stream of a tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def current_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's device the current one, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def launch(function: Callable[..., None], tensor: torch.Tensor, *args: Any) -> None:
    """Calls a function of the library on the tensor's device and its current stream, the last argument."""
    if on_host(tensor):
        function(*args, 0)
    else:
        with current_device(tensor):
            function(*args, stream(tensor))


def workspace(data: torch.Tensor, groups: int, sums: int = 1) -> torch.Tensor | None:
    """Scratch for the partial sums of reductions of data in equal groups; the CPU kernels need none."""
    if on_host(data):
        return None
    return scratch(data, sums * library().cuda_workspace_elements(data.numel(), groups))


def scratch(data: torch.Tensor, doubles: int) -> torch.Tensor:
    """Memory beside data that nobody has written."""
    return torch.empty(doubles, dtype=torch.float64, device=data.device)
