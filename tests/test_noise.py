"""The noise: known answers, bit-exactness, statistics, independence, seeds."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats

import fmkernels as fm
from fmkernels import _dispatch
from fmkernels.random import Noise, philox_words

IMPLS = [impl for impl in ("reference", "native") if _dispatch.unavailable(impl, "cpu") is None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
N = 1 << 20


@pytest.mark.parametrize("impl", IMPLS)
def test_known_answers(impl: str) -> None:
    """Random123's test vectors of philox4x32-10 (Salmon et al. 2011)."""
    assert [hex(w) for w in fm.random_words(4, seed=0, impl=impl).tolist()] == [
        "0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8",
    ]  # fmt: skip
    # counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0
    block, stream, key = 0x85A308D3_243F6A88, 0x03707344_13198A2E, 0x299F31D0_A4093822
    words = philox_words(torch.tensor(key), stream, 0, 4)  # block 0: the streams' high half
    assert words.shape == (4,)
    offset = 4 * (block >> 3)  # the largest that int64 holds in elements still has the low words' carry
    a = torch.ops.fmkernels.random([8], torch.tensor(key), 0, stream, offset, torch.int64, impl)
    assert torch.equal(a, philox_words(torch.tensor(key), stream, offset, 8))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 7, 4 * (2**32 - 1) - 3, 2**61])
@pytest.mark.parametrize("count", [1, 3, 5, 130, 1025])
def test_words_are_bit_exact_at_every_phase_and_carry(impl: str, offset: int, count: int) -> None:
    seed = torch.tensor(-(2**62) + 12345)
    got = torch.ops.fmkernels.random([count], seed, 0, 5, offset, torch.int64, impl)
    assert torch.equal(got, philox_words(seed, 5, offset, count))
    z = torch.ops.fmkernels.random([count], seed, 2, 5, offset, torch.float32, impl)
    want = torch.ops.fmkernels.random([count], seed, 2, 5, offset, torch.float64, "reference")
    assert (z.double() - want).abs().max() < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_normals_agree_to_2e_6(impl: str) -> None:
    z = fm.randn(N, seed=1, dtype=torch.float32, impl=impl)
    want = fm.randn(N, seed=1, dtype=torch.float64, impl="reference")
    assert (z.double() - want).abs().max() < 2e-6
    assert (fm.randn(N, seed=1, dtype=torch.float64, impl=impl) - want).abs().max() < 1e-13
    for dtype in (torch.bfloat16, torch.float16):
        rounded = fm.randn(N, seed=1, dtype=dtype, impl=impl)
        assert (rounded.float() - z.to(dtype).float()).abs().max() <= z.abs().max() * torch.finfo(dtype).eps
        assert (rounded != z.to(dtype)).float().mean() < 1e-3


def test_extreme_words_stay_finite() -> None:
    """The smallest and largest uniforms of Box-Muller: |z| <= 6.67 and no NaN."""
    found = fm.randn(1 << 24, seed=9)
    assert torch.isfinite(found).all()
    assert 5.0 < found.abs().max() < 6.67


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_uniforms(impl: str, dtype: torch.dtype) -> None:
    u = fm.rand(N, seed=2, dtype=dtype, impl=impl)
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u, fm.rand(N, seed=2, dtype=dtype, impl="reference"))
    words = fm.random_words(N, seed=2, impl=impl)
    bits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11, torch.float64: 32}[dtype]
    assert torch.equal(u.double(), (words >> (32 - bits)).double() * 2.0**-bits)
    if dtype in (torch.float32, torch.float64):
        assert stats.kstest(u.double().numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**64 - 1, 123456789])
def test_moments_and_law_of_normals(seed: int) -> None:
    z = fm.randn(N, seed=seed).double()
    # five standard deviations of each moment's estimate
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - moment) < 5 * (variance / N) ** 0.5
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4


