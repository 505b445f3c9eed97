"""Finished rows leave the batch: who they are, learned without waiting, and the smaller batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..._arguments import take_rows
from ...ops.step_control.op import Count
from .rows import Batch, Dense, own_copy


class Watch:
    """Statuses on the host, as they were when the copy was asked for: on a GPU nobody waits for them."""

    def __init__(self, delay: int) -> None:
        self._delay = delay
        self._pending: list[tuple[Tensor, Any]] = []

    def look(self, count: Tensor) -> Tensor | None:
        """Asks for a copy; returns the one asked for ``delay`` looks ago, if there is one."""
        status = count[Count.STATUS]
        if not status.is_cuda:
            return status
        copy = torch.empty(status.shape, dtype=status.dtype, device="cpu", pin_memory=True)
        copy.copy_(status, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(status.device))  # where the copy runs, whatever the current device is
        self._pending.append((copy, event))
        if len(self._pending) <= self._delay:
            return None
        copy, event = self._pending.pop(0)
        event.synchronize()
        return copy

    def forget(self) -> None:
        self._pending.clear()


def gather(batch: Batch, keep: Tensor, places: Tensor, kwargs: Mapping[str, Any]) -> Batch:
    """The rows ``keep`` as a batch of their own; ``places`` are their rows in the results."""
    dense = batch.dense
    if dense is not None:
        wanted = dense.wanted
        one_for_all = wanted.stride(0) == 0
        wanted = wanted[:1].expand(keep.shape[0], -1) if one_for_all else wanted.index_select(0, keep)
        dense = Dense(wanted, places, dense.out)
    return Batch(
        own_copy(batch.y.index_select(0, keep)),
        batch.clock.index_select(1, keep),
        batch.count.index_select(1, keep),
        kwargs,
        dense,
    )


def select_rows(kwargs: Mapping[str, Any], follow: Collection[str], keep: Tensor, size: int) -> dict[str, Any]:
    """Arguments of which those named have an entry for each of ``size`` samples, for the samples kept."""
    return {name: take_rows(value, keep, size) if name in follow else value for name, value in kwargs.items()}
