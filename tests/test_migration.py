"""docs/migration.md: each row of its tables is run, by the drop-in, natively, and by the peer where it is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmkernels as fm

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "migration.md").read_text()
MODULES = {
    "torchcfm": ["torchcfm"],
    "flow_matching": ["flow_matching.path", "flow_matching.path.scheduler", "flow_matching.solver"],
    "torchdiffeq": ["torchdiffeq"],
    "SiT": ["sit"],
}


def rows() -> list[tuple[str, str, str, str]]:
    found, section = [], ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            section = line[3:]
        cells = line.strip("| ").split(" | ") if line.startswith("| ") else []
        if section in MODULES and len(cells) >= 2 and cells[1].startswith("`"):
            found.append((section, cells[0], cells[1].strip("` |"), cells[2].strip("` |") if len(cells) > 2 else ""))
    return found


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y


def names(modules: list[str]) -> dict[str, Any]:
    torch.manual_seed(0)
    space: dict[str, Any] = {
        "torch": torch,
        "fm": fm,
        "field": Field(),
        "x0": torch.randn(8, 2),
        "x1": torch.randn(8, 2),
    }
    space["net"] = lambda x, t: -x + t.reshape(-1, 1) if t.dim() else -x + t
    for module in modules:
        space |= vars(importlib.import_module(module))
    return space


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors(part)]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    return tensors(list(vars(value).values())) if hasattr(value, "__dict__") else []


def evaluate(code: str, modules: list[str]) -> list[Tensor]:
    space = names(modules)
    torch.manual_seed(1)
    return tensors(eval(code, space))


def test_the_tables_are_read() -> None:
    assert len(rows()) >= 19
    assert {section for section, *_ in rows()} == set(MODULES)


@pytest.mark.parametrize(("section", "what", "ours", "native"), rows(), ids=[f"{r[0]}-{r[1]}" for r in rows()])
def test_a_row(section: str, what: str, ours: str, native: str) -> None:
    if "OptimalTransport" in ours or "Schrodinger" in ours:
        pytest.importorskip("ot")
    found = evaluate(ours, [f"fmkernels.compat.{module}" for module in MODULES[section]])
    assert found
    assert all(torch.isfinite(tensor).all() for tensor in found)
    if native:
        value = eval(native, names([]))
        assert value is not None
    if section in ("flow_matching", "torchdiffeq"):
        pytest.importorskip(section)
        if what in ("a conversion", "another schedule"):  # where a time for each sample is not spread over it
            with pytest.raises(RuntimeError, match="must match the size"):
                evaluate(ours, MODULES[section])
            return
        want = evaluate(ours, MODULES[section])
        assert len(found) == len(want)
        for a, b in zip(found, want, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert (a - b).abs().max() < 1e-4 * (1 + b.abs().max())


def test_the_blocks_run() -> None:
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64), 0)
    scheduler = SimpleNamespace(alphas_cumprod=table, config=SimpleNamespace(prediction_type="epsilon"))
    space = {"fm": fm, "scheduler": scheduler, "unet": lambda x, k: 0.1 * x, "flow": lambda x, t: -x}
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "from_diffusers" in b]
    exec(block, space)
    x = torch.randn(2, 3)
    assert torch.isfinite(space["denoiser"](x, torch.tensor([0.5, 2.0]))).all()  # type: ignore[operator]
    assert torch.isfinite(space["noise"](x, 50)).all()  # type: ignore[operator]
