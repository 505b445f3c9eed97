"""What a solve returns beside its samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor


@final
@dataclass(frozen=True)
class SampleResult:
    """What a solve tells besides its samples.

    Args:
        nfe: network evaluations a sample, the branches of guidance counted each; of an adaptive solve the calls made.
        steps: steps taken: an int, or of an adaptive solve an int tensor (B,) of accepted and rejected ones.
        status: int tensor (B,) of :class:`fmkernels.Status`; None for a fixed grid, which cannot fail.
        times: the times of ``trajectory``, or of the grid.
        trajectory: (T, B, ...) states, if asked for.
        log_prob: log-probability of each step of an SDE, if asked for: (steps, B), or (steps, B, ...) of each element.
        log_prob_count: int64 (steps, B), degrees of freedom of the steps' noise: how many elements got some. Sums
            divided by it are means.
        compaction: of an adaptive solve: "on" where finished samples leave the batch, or "off: " and why not; None for
            a fixed grid.
        graph: how the solve ran: "eager", "captured", "replayed", or "eager: " and why no graph was used.
    """

    nfe: int
    steps: int | Tensor
    status: Tensor | None = None
    times: Tensor | None = None
    trajectory: Tensor | None = None
    log_prob: Tensor | None = None
    log_prob_count: Tensor | None = None
    graph: str = "eager"
    compaction: str | None = None
