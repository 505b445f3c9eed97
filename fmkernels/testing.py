"""Tools to test fused kernels: cases, error budgets, outputs poisoned with NaN. For users' own operations
too.

A :class:`Case` names one way to call one public operation: how its inputs are made, what comes out, and how
little memory traffic would do. Each operation keeps its cases in ``fmkernels/ops/<op>/cases.py``; tests take
those tagged "test", benchmarks those tagged "bench". A test of one implementation is then::

    inputs = case.make(dtype, device, seed=0)
    with poisoned_empty():
        out = case.evaluate(inputs, impl)
    oracle = case.evaluate(to_float64(inputs), "reference")
    reference = case.evaluate(inputs, "reference")
    for a, b, c in zip(out, oracle, reference, strict=True):
        assert_within_budget(a, b, c, noise=case.noise)
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _memory
from .random import Noise

Inputs = dict[str, Any]

# From the smallest case, which is all latency, to one far larger than any cache.
BENCH_SHAPES: tuple[tuple[int, ...], ...] = (
    (256, 2),
    (4096, 64),
    (64, 1024, 64),
    (256, 3, 32, 32),
    (256, 4, 32, 32),
    (256, 16, 64, 64),
)

LAYOUTS = ("contiguous", "strided", "transposed", "channels_last", "unaligned", "expanded")

# Implementations agree on normal numbers to this much in every dtype but float64 (fmkernels.randn).
NOISE_TOLERANCE = 2e-6


@dataclass(frozen=True)
class Case:
    """One way to call one public operation.

    Attributes:
        name: unique among the operation's cases.
        shape: of the data.
        make: (dtype, device, seed) -> keyword arguments of the public operation, random, never zeros.
        call: (inputs, impl) -> every tensor that the operation gives, gradients included; see
            :meth:`evaluate`.
        tensors_moved: how many tensors of ``shape`` must at least be read or written.
        flops_per_element: arithmetic for each element of ``shape``, a normal number counted as 25.
        noise: True where normal numbers are drawn inside, on which implementations agree to NOISE_TOLERANCE
            only; or the dtype in which they are drawn, if it is not that of the data.
        variant: what sets cases of one shape apart; part of a benchmark's record.
        tags: "test", "bench".
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[torch.dtype, torch.device, int], Inputs]
    call: Callable[[Inputs, str], tuple[Tensor, ...]]
    tensors_moved: int
    flops_per_element: int = 3
    noise: bool | torch.dtype = False
    variant: str = ""
    tags: frozenset[str] = frozenset({"test"})

    def evaluate(self, inputs: Inputs, impl: str = "auto") -> tuple[Tensor, ...]:
        """Everything the operation gives, on a copy of the inputs: repeated calls see (and draw) the same."""
        return self.call(copy_inputs(inputs), impl)

    def bytes(self, dtype: torch.dtype) -> int:
        """The least memory traffic of the case, coefficients and results of a reduction not counted."""
        return self.tensors_moved * math.prod(self.shape) * dtype.itemsize

    @property
    def flops(self) -> int:
        return self.flops_per_element * math.prod(self.shape)

    def __str__(self) -> str:  # a test's identifier
        return self.name


def select(cases: tuple[Case, ...], tag: str) -> list[Case]:
    return [case for case in cases if tag in case.tags]


