"""flow_matching's helpers."""

from .categorical_sampler import categorical
from .model_wrapper import ModelWrapper
from .utils import expand_tensor_like, gradient, unsqueeze_to_match

__all__ = ["ModelWrapper", "categorical", "expand_tensor_like", "gradient", "unsqueeze_to_match"]
