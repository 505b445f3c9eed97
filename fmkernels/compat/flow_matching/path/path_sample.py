"""What a path returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class PathSample:
    """A sample of a path.

    Attributes:
        x_1, x_0: target and source, (B, ...).
        t: times, (B,).
        x_t: the point, (B, ...).
        dx_t: its velocity given x_0 and x_1, (B, ...).
    """

    x_1: Tensor = field(metadata={"help": "target samples X_1 (batch_size, ...)."})
    x_0: Tensor = field(metadata={"help": "source samples X_0 (batch_size, ...)."})
    t: Tensor = field(metadata={"help": "time samples t (batch_size, ...)."})
    x_t: Tensor = field(metadata={"help": "samples x_t ~ p_t(X_t), shape (batch_size, ...)."})
    dx_t: Tensor = field(metadata={"help": "conditional target dX_t, shape: (batch_size, ...)."})


__all__ = ["PathSample"]
