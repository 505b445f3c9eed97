"""diffusers' flow scheduler and training helpers on the fused kernels; diffusers itself must be installed.

Here sigma = 1 is noise and timesteps descend: sigma = 1 - t, and the model predicts noise - data, minus our velocity.
"""

from .schedulers import FlowMatchEulerDiscreteScheduler

__all__ = ["FlowMatchEulerDiscreteScheduler"]
