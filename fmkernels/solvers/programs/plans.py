"""Programs kept for the next solve with the same settings."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..._cache import Cache, numbers_only
from ..._keys import NoKey, key_of
from ...paths import Path
from .program import Program

_PLANS: Cache[Program] = Cache("plan")


def planned(key: Hashable | None, make: Callable[[], Program]) -> Program:
    """The program of a key and of PyTorch's default dtype, which users' functions of t may read: made at its first use.

    With None it is made at each.
    """
    if key is None:
        return make()

    def pure() -> Program:
        with numbers_only():
            return make()

    return _PLANS.get((torch.get_default_dtype(), key), pure)


def settings_key(path: Path, prediction: str, guidance: Any) -> Hashable:
    """What programs depend on beside method and grid.

    Raises:
        NoKey: that cannot be told; a path or guidance of a class of one's own.
    """
    return key_of(path), prediction, guidance_key(guidance)


def guidance_key(guidance: Any) -> Hashable:
    """What the expressions of a guidance depend on: its ``plan_key``."""
    if guidance is None:
        return None
    key = getattr(guidance, "plan_key", None)
    if key is None:
        raise NoKey
    return type(guidance), key


def method_key(method: Any) -> Hashable:
    """A method by its name, or by its class and all that it holds."""
    return method if isinstance(method, str) else key_of(method)
