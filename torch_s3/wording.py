"""What others say, and lists of any length, cut to what a message has room for. Pure."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice


def brief(said: object, most: int = 200) -> str:
    """The first line of what an error, say, says: at most so many characters of it."""
    return str(said).split("\n", maxsplit=1)[0][:most]


def listed(names: Collection[str], most: int, separator: str = ", ") -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(islice(names, most)) + more
