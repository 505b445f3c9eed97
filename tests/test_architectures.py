"""Whether the compiled CUDA kernels run on the GPUs that are there, and what happens where they do not."""

from __future__ import annotations

import pytest
import torch

from fmkernels import _dispatch, _native


def devices(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")


BUILT = ["80", "86", "90"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_code_runs_on_its_major_version_and_ptx_on_what_is_newer(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices(monkeypatch, (9, 0), capability)
    assert _native.missing_architecture(BUILT) is None


@pytest.mark.parametrize(
    ("built", "capability"), [(BUILT, (7, 5)), (["86"], (8, 0)), (["90"], (8, 9)), (["80", "120"], (10, 0))]
)
def test_what_no_code_runs_on_is_named(
    built: list[str], capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices(monkeypatch, divmod(max(map(int, built)), 10), capability)
    reason = _native.missing_architecture(built)
    assert reason is not None
    assert f"{', '.join(built)}, none that runs on cuda:1, GPU 1, of {capability[0]}{capability[1]}" in reason


def test_nothing_was_built() -> None:
    assert _native.missing_architecture([]) == "the compiled library was built without CUDA"


def test_auto_falls_back_with_the_reason(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    devices(monkeypatch, (7, 5))

    class Built:
        @staticmethod
        def cuda_architectures() -> list[str]:
            return BUILT

    monkeypatch.setattr(_native, "_load", lambda: (Built, None))
    monkeypatch.setattr(_dispatch, "_PREFERENCE", {("combine", "cuda"): ("native", "reference")})
    _dispatch.chosen.cache_clear()
    request.addfinalizer(_dispatch.chosen.cache_clear)
    with pytest.warns(UserWarning, match="native combine is not available on cuda: .*none that runs on cuda:0"):
        assert _dispatch.chosen("combine", "cuda", "auto") == "reference"
    with pytest.raises(RuntimeError, match="expected an available implementation of combine on cuda, got 'native'"):
        _dispatch.chosen("combine", "cuda", "native")
