"""Models of one kind as models of another: trained along one schedule and sampled along another, diffusion as flow."""

from .schedule_change import ScheduleChange

__all__ = ["ScheduleChange"]
