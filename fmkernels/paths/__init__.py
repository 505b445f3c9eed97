"""Probability paths between a source (t = 0) and data (t = 1)."""

from .affine import VE, VP, CondOT, Cosine, LinearVP, OptimalTransport, Polynomial
from .batch import Batch
from .bridges import ConstantBridge, SchrodingerBridge
from .discrete import DiscreteVP
from .path import Path
from .schedule import Coefficients, Schedule
from .targets import TARGETS, convert

__all__ = [
    "TARGETS",
    "VE",
    "VP",
    "Batch",
    "Coefficients",
    "CondOT",
    "ConstantBridge",
    "Cosine",
    "DiscreteVP",
    "LinearVP",
    "OptimalTransport",
    "Path",
    "Polynomial",
    "Schedule",
    "SchrodingerBridge",
    "convert",
]
