"""The encoding of protocol buffers, without groups. Pure: no I/O.

Source: "Encoding", Protocol Buffers documentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types: how a field's value is encoded."""


class Malformed(ValueError):
    """What is wrong with a record."""


def fields(data: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Of each field of a message: its number, wire type, and where its value starts and stops."""
    at, size = 0, len(data)
    while at < size:
        tag = data[at]
        at += 1
        if tag >= 0x80:
            tag, at = _varint(data, at - 1)
        start, wire = at, tag & 7
        if wire == BYTES:
            length = data[at]
            start = at + 1
            if length >= 0x80:
                length, start = _varint(data, at)
            at = start + length
        elif wire == VARINT:
            _, at = _varint(data, at)
        elif wire == FIXED32:
            at += 4
        elif wire == FIXED64:
            at += 8
        else:
            raise Malformed(f"a field has the wire type {wire}")
        if at > size:
            raise Malformed("a field ends beyond its message")
        yield tag >> 3, wire, start, at


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number below 2⁶⁴ and where it ends."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    number, shift = byte & 0x7F, 7
    while shift < 70:
        at += 1
        byte = data[at]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, at + 1
        shift += 7
    raise Malformed("a number has more than 10 bytes")


def varint_ends(data: Any) -> NDArray[np.int64]:
    """Where in their packed encoding varints have their last bytes."""
    return np.flatnonzero(np.frombuffer(data, np.uint8) < 0x80)


def varints(data: memoryview | bytearray) -> NDArray[np.int64]:
    """Decode int64 from the packed encoding of protobuf: seven bits a byte, the lowest first."""
    given = np.frombuffer(data, np.uint8)
    ends = varint_ends(data)
    if len(ends) == len(given):
        return given.astype(np.int64)
    if not len(ends) or ends[-1] != len(given) - 1:
        raise Malformed("a list of numbers ends within one")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise Malformed("a number has more than 10 bytes")
    numbers = np.zeros(len(ends), np.uint64)
    for place in range(int(lengths.max())):
        has = lengths > place
        numbers[has] |= (given[starts[has] + place] & 0x7F).astype(np.uint64) << np.uint64(7 * place)
    return numbers.view(np.int64)


def encoded(number: int) -> bytes:
    """A varint."""
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def head_of(field: int, size: int) -> bytes:
    """What comes before a field's bytes, of which there are so many."""
    return encoded(field << 3 | BYTES) + encoded(size)


def delimited(field: int, pieces: Sequence[bytes]) -> bytes:
    """A field of these bytes together."""
    return b"".join([head_of(field, sum(map(len, pieces))), *pieces])
