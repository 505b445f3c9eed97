r"""The methods by name: one entry each, with what is known of it. Every interface looks its names up here.

A new method is one entry: a tableau in :mod:`fmkernels.solvers.methods.tableaus` or
:mod:`fmkernels.solvers.methods.implicit_tableaus` has one already. Tests and the table of names take what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import MappingProxyType
from typing import final

from ..._checks import check_callable, nearest, type_error, value_error
from ..programs.builder import Method
from . import implicit_tableaus, tableaus
from .adams import AdamsBashforth, AdamsMoulton
from .diffusion import DDIM, DEIS, LCM, LMS, Ancestral, DPMSolverPP, DPMSolverPP2S, UniPC
from .edm import EDM, Restart
from .implicit_tableaus import ImplicitTableau
from .runge_kutta import RungeKutta
from .sde import SDE
from .tableaus import Tableau

KINDS = {
    "fixed": "explicit, on a fixed grid",
    "adaptive": "explicit, with step control where no number of steps is given, else on a fixed grid",
    "implicit": "implicit, for stiff fields of small states",
    "sde": "with noise, on a fixed grid",
    "scipy": "SciPy's, on the host, without gradients",
}


@final
@dataclass(frozen=True)
class Entry:
    """What is known of a name.

    Args:
        name: what ``method=`` calls it.
        kind: one of KINDS.
        order: of the error, for noise the weak order, where the path is smooth; None where it does not converge.
        calls: of the network a step, the first and last steps apart; 0 where the solve decides.
        make: the method on a fixed grid, or None.
        tableau: of a Runge-Kutta method.
        needs: what a solve must have beside a velocity: "path", whose noise levels it uses.
        aliases: other names, the same everywhere.
        odeint: names by which :func:`fmkernels.odeint` alone calls it, which are torchdiffeq's.
        note: what else to know.
    """

    name: str
    kind: str
    order: int | None
    calls: int
    make: Callable[[], Method] | None = None
    tableau: Tableau | ImplicitTableau | None = None
    needs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    odeint: tuple[str, ...] = ()
    note: str = ""

    @property
    def options(self) -> tuple[str, ...]:
        """The settings of the method's class, with which ``method=`` takes an object of it."""
        made = None if self.make is None or isinstance(self.tableau, Tableau) else self.make()
        return tuple(f.name for f in fields(made)) if is_dataclass(made) else ()


@final
@dataclass(frozen=True)
class Interface:
    """A function that takes names of methods.

    Args:
        name: of the function, for errors.
        kinds: of the methods that it has.
        has: what there is beside a velocity, see :attr:`Entry.needs`.
        peer: whether torchdiffeq's names apply.
    """

    name: str
    kinds: tuple[str, ...]
    has: tuple[str, ...] = ()
    peer: bool = False

    def lacks(self, entry: Entry) -> str:
        """Why it has not that method; nothing if it has."""
        if entry.kind not in self.kinds:
            return f"is {KINDS[entry.kind]}"
        missing = [need for need in entry.needs if need not in self.has]
        return f"needs a {missing[0]}" if missing else ""


SAMPLE = Interface("fm.sample", ("fixed", "adaptive", "sde"), has=("path",))
STREAM = Interface("fm.sample_stream", ("adaptive",), has=("path",))
ODEINT = Interface("fm.odeint", ("fixed", "adaptive", "implicit", "scipy"), peer=True)
DENSE = Interface("fm.odeint_dense", ("adaptive",), peer=True)
LOG_PROB = Interface("fm.log_prob", ("fixed", "adaptive"))


# ---------------------------------------------------------------------- the entries

# Other names, by the method's own; torchdiffeq's rk4 is the 3/8 rule.
_ALIASES: dict[str, tuple[str, ...]] = {"dopri5": ("rk45",), "heun_euler": ("adaptive_heun",)}
_ODEINT: dict[str, tuple[str, ...]] = {
    "rk4_38": ("rk4",),
    "ab4": ("explicit_adams",),
    "am4": ("implicit_adams", "fixed_adams"),
}


