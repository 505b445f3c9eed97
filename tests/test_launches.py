"""How many kernels a step of training launches: ours as the emulator counts them, PyTorch's as its profiler does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fmkernels as fm
from fmkernels import _native

pytestmark = pytest.mark.skipif(
    not os.environ.get("FMKERNELS_TEST_EMULATED"), reason="counted by tests/cpp/simt: make test-emulated"
)

# Operators that launch nothing on a device, and those that another one does the work of.
SILENT = ("empty", "empty_like", "empty_strided", "detach", "alias", "view", "as_strided", "select", "randint")


def launches(step: Callable[[], Any]) -> Counter[str]:
    step()
    before = Counter(_native.library().emulated_launches())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found = Counter(_native.library().emulated_launches())
    found.subtract(before)
    names = [event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::")]
    return +found + Counter(name for name in names if name not in SILENT)


def training_step(path: fm.paths.Path, shape: tuple[int, ...]) -> Callable[[], Any]:
    x_1, pred = torch.randn(shape), torch.randn(shape, requires_grad=True)
    one = torch.ones(())  # which PyTorch makes for each backward() without it

    def step() -> None:
        loss = fm.cfm_loss(pred, path.sample(x_1, store_noise=False))
        loss.backward(one)
        pred.grad = None

    return step


@pytest.fixture(autouse=True)
def _no_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory as a GPU's, which nobody fills."""

    def empty(data: torch.Tensor, doubles: int) -> torch.Tensor:
        return torch.empty(doubles, dtype=torch.float64, device=data.device)

    monkeypatch.setattr(_native, "scratch", empty)


@pytest.mark.parametrize("shape", [(256, 2), (16, 4, 33, 35)], ids=str)
@pytest.mark.parametrize("path", [fm.paths.CondOT(), fm.paths.VP(), fm.paths.Cosine()], ids=repr)
def test_a_training_step(path: fm.paths.Path, shape: tuple[int, ...]) -> None:
    """The seed, the times (with the schedule at them), the point, the loss (in parts where it is large), its scale."""
    found = launches(training_step(path, shape))
    assert found.total() <= 5 + (shape != (256, 2)), found
