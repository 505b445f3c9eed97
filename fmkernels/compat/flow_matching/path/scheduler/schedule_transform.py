"""A change of scheduler after training."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .....models.schedule_change import ScheduleChange
from ...utils import ModelWrapper
from .scheduler import Scheduler, path_of


class ScheduleTransformedModel(ModelWrapper):
    """A velocity model of one scheduler as one of another; see :class:`fmkernels.models.ScheduleChange`, by which it is
    finite at both ends, where flow_matching's is not.

    Args:
        velocity_model: called as velocity_model(x=x, t=t, **extras).
        original_scheduler: of its training; one of your own needs ``snr_inverse``.
        new_scheduler: the scheduler to sample along.
    """

    def __init__(self, velocity_model: Any, original_scheduler: Scheduler, new_scheduler: Scheduler) -> None:
        super().__init__(velocity_model)
        self.original_scheduler, self.new_scheduler = original_scheduler, new_scheduler

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        """The velocity along the new scheduler.

        Args:
            x: the state, (B, ...).
            t: times, () or (B,).
            extras: keyword arguments of the model.
        """

        def model(x: Tensor, t: Tensor) -> Tensor:
            return self.model(x=x, t=t, **extras)  # type: ignore[no-any-return]

        original, new = path_of(self.original_scheduler), path_of(self.new_scheduler)
        return ScheduleChange(model, original, new)(x, t)  # type: ignore[no-any-return]


__all__ = ["ScheduleTransformedModel"]
