"""Every operation, implementation, dtype and hand-picked case: error budgets against float64, repeatability, poison."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from rounding import assert_rounded

from fmkernels import Noise, _dispatch, interpolate
from fmkernels.ops._operands import MAX_TENSORS
from fmkernels.testing import Case, Inputs, assert_within_budget, poisoned_empty, select, to_float64

OPS = ("combine", "interpolate", "random", "regression_loss", "row_dots")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# FMKERNELS_TEST_TRITON=1 with TRITON_INTERPRET=1 runs the Triton kernels here too; test_triton.py does it with fewer.
IMPLS = [
    (device, impl)
    for device in DEVICES
    for impl in ("auto", "reference", "native", "triton")
    if _dispatch.unavailable(impl, device) is None
    and (impl != "triton" or device == "cuda" or os.environ.get("FMKERNELS_TEST_TRITON"))
]
CASES = [
    pytest.param(case, id=f"{op}-{case.name}")
    for op in OPS
    for case in select(importlib.import_module(f"fmkernels.ops.{op}.cases").CASES, "test")
]


def with_noise_as_tensors(inputs: Inputs, impl: str) -> Inputs:
    """Noise among operands as an implementation draws it in their dtype: noise of float64 would be other noise, by a
    rounding of the narrow dtype. It stays where it has a dtype of its own, and beside as many tensors as an operation
    takes."""
    operands = inputs.get("operands", ())
    if not 0 < len(operands) <= MAX_TENSORS or "noise_dtype" in inputs:
        return inputs
    data = next((x for x in operands if not isinstance(x, Noise)), inputs.get("pred"))

    def drawn(noise: Noise) -> torch.Tensor:
        return interpolate(data, noise, alpha=0.0, sigma=1.0, store_noise=True, impl=impl).x_0

    return {**inputs, "operands": [drawn(x) if isinstance(x, Noise) else x for x in operands]}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("device", "impl"), IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_case(case: Case, device: str, impl: str, dtype: torch.dtype) -> None:
    inputs = case.make(dtype, torch.device(device), 0)
    with poisoned_empty():
        outputs = case.evaluate(inputs, impl)
    again = case.evaluate(inputs, impl)
    oracle = case.evaluate(to_float64(with_noise_as_tensors(inputs, impl)), "reference")
    reference = case.evaluate(inputs, "reference")
    assert len(outputs) == len(oracle) == len(reference)
    for i, (out, repeat, want, plain) in enumerate(zip(outputs, again, oracle, reference, strict=True)):
        assert torch.equal(out.nan_to_num(7.0), repeat.nan_to_num(7.0)), f"output {i}: two calls differ"
        assert_within_budget(out, want, plain, noise=case.noise, name=f"output {i}")


def test_every_operation_has_all_implementations() -> None:
    for op in _dispatch.OPS:
        for name in ("reference", "native", "triton"):
            if name == "triton" and _dispatch.unavailable("triton", "cuda") is not None:
                continue
            assert importlib.util.find_spec(f"fmkernels.ops.{op}.{name}") is not None, (op, name)


def test_explicit_implementation_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import fmkernels as fm
    from fmkernels import _native

    monkeypatch.setattr(_native, "_load", lambda: (None, "the compiled library fmkernels._C did not load (a test)"))
    _dispatch.chosen.cache_clear()
    _dispatch.implementation.cache_clear()
    _dispatch._plain_library.cache_clear()
    try:
        x = torch.ones(3)
        with pytest.raises(RuntimeError, match=r"impl: expected an available implementation.*'native'.*a test"):
            fm.combine([x], [2.0], impl="native")
        with pytest.warns(UserWarning, match="native combine is not available on cpu"):
            assert torch.equal(fm.combine([x], [2.0]), 2 * x)
    finally:
        _dispatch.chosen.cache_clear()
        _dispatch.implementation.cache_clear()
        _dispatch._plain_library.cache_clear()


@pytest.mark.parametrize("impl", ["auto", "native"])
def test_results_do_not_depend_on_threads(impl: str) -> None:
    import fmkernels as fm

    torch.manual_seed(0)
    x_1, x_0, pred = (torch.randn(64, 3000) for _ in range(3))
    t = torch.rand(64)
    pred.requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss = fm.regression_loss(pred, [x_1, x_0], [t, -1.0], impl=impl)
            noise = fm.randn(100_001, seed=3)
            _, norm = fm.combine([x_1, x_0], [t, 1.0], atol=1e-3, rtol=1e-3, impl=impl)
            results.append((loss.detach(), torch.autograd.grad(loss, pred)[0], noise, norm))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_are_pooled_and_streamed_and_right(dtype: torch.dtype) -> None:
    """Beyond 24 MiB outputs come from the pool and are streamed; odd sizes leave tiles, rows and vectors unaligned."""
    import fmkernels as fm
    from fmkernels import _native

    shape = (7, 13, 150_001) if dtype == torch.bfloat16 else (7, 13, 80_001)
    torch.manual_seed(0)
    x_1, x_0, pred = (torch.randn(shape).to(dtype) for _ in range(3))
    t = torch.rand(shape[:2])
    want = fm.interpolate(x_1, x_0, alpha=t, sigma=1 - t, impl="reference").x_t
    sizes = t[..., None] * x_1.float().abs() + (1 - t)[..., None] * x_0.float().abs()
    for _ in range(2):  # the second from used memory
        x_t = fm.interpolate(x_1, x_0, alpha=t, sigma=1 - t, impl="native").x_t
        # two products and a sum on either side
        assert_rounded(x_t, want, 4, size=sizes, of=torch.float32)
        del x_t
    assert _native.library().pool_cached_bytes() >= want.numel() * want.element_size()
    pred.requires_grad_()
    loss = fm.regression_loss(pred, [x_1, x_0], [1.0, -1.0], reduction="sum")
    (grad,) = torch.autograd.grad(loss, pred)
    residual = pred.detach().float() - x_1.float() + x_0.float()
    # two sums on either side
    sizes = pred.detach().float().abs() + x_1.float().abs() + x_0.float().abs()
    assert_rounded(grad, 2 * residual, 4, size=2 * sizes, of=torch.float32)
    # over millions of terms their errors cancel, and short stretches are summed in float64: the last rounding stays
    assert_rounded(loss, residual.double().square().sum(), 4)
    del sizes
    noise = fm.randn(shape, seed=5, dtype=dtype)
    assert torch.equal(noise.view(-1)[-1000:], fm.randn(noise.numel(), seed=5, dtype=dtype)[-1000:])
    drawn = fm.interpolate(x_1, fm.Noise(torch.tensor(5)), alpha=0.0, sigma=1.0).x_t
    assert torch.equal(drawn, noise), "noise drawn in the kernel is the noise that is written out"
    fm.set_cpu_pool_limit(0)
    assert _native.library().pool_cached_bytes() == 0
    fm.set_cpu_pool_limit(1024)


@pytest.mark.cuda
def test_large_outputs_keep_their_memory_format() -> None:
    import fmkernels as fm

    x = torch.randn(3, 20, 300, 256).contiguous(memory_format=torch.channels_last)
    assert x.numel() * 4 > 16 << 20
    t = torch.rand(3)
    y = fm.combine([x, x], [t, 2.0], impl="native")
    assert y.stride() == x.stride()
    assert_rounded(y, x * (t + 2.0).reshape(3, 1, 1, 1), 4)  # two on either side


def test_a_block_of_the_pool_wastes_little() -> None:
    """A freed block much larger than an output stays for a larger one."""
    import fmkernels as fm
    from fmkernels import _native

    pool, mib = _native.library().pool_cached_bytes, 1 << 18  # elements of float32
    fm.set_cpu_pool_limit(0)
    fm.set_cpu_pool_limit(1024)
    large = fm.combine([torch.zeros(64 * mib)], [1.0], impl="native")
    del large
    assert pool() == 64 << 20
    small = fm.combine([torch.zeros(18 * mib)], [1.0], impl="native")
    assert pool() == 64 << 20
    near = fm.combine([torch.zeros(60 * mib)], [1.0], impl="native")
    assert pool() == 0
    del small, near
    fm.set_cpu_pool_limit(0)
    fm.set_cpu_pool_limit(1024)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: 2^31 elements need one's memory")
@pytest.mark.parametrize("impl", ["native", "triton"])
def test_more_than_2_to_31_elements(impl: str) -> None:
    import fmkernels as fm

    n = 2**31 + 4099
    x = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    y = fm.combine([x, fm.Noise(torch.tensor(1, device="cuda"))], [2.0, 1.0], impl=impl)
    tail = fm.random.noise_like(fm.Noise(torch.tensor(1, device="cuda"), row_offset=n - 64), x[:64])
    # a rounding of the sum, and noise that may be rounded to a neighbour
    want = 2 + tail.float()
    assert_rounded(y[-64:], want, 1, size=want.abs() + 2 * tail.float().abs(), of=torch.bfloat16)
    del y
    pred = torch.zeros_like(x).requires_grad_()
    loss = fm.regression_loss(pred, [x], [1.0], impl=impl)
    torch.testing.assert_close(loss.item(), 1.0, rtol=1e-6, atol=0)
