"""flow_matching's solvers on fmkernels'."""

from ..utils.model_wrapper import ModelWrapper
from .ode_solver import ODESolver
from .solver import Solver

__all__ = ["ModelWrapper", "ODESolver", "Solver"]