def test_tails_of_normals() -> None:
    z = fm.randn(1 << 24, seed=3).double()
    for bound in (3.0, 4.0, 5.0):
        expected = 2 * stats.norm.sf(bound) * z.numel()
        assert abs((z.abs() > bound).sum().item() - expected) < 5 * expected**0.5


def test_independence_across_streams_seeds_rows_and_lags() -> None:
    base = fm.randn(64, N // 64, seed=4).double()
    limit = 5 / N**0.5
    others = [fm.randn(64, N // 64, seed=4, stream=s) for s in (1, 2, 2**32, 2**40)]
    others += [fm.randn(64, N // 64, seed=s) for s in (5, 4 + 2**32, -4)]
    for other in others:
        assert abs((base * other.double()).mean().item()) < limit
        assert abs(((base**2 - 1) * (other.double() ** 2 - 1)).mean().item()) < 2 * limit
    flat = base.flatten()
    for lag in (1, 2, 3, 4, 5, 64, N // 64):
        assert abs((flat[:-lag] * flat[lag:]).mean().item()) < limit
        assert abs(((flat[:-lag] ** 2 - 1) * (flat[lag:] ** 2 - 1)).mean().item()) < 2 * limit
    rows = torch.corrcoef(base)
    assert (rows - torch.eye(64)).abs().max() < 6 / (N // 64) ** 0.5
    # the pair of a Box-Muller: on a circle the angle is uniform
    angle = torch.atan2(flat[1::2], flat[::2]) / (2 * torch.pi) % 1
    assert stats.kstest(angle.numpy(), "uniform").pvalue > 1e-4


def test_no_counter_is_used_twice() -> None:
    """(block, stream) is a 128-bit counter without carry between its halves: element i of a stream has block i / 4 up
    to 2^61 elements and more, so 2^33 counters are far from a repeat. Checked where words of the counter change."""
    seen: dict[tuple[int, ...], tuple[int, int]] = {}
    blocks = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**33 + 1, 2**40]
    for block, stream in itertools.product(blocks, [0, 1, 2**32 - 1, 2**32, 2**33]):
        words = tuple(philox_words(torch.tensor(6), stream, 4 * block, 4).tolist())
        assert words not in seen, (block, stream, seen[words])
        seen[words] = (block, stream)


def test_seeds_come_from_torchs_generators() -> None:
    torch.manual_seed(0)
    a = fm.randn(10)
    b = fm.randn(10)
    torch.manual_seed(0)
    assert torch.equal(a, fm.randn(10))
    assert torch.equal(b, fm.randn(10))
    assert not torch.equal(a, b)
    generator = torch.Generator().manual_seed(3)
    c = fm.randn(10, generator=generator)
    assert torch.equal(c, fm.randn(10, generator=torch.Generator().manual_seed(3)))
    seeds = torch.stack([fm.draw_seed() for _ in range(1000)])
    assert seeds.unique().numel() == 1000
    assert (seeds < 0).float().mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_are_the_wholes_rows(impl: str) -> None:
    whole = fm.randn(10, 7, seed=8, impl=impl)
    for first in range(10):
        assert torch.equal(fm.randn(10 - first, 7, seed=8, row_offset=first, impl=impl), whole[first:])
    x = torch.zeros(4, 7)
    drawn = fm.combine([x, Noise(torch.tensor(8), row_offset=5)], [1.0, 1.0], impl=impl)
    assert torch.equal(drawn, whole[5:9])


def test_shapes() -> None:
    assert fm.randn(2, 3).shape == fm.randn((2, 3)).shape == fm.randn([2, 3]).shape == (2, 3)
    assert fm.randn(()).shape == ()
    assert fm.randn(0, 3).shape == (0, 3)
    assert fm.rand(3, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fm.randn(-1), ValueError, "size: expected lengths >= 0"),
        (lambda: fm.randn(1.5), TypeError, "size"),
        (lambda: fm.randn(3, dtype=torch.int32), ValueError, "dtype: expected one of"),
        (lambda: fm.randn(3, seed=1.5), TypeError, "seed: expected an int"),
        (lambda: fm.randn(3, seed=2**64), ValueError, "seed: expected an int that fits"),
        (lambda: fm.randn(3, seed=torch.ones(2, dtype=torch.int64)), ValueError, "seed: expected an int64 tensor"),
        (lambda: fm.randn(3, seed=1, generator=torch.Generator()), ValueError, "seed, generator: expected at most one"),
        (lambda: fm.randn(3, seed=torch.tensor(1), device="meta"), ValueError, "seed: expected a tensor on meta"),
        (lambda: fm.randn(3, stream=-1), ValueError, "stream: expected an int >= 0"),
        (lambda: fm.rand(3, row_offset=-1), ValueError, "row_offset: expected an int >= 0"),
        (lambda: fm.random_words(3, impl="cuda"), ValueError, "impl: expected one of"),
        (lambda: Noise(3), TypeError, "seed: expected a torch.Tensor"),
        (lambda: Noise(torch.tensor(1.0)), ValueError, "seed: expected an int64 tensor"),
        (
            lambda: fm.combine([torch.ones(2), "noise"], [1.0, 1.0]),
            TypeError,
            r"operands\[1\]: expected a tensor or fm.Noise",
        ),
        (lambda: fm.combine([], []), TypeError, "operands: expected a tensor first"),
        (lambda: fm.combine([torch.ones(2)] * 17, [1.0] * 17), ValueError, "operands: expected at most 16 tensors"),
        (lambda: fm.combine([torch.ones(2)], [1.0, 2.0]), ValueError, "coefficients: expected 1 coefficients"),
        (lambda: fm.combine([torch.ones(2)], ["a"]), TypeError, r"coefficients\[0\]: expected a number"),
        (
            lambda: fm.combine([torch.ones(2)], [float("nan")]),
            ValueError,
            r"coefficients\[0\]: expected a finite number",
        ),
        (
            lambda: fm.combine([torch.ones(2)], torch.ones(2, 3)),
            ValueError,
            "coefficients: expected a last dimension of 1",
        ),
        (lambda: fm.combine([torch.ones(2)], [1.0], atol=-1.0), ValueError, "atol: expected a finite number >= 0"),
        (
            lambda: fm.combine([torch.ones(2)], [1.0], error_coefficients=[1.0]),
            ValueError,
            "error_coefficients: expected atol",
        ),
        (lambda: fm.combine([torch.ones(2)], [1.0], out=torch.ones(3)), ValueError, "out: expected the shape"),
        (
            lambda: fm.combine([torch.ones(2, requires_grad=True)], [1.0], out=torch.ones(2)),
            ValueError,
            "out: expected no operand",
        ),
        (lambda: fm.regression_loss(torch.ones(2), [], []), ValueError, "operands: expected 1 to 3"),
        (lambda: fm.regression_loss(torch.ones(2), torch.ones(2), [1.0]), TypeError, "operands: expected a sequence"),
        (
            lambda: fm.regression_loss(torch.tensor(1.0), [torch.tensor(1.0)], [1.0], reduction="none"),
            ValueError,
            "pred: expected at least one dimension",
        ),
    ],
)
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_seeds_beyond_int64_are_the_unsigned_ones() -> None:
    for seed in (2**63, 2**63 + 1, 2**64 - 1):
        assert torch.equal(fm.randn((9,), seed=seed), fm.randn((9,), seed=seed - 2**64))


@pytest.mark.parametrize("name", ["stream", "row_offset"])
def test_noise_with_a_number_below_0_is_refused(name: str) -> None:
    noise, x = fm.Noise(torch.tensor(1)), torch.zeros(4, 3)
    setattr(noise, name, -1)
    for call in (
        lambda: fm.combine([x, noise], [1.0, 1.0]),
        lambda: fm.regression_loss(x, [noise], [1.0]),
        lambda: fm.interpolate(x, noise, alpha=0.5, sigma=0.5),
    ):
        with pytest.raises(ValueError, match=f"noise with a stream and a row_offset >= 0|{name}"):
            call()
