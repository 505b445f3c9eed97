"""What the tests of implicit methods share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmkernels.solvers.methods.implicit_tableaus import IMPLICIT_TABLEAUS

TABLEAUS = list(IMPLICIT_TABLEAUS.values())
PAIRS = [tableau.name for tableau in TABLEAUS if tableau.error is not None]
FIXED = [tableau.name for tableau in TABLEAUS if tableau.error is None]
TIGHT = {"rtol": 1e-12, "atol": 1e-14}
every_tableau = pytest.mark.parametrize("tableau", TABLEAUS, ids=lambda tableau: tableau.name)


def times(*t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)
