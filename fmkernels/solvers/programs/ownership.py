"""Whose memory a tensor is: what a function returns, and what it was lent for one call.

A tensor that is kept has more references after the call, or its memory more tensors. Nothing of this is seen while
anyone traces or transforms operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import as_state
from ..._torch import storage_users

references_of = sys.getrefcount

# ---------------------------------------------------------------------- what a function returns


def _references_of_one_variable(make: Callable[[], object]) -> int:
    """What sys.getrefcount says of an object that a local variable alone refers to."""
    output = make()
    return references_of(output)


ALONE = _references_of_one_variable(object)


def owned(output: Tensor, references: int, sharers: int = 1, look: bool = True) -> Tensor:
    """A network's output, or a copy where anyone else may write to its memory.

    Args:
        references: what :func:`sys.getrefcount` says of the variable that took it from the call, and of nothing else
            that refers to it: not of an argument in the making.
        sharers: outputs that came with it, in the same memory.
        look: whether its owners can be seen; they cannot while anyone traces or transforms operations.
    """
    if look and references <= ALONE and type(output) is Tensor:
        storage = output.untyped_storage()
        # One reference more is the Python object that has just been made. Memory that no allocator of PyTorch's gave
        # (numpy's, another framework's) may always be somebody's.
        if storage_users(storage) == sharers + 1 and storage.resizable():
            return output
    # what autograd has recorded is nobody's buffer, unless it was written to
    if look and output.grad_fn is not None and output._version == 0:
        return output
    return output.clone()


def check_each(outputs: Sequence[Any], x: Tensor, name: str) -> None:
    """That outputs are like the state; refers to none of them afterwards."""
    for output in outputs:
        as_state(name, output, x)


def owned_each(outputs: Sequence[Tensor], look: bool = True) -> list[Tensor]:
    """:func:`owned` for several outputs of one call, which may lie in one memory."""
    if not look:
        return [output.clone() for output in outputs]
    starts = [output.untyped_storage().data_ptr() for output in outputs]
    kept = []
    for i, start in enumerate(starts):
        output = outputs[i]
        references = references_of(output) - 1  # the sequence has one
        kept.append(owned(output, references, starts.count(start)))
    return kept


# ---------------------------------------------------------------------- what a function was lent


class Owned(NamedTuple):
    """The memory of a tensor, and how many use it while nobody is lent it."""

    storage: torch.UntypedStorage
    users: int


def owned_memory(x: Tensor) -> Owned:
    storage = x.untyped_storage()
    return Owned(storage, storage_users(storage))


def is_kept(x: Tensor, references: int, memory: Owned) -> bool:
    """Whether a function that has returned keeps what it was lent, or made it ask for a gradient.

    Args:
        references: what :data:`references_of` said of the same variable before the call.
    """
    # here an argument refers to it too
    return references_of(x) - 1 != references or storage_users(memory[0]) != memory[1] or x.requires_grad
