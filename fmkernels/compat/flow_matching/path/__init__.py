"""Probability paths x_t = alpha_t x_1 + sigma_t x_0 with flow_matching's names."""

from .affine import AffineProbPath, CondOTProbPath
from .path import ProbPath
from .path_sample import PathSample

__all__ = ["AffineProbPath", "CondOTProbPath", "PathSample", "ProbPath"]
