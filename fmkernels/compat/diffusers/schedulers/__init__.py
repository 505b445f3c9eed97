"""Schedulers that pipelines take in the place of diffusers' own."""

from .scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

__all__ = ["FlowMatchEulerDiscreteScheduler"]
