"""The diffusion of a table: what models with discrete timesteps were trained along."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from .._cache import Cache, is_plain_context, ordinary_tensors
from .._checks import describe, type_error, value_error
from .affine import VariancePreserving
from .schedule import promoted

# By the digest of the numbers, dtype and device.
_TABLES: Cache[Tensor] = Cache("schedule table")


@final
class DiscreteVP(VariancePreserving):
    r"""The variance-preserving diffusion of a table :math:`\bar\alpha_k` of K timesteps (Ho et al. 2020, eq. 4;
    diffusers' ``alphas_cumprod``): timestep k is at t = 1 - (k + 1) / K, so that t = 0 is the last one, K - 1, and t =
    1 the data without noise, one step before timestep 0. Between timesteps, and from timestep 0 to the data, :math:`T =
    -\log \bar\alpha` is linear in t: the noise schedule beta is constant there.

    Args:
        alphas_cumprod: K numbers in (0, 1), strictly decreasing: a sequence, an array or a tensor.

    Raises:
        TypeError, ValueError: they are not.
    """

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor | Any) -> None:
        try:
            given = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").detach().tolist()
        except (TypeError, ValueError, RuntimeError):
            raise type_error("alphas_cumprod", "a sequence or tensor of numbers", alphas_cumprod) from None
        if not isinstance(given, list) or not given or not all(isinstance(value, float) for value in given):
            raise value_error("alphas_cumprod", "numbers of shape (K,), K >= 1", alphas_cumprod)
        ends = [1.0, *given]
        if not all(0.0 < b < a for a, b in zip(ends, given, strict=False)):
            raise ValueError(
                "alphas_cumprod: expected strictly decreasing numbers in (0, 1), got "
                + (f"{describe(alphas_cumprod)}" if len(given) < 5 else f"{given[:2]} ... {given[-2:]}")
            )
        self.alphas_cumprod = tuple(given)
        # T at t = 1 - i / K, of which the derivatives in i / K are slopes
        self._totals = (0.0, *(-math.log(value) for value in given))
        self._digest = hashlib.sha256(struct.pack(f"{len(given)}d", *given)).hexdigest()

    def timesteps(self, t: Tensor) -> Tensor:
        """The timesteps k = (1 - t) K - 1 of times t, from 0 to K - 1, with their fractions, in t's dtype (float32 at
        least)."""
        t = promoted("t", t)
        count = len(self.alphas_cumprod)
        return ((1.0 - t) * count - 1.0).clamp(0.0, count - 1.0)

    def integral(self, t: Tensor) -> Tensor:
        place, low, high = self._around(t)
        return low + place * (high - low)

    def d_integral(self, t: Tensor) -> Tensor:
        _, low, high = self._around(t)
        return (low - high) * len(self.alphas_cumprod)

    def _around(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far a time is from an entry of the table to the next, and T at both."""
        position = (1.0 - t) * len(self.alphas_cumprod)
        index = position.detach().floor().clamp(0, len(self.alphas_cumprod) - 1).long()
        table = self._table(t)
        return position - index, table[index], table[index + 1]

    def _table(self, t: Tensor) -> Tensor:
        """T at t = 1 - i / K for i = 0 ... K, on the device of t."""

        def make() -> Tensor:
            return torch.tensor(self._totals, dtype=t.dtype, device="cpu").to(t.device)

        if not is_plain_context():
            return make()
        with ordinary_tensors():
            return _TABLES.get((self._digest, t.dtype, str(t.device)), make)

    def log_snr_inverse(self, log_snr: Tensor | float) -> Tensor:
        # T = log(1 + e^-log_snr), found in the table
        total = torch.nn.functional.softplus(-promoted("log_snr", log_snr))
        table = self._table(total)
        total = total.clamp(max=self._totals[-1])
        index = (torch.searchsorted(table, total, right=True) - 1).clamp(0, len(self.alphas_cumprod) - 1)
        low, high = table[index], table[index + 1]
        return 1.0 - (index + (total - low) / (high - low)) / len(self.alphas_cumprod)

    def _arguments(self) -> dict[str, Any]:
        return {"alphas_cumprod": self.alphas_cumprod}
