"""Triton kernels without a GPU: run in its interpreter against the reference, compiled ahead of time for four GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists on Linux only")


def interpreted(*arguments: str) -> str:
    """Runs tests in a process of its own, where Triton is its interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "FMKERNELS_TEST_TRITON": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize("operation", ["test_combine", "test_regression_loss"])
def test_random_cases_in_the_interpreter(operation: str) -> None:
    """Random shapes, layouts, dtypes, masks, noise at every phase."""
    interpreted("tests/test_ops_random.py", "-k", f"{operation} and triton")


def test_noise_in_the_interpreter() -> None:
    code = """
import torch, fmkernels as fm
from fmkernels.random import normals, philox_words, uniforms
for stream in (0, 1, 5, 2**33 + 7):
    for offset in (0, 3, 2**34 - 6):
        seed = torch.tensor(-(2**61) + 9)
        def draw(kind, dtype, impl="triton"):
            return torch.ops.fmkernels.random([37], seed, kind, stream, offset, dtype, impl)
        assert torch.equal(draw(0, torch.int64), philox_words(seed, stream, offset, 37))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            assert torch.equal(draw(1, dtype), uniforms(seed, stream, offset, 37, dtype)), dtype
        exact = normals(seed, stream, offset, 37, torch.float64)
        assert (draw(2, torch.float32).double() - exact).abs().max() < 2e-6
        assert (draw(2, torch.float64) - exact).abs().max() < 1e-12
x = torch.zeros(5, 3)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    data = x.to(dtype)
    for offset in (0, 1):
        noise = fm.Noise(torch.tensor(4), row_offset=offset)
        stored = fm.interpolate(data, noise, alpha=1.0, sigma=1.0, store_noise=True, impl="triton")
        assert torch.equal(stored.x_0, stored.x_t), "stored noise is drawn noise"
        assert torch.equal(stored.x_0, fm.interpolate(data, noise, alpha=1.0, sigma=1.0, impl="triton").x_t)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def machine_code() -> list[dict[str, int | str]]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "triton_ahead_of_time.py"), "80", "90", "100", "120"],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent), "TRITON_INTERPRET": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_compiles_for_every_architecture_without_spills_stack_or_atomics(machine_code) -> None:
    assert {found["capability"] for found in machine_code} == {80, 90, 100, 120}
    assert len(machine_code) == 4 * len({found["kernel"] for found in machine_code})
    for found in machine_code:
        assert found["local"] == 0, found
        assert found["atomics"] == 0, found


def test_global_accesses_are_128_bits_wide(machine_code) -> None:
    for found in machine_code:
        if "randn" not in found["kernel"]:
            assert found["stores_128"] > 0, found
        # Where noise is drawn, tensors are read in the layout of the Philox blocks.
        if "noise" not in found["kernel"] and "randn" not in found["kernel"]:
            assert found["loads_128"] > 0, found
