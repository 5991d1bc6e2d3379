"""Byte ranges: how reads are cut into requests, and merged. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """One request's bytes.

    Attributes:
        start: The first.
        stop: One past the last.
        members: Which of the ranges lie in it, by their places in what was given, in the order of their starts.
    """

    start: int
    stop: int
    members: list[int]


def split(start: int, stop: int, *, part_size: int) -> Iterator[tuple[int, int]]:
    """Cut ``[start, stop)`` into half-open ranges of ``part_size`` bytes, the last one shorter where it doesn't divide.

    The cuts lie at multiples of ``part_size`` from ``start``, so that a read from a part's start asks for whole parts.

    Raises:
        ValueError: The range is reversed, or ``part_size`` isn't positive.
    """
    if not 0 <= start <= stop or part_size <= 0:
        raise ValueError(f"cannot cut [{start}, {stop}) into parts of {part_size} bytes")
    return ((at, min(at + part_size, stop)) for at in range(start, stop, part_size))


def coalesce(ranges: Sequence[tuple[int, int]], *, max_gap: int, max_span: int) -> list[Span]:
    """Merge nearby ranges of one object into the requests to make.

    Args:
        ranges: Half-open byte ranges of one object, in any order; they may overlap.
        max_gap: Merge two ranges when at most this many unwanted bytes lie between them.
        max_span: Build no request of more than this many bytes, but for a range that alone is longer.

    Returns:
        Spans sorted by start. Every range lies whole within exactly one span.

    Raises:
        ValueError: A range is empty or reversed.
    """
    spans: list[Span] = []
    for index in sorted(range(len(ranges)), key=ranges.__getitem__):
        start, stop = ranges[index]
        if not 0 <= start < stop:
            raise ValueError(f"cannot read [{start}, {stop})")
        if spans:
            last = spans[-1]
            merged = max(last.stop, stop)
            if start <= last.stop + max_gap and merged - last.start <= max_span:
                last.members.append(index)
                spans[-1] = last._replace(stop=merged)
                continue
        spans.append(Span(start, stop, [index]))
    return spans
