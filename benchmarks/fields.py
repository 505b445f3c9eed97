"""Velocity fields to sample from, and a recorder of the calls that a solver makes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Field = Callable[..., Tensor]  # (x, t, label) -> velocity; t has shape () or (B,), label (B,)
_RECORDED_BYTES = 8 << 20  # of one shape: beyond, calls share tensors, which then stay in the cache as in a solve


def _column(t: Tensor, x: Tensor) -> Tensor:
    """t of shape () or (B,) as (B, 1)."""
    return t.to(x.dtype).reshape(-1, 1).expand(x.shape[0], 1)


class Network(nn.Module):
    """2-64-64-2 with SiLU; time and label enter beside the state.

    Its weights are drawn, and enlarged so that an adaptive solver takes as many steps as for a trained flow.
    """

    def __init__(self, seed: int = 0, gain: float = 3.0) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 2)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.first, self.second, self.last):
                layer.weight.normal_(0.0, gain / math.sqrt(layer.in_features), generator=rng)
                layer.bias.normal_(0.0, 0.5, generator=rng)
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        h = torch.cat([x, _column(t, x), label[:, None]], 1)
        return self.last(F.silu(self.second(F.silu(self.first(h)))))

    def negated(self) -> Network:
        """The same field with the other sign, at the same cost: for libraries whose time runs the other way. All
        fields have it."""
        other = copy.deepcopy(self)
        other.last.weight.neg_()
        other.last.bias.neg_()
        return other


class Pixels(nn.Module):
    """sin(x + 3 t + label) of each pixel: as cheap as a field gets."""

    def __init__(self, phase: float = 0.0) -> None:
        super().__init__()
        self.phase = phase

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        shift = 3.0 * _column(t, x) + (label[:, None] + self.phase)
        return torch.sin(x + shift.reshape(-1, *[1] * (x.dim() - 1)))

    def negated(self) -> Pixels:
        return Pixels(self.phase + math.pi)


class Mixture(nn.Module):
    """The velocity of x_t = t x_1 + (1 - t) x_0 in closed form: x_1 from a mixture of Gaussians on a circle."""

    centers: Tensor
    pulls: Tensor  # the centers, with the field's sign

    def __init__(self, modes: int = 8, radius: float = 2.0, std: float = 0.2) -> None:
        super().__init__()
        angles = torch.arange(modes, dtype=torch.float64) * (2.0 * math.pi / modes)
        self.register_buffer("centers", radius * torch.stack([angles.cos(), angles.sin()], 1))
        self.register_buffer("pulls", self.centers.clone())
        self.std, self.sign = std, 1.0

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        t, centers = _column(t, x), self.centers.to(x)
        variance = (self.std * t) ** 2 + (1.0 - t) ** 2
        off = x[:, None] - t[..., None] * centers
        weights = torch.softmax(off.square().sum(-1) / (-2.0 * variance), dim=1)
        slope = ((self.sign * (self.std**2 + 1.0)) * t - self.sign) / variance
        return (weights[..., None] * (self.pulls.to(x) + slope[..., None] * off)).sum(1)

    def negated(self) -> Mixture:
        other = copy.deepcopy(self)
        other.pulls.neg_()
        other.sign = -self.sign
        return other


class Recorder:
    """A field that remembers its calls."""

    def __init__(self, field: Any, calls: list[tuple[Any, ...]] | None = None) -> None:
        self.field = field
        self.calls: list[tuple[Any, ...]] = [] if calls is None else calls
        self._kept: dict[Any, list[tuple[Any, ...]]] = {}

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        arguments = (x, t, label)
        kept = self._kept.setdefault(tuple((a.shape, a.stride()) for a in arguments), [])
        if not kept or sum(a.nbytes for a in arguments) * len(kept) < _RECORDED_BYTES:
            kept.append((self.field, *(a.clone() for a in arguments)))
            self.calls.append(kept[-1])
        else:
            self.calls.append(kept[len(self.calls) % len(kept)])
        return cast(Tensor, self.field(*arguments))

    def rows_per(self, samples: int) -> float:
        """Evaluations of a sample: a call on twice as many rows counts twice."""
        return sum(x.shape[0] for _, x, *_ in self.calls) / samples

    def negated(self) -> Recorder:
        return Recorder(self.field.negated(), self.calls)

    def replay(self, _: Any = None) -> None:
        """The calls alone. Each result goes when the next one comes, as in a solve."""
        with torch.no_grad():
            for field, x, t, label in self.calls:
                field(x, t, label)
