"""What a solve is asked for, and how any solver reaches its field; each kind of task is one variant of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmkernels.testing import Inputs

GUIDANCE_SCALE = 4.0
STAGES = {"midpoint": 2, "heun2": 2, "rk4": 4, "rk4_38": 4}  # network calls a step, where not 1


@dataclass(frozen=True)
class Task:
    """From 0 to 1 by ``steps`` equal steps, or by adaptive ones at ``tolerance`` (rtol = atol)."""

    method: str
    steps: int | None = None
    tolerance: float = 1e-5
    guided: bool = False

    def __str__(self) -> str:
        size = f"{self.tolerance:g}" if self.steps is None else str(self.steps)
        return f"{self.method}{' cfg' if self.guided else ''} {size}"

    @property
    def times(self) -> list[float]:
        assert self.steps is not None
        return [i / self.steps for i in range(self.steps + 1)]

    def steps_of(self, calls: int) -> int:
        """Steps taken, the rejected ones too; dopri5 has six calls a step and up to two before the first."""
        return calls // 6 if self.steps is None else self.steps


def velocity(inputs: Inputs, task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, t) -> velocity, guided in plain PyTorch where the task says so: both branches in one call."""
    model, label = inputs["model"], inputs["label"]
    if not task.guided:
        return lambda x, t: model(x, t, label)
    labels = torch.cat([label, torch.zeros_like(label)])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        v, plain = model(torch.cat([x, x]), t if t.dim() == 0 else torch.cat([t, t]), labels).chunk(2)
        return torch.lerp(plain, v, GUIDANCE_SCALE)

    return guided


class Kept:
    """What is built once for a model and used again, such as a solver with its buffers."""

    def __init__(self, build: Callable[[Any], Any]) -> None:
        self._build = build
        self._model: Any = None
        self._built: Any = None

    def __call__(self, model: Any) -> Any:
        if self._model is not model:
            self._model, self._built = model, self._build(model)
        return self._built