def _explicit(tableau: Tableau) -> Entry:
    name, method = tableau.name, RungeKutta(tableau)
    return Entry(
        name,
        "fixed" if tableau.error is None else "adaptive",
        tableau.order,
        method.used,
        lambda: method,
        tableau,
        aliases=_ALIASES.get(name, ()),
        odeint=_ODEINT.get(name, ()),
        note=tableau.source,
    )


def _implicit(tableau: ImplicitTableau) -> Entry:
    return Entry(tableau.name, "implicit", tableau.order, 0, None, tableau, note=tableau.source)


def _adams() -> Iterator[Entry]:
    for order in (2, 3, 4):
        name = f"ab{order}"
        yield Entry(name, "fixed", order, 1, partial(AdamsBashforth, order), odeint=_ODEINT.get(name, ()))
    for order in (2, 3, 4):
        name = f"am{order}"
        yield Entry(name, "fixed", order, 2, partial(AdamsMoulton, order), odeint=_ODEINT.get(name, ()))


def _on_paths() -> Iterator[Entry]:
    """Methods that use the path's noise levels; the first steps of multistep ones bound their order."""

    def entry(kind: str, name: str, order: int | None, calls: int, make: Callable[[], Method], note: str = "") -> Entry:
        return Entry(name, kind, order, calls, make, needs=("path",), note=note)

    fixed, noisy = partial(entry, "fixed"), partial(entry, "sde")
    yield fixed("ddim", 1, 1, DDIM, "Euler's method on the straight path")
    yield fixed("dpmpp_1s", 1, 1, partial(DPMSolverPP, 1))
    yield fixed("dpmpp_2s", 2, 2, DPMSolverPP2S)
    yield fixed("dpmpp_2m", 2, 1, partial(DPMSolverPP, 2))
    yield fixed("dpmpp_3m", 2, 1, partial(DPMSolverPP, 3))
    yield fixed("unipc", 3, 1, UniPC, "predictor of order 2, corrector of order 3")
    yield fixed("unipc_bh1", 3, 1, partial(UniPC, variant="bh1"))
    yield fixed("unipc_3", 3, 1, partial(UniPC, 3), "its first step bounds the order")
    yield fixed("deis", 2, 1, DEIS, "its first step bounds the order")
    yield fixed("deis_t", 2, 1, partial(DEIS, variable="t"), "its first step bounds the order")
    yield fixed("lms", 2, 1, LMS, "its first step bounds the order")
    yield fixed("edm_euler", 1, 1, partial(EDM, heun=False))
    yield fixed("edm_heun", 2, 2, EDM)
    yield noisy("ddim_sde", 1, 1, partial(DDIM, eta=1.0))
    yield noisy("ancestral", 1, 1, Ancestral)
    yield noisy("lcm", None, 1, LCM, "for consistency models")
    yield noisy("dpmpp_1s_sde", 1, 1, partial(DPMSolverPP, 1, eta=1.0))
    yield noisy("dpmpp_2s_sde", 2, 2, partial(DPMSolverPP2S, eta=1.0))
    yield noisy("dpmpp_2m_sde", 2, 1, partial(DPMSolverPP, 2, eta=1.0))
    # the integral of the slope where the history has one, as in k-diffusion
    yield noisy("dpmpp_3m_sde", 2, 1, partial(DPMSolverPP, 3, eta=1.0, solver_type="heun"), "k-diffusion's")
    yield noisy("edm_churn", 2, 2, partial(EDM, s_churn=40.0))
    yield noisy("restart", 2, 2, Restart)
    yield noisy("euler_maruyama", 1, 1, SDE)
    yield noisy("heun_sde", 2, 2, partial(SDE, method="heun"))
    yield noisy("exponential_sde", 1, 1, partial(SDE, method="exponential"))


