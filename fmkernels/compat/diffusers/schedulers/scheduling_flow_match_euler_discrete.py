"""FlowMatchEulerDiscreteScheduler with one fused pass a step and no host syncs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...._checks import check_like, value_error
from ...._torch import version_of
from ....ops.combine.op import combine

_Theirs: Any = diffusers.FlowMatchEulerDiscreteScheduler


class FlowMatchEulerDiscreteScheduler(_Theirs):  # type: ignore[misc]
    r"""diffusers' class of this name, whose constructor, configuration, sigmas and timesteps it inherits, with the step
    :math:`x_{\sigma'} = x_\sigma + (\sigma' - \sigma) v` as one pass over memory (Esser et al. 2024).

    What differs: a step reads nothing from the device, not even the first one, whose place is known by where its
    timestep lies in ``timesteps``; products are rounded once, in float32, also of half-precision samples; a step by
    ``per_token_timesteps`` goes from each token's sigma down to the next one (diffusers' goes the other way);
    ``shift_terminal`` at one step leaves its sigma (diffusers' is NaN).
    """

    sigmas: Tensor
    timesteps: Tensor

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """As diffusers', whose numbers they are; they are kept on the host, too.

        Args:
            num_inference_steps: steps; None where sigmas or timesteps are given.
            device: where ``timesteps`` and ``sigmas`` will be.
            sigmas, timesteps: own ones.
            mu: of dynamic shifting.
        """
        if num_inference_steps is None and sigmas is None and timesteps is None:
            raise value_error("num_inference_steps", "a number of steps where neither sigmas nor timesteps are", None)
        super().set_timesteps(num_inference_steps, "cpu", sigmas, mu, timesteps)
        levels, times = self.sigmas.tolist(), self.timesteps.tolist()
        self.sigmas, self.timesteps = self.sigmas.to(device), self.timesteps.to(device)
        self._keep(levels, times)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """The sigmas stretched so that the last one is ``shift_terminal``; one at 1, which no stretch moves, stays."""
        return t if t[-1] == 1.0 else super().stretch_shift_to_terminal(t)

    def _keep(self, levels: list[float], times: list[float]) -> None:
        values = levels, times, self.config.stochastic_sampling
        state = self._internal_dict, self.sigmas, version_of(self.sigmas), self.timesteps, version_of(self.timesteps)
        self._host = *state, values

    def _on_host(self) -> tuple[list[float], list[float], bool]:
        """(sigmas, timesteps, whether steps draw noise); read again where somebody has set or written to them."""
        kept = self.__dict__.get("_host")
        if kept is not None:
            config, sigmas, version, timesteps, written, values = kept
            if (
                config is self._internal_dict
                and sigmas is self.sigmas
                and timesteps is self.timesteps
                and version == version_of(sigmas)
                and written == version_of(timesteps)
            ):
                return values  # type: ignore[no-any-return]
        self._keep(self.sigmas.tolist(), self.timesteps.tolist())
        return self._host[5]  # type: ignore[no-any-return]

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """The index of a timestep; of two equal ones the second, as diffusers has it.

        Raises:
            IndexError: it is none of the scheduler's.
        """
        if schedule_timesteps is not None and schedule_timesteps is not self.timesteps:
            return super().index_for_timestep(timestep, schedule_timesteps)  # type: ignore[no-any-return]
        times = self._on_host()[1]
        value = self._value(timestep, times)
        found = [i for i, time in enumerate(times) if time == value]
        if not found:
            raise IndexError(f"timestep: expected one of the scheduler's timesteps, got {value}")
        return found[1 if len(found) > 1 else 0]

    def _value(self, timestep: Any, times: list[float]) -> float:
        """A timestep as a number, without reading one that is a part of ``timesteps`` from the device."""
        own = self.timesteps
        if not isinstance(timestep, Tensor) or timestep.is_cpu or timestep.numel() != 1:
            return torch.tensor(float(timestep), dtype=torch.float32, device="cpu").item()  # as the scheduler's are
        if (timestep.device, timestep.dtype) == (own.device, own.dtype) and own.is_contiguous():
            place, rest = divmod(timestep.data_ptr() - own.data_ptr(), own.element_size())
            if rest == 0 and 0 <= place < len(times):
                return times[place]
        return float(timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample at the next sigma.

        Args:
            model_output: the prediction noise - data, of the sample's shape.
            timestep: one of ``timesteps``; looked at in the first step alone.
            sample: the current sample.
            s_churn, s_tmin, s_tmax, s_noise: without effect, as in diffusers.
            generator: of the noise of ``stochastic_sampling``, one or a list with one for each sample.
            per_token_timesteps: a timestep for each token, a leading part of the sample's shape (B, N).
            return_dict: an object with ``prev_sample`` instead of a tuple of it.

        Raises:
            ValueError: an integer timestep.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and timestep.dtype in (torch.int32, torch.int64)):
            raise ValueError(
                "timestep: expected one of the scheduler's timesteps, got an integer. Passing integer indices (e.g. "
                "from `enumerate(timesteps)`) as timesteps to `FlowMatchEulerDiscreteScheduler.step()` is not supported"
            )
        if self.sigmas.requires_grad and per_token_timesteps is None:  # a learnable schedule
            return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)
        if self._step_index is None:
            self._init_step_index(timestep)
        if model_output.shape != sample.shape:
            check_like("model_output", model_output, "sample", sample, dtype=False)
        levels, _, stochastic = self._on_host()
        result_dtype = model_output.dtype
        if per_token_timesteps is not None:
            sigma, after = self._levels_of_tokens(per_token_timesteps, sample)
            sample, model_output, result_dtype = sample.float(), model_output.float(), torch.float32
        else:
            sigma, after = levels[self._step_index], levels[self._step_index + 1]
            if sample.dtype != model_output.dtype:
                sample, model_output = sample.float(), model_output.float()
        if stochastic:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
            operands, weights = (
                [sample, model_output, noise.to(sample.dtype)],
                [1.0 - after, -(1.0 - after) * sigma, after],
            )
        else:
            operands, weights = [sample, model_output], [1.0, after - sigma]
        result = combine(operands, weights)
        self._step_index += 1
        if result.dtype != result_dtype:
            result = result.to(result_dtype)
        if not return_dict:
            return (result,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result)  # type: ignore[arg-type]

    def _levels_of_tokens(self, timesteps: Tensor, sample: Tensor) -> tuple[Any, Any]:
        """The sigma of each token, and the largest one of the schedule below it."""
        sigma = timesteps.to(device=sample.device, dtype=torch.float32) / self.config.num_train_timesteps
        levels = self.sigmas.to(device=sample.device, dtype=torch.float32)
        below = torch.where(levels < sigma[..., None] - 1e-6, levels, 0.0)
        return sigma, below.amax(-1)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Any = None) -> Tensor:
        """sigma noise + (1 - sigma) sample, at each timestep's sigma.

        Args:
            sample: data, (B, ...).
            timestep: (B,), or (1,).
            noise: of sample's shape.

        Raises:
            TypeError: no noise.
        """
        if self.sigmas.requires_grad:
            return super().scale_noise(sample, timestep, noise)  # type: ignore[no-any-return]
        check_like("noise", noise, "sample", sample)
        levels = self._on_host()[0]
        count = timestep.shape[0]
        if self.begin_index is None:
            places = [self.index_for_timestep(time) for time in timestep]
        else:
            places = [self.step_index if self.step_index is not None else self.begin_index] * count
        if len(set(places)) == 1:
            sigma: Any = levels[places[0]]
        else:
            sigma = torch.tensor([levels[i] for i in places], device=sample.device)
        return combine([noise, sample], [sigma, 1.0 - sigma])


__all__ = ["FlowMatchEulerDiscreteScheduler"]
