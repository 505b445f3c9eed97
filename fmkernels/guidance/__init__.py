"""Guidance of samplers: rules that make one velocity from several network outputs.

Linear rules are coefficients in the solver's updates and cost no launch; the others cost a row reduction and a
combination. All are handed to :func:`fmkernels.sample` as ``guidance=``. A rule of one's own is a subclass of
:class:`Guidance` that names its network calls (``branches``) and writes its velocity down in a builder (``velocity``).
"""

from .base import Guidance
from .cfg import APG, CFG, CFGPlusPlus, RectifiedCFGPlusPlus
from .linear import AutoGuidance, ClassifierGuidance, MultiCondition, scale_of_weight, weight_of_scale

__all__ = [
    "APG",
    "CFG",
    "AutoGuidance",
    "CFGPlusPlus",
    "ClassifierGuidance",
    "Guidance",
    "MultiCondition",
    "RectifiedCFGPlusPlus",
    "scale_of_weight",
    "weight_of_scale",
]
