"""Classifier-free guidance: linear, rescaled, with optimised scale, projected, and bound to the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .._arguments import Named, names_of
from .._checks import check_bool, check_choice, check_int, check_number, tensor_of, value_error
from ..ops.combine.op import combine
from ..ops.row_dots.op import row_dots
from ..paths.schedule import tensor_at
from ..paths.targets import TARGETS
from ..solvers.programs.builder import Builder
from ..solvers.programs.expressions import ZERO, Expr, Number, as_number, either
from ..solvers.programs.immediate import Immediate
from ..solvers.programs.program import operation
from .base import (
    CONDITIONAL,
    NETWORK,
    UNCONDITIONAL,
    Guidance,
    Interval,
    Scale,
    batching_of,
    check_batched,
    check_kwargs,
    checked_interval,
    checked_scale,
    is_number,
    labels_of,
    mixture,
    outputs,
    said_of,
    scale_at,
)
from .calls import Batched, Batching, Branches, Model, overridden
from .linear import scale_of_weight, shifted, weight_of_scale

CONVENTIONS = ("scale", "weight")
_PAIR = (CONDITIONAL, UNCONDITIONAL)
_SMALL = 1e-6


@dataclass(frozen=True, eq=False)
class ClassifierFree(Guidance):
    """What rules of a conditional output c and an unconditional one u share."""

    scale: Scale
    negative: Mapping[str, Any] | None = field(default=None, kw_only=True, metadata=NETWORK)
    batched: Batched = field(default="auto", kw_only=True)
    interval: Interval = field(default=None, kw_only=True)
    shared: Sequence[str] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", checked_scale("scale", self.scale))
        object.__setattr__(self, "interval", checked_interval(self.interval))
        check_batched(self.batched)
        names_of("shared", self.shared)
        check_kwargs("negative", self.negative)
        if not self.negative and self.needs_unconditional:
            raise value_error("negative", "the unconditional call's keyword arguments, e.g. {'y': null}", self.negative)

    @property
    def needs_unconditional(self) -> bool:
        return not (isinstance(self.scale, float) and self.scale == 1.0)

    @property
    def said(self) -> Named:
        return said_of(self.batched, self.shared, labels_of(self.negative))

    @property
    def batching(self) -> Batching:
        return batching_of(self.batched)

    def branches(self, model: Model, model_kwargs: Mapping[str, Any]) -> Branches:
        unconditional = overridden(model_kwargs, self.negative, self.shared)
        return {CONDITIONAL: (model, model_kwargs), UNCONDITIONAL: (model, unconditional)}

    def pair(self, builder: Builder, x: Expr, t: Number) -> list[Expr]:
        """The velocities c and u."""
        return outputs(builder, x, t, _PAIR, self.batching)


@final
@dataclass(frozen=True, eq=False)
class CFG(ClassifierFree):
    r"""Classifier-free guidance (Ho & Salimans 2022), :math:`v = u + w (c - u)`, at every stage of a solver.

    The scale is a coefficient of the solver's own update: guidance costs network calls and nothing else. At the number
    1 the result is the conditional velocity and the unconditional branch is not evaluated; nor is the conditional one
    at the number 0.

    Two conventions are in use. As a "scale" w, 1 is no guidance: :math:`u + w (c - u)` (diffusers, ``guidance_scale``).
    As a "weight", 0 is: :math:`(1 + w) c - w u` (Ho & Salimans; flow_matching's examples). The scale is the weight
    plus 1: :func:`scale_of_weight`, :func:`weight_of_scale` and :meth:`converted` go from one to the other.

    ``rescale`` takes the result's standard deviation back to the conditional one's, each over a sample's elements (Lin
    et al. 2024, "Common diffusion noise schedules and sample steps are flawed", eq. 14 to 16): :math:`v' = (\phi\,
    \mathrm{std}(c) / \mathrm{std}(v) + 1 - \phi) v`, of the velocities; a v of equal elements, whose deviation is 0 (or
    its rounding), is not rescaled. ``zero_star`` is CFG-Zero* (Fan et al. 2025):
    :math:`v = s u + w (c - s u)` with :math:`s = \langle c, u \rangle / (\|u\|^2 + 10^{-8})` for each sample. Each
    costs a row reduction more.

    Args:
        scale: a number; a tensor with one for each sample (B,), or token (B, T) on a grid of such times; or a function
            of the time, which gets a tensor and may return a tensor of its shape or a number. A tensor's values now
            count, of which a copy is kept: for others give a new guidance, or a function that reads them.
        negative: keyword arguments that the unconditional call has in place of the caller's: a null label or embedding,
            or a negative prompt. A number for a tensor's stands for a tensor full of it (a null class); a tensor
            with one entry, not named in ``shared``, for one with that entry for each sample.
        convention: of ``scale``: "scale" or "weight".
        batched: one network call on both branches, x, t and keyword arguments concatenated, or two. For one it must be
            known which arguments have an entry for each sample, and a shape does not say: names of those that do,
            ``batched=("y",)``, or True with names in :func:`fmkernels.sample`, ask for one call, and what is not known
            is an error; "auto" takes one where all is known. Class labels (integers, (B,)) with a number in
            ``negative`` are known, as is what no dimension of the batch's size has. False makes two calls.
        interval: times (low, high) beyond which the scale is 1 (Kynkaanniemi et al. 2024) and, on a fixed grid, the
            unconditional branch is not evaluated. Both are included, with all that is within 1e-6 of them (relative
            beyond 1), so that a time's rounding decides nothing.
        shared: names of keyword arguments that have no entry for each sample, whatever their shape.
        rescale: phi in [0, 1]; the paper recommends 0.7.
        zero_star: optimise the scale of u.
        zero_init: number of first steps whose velocity is 0, without a network call; None: 1 with ``zero_star``, as in
            the paper, else 0. Of a fixed grid: an adaptive solve has none.

    Example:
        >>> guidance = fm.guidance.CFG(4.0, negative={"y": 10}, interval=(0.1, 0.9))
        >>> x_1, result = fm.sample(model, (64, 2), steps=20, guidance=guidance, y=labels)

    Raises:
        TypeError, ValueError: an argument of the wrong type or value; when sampling, keyword arguments that cannot be
            batched, or a scale whose shape is not the state's.
    """

    convention: str = field(default="scale", kw_only=True)
    rescale: float = field(default=0.0, kw_only=True)
    zero_star: bool = field(default=False, kw_only=True)
    zero_init: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_choice("convention", self.convention, CONVENTIONS)
        super().__post_init__()
        check_number("rescale", self.rescale, low=0.0, high=1.0)
        check_bool("zero_star", self.zero_star)
        if self.zero_init is not None:
            check_int("zero_init", self.zero_init, low=0)

    @property
    def needs_unconditional(self) -> bool:
        return not (isinstance(self.scale, float) and self.scale == (1.0 if self.convention == "scale" else 0.0))

    def converted(self, convention: str) -> CFG:
        """The same guidance with its scale in another convention."""
        check_choice("convention", convention, CONVENTIONS)
        if convention == self.convention:
            return self
        scale = scale_of_weight(self.scale) if convention == "scale" else weight_of_scale(self.scale)
        return replace(self, scale=scale, convention=convention)

    @property
    def zero_steps(self) -> int:
        return int(self.zero_star) if self.zero_init is None else self.zero_init

    def velocity(self, builder: Builder, x: Expr, t: Number) -> Expr:
        if not self.zero_steps or isinstance(builder, Immediate):
            return self._guided(builder, x, t)
        begun = np.greater_equal(builder.own_number, self.zero_steps)
        waits = False if builder.still is None else builder.still
        return either(begun | waits, self._guided(builder, x, t), ZERO) if np.any(begun) else ZERO

    def _guided(self, builder: Builder, x: Expr, t: Number) -> Expr:
        scale = self.scale if self.convention == "scale" else shifted(self.scale, 1.0)
        w = scale_at(builder, scale, t, self.interval)
        if is_number(w, 1.0) or not (self.zero_star or self.rescale):
            return mixture(builder, x, t, {CONDITIONAL: w, UNCONDITIONAL: 1.0 - w}, self.batching)
        c, u = self.pair(builder, x, t)
        if self.zero_star:
            (u,) = builder.compute(_scaled_to_match(), [c, u], 1)
        v = c * w + u * (1.0 - w)
        if self.rescale:
            (v,) = builder.compute(_rescaled(float(self.rescale)), [c, v], 1)
        return v


@operation
def _scaled_to_match(c: Tensor, u: Tensor) -> tuple[Tensor]:
    """s u with s = <c, u> / (|u|^2 + 1e-8): u's multiple that is nearest to c."""
    product, square = row_dots([c, u], [(0, 1), (1, 1)]).unbind(1)
    return (combine([u], [product / (square + 1e-8)]),)


