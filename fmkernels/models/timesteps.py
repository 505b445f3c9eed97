"""Models of discrete timesteps (DDPM, diffusers) as models of the time t, and the other way round."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_bool, check_callable, check_float_tensor, leading_shape, type_error, value_error
from ..paths.discrete import DiscreteVP
from ..paths.path import Path
from .schedule_change import ScheduleChange

# diffusers' ``prediction_type`` by our names of the same target.
PREDICTION_TYPES = {"epsilon": "x_0", "v_prediction": "v", "sample": "x_1"}


class TimestepModel(nn.Module):
    """A model(x, k, **kwargs) of timesteps k, trained along the table of a :class:`fmkernels.paths.DiscreteVP`, as a
    model(x, t, **kwargs) of times: k = (1 - t) K - 1, at least 0.

    Args:
        model: any callable; what it returns may be a tensor, a tuple that begins with one, or an object with an
            attribute ``sample``, as diffusers' networks return.
        path: the table.
        rounded: hand over whole timesteps, int64, the nearest ones. A network that embeds its timesteps takes
            fractions, which is exact; one that looks them up does not.

    Raises:
        TypeError: an argument of the wrong type.
    """

    def __init__(self, model: Any, path: DiscreteVP, *, rounded: bool = False) -> None:
        super().__init__()
        check_callable("model", "a callable model(x, timesteps, **kwargs)", model)
        if not isinstance(path, DiscreteVP):
            raise type_error("path", "a fm.paths.DiscreteVP", path)
        check_bool("rounded", rounded)
        self.model, self.path, self.rounded = model, path, rounded

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """The model's prediction at x, (B, ...), and times t, () or (B,)."""
        check_float_tensor("x", x)
        check_float_tensor("t", t)
        leading_shape("t", t, "x", x)
        if t.dim() > 1:
            raise value_error("t", f"one time, or one for each of {x.shape[0]} samples", t)
        k = self.path.timesteps(t)
        k = k.round().long() if self.rounded else k.to(torch.promote_types(torch.float32, t.dtype))
        output = self.model(x, k.expand(x.shape[:1]), **kwargs)
        if not isinstance(output, Tensor):
            output = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
        if not isinstance(output, Tensor):
            raise type_error(
                "model", "a tensor, a tuple of one, or an object with an attribute sample, as output", output
            )
        return output


class Diffusion(NamedTuple):
    """What :func:`from_diffusers` returns, as :func:`fmkernels.sample` takes it."""

    model: TimestepModel
    path: DiscreteVP
    prediction: str


def from_diffusers(model: Any, scheduler: Any, *, rounded: bool = False) -> Diffusion:
    """A diffusers network and the scheduler of its training (DDPM, DDIM, PNDM, DPM-Solver, Euler, ...) as a model of
    flows::

        model, path, prediction = fm.models.from_diffusers(unet, scheduler)
        x, _ = fm.sample(model, (16, 3, 32, 32), path=path, prediction=prediction, method="dpmpp_2m", steps=20)
        flow = fm.models.ScheduleChange(model, path, fm.paths.CondOT(), prediction=prediction)  # along straight lines

    Args:
        model: the network, model(x, timesteps, **kwargs).
        scheduler: an object with ``alphas_cumprod``, and ``config.prediction_type``: "epsilon" (if it has none),
            "v_prediction" or "sample".
        rounded: as of :class:`TimestepModel`.

    Raises:
        TypeError, ValueError: a scheduler without a table, or of another prediction.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise type_error("scheduler", "a diffusers scheduler with alphas_cumprod", scheduler)
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        known = ", ".join(map(repr, PREDICTION_TYPES))
        raise value_error("scheduler", f"a config.prediction_type of {known}", kind)
    path = DiscreteVP(table)
    return Diffusion(TimestepModel(model, path, rounded=rounded), path, PREDICTION_TYPES[kind])


class TimestepPredictor(nn.Module):
    """A model of a path as a network of timesteps, model(x, k, **kwargs), that DDPM's samplers call.

    Args:
        model: any callable model(x, t, **kwargs), trained along ``path``.
        path: of its training.
        alphas_cumprod: the table of the sampler, K numbers.
        prediction: what the model returns, one of ``fm.paths.TARGETS``.
        prediction_type: what the sampler expects: "epsilon", "v_prediction" or "sample".

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        model: Any,
        path: Path,
        alphas_cumprod: Any,
        *,
        prediction: str = "velocity",
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise value_error("prediction_type", f"one of {', '.join(map(repr, PREDICTION_TYPES))}", prediction_type)
        self.table = DiscreteVP(alphas_cumprod)
        self.change = ScheduleChange(
            model, path, self.table, prediction=prediction, returns=PREDICTION_TYPES[prediction_type]
        )

    def forward(self, x: Tensor, timestep: Tensor | int | float, **kwargs: Any) -> Tensor:
        """What the sampler expects.

        Args:
            x: the state alpha_k x_1 + sigma_k noise, (B, ...).
            timestep: k, a number or a tensor () or (B,).
            kwargs: of the model.
        """
        check_float_tensor("x", x)
        k = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, device=x.device)
        count = len(self.table.alphas_cumprod)
        told = torch.promote_types(x.dtype, torch.float32)
        return self.change.at(x, 1.0 - (k.double() + 1.0) / count, told, kwargs)
