"""The guided velocity as a function of tensors, as adaptive solvers call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, final

from torch import Tensor

from ..._keys import NoKey
from ...paths import Path
from ..adaptive.step_graph import StepGraph
from ..programs.captures import held_object

Model = Callable[..., Tensor]


@final
class Velocity:
    """(t, x, **model_kwargs) to the velocity of a model, a guidance and a prediction.

    Attributes:
        evaluations: of the network for each row of x so far, the branches of guidance counted each.
    """

    name_in_errors = "model"

    def __init__(self, model: Model, guidance: Any, path: Path, prediction: str) -> None:
        self.model, self.guidance, self.path, self.prediction = model, guidance, path, prediction
        self._velocities, self.evaluations = 0, 0.0

    def __call__(self, t: Tensor, x: Tensor, **model_kwargs: Any) -> Tensor:
        self._velocities += 1
        if self.guidance is None:
            self.evaluations += 1
            v = self.model(x, t, **model_kwargs)
            return v if self.prediction == "velocity" else self.path.convert(v, x, t, self.prediction, "velocity")

        def counted(rows: Tensor, times: Tensor, **kwargs: Any) -> Tensor:
            self.evaluations += rows.shape[0] / x.shape[0]
            return self.model(rows, times, **kwargs)

        return self.guidance.at(counted, model_kwargs, self.path, self.prediction)(x, t)

    def graph(self, mode: bool | Literal["auto"]) -> StepGraph:
        """Asks for captured steps of this velocity."""
        owners: list[Any] = []
        try:
            # without guidance a velocity needs no path
            path = None if self.guidance is None and self.prediction == "velocity" else held_object(self.path, owners)
            key = path, self.prediction, held_object(self.guidance, owners)
        except NoKey as error:
            return StepGraph(self.model, None, mode, refusal=str(error))
        return StepGraph(self.model, key, mode, owners)

    @property
    def branches(self) -> float:
        """Network evaluations a velocity: more than 1 with guidance."""
        return self.evaluations / self._velocities if self._velocities else 1.0