@operation
def _rescaled(phi: float, c: Tensor, v: Tensor) -> tuple[Tensor]:
    """(phi std(c) / std(v) + 1 - phi) v, standard deviations over each sample's elements; v where its own is 0."""
    (c_centred, _), (v_centred, v_mean) = _centred(c), _centred(v)
    sums = row_dots([c_centred, v_centred], [(0, 0), (0, -1), (1, 1), (1, -1)]) / v_centred.shape[1:].numel()
    c_square, c_rest, v_square, v_rest = sums.unbind(1)
    # what rounding left of the means is taken out
    c_variance, v_variance = (c_square - c_rest.square()).clamp(min=0.0), (v_square - v_rest.square()).clamp(min=0.0)
    # of a constant row at most its rounding is left
    known = v_variance > (torch.finfo(v.dtype).eps * v_mean).square()
    ratio = torch.where(known, c_variance, 1.0) / torch.where(known, v_variance, 1.0)
    # the root of 0 has no derivative
    root = torch.where(ratio > 0.0, torch.sqrt(torch.where(ratio > 0.0, ratio, 1.0)), 0.0)
    return (combine([v], [phi * root + (1.0 - phi)]),)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows less their means, and the means: squares of numbers far from 0 would keep little but their rounding."""
    rows = x.unsqueeze(1) if x.dim() == 1 else x
    dims = list(range(1, rows.dim()))
    mean = rows.mean(dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return rows - mean, mean.flatten()


@final
@dataclass(frozen=True, eq=False)
class APG(ClassifierFree):
    r"""Adaptive projected guidance (Sadat, Hilliges & Weber 2024, algorithm 1).

    With the change :math:`\Delta = D_c - D_u` of the data prediction, its running sum :math:`\Delta \leftarrow \Delta +
    \beta \Delta_{last}`, and its norm kept below r, the part along :math:`D_c`, which saturates, is weighed down:
    :math:`D = D_c + (w - 1) (\Delta_\perp + \eta \Delta_\parallel)`. Reductions are over each sample's elements.

    The running sum is that of the solver's steps: all stages of a step see the sum of the steps before it, and the
    step's first guided evaluation is what it adds. An adaptive solve, whose right-hand side has no past, goes without.

    Args:
        scale, negative, batched, interval, shared: see :class:`CFG`, in the convention "scale". Where a sample's scale
            is 1, as beyond the interval, its velocity is the conditional one, and its running sum stays as it is.
        eta: weight of the parallel part; the paper's 0 (diffusers' default, 1, is no projection).
        threshold: r, the largest norm; 0 is none. It depends on the size of the data: 2.5 to 15 in the paper.
        momentum: beta; negative in the paper, -0.5 or -0.75. 0 is none.
        base: what the change is added to: "conditional", D_c with weight w - 1, as in the paper; or "unconditional",
            D_u with weight w, as in diffusers by default.
        target: the prediction in which all this is done: "x_1", as in the paper, or any that the path knows;
            "velocity" is what diffusers does with a flow model.
    """

    eta: float = field(default=0.0, kw_only=True)
    threshold: float = field(default=0.0, kw_only=True)
    momentum: float = field(default=0.0, kw_only=True)
    base: str = field(default="conditional", kw_only=True)
    target: str = field(default="x_1", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta)
        check_number("threshold", self.threshold, low=0.0)
        check_number("momentum", self.momentum)
        check_choice("base", self.base, ("conditional", "unconditional"))
        check_choice("target", self.target, TARGETS)

    def velocity(self, builder: Builder, x: Expr, t: Number) -> Expr:
        w = scale_at(builder, self.scale, t, self.interval)
        if is_number(w, 1.0):
            return builder.evaluate(x, t, CONDITIONAL)
        guided: Any = isinstance(w, float) or w != 1.0
        c, u = self.pair(builder, x, t)
        slope = builder.conversion(t, "velocity", self.target)[1] if self.target != "velocity" else 1.0
        # where the target does not depend on the velocity (x_1 at t = 1), the limit without the past
        known: Any = (slope >= _SMALL) | (slope <= -_SMALL)
        slope = _where(known, slope, _SMALL)
        change = (c - u) * slope
        if self.momentum:
            last = self._last(builder)
            if last is not None:
                change = change + last * _where(known, self.momentum, 0.0)
            change = builder.keep(change)
            self._remember(builder, last, change, guided)
        (change,) = builder.compute(
            _projected(float(self.eta), float(self.threshold)),
            [change, builder.convert(x, c, t, self.target)],
            1,
        )
        if self.base == "conditional":
            return c + change * ((w - 1.0) / slope)
        return c * _where(guided, 0.0, 1.0) + u * _where(guided, 1.0, 0.0) + change * _where(guided, w / slope, 0.0)

    def _last(self, builder: Builder) -> Expr | None:
        """The running sum of the steps before the builder's."""
        number, before, current, _ = builder.memory.get(self, _NO_PAST)
        return before if number == builder.step.number else current

    def _remember(self, builder: Builder, last: Expr | None, change: Expr, guided: Any) -> None:
        """Each adds its first change in a step; who waits, and who is not guided, adds nothing."""
        if isinstance(builder, Immediate):
            return
        number, _, current, added = builder.memory.get(self, _NO_PAST)
        if number != builder.step.number:
            added = False
        adds = np.logical_and(guided, np.logical_not(added))
        if builder.still is not None:
            adds = adds & ~builder.still
        if np.any(adds):
            current = builder.keep(either(adds, change, current or ZERO))
        builder.memory[self] = (builder.step.number, last, current, added | adds)


