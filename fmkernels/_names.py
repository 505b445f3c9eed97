"""Names that arguments take: one lookup, and one wording of errors, for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar, final

from ._checks import check_choice

T = TypeVar("T")


@final
class Names(Mapping[str, T], Generic[T]):
    """What an argument's names stand for, in their order.

    Args:
        argument: the argument, for errors.
        values: by name.
    """

    def __init__(self, argument: str, values: Mapping[str, T]) -> None:
        self._argument, self._values = argument, dict(values)

    def __getitem__(self, name: str) -> T:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def find(self, name: str) -> T:
        """The value of a name that a user gave.

        Raises:
            TypeError, ValueError: no name, or an unknown one; the message lists those that exist, and the nearest.
        """
        if not isinstance(name, str) or name not in self._values:
            check_choice(self._argument, name, self._values)
        return self._values[name]
