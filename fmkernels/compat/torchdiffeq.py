"""torchdiffeq's four functions (Chen 2018): fmkernels' equations have its arguments, options and method names."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor

from ..solvers.equations import adjoint, dense, event_times
from ..solvers.equations import odeint as equations

Function = TypeVar("Function", bound=Callable[..., Any])


def _with_its_errors(function: Function) -> Function:
    """torchdiffeq asserts what times and states are; what is no floating tensor is a TypeError there too."""

    @wraps(function)
    def solve(func: Any, y0: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        for name, value, kinds in (("y0", y0, (Tensor, tuple)), ("t", t, Tensor)):
            if not isinstance(value, kinds):
                raise AssertionError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        try:
            return function(func, y0, t, *args, **kwargs)
        except ValueError as error:
            if str(error).startswith(("t: ", "y0: ")):
                raise AssertionError(str(error)) from error
            raise

    return solve  # type: ignore[return-value]


odeint = _with_its_errors(equations.odeint)
odeint_adjoint = _with_its_errors(adjoint.odeint_adjoint)
odeint_event = event_times.odeint_event
odeint_dense = dense.odeint_dense

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