# the step's number, the sums before and after it, and who has added to it
_NO_PAST: tuple[int, Expr | None, Expr | None, Any] = (-1, None, None, False)


@operation
def _projected(eta: float, threshold: float, d: Tensor, y: Tensor) -> tuple[Tensor]:
    """r (d - (1 - eta) <d, y> / |y|^2 y): norm below the threshold, the part along y by eta."""
    d_square, product, y_square = row_dots([d, y], [(0, 0), (0, 1), (1, 1)]).unbind(1)
    along = (1.0 - eta) * product / y_square.clamp(min=torch.finfo(y_square.dtype).tiny)
    if not threshold:
        return (combine([d, y], [1.0, -along]),)
    shrink = threshold / torch.sqrt(d_square.clamp(min=threshold**2))
    return (combine([d, y], [shrink, -shrink * along]),)


def _where(condition: Any, value: Number, other: float) -> Number:
    if isinstance(condition, bool):
        return value if condition else other
    if isinstance(condition, Tensor):
        full = condition.new_full((), other, dtype=torch.float64)
        if isinstance(value, Tensor):
            return torch.where(condition, value, full.to(value.dtype))
        return torch.where(condition, float(value), full)
    return np.where(condition, value, other)[()]


# ---------------------------------------------------------------------- guidance of a step


