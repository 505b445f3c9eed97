"""Schedules: alpha_t, sigma_t and gamma_t of x_t = alpha_t x_1 + sigma_t x_0 (+ gamma_t z), and what they share."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._checks import check_float_tensor, check_number, own_times, type_error
from ..ops._operands import Coefficient
from .derivatives import SMALL, as_tensor, checked, derivative, nearest_end, not_below


def promoted(name: str, value: Tensor | float) -> Tensor:
    """A tensor or number as float32, or float64 where it is that."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise type_error(name, "a tensor or a number", value)
        if torch.compiler.is_compiling():  # a variable of the graph, not a constant
            return torch.zeros((), dtype=torch.float32, device="cpu") + value
        return torch.tensor(float(value), dtype=torch.float32, device="cpu")
    check_float_tensor(name, value)
    return value if value.dtype in (torch.float32, torch.float64) else value.to(torch.float32)


def promoted_times(t: Tensor | float) -> Tensor:
    """Times as float32, or float64 where they are that; a number must lie in [0, 1]."""
    if not isinstance(t, Tensor) and isinstance(t, (int, float)) and not torch.compiler.is_compiling():
        check_number("t", t, low=0.0, high=1.0)
    return promoted("t", t)


class Coefficients(NamedTuple):
    """A schedule at given times: tensors of t's shape; the gamma entries are None for a path without that term."""

    alpha_t: Tensor
    sigma_t: Tensor
    d_alpha_t: Tensor
    d_sigma_t: Tensor
    gamma_t: Tensor | None = None
    d_gamma_t: Tensor | None = None


class Kernel(NamedTuple):
    """What csrc/schedule/schedule.h takes for a schedule, and which of its four values are numbers."""

    code: int
    a: float = 0.0
    b: float = 0.0
    numbers: tuple[float | None, float | None, float | None, float | None] = (None, None, None, None)


