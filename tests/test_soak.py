"""Many calls, no two alike: the memory stays flat, and models die.

FMKERNELS_TEST_SOAK=10000 makes so many calls, and prints what it measures (pytest -s).
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from settings_space import PATHS
from torch import Tensor, nn

import fmkernels as fm
from fmkernels import _cache
from fmkernels.solvers.methods import registry

CALLS = int(os.environ.get("FMKERNELS_TEST_SOAK", "0"))
STATM = Path("/proc/self/statm")
FIXED = [name for name, entry in registry.METHODS.items() if entry.kind in ("fixed", "adaptive", "sde")]
ADAPTIVE = [name for name, entry in registry.METHODS.items() if entry.kind == "adaptive" and entry.order > 2]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LIMIT = 2 << 20  # of what is kept on the host, so that a few calls fill it


class Net(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | float = 0.0) -> Tensor:
        return torch.sin(x * self.weight.to(x.dtype)) + y


def swapped(net: Net, t: Tensor, y: Tensor) -> Tensor:
    return net(y, t)


def resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kept() -> int:
    return sum(info.bytes for kind, info in fm.cache_info().items() if kind != "cpu_pool")


def different_calls(models: list[weakref.ref[Any]]) -> Iterator[Any]:
    """Calls that differ in sizes, dtypes, settings, and often in the model."""
    net, size = Net(1), 1
    for i in range(10**9):
        if i % 3 == 0:
            size = 1 + i % 37
            net = Net(size)
            models.append(weakref.ref(net))
        rows = 1 + (i * 7919) % 4001
        x = torch.randn(rows, size).to(DTYPES[i // 5 % 3])
        # parameters below their limits, never the same twice
        kind = PATHS[i % len(PATHS)]
        path = kind(1.0 + 1e-3 * i) if kind is fm.paths.Polynomial else kind()
        if isinstance(path, fm.paths.VP):
            path.beta_max = 5.0 + 1e-3 * i
        scale: Any = 1.0 + 1e-3 * i
        if i % 4 == 0:
            weight = scale
            scale = lambda t, weight=weight: weight * t  # noqa: E731
        guidance = (
            None,
            fm.guidance.CFG(scale, negative={"y": 0.0}, rescale=0.5),
            fm.guidance.APG(scale, negative={"y": 0.0}, eta=0.3),
            fm.guidance.AutoGuidance(Net(size), scale),
        )[i // 2 % 4]
        given: dict[str, Any] = {"path": path, "guidance": guidance}
        if isinstance(guidance, (fm.guidance.CFG, fm.guidance.APG)):
            given["y"] = torch.ones(rows)[:, None]
        turn = i % 8
        if turn < 4:
            method = FIXED[i // 8 % len(FIXED)]
            yield fm.sample(net, x, method=method, steps=1 + i % 11, schedule=fm.times.Shift(1.0 + 1e-3 * i), **given)
        elif turn == 4:
            yield fm.sample(net, x[:16], method=ADAPTIVE[i // 8 % len(ADAPTIVE)],
                            rtol=1e-2 + 1e-6 * i, atol=1e-2, max_steps=20)  # fmt: skip
        elif turn == 5:
            t = torch.linspace(0.0, 1.0, 2 + i % 5)
            method = "rk4" if i % 16 < 8 else "dopri5"
            yield fm.odeint(partial(swapped, net), x, t, method=method, rtol=1e-2, atol=1e-2)
        elif turn == 6:
            yield fm.log_prob(net, x[:8].float(), steps=1 + i % 5, method="midpoint", divergence="hutchinson")
        else:
            batch = path.sample(x.float())
            pred = net(batch.x_t, batch.t)
            loss = fm.cfm_loss(pred, batch, weight="snr" if i % 16 < 8 else None)
            loss.backward()
            yield loss


def widths(net: nn.Module) -> Iterator[Any]:
    """One plan for ever more batch sizes."""
    for rows in range(1, 10**9):
        yield fm.sample(net, torch.zeros(rows, 2), steps=20, method="heun2")


def soak(calls: Iterator[Any], count: int, name: str) -> None:
    marks = []
    for number, _ in enumerate(islice(calls, count)):
        if number % max(1, count // 10) == 0:
            gc.collect()
            marks.append(resident() if STATM.exists() else 0)
        assert kept() <= LIMIT
    gc.collect()
    marks.append(resident() if STATM.exists() else 0)
    mib = [round(mark / 2**20, 1) for mark in marks]
    print(f"{name}: {count} calls, resident {mib} MiB, kept {kept() / 2**20:.2f} MiB")
    # after the first fifth; a short run still loads code, and the allocator takes what it needs
    assert marks[-1] - marks[2] < (24 if CALLS else 48) * 2**20


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fm.clear_caches()
    monkeypatch.setattr(_cache.HOST, "limit", LIMIT)
    pool = fm.cache_info()["cpu_pool"].limit >> 20
    fm.set_cpu_pool_limit(0)
    yield
    fm.set_cpu_pool_limit(pool)


def test_memory_is_flat_and_models_die() -> None:
    models: list[weakref.ref[Any]] = []
    calls = different_calls(models)
    soak(calls, CALLS or 120, "different calls")
    del calls  # and with it the last model
    gc.collect()
    assert len(models) >= 40
    assert [number for number, model in enumerate(models) if model() is not None] == []


def test_memory_is_flat_over_batch_sizes() -> None:
    net = Net(1)
    soak(widths(net), 4000 if CALLS else 150, "batch sizes")
    assert fm.cache_info()["plan"].entries == 1