def _check_step(guidance: Guidance, builder: Builder, t: Number) -> None:
    """The builder must be at the start of a step, for the first time."""
    name = type(guidance).__name__
    if isinstance(builder, Immediate):
        raise ValueError(
            f"guidance: expected a rule that is a velocity, but {name} is defined by steps of a fixed grid"
        )
    step = builder.step
    same = t is step.t or np.array_equal(tensor_of(t).detach(), tensor_of(step.t).detach())
    if not same or builder.memory.get(guidance) == step.number:
        raise ValueError(
            f"method: expected one evaluation a step, at its start, for {name}, which decides where the step ends; "
            f"step {step.number} from t = {step.t} evaluates at t = {t}: use method='euler' or 'ddim'"
        )
    builder.memory[guidance] = step.number


def _schedule(builder: Builder, t: Number) -> tuple[Number, Number]:
    """(alpha, sigma) at a time."""
    times = tensor_of(t, torch.float64)
    pair = [tensor_at(builder.path, name, times) for name in ("alpha", "sigma")]
    alpha, sigma = pair if isinstance(t, Tensor) else [as_number(c, "path") for c in pair]
    return alpha, sigma


STEPS = ("euler", "ddim")


@final
@dataclass(frozen=True, eq=False)
class CFGPlusPlus(ClassifierFree):
    r"""CFG++ (Chung et al. 2024, algorithm 2): a step to the guided data with the unconditional noise.

    :math:`x' = \alpha' D_g + \sigma' E_u` with the data prediction of :math:`v_g = u + \lambda (c - u)` and the noise
    prediction of u; on the optimal-transport path :math:`x' = t' (x + (1 - t) v_g) + (1 - t') (x - t u)`. The rule
    moves a state by a distance that does not vanish with the step, so that it is no velocity field. It is the velocity
    with which one step of the named method ends at x', for methods of one evaluation a step, no past and no noise; all
    others raise (multi-stage, multistep, stochastic and adaptive ones, and those whose step is not the named one).

    Args:
        scale: lambda, in [0, 1] in the paper: 0 is unconditional, and small values do. A number, or as in :class:`CFG`.
        negative, batched, interval, shared: see :class:`CFG`. Beyond the interval the step is the conditional one.
        step: the method's step: "euler", or "ddim" for DDIM, DPM-Solver++ 1 and what else is exact while predictions do
            not change. The same on the optimal-transport path.
    """

    step: str = field(default="euler", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("step", self.step, STEPS)

    @property
    def needs_unconditional(self) -> bool:
        return True

    def velocity(self, builder: Builder, x: Expr, t: Number) -> Expr:
        _check_step(self, builder, t)
        beyond = scale_at(builder, 0.0, t, self.interval)  # 1 there, 0 inside
        if is_number(beyond, 1.0):
            return builder.evaluate(x, t, CONDITIONAL)
        w = scale_at(builder, self.scale, t, self.interval)
        c, u = self.pair(builder, x, t)
        end = builder.step.u
        alpha, sigma = _schedule(builder, end)
        guided = c * w + u * (1.0 - w)
        noise = c * beyond + u * (1.0 - beyond)
        goal = builder.convert(x, guided, t, "x_1") * alpha + builder.convert(x, noise, t, "x_0") * sigma
        builder.expect(goal)
        kept, gain = self._step(builder, t, end, alpha, sigma)
        still = np.equal(gain, 0.0)  # what waits has no step, and no velocity
        return (goal - x * kept) * (np.where(still, 0.0, 1.0) / np.where(still, 1.0, gain))[()]

    def _step(self, builder: Builder, t: Number, end: Number, alpha: Number, sigma: Number) -> tuple[Number, Number]:
        """(a, b) of the method's step x' = a x + b v."""
        if self.step == "euler":
            return 1.0, end - t
        a_1, b_1 = builder.conversion(t, "velocity", "x_1")
        a_0, b_0 = builder.conversion(t, "velocity", "x_0")
        return alpha * a_1 + sigma * a_0, alpha * b_1 + sigma * b_0


@final
@dataclass(frozen=True, eq=False)
class RectifiedCFGPlusPlus(ClassifierFree):
    r"""Rectified-CFG++ (Saini, Gupta & Bovik 2025, algorithm 1): guidance from where the conditional flow leads.

    :math:`v = c(x, t) + w (c - u)(\tilde x, \tilde t)`, evaluated at :math:`\tilde x = x + f h\, c(x, t)`,
    :math:`\tilde t = t + f h` with the step's size h. Three evaluations a step, and like CFG++ for methods that
    evaluate once a step (Euler).

    Args:
        scale: w, 0 without guidance (a "weight" in the words of :class:`CFG`); the paper's schedule
            :math:`\lambda_{max} (1 - t)^\gamma`, in its own time, is a function of t.
        negative, batched, shared: see :class:`CFG`.
        interval: beyond it the scale is 0.
        fraction: f in (0, 1]: 0.5 in the paper, 1 in its released code.
    """

    fraction: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("fraction", self.fraction, above=0.0, high=1.0)

    @property
    def needs_unconditional(self) -> bool:
        return not (isinstance(self.scale, float) and self.scale == 0.0)

    def velocity(self, builder: Builder, x: Expr, t: Number) -> Expr:
        _check_step(self, builder, t)
        w = scale_at(builder, self.scale, t, self.interval, outside=0.0)
        v = builder.evaluate(x, t, CONDITIONAL)
        if is_number(w, 0.0):
            return v
        h = self.fraction * (builder.step.u - t)
        c, u = self.pair(builder, builder.keep(x + v * h), builder.step.u if self.fraction == 1.0 else t + h)
        return v + (c - u) * w
