"""The operations under what surrounds them: default devices and dtypes, modes, lazily negated tensors, aliases."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from rounding import assert_rounded, roundings_of_sum
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fmkernels as fm

SMALL, LARGE = (16, 3), (3, 1 << 19)  # the second is more than is called without Python's checks


def calls(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options) -> dict[str, Callable[[], object]]:
    """Public calls on CPU tensors that are made here, seeds given."""
    generator = torch.Generator().manual_seed(0)
    x, y, pred = (torch.randn(shape, generator=generator, dtype=dtype, device="cpu") for _ in range(3))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    t = torch.rand(shape[:1], generator=generator, dtype=wide, device="cpu")
    mask = torch.rand(shape[:1], generator=generator, device="cpu") > 0.3
    noise = fm.Noise(torch.full((), 7, dtype=torch.int64, device="cpu"), row_offset=2)
    pred.requires_grad_()

    def loss(**given) -> tuple[Tensor, Tensor]:
        value = fm.regression_loss(pred, [x, noise], [t, -1.0], **given)
        return value.detach(), torch.autograd.grad(value, pred, torch.ones_like(value))[0]

    def cfm() -> tuple[Tensor, ...]:
        batch = fm.paths.CondOT().sample(x, t=t, generator=torch.Generator().manual_seed(3))
        return batch.x_t, batch.t, batch.x_0, fm.cfm_loss(pred, batch, weight="min_snr").detach()

    return {
        "combine": lambda: fm.combine([x, y], [t, 0.5]),
        "combine_noise": lambda: fm.combine([x, noise], [t, 0.5]),
        "combine_norm": lambda: fm.combine([x, y], [t, 0.5], atol=0.1, rtol=0.1),
        "combine_out": lambda: fm.combine([x, y], [t, 0.5], out=torch.empty_like(x)),
        "interpolate": lambda: fm.interpolate(x, noise, alpha=t, sigma=1 - t, store_noise=True)[:2],
        "interpolate_drawn": lambda: fm.interpolate(
            x, alpha=t, sigma=1 - t, generator=torch.Generator().manual_seed(3), store_noise=True
        )[:2],
        "loss": loss,
        "loss_weighted": lambda: loss(weight=t, mask=mask),
        "loss_weighted_mean": lambda: loss(weight=t, mask=mask, reduction="weighted_mean"),
        "loss_count": lambda: loss(mask=mask, count=torch.full((), 5, device="cpu")),
        "loss_none": lambda: loss(weight=t, mask=mask, reduction="none", kind="huber"),
        "row_dots": lambda: fm.row_dots([x, y], [(0, 1), (0, -1)]),
        "randn": lambda: fm.randn(shape, seed=5, dtype=dtype, device="cpu"),
        "rand": lambda: fm.rand(shape, seed=5, dtype=dtype, device="cpu"),
        "random_words": lambda: fm.random_words(shape, seed=5, device="cpu"),
        "noise": lambda: fm.random.noise_like(noise, x),
        "cfm_loss": cfm,
    }


def flat(value: object) -> list[Tensor]:
    return [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Tensor)]


NAMES = list(calls(SMALL))


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("setting", ["set meta", "with meta", "float64", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_default_device_and_dtype_change_nothing(name: str, setting: str, shape: tuple[int, ...]) -> None:
    want = flat(calls(shape)[name]())
    call = calls(shape)[name]
    try:
        if setting == "set meta":
            torch.set_default_device("meta")
        elif setting != "with meta":
            torch.set_default_dtype(getattr(torch, setting))
        if setting == "with meta":
            with torch.device("meta"):
                got = flat(call())
        else:
            got = flat(call())
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(want, got, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)


def test_drawing_follows_the_default_device_and_dtype() -> None:
    """As torch.randn: where neither is given."""
    with torch.device("meta"):
        for out in (fm.randn(3), fm.rand(3, seed=1), fm.random_words(3), fm.draw_seed()):
            assert out.device.type == "meta"
        assert fm.randn(3, device="cpu").device.type == "cpu"
        assert fm.randn(3, seed=torch.zeros((), dtype=torch.int64, device="cpu")).device.type == "cpu"
    torch.set_default_dtype(torch.float64)
    try:
        assert fm.randn(3).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", ["inference", "fake", "no_grad"])
def test_a_mode_leaves_nothing_behind(mode: str) -> None:
    """Every call under the mode first, then outside: whatever is kept between calls must work there."""
    if mode == "fake":
        with FakeTensorMode():
            for name, call in calls(SMALL).items():
                if "cfm" not in name:  # a batch of drawn times asks for values
                    call()
    else:
        with torch.inference_mode() if mode == "inference" else torch.no_grad():
            for name, call in calls(SMALL).items():
                if "loss" not in name:
                    call()
    for call in calls(SMALL).values():
        for out in flat(call()):
            assert not out.is_inference()
            assert type(out) is Tensor
            out.add_(1)


def test_two_threads_at_once() -> None:
    want = {name: flat(call()) for name, call in calls((64, 33)).items()}
    wrong: list[str] = []

    def work() -> None:
        mine = calls((64, 33))
        for _ in range(5):
            for name, call in mine.items():
                if not all(torch.equal(a, b) for a, b in zip(want[name], flat(call()), strict=True)):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_torch_jit_trace_is_refused() -> None:
    """Traced, a kernel's results would be constants of the graph."""
    x, t = torch.rand(4, 3), torch.rand(4)
    for call in (
        lambda x: fm.combine([x, x], [0.5, 2.0]),
        lambda x: fm.combine([x, x], [0.5, 2.0], out=torch.empty_like(x)),
        lambda x: fm.interpolate(x, x, alpha=t, sigma=1 - t).x_t,
        lambda x: fm.regression_loss(x, [x], [0.5]),
        lambda x: fm.regression_loss(x, [x], [0.5], weight=t),
        lambda x: fm.row_dots([x], [(0, 0)]),
        lambda x: x + fm.randn(4, 3),
        lambda x: fm.combine([x], [2.0], impl="native"),
    ):
        with pytest.raises(
            RuntimeError, match=r"fmkernels: expected torch\.compile or torch\.export, got torch\.jit\.trace"
        ):
            torch.jit.trace(call, x, check_trace=False)
    traced = torch.jit.trace(lambda x: fm.combine([x, x], [0.5, 2.0], impl="reference"), x)
    assert torch.equal(traced(2 * x), 5 * x)


