"""The operator library ``torch.ops.fmkernels``: schemas are defined in each operation's op.py."""

import torch

LIBRARY = torch.library.Library("fmkernels", "DEF")


def sum_trailing(tensor: torch.Tensor, kept: int) -> torch.Tensor:
    """The sum over all but the first ``kept`` dimensions."""
    return tensor.sum(dim=tuple(range(kept, tensor.dim()))) if kept < tensor.dim() else tensor
