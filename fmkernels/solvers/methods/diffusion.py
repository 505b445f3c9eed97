r"""Solvers of the diffusion literature in flow-matching time, on any affine path.

Written in :math:`\lambda = \log(\alpha / \sigma)` and the predictions :math:`D = x_1` and :math:`E = x_0` of one
network call, for a step from t to u with :math:`h = \lambda_u - \lambda_t`; primes mark values at u. The last step to
:math:`\sigma' = 0` gives the data prediction, and the first from :math:`\alpha = 0` is of first order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, final

import numpy as np

from ..._checks import check_bool, check_choice, check_int, check_number, is_word, value_error
from ..programs.builder import Builder
from ..programs.expressions import Expr, Number
from . import noise_levels as ei
from .noise_levels import Level, Prediction
from .own_steps import Count, Node, Past


@final
@dataclass(frozen=True)
class DDIM:
    r"""Denoising diffusion implicit model (Song, Meng & Ermon 2021, eq. 12 and 16), on any path. One call a step.

    :math:`x' = \alpha' D + \sqrt{\sigma'^2 - s^2} E + s z` with :math:`s = \eta \sigma' \sqrt{1 - e^{-2h}}`. eta = 0 is
    deterministic, and on the optimal-transport path Euler's method; eta = 1 is ancestral sampling in the
    variance-exploding form (k-diffusion's ``sample_euler_ancestral``) and, on a variance-preserving path, DDPM.

    Args:
        eta: in [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_number("eta", self.eta, low=0.0, high=1.0)

    def __call__(self, builder: Builder) -> None:
        for t, u in ei.levels(builder, to_data=self.eta > 0.0):
            p = ei.predict(builder, builder.x, t)
            kept: Number = 1.0
            if self.eta > 0.0:
                kept = ei.fresh(self.eta * np.sqrt(-np.expm1(-2.0 * ei.width(t, u))))
            builder.advance(ei.noisy(ei.moved(p, u, kept), u.sigma * ei.fresh(kept), builder.noise()))


@final
@dataclass(frozen=True)
class Ancestral:
    r"""Ancestral sampling in the noise level of rectified flow. One call a step.

    With :math:`\varsigma = \sigma / (\alpha + \sigma)`, the level on the optimal-transport path, a step goes on without
    noise to :math:`\varsigma_d = \varsigma' (1 + (\varsigma' / \varsigma - 1) \eta)`, is scaled back and gets the noise
    that is missing: :math:`x' = \alpha' (D + \frac{\varsigma_d}{1 - \varsigma_d} E) + s z` with :math:`s^2 = \sigma'^2
    - (\alpha' \varsigma_d / (1 - \varsigma_d))^2` (diffusers' and ComfyUI's ancestral Euler for rectified flow). For
    the variance-exploding choice of the level between see :class:`DDIM` with eta = 1.

    Args:
        eta: in [0, 1]; 0 adds no noise.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        check_number("eta", self.eta, low=0.0, high=1.0)

    def __call__(self, builder: Builder) -> None:
        for t, u in ei.levels(builder, to_data=self.eta > 0.0):
            p = ei.predict(builder, builder.x, t)
            flow_t, flow_u = t.sigma / (t.alpha + t.sigma), u.sigma / (u.alpha + u.sigma)
            # down' / (1 - down) over sigma' / alpha': the share of the noise that stays
            factor = 1.0 + (flow_u * ei.inverse(flow_t) - 1.0) * self.eta if self.eta > 0.0 else 1.0
            kept = factor * (1.0 - flow_u) * ei.inverse(1.0 - flow_u * factor)
            builder.advance(ei.noisy(ei.moved(p, u, kept), u.sigma * ei.fresh(kept), builder.noise()))


@final
@dataclass(frozen=True)
class LCM:
    r"""Multistep sampling of a consistency model (Song et al. 2023, alg. 1; Luo et al. 2023). One call a step.

    :math:`x' = \alpha' D + \sigma' z`: all noise is fresh, and the last step to :math:`\sigma' = 0` is D. For networks
    whose prediction is a sample; with the mean of the data, as any other network predicts, samples shrink to it.
    """

    def __call__(self, builder: Builder) -> None:
        for t, u in ei.levels(builder, to_data=True):
            p = ei.predict(builder, builder.x, t)
            builder.advance(ei.noisy(u.alpha * p.x_1, u.sigma, builder.noise()))


def _check_final(value: bool | str) -> None:
    if not isinstance(value, bool) and not is_word(value, "auto"):
        raise value_error("lower_order_final", "True, False or 'auto'", value)


SOLVER_TYPES = ("midpoint", "heun", "exact")


@final
@dataclass(frozen=True)
class DPMSolverPP:
    r"""DPM-Solver++, multistep, and its SDE form (Lu et al. 2022, alg. 2 and sec. 5). One call a step.

    :math:`x' = \frac{\sigma'}{\sigma} e^{-\eta h} x + \alpha' (m_0 D + \sum_k w_k D^{(k)}) + \sigma' \sqrt{1 - e^{-2
    \eta h}} z`, :math:`m_0 = 1 - e^{-(1 + \eta) h}`, with divided differences :math:`D^{(k)}` of the last predictions
    in :math:`\lambda`. The first steps have a lower order, the first one order 1, which leaves order 2 to
    the whole. eta = 1 is k-diffusion's ``dpmpp_2m_sde`` and (solver type "heun") ``dpmpp_3m_sde``; order 1 with eta = 0
    is DDIM.

    Args:
        order: 1, 2 or 3, of the polynomial plus 1.
        eta: noise, >= 0; 0 solves the ODE, 1 the SDE of the reversed diffusion.
        solver_type: weight of the first difference at order 2: "midpoint", m_0 / 2 (as published), or "heun", the
            integral. At order 3 as published the second difference gets half of its integral; "exact" integrates every
            polynomial.
        lower_order_final: "auto": the last step is of first order where it is more than twice as wide in lambda as the
            one before, as to data or to a small sigma; True: the order is at most the number of steps left
            (diffusers' default); False: none is lowered.
    """

    order: int = 2
    eta: float = 0.0
    solver_type: str = "midpoint"
    lower_order_final: bool | str = "auto"

    def __post_init__(self) -> None:
        check_int("order", self.order, low=1, high=3)
        check_number("eta", self.eta, low=0.0)
        check_choice("solver_type", self.solver_type, SOLVER_TYPES)
        _check_final(self.lower_order_final)

    def __call__(self, builder: Builder) -> None:
        past = Past(builder, self.order)
        for t, u in ei.levels(builder, to_data=self.eta > 0.0):
            p, h = ei.predict(builder, builder.x, t), ei.width(t, u)
            kept = ei.decay(self.eta, h)
            nodes = ei.places(past.add(t.log_ratio, p.x_1), t.log_ratio, u.log_ratio)
            count = past.lowered(nodes, self.lower_order_final, ei.WIDEST)
            change = past.each(count, partial(self._change, nodes, (1.0 + self.eta) * h))
            x = ei.moved(p, u, kept) + u.alpha * change
            builder.advance(ei.noisy(x, u.sigma * ei.fresh(kept), builder.noise()))

    def _change(self, nodes: list[Node], h: Number, count: int) -> Expr:
        nodes = nodes[:count]
        moments = ei.exponential_moments(h, count)
        weights = ei.newton_weights(nodes, moments)
        if count == 2 and self.solver_type == "midpoint":
            weights[0] = 0.5 * moments[0]
        if count == 3 and self.solver_type != "exact":
            # D2 s^2 / 2 in the place of D2 s^2, beside the slope at s = 0
            weights[1] = weights[1] - 0.5 * moments[2]
        return ei.weighted(weights, ei.differences(nodes))


@final
@dataclass(frozen=True)
class DPMSolverPP2S:
    r"""DPM-Solver++(2S), singlestep, and its SDE form (Lu et al. 2022, alg. 1; k-diffusion's ``dpmpp_2s``/``_sde``).

    A first-order step to :math:`\lambda_s = \lambda_t + r h`, then :math:`\alpha' m_0 (D_s - D) / (2r)` on top of the
    first-order step to u. The noise at both times is that of one path of the Ornstein-Uhlenbeck process. Two calls a
    step, one in a step from pure noise or to pure data, which is of first order.

    Args:
        eta: noise, >= 0, as in :class:`DPMSolverPP`.
        r: place of the time between, in (0, 1].
    """

    eta: float = 0.0
    r: float = 0.5

    def __post_init__(self) -> None:
        check_number("eta", self.eta, low=0.0)
        check_number("r", self.r, above=0.0, high=1.0)

    def __call__(self, builder: Builder) -> None:
        for t, u in ei.levels(builder, to_data=self.eta > 0.0):
            p, h = ei.predict(builder, builder.x, t), ei.width(t, u)
            kept = ei.decay(self.eta, h)
            x = ei.moved(p, u, kept)
            # the same noises in every step, whatever others in the batch need
            z_s, z_u = builder.noise(), builder.noise()
            if not np.any(np.isfinite(h)):
                builder.advance(ei.noisy(x, u.sigma * ei.fresh(kept), z_u))
                continue
            # samples without a time between stay where they are, and its prediction has no weight for them
            between = ei.level_at(builder.path, t.log_ratio + self.r * ei.or_zero(h))
            part = ei.or_zero(ei.width(t, between))
            first, second = ei.decay(self.eta, part), ei.decay(self.eta, h - part)
            x_s = ei.moved(p, between, first)
            if self.eta > 0.0:
                x_s = x_s + (between.sigma * ei.fresh(first)) * z_s
                x = x + (u.sigma * second * ei.fresh(first)) * z_s + (u.sigma * ei.fresh(second)) * z_u
            history = [Node(t.log_ratio, p.x_1), Node(between.log_ratio, ei.predict(builder, x_s, between).x_1)]
            (slope,) = ei.differences(ei.places(history, t.log_ratio, u.log_ratio))
            builder.advance(x + (0.5 * u.alpha * ei.exponential_moments((1.0 + self.eta) * h, 1)[0]) * slope)


VARIANTS = ("bh1", "bh2")


class _Taken(NamedTuple):
    """A step of UniPC: its ends, the nodes it followed and how many, and what they added."""

    t: Level
    u: Level
    nodes: list[Node]
    count: Count
    added: Expr

    def unless(self, before: _Taken | None, past: Past) -> _Taken:
        """This step, or the one before for who has waited in this."""
        if before is None or past.held is None:
            return self
        t, u = (Level(*map(past.hold_number, *pair)) for pair in ((before.t, self.t), (before.u, self.u)))
        nodes = [*map(past.hold, before.nodes, self.nodes), *self.nodes[len(before.nodes) :]]
        added = past.hold_value(before.added, self.added)
        return _Taken(t, u, nodes, past.hold_number(before.count, self.count), added)


@final
@dataclass(frozen=True)
class UniPC:
    r"""Unified predictor-corrector (Zhao et al. 2023, alg. 5-8), data prediction. One call a step.

    Both integrate the polynomial in :math:`\lambda` through the last predictions (UniP), and also through the one at
    the new state (UniC), which is the next step's anyway. Only where one difference is left, UniP-2 and UniC-1, the
    variant decides, by the weight :math:`B / 2`: B = h for "bh1", :math:`B = 1 - e^{-h}` for "bh2". The polynomial's
    differences grow with the ratio of neighbouring steps: a grid of very unequal ones magnifies errors.

    Args:
        order: 1, 2 or 3, of the predictor; the corrector's is one more.
        variant: "bh1" or "bh2".
        corrector: use UniC.
        lower_order_final: "auto": the last step is of first order where it is more than twice as wide in lambda as the
            one before, as to data or to a small sigma; True: the order is at most the number of steps left
            (diffusers' default); False: none is lowered.
    """

    order: int = 2
    variant: str = "bh2"
    corrector: bool = True
    lower_order_final: bool | str = "auto"

    def __post_init__(self) -> None:
        check_int("order", self.order, low=1, high=3)
        check_choice("variant", self.variant, VARIANTS)
        check_bool("corrector", self.corrector)
        _check_final(self.lower_order_final)

    def __call__(self, builder: Builder) -> None:
        past = Past(builder, self.order)
        taken: _Taken | None = None  # the step whose correction is due
        last: _Taken | None = None
        for t, u in ei.levels(builder):
            p, h = ei.predict(builder, builder.x, t), ei.width(t, u)
            x = ei.moved(p, u)
            if self.corrector and last is not None:
                taken = last.unless(taken, past)
                due: Count = np.where(past.taken > 0, taken.count, 0) if np.ndim(past.taken) else taken.count
                change = past.each(due, partial(self._correction, taken, p))
                # the noise in the corrected state, for the same data prediction
                x = x + (u.sigma * ei.inverse(t.sigma)) * change
            nodes = ei.places(past.add(t.log_ratio, p.x_1), t.log_ratio, u.log_ratio)
            count = past.lowered(nodes, self.lower_order_final, ei.WIDEST)
            added = u.alpha * past.each(count, partial(self._change, nodes, h, 2))
            last = _Taken(t, u, nodes, count, added)
            builder.advance(x + added)

    def _correction(self, taken: _Taken, p: Prediction, count: int) -> Expr:
        """What the prediction p at a step's end adds to that step."""
        t, u, nodes = taken.t, taken.u, taken.nodes
        corrected = [nodes[0], Node(1.0, p.x_1), *nodes[1:count]]
        change = self._change(corrected, ei.width(t, u), 2 if count == 1 else 0, count + 1)
        return u.alpha * change - taken.added

    def _change(self, nodes: list[Node], h: Number, simple: int, count: int) -> Expr:
        if count == simple:
            b = ei.or_zero(h) if self.variant == "bh1" else ei.exponential_moments(h, 1)[0]
            return 0.5 * b * ei.differences(nodes[:count])[0]
        return ei.interpolated(nodes, ei.exponential_moments(h, count), count)


VARIABLES = ("log_rho", "t")


@final
@dataclass(frozen=True)
class DEIS:
    r"""Diffusion exponential integrator sampler (Zhang & Chen 2023, eq. 14 and sec. 4). One call a step.

    :math:`x' = \frac{\alpha'}{\alpha} x + \alpha' \int_\rho^{\rho'} P d\rho`, :math:`\rho = \sigma / \alpha`, with the
    polynomial P through the last noise predictions E, integrated exactly.

    Args:
        order: 1, 2 or 3: one more than the polynomial's degree, r in the paper.
        variable: of the polynomial: "log_rho" (diffusers' "logrho") or "t", time (tAB-DEIS). In rho it is :class:`LMS`.
        lower_order_final: "auto": the last step is of first order where it is more than twice as wide as the one before
            in its variable, as to data or to a small sigma; True: the order is at most the number of steps left
            (diffusers' default); False: none is lowered.
    """

    order: int = 3
    variable: str = "log_rho"
    lower_order_final: bool | str = "auto"

    def __post_init__(self) -> None:
        check_int("order", self.order, low=1, high=3)
        check_choice("variable", self.variable, VARIABLES)
        _check_final(self.lower_order_final)

    def __call__(self, builder: Builder) -> None:
        past = Past(builder, self.order)
        in_time = self.variable == "t"
        for t, u in ei.levels(builder):
            p = ei.predict(builder, builder.x, t)
            start, end = (t.t, u.t) if in_time else (t.log_ratio, u.log_ratio)
            nodes = ei.places(past.add(start, p.x_0), start, end)
            count = past.lowered(nodes, self.lower_order_final, ei.WIDEST)
            if in_time:
                moments = ei.time_moments(builder.path, t, u, len(nodes)) if len(nodes) > 1 else []
            else:
                # rho falls like e^(-lambda): the weight of a data prediction with the step turned round
                moments = [u.sigma * m for m in ei.exponential_moments(-ei.width(t, u), len(nodes))]
            builder.advance(ei.moved(p, u) + past.each(count, partial(ei.interpolated, nodes, moments)))


@final
@dataclass(frozen=True)
class LMS:
    r"""Linear multistep method in the noise level (k-diffusion's ``sample_lms``; rhoAB-DEIS). One call a step.

    :math:`d(x / \alpha) = E d\rho` with :math:`\rho = \sigma / \alpha`: Adams-Bashforth for the grid's own, varying
    steps in :math:`\rho`, with exact integrals. The first steps have a lower order.

    Args:
        order: 1 to 4.
    """

    order: int = 4

    def __post_init__(self) -> None:
        check_int("order", self.order, low=1, high=4)

    def __call__(self, builder: Builder) -> None:
        past = Past(builder, self.order)
        for t, u in ei.levels(builder):
            p, start, end = ei.predict(builder, builder.x, t), t.ratio, u.ratio
            nodes = ei.places(past.add(start, p.x_0), start, end)
            moments = ei.uniform_moments(u.alpha * ei.difference(end, start), len(nodes))
            builder.advance(ei.moved(p, u) + past.each(past.count, partial(ei.interpolated, nodes, moments)))
