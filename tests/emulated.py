"""CPU tensors in the place of a GPU's: what runs on a GPU is run by the emulator of tests/cpp/simt.

``make test-emulated`` (tools/emulated.sh) runs the tests of operations, adaptive steps, programs and sampling so, with
a library whose CUDA launchers are emulated. Everything on the way to a launch is the project's own: bindings,
workspaces, layouts, seeds, the engine of adaptive steps. Streams and graphs there are none.
"""

from __future__ import annotations

import torch

from fmkernels import _dispatch, _native


def _workspace(data: torch.Tensor, groups: int, sums: int = 1) -> torch.Tensor:
    """As on a GPU, but what nobody has written is NaN."""
    count = sums * _native.library().cuda_workspace_elements(data.numel(), groups)
    return torch.full((count,), float("nan"), dtype=torch.float64, device=data.device)


def install() -> None:
    """Before the first call of the library."""
    version = _native.library().build_info()["cuda_compiler"]
    if version != "emulated":
        raise RuntimeError(f"FMKERNELS_TEST_LIBRARY: expected a library of emulated kernels, got one by {version}")
    _native.DEVICE_CODE["cpu"] = _native.DEVICE_CODE["cuda"]
    _native.on_host = lambda tensor: False
    _native.workspace = _workspace
    _dispatch.plain_library = lambda impl: None  # the short way of CPU tensors
