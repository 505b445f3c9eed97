"""fmkernels: fused flow matching for PyTorch. t = 0 is noise, t = 1 is data."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from . import paths, testing, times, weightings
from ._cache import CacheInfo, cache_info, clear_caches
from ._memory import set_cpu_pool_limit
from .losses import LossBins, cfm_loss
from .ops.combine.op import combine
from .ops.interpolate.op import Interpolation, interpolate
from .ops.random.op import rand, randn, random_words
from .ops.regression_loss.op import regression_loss
from .ops.row_dots.op import row_dots
from .paths.targets import convert
from .random import Noise, draw_seed
from .version import __version__

if TYPE_CHECKING:
    from . import guidance, likelihood, models, solvers
    from .likelihood.density import log_prob, sample_with_log_prob
    from .likelihood.divergence import divergence
    from .likelihood.step_log_prob import sde_step_log_prob
    from .ops.step_control.op import Status
    from .solvers.equations.adjoint import odeint_adjoint
    from .solvers.equations.dense import odeint_dense
    from .solvers.equations.event_times import odeint_event
    from .solvers.equations.odeint import odeint
    from .solvers.equations.sdeint import sdeint
    from .solvers.methods.noise_transforms import MaskedNoise, ZeroMeanNoise
    from .solvers.methods.sde import SDE
    from .solvers.sampling.result import SampleResult
    from .solvers.sampling.sample import sample
    from .solvers.sampling.solver import Solver
    from .solvers.sampling.streaming import sample_stream

# Sampling is imported at its first use: who trains does not wait for it.
_LATER = {
    "SDE": "solvers.methods.sde",
    "MaskedNoise": "solvers.methods.noise_transforms",
    "SampleResult": "solvers.sampling.result",
    "Solver": "solvers.sampling.solver",
    "Status": "ops.step_control.op",
    "ZeroMeanNoise": "solvers.methods.noise_transforms",
    "divergence": "likelihood.divergence",
    "guidance": "guidance",
    "likelihood": "likelihood",
    "log_prob": "likelihood.density",
    "models": "models",
    "odeint": "solvers.equations.odeint",
    "odeint_adjoint": "solvers.equations.adjoint",
    "odeint_dense": "solvers.equations.dense",
    "odeint_event": "solvers.equations.event_times",
    "sample": "solvers.sampling.sample",
    "sample_stream": "solvers.sampling.streaming",
    "sample_with_log_prob": "likelihood.density",
    "sde_step_log_prob": "likelihood.step_log_prob",
    "sdeint": "solvers.equations.sdeint",
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
    "CacheInfo",
    "Interpolation",
    "LossBins",
    "MaskedNoise",
    "Noise",
    "SampleResult",
    "Solver",
    "Status",
    "ZeroMeanNoise",
    "__version__",
    "cache_info",
    "cfm_loss",
    "clear_caches",
    "combine",
    "convert",
    "divergence",
    "draw_seed",
    "guidance",
    "interpolate",
    "likelihood",
    "log_prob",
    "models",
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
