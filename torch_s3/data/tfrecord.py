"""TFRecord files, without TensorFlow. Pure: no I/O.

A file is records one after the other: the length (uint64), its masked CRC32C (uint32), the data, and the data's masked
CRC32C (uint32), all little-endian.

Source: "TFRecord and tf.train.Example", TensorFlow guide, "TFRecords format details".
"""

from __future__ import annotations

import struct
from array import array

import numpy as np
from awscrt.checksums import crc32c
from numpy.typing import NDArray

from torch_s3 import errors

_HEAD = struct.Struct("<QI")
_CRC = struct.Struct("<I")
FRAME = _HEAD.size + _CRC.size
"""Bytes of a record beyond its data."""

_LARGEST = 1 << 48  # bytes of a record; no shard is that large


class TFRecordScan:
    """Finds where records lie. Fed a shard's bytes in order, of which only the heads are looked at, and verified.

    Args:
        uri: The shard, for errors.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._fed = 0
        self._held = bytearray()  # the beginning of a head
        self._bounds = array("q", [0])  # the last one may lie beyond what was fed

    def feed(self, data: memoryview) -> None:
        """Take the next bytes; of any number, cut anywhere.

        Raises:
            IntegrityError: A record's head is damaged.
        """
        start, size = self._fed, len(data)
        self._fed += size
        if self._held:
            self._held += data[: _HEAD.size - len(self._held)]
            if len(self._held) < _HEAD.size:
                return
            self._append(self._held, 0)
            self._held = bytearray()
        at = self._bounds[-1] - start
        while at + _HEAD.size <= size:
            at += self._append(data, at)
        if at < size:
            self._held += data[at:]

    def bounds(self) -> NDArray[np.int64]:
        """int64: where each record so far starts, and where the last whole one ends."""
        found = np.array(self._bounds, np.int64)
        return found[:-1] if found[-1] > self._fed else found

    def finish(self) -> NDArray[np.int64]:
        """Where each of the n records starts, and the last one ends: int64 (n + 1,).

        Raises:
            IntegrityError: The shard is cut off.
        """
        if self._bounds[-1] != self._fed:
            found = self.bounds()
            message = f"the shard is cut off after {self._fed} bytes"
            raise _damaged(self._uri, len(found) - 1, int(found[-1]), message)
        return self.bounds()

    def _append(self, data: memoryview | bytearray, at: int) -> int:
        """Note the record whose head is at ``at``; returns its length with its frame."""
        length, crc = _HEAD.unpack_from(data, at)
        if _masked(crc32c(data[at : at + 8])) != crc or length > _LARGEST:
            raise _damaged(self._uri, len(self._bounds) - 1, self._bounds[-1], "the length's checksum is wrong")
        framed: int = length + FRAME
        self._bounds.append(self._bounds[-1] + framed)
        return framed


def record(data: memoryview, uri: str, number: int, offset: int) -> memoryview:
    """The data of one record, verified; nothing is copied.

    Args:
        data: The record with its frame, whole.
        uri: The shard, for errors.
        number: Of the record in the shard, from 0.
        offset: Where it starts in the shard, in bytes.

    Raises:
        IntegrityError: A length or a checksum is wrong.
    """
    if len(data) < FRAME:
        raise _damaged(uri, number, offset, f"it has {len(data)} bytes, and a frame alone has {FRAME}")
    length, crc = _HEAD.unpack_from(data)
    if _masked(crc32c(data[:8])) != crc:
        raise _damaged(uri, number, offset, "the length's checksum is wrong")
    if length != len(data) - FRAME:
        raise _damaged(uri, number, offset, f"it says that it has {length} bytes, not {len(data) - FRAME}")
    found = data[_HEAD.size : -_CRC.size]
    if _masked(crc32c(found)) != _CRC.unpack_from(data, len(data) - _CRC.size)[0]:
        raise _damaged(uri, number, offset, "the data's checksum is wrong")
    return found


def frame(*pieces: bytes | memoryview) -> list[bytes | memoryview]:
    """The buffers of a record whose data are these pieces together; nothing is copied."""
    length = struct.pack("<Q", sum(map(len, pieces)))
    crc = 0
    for piece in pieces:
        crc = crc32c(piece, crc)
    return [length + _CRC.pack(_masked(crc32c(length))), *pieces, _CRC.pack(_masked(crc))]


def _masked(crc: int) -> int:
    """A CRC as TFRecord stores it: "CRCs of strings that hold CRCs" are weak, says LevelDB, where it comes from."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _damaged(uri: str, number: int, offset: int, message: str) -> errors.IntegrityError:
    return errors.IntegrityError(f"record {number}, at byte {offset}: {message}", uri=uri)
