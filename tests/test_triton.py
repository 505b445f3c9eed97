"""Triton kernels without a GPU: run in its interpreter against the reference, compiled ahead of time for four GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import sass
import sass_model

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


def interpreted_code(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("operation", "cases"),
    [
        ("test_combine", range(60)),
        ("test_regression_loss", range(40)),
        ("test_regression_loss", range(40, 80)),
        ("test_regression_loss", range(80, 120)),
    ],
    ids=str,
)
def test_random_cases_in_the_interpreter(operation: str, cases: range) -> None:
    """Random shapes, layouts, dtypes, masks, noise at every phase."""
    interpreted(*(f"tests/test_ops_random.py::{operation}[cpu-triton-{case}]" for case in cases))


def test_row_dots_in_the_interpreter() -> None:
    interpreted("tests/test_row_dots.py", "-k", "triton")


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
    interpreted_code(code)


def test_numbers_keep_float64_precision_in_the_interpreter() -> None:
    """Tolerances, delta and coefficients that float32 does not hold; a tolerance below its range."""
    code = """
import torch, fmkernels as fm

def close(found, want):
    assert found.dtype == torch.float64
    assert ((found - want).abs() <= 1e-14 * want.abs()).all(), (found, want)

torch.manual_seed(0)
for inner in (37, 2100):  # of one tile and of several
    a, b = torch.randn(2, 3, inner, dtype=torch.float64)
    y, norm = fm.combine([a, b], [0.1, 0.6], error_coefficients=[0.7, -0.3], atol=0.1, rtol=0.3, impl="triton")
    want = 0.1 * a + 0.6 * b
    assert (y - want).abs().max() < 1e-14
    scale = 0.1 + 0.3 * torch.maximum(a.abs(), want.abs())
    close(norm, ((0.7 * a - 0.3 * b) / scale).square().mean(1).sqrt())
    for atol, rtol in ((1e-300, 0.0), (0.1, 0.0), (1e-300, 0.3)):
        size = 0.5 if rtol else atol
        norm = fm.combine([torch.full_like(a, size)], [1.0], atol=atol, rtol=rtol, impl="triton")[1]
        close(norm, torch.full_like(norm, size / (atol + rtol * size)))
    for kind in ("huber", "pseudo_huber"):
        pred = torch.zeros_like(a).requires_grad_()
        loss = fm.regression_loss(pred, [a], [0.1], kind=kind, delta=0.1, impl="triton")
        loss.backward()
        d = -0.1 * a
        if kind == "huber":
            rho = torch.where(d.abs() <= 0.1, d * d / 2, 0.1 * (d.abs() - 0.05))
            slope = d.clamp(-0.1, 0.1)
        else:
            root = (d * d + 0.1 * 0.1).sqrt()
            rho, slope = d * d / (root + 0.1), d / root
        close(loss.detach(), rho.mean())
        close(pred.grad, slope / d.numel())
"""
    interpreted_code(code)


CAPABILITIES = [pytest.param(c, marks=pytest.mark.xdist_group(f"triton-sm_{c}")) for c in (80, 90, 100, 120)]


@pytest.fixture(scope="module", params=CAPABILITIES, ids=lambda c: f"sm_{c}")
def machine_code(request: pytest.FixtureRequest) -> list[dict[str, int | str]]:
    """What a GPU's code holds, kernel by kernel."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "triton_ahead_of_time.py"), str(request.param)],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT.parent), "TRITON_INTERPRET": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {kernel["capability"] for kernel in found} == {request.param}
    return found


def test_compiles_without_spills_stack_or_atomics(machine_code) -> None:
    assert len({found["case"] for found in machine_code}) > 20
    assert len(machine_code) == len({(found["case"], found["kernel"]) for found in machine_code})
    assert {found["kernel"] for found in machine_code} == {"_kernel", "_finish"}
    for found in machine_code:
        assert found["local"] == 0, found
        assert found["atomics"] == 0, found


def test_machine_code_stays_within_its_table(machine_code) -> None:
    """Instructions an element and registers, to 5 %, with the Triton that the table was made with."""
    architecture = str(machine_code[0]["capability"])
    if architecture not in sass_model.ARCHITECTURES or sass.find_cuobjdump() is None:
        pytest.skip(f"no table for sm_{architecture}, or no cuobjdump")
    table = sass_model.read_table(architecture)
    if table["triton"] != version("triton"):
        pytest.skip(f"Triton {version('triton')}: the table is of {table['triton']}")
    counted = {model["case"]: model for found in machine_code if (model := found["model"])}
    assert list(counted) == list(table["triton_cases"])
    assert not sass_model.excesses({"kernels": table["triton_cases"], "cases": table["triton_cases"]}, counted, counted)


def test_global_accesses_are_128_bits_wide(machine_code) -> None:
    for found in machine_code:
        if found["kernel"] == "_kernel":
            assert found["stores_128"] > 0 or "dots" in found["case"], found
            assert found["loads_128"] > 0 or "randn" in found["case"], found


def test_one_tile_a_sample_needs_no_second_kernel(machine_code) -> None:
    finished = {found["case"] for found in machine_code if found["kernel"] == "_finish"}
    assert {"step_norm_f32", "step_norm_f64", "loss_f32", "dots_f32"} <= finished
    assert not {"step_norm_one_tile_f32", "loss_rows_bf16", "dots_one_tile_bf16", "dots_short_f32"} & finished


def test_numbers_keep_float64_precision_in_the_generated_code(machine_code) -> None:
    """Triton passes a Python float as float32: float64 kernels take none, and widen nothing but noise's uniforms."""
    double = [found for found in machine_code if found["case"].endswith("f64")]
    assert len({found["case"] for found in double}) == 5
    for found in double:
        assert found["float_arguments"] == 0, found
        assert found["widened"] == 0 or "noise" in found["case"], found
    assert all(f["float_arguments"] > 0 for f in machine_code if f["case"] == "loss_f32"), "they are found where taken"
