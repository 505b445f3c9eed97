"""fmkernels: fused flow matching for PyTorch. t = 0 is noise, t = 1 is data."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

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
from .version import __version__

if TYPE_CHECKING:
    from . import guidance, likelihood, solvers
    from .likelihood import log_prob, sample_with_log_prob
    from .solvers.adaptive import Status
    from .solvers.adjoint import odeint_adjoint
    from .solvers.dense_output import odeint_dense
    from .solvers.divergence import divergence
    from .solvers.events import odeint_event
    from .solvers.ode import odeint
    from .solvers.sample import SampleResult, Solver, sample
    from .solvers.sdeint import sdeint
    from .solvers.stochastic import SDE, sde_step_log_prob
    from .solvers.streaming import sample_stream

# Sampling is imported at its first use: who trains does not wait for it.
_LATER = {
    "SDE": "solvers.stochastic",
    "SampleResult": "solvers.sample",
    "Solver": "solvers.sample",
    "Status": "solvers.adaptive",
    "divergence": "solvers.divergence",
    "guidance": "guidance",
    "likelihood": "likelihood",
    "log_prob": "likelihood",
    "odeint": "solvers.ode",
    "odeint_adjoint": "solvers.adjoint",
    "odeint_dense": "solvers.dense_output",
    "odeint_event": "solvers.events",
    "sample": "solvers.sample",
    "sample_stream": "solvers.streaming",
    "sample_with_log_prob": "likelihood",
    "sde_step_log_prob": "solvers.stochastic",
    "sdeint": "solvers.sdeint",
    "solvers": "solvers",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(f"{__name__}.{_LATER[name]}")
    value = globals()[name] = module if _LATER[name] == name else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "SDE",
    "Interpolation",
    "Noise",
    "SampleResult",
    "Solver",
    "Status",
    "__version__",
    "cfm_loss",
    "combine",
    "convert",
    "divergence",
    "draw_seed",
    "guidance",
    "interpolate",
    "likelihood",
    "log_prob",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "paths",
    "rand",
    "randn",
    "random_words",
    "regression_loss",
    "row_dots",
    "sample",
    "sample_stream",
    "sample_with_log_prob",
    "sde_step_log_prob",
    "sdeint",
    "set_cpu_pool_limit",
    "solvers",
    "testing",
    "times",
    "weightings",
]
