"""Runge-Kutta methods as data: their error estimates are the published ones, in size too."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fmkernels.solvers.methods.implicit_tableaus import IMPLICIT_TABLEAUS, ImplicitTableau
from fmkernels.solvers.methods.tableaus import TABLEAUS, Tableau

EXPLICIT = {name: tableau for name, tableau in TABLEAUS.items() if tableau.error is not None}
IMPLICIT = {name: tableau for name, tableau in IMPLICIT_TABLEAUS.items() if tableau.error is not None}

# The order of the embedded solution, and the last weight of b minus b_hat. Order conditions are linear in the weights:
# they leave the estimate's size open, and so does every test of accuracy.
PUBLISHED = {
    "heun_euler": (1, 1 / 2),
    "bosh3": (2, -1 / 8),
    "fehlberg": (4, 2 / 55),
    "fehlberg2": (1, 1 / 512),
    "dopri5": (4, -1 / 60),  # with Shampine's embedded solution, as in torchdiffeq: two thirds of the method's own
    "tsit5": (4, -1 / 66),
    "dopri8": (7, 1 / 4),
    "trbdf2": (2, (2 - math.sqrt(2)) / 3),
    "kvaerno3": (2, 0.4358665215084590),
    "kencarp4": (3, 1 / 4 - 61727 / 225920),
}


@pytest.mark.parametrize("name", [*EXPLICIT, *IMPLICIT])
def test_error_estimates_are_the_published_ones(name: str) -> None:
    tableau: Tableau | ImplicitTableau = {**EXPLICIT, **IMPLICIT}[name]
    order, last = PUBLISHED[name]
    error, c = np.asarray(tableau.error), np.asarray(tableau.c)
    a = np.zeros((len(c), len(c)))
    for i, row in enumerate(tableau.a):
        a[i, : len(row)] = row
    assert error[np.nonzero(error)[0][-1]] == pytest.approx(last, rel=1e-12)
    # it sees nothing up to its order, in quadrature and along the stages, and something beyond
    scale = np.abs(error).sum()
    powers = [error @ c**n for n in range(order)]
    chains = [error @ np.linalg.matrix_power(a, n) @ np.ones_like(c) for n in range(order)]
    assert np.abs([*powers, *chains]).max() < 1e-9 * scale
    beyond = max(abs(error @ c**order), abs(error @ np.linalg.matrix_power(a, order) @ np.ones_like(c)))
    assert beyond > 1e-6 * scale
