"""Whether a drop-in gives its peer's numbers to the last bit, or the fused kernels'."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .._checks import check_bool

VARIABLE = "FMKERNELS_COMPAT_STRICT"
_within: ContextVar[bool | None] = ContextVar("strict", default=None)
_WORDS = {"1": True, "true": True, "0": False, "false": False}


def is_strict(own: bool | None = None) -> bool:
    """What rules: an object's ``own`` setting, else that of the nearest :func:`strict` block, else that of the
    environment variable ``FMKERNELS_COMPAT_STRICT`` (0 or 1), else True.

    Raises:
        ValueError: the environment variable is something else.
    """
    if own is not None:
        return own
    if (within := _within.get()) is not None:
        return within
    word = os.environ.get(VARIABLE, "1").strip().lower()
    if word not in _WORDS:
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {word!r}")
    return _WORDS[word]


@contextmanager
def strict(value: bool = True) -> Iterator[None]:
    """Within the block (of this thread or task), drop-ins give their peer's numbers to the last bit (True), noise
    drawn by PyTorch in the peer's order included; or (False) draw noise in the fused kernels, faster and as random.

    Args:
        value: True or False. An object that was made with a ``strict`` of its own keeps it.
    """
    check_bool("value", value)
    token = _within.set(value)
    try:
        yield
    finally:
        _within.reset(token)
