"""Models of one kind as models of another: trained along one schedule and sampled along another, diffusion as flow."""

from .denoisers import Denoiser, FromDenoiser
from .schedule_change import ScheduleChange
from .timesteps import Diffusion, TimestepModel, TimestepPredictor, from_diffusers

__all__ = [
    "Denoiser",
    "Diffusion",
    "FromDenoiser",
    "ScheduleChange",
    "TimestepModel",
    "TimestepPredictor",
    "from_diffusers",
]
