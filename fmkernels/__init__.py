"""fmkernels: fused flow matching for PyTorch."""

from .ops.combine.op import combine
from .ops.interpolate.op import Interpolation, interpolate
from .ops.random.op import rand, randn, random_words
from .ops.regression_loss.op import regression_loss
from .random import Noise, draw_seed
from .version import __version__



__all__ = [
    "Interpolation",
    "Noise",
    "combine",
    "draw_seed",
    "interpolate",
    "rand",
    "randn",
    "random_words",
    "regression_loss",
]
