"""Denoisers D(x, sigma) of x = data + sigma noise (EDM, k-diffusion) as models of paths, and the other way round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_callable, check_choice, check_float_tensor, check_number, leading_shape
from ..ops._operands import compute_dtype
from ..ops.combine.op import combine
from ..paths.path import Path
from ..paths.targets import TARGETS, combination
from .schedule_change import checked_output, checked_path, point_of, row_of


class Denoiser(nn.Module):
    r"""A model of a path as a denoiser: :math:`D(x, \sigma)`, the posterior mean of the data x_1 given :math:`x = x_1 +
    \sigma x_0` (Karras et al. 2022, eq. 2). The model is called at the time whose noise-to-signal ratio is sigma.

    Args:
        model: any callable model(x, t, **kwargs).
        path: of its training.
        prediction: what it returns, one of ``fm.paths.TARGETS``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or an unknown target.
    """

    def __init__(self, model: Any, path: Path, *, prediction: str = "velocity") -> None:
        super().__init__()
        check_callable("model", "a callable model(x, t, **kwargs)", model)
        checked_path("path", path)
        check_choice("prediction", prediction, TARGETS)
        self.model, self.path, self.prediction = model, path, prediction

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """D(x, sigma).

        Args:
            x: (B, ...).
            sigma: >= 0, () or (B,).
            kwargs: of the model.
        """
        check_float_tensor("x", x)
        check_float_tensor("sigma", sigma)
        leading_shape("sigma", sigma, "x", x)
        noise = sigma.double()
        t = self.path.log_snr_inverse(-2.0 * torch.log(noise))
        point = point_of(self.path, t)
        scale = torch.sqrt((point[0].square() + point[1].square()) / (1.0 + noise.square()))
        row = row_of(self.path, t, self.prediction)
        a, b = combination(point, row, (torch.ones_like(t), torch.zeros_like(t)))
        wide = compute_dtype(x)
        state = combine([x], [scale.to(wide)])
        output = checked_output(self.model(state, t.to(sigma.dtype), **kwargs), x)
        return combine([output, state.to(output.dtype)], [b.to(wide), a.to(wide)])


class FromDenoiser(nn.Module):
    r"""A denoiser :math:`D(x, \sigma)` as a model of a path that returns x_1: ``prediction="x_1"`` of
    :func:`fmkernels.sample`. It is called at :math:`x_t / \alpha_t` and :math:`\sigma = \sigma_t / \alpha_t`, beyond
    ``sigma_max``, where it was not trained, at that.

    Args:
        denoiser: any callable D(x, sigma, **kwargs), sigma being (B,).
        path: the path to sample along.
        sigma_min, sigma_max: the denoiser's range.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(self, denoiser: Any, path: Path, *, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__()
        check_callable("denoiser", "a callable D(x, sigma, **kwargs)", denoiser)
        checked_path("path", path)
        check_number("sigma_min", sigma_min, low=0.0)
        check_number("sigma_max", sigma_max, above=sigma_min)
        self.denoiser, self.path = denoiser, path
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """The posterior mean of x_1 at x, (B, ...), and times t, () or (B,)."""
        check_float_tensor("x", x)
        check_float_tensor("t", t)
        leading_shape("t", t, "x", x)
        times = t.double()
        alpha, sigma = point_of(self.path, times)
        noise = (sigma / alpha).clamp(self.sigma_min, self.sigma_max)
        scale = torch.sqrt((1.0 + noise.square()) / (alpha.square() + sigma.square()))
        wide = compute_dtype(x)
        level = noise.to(t.dtype).expand(x.shape[:1]) if t.dim() <= 1 else noise.to(t.dtype)
        return checked_output(self.denoiser(combine([x], [scale.to(wide)]), level, **kwargs), x)