def negative(x: Tensor) -> Tensor:
    """x as a tensor whose memory holds -x: its negation waits."""
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    dense = torch._neg_view(-x)
    assert lazy.is_neg()
    assert dense.is_neg()
    assert dense.is_contiguous()
    return dense


@pytest.mark.parametrize("impl", ["auto", "native"])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("lazy", ["operand", "coefficient", "weight", "pred", "out"])
def test_negations_that_wait_are_seen(lazy: str, shape: tuple[int, ...], impl: str) -> None:
    torch.manual_seed(0)
    x, y, pred, t = torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape[:1])
    results = []
    for change in (lambda name, value: value, lambda name, value: negative(value) if name == lazy else value):
        a, c, w, p = change("operand", x), change("coefficient", t), change("weight", t), change("pred", pred)
        out = change("out", torch.empty(shape))
        p = p.detach().requires_grad_()
        loss = fm.regression_loss(p, [a, y], [c, 0.5], weight=w, impl=impl)
        plain = fm.regression_loss(p, [a, y], [c, 0.5], impl=impl)
        results.append(
            [
                fm.combine([a, y], [c, 0.5], impl=impl),
                fm.combine([a, y], [c, 0.5], atol=1.0, impl=impl)[1],
                fm.combine([a, y], [c, 0.5], out=out, impl=impl),
                fm.interpolate(a, y, alpha=c, sigma=w, impl=impl).x_t,
                fm.row_dots([a, y], [(0, 1)], impl=impl),
                loss.detach(),
                plain.detach(),
                *torch.autograd.grad(loss, p),
                *torch.autograd.grad(plain, p),
            ]
        )
    for want, got in zip(*results, strict=True):
        assert torch.equal(want, got)


def test_zeros_without_memory_are_zeros() -> None:
    x, zero = torch.rand(4, 3), torch._efficientzerotensor((4, 3))
    assert torch.equal(fm.combine([x, zero], [2.0, 1.0]), 2 * x)
    assert torch.equal(fm.combine([zero, x], [2.0, 1.0]), x)
    assert torch.equal(fm.combine([x], [torch._efficientzerotensor((4,))]), 0 * x)
    assert torch.equal(fm.row_dots([zero, x], [(0, 1)]), torch.zeros(4, 1))
    # squares, a sum of twelve and its scale, on either side
    assert_rounded(fm.regression_loss(x, [zero], [1.0]), x.square().mean(), 2 * (2 + roundings_of_sum(12)))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("shift", [-7, -1, 0, 1, 7, 4000])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_out_may_overlap_an_operand(position: int, shift: int, impl: str) -> None:
    buffer = torch.randn(3 * 4096)
    views = [torch.randn(4096) for _ in range(3)]
    views[position] = buffer[4096:8192]
    want = fm.combine([v.clone() for v in views], [2.0, -1.0, 0.5])
    got = fm.combine(views, [2.0, -1.0, 0.5], out=buffer[4096 + shift : 8192 + shift], impl=impl)
    assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_out_may_be_any_operand(impl: str) -> None:
    x, y = torch.randn(2, 64, 5)
    want = 2.0 * x - y
    for operands, coefficients in (([x, y.clone()], [2.0, -1.0]), ([y.clone(), x], [-1.0, 2.0])):
        out = x.clone()
        operands = [out if v is x else v for v in operands]
        assert fm.combine(operands, coefficients, out=out, impl=impl) is out
        assert torch.equal(out, want)  # twice a number is exact: one rounding, however it is done


def columns(out: Tensor, count: int) -> list[Tensor]:
    """Coefficients that lie in the memory of out, spaced as its samples are."""
    return [out.reshape(len(out), -1)[:, i] for i in range(count)]


