"""torchcfm's five matchers: a point x_t of a probability path between two minibatches, and its velocity u_t.

Strict (the default, see :func:`fmkernels.compat.strict`), t, x_t, u_t and noise are torchcfm's to the last bit under
the same seeds: drawn in its order by PyTorch, computed by its operations. Otherwise noise is drawn inside fmkernels'
fused kernels, and x_t and u_t are rounded once. A subclass that computes anything itself is always strict.

t = 0 is x0, t = 1 is x1.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import paths
from ..._checks import check_bool, warn
from .._strict import is_strict
from .optimal_transport import OTPlanSampler

Sample = tuple[Tensor, ...]


def pad_t_like_x(t: Tensor | float, x: Tensor) -> Tensor | float:
    """Times (B,) as (B, 1, ..., 1), to go with x; a number as it is."""
    if isinstance(t, (float, int)):
        return t
    return t.reshape(-1, *([1] * (x.dim() - 1)))


class ConditionalFlowMatcher:
    r"""Independent coupling: :math:`x_t = t x_1 + (1 - t) x_0 + \sigma \epsilon`, :math:`u_t = x_1 - x_0` (Tong et al.
    2023, eq. 14 and 15).

    Args:
        sigma: the standard deviation of the path.
        strict: torchcfm's own numbers (True), fused kernels (False), or what :func:`fmkernels.compat.strict` says
            (None).
    """

    # What a subclass that changes any of it is not sampled by the fused kernels for.
    _formulas: ClassVar[tuple[str, ...]] = (
        "compute_mu_t",
        "compute_sigma_t",
        "sample_xt",
        "compute_conditional_flow",
        "sample_noise_like",
        "_path",
    )

    def __init__(self, sigma: float = 0.0, *, strict: bool | None = None) -> None:
        if strict is not None:
            check_bool("strict", strict)
        self.sigma, self.strict = sigma, strict

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        """The mean t x1 + (1 - t) x0."""
        t = pad_t_like_x(t, x0)
        return t * x1 + (1 - t) * x0

    def compute_sigma_t(self, t: Tensor | float) -> Any:
        """The standard deviation sigma, as it was given."""
        return self.sigma

    def sample_xt(self, x0: Tensor, x1: Tensor, t: Tensor | float, epsilon: Tensor) -> Tensor:
        """mu_t + sigma_t epsilon.

        Args:
            x0, x1: (B, ...).
            t: (B,), or a number.
            epsilon: standard normal noise of x0's shape.
        """
        sigma_t = pad_t_like_x(self.compute_sigma_t(t), x0)
        return self.compute_mu_t(x0, x1, t) + sigma_t * epsilon

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Tensor | float, xt: Tensor) -> Tensor:
        """The velocity x1 - x0."""
        return x1 - x0

    def sample_noise_like(self, x: Tensor) -> Tensor:
        return torch.randn_like(x)

    def sample_location_and_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: Tensor | None = None, return_noise: bool = False
    ) -> Sample:
        """(t, x_t, u_t), and epsilon with ``return_noise``.

        Args:
            x0, x1: source and target, (B, ...).
            t: times (B,); None draws them uniformly.
            return_noise: whether epsilon is returned.

        Raises:
            AssertionError: t is not of x0's batch size.
        """
        if t is not None and len(t) != x0.shape[0]:
            raise AssertionError(f"t: expected x0's batch size {x0.shape[0]}, got {len(t)} times")
        if not is_strict(self.strict) and (path := self._fused()) is not None:
            return _fused(path, self._source(x0), x1, t, return_noise)
        if t is None:
            t = torch.rand(x0.shape[0], device=torch.get_default_device()).type_as(x0)  # as torchcfm's
        eps = self.sample_noise_like(x0)
        xt = self.sample_xt(x0, x1, t, eps)
        ut = self.compute_conditional_flow(x0, x1, t, xt)
        return (t, xt, ut, eps) if return_noise else (t, xt, ut)

    def compute_lambda(self, t: Tensor | float) -> Any:
        """The weight 2 sigma_t / (sigma^2 + 1e-8) of a score loss (Tong et al. 2023, "Simulation-free Schroedinger
        bridges via score and flow matching", eq. 23)."""
        return 2 * self.compute_sigma_t(t) / (self.sigma**2 + 1e-8)

    def _path(self, sigma: float) -> paths.Path | None:
        """The path that the fused kernels sample, None where they have none."""
        return paths.ConstantBridge(sigma)

    def _source(self, x0: Tensor) -> Tensor | None:
        """What the path starts from; None where its noise is the source."""
        return x0

    def _fused(self) -> paths.Path | None:
        """The path, where it says what the methods do and sigma is a number that it takes."""
        ours = next(kind for kind in type(self).__mro__ if kind in _AS_WRITTEN)
        changed = any(getattr(type(self), name) is not _AS_WRITTEN[ours][name] for name in self._formulas)
        if changed or not vars(self).keys().isdisjoint(self._formulas):
            return None
        sigma = self.sigma
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0.0 <= sigma < math.inf:
            return None
        return self._path(float(sigma))


def _fused(path: paths.Path, x0: Tensor | None, x1: Tensor, t: Tensor | None, return_noise: bool) -> Sample:
    if t is None and x1.dtype in (torch.bfloat16, torch.float16):  # of which a path draws no times
        t = torch.rand(x1.shape[0], device=x1.device)
    if t is not None:
        t = t.type_as(x1)
    batch = path.sample(x1, x0, t, store_noise=True)
    times = batch.t if t is None else t  # of the data's dtype, as torchcfm's
    sample = times, batch.x_t, batch.target("velocity")
    if not return_noise:
        return sample
    return *sample, batch.x_0 if x0 is None else batch.z  # type: ignore[return-value]


class _CoupledFlowMatcher(ConditionalFlowMatcher):
    """Couples the minibatches first, by ``ot_sampler``."""

    ot_sampler: OTPlanSampler

    def sample_location_and_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: Tensor | None = None, return_noise: bool = False
    ) -> Sample:
        """(t, x_t, u_t), and epsilon with ``return_noise``, of pairs drawn from the transport plan between x0 and x1.

        Args:
            x0, x1: source and target, (B, ...).
            t: times (B,); None draws them uniformly.
            return_noise: whether epsilon is returned.
        """
        x0, x1 = self.ot_sampler.sample_plan(x0, x1)
        return super().sample_location_and_conditional_flow(x0, x1, t, return_noise)

    def guided_sample_location_and_conditional_flow(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        t: Tensor | None = None,
        return_noise: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """(t, x_t, u_t, y0, y1), and epsilon with ``return_noise``: labels follow their samples.

        Args:
            x0, x1: source and target, (B, ...).
            y0, y1: their labels, (B, ...), or None.
            t: times (B,); None draws them uniformly.
            return_noise: whether epsilon is returned.
        """
        x0, x1, y0, y1 = self.ot_sampler.sample_plan_with_labels(x0, x1, y0, y1)
        sample = super().sample_location_and_conditional_flow(x0, x1, t, return_noise)
        return *sample[:3], y0, y1, *sample[3:]


class ExactOptimalTransportConditionalFlowMatcher(_CoupledFlowMatcher):
    """:class:`ConditionalFlowMatcher` with pairs from the exact optimal transport plan (Tong et al. 2023, section 3.2).

    Args:
        sigma: the standard deviation of the path.
        strict: see :class:`ConditionalFlowMatcher`.
    """

    def __init__(self, sigma: float = 0.0, *, strict: bool | None = None) -> None:
        super().__init__(sigma, strict=strict)
        self.ot_sampler = OTPlanSampler(method="exact")


class TargetConditionalFlowMatcher(ConditionalFlowMatcher):
    r"""From noise to data (Lipman et al. 2022, eq. 20 and 21): :math:`x_t = t x_1 + (1 - (1 - \sigma) t) \epsilon`,
    :math:`u_t = (x_1 - (1 - \sigma) x_t) / (1 - (1 - \sigma) t)`. x0 gives shapes alone."""

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        """The mean t x1."""
        return pad_t_like_x(t, x1) * x1

    def compute_sigma_t(self, t: Tensor | float) -> Any:
        """1 - (1 - sigma) t."""
        return 1 - (1 - self.sigma) * t

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Tensor | float, xt: Tensor) -> Tensor:
        """The velocity (x1 - (1 - sigma) xt) / (1 - (1 - sigma) t)."""
        t = pad_t_like_x(t, x1)
        return (x1 - (1 - self.sigma) * xt) / (1 - (1 - self.sigma) * t)

    def _path(self, sigma: float) -> paths.Path | None:
        return paths.OptimalTransport(sigma) if sigma < 1.0 else None

    def _source(self, x0: Tensor) -> Tensor | None:
        return None


