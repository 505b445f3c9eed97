"""The registry of names: one entry a method, aliases that mean it everywhere, errors that list what there is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_problems import program_of

import fmkernels as fm
from fmkernels._names import Names
from fmkernels.paths import CondOT
from fmkernels.solvers.methods import registry as methods
from fmkernels.solvers.methods.adams import AdamsMoulton
from fmkernels.solvers.methods.diffusion import DDIM
from fmkernels.solvers.methods.implicit_tableaus import IMPLICIT_TABLEAUS
from fmkernels.solvers.methods.runge_kutta import RungeKutta
from fmkernels.solvers.methods.sde import SDE
from fmkernels.solvers.methods.sde_coefficients import DIFFUSIONS
from fmkernels.solvers.methods.tableaus import TABLEAUS
from fmkernels.solvers.sampling.grids import SCHEDULES

each_entry = pytest.mark.parametrize("entry", methods.METHODS.values(), ids=lambda entry: entry.name)
ADAPTIVE = [entry for entry in methods.METHODS.values() if entry.kind == "adaptive"]


def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.sin(5.0 * t[:, None]) - x


def swapped(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.sin(5.0 * t) - y


# ---------------------------------------------------------------------- entries


@each_entry
def test_entries_say_what_is_true(entry: methods.Entry) -> None:
    assert entry.kind in methods.KINDS
    assert (entry.make is None) == (entry.kind in ("implicit", "scipy"))
    if entry.make is None:
        return
    grid = [0.1 + 0.05 * i for i in range(17)]
    if entry.name == "restart":  # whose levels are near data
        grid = [0.1 + 0.01 * i for i in range(17)]
    small, large = (program_of(entry.make(), grid[:n], CondOT()) for n in (9, 17))
    assert large.calls - small.calls == 8 * entry.calls
    noisy = program_of(entry.make(), [*np.linspace(0.1, 0.95, 9).tolist(), 1.0], CondOT()).streams > 0
    assert noisy == (entry.kind == "sde")
    order = getattr(entry.make(), "order", None)
    if isinstance(entry.tableau, object) and not entry.needs:
        assert order == entry.order


def test_every_tableau_has_an_entry() -> None:
    for name, tableau in {**TABLEAUS, **IMPLICIT_TABLEAUS}.items():
        assert methods.METHODS[name].tableau is tableau
        assert methods.METHODS[name].order == tableau.order
    assert {entry.tableau for entry in ADAPTIVE} == {t for t in TABLEAUS.values() if t.error is not None}


def test_the_table_has_every_name_and_is_in_the_documentation() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "api.md"
    table = methods.table()
    for interface in (methods.SAMPLE, methods.ODEINT, methods.LOG_PROB, methods.STREAM, methods.DENSE):
        for name in methods.names(interface):
            assert f"`{name}`" in table, name
    if page.exists():
        assert table in page.read_text()


# ---------------------------------------------------------------------- aliases


@pytest.mark.parametrize(
    ("alias", "name"), [(alias, entry.name) for entry in methods.METHODS.values() for alias in entry.aliases]
)
def test_an_alias_is_its_method_everywhere(alias: str, name: str) -> None:
    x = torch.tensor([[0.3], [-1.0], [2.0]], dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for options in ({}, {"steps": 5}):
        got, wanted = (fm.sample(field, x, method=m, **options) for m in (alias, name))
        assert torch.equal(got[0], wanted[0])
        assert np.all(np.asarray(got[1].steps) == np.asarray(wanted[1].steps))
    assert torch.equal(fm.odeint(swapped, x, t, method=alias), fm.odeint(swapped, x, t, method=name))
    assert torch.equal(fm.log_prob(field, x, method=alias).log_prob, fm.log_prob(field, x, method=name).log_prob)
    got, wanted = (list(fm.sample_stream(field, list(x), method=m, capacity=3)) for m in (alias, name))
    assert [r[2:] for r in got] == [r[2:] for r in wanted]
    assert all(torch.equal(a.x, b.x) for a, b in zip(got, wanted, strict=True))


def test_no_alias_goes_around_the_error_control() -> None:
    """ "rk45" took one uncontrolled step."""
    x = torch.tensor([[0.3]], dtype=torch.float64)
    exact, _ = fm.sample(field, x, method="dopri8", steps=200)
    for entry in ADAPTIVE:
        for name in (entry.name, *entry.aliases):
            tolerance = 1e-4 if entry.order < 4 else 1e-8
            samples, result = fm.sample(field, x, method=name, rtol=tolerance, atol=tolerance)
            assert int(result.steps[0]) > 3
            assert float((samples - exact).abs().max()) < 50 * tolerance


def test_names_of_torchdiffeq_are_for_odeint_alone() -> None:
    assert methods.resolve("rk4", methods.ODEINT) == RungeKutta(TABLEAUS["rk4_38"])
    assert methods.resolve("rk4") == RungeKutta(TABLEAUS["rk4"])
    assert methods.resolve("fixed_adams", methods.ODEINT) == AdamsMoulton(4)
    with pytest.raises(ValueError, match="'explicit_adams' of type str"):
        methods.resolve("explicit_adams")
    for order in (1, 3, 9):
        options = {"max_order": order}
        x, t = torch.ones(2, dtype=torch.float64), torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
        got = fm.odeint(swapped, x, t, method="implicit_adams", options=options)
        wanted = fm.odeint(swapped, x, t, method=AdamsMoulton(min(max(order, 2), 5)))
        assert torch.equal(got, wanted)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, t: fm.sample(field, x, method="dopri"),
            ValueError,
            r"_sde', the .* \(nearest: 'dopri8'\)",
        ),
        (lambda x, t: fm.sample(field, x, method="trbdf2"), ValueError, "'trbdf2' is implicit.*fm.odeint has it"),
        (lambda x, t: fm.sample(field, x, method="sdirk2", steps=3), ValueError, "fm.odeint has it"),
        (lambda x, t: fm.sample(field, x, method=4), TypeError, "method: expected a name or a method, got 4"),
        (lambda x, t: fm.sample(field, x, method=DDIM), TypeError, "method: expected a name or a method"),
        (lambda x, t: fm.odeint(swapped, x, t, method="dpmpp_2m"), ValueError, "needs a path; fm.sample has it"),
        (lambda x, t: fm.odeint(swapped, x, t, method="ddim_sde"), ValueError, "is with noise.*fm.sample has it"),
        (lambda x, t: fm.odeint(swapped, x, t, method="rk45x"), ValueError, "nearest: 'rk45'"),
        (lambda x, t: fm.log_prob(field, x, method="unipc"), ValueError, "needs a path"),
        (lambda x, t: fm.log_prob(field, x, method="unipc", steps=4), ValueError, "needs a path"),
        (lambda x, t: fm.log_prob(field, x, method="gauss"), ValueError, "one of 'euler', .*'am4', the methods of"),
        (
            lambda x, t: list(fm.sample_stream(field, list(x), method="rk4", capacity=2)),
            ValueError,
            "'rk4' is explicit",
        ),
        (lambda x, t: fm.sample(field, x, schedule="karas"), ValueError, r"schedule: .*\(nearest: 'karras'\)"),
        (lambda x, t: SDE("sbmd"), ValueError, r"diffusion: .*\(nearest: 'sbdm'\)"),
        (lambda x, t: SDE(method=["euler"]), TypeError, "method: expected one of the names 'euler'"),
    ],
)
def test_errors_list_what_there_is(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(3, 1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_names() -> None:
    assert isinstance(SCHEDULES, Names)
    assert isinstance(DIFFUSIONS, Names)
    assert SCHEDULES.find("uniform") is SCHEDULES["uniform"]
    assert len(set(SCHEDULES)) == len(SCHEDULES) == len(list(SCHEDULES.values()))
    assert math.isclose(SCHEDULES["power"](2)[1], 0.25)
    with pytest.raises(TypeError, match="schedule: expected one of the names"):
        SCHEDULES.find(None)
