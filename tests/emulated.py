"""CPU tensors in the place of a GPU's: what runs on a GPU is run by the emulator of tests/cpp/simt.

``make test-emulated`` (tools/emulated.sh) runs the tests of operations, adaptive steps, programs and sampling so, with
a library whose CUDA launchers are emulated. Everything on the way to a launch is the project's own: bindings,
workspaces, layouts, seeds, the engine of adaptive steps. Streams and graphs there are none.
"""

from __future__ import annotations

import torch

from fmkernels import _native


def _scratch(data: torch.Tensor, doubles: int) -> torch.Tensor:
    """As on a GPU, but what nobody has written is NaN."""
    return torch.full((doubles,), float("nan"), dtype=torch.float64, device=data.device)


def install() -> None:
    """Before the first call of the library."""
    version = _native.library().build_info()["cuda_compiler"]
    if version != "emulated":
        raise RuntimeError(f"FMKERNELS_TEST_LIBRARY: expected a library of emulated kernels, got one by {version}")
    _native.DEVICE_CODE["cpu"] = _native.DEVICE_CODE["cuda"]
    _native.on_host = lambda tensor: False
    _native.scratch = _scratch
