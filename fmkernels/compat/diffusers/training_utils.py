"""diffusers' helpers of flow-matching training: densities and weights of noise levels, and their lookup."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def compute_density_for_timestep_sampling(
    weighting_scheme: str,
    batch_size: int,
    logit_mean: float | None = None,
    logit_std: float | None = None,
    mode_scale: float | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Places u in [0, 1] among timesteps that descend from noise, (B,): diffusers' numbers under equal seeds (Esser et
    al. 2024, section 3.1). The time of our paths is t = u, so that a positive ``logit_mean`` favours data, where
    :class:`fmkernels.times.LogitNormal`'s favours noise.

    Args:
        weighting_scheme: "logit_normal", "mode", or anything else for uniform.
        batch_size: B.
        logit_mean, logit_std: of "logit_normal".
        mode_scale: of "mode".
        device: of the result.
        generator: torch.Generator on that device.

    Raises:
        ValueError: a parameter of the scheme is missing.
    """
    if weighting_scheme == "logit_normal":
        if logit_mean is None or logit_std is None:
            raise ValueError("logit_mean, logit_std: expected numbers for 'logit_normal', got None")
        normal = torch.normal(mean=logit_mean, std=logit_std, size=(batch_size,), device=device, generator=generator)
        return torch.sigmoid(normal)
    u = torch.rand((batch_size,), device=device, generator=generator)
    if weighting_scheme != "mode":
        return u
    if mode_scale is None:
        raise ValueError("mode_scale: expected a number for 'mode', got None")
    return 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


def compute_loss_weighting_for_sd3(weighting_scheme: str, sigmas: Tensor | None = None) -> Tensor:
    """The weight of the squared error of the velocity at noise levels, of their shape: sigma^-2 for "sigma_sqrt",
    2 / (pi (1 - 2 sigma + 2 sigma^2)) for "cosmap", else 1 (Esser et al. 2024, section 3.1).

    Raises:
        ValueError: no sigmas.
    """
    if sigmas is None:
        raise ValueError("sigmas: expected a tensor of noise levels, got None")
    if weighting_scheme == "sigma_sqrt":
        return (sigmas**-2.0).float()
    if weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)


def get_sigmas(scheduler: Any, timesteps: Tensor, n_dim: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sigmas of timesteps of a scheduler, (B, 1, ..., 1) with ``n_dim`` dimensions: what the training scripts of
    diffusers look up one by one, in one comparison on the device.

    Args:
        scheduler: with ``timesteps`` and ``sigmas``.
        timesteps: (B,), each one of the scheduler's; NaN is the sigma of any other.
        n_dim: dimensions of the result.
        dtype: of the result.
    """
    known = scheduler.timesteps.to(timesteps.device)
    same = timesteps.to(known.dtype)[:, None] == known
    levels = scheduler.sigmas[: len(known)].to(device=timesteps.device, dtype=dtype)
    found = torch.where(same.any(-1), levels[same.int().argmax(-1)], float("nan"))
    return found.reshape(-1, *(1,) * (n_dim - 1))


__all__ = ["compute_density_for_timestep_sampling", "compute_loss_weighting_for_sd3", "get_sigmas"]
