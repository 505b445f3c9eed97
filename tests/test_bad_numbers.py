"""Numbers that no kernel can hold, flags that are no bool: the error names the argument and shows nothing of C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fmkernels as fm

X = torch.ones(4, 3)
SEED = torch.tensor(1)
HUGE = (2**63, 2**64, 2**70, 10**400)

INTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "Noise, stream": ("stream", lambda v: fm.combine([X, fm.Noise(SEED, v)], [1.0, 1.0])),
    "Noise, row_offset": ("row_offset", lambda v: fm.combine([X, fm.Noise(SEED, 0, v)], [1.0, 1.0])),
    "interpolate, row_offset": ("row_offset", lambda v: fm.interpolate(X, alpha=0.5, sigma=0.5, row_offset=v)),
    "randn, seed": ("seed", lambda v: fm.randn(3, seed=v * 2)),
    "randn, stream": ("stream", lambda v: fm.randn(3, seed=1, stream=v)),
    "randn, row_offset": ("row_offset", lambda v: fm.randn(3, 4, seed=1, row_offset=v)),
    "random_words, row_offset": ("row_offset", lambda v: fm.random_words(3, 4, seed=1, row_offset=v)),
    "sample, row_offset": ("row_offset", lambda v: fm.paths.CondOT().sample(X, row_offset=v)),
    "set_cpu_pool_limit": ("megabytes", fm.set_cpu_pool_limit),
}
FLOATS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "combine, coefficients": ("coefficients", lambda v: fm.combine([X], [v])),
    "combine, error_coefficients": (
        "error_coefficients",
        lambda v: fm.combine([X], [1.0], error_coefficients=[v], atol=1.0),
    ),
    "combine, atol": ("atol", lambda v: fm.combine([X], [1.0], atol=v)),
    "combine, rtol": ("rtol", lambda v: fm.combine([X], [1.0], rtol=v)),
    "interpolate, alpha": ("alpha", lambda v: fm.interpolate(X, alpha=v, sigma=1.0)),
    "regression_loss, weight": ("weight", lambda v: fm.regression_loss(X, [X], [1.0], weight=v)),
    "regression_loss, delta": ("delta", lambda v: fm.regression_loss(X, [X], [1.0], kind="huber", delta=v)),
}


@pytest.mark.parametrize("value", HUGE, ids=["2^63", "2^64", "2^70", "10^400"])
@pytest.mark.parametrize("call", INTS)
def test_ints_beyond_int64_are_named(call: str, value: int) -> None:
    name, function = INTS[call]
    with pytest.raises(ValueError, match=rf"^{name}: expected "):
        function(value)


@pytest.mark.parametrize("call", FLOATS)
def test_ints_beyond_every_float_are_named(call: str) -> None:
    name, function = FLOATS[call]
    with pytest.raises(ValueError, match=rf"^{name}(\[0\])?: expected .*finite"):
        function(10**400)


@pytest.mark.parametrize("value", [1, "yes", X])
@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_store_noise_is_a_bool(value: Any, impl: str) -> None:
    with pytest.raises(TypeError, match=r"^store_noise: expected a bool"):
        fm.interpolate(X, alpha=0.5, sigma=0.5, store_noise=value, impl=impl)


def test_the_largest_numbers_that_fit_are_taken() -> None:
    noise = fm.Noise(SEED, 2**63 - 1, 2**62 // 3 - 4)
    for impl in ("auto", "native"):
        drawn = fm.combine([X, noise], [0.0, 1.0], impl=impl)
        assert torch.equal(drawn, fm.combine([X, noise], [0.0, 1.0], impl="native"))
        torch.testing.assert_close(drawn, fm.combine([X, noise], [0.0, 1.0], impl="reference"), rtol=0, atol=5e-6)