class Schedule:
    """What a path is made of: alpha and sigma, their derivatives, and gamma for a path with noise of its own.

    Targets, batches and weightings read a schedule; a schedule of your own is a subclass of :class:`Path`, which also
    samples and converts.

    Schedules of one class with the same parameters are equal, and have one hash, where the parameters are plain values
    (numbers, strings, other schedules); else a schedule is equal to itself alone. ``repr`` is the constructor's call.
    """

    _exact: ClassVar[bool] = False
    """Of the schedules of this package: values are floats or tensors of t's shape, and finite at both ends."""

    def alpha(self, t: Tensor) -> Tensor | float:
        """The coefficient of x_1."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method alpha(t), got none")

    def sigma(self, t: Tensor) -> Tensor | float:
        """The coefficient of x_0."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method sigma(t), got none")

    def d_alpha(self, t: Tensor) -> Tensor | float:
        """The derivative of alpha; by autograd unless a subclass gives a closed form."""
        return derivative(self, "alpha", t)

    def d_sigma(self, t: Tensor) -> Tensor | float:
        """The derivative of sigma; by autograd unless a subclass gives a closed form."""
        return derivative(self, "sigma", t)

    def gamma(self, t: Tensor) -> Tensor | float | None:
        """The coefficient of z, or None for no such term."""
        return None

    def d_gamma(self, t: Tensor) -> Tensor | float | None:
        """The derivative of gamma."""
        if at(self, "gamma", t) is None:
            return None
        return derivative(self, "gamma", t)

    def _kernel(self) -> Kernel | None:
        """The compiled form of alpha, sigma and their derivatives, where there is one; see fmkernels/paths/fused.py."""
        return None

    def _arguments(self) -> dict[str, Any]:
        """The constructor's arguments, by name."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    def _identity(self) -> Any:
        """What makes two schedules of one class the same, or None where that cannot be told."""
        for base in type(self).__mro__:
            if base is not object and (not issubclass(base, Schedule) or base.__dict__.get("__slots__")):
                return None
        values = vars(self)
        if not all(_is_plain(value) for value in values.values()):
            return None
        return tuple((name, type(values[name]), values[name]) for name in sorted(values))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Schedule) or type(self) is not type(other):
            return NotImplemented
        mine = self._identity()
        return mine is not None and mine == other._identity()

    def __hash__(self) -> int:
        mine = self._identity()
        return object.__hash__(self) if mine is None else hash((type(self), mine))

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """alpha, sigma, their derivatives and, for a bridge, gamma and its derivative, at times t.

        Args:
            t: times in [0, 1], any shape; float16 and bfloat16 are promoted to float32.

        Returns:
            Coefficients: tensors of t's shape, float32 (float64 for float64 t), finite also at 0 and 1.
        """
        t = promoted_times(t)
        gamma, d_gamma = at(self, "gamma", t), at(self, "d_gamma", t)
        return Coefficients(
            tensor_at(self, "alpha", t),
            tensor_at(self, "sigma", t),
            tensor_at(self, "d_alpha", t),
            tensor_at(self, "d_sigma", t),
            None if gamma is None else as_tensor(gamma, t),
            None if d_gamma is None else as_tensor(d_gamma, t),
        )

    def interpolation_coefficients(self, t: Tensor) -> tuple[Coefficient, Coefficient, Coefficient | None]:
        """(alpha, sigma, gamma) as the kernels take them: constants stay numbers."""
        return at(self, "alpha", t), at(self, "sigma", t), at(self, "gamma", t)

    def log_snr(self, t: Tensor | float) -> Tensor:
        """log(alpha^2 / sigma^2); infinite where sigma (or alpha) is 0."""
        t = promoted_times(t)
        times = t.double()  # in float32 alpha and sigma may lie below its range
        return 2.0 * (torch.log(tensor_at(self, "alpha", times)) - torch.log(tensor_at(self, "sigma", times))).to(t)

    def snr(self, t: Tensor | float) -> Tensor:
        """The signal-to-noise ratio alpha^2 / sigma^2 (Kingma et al. 2021, eq. 3); infinite where sigma is 0."""
        t = promoted_times(t)
        return (tensor_at(self, "alpha", t) / tensor_at(self, "sigma", t)).square()

    def snr_inverse(self, snr: Tensor | float) -> Tensor:
        """The time at which the signal-to-noise ratio has a value; the ends' times beyond their ratios.

        Closed form where a schedule has one, else bisection on log SNR, which must increase: 60 fixed steps on the
        device, without a host sync.
        """
        return self.log_snr_inverse(torch.log(promoted("snr", snr)))

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        """The time at which log SNR has a value; see :meth:`snr_inverse`."""
        wanted = promoted("log_snr", log_snr)
        low = torch.zeros_like(wanted, dtype=torch.float64)
        high = torch.ones_like(low)
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = self.log_snr(middle) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(wanted.isnan(), wanted, (0.5 * (low + high)).to(wanted.dtype))


def at(schedule: Schedule, name: str, t: Tensor) -> Any:
    """A schedule's function at times t: a float, or a tensor that broadcasts to t's shape; None for no gamma.

    Where a schedule of a user's own has no finite value at an end, nearer to it than 1e-4 its value at that distance.

    Raises:
        TypeError, ValueError: the function returned neither, or another shape.
    """
    if schedule._exact:
        return getattr(schedule, name)(t)
    value = getattr(schedule, name)(own_times(t))
    if value is None and name in ("gamma", "d_gamma"):
        return value
    return checked(schedule, name, value, t)


def tensor_at(schedule: Schedule, name: str, t: Tensor) -> Tensor:
    """A schedule's function at times t as a tensor of t's shape."""
    return as_tensor(at(schedule, name, t), t)


def divisor(schedule: Schedule, name: str, t: Tensor) -> Tensor | float:
    """A schedule's standard deviation to divide by: nearest to an end where it vanishes it counts as at least 1e-4, or
    as its value at a distance of 1e-4 from there if that is smaller; everywhere else it is what it is."""
    value = at(schedule, name, t)
    if not isinstance(value, Tensor) or not_below(value, SMALL):
        return value
    near = tensor_at(schedule, name, t.clamp(SMALL, 1.0 - SMALL))
    with torch.no_grad():  # cos(pi / 2) is 0 but for its rounding, of which float64 has least
        vanishes = tensor_at(schedule, name, nearest_end(t).double()).abs() <= 2.0 * torch.finfo(torch.float64).eps
    limit = torch.where(vanishes, near.abs().clamp(max=SMALL), 0.0)
    return torch.where(value.abs() < limit, torch.where(near < 0.0, -limit, limit), value)


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _is_plain(value: Any) -> bool:
    """A value that nothing can change, and that equals only what is the same."""
    if isinstance(value, Schedule):
        return value._identity() is not None
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in _PLAIN


def one_minus_exp(x: Tensor) -> Tensor:
    """1 - e^(-x) for x >= 0 without cancellation, by its series below 0.1.

    torch.expm1 alone would do in eager mode; torch.compile's CPU backend forms exp(x) - 1 for it.
    """
    small = x.clamp(max=0.1)
    series = torch.zeros_like(small)
    for n in range(9, 1, -1):  # x (1 - x/2 (1 - x/3 (...)))
        series = small / n * (1.0 - series)
    return torch.where(x < 0.1, small * (1.0 - series), 1.0 - torch.exp(-x))


def half_pi(t: Tensor) -> Tensor:
    return (0.5 * math.pi) * t
