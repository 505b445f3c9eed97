"""Shapes and gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def unsqueeze_to_match(source: Tensor, target: Tensor, how: str = "suffix") -> Tensor:
    """The source with dimensions of size 1 after its own ("suffix") or before them ("prefix"), as many as the target's.

    Raises:
        AssertionError: another ``how``, or a source of more dimensions.
    """
    if how not in ("prefix", "suffix"):
        raise AssertionError(f"how: expected 'prefix' or 'suffix', got {how!r}")
    missing = target.dim() - source.dim()
    if missing < 0:
        raise AssertionError(f"source: expected at most {target.dim()} dimensions, got shape {tuple(source.shape)}")
    ones = (1,) * missing
    return source.reshape(*source.shape, *ones) if how == "suffix" else source.reshape(*ones, *source.shape)


def expand_tensor_like(input_tensor: Tensor, expand_to: Tensor) -> Tensor:
    """A number for each sample, (B,), as a tensor of a batch's shape (B, ...), without a copy.

    Raises:
        AssertionError: it is not (B,).
    """
    if input_tensor.dim() != 1:
        raise AssertionError(f"input_tensor: expected shape (batch_size,), got {tuple(input_tensor.shape)}")
    if input_tensor.shape[0] != expand_to.shape[0]:
        raise AssertionError(
            f"input_tensor: expected {expand_to.shape[0]} numbers as expand_to has samples, got {input_tensor.shape[0]}"
        )
    return unsqueeze_to_match(input_tensor, expand_to).expand_as(expand_to)


def gradient(output: Tensor, x: Tensor, grad_outputs: Tensor | None = None, create_graph: bool = False) -> Tensor:
    """The gradient in x of the sum of output times grad_outputs (ones if None).

    Args:
        output: computed from x with a graph.
        x: a tensor that requires a gradient.
        grad_outputs: of output's shape.
        create_graph: whether the gradient can be differentiated.
    """
    if grad_outputs is None:
        grad_outputs = torch.ones_like(output).detach()
    return torch.autograd.grad(output, x, grad_outputs, create_graph=create_graph)[0]


__all__ = ["expand_tensor_like", "gradient", "unsqueeze_to_match"]
