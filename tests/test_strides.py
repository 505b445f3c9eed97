"""Strides of dimensions of size 1 say nothing: torch sets them to anything, and no kernel may step by them."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_rounded, roundings_of_sum
from torch import Tensor

import fmkernels as fm
from fmkernels.ops._operands import entry_stride, row_stride
from fmkernels.ops.step_control.op import Clock, Rules, new_state, step_control

SIZES = [3, 16384]  # beyond the second a wrong step leaves the heap
IMPLS = ["auto", "native", "reference"]


def column(values: Tensor) -> Tensor:
    """(B, 1) with strides (1, B), as torch.rand(1, B).t() has them."""
    result = values.reshape(1, -1).contiguous().t()
    assert result.stride() == (1, values.numel())
    return result


def test_the_distance_of_entries() -> None:
    assert entry_stride(torch.ones(3, 4)) == 1
    assert entry_stride(column(torch.ones(5))) == 1
    assert entry_stride(torch.ones(1, 5).t()) == 1
    assert entry_stride(torch.ones(4, 1, 6)[:, :, ::2]) == 2
    assert entry_stride(torch.ones(4, 6).t()) is None
    assert entry_stride(torch.ones(()).expand(3, 4)) == 0
    assert entry_stride(torch.ones(3, 1).expand(3, 4)) is None
    assert entry_stride(torch.as_strided(torch.ones(9), (1, 1), (7, 5))) == 0
    assert row_stride(torch.as_strided(torch.ones(9), (1, 4), (7, 1))) == 0
    assert row_stride(torch.ones(3, 4)) == 4
    assert row_stride(torch.ones(4).expand(3, 4)) == 0
    assert row_stride(torch.as_strided(torch.ones(9), (3, 1), (2, 5))) == 2
    assert row_stride(torch.ones(3, 4).t()) is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", SIZES)
def test_columns_with_the_strides_of_a_row(size: int, impl: str) -> None:
    """Times, weights, coefficients and masks of shape (B, 1)."""
    torch.manual_seed(0)
    x, y, pred = (torch.randn(size, 1, 2) for _ in range(3))
    t, mask = torch.rand(size), torch.rand(size) > 0.3
    for times, kept in ((column(t), column(mask)), (t[:, None].clone(), mask[:, None].clone())):
        point = fm.interpolate(x, y, alpha=times, sigma=1 - times, impl=impl).x_t
        both = fm.combine([x, y], [times, 1 - times], impl=impl)
        out = fm.combine([x, y], [times, times], out=torch.empty_like(x), impl=impl)
        _, norm = fm.combine([x, y], [times, 1.0], error_coefficients=[1.0, times], atol=1.0, rtol=0.1, impl=impl)
        loss = fm.regression_loss(pred, [x, y], [times, -1.0], weight=times, mask=kept, impl=impl)
        each = fm.regression_loss(pred, [x, y], [1.0, times], weight=times, mask=kept, reduction="none", impl=impl)
        dots = fm.row_dots([x.squeeze(1), times.expand(size, 2)], [(0, 1)], impl=impl)
        found = (point, both, out, norm, loss, each, dots)
        if kept.stride() == (1, size):
            first = found
    w = t[:, None, None]
    assert_rounded(first[0], w * x + (1 - w) * y, 4, size=w * x.abs() + (1 - w) * y.abs())
    residual = ((pred - w * x + y).square() * w * mask[:, None, None]).double()
    # of the residual, its square, weight and scale on either side
    assert_rounded(first[4], residual.sum() / (2 * mask.sum()), 8 + roundings_of_sum(residual.numel()))
    for a, b in zip(first, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", SIZES)
def test_tensors_with_the_strides_of_a_row(size: int) -> None:
    """Data of shape (B, 1) itself, with a table of coefficients of shape (B, 1)."""
    torch.manual_seed(0)
    x, y, t = (torch.rand(size) for _ in range(3))
    got = fm.combine([column(x), y[:, None]], torch.stack((column(t), column(1 - t)), -1))
    assert_rounded(got.squeeze(1), t * x + (1 - t) * y, 4)
    pred = column(x).requires_grad_()
    loss = fm.cfm_loss(pred, x_1=column(y), x_0=t[:, None], t=column(t), path=fm.paths.CondOT(), weight=column(x))
    assert_rounded(loss, (x * (x - y + t).square()).mean(), 10 + 2 * roundings_of_sum(size))
    (grad,) = torch.autograd.grad(loss, pred)
    assert_rounded(grad.squeeze(1), 2 * x * (x - y + t) / size, 8, size=2 * x * (x + y + t) / size)
    assert torch.equal(fm.row_dots([column(x)], [(0, 0)]).squeeze(1), x * x)


RULES = Rules((-0.2, 0.0, 0.0), 0.9, 5.0, 0.2, 1.0, 0.0, 1.0, 100, False, (0.0, 1.0))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("layout", ["dense", "row strides", "transposed", "shared"])
def test_step_control_reads_requested_times_of_any_strides(rows: int, layout: str) -> None:
    count = 1 if layout == "row strides" else 4
    wanted = torch.linspace(0.1, 0.9, count, dtype=torch.float64).expand(rows, count).contiguous()
    wanted = {
        "dense": wanted,
        "row strides": column(wanted[:, 0]) if layout == "row strides" else wanted,
        "transposed": wanted.t().contiguous().t(),
        "shared": wanted[:1].expand(rows, count),
    }[layout]
    results = []
    for impl in ("reference", "native"):
        clock, state = new_state(*(torch.full((rows,), t, dtype=torch.float64) for t in (0.0, 1.0)))
        clock[Clock.H] = 0.5
        step, times = torch.zeros(rows), torch.zeros(2, rows)
        error = torch.full((2 * rows,), 0.3)[::2]
        error = column(error).squeeze(1) if rows > 1 else error
        step_control(clock, state, step, times, error, RULES, wanted, impl=impl)
        results.append((clock, state, step, times))
    for a, b in zip(*results, strict=True):
        assert_rounded(a, b, 18, of=torch.float64)  # as in test_step_control.py
