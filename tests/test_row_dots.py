"""row_dots: inner products of rows, their derivatives, and what it says of bad input. Cases are in its cases.py."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_rounded, roundings_of_sum
from torch.autograd import gradcheck, gradgradcheck

import fmkernels as fm
from fmkernels import _dispatch, _native

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
IMPLS = [
    (device, impl)
    for device in DEVICES
    for impl in ("auto", "reference", "native", "triton")
    if _dispatch.unavailable(impl, device) is None
]
PAIRS = [(0, 0), (0, 1), (-1, 1), (2, 0), (1, 2), (0, 1)]
NATIVE = pytest.mark.skipif(_native.missing("cpu") is not None, reason="the compiled library is not built")


def tensors(
    shape: tuple[int, ...] = (4, 3, 5), count: int = 3, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(count)]


def plain(xs: list[torch.Tensor], pairs: list[tuple[int, int]]) -> torch.Tensor:
    ones = torch.ones_like(xs[0])
    full = [*xs, ones]  # index -1 is the last
    return torch.stack([(full[i] * full[j]).flatten(1).sum(1) for i, j in pairs], 1)


@pytest.mark.parametrize(("device", "impl"), IMPLS)
@pytest.mark.parametrize("container", [list, tuple])
def test_values(device: str, impl: str, container: type) -> None:
    xs = tensors(device=device)
    out = fm.row_dots(container(xs), container(PAIRS), impl=impl)
    assert out.shape == (4, 6)
    assert out.dtype == torch.float32
    wide = [x.double() for x in xs]
    assert_rounded(out, plain(wide, PAIRS), 1 + roundings_of_sum(15), size=plain([x.abs() for x in wide], PAIRS))
    assert torch.equal(out[:, 1], out[:, 5])


@pytest.mark.parametrize(("device", "impl"), IMPLS)
def test_half_precision_accumulates_in_float32(device: str, impl: str) -> None:
    x = torch.full((2, 4099), 0.1, dtype=torch.bfloat16, device=device)
    out = fm.row_dots([x], [(0, 0), (0, -1)], impl=impl)
    assert out.dtype == torch.float32
    assert_rounded(out, plain([x.double()], [(0, 0), (0, -1)]), 1 + roundings_of_sum(4099))


@pytest.mark.parametrize(("device", "impl"), IMPLS)
def test_error_of_long_sums_is_no_worse_than_torch(device: str, impl: str) -> None:
    """Products of one sign, so that rounding of the running sum is all there is to see."""
    x, y = (torch.rand(3, 200_003, device=device) for _ in range(2))
    want = plain([x.double(), y.double()], [(0, 1), (0, 0)])
    error = (fm.row_dots([x, y], [(0, 1), (0, 0)], impl=impl) - want).abs() / want
    reference = (plain([x, y], [(0, 1), (0, 0)]) - want).abs() / want
    assert error.max() <= max(reference.max().item(), 2e-7)


@pytest.mark.parametrize(("device", "impl"), IMPLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_keep_their_infinities_to_themselves(device: str, impl: str, value: float) -> None:
    for inner in (3, 300, 5000):
        x, y = tensors((3, inner), 2, device=device)
        x[1, inner // 2] = value
        out = fm.row_dots([x, y], [(0, 0), (0, 1), (0, -1), (1, 1)], impl=impl)
        assert torch.isfinite(out[[0, 2]]).all()
        assert not torch.isfinite(out[1, :3]).any()
        assert torch.isfinite(out[1, 3])


def test_results_do_not_depend_on_threads() -> None:
    xs = tensors((37, 5003)) + tensors((37, 5003))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fm.row_dots(xs, PAIRS))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.host
@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(16, 2), (3, 100), (2, 3000), (7,)])
def test_plain_call_is_the_native_call(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    xs = tensors(shape, dtype=dtype)
    out = _native.library().row_dots_plain(xs, PAIRS)
    assert torch.equal(out, fm.row_dots(xs, PAIRS, impl="native"))
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@NATIVE
def test_plain_call_leaves_the_rest_to_python() -> None:
    call = _native.library().row_dots_plain
    x, y = tensors((4, 3), 2)
    for arguments in (
        ([], [(0, 0)]),
        ([x], []),
        ([x] * 7, [(0, 0)]),
        ([x], [(0, 0)] * 17),
        ([x], [(0, 1)]),
        ([x], [(0, -2)]),
        ([x], [(0, 2**40)]),
        ([x], [(0, 2**70)]),
        ([x], [(0, True)]),
        ([x], [(0,)]),
        ([x], [[0, 0]]),
        ([x], [(0, 0.0)]),
        ([x], None),
        (x, [(0, 0)]),
        ([x, y.double()], [(0, 1)]),
        ([x, y[:2]], [(0, 1)]),
        ([x, y.T.contiguous().T], [(0, 1)]),
        ([x, None], [(0, 0)]),
        ([x.clone().requires_grad_()], [(0, 0)]),
        ([x[0, 0]], [(0, 0)]),
        ([x[:0]], [(0, 0)]),
        ([x.int()], [(0, 0)]),
    ):
        assert call(*arguments) is None, arguments


@pytest.mark.parametrize("impl", ["auto", "reference", "native"])
@pytest.mark.parametrize(
    ("count", "pairs"),
    [
        (1, [(0, 0)]),
        (1, [(0, -1)]),
        (2, [(0, 1), (1, 0)]),
        (2, [(0, 0), (-1, 0), (-1, -1)]),
        (3, PAIRS),
        (2, [(0, -1), (1, 1)]),
    ],
)
def test_gradients_to_second_order(impl: str, count: int, pairs: list[tuple[int, int]]) -> None:
    xs = [x.requires_grad_() for x in tensors((2, 2, 2), count, torch.float64)]

    def function(*xs: torch.Tensor) -> torch.Tensor:
        return fm.row_dots(xs, pairs, impl=impl)

    assert gradcheck(function, xs)
    assert gradgradcheck(function, xs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_has_the_tensors_dtype_and_skips_what_needs_none(dtype: torch.dtype) -> None:
    x, y, z = tensors((5, 40), dtype=dtype)
    x.requires_grad_()
    z.requires_grad_()
    out = fm.row_dots([x, y, z], [(0, 1), (0, 0)])
    weight = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    out.backward(weight)
    terms = weight[:, :1].double() * y.double(), 2 * weight[:, 1:].double() * x.detach().double()
    assert x.grad.dtype == dtype
    assert_rounded(x.grad, terms[0] + terms[1], 3, size=terms[0].abs() + terms[1].abs(), of=torch.float32)
    assert y.grad is None
    assert z.grad is None or not z.grad.any()  # no pair names it


def test_channels_last_gradient() -> None:
    x, y = (x.contiguous(memory_format=torch.channels_last) for x in tensors((2, 3, 4, 5), 2))
    x.requires_grad_()
    fm.row_dots([x, y], [(0, 1)]).sum().backward()
    assert torch.equal(x.grad, y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        norms = fm.row_dots([x, y], [(0, 0), (0, 1), (1, 1)])
        return (norms[:, 1] / (norms[:, 0] * norms[:, 2]).sqrt()).sum() + fm.row_dots([x * y], [(0, -1)]).square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for rows in (4, 6):
        x, y = tensors((rows, 7), 2)
        leaf, compiled_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
        function(leaf, y).backward()
        compiled(compiled_leaf, y).backward()
        # on either side four of a sum of seven, as many of the quotient, three of the sum of rows
        assert_rounded(compiled(x, y), function(x, y), 20)
        assert_rounded(compiled_leaf.grad, leaf.grad, 20, size=leaf.grad.abs().max())


def test_transforms_take_the_reference() -> None:
    x, y = tensors((4, 3, 5), 2, torch.float64)
    pairs = [(0, 0), (0, 1), (1, -1)]

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fm.row_dots([x, y], pairs)

    def same(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return plain([x, y], pairs)

    def check(got: torch.Tensor, want: torch.Tensor) -> None:
        assert_rounded(got, want, 2 * (1 + roundings_of_sum(15)), size=want.abs().max())

    check(torch.func.vmap(function)(x, y), torch.stack([same(a, b) for a, b in zip(x, y, strict=True)]))
    for got, want in zip(torch.func.jvp(function, (x, y), (y, x)), torch.func.jvp(same, (x, y), (y, x)), strict=True):
        check(got, want)
    check(torch.func.grad(lambda x: function(x, y).sum())(x), torch.func.grad(lambda x: same(x, y).sum())(x))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, y)
        tangent = torch.autograd.forward_ad.unpack_dual(fm.row_dots([dual], [(0, 0)])).tangent
        check(tangent, 2 * plain([x, y], [(0, 1)]))
    with pytest.raises(RuntimeError, match="impl: expected 'auto' or 'reference' under"):
        torch.func.vmap(lambda x: fm.row_dots([x], [(0, 0)], impl="native"))(x)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        xs = tensors(dtype=dtype, device=device)
        torch.library.opcheck(torch.ops.fmkernels.row_dots.default, (xs, [0, 0, -1], [0, 1, 2], "auto"))


def test_hutchinson_trace() -> None:
    """E[e^T J e] over all sign vectors is the trace of J."""
    jacobian = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signs = torch.tensor([[a, b, c] for a in (-1.0, 1) for b in (-1.0, 1) for c in (-1.0, 1)], dtype=torch.float64)
    trace = fm.row_dots([signs, signs @ jacobian], [(0, 1)]).mean()
    assert_rounded(trace, jacobian.trace(), 8, size=jacobian.abs().sum())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x: (x, [(0, 0)]), TypeError, "tensors: expected a sequence of tensors"),
        (lambda x: ([], [(0, 0)]), ValueError, "tensors: expected 1 to 6 tensors"),
        (lambda x: ([x] * 7, [(0, 0)]), ValueError, "tensors: expected 1 to 6 tensors"),
        (lambda x: ([x.int()], [(0, 0)]), TypeError, r"tensors\[0\]: expected"),
        (lambda x: ([x[0, 0]], [(0, 0)]), ValueError, r"tensors\[0\]: expected at least one dimension"),
        (lambda x: ([x, x[:2]], [(0, 1)]), ValueError, r"tensors\[1\]: expected the shape of tensors\[0\]"),
        (lambda x: ([x, x.double()], [(0, 1)]), TypeError, r"tensors\[1\]: expected the dtype of tensors\[0\]"),
        (lambda x: ([x, 1.0], [(0, 1)]), TypeError, r"tensors\[1\]: expected a torch.Tensor"),
        (lambda x: ([x], 3), TypeError, "pairs: expected a sequence of pairs"),
        (lambda x: ([x], []), ValueError, "pairs: expected 1 to 16 pairs"),
        (lambda x: ([x], [(0, 0)] * 17), ValueError, "pairs: expected 1 to 16 pairs"),
        (lambda x: ([x], [(0, 0, 0)]), TypeError, r"pairs\[0\]: expected two indices"),
        (lambda x: ([x], [0]), TypeError, r"pairs\[0\]: expected two indices"),
        (lambda x: ([x], [(0, 0), (0, 0.0)]), TypeError, r"pairs\[1\]: expected two ints"),
        (lambda x: ([x], [(0, 1)]), ValueError, r"pairs\[0\]: expected indices from -1 \(ones\) to 0, got 1"),
        (lambda x: ([x], [(-2, 0)]), ValueError, r"pairs\[0\]: expected indices from -1"),
    ],
)
def test_bad_input_says_what_was_expected(arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fm.row_dots(*arguments(torch.ones(4, 3)))
    with pytest.raises(ValueError, match="impl: expected one of"):
        fm.row_dots([torch.ones(2)], [(0, 0)], impl="fast")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: 2^31 elements need one's memory")
@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("rows", [1, 3])
def test_more_than_2_to_31_elements(impl: str, rows: int) -> None:
    x = torch.ones(rows, (2**31 + 4100) // rows, dtype=torch.bfloat16, device="cuda")
    out = fm.row_dots([x], [(0, 0), (0, -1)], impl=impl)
    torch.testing.assert_close(out, torch.full_like(out, x.shape[1]), rtol=1e-6, atol=0)
