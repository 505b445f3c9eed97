"""Masked densities are computed in the data's dtype, whatever PyTorch's default one."""

from __future__ import annotations

import math

import pytest
import torch

import fmkernels as fm


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_masked_densities(method: str, dtype: torch.dtype, default: torch.dtype) -> None:
    x = torch.randn(2, 300, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[0, 170:] = False
    kept = [x[i][mask[i]].double().flatten() for i in range(2)]
    expected = [math.fsum((-0.5 * v * v - 0.5 * math.log(2 * math.pi)).tolist()) for v in kept]
    torch.set_default_dtype(default)
    try:
        options = {"steps": 1} if method == "euler" else {}
        result = fm.log_prob(lambda x, t: 0 * x, x, mask=mask, method=method, **options)
        bits = result.bits_per_dim()
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.log_prob.dtype is bits.dtype is dtype
    assert result.dims.tolist() == [510, 900]
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.log_prob.double().tolist(), expected, rtol=tolerance, atol=0.0)
    per_dim = [-value / dims / math.log(2.0) for value, dims in zip(expected, (510, 900), strict=True)]
    torch.testing.assert_close(bits.double().tolist(), per_dim, rtol=tolerance, atol=0.0)
