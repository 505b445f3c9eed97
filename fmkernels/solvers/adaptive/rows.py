"""The rows of an adaptive solve: the problem, the batch with its control, the outputs asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..._checks import describe
from ...ops.step_control.op import Clock, Rules
from ..methods.tableaus import Tableau
from ..programs.ownership import ordinary_memory

Field = Callable[..., Tensor]
Norm = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Problem:
    """What stays when samples come and go.

    Attributes:
        func: func(t, y, **kwargs).
        tableau: in its adaptive form.
        shared: one row of control for the whole batch.
        scalar_time: func takes t of shape ().
        norm: of the tensor of error ratios; None for the root mean square of each row.
        lends: func, which takes t and y alone, may keep them: what it keeps is not written again.
    """

    func: Field
    tableau: Tableau
    rules: Rules
    atol: float | Tensor
    rtol: float | Tensor
    shared: bool
    scalar_time: bool
    time_dtype: torch.dtype
    norm: Norm | None = None
    impl: str = "auto"
    lends: bool = False

    @property
    def name(self) -> str:
        """What errors call func."""
        return getattr(self.func, "name_in_errors", "func")

    @property
    def slow_norm(self) -> bool:
        """Whether the error norm is formed by single operations."""
        return self.norm is not None or isinstance(self.atol, Tensor) or isinstance(self.rtol, Tensor)


def _let_go(*_: Any) -> Tensor:
    raise AssertionError("a kept stepper was run without its function")


def without_function(problem: Problem) -> Problem:
    """The problem for a stepper that is kept: its function, and the model in it, are not."""
    return replace(problem, func=_let_go)


class Dense(NamedTuple):
    """States at requested times.

    Attributes:
        wanted: float64 (R, T); one row of it may stand for all.
        ids: int64 (R,), each row's place in ``out``; None where it is its own.
        out: (T, B, ...).
    """

    wanted: Tensor
    ids: Tensor | None
    out: Tensor


@final
@dataclass(eq=False)
class Batch:
    """Samples on their way.

    Attributes:
        y: states; only ever written here.
        clock, count: the state of the control, a column a row.
        kwargs: of func.
        k0: the derivative at y, set by :func:`begin`.
        dense: where states at requested times go.
    """

    y: Tensor
    clock: Tensor
    count: Tensor
    kwargs: Mapping[str, Any]
    dense: Dense | None = None
    k0: Tensor | None = field(default=None)

    @property
    def rows(self) -> int:
        return self.clock.shape[1]

    @property
    def time(self) -> Tensor:
        """(R,) float64, the times reached."""
        return self.clock[Clock.T]

    @property
    def next_size(self) -> Tensor:
        """(R,) float64, the signed sizes of the next steps; 0 for a finished row."""
        return self.clock[Clock.H]


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A copy of the host's on a device; the host does not wait for a GPU."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def row_norm(problem: Problem, ratio: Tensor) -> Tensor:
    """(R,) error norms of a tensor of error ratios."""
    rows = 1 if problem.shared else ratio.shape[0]
    if problem.norm is not None:
        norm = problem.norm(ratio)
        expected = () if problem.shared else (rows,)
        if not isinstance(norm, Tensor) or norm.shape != expected:
            raise ValueError(f"norm: expected to return a tensor of shape {expected}, got {describe(norm)}")
        return norm.reshape(rows).abs()
    return root_mean_square(ratio, rows)


def root_mean_square(ratio: Tensor, rows: int) -> Tensor:
    """(R,) of each row."""
    return ratio.reshape(rows, -1).square().mean(1).sqrt()


def own_copy(y: Tensor) -> Tensor:
    """A copy in dense memory whose rows are dense too, to be lent."""
    layout = torch.contiguous_format
    for dims, candidate in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if y.dim() == dims and not y.is_contiguous() and y.is_contiguous(memory_format=candidate):
            layout = candidate
    with ordinary_memory():
        copy = torch.empty_like(y, memory_format=layout)
    return copy.copy_(y)