def _collected() -> Iterator[Entry]:
    yield from map(_explicit, tableaus.TABLEAUS.values())
    yield from _adams()
    yield from _on_paths()
    yield from map(_implicit, implicit_tableaus.IMPLICIT_TABLEAUS.values())
    yield Entry("scipy_solver", "scipy", None, 0, note='`options={"solver": ...}` of `scipy.integrate.solve_ivp`')


def _by_name() -> tuple[dict[str, Entry], dict[str, Entry], dict[str, Entry]]:
    """Entries by their own names; also by aliases; also by torchdiffeq's names."""
    own: dict[str, Entry] = {}
    everywhere: dict[str, Entry] = {}
    peers: dict[str, Entry] = {}
    for entry in _collected():
        own[entry.name] = entry
        for table, names in ((everywhere, (entry.name, *entry.aliases)), (peers, entry.odeint)):
            for name in names:
                if name in table:
                    raise AssertionError(f"two methods have the name {name!r}")
                table[name] = entry
    return own, everywhere, {**everywhere, **peers}


_own, _EVERYWHERE, _PEERS = _by_name()
METHODS: Mapping[str, Entry] = MappingProxyType(_own)

# ---------------------------------------------------------------------- looking names up


def names(interface: Interface = SAMPLE) -> list[str]:
    """The names of the methods that a function has, aliases among them."""
    known = _PEERS if interface.peer else _EVERYWHERE
    return [name for name, entry in known.items() if not interface.lacks(entry)]


def find(name: str, interface: Interface = SAMPLE) -> Entry:
    """The entry of a name.

    Raises:
        TypeError, ValueError: no name, an unknown one, or one of a method that the function has not; the message says
            why, and lists those that it has.
    """
    entry = (_PEERS if interface.peer else _EVERYWHERE).get(name) if isinstance(name, str) else None
    if entry is None or interface.lacks(entry):
        raise _refusal(name, interface, entry)
    return entry


def _refusal(name: str, interface: Interface, entry: Entry | None) -> Exception:
    known = names(interface)
    choices = f"one of {', '.join(map(repr, known))}, the methods of {interface.name}"
    if not isinstance(name, str):
        return type_error("method", choices, name)
    if entry is None:
        return value_error("method", f"{choices}{nearest(name, known)}", name)
    others = [i.name for i in (SAMPLE, ODEINT) if i is not interface and not i.lacks(entry)]
    where = f"; {' and '.join(others)} {'has' if len(others) == 1 else 'have'} it" if others else ""
    return value_error("method", f"{choices} ({name!r} {interface.lacks(entry)}{where})", name)


def adaptive_tableau(method: str | Method, interface: Interface = SAMPLE) -> Tableau | None:
    """The tableau of a name that means step control where no number of steps is given, else None."""
    if not isinstance(method, str):
        return None
    entry = find(method, interface)
    return entry.tableau if entry.kind == "adaptive" and isinstance(entry.tableau, Tableau) else None


def resolve(method: str | Method, interface: Interface = SAMPLE) -> Method:
    """A method of fixed steps by its name, or as it is given."""
    if not isinstance(method, str):
        check_callable("method", "a name or a method", method)
        return method
    entry = find(method, interface)
    if entry.make is None:
        raise value_error("method", "one of fixed, explicit steps", method)
    return entry.make()


def table() -> str:
    """All names in Markdown."""
    rows = [
        "| name | other names | kind | order | calls a step | needs | settings | |",
        "| --- | --- | --- | ---: | ---: | --- | --- | --- |",
    ]
    for entry in METHODS.values():
        others = [f"`{name}`" for name in entry.aliases] + [f"`{name}` (odeint)" for name in entry.odeint]
        settings = ", ".join(entry.options)
        if settings and entry.make is not None:
            settings = f"{type(entry.make()).__name__}({settings})"
        cells = (
            f"`{entry.name}`",
            ", ".join(others),
            entry.kind,
            "-" if entry.order is None else str(entry.order),
            str(entry.calls) if entry.calls else "-",
            ", ".join(entry.needs),
            settings,
            entry.note,
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
