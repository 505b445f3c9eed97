"""flow_matching's ODE solver on fmkernels' solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...._checks import check_function, tensor_of
from ....solvers.equations.odeint import odeint
from ..._densities import rademacher_like, solved_with_divergence
from ..utils.model_wrapper import ModelWrapper
from .solver import Solver


class ODESolver(Solver):
    """Solves dx/dt = model(x=x, t=t, **extras); t is a 0-dim tensor.

    Args:
        velocity_model: the velocity field.
    """

    def __init__(self, velocity_model: ModelWrapper | Callable[..., Tensor]) -> None:
        super().__init__()
        self.velocity_model = velocity_model

    def _field(self, extras: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
        def field(t: Tensor, x: Tensor) -> Tensor:
            return self.velocity_model(x=x, t=t, **extras)

        return field

    def sample(  # type: ignore[override]
        self,
        x_init: Tensor,
        step_size: float | None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor = tensor_of([0.0, 1.0]),  # noqa: B008 (never written to)
        return_intermediates: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> Tensor:
        """The solution along ``time_grid``, ascending or descending.

        Args:
            x_init: the state at time_grid[0], (B, ...).
            step_size: of fixed-step methods, which step along time_grid where it is None; None for adaptive ones. A
                time_grid of two times and no step_size is one step.
            method: see :func:`fmkernels.odeint`.
            atol, rtol: tolerances of adaptive methods.
            time_grid: (T,) times.
            return_intermediates: all T states, (T, B, ...), instead of the last one.
            enable_grad: record gradients.
            model_extras: keyword arguments of the model.
        """
        with torch.set_grad_enabled(enable_grad):
            solution = odeint(
                self._field(model_extras),
                x_init,
                time_grid,
                method=method,
                options=_options(step_size),
                atol=atol,
                rtol=rtol,
            )
        return solution if return_intermediates else solution[-1]  # type: ignore[no-any-return]

    def compute_likelihood(
        self,
        x_1: Tensor,
        log_p0: Callable[[Tensor], Tensor],
        step_size: float | None,
        method: str = "euler",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        time_grid: Tensor = tensor_of([1.0, 0.0]),  # noqa: B008 (never written to)
        return_intermediates: bool = False,
        exact_divergence: bool = False,
        enable_grad: bool = False,
        **model_extras: Any,
    ) -> tuple[Tensor | Sequence[Tensor], Tensor]:
        r"""The source of samples and their log-density, :math:`\log p_1(x_1) = \log p_0(x_0) - \int_0^1 \mathrm{div}\,
        u_t\, dt` (Chen et al. 2018; Hutchinson's estimate by Grathwohl et al. 2019).

        Args:
            x_1: samples, (B, ...).
            log_p0: the source's log-density, x_0 to (B,).
            step_size, method, atol, rtol: as of :meth:`sample`.
            time_grid: (T,) from 1 to 0.
            return_intermediates: all T states instead of the last one.
            exact_divergence: by one derivative for each dimension, instead of one Rademacher probe that stays the same
                all along.
            enable_grad: record gradients.
            model_extras: keyword arguments of the model.

        Returns:
            (x_0, log-density (B,)), or all states along time_grid in the place of x_0.

        Raises:
            AssertionError: time_grid does not go from 1 to 0.
        """
        check_function("log_p0", log_p0, "a function of x_0")
        if time_grid[0] != 1.0 or time_grid[-1] != 0.0:
            raise AssertionError(f"time_grid: expected times from 1.0 to 0.0, got {time_grid.tolist()}")
        states, change = solved_with_divergence(
            self._field(model_extras),
            x_1,
            time_grid,
            probe=None if exact_divergence else rademacher_like(x_1),
            gradient=enable_grad,
            method=method,
            options=_options(step_size),
            atol=atol,
            rtol=rtol,
        )
        with torch.set_grad_enabled(enable_grad):
            log_p = log_p0(states[-1]) + change
        return (states if return_intermediates else states[-1]), log_p


def _options(step_size: float | None) -> dict[str, float]:
    return {} if step_size is None else {"step_size": step_size}


__all__ = ["ODESolver"]
