"""Brace expansion, as shells write many names in one. Pure: no I/O.

Source: "Brace Expansion", Bash Reference Manual.
"""

from __future__ import annotations

import re

from torch_s3 import errors

_NUMBERS = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?")
_LETTERS = re.compile(r"([a-zA-Z])\.\.([a-zA-Z])(?:\.\.(-?\d{1,18}))?")
_MOST = 1_000_000  # names
_DEEPEST = 20


def expand(pattern: str) -> list[str]:
    """All names that a pattern stands for, in the order that it says.

    ``{000000..001023}`` counts, with the zeros written, ``{0..8..2}`` in steps; ``{a,b}`` are alternatives; they may be
    nested and follow each other. Braces around anything else stand for themselves.

    Raises:
        InvalidUri: A brace is not closed, or there are more than a million names.
    """
    return _sequence(pattern, 0, 0)[0]


def _sequence(pattern: str, at: int, depth: int) -> tuple[list[str], int]:
    """The names from ``at`` on, and where they end: within braces, at a comma or the closing brace."""
    if depth > _DEEPEST:
        raise errors.InvalidUri(f"braces are nested more than {_DEEPEST} times", uri=pattern)
    names = [""]
    while at < len(pattern) and not (depth and pattern[at] in ",}"):
        if pattern[at] == "{":
            found, after = _braces(pattern, at, depth)
        else:
            special = re.compile(r"[{,}]" if depth else "{").search(pattern, at)
            after = special.start() if special else len(pattern)
            found = [pattern[at:after]]
        _check(len(names) * len(found), pattern)
        names = [name + more for name in names for more in found]
        at = after
    return names, at


def _braces(pattern: str, opened: int, depth: int) -> tuple[list[str], int]:
    """What the braces that open at ``opened`` stand for, and where they end."""
    alternatives: list[list[str]] = []
    at = opened
    while True:
        found, at = _sequence(pattern, at + 1, depth + 1)
        if at == len(pattern):
            raise errors.InvalidUri(f"the brace that opens at character {opened} is not closed", uri=pattern)
        alternatives.append(found)
        if pattern[at] == "}":
            break
    _check(sum(map(len, alternatives)), pattern)
    if len(alternatives) > 1:
        return [name for names in alternatives for name in names], at + 1
    counted = _counted(pattern[opened + 1 : at], pattern)
    return counted if counted is not None else [f"{{{name}}}" for name in alternatives[0]], at + 1


def _counted(text: str, pattern: str) -> list[str] | None:
    """What a range stands for; ``None`` where it is none."""
    if match := _NUMBERS.fullmatch(text):
        first, last = int(match[1]), int(match[2])
        padded = any(re.match(r"-?0\d", end) for end in match.group(1, 2))
        width = max(map(len, match.group(1, 2))) if padded else 0
    elif match := _LETTERS.fullmatch(text):
        first, last, width = ord(match[1]), ord(match[2]), 0
    else:
        return None
    step = abs(int(match[3] or 1)) or 1
    counted = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    _check(-(-(abs(last - first) + 1) // step), pattern)
    if match.re is _LETTERS:
        return list(map(chr, counted))
    return [f"{number:0{width}d}" for number in counted]


def _check(count: int, pattern: str) -> None:
    if count > _MOST:
        raise errors.InvalidUri(f"it stands for more than {_MOST:,} names", uri=pattern)