def generator(device: torch.device | str, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def random_tensor(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rng: torch.Generator,
    layout: str = "contiguous",
    *,
    uniform: bool = False,
) -> Tensor:
    """Normal (or uniform) random data in one of LAYOUTS, on the generator's device.

    "strided" takes every second element of the last dimension, "unaligned" begins one element into its
    memory, "expanded" repeats its first row with stride 0.
    """
    draw = torch.rand if uniform else torch.randn

    def fresh(size: tuple[int, ...]) -> Tensor:
        # float32 draws: the same numbers, rounded, in every dtype
        return draw(size, generator=rng, device=rng.device, dtype=torch.float32).to(dtype)

    if layout == "strided":
        return fresh((*shape[:-1], 2 * shape[-1]))[..., ::2]
    if layout == "transposed":
        return fresh((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
    if layout == "channels_last":
        return fresh(shape).contiguous(memory_format=torch.channels_last)
    if layout == "unaligned":
        return fresh((math.prod(shape) + 1,))[1:].view(shape)
    if layout == "expanded":
        return fresh((1, *shape[1:])).expand(shape)
    return fresh(shape)


def _map(value: Any, change: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change, memo) for item in value)
    if id(value) not in memo:  # so that an output that is also an operand stays so
        memo[id(value)] = change(value)
    return memo[id(value)]


def copy_inputs(inputs: Inputs) -> Inputs:
    """Inputs that an operation may write to or draw from without a trace, in the same memory layout."""

    def change(value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return value.clone_state()
        return value

    memo: dict[int, Any] = {}
    out = inputs.get("out")
    if out is not None:
        memo[id(out)] = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device).copy_(out)
    return {name: _map(value, change, memo) for name, value in inputs.items()}


def to_float64(inputs: Inputs) -> Inputs:
    """The same inputs in float64, for the oracle: ``case.evaluate(to_float64(inputs), "reference")``."""

    def change(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            return value.double()
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        return value

    memo: dict[int, Any] = {}
    return {name: _map(value, change, memo) for name, value in inputs.items()}


def relative_error(out: Tensor, oracle: Tensor) -> float:
    """The relative root-mean-square error ||out - oracle|| / ||oracle|| in float64; inf where either is not
    finite.

    Where the oracle is all zeros (or empty) it is 0 if out is too, else inf.
    """
    if out.shape != oracle.shape:
        raise ValueError(f"out: expected the shape of the oracle, {tuple(oracle.shape)}, got {tuple(out.shape)}")
    error, norm = _error(out, oracle, torch.linalg.vector_norm), _size(oracle, torch.linalg.vector_norm)
    if not math.isfinite(error) or not math.isfinite(norm):
        return math.inf
    return error / norm if norm else (math.inf if error else 0.0)


def _error(out: Tensor, oracle: Tensor, norm: Callable[..., Tensor], **options: Any) -> float:
    if out.numel() == 0:
        return 0.0
    return float(norm(out.detach().double() - oracle.detach().double(), **options))


def _size(oracle: Tensor, norm: Callable[..., Tensor], **options: Any) -> float:
    return float(norm(oracle.detach().double(), **options)) if oracle.numel() else 0.0


def assert_within_budget(
    out: Tensor,
    oracle: Tensor,
    reference: Tensor,
    k: float = 2.0,
    *,
    floor_ulps: float = 4.0,
    noise: bool | torch.dtype = False,
    name: str = "output",
) -> None:
    """Fails unless the error of ``out`` is at most ``k`` times that of the reference, plus a floor of a few
    ulp.

    Errors are taken against the float64 oracle in two norms, the largest element's (a single wrong element
    shows) and the root mean square (a bias shows); an ulp is the epsilon of the dtype that is computed in,
    float32 for the narrower ones, times the oracle's size in that norm. A narrow result is rounded from it at
    most twice, by half an ulp of its own. Integers must be equal.

    Args:
        out: what is tested.
        oracle: the float64 result on the same inputs.
        reference: plain PyTorch's result in the same dtype.
        k: how many times the reference's error is allowed.
        floor_ulps: allowed beyond that, since the reference may be right by luck.
        noise: of the case: whether normal numbers are drawn inside (see NOISE_TOLERANCE), or in what dtype.
        name: what to call ``out`` in the message.

    Raises:
        AssertionError: with the error, the budget and where they come from.
    """
    if out.shape != oracle.shape or out.dtype != reference.dtype:
        raise AssertionError(
            f"{name}: expected shape {tuple(oracle.shape)} and {reference.dtype}, "
            f"got shape {tuple(out.shape)} and {out.dtype}"
        )
    if not out.dtype.is_floating_point:
        if not torch.equal(out, oracle.to(out.dtype)):
            count = int((out != oracle).sum())
            raise AssertionError(f"{name}: {count} of {out.numel()} integers differ")
        return
    wrong = ~torch.isfinite(out) & torch.isfinite(oracle)
    if bool(wrong.any()):
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {out.numel()} elements are not finite, though they should be"
        )
    own = torch.finfo(out.dtype).eps
    narrow = out.dtype.itemsize < 4
    relative = own + floor_ulps * torch.finfo(torch.float32).eps if narrow else floor_ulps * own
    drawn = noise if isinstance(noise, torch.dtype) else out.dtype
    if noise and drawn != torch.float64:
        relative += NOISE_TOLERANCE
    for kind, order in (("largest", math.inf), ("root-mean-square", 2)):
        error = _error(out, oracle, torch.linalg.vector_norm, ord=order)
        allowed = k * _error(reference, oracle, torch.linalg.vector_norm, ord=order)
        allowed += relative * _size(oracle, torch.linalg.vector_norm, ord=order)
        if not error <= allowed:  # NaN fails
            raise AssertionError(
                f"{name}: {kind} error {error:.3e} is over the budget {allowed:.3e} "
                f"({k} x the reference's error in {out.dtype} + {floor_ulps} ulp)"
            )


@contextlib.contextmanager
def unpooled() -> Iterator[None]:
    """Takes every output from torch's own allocator: large CPU outputs bypass fmkernels' pool."""
    limit = _memory.POOL_FROM_BYTES
    _memory.POOL_FROM_BYTES = sys.maxsize
    try:
        yield
    finally:
        _memory.POOL_FROM_BYTES = limit


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fills what torch.empty and its kin return with NaN (integers: the largest), so that unwritten outputs
    show."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module whose attributes are properties
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with unpooled():
            yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def fresh_noise(device: torch.device, seed: int, stream: int = 0, row_offset: int = 0) -> Noise:
    """Noise under a seed given as a number."""
    return Noise(torch.tensor(seed, dtype=torch.int64, device=device), stream, row_offset)