def coefficients_within(out: Tensor, form: str) -> object:
    flat, samples = out.view(-1), len(out)
    if form == "list":
        return columns(out, 2)
    if form == "table":
        return out.reshape(samples, -1)[:, :2]
    if form == "dense":
        return flat[3 : 3 + 2 * samples].view(samples, 2)
    if form == "token":
        return [out.reshape(*out.shape[:2], -1)[:, :, -1], flat[-1]]
    return torch.from_numpy(out.numpy()).view(samples, -1)[:, :2]  # of another storage


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
@pytest.mark.parametrize("form", ["list", "table", "dense", "token", "other storage"])
@pytest.mark.parametrize("shape", [(6, 33), (6, 1000), (6, 3, 32, 32)], ids=str)
def test_coefficients_in_the_memory_of_out_are_read_before_it_is_written(
    shape: tuple[int, ...], form: str, impl: str
) -> None:
    x, y = torch.randn(2, *shape)
    results = []
    for shared in (False, True):
        out = torch.linspace(0.5, 1.5, x.numel()).view(shape)
        given = coefficients_within(out if shared else out.clone(), form)
        # the error's are read last of all
        fm.combine([x, y], given, out=out, impl=impl)
        again = torch.linspace(0.5, 1.5, x.numel()).view(shape)
        errors = columns(again if shared else again.clone(), 2)
        _, norm = fm.combine([x, y], [1.0, 0.5], error_coefficients=errors, atol=0.1, out=again, impl=impl)
        results.append((out, again, norm))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_seed_in_the_memory_of_out_is_read_before_it_is_written(impl: str) -> None:
    x = torch.randn(4, 1000)
    out = torch.zeros(4, 1000)
    seed = out.view(torch.int64)[0, 0]
    seed.fill_(7)
    want = fm.combine([x, fm.Noise(torch.tensor(7))], [1.0, 1.0], impl=impl)
    fm.combine([x, fm.Noise(seed)], [1.0, 1.0], out=out, impl=impl)
    assert torch.equal(out, want)


def test_interleaved_columns_of_one_buffer() -> None:
    """A joined state: out and operands are columns of one tensor, and no element is shared."""
    joined = torch.randn(16, 6)
    want = joined[:, :3] + 2 * joined[:, 3:]
    untouched = joined[:, 3:].clone()
    fm.combine([joined[:, :3], joined[:, 3:]], [1.0, 2.0], out=joined[:, :3])
    assert torch.equal(joined[:, :3], want)
    assert torch.equal(joined[:, 3:], untouched)


def test_out_must_have_a_place_for_each_element() -> None:
    x = torch.rand(4, 3)
    for out in (torch.zeros(3).expand(4, 3), torch.zeros(8).as_strided((4, 3), (1, 1))):
        for impl in ("auto", "reference"):
            with pytest.raises(ValueError, match=r"^out: expected a tensor whose elements have a place"):
                fm.combine([x], [1.0], out=out, impl=impl)


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_autograd_knows_that_out_was_written(impl: str) -> None:
    x, w = torch.rand(4, 3), torch.ones(4, 3, requires_grad=True)
    product = (w * x).sum()
    fm.combine([x], [2.0], out=x, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        fm.combine([x.clone()], [2.0], out=torch.empty(4, 3), impl=impl)


@pytest.mark.parametrize("way", ["new", "operand", "overlapping"])
@pytest.mark.parametrize("norm", [False, True])
def test_combine_into_a_tensor_is_compiled_whole(way: str, norm: bool) -> None:
    def function(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> object:
        return fm.combine([a, b], [t, 0.5], out=out, **({"atol": 0.1, "rtol": 0.1} if norm else {}))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    t = torch.rand(6)
    for call in (function, compiled):
        memory = torch.arange(30.0)
        a, b = memory[:24].view(6, 4), torch.linspace(0, 1, 24).view(6, 4)
        out = {"new": torch.empty(6, 4), "operand": a, "overlapping": memory[4:28].view(6, 4)}[way]
        expected = t[:, None] * a + 0.5 * b
        call(a, b, t, out)
        assert_rounded(out, expected, 3)  # half a number is exact; all are positive


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("norm", [False, True])
def test_compiled_combine_sees_views_that_overlap(backend: str, norm: bool) -> None:
    tolerances = {"atol": 0.1, "rtol": 0.2} if norm else {}

    def first(base: torch.Tensor) -> object:
        return fm.combine([base[0:4], torch.ones(4, 5)], [2.0, 1.0], out=base[1:5], **tolerances)

    def later(base: torch.Tensor) -> object:
        return fm.combine([base[4:8], base[0:4]], [1.0, 2.0], out=base[1:5], **tolerances)

    def coefficient(base: torch.Tensor) -> object:
        return fm.combine([torch.ones(4, 5)], [base[1:5, 0]], out=base[1:5], **tolerances)

    def table(base: torch.Tensor) -> object:
        return fm.combine([torch.ones(4, 5)] * 2, base[1:5, 1:3], out=base[1:5], **tolerances)

    for function in (first, later, coefficient, table):
        results = []
        for call in (function, torch.compile(function, fullgraph=True, backend=backend)):
            base = torch.arange(40.0).view(8, 5)
            call(base)
            results.append(base)
        assert torch.equal(*results)
