"""Whose memory a tensor is: what a function returns, and what it was lent for one call.

A tensor that is kept has more references after the call, or its memory more tensors. Nothing of this is seen while
anyone traces or transforms operations.

A tensor that was written to has another version after the call. Inference tensors have no versions, so that states are
made as ordinary tensors under torch.inference_mode too, and a function is given a copy of one that is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import as_state
from ..._torch import compiling, plain_beneath, storage_users, transform_active, version_of

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


def owned_state(name: str, output: Any, x: Tensor, references: int, look: bool = True) -> Tensor:
    """:func:`owned` of an output that is checked to be like the state x, in its dtype."""
    state = as_state(name, output, x)
    return owned(state, references, 1, look) if state is output else state


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


class OwnTimes(Sequence[Tensor]):
    """Times of which each call has its own."""

    def __init__(self, times: Sequence[Tensor]) -> None:
        self._times = times

    def __getitem__(self, index: Any) -> Any:
        return self._times[index].clone()

    def __len__(self) -> int:
        return len(self._times)


# ---------------------------------------------------------------------- what a function may not write to


def ordinary_memory() -> AbstractContextManager[Any]:
    """Within it a solver makes the memory that it lends: ordinary tensors, in inference mode too. Nothing is computed
    in it, as it may be recorded."""
    if compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


def ordinary_copy(x: Tensor) -> Tensor:
    """A copy to lend; in inference mode without a gradient."""
    if compiling() or not (torch.is_inference_mode_enabled() or x.is_inference()):
        return x.clone()
    with torch.inference_mode(False):
        memory = torch.empty_like(x)
    with torch.no_grad():
        return memory.copy_(x)


def wrote_to_input(name: str) -> ValueError:
    return ValueError(
        f"{name}: expected a function that leaves its input as it is, but it wrote to it (an in-place operation); "
        "clone the input first"
    )


def reading(
    name: str, function: Callable[..., Any], kwargs: Mapping[str, Any] | None = None, *, time_first: bool = False
) -> Callable[[Tensor, Tensor], Any]:
    """The call (x, t) of a user's function of a state, in which writing to the state is an error.

    All solvers call through this: functions (x, t, **kwargs), or with ``time_first`` (t, x). A version is compared
    before and after each call; torch.compile sees the function alone.

    Args:
        name: the caller's argument, in the error.

    Raises:
        ValueError: in the call; the function has written to x.
    """
    if transform_active():
        return _reading_within(name, function, kwargs or {}, time_first)

    def read(x: Tensor, t: Tensor) -> Any:
        if compiling():
            return function(t, x) if time_first else function(x, t, **(kwargs or {}))
        try:
            version = x._version
        except RuntimeError:
            x = ordinary_copy(x)
            version = x._version
        output = function(t, x) if time_first else function(x, t, **kwargs) if kwargs else function(x, t)
        if x._version != version:
            raise wrote_to_input(name)
        return output

    return read


def _reading_within(
    name: str, function: Callable[..., Any], kwargs: Mapping[str, Any], time_first: bool
) -> Callable[[Tensor, Tensor], Any]:
    """The same within transforms, of which some hide what is written to the tensor beneath."""

    def read(x: Tensor, t: Tensor) -> Any:
        seen = [] if compiling() else [x, plain_beneath(x)]
        versions = [version_of(tensor) for tensor in seen]
        output = function(t, x) if time_first else function(x, t, **kwargs)
        if [version_of(tensor) for tensor in seen] != versions:
            raise wrote_to_input(name)
        return output

    return read
