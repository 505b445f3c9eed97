"""Calls on small ordinary CPU tensors, which C++ checks by itself: what it must refuse, and what its outputs are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fmkernels as fm
from fmkernels import _native

SHAPE = (1, 1)


def plain_calls(x: Any) -> Iterator[Any]:
    """The answers of all plain calls to an operand that they should leave to Python."""
    library = _native.library()
    good = torch.ones(SHAPE)
    yield library.combine_plain([x], [1.0], False)
    yield library.combine_plain([good, x], [1.0, 1.0], False)
    yield library.combine_plain([good], [x], False)
    yield library.regression_loss_plain(x, [good], [1.0], None, 0, 1.0, True, False)
    yield library.regression_loss_plain(good, [x], [1.0], None, 0, 1.0, True, True)
    yield library.regression_loss_plain(good, [good], [x], None, 0, 1.0, True, True)
    if x is not None:  # no weight
        yield library.regression_loss_plain(good, [good], [1.0], x, 0, 1.0, True, True)
    yield library.row_dots_plain([x], [(0, 0)])
    yield library.row_dots_plain([good, x], [(0, 1)])


def negative_view() -> Tensor:
    """A contiguous tensor whose values are the negatives of what its memory holds."""
    x = torch.tensor([[1.0 + 2.0j]]).conj().imag
    assert x.is_neg()
    assert x.is_contiguous()
    return x


def without_memory() -> Tensor:
    x = torch.ones(SHAPE)
    x.untyped_storage().resize_(0)
    return x


STRANGE: dict[str, Callable[[], Any]] = {
    "negative bit": negative_view,
    "no memory": without_memory,
    "sparse": lambda: torch.ones(SHAPE).to_sparse(),
    "compressed": lambda: torch.ones(SHAPE).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(SHAPE).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1)]),
    "meta": lambda: torch.ones(SHAPE, device="meta"),
    "zero": lambda: torch._efficientzerotensor(SHAPE),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(SHAPE), 0.1, 0, torch.quint8),
    "complex": lambda: torch.ones(SHAPE, dtype=torch.complex64),
    "integer": lambda: torch.ones(SHAPE, dtype=torch.int64),
    "no tensor": lambda: "1.0",
    "a large int": lambda: 2**70,
    "not finite": lambda: float("nan"),
    "None": lambda: None,
    "a list": lambda: [1.0],
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_ordinary_tensor_is_left_to_python(kind: str) -> None:
    """And no exception is left behind, nor one with a C++ signature raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototypes and what will be removed
        x = STRANGE[kind]()
    assert all(answer is None for answer in plain_calls(x))


@pytest.mark.parametrize("row_offset", [2**41, 2**63, 2**70])
def test_noise_beyond_what_an_index_holds_is_left_to_python(row_offset: int) -> None:
    noise = fm.Noise(torch.tensor(1))
    noise.row_offset = row_offset  # which the constructor would refuse
    assert _native.library().combine_plain([torch.ones(4, 2), noise], [1.0, 1.0], False) is None


@pytest.mark.parametrize("store_noise", [1, "yes", None, 2**70])
def test_a_flag_that_is_no_bool_is_left_to_python(store_noise: Any) -> None:
    assert _native.library().combine_plain([torch.ones(2)], [1.0], store_noise) is None


def test_outputs_are_on_the_cpu_whatever_the_default_device_and_dtype() -> None:
    x, y, t = torch.randn(8, 3), torch.randn(8, 3), torch.rand(8)
    pred = torch.randn(8, 3, requires_grad=True)

    def results() -> list[Tensor]:
        loss = fm.regression_loss(pred, [x, y], [1.0, -1.0])
        (grad,) = torch.autograd.grad(loss, pred)
        point = fm.interpolate(x, y, alpha=t, sigma=0.5, store_noise=True).x_t
        noise = fm.combine([x, fm.Noise(torch.full((), 3, device="cpu"))], [1.0, t])
        return [loss, grad, point, noise, fm.row_dots([x, y], [(0, 1)])]

    want = results()
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got = results()
    finally:
        torch.set_default_dtype(dtype)
    for a, b in zip(got, want, strict=True):
        assert a.device.type == "cpu"
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3), (3, 700), (2, 33, 40)])
def test_float64_predictions_see_the_noise_that_is_stored(
    shape: tuple[int, ...], dtype: torch.dtype, store: bool
) -> None:
    """Noise is rounded to its own dtype before a float64 loss reads it, whether it is drawn again or was stored."""
    noise = fm.Noise(torch.tensor(11), stream=2, row_offset=3)
    stored = fm.combine([torch.zeros(shape, dtype=dtype), noise], [0.0, 1.0])
    pred = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    operand = stored if store else noise
    loss = fm.regression_loss(pred, [operand], [1.0], reduction="sum", noise_dtype=dtype, impl="native")
    (grad,) = torch.autograd.grad(loss, pred)
    assert torch.equal(grad, -2.0 * stored.double())
