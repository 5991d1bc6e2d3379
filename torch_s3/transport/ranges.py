"""Byte ranges: how a read is cut into requests. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Iterator


def split(start: int, stop: int, *, part_size: int) -> Iterator[tuple[int, int]]:
    """Cut ``[start, stop)`` into half-open ranges of ``part_size`` bytes, the last one shorter where it doesn't divide.

    The cuts lie at multiples of ``part_size`` from ``start``, so that a read from a part's start asks for whole parts.

    Raises:
        ValueError: The range is reversed, or ``part_size`` isn't positive.
    """
    if not 0 <= start <= stop or part_size <= 0:
        raise ValueError(f"cannot cut [{start}, {stop}) into parts of {part_size} bytes")
    return ((at, min(at + part_size, stop)) for at in range(start, stop, part_size))
