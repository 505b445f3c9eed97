"""flow_matching's schedulers, and the change from one to another."""

from . import scheduler
from .schedule_transform import ScheduleTransformedModel
from .scheduler import *  # noqa: F403

__all__ = [*scheduler.__all__, "ScheduleTransformedModel"]
