"""What a family of cases is, and the list of implementations that a case is measured with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmkernels import _dispatch
from fmkernels.testing import Case, Inputs

from .peers import PEERS, Peer, load

Outputs = dict[str, Any]
Run = Callable[[Inputs], Outputs]
Transform = Callable[[Callable[..., Any]], Callable[..., Any]]  # identity, or torch.compile
HALF_LOSS = "half loss"  # a variant for half-precision data alone: the loss taken in their dtype
BUDGET_FACTOR = 2.0  # an error may be so many times that of plain PyTorch in the same dtype


@dataclass(frozen=True)
class Implementation:
    name: str
    run: Run
    ours: bool = False
    auto: bool = False  # impl="auto", what users get


@dataclass(frozen=True)
class Solve:
    """The network's part in a solve."""

    network: Callable[[Any], Any]  # the same calls on the same tensors, without the solver
    calls: int
    rows: float  # evaluations a sample: calls, but for batches that shrink or grow
    steps: int


@dataclass(frozen=True)
class Family:
    """One kind of work; ``oracle`` and ``reference`` see the results too, for the noise that a run has
    drawn."""

    name: str
    what: str
    cases: list[Case]
    # Variant ("" for the default) -> run, for one value of impl=; none where the family has no such choice.
    ours: Callable[[Case, str], dict[str, Run]]
    # Variant -> plain PyTorch: "" the best form known, "naive" the formula as it stands; none where nobody writes it.
    plain: Callable[[Case, Transform], dict[str, Run]]
    oracle: Callable[[Case, Inputs, Outputs], dict[str, Tensor]]  # in float64
    reference: Callable[[Case, Inputs, Outputs], dict[str, Tensor]]  # plain PyTorch in the case's dtype
    peer: Callable[[Case, Any], dict[str, Run]] | None = None  # variant -> run, of what a peer's load() gives
    peers: tuple[Peer, ...] = PEERS
    checked: Callable[[Outputs], Outputs] = lambda outputs: outputs  # what of the results is compared
    solve: Callable[[Case, Run, Inputs], Solve] | None = None  # of a family that times networks too
    budget: Callable[[Outputs], float] = lambda outputs: BUDGET_FACTOR
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    compiles: bool = True  # whether the plain code is also timed under torch.compile


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def implementations(
    family: Family,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_compile: bool = True,
    quick: bool = False,
    peers: bool = True,
) -> Iterator[Implementation | tuple[str, str]]:
    """Every implementation of a case; for one that cannot run here, (name, why)."""
    half = dtype in (torch.bfloat16, torch.float16)
    # What users get first: impl="auto" may take shortcuts that an explicit choice does not.
    for variant, run in family.ours(case, "auto").items():
        yield Implementation(_joined("fmkernels", variant), run, ours=True, auto=not variant)
    for impl in () if quick else ("native", "triton", "reference"):
        reason = _dispatch.unavailable(impl, device.type)
        if reason is not None:
            yield f"fmkernels-{impl}", reason
            continue
        for variant, run in family.ours(case, impl).items():
            yield Implementation(_joined(f"fmkernels-{impl}", variant), run, ours=True)
    for variant, run in family.plain(case, eager).items():
        if half or variant != HALF_LOSS:
            yield Implementation(_joined("eager", variant), run)
    if family.compiles and with_compile:
        # A fresh start: otherwise the recompilation limit of the shared formulas would be reached after a few
        # cases.
        torch.compiler.reset()
        yield Implementation("compile", family.plain(case, compiled)[""])
    elif family.compiles:
        yield "compile", "left out by --no-compile"
    for peer in family.peers if family.peer is not None and peers else ():
        loaded = load(peer)
        if isinstance(loaded, str):
            yield peer.name, loaded
            continue
        assert family.peer is not None
        for variant, run in family.peer(case, loaded).items():
            if half or variant != HALF_LOSS:
                yield Implementation(_joined(peer.name, variant), run)


def _joined(name: str, variant: str) -> str:
    return f"{name}-{variant}" if variant else name
