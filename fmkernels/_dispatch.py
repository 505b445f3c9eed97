"""Which implementation of an operation runs.

``impl="auto"`` reads a static table per device; the order comes from the measurements under benchmarks/results. The
environment variable FMKERNELS_IMPL replaces "auto" for a whole process. Any other choice is explicit: it runs, or it
raises and says why. Under a functorch transform (vmap, grad, jvp, ...) or forward-mode AD a compiled kernel would
silently give zero derivatives, so there "auto" takes the reference and an explicit kernel raises; also while
torch.compile traces.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _native, _torch
from ._checks import check_choice, warn

IMPLS = ("auto", "reference", "native", "triton")
OPS = ("combine", "regression_loss", "random", "row_dots")

# Preference of "auto", first available wins. One row an operation and device type.
_PREFERENCE: dict[tuple[str, str], tuple[str, ...]] = {
    **{(op, "cpu"): ("native", "reference") for op in OPS},
    **{(op, "cuda"): ("native", "triton", "reference") for op in OPS},
    **{("step_control", device): ("native", "reference") for device in ("cpu", "cuda")},
}
_ENVIRONMENT = os.environ.get("FMKERNELS_IMPL", "auto")
if _ENVIRONMENT not in IMPLS:
    raise ValueError(f"FMKERNELS_IMPL: expected one of {', '.join(IMPLS)}, got {_ENVIRONMENT!r}")


def backward_impl(impl: str, grad: Tensor) -> str:
    """The implementation of a backward pass: the reference for a batch of gradients (``is_grads_batched``), which has
    no address."""
    return "reference" if not torch.compiler.is_compiling() and _torch.legacy_batched(grad) else impl


def wanted(impl: str) -> str:
    """The implementation a call asks for, after the environment variable; "reference" where a transform is active."""
    if type(impl) is not str:
        check_choice("impl", impl, IMPLS)
    if impl == "auto":
        impl = _ENVIRONMENT
    elif impl not in IMPLS:
        check_choice("impl", impl, IMPLS)
    if impl != "reference" and _torch.transform_active():
        if impl != "auto":
            raise RuntimeError(
                f"impl: expected 'auto' or 'reference' under a torch.func transform or forward-mode AD, got {impl!r}: "
                "compiled kernels have no derivative there"
            )
        return "reference"
    return impl


def untraced() -> bool:
    """True where nobody traces or intercepts operators, so that calling PyTorch's dispatcher may be spared."""
    if torch.compiler.is_compiling():
        return False
    if _torch.jit_tracing():
        raise RuntimeError(
            "fmkernels: expected torch.compile or torch.export, got torch.jit.trace, which would record the kernels' "
            "results as constants (impl='reference' is plain PyTorch and can be traced)"
        )
    return _torch.dispatch_modes() == 0


def plain(*tensors: Tensor | None) -> bool:
    """True where an operation may run without PyTorch's dispatcher, which costs more than a small kernel."""
    if not untraced():
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not Parameter and tensor is not None:
            return False
    return True


@functools.cache
def _plain_library() -> ModuleType | None:
    chosen_natively = all(chosen(op, "cpu", _ENVIRONMENT) == "native" for op in OPS)
    return _native.library() if chosen_natively else None


def plain_library(impl: str) -> ModuleType | None:
    """The compiled library where its calls on plain tensors may be tried first: see python/plain.h."""
    if type(impl) is not str or impl != "auto" or _torch.intercepted():
        return None
    return _plain_library()


def plain_device_hooks() -> tuple[Callable[[int], int], Callable[[], int]] | None:
    """What such calls ask torch before they launch on a CUDA device: its current stream, and which device is current.
    None where "auto" takes other kernels there."""
    chosen_natively = all(chosen(op, "cuda", _ENVIRONMENT) == "native" for op in OPS)
    return _torch.launch_hooks() if chosen_natively else None


def unavailable(impl: str, device_type: str) -> str | None:
    """Why an implementation cannot run on a device type, or None if it can."""
    if impl == "reference":
        return None
    if impl == "native":
        return _native.missing(device_type)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "Triton kernels need a CUDA device (or its interpreter: set TRITON_INTERPRET=1 before the first use)"
    return None


def has_kernels(op: str, impl: str) -> bool:
    return importlib.util.find_spec(f"fmkernels.ops.{op}.{impl}") is not None


@functools.cache
def chosen(op: str, device_type: str, impl: str) -> str:
    """The implementation that runs for a wanted one; raises if an explicit one cannot."""
    if impl == "auto":
        preference = _PREFERENCE.get((op, device_type), ("reference",))
        for candidate in preference:
            reason = unavailable(candidate, device_type)
            if reason is None:
                return candidate
            warn(f"fmkernels: {candidate} {op} is not available on {device_type}: {reason}")
    reason = f"it has no {impl} kernels" if not has_kernels(op, impl) else unavailable(impl, device_type)
    if reason is not None:
        raise RuntimeError(
            f"impl: expected an available implementation of {op} on {device_type}, got {impl!r}: {reason}"
        )
    return impl


@functools.cache
def implementation(op: str, device_type: str, impl: str) -> ModuleType:
    """The module that runs; each has a function ``run`` of the operation's own signature."""
    return importlib.import_module(f"fmkernels.ops.{op}.{chosen(op, device_type, impl)}")
