"""Arguments as they were given, judged before any work is done. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np


def whole(name: str, value: Any, *, least: int | None = None) -> int:
    """A whole number, numpy's and 1e9 too.

    Raises:
        TypeError: It is none.
        ValueError: It is less than ``least``.
    """
    try:
        number = None if isinstance(value, (str, bytes)) else int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != value:
        raise TypeError(f"{name}={value!r:.200}: give a whole number")
    if least is not None and number < least:
        raise ValueError(f"{name}={number}: must be at least {least}")
    return number


def flag(name: str, value: Any) -> bool:
    """Yes or no.

    Raises:
        TypeError: It is neither, such as the string ``"False"``, which is true.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r:.200}: give True or False")
    return bool(value)
