"""SiT's transport (Ma et al. 2024, "SiT: exploring flow and diffusion-based generative models with scalable interpolant
transformers"): ``from transport import create_transport, Sampler`` becomes ``from fmkernels.compat.sit import ...``.

t = 0 is noise, t = 1 the data. Times and noise are drawn by PyTorch in SiT's order; the path, the loss and the steps
are fmkernels' kernels. Where SiT divides by a coefficient that vanishes at an end, ours is finite. One call of the
network serves drift and score of an SDE's step, where SiT makes two; a likelihood has one probe all along.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import paths
from .._checks import check_choice
from ..losses import cfm_loss
from ..ops.combine.op import combine
from ..paths.derivatives import SMALL
from ..paths.targets import conversion_coefficients
from ..solvers.equations.odeint import odeint
from ._densities import rademacher_like, solved_with_divergence

Model = Callable[..., Tensor]


class ModelType(enum.Enum):
    """What the model predicts."""

    NOISE = enum.auto()
    SCORE = enum.auto()
    VELOCITY = enum.auto()


class PathType(enum.Enum):
    """The path: straight, trigonometric or variance-preserving."""

    LINEAR = enum.auto()
    GVP = enum.auto()
    VP = enum.auto()


class WeightType(enum.Enum):
    """The weight of a noise or score loss."""

    NONE = enum.auto()
    VELOCITY = enum.auto()
    LIKELIHOOD = enum.auto()


_PATHS: dict[PathType, paths.Path] = {
    PathType.LINEAR: paths.CondOT(),
    PathType.GVP: paths.Cosine(),
    PathType.VP: paths.VP(),
}
_TARGETS = {ModelType.NOISE: "x_0", ModelType.SCORE: "score", ModelType.VELOCITY: "velocity"}
_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "inccreasing-decreasing")  # as SiT spells it
_LAST_STEPS = (None, "Mean", "Tweedie", "Euler")


class Transport:
    """A path, a prediction and a loss; :func:`create_transport` makes one."""

    def __init__(
        self, *, model_type: ModelType, path_type: PathType, loss_type: WeightType, train_eps: float, sample_eps: float
    ) -> None:
        self.model_type, self.path_type, self.loss_type = model_type, path_type, loss_type
        self.train_eps, self.sample_eps = train_eps, sample_eps
        self.path = _PATHS[path_type]
        self.target = _TARGETS[model_type]

    def prior_logp(self, z: Tensor) -> Tensor:
        """The standard normal log-density of each sample, (B,)."""
        flat = z.flatten(1)
        return -0.5 * flat.shape[1] * math.log(2.0 * math.pi) - 0.5 * flat.square().sum(1)

    def check_interval(
        self,
        train_eps: float,
        sample_eps: float,
        *,
        diffusion_form: str = "SBDM",
        sde: bool = False,
        reverse: bool = False,
        eval: bool = False,
        last_step_size: float = 0.0,
    ) -> tuple[float, float]:
        """The times (t0, t1) between which is trained, or sampled (``eval``)."""
        t0, t1 = 0.0, 1.0
        eps = sample_eps if eval else train_eps
        late = 1.0 - eps if not sde or last_step_size == 0 else 1.0 - last_step_size
        if self.path_type is PathType.VP:
            t1 = late
        elif self.model_type is not ModelType.VELOCITY or sde:
            first = (diffusion_form == "SBDM" and sde) or self.model_type is not ModelType.VELOCITY
            t0, t1 = eps if first else 0.0, late
        return (1.0 - t0, 1.0 - t1) if reverse else (t0, t1)

    def sample(self, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t, x0, x1): noise like x1, then times (B,), uniform in the training interval."""
        x0 = torch.randn_like(x1)
        t0, t1 = self.check_interval(self.train_eps, self.sample_eps)
        t = torch.rand((x1.shape[0],), device=torch.get_default_device()) * (t1 - t0) + t0
        return t.to(x1), x0, x1

    def training_losses(
        self, model: Model, x1: Tensor, model_kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """``pred``, and ``loss``, the mean weighted squared error of each sample, (B,).

        Args:
            model: model(x, t, **model_kwargs).
            x1: data, (B, ...).
            model_kwargs: of the model.

        Raises:
            AssertionError: the model's output is not of x1's shape.
        """
        t, x0, x1 = self.sample(x1)
        batch = self.path.sample(x1, x0, t)
        pred = model(batch.x_t, t, **dict(model_kwargs or {}))
        if not isinstance(pred, Tensor) or pred.shape != x1.shape:
            raise AssertionError(f"model: expected an output of x1's shape {tuple(x1.shape)}, got {_shape(pred)}")
        loss = cfm_loss(pred, batch, target=self.target, weight=self._weight(t), reduction="none")
        return {"pred": pred, "loss": loss}

    def _weight(self, t: Tensor) -> Tensor | None:
        """Of the squared error of x_0, or of the score, whose error SiT measures as that of sigma times it."""
        if self.model_type is ModelType.VELOCITY:
            return None
        at = self.path.coefficients(t.double())
        sigma = at.sigma_t
        half = self._diffusion(t.double(), "SBDM", 1.0)
        weight = {
            WeightType.NONE: torch.ones_like(sigma),
            WeightType.VELOCITY: (half / sigma).square(),
            WeightType.LIKELIHOOD: half / sigma.square(),
        }[self.loss_type]
        return (weight * sigma.square() if self.model_type is ModelType.SCORE else weight).to(t)

    def _diffusion(self, t: Tensor, form: str, norm: float) -> Tensor:
        """w of dx = (v + w s) dt + sqrt(2 w) dW at times t."""
        at = self.path.coefficients(t)
        if form == "SBDM":
            alpha = at.alpha_t.clamp(min=SMALL)
            return norm * at.sigma_t * (at.sigma_t * at.d_alpha_t / alpha - at.d_sigma_t)
        return {
            "constant": torch.full_like(t, norm),
            "sigma": norm * at.sigma_t,
            "linear": norm * (1.0 - t),
            "decreasing": 0.25 * (norm * torch.cos(math.pi * t) + 1.0).square(),
            "inccreasing-decreasing": norm * torch.sin(math.pi * t).square(),
        }[form]

    def get_drift(self) -> Callable[..., Tensor]:
        """drift(x, t, model, **model_kwargs): the velocity of the probability-flow ODE, t being (B,)."""

        def drift(x: Tensor, t: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            output = model(x, t, **model_kwargs)
            if output.shape != x.shape:
                raise AssertionError(f"model: expected an output of shape {tuple(x.shape)}, got {_shape(output)}")
            return output if self.target == "velocity" else self.path.convert(output, x, t, self.target, "velocity")

        return drift

    def get_score(self) -> Callable[..., Tensor]:
        """score(x, t, model, **model_kwargs): the gradient of log p_t, t being (B,)."""

        def score(x: Tensor, t: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            return self.path.convert(model(x, t, **model_kwargs), x, t, self.target, "score")

        return score


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


class Sampler:
    """What samples a transport's model."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.drift, self.score = transport.get_drift(), transport.get_score()

    def sample_sde(
        self,
        *,
        sampling_method: str = "Euler",
        diffusion_form: str = "SBDM",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        num_steps: int = 250,
    ) -> Callable[..., list[Tensor]]:
        r"""A function sample(init, model, **model_kwargs) to the list of ``num_steps`` states of
        :math:`dx = (v + w s)\, dt + \sqrt{2 w}\, dW`, the last of which is a step without noise.

        Args:
            sampling_method: "Euler" (Maruyama) or "Heun".
            diffusion_form: w: "constant", "SBDM", "sigma", "linear", "decreasing" or "inccreasing-decreasing".
            diffusion_norm: its factor.
            last_step: None, "Mean" (of the SDE's step), "Tweedie" (the posterior mean of the data) or "Euler" (of the
                ODE).
            last_step_size: its size.
            num_steps: states, the last step included.

        Raises:
            NotImplementedError: an unknown method, form or last step.
        """
        for name, value, known in (
            ("sampling_method", sampling_method, ("Euler", "Heun")),
            ("diffusion_form", diffusion_form, _FORMS),
            ("last_step", last_step, _LAST_STEPS),
        ):
            if value not in known:
                raise NotImplementedError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
        transport, path = self.transport, self.transport.path
        size = 0.0 if last_step is None else last_step_size
        t0, t1 = transport.check_interval(
            transport.train_eps,
            transport.sample_eps,
            diffusion_form=diffusion_form,
            sde=True,
            eval=True,
            last_step_size=size,
        )
        grid = torch.linspace(t0, t1, num_steps, dtype=torch.float64, device="cpu")

        def velocity(x: Tensor, t: float, model: Model, kwargs: dict[str, Any]) -> Tensor:
            return self.drift(x, torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device), model, **kwargs)

        # A velocity's SDE begins at t = 0, where SBDM's w is infinite (SiT's is NaN): a step renews half of the noise.
        limited = diffusion_form == "SBDM" and transport.model_type is ModelType.VELOCITY and t0 == 0.0
        size_of_step = (t1 - t0) / max(num_steps - 1, 1)

        def moved(t: Tensor) -> tuple[float, float, float]:
            """(w, A, B): the diffusion, and the drift v + w s as A x + B v."""
            w = transport._diffusion(t, diffusion_form, diffusion_norm)
            if limited:
                w = w.clamp(max=0.5 * path.coefficients(t).sigma_t.square().item() / size_of_step)
            a, b = conversion_coefficients(path, t, "velocity", "score")
            return w.item(), (w * a).item(), (1.0 + w * b).item()

        def sample(init: Tensor, model: Model, **model_kwargs: Any) -> list[Tensor]:
            x, states = init, []
            with torch.no_grad():
                for t, u in pairwise(grid):
                    h, (w, a, b) = (u - t).item(), moved(t)
                    z = torch.randn(x.shape, device=torch.get_default_device()).to(x)
                    spread = math.sqrt(2.0 * w * h)
                    if sampling_method == "Euler":
                        v = velocity(x, t.item(), model, model_kwargs)
                        x = combine([x, v, z], [1.0 + h * a, h * b, spread])
                    else:
                        y = combine([x, z], [1.0, spread])
                        v = velocity(y, t.item(), model, model_kwargs)
                        _, a_u, b_u = moved(u)
                        k = combine([y, v], [a, b])
                        p = combine([y, k], [1.0, h])
                        v_u = velocity(p, u.item(), model, model_kwargs)
                        x = combine([y, k, p, v_u], [1.0, 0.5 * h, 0.5 * h * a_u, 0.5 * h * b_u])
                    states.append(x)
                states.append(last(x, model, model_kwargs))
            return states

        def last(x: Tensor, model: Model, kwargs: dict[str, Any]) -> Tensor:
            if last_step is None:
                return x
            v, t = velocity(x, t1, model, kwargs), grid[-1]
            if last_step == "Tweedie":
                a, b = (c.item() for c in conversion_coefficients(path, t, "velocity", "x_1"))
                return combine([x, v], [a, b])
            _, a, b = moved(t) if last_step == "Mean" else (0.0, 0.0, 1.0)
            return combine([x, v], [1.0 + size * a, size * b])

        return sample

    def sample_ode(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        reverse: bool = False,
    ) -> Callable[..., Tensor]:
        """A function sample(x, model, **model_kwargs) to the states at ``num_steps`` times, (num_steps, B, ...).

        Args:
            sampling_method: a method of :func:`fmkernels.odeint`.
            num_steps: times, ends included; of fixed-step methods the steps are between them.
            atol, rtol: tolerances.
            reverse: from data to noise.
        """
        transport = self.transport
        t0, t1 = transport.check_interval(transport.train_eps, transport.sample_eps, eval=True, reverse=reverse)

        def sample(x: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            def field(t: Tensor, y: Tensor) -> Tensor:
                return self.drift(y, t.expand(y.shape[:1]), model, **model_kwargs)

            times = torch.linspace(t0, t1, num_steps, device=x.device)
            return odeint(field, x, times, method=sampling_method, atol=atol, rtol=rtol)  # type: ignore[no-any-return]

        return sample

    def sample_ode_likelihood(
        self, *, sampling_method: str = "dopri5", num_steps: int = 50, atol: float = 1e-6, rtol: float = 1e-3
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """A function sample(x, model, **model_kwargs) to (log-density of x, its noise), by Hutchinson's estimate with
        one Rademacher probe, which stays the same along the solve.

        Args:
            sampling_method: a method of :func:`fmkernels.odeint`.
            num_steps: times, ends included.
            atol, rtol: tolerances.
        """
        transport = self.transport
        t0, t1 = transport.check_interval(transport.train_eps, transport.sample_eps, eval=True)

        def sample(x: Tensor, model: Model, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
            def field(t: Tensor, y: Tensor) -> Tensor:
                return self.drift(y, t.expand(y.shape[:1]), model, **model_kwargs)

            times = torch.linspace(t1, t0, num_steps, device=x.device)
            options: dict[str, Any] = {"method": sampling_method, "atol": atol, "rtol": rtol}
            z, change = solved_with_divergence(field, x, times, probe=rademacher_like(x), **options)
            return transport.prior_logp(z[-1]) + change, z[-1]

        return sample


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
) -> Transport:
    """A transport by names.

    Args:
        path_type: "Linear", "GVP" (trigonometric) or "VP".
        prediction: "velocity", "noise" or "score".
        loss_weight: of noise and score losses: None, "velocity" or "likelihood".
        train_eps, sample_eps: distances from the ends that are left out, with SiT's defaults; 0 for a velocity along
            "Linear" and "GVP".

    Raises:
        KeyError: an unknown path.
    """
    known = {"Linear": PathType.LINEAR, "GVP": PathType.GVP, "VP": PathType.VP}
    if path_type not in known:
        raise KeyError(f"path_type: expected one of {', '.join(map(repr, known))}, got {path_type!r}")
    check_choice("prediction", prediction, ("velocity", "noise", "score"))
    if loss_weight is not None:
        check_choice("loss_weight", loss_weight, ("velocity", "likelihood"))
    path = known[path_type]
    model = {"noise": ModelType.NOISE, "score": ModelType.SCORE}.get(prediction, ModelType.VELOCITY)
    weight = {"velocity": WeightType.VELOCITY, "likelihood": WeightType.LIKELIHOOD}.get(
        loss_weight or "", WeightType.NONE
    )
    if path is PathType.VP:
        train, late = 1e-5, 1e-3
    elif model is not ModelType.VELOCITY:
        train, late = 1e-3, 1e-3
    else:
        return Transport(model_type=model, path_type=path, loss_type=weight, train_eps=0.0, sample_eps=0.0)
    return Transport(
        model_type=model,
        path_type=path,
        loss_type=weight,
        train_eps=train if train_eps is None else train_eps,
        sample_eps=late if sample_eps is None else sample_eps,
    )


__all__ = ["ModelType", "PathType", "Sampler", "Transport", "WeightType", "create_transport"]
