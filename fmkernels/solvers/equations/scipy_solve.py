"""torchdiffeq's "scipy_solver": SciPy's solvers on the host, which have no gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._checks import check_choice, warn
from ..adaptive.options import number_option
from .options import Settings
from .packed import Packed

NAME = "scipy_solver"
OPTIONS = ("solver", "min_step", "max_step", "first_step")
SOLVERS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")


class _WithoutGradient(torch.autograd.Function):
    """A solution that says why it has no gradient, where one is asked."""

    @staticmethod
    def forward(ctx: Any, ys: Tensor, *inputs: Tensor) -> Tensor:
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"odeint: method {NAME!r} has no gradients; take odeint_adjoint, or another method")


def solve_scipy(packed: Packed, t: Tensor, settings: Settings) -> Tensor:
    """The packed states at the times t, by ``scipy.integrate.solve_ivp``.

    Options: solver, one of SOLVERS ("LSODA" by default); first_step, max_step, and min_step of LSODA.
    """
    options, y0 = settings.options, packed.y0
    solver = options.get("solver", "LSODA")
    check_choice("options: solver", solver, SOLVERS)
    arguments: dict[str, Any] = {}
    for name, without in (("min_step", 0.0), ("max_step", math.inf), ("first_step", None)):
        value = options.get(name)
        if value is not None and value != without:
            arguments[name] = number_option(name, value, above=0.0)
    if solver != "LSODA" and arguments.pop("min_step", None) is not None:
        warn(f"options: solver {solver!r} has no 'min_step'")
    for name, given in (("rtol", settings.rtol), ("atol", settings.atol)):
        tolerance = packed.tolerance(name, given)
        if isinstance(tolerance, Tensor):
            arguments[name] = tolerance.expand(y0.shape).reshape(-1).double().cpu().numpy()
        else:
            arguments[name] = tolerance
    if t.shape[0] == 1 or y0.numel() == 0:
        ys = y0.detach().expand(t.shape[0], *y0.shape).clone()
    else:
        ys = _solve(packed, t.detach().double().tolist(), solver, arguments)
    inputs = [x for x in (y0, t) if x.requires_grad]
    if torch.is_grad_enabled() and inputs:
        return _WithoutGradient.apply(ys, *inputs)  # type: ignore[no-untyped-call, no-any-return]
    return ys


def _solve(packed: Packed, times: list[float], solver: str, arguments: dict[str, Any]) -> Tensor:
    try:
        from scipy.integrate import solve_ivp  # an optional dependency
    except ImportError as error:
        raise ImportError(f"method {NAME!r}: expected SciPy to be installed") from error
    y0 = packed.y0.detach()

    @torch.no_grad()
    def func(t: float, y: Any) -> Any:
        state = torch.tensor(y, dtype=torch.float64, device="cpu").to(y0.device, y0.dtype).reshape(y0.shape)
        value = packed.call(torch.tensor(t, dtype=y0.dtype, device=y0.device), state)
        return value.reshape(-1).double().cpu().numpy()

    start = y0.reshape(-1).double().cpu().numpy()
    solution = solve_ivp(func, (times[0], times[-1]), start, method=solver, t_eval=times, **arguments)
    ys = torch.tensor(solution.y.T, dtype=torch.float64, device="cpu").to(y0.device, y0.dtype).reshape(-1, *y0.shape)
    missing = len(times) - ys.shape[0]
    if missing:
        warn(f"odeint: method {NAME!r} ended before the last time: {solution.message}")
        ys = torch.cat([ys, ys.new_full((missing, *y0.shape), math.nan)])
    return ys
