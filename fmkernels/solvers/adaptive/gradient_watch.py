"""Whether a solve needs a gradient, where nothing tells before: seen from the outputs of its function on the way.

A function may use what needs a gradient at some times only. So a solve that records nothing looks at each output; the
first one with a gradient ends it, and it is done again in the way that gives gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor

Field = Callable[..., Tensor]


@final
class FoundGradient(Exception):
    """An output has a gradient in a solve that records none."""


def watched(field: Field) -> Field:
    """A field whose first output with a gradient raises :class:`FoundGradient`; to be called with gradients enabled."""

    def watch(t: Tensor, y: Tensor) -> Tensor:
        k = field(t, y)
        if isinstance(k, Tensor) and k.requires_grad:
            raise FoundGradient
        return k

    return watch
