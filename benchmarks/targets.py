"""The speeds that were promised, as data, and whether results keep them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .records import COPY, Record, by_case, ours


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

    @property
    def case(self) -> tuple[str, ...]:
        return self.family, "x".join(map(str, self.shape)), "float32", self.variant, self.timer

    def __str__(self) -> str:
        aim = f" (aim: {self.aim:g} x)" if self.aim else ""
        text = f"{self.family} {self.shape} {self.variant}".strip()
        return f"{text}: >= {self.at_least:g} x {self.against}{aim} [{self.device}]"


_LARGE, _SMALL = (256, 16, 64, 64), (256, 2)
_GPU = {"device": "cuda", "timer": "graph"}

TARGETS: tuple[Target, ...] = (
    Target("cfm", _LARGE, "x_0 given", "eager", 8.0),
    Target("cfm", _LARGE, "x_0 given", "compile", 2.5),
    Target("cfm", _LARGE, "x_0 drawn", "eager", 5.0),
    Target("cfm", _SMALL, "x_0 given", "eager", 1.0, aim=2.0),
    Target("randn", _LARGE, "", "eager", 4.0),
    Target("path", _LARGE, "x_0 given", COPY, 0.85, **_GPU),  # type: ignore[arg-type]
    Target("loss", _LARGE, "x_0 given", COPY, 0.85, **_GPU),  # type: ignore[arg-type]
    Target("cfm", _LARGE, "x_0 given", "eager", 4.0, **_GPU),  # type: ignore[arg-type]
    Target("cfm", _LARGE, "x_0 given", "compile", 1.3, **_GPU),  # type: ignore[arg-type]
    Target("cfm", _SMALL, "x_0 given", "eager", 1.0, device="cuda", timer="events"),
)


def check(records: Iterable[Record], device: str) -> tuple[list[str], bool]:
    """A line for each target of a device type, and whether all are kept; one that was not measured is not
    kept."""
    cases, lines, kept = by_case(records), [], True
    for target in TARGETS:
        if target.device != device:
            continue
        measured = cases.get(target.case, {})
        mine, other = ours(measured), measured.get(target.against)
        if mine is None or other is None:
            verdict, kept = "NOT MEASURED", False
        else:
            ratio = other["median"] / mine["median"]
            passed = ratio >= target.at_least
            verdict, kept = f"{'pass' if passed else 'FAIL'}: {ratio:.2f} x", kept and passed
        lines.append(f"{target}: {verdict}")
    return lines, kept
