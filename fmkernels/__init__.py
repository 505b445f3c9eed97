"""fmkernels: fused flow matching for PyTorch. t = 0 is noise, t = 1 is data."""

from . import paths, testing, times, weightings
from ._memory import set_cpu_pool_limit
from .losses import cfm_loss
from .ops.combine.op import combine
from .ops.interpolate.op import Interpolation, interpolate
from .ops.random.op import rand, randn, random_words
from .ops.regression_loss.op import regression_loss
from .ops.row_dots.op import row_dots
from .paths.targets import convert
from .random import Noise, draw_seed
from .solvers.ode import odeint
from .solvers.sample import SampleResult, Solver, Status, sample
from .version import __version__

__all__ = [
    "Interpolation",
    "Noise",
    "SampleResult",
    "Solver",
    "Status",
    "__version__",
    "cfm_loss",
    "combine",
    "convert",
    "draw_seed",
    "interpolate",
    "odeint",
    "paths",
    "rand",
    "randn",
    "random_words",
    "regression_loss",
    "row_dots",
    "sample",
    "set_cpu_pool_limit",
    "testing",
    "times",
    "weightings",
]
