"""The list of bugs that `make mutants` plants fits the sources, so that a change of either keeps the other in step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def test_every_planted_bug_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    import mutants  # type: ignore[import-not-found]

    listed = mutants.mutants()
    faults = [f"{mutant.name}: {fault}" for mutant in listed if (fault := mutants.stale(mutant))]
    assert not faults, "\n".join(faults)
    assert len(set(listed)) == len(listed)
