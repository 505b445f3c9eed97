"""torchcfm's matchers and plans (Tong et al. 2023), https://github.com/atong01/conditional-flow-matching."""

from . import conditional_flow_matching
from .conditional_flow_matching import *  # noqa: F403 (as torchcfm's own)

__all__ = list(conditional_flow_matching.__all__)