class SchrodingerBridgeConditionalFlowMatcher(_CoupledFlowMatcher):
    r"""Brownian bridges between pairs from a transport plan (Tong et al. 2023, eq. 20 and 21):
    :math:`x_t = t x_1 + (1 - t) x_0 + \sigma \sqrt{t (1 - t)} \epsilon`, :math:`u_t = \frac{1 - 2 t}{2 t (1 - t)} (x_t
    - \mu_t) + x_1 - x_0`. With ``ot_method="sinkhorn"`` the plan's regularisation is 2 sigma^2.

    At t = 0 and 1 the quotient's divisor is 1e-8 in strict mode, as torchcfm's; sqrt(t (1 - t)) counts as 1e-4 else.

    Args:
        sigma: the standard deviation of the Brownian motion, > 0.
        ot_method: one of :class:`OTPlanSampler`'s methods.
        strict: see :class:`ConditionalFlowMatcher`.

    Raises:
        ValueError: sigma <= 0, or an unknown method.
    """

    def __init__(self, sigma: float = 1.0, ot_method: str = "exact", *, strict: bool | None = None) -> None:
        if sigma <= 0:
            raise ValueError(f"sigma: expected a number > 0 (Sigma must be strictly positive), got {sigma}.")
        if sigma < 1e-3:
            warn("Small sigma values may lead to numerical instability.")
        super().__init__(sigma, strict=strict)
        self.ot_method = ot_method
        self.ot_sampler = OTPlanSampler(method=ot_method, reg=2 * self.sigma**2)

    def compute_sigma_t(self, t: Tensor) -> Tensor:  # type: ignore[override]
        """sigma sqrt(t (1 - t))."""
        return self.sigma * torch.sqrt(t * (1 - t))

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Tensor | float, xt: Tensor) -> Tensor:
        """The velocity (1 - 2 t) / (2 t (1 - t)) (xt - mu_t) + x1 - x0."""
        t = pad_t_like_x(t, x0)
        ratio = (1 - 2 * t) / (2 * t * (1 - t) + 1e-8)
        return ratio * (xt - self.compute_mu_t(x0, x1, t)) + x1 - x0

    def _path(self, sigma: float) -> paths.Path | None:
        return paths.SchrodingerBridge(sigma)


