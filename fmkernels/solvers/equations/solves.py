"""Solves of a packed state by whatever kind of method is asked for."""

from __future__ import annotations

from torch import Tensor

from ..._checks import check_has_values
from ..implicit.solve import option_names, solve_implicit
from ..methods import registry as methods
from . import scipy_solve
from .callbacks import Callbacks
from .controlled import solve_controlled
from .fixed import solve_fixed
from .options import (
    ADAPTIVE_OPTIONS,
    FIXED_OPTIONS,
    Settings,
    check_options,
    named_method,
    per_sample_of,
    refuse_transforms,
)
from .packed import Packed


def solve(packed: Packed, t: Tensor, settings: Settings) -> Tensor:
    """The packed states at the times t."""
    method, options = settings.method, settings.options
    tableau = methods.adaptive_tableau(method, methods.ODEINT)
    kind = methods.find(method, methods.ODEINT).kind if isinstance(method, str) else "fixed"
    if kind != "fixed":
        if tableau is None:
            refuse_transforms(method)
        check_has_values("y0", packed.y0)
    if tableau is not None:
        check_options(packed, settings, ADAPTIVE_OPTIONS, judges=True)
        return solve_controlled(packed, t, tableau, settings)
    if kind == "implicit":
        return _implicit(packed, t, settings)
    if kind == "scipy":
        check_options(packed, settings, scipy_solve.OPTIONS, judges=False, steps=False)
        return scipy_solve.solve_scipy(packed, t, settings)
    check_options(packed, settings, FIXED_OPTIONS, judges=False)
    return solve_fixed(packed, t, named_method(method, options), options)


def _implicit(packed: Packed, t: Tensor, settings: Settings) -> Tensor:
    method, options = settings.method, settings.options
    names = option_names(method, options)
    check_options(packed, settings, names, judges="controller" in names)
    per_sample_of(packed, options)
    return solve_implicit(
        packed.field,
        packed.y0,
        t,
        method,
        options,
        rtol=packed.tolerance("rtol", settings.rtol),
        atol=packed.tolerance("atol", settings.atol),
        norm=packed.norm(options.get("norm")),
        watch=Callbacks(packed),
    )
