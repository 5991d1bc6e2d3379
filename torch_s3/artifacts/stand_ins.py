"""What stands for containers and names while a pickle is followed. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ENTRIES = 10_000  # of a dict that are looked at


class Refused(Exception):
    """Why a pickle is not followed to its end."""


@dataclass(frozen=True, slots=True)
class Name:
    """A function or type that a pickle asks for.

    Attributes:
        module: As it gives it.
        name: As it gives it.
        full: Both, in Python 3's words.
    """

    module: str
    name: str
    full: str


class List:
    """A list or set.

    Attributes:
        count: Of its items.
        nested: Those of them that are lists or tuples.
    """

    __slots__ = ("count", "nested")

    def __init__(self) -> None:
        self.count = 0
        self.nested: list[Any] = []

    def add(self, items: list[Any]) -> None:
        """Put in items."""
        self.count += len(items)
        self.nested += [item for item in items if isinstance(item, tuple | List)]


class Dict:
    """A dict, of which the first entries whose keys are strings are known."""

    __slots__ = ("count", "entries", "is_fixed", "whole")

    def __init__(self) -> None:
        self.count = 0
        self.entries: dict[str, Any] = {}
        self.whole = True
        self.is_fixed = False

    def add(self, items: list[Any]) -> None:
        """Put in keys and values, in turn.

        Raises:
            Refused: It is a dtype's, which was judged by what it had.
        """
        if self.is_fixed:
            raise Refused("it changes the fields of a dtype that is made")
        self.count += len(items) // 2
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str and (len(self.entries) < _ENTRIES or key in self.entries):
                self.entries[key] = value
            else:
                self.whole = False


def size(value: Any) -> int:
    """About how many bytes a copy of a value takes, without what is in it."""
    if isinstance(value, memoryview):
        return value.nbytes
    if isinstance(value, List | Dict):
        return 8 * value.count
    if isinstance(value, str):
        return 4 * len(value)
    return 8 * len(value) if isinstance(value, tuple) else 0