class VariancePreservingConditionalFlowMatcher(ConditionalFlowMatcher):
    r"""Trigonometric interpolants (Albergo & Vanden-Eijnden 2022, eq. 5): :math:`x_t = \cos(\pi t/2) x_0 +
    \sin(\pi t/2) x_1 + \sigma \epsilon`, :math:`u_t = \pi/2 (\cos(\pi t/2) x_1 - \sin(\pi t/2) x_0)`."""

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        """The mean cos(pi t / 2) x0 + sin(pi t / 2) x1."""
        cos, sin = _circle(pad_t_like_x(t, x0))
        return cos * x0 + sin * x1

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Tensor | float, xt: Tensor) -> Tensor:
        """The velocity pi / 2 (cos(pi t / 2) x1 - sin(pi t / 2) x0)."""
        cos, sin = _circle(pad_t_like_x(t, x0))
        return math.pi / 2 * (cos * x1 - sin * x0)

    def _path(self, sigma: float) -> paths.Path | None:
        return paths.ConstantBridge(sigma, base=paths.Cosine())


def _circle(t: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
    angle = math.pi / 2 * t
    return (torch.cos(angle), torch.sin(angle)) if isinstance(angle, Tensor) else (math.cos(angle), math.sin(angle))


# Of each matcher here the methods that it was written with, whoever replaces them later.
_AS_WRITTEN = {
    kind: {name: getattr(kind, name) for name in ConditionalFlowMatcher._formulas}
    for kind in (
        ConditionalFlowMatcher,
        ExactOptimalTransportConditionalFlowMatcher,
        TargetConditionalFlowMatcher,
        SchrodingerBridgeConditionalFlowMatcher,
        VariancePreservingConditionalFlowMatcher,
    )
}

__all__ = [
    "ConditionalFlowMatcher",
    "ExactOptimalTransportConditionalFlowMatcher",
    "OTPlanSampler",
    "SchrodingerBridgeConditionalFlowMatcher",
    "TargetConditionalFlowMatcher",
    "VariancePreservingConditionalFlowMatcher",
    "pad_t_like_x",
]
