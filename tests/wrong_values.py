"""How tables of wrong arguments are gone through."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

# name: (function, arguments that are right, {argument: kinds of values that are right too})
Calls = dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, list[str]]]]
# What may follow a name: the entry, the call or the attribute that is wrong.
_PART = r"(\.seed|\(\w*\)|\[[^]]*\])?"


def cases(calls: Calls) -> list[tuple[str, str]]:
    return [(name, argument) for name, (_, _, arguments) in calls.items() for argument in arguments]


def check_answer(call: Callable[[], Any], names: Iterable[str], kind: str, accepted: bool) -> None:
    """A value of a kind is accepted, or told by one of the names with what was expected."""
    answer = None
    try:
        call()
    except (TypeError, ValueError) as error:
        answer = str(error)
    if accepted:
        assert answer is None, (kind, answer)
        return
    assert answer is not None, f"{kind} is accepted"
    named = "|".join(map(re.escape, names))
    assert re.match(rf"({named}){_PART}: expected ", answer), (kind, answer)
    assert len(answer) < 2000, (kind, len(answer))
