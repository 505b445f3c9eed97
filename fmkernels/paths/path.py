"""Probability paths: a schedule that samples itself and converts predictions."""

from __future__ import annotations

from torch import Tensor

from .._checks import check_float_tensor
from . import targets
from .batch import sample
from .schedule import Schedule, promoted


class Path(Schedule):
    r"""A probability path. A schedule of your own is a subclass with two methods::

        class Mine(fm.paths.Path):
            def alpha(self, t): return t**2        # multiplies x_1
            def sigma(self, t): return 1 - t**2    # multiplies x_0

    Each maps times of any shape, float32 or float64, to a tensor of that shape or, for a constant, to a float. The
    derivatives ``d_alpha`` and ``d_sigma`` come from autograd unless defined. ``gamma`` and ``d_gamma`` add a term
    gamma_t z with fresh noise z (stochastic interpolants and bridges, Albergo et al. 2023).

    t = 0 is the source (noise), t = 1 the data.
    """

    sample = sample

    def target_coefficients(self, t: Tensor, target: str = "velocity", **parameters: float) -> targets.Triple:
        """(c_1, c_0, c_z) of a target u = c_1 x_1 + c_0 x_0 (+ c_z z); see :mod:`fmkernels.paths.targets`."""
        check_float_tensor("t", t)
        return targets.coefficients(self, promoted("t", t), target, **parameters)

    def convert(
        self,
        prediction: Tensor,
        x_t: Tensor,
        t: Tensor | float,
        source: str,
        target: str,
        **parameters: float,
    ) -> Tensor:
        """A prediction of ``source`` at (x_t, t) as one of ``target``; see :func:`fmkernels.paths.targets.convert`."""
        return targets.convert(self, prediction, x_t, t, source, target, **parameters)
