"""The peers, where they are installed. Here their own path sampling, called as their documentation shows."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# (x_1, x_0, t) -> (x_t, the target of the loss)
Sample = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _torchcfm() -> Sample:
    matcher = importlib.import_module("torchcfm.conditional_flow_matching").ConditionalFlowMatcher(sigma=0.0)

    def sample(x_1: Tensor, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        _, x_t, u_t = matcher.sample_location_and_conditional_flow(x_0, x_1, t=t.to(x_1.dtype))
        return x_t, u_t

    return sample


def _flow_matching() -> Sample:
    path = importlib.import_module("flow_matching.path").CondOTProbPath()

    def sample(x_1: Tensor, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        point = path.sample(x_0=x_0, x_1=x_1, t=t.to(x_1.dtype))
        return point.x_t, point.dx_t

    return sample


@dataclass(frozen=True)
class Peer:
    name: str  # also the name of its distribution
    load: Callable[[], Any]  # what its family's ``peer`` is given


PEERS = (Peer("torchcfm", _torchcfm), Peer("flow_matching", _flow_matching))


@functools.cache
def load(peer: Peer) -> Any:
    """What it gives, or, as a string, why there is nothing."""
    try:
        return peer.load()
    except ImportError as error:
        return f"{peer.name} is not installed or lacks a dependency ({error})"
