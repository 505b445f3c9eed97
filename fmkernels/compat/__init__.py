"""The peers' names over fmkernels' kernels: change an import, keep the script.

``from torchcfm.conditional_flow_matching import X`` becomes ``from fmkernels.compat.torchcfm.conditional_flow_matching
import X``, and so for each peer; :func:`patch` does it for a running process. Nothing happens at import.
"""

from ._patch import Patch, patch
from ._strict import is_strict, strict

__all__ = ["Patch", "is_strict", "patch", "strict"]
