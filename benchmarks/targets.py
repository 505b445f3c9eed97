"""The speeds that were promised, as data, and whether results keep them."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass

from .records import COPY, Record, by_case, ours, resolved
from .sampling import DOPRI5, HEADLINE, IMAGES

_STEP = "overhead a step"


@dataclass(frozen=True)
class Target:
    """Ours must be ``at_least`` times as fast as ``against`` (against COPY: that share of the copy floor)."""

    family: str
    shape: tuple[int, ...]
    variant: str
    against: str
    at_least: float
    device: str = "cpu"
    timer: str = "host"
    aim: float | None = None  # what one would like beyond the promise
    of: str = "time"  # or "overhead": the solver's own time in a whole solve; or "overhead a step"
    dtype: str = "float32"

    @property
    def case(self) -> tuple[str, ...]:
        return self.family, "x".join(map(str, self.shape)), self.dtype, self.variant, self.timer

    def __str__(self) -> str:
        aim = f" (aim: {self.aim:g} x)" if self.aim else ""
        text = f"{self.family} {self.shape} {self.variant}".strip()
        text += "" if self.dtype == "float32" else f" {self.dtype}"
        of = "" if self.of == "time" else f", {self.of}"
        return f"{text}{of}: >= {self.at_least:g} x {self.against}{aim} [{self.device}]"

    def seconds(self, record: Record) -> float:
        """What is compared; NaN for a solver's own time that is lost in noise."""
        if self.of == "time":
            return float(record["median"])
        solve = record["solve"]
        if not resolved(record):
            return math.nan
        return float(solve["overhead_per_step"] if self.of == _STEP else solve["overhead"]["median"])


_LARGE, _SMALL, _TOKENS = (256, 16, 64, 64), (256, 2), (64, 1024, 64)
_GPU = {"device": "cuda", "timer": "graph"}
_EULER, _DOPRI5, _GPU_BATCH = "euler 100", str(DOPRI5), (1024, 2)
_SOLVE_ON_GPU = {"device": "cuda", "timer": "events"}

TARGETS: tuple[Target, ...] = (
    # against the best form in plain PyTorch; with large blocks kept by the C library the table has its own column
    Target("cfm", _LARGE, "x_0 given", "eager", 5.0),
    Target("cfm", _LARGE, "x_0 given", "compile", 2.5),
    Target("cfm", _LARGE, "x_0 drawn", "eager", 5.0),
    Target("cfm", _SMALL, "x_0 given", "eager", 1.0, aim=1.2),
    Target("cfm", _TOKENS, "x_0 given", "compile", 1.0, aim=1.3, dtype="bfloat16"),
    Target("combine", _LARGE, "K=4", COPY, 0.95),
    Target("loss", _LARGE, "x_0 given", COPY, 0.95),
    Target("randn", _LARGE, "", "eager", 4.0),
    Target("path", _LARGE, "x_0 given", COPY, 0.85, **_GPU),  # type: ignore[arg-type]
    Target("loss", _LARGE, "x_0 given", COPY, 0.85, **_GPU),  # type: ignore[arg-type]
    Target("cfm", _LARGE, "x_0 given", "eager", 4.0, **_GPU),  # type: ignore[arg-type]
    Target("cfm", _LARGE, "x_0 given", "compile", 1.3, **_GPU),  # type: ignore[arg-type]
    Target("cfm", _SMALL, "x_0 given", "eager", 1.0, device="cuda", timer="events"),
    Target("sampling", HEADLINE, _EULER, "torchdiffeq", 4.0, of=_STEP),
    Target("sampling", HEADLINE, "euler cfg 50", "eager", 1.0, aim=1.3),
    Target("sampling", HEADLINE, _DOPRI5, "torchdiffeq", 5.0, of=_STEP),
    Target("sampling", HEADLINE, _DOPRI5, "torchode", 3.0, of=_STEP),
    Target("sampling", IMAGES, _DOPRI5, "torchdiffeq", 2.0, of="overhead"),
    Target("sampling", _GPU_BATCH, _EULER, "torchdiffeq", 10.0, **_SOLVE_ON_GPU),  # type: ignore[arg-type]
    Target("sampling", _GPU_BATCH, _EULER, "flow_matching", 10.0, **_SOLVE_ON_GPU),  # type: ignore[arg-type]
    Target("sampling", _GPU_BATCH, _DOPRI5, "torchdiffeq", 5.0, **_SOLVE_ON_GPU),  # type: ignore[arg-type]
    Target("sampling", _GPU_BATCH, _DOPRI5, "torchode", 3.0, **_SOLVE_ON_GPU),  # type: ignore[arg-type]
)


def is_promised(family: str, shape: tuple[int, ...], variant: str, dtype: str, device: str) -> bool:
    """Whether a promise for a device ("cpu", "cuda:1") is about a case."""
    kind = device.partition(":")[0]
    return any(
        (t.family, t.shape, t.variant, t.dtype, t.device) == (family, shape, variant, dtype, kind) for t in TARGETS
    )


def check(records: Iterable[Record], device: str, families: Container[str] | None = None) -> tuple[list[str], bool]:
    """A line for each target of a device type (and of some families), and whether all are kept; one that was
    not measured is not kept."""
    cases, lines, kept = by_case(records), [], True
    for target in TARGETS:
        if target.device != device or (families is not None and target.family not in families):
            continue
        measured = cases.get(target.case, {})
        mine, other = ours(measured), measured.get(target.against)
        if mine is None or other is None:
            verdict, kept = "NOT MEASURED", False
        else:
            ratio = target.seconds(other) / target.seconds(mine)
            passed = ratio >= target.at_least  # false for NaN
            told = (
                "NOT RESOLVED, lost in noise" if math.isnan(ratio) else f"{'pass' if passed else 'FAIL'}: {ratio:.2f} x"
            )
            verdict, kept = told, kept and passed
        lines.append(f"{target}: {verdict}")
    return lines, kept
