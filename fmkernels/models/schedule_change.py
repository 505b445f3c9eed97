"""A model trained along one schedule, sampled along another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_callable, check_choice, check_float_tensor, leading_shape, type_error, value_error
from ..ops._operands import compute_dtype
from ..ops.combine.op import combine
from ..paths.derivatives import as_tensor
from ..paths.path import Path
from ..paths.schedule import tensor_at
from ..paths.targets import TARGETS, Row, coefficients, combination


class ScheduleChange(nn.Module):
    r"""A model of one path as a model of another: :math:`\bar x_t = \bar\alpha_t x_1 + \bar\sigma_t x_0` is
    :math:`c\, x_s = c\, (\alpha_s x_1 + \sigma_s x_0)` at the time s of equal signal-to-noise ratio, with
    :math:`c^2 = (\bar\alpha_t^2 + \bar\sigma_t^2) / (\alpha_s^2 + \sigma_s^2)` (the scale-time transformation: Lipman
    et al. 2024, section 4.6). The model is called at :math:`(\bar x_t / c, s)`; its prediction and :math:`x_s` give the
    posterior means of x_1 and x_0, and these what is asked for along the new path.

    No derivative of s or c is formed, so that the result is finite at both ends, where those are not. Where the new
    path goes beyond the signal-to-noise ratios of the old one, s stays at its end. At an end where the prediction says
    nothing of x_1 (the velocity of t^n at 0), what x_t alone says stands in its place.

    Args:
        model: any callable model(x, s, **kwargs); a module's parameters are the wrapper's.
        trained: the path of its training; without a gamma term.
        path: the new path.
        prediction: what the model returns, one of ``fm.paths.TARGETS``.
        returns: what this module returns along the new path, likewise.
        sigma_data: of "edm".

    Raises:
        TypeError, ValueError: an argument of the wrong type, an unknown target, or a bridge.
    """

    def __init__(
        self,
        model: Any,
        trained: Path,
        path: Path,
        *,
        prediction: str = "velocity",
        returns: str = "velocity",
        sigma_data: float | None = None,
    ) -> None:
        super().__init__()
        check_callable("model", "a callable model(x, t, **kwargs)", model)
        checked_path("trained", trained)
        checked_path("path", path)
        for name, target in (("prediction", prediction), ("returns", returns)):
            check_choice(name, target, TARGETS)
        self.model, self.trained, self.path = model, trained, path
        self.prediction, self.returns, self.sigma_data = prediction, returns, sigma_data

    def times(self, t: Tensor) -> Tensor:
        """The times s of the old path, float64."""
        return self.trained.log_snr_inverse(self.path.log_snr(t.double()))

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """What is asked for at x, (B, ...), and times t of a leading part of its shape; of the model's dtype."""
        check_float_tensor("x", x)
        check_float_tensor("t", t)
        leading_shape("t", t, "x", x)
        return self.at(x, t.double(), t.dtype, kwargs)

    def at(self, x: Tensor, late: Tensor, told: torch.dtype, kwargs: dict[str, Any]) -> Tensor:
        """The same at times in float64, of which the model is told in another dtype."""
        early = self.times(late)
        old, new = (point_of(path, time) for path, time in ((self.trained, early), (self.path, late)))
        scale = torch.sqrt((new[0].square() + new[1].square()) / (old[0].square() + old[1].square()))
        known = row_of(self.trained, early, self.prediction, self.sigma_data)
        a, b = combination(old, known, row_of(self.path, late, self.returns, self.sigma_data))
        wide = compute_dtype(x)
        predicted = checked_output(self.model(combine([x], [(1.0 / scale).to(wide)]), early.to(told), **kwargs), x)
        state = x.to(predicted.dtype)
        return combine([predicted, state], [b.to(wide), (a / scale).to(wide)])


def checked_path(name: str, value: Any) -> None:
    """A path of which a prediction tells both samples."""
    if not isinstance(value, Path):
        raise type_error(name, "a path of fm.paths", value)
    if value.gamma(torch.tensor(0.5, device="cpu")) is not None:
        raise value_error(name, "a path without a gamma term", value)


def checked_output(output: Any, x: Tensor) -> Tensor:
    """What a model returned, which is of x's shape."""
    if not isinstance(output, Tensor) or output.shape != x.shape or not output.is_floating_point():
        raise value_error("model", f"a floating tensor of x's shape {tuple(x.shape)} as output", output)
    return output


def row_of(path: Path, t: Tensor, target: str, sigma_data: float | None = None) -> Row:
    """The coefficients of a target."""
    extra = {} if target != "edm" or sigma_data is None else {"sigma_data": sigma_data}
    c_1, c_0, _ = coefficients(path, t, target, **extra)
    return as_tensor(c_1, t), as_tensor(c_0, t)  # type: ignore[arg-type]


def point_of(path: Path, t: Tensor) -> Row:
    """The coefficients of the state."""
    return tensor_at(path, "alpha", t), tensor_at(path, "sigma", t)
