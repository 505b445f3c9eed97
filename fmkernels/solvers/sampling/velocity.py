"""The guided velocity as a function of tensors, as adaptive solvers call it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from ...paths import Path
from ..programs.captures import held
from ..programs.plans import settings_key

Model = Callable[..., Tensor]
# Network evaluations a velocity, by model and settings: a replayed graph counts none.
_BRANCHES: weakref.WeakKeyDictionary[Any, dict[Any, float]] = weakref.WeakKeyDictionary()


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

    @property
    def key(self) -> Any:
        """What sets it apart from others of the same model."""
        return held(self.guidance), settings_key(self.path, self.prediction, self.guidance)

    @property
    def branches(self) -> float:
        """Network evaluations a velocity: more than 1 with guidance."""
        if self.guidance is None:
            return 1.0
        try:
            known = _BRANCHES.setdefault(self.model, {})
        except TypeError:  # no weak references or no hash
            known = {}
        if self._velocities:
            known[self.key] = self.evaluations / self._velocities
        return known.get(self.key, 1.0)
