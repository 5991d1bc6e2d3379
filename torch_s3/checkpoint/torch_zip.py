"""The layout of torch.save's zip file: which bytes of it are which record. Pure, no I/O.

Everything is believed only as far as it agrees with the file's size and with itself: what is returned lies within the
file, no two records share a byte, and no name occurs twice.

Formats: zip, .ZIP File Format Specification 6.3.10 (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT); what
torch makes of it, ``caffe2/serialize/inline_container.cc``: one folder, ``data.pkl`` and small records in it, and the
storages as ``data/0``, ``data/1`` …, not compressed, each payload at a multiple of 64 bytes (or of what
``.storage_alignment`` says), for which the local header's extra field is padded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch_s3.errors import CheckpointError
from torch_s3.transport.ranges import Span, coalesce

TAIL = 64 * 1024
"""Bytes of a file's end in which its end record is, as others may have put a comment after it."""
LOCAL_HEADER = 30
"""Bytes of a local header before the name."""
STORED, DEFLATED = 0, 8
"""The compression methods that are read."""
ALIGNMENT = 64
"""Of the payloads, where the file doesn't say."""

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64 = struct.Struct("<4sQ2H2L4Q")  # zip64's
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 1
_DESCRIPTOR, _DESCRIPTOR64 = 16, 24  # bytes that torch's writer, miniz, puts after a payload
_MAX_ENTRIES = 10_000_000


class Directory(NamedTuple):
    """Where the central directory is.

    Attributes:
        start: Its first byte.
        stop: One past its last.
        entries: How many there are in it.
    """

    start: int
    stop: int
    entries: int


class Record(NamedTuple):
    """A file of the archive.

    Attributes:
        name: Without the archive's folder, such as ``data/0``.
        header: Where its local header starts.
        length: Bytes that it takes in the file.
        size: Bytes that it has.
        crc: CRC32 of those.
        method: ``STORED`` or ``DEFLATED``.
        limit: Where the next record, or the directory, starts: its payload ends before.
        path: Its whole name, as bytes.
    """

    name: str
    header: int
    length: int
    size: int
    crc: int
    method: int
    limit: int
    path: bytes


def find_directory(tail: bytes, *, size: int, uri: str) -> Directory:
    """Where the directory is, according to the file's end.

    Args:
        tail: The file's last bytes, ``TAIL`` of them or all.
        size: Bytes of the whole file.
        uri: For errors.

    Raises:
        CheckpointError: The file is truncated, or no zip file.
    """
    tail_start = size - len(tail)
    at = len(tail)
    while (at := tail.rfind(b"PK\x05\x06", 0, at)) >= 0:
        if at + _END.size <= len(tail):
            _, disk, first_disk, here, count, length, start, comment = _END.unpack_from(tail, at)
            if at + _END.size + comment == len(tail):
                break
    else:
        raise CheckpointError(f"truncated: the file of {size} bytes ends before its directory", uri=uri)
    end = tail_start + at
    locator = at - _LOCATOR64.size
    if locator >= _END64.size and tail.startswith(b"PK\x06\x07", locator):  # torch always writes both
        end = _LOCATOR64.unpack_from(tail, locator)[2]
        if not tail_start <= end <= tail_start + locator - _END64.size:
            raise _damaged("its second end record is not beside the first", uri)
        sign, _, _, _, disk, first_disk, here, count, length, start = _END64.unpack_from(tail, end - tail_start)
        if sign != b"PK\x06\x06":
            raise _damaged("its second end record is none", uri)
    if disk or first_disk or here != count:
        raise _damaged("it is one of several files", uri)
    if start + length != end or count > _MAX_ENTRIES or count * _ENTRY.size > length:
        raise _damaged(f"its directory of {count} entries is not where it says", uri)
    return Directory(start, end, count)


def records(directory: bytes, where: Directory, *, uri: str) -> dict[str, Record]:
    """The records of the archive by name, in the file's order.

    Args:
        directory: The bytes of ``where``.
        where: As found.
        uri: For errors.

    Raises:
        CheckpointError: It is damaged, or made to deceive: records that overlap, or lie outside of the file, or occur
            twice.
    """
    entries = sorted(_entries(directory, where.entries, uri), key=lambda entry: entry.header)
    folder = entries[0].path.partition(b"/")[0] + b"/" if entries else b""
    if any(not entry.path.startswith(folder) for entry in entries):
        folder = next((entry.path[:-8] for entry in entries if entry.path.endswith(b"/data.pkl")), b"")
    found: dict[str, Record] = {}
    paths: set[bytes] = set()
    for index, entry in enumerate(entries):
        limit = entries[index + 1].header if index + 1 < len(entries) else where.start
        if entry.header + LOCAL_HEADER + len(entry.path) + entry.length > limit:
            what = "overlap" if limit < where.start or entry.header >= where.start else "end outside of the file"
            raise _damaged(f"its records {what}: {_shown(entry.path)}", uri)
        if entry.path in paths:
            raise _damaged(f"it has {_shown(entry.path)} twice", uri)
        paths.add(entry.path)
        if entry.path.startswith(folder) and not entry.path.endswith(b"/"):
            name = entry.path[len(folder) :].decode("utf-8", "surrogateescape")
            found[name] = entry._replace(name=name, limit=limit)
    return found


def start_by_rule(record: Record, alignment: int) -> int | None:
    """Where a payload starts if torch wrote it, without a look at its local header.

    ``None`` where the bytes up to the next record aren't those that torch would have left: its local header tells.
    """
    least = record.header + LOCAL_HEADER + len(record.path) + 4
    start = -(-least // alignment) * alignment
    after = _DESCRIPTOR64 if max(record.header, record.length) >= _FULL32 else _DESCRIPTOR
    whole = start + record.length + (after if record.length else 0) == record.limit
    return start if record.method == STORED and whole else None


def start_by_header(record: Record, header: bytes, *, uri: str) -> int:
    """Where a payload starts according to its local header.

    Args:
        record: Whose it is.
        header: Its first ``LOCAL_HEADER`` bytes.
        uri: For errors.

    Raises:
        CheckpointError: There is no such header, or the payload would not end before the next record.
    """
    sign, _, flags, method, _, _, _, _, _, name, extra = _LOCAL.unpack_from(header)
    start: int = record.header + LOCAL_HEADER + name + extra
    if sign != b"PK\x03\x04" or name != len(record.path) or method != record.method or flags & _ENCRYPTED:
        raise _damaged(f"its directory and header don't agree on {_shown(record.path)}", uri)
    if start + record.length > record.limit:
        raise _damaged(f"its records overlap: {_shown(record.path)}", uri)
    return start


def headers(wanted: Sequence[Record], *, max_gap: int, max_span: int) -> list[Span]:
    """The ranges in which the local headers of records are, see :func:`~torch_s3.transport.ranges.coalesce`."""
    ranges = [(record.header, record.header + LOCAL_HEADER) for record in wanted]
    return coalesce(ranges, max_gap=max_gap, max_span=max_span)


def _entries(directory: bytes, count: int, uri: str) -> Iterator[Record]:
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(directory):
            raise _damaged("its directory ends early", uri)
        sign, _, _, flags, method, _, _, crc, length, size, name, extra, comment, disk, _, _, header = (
            _ENTRY.unpack_from(directory, at)
        )
        path_stop = at + _ENTRY.size + name
        path = directory[at + _ENTRY.size : path_stop]
        at = path_stop + extra + comment
        if sign != b"PK\x01\x02" or at > len(directory):
            raise _damaged("its directory is none", uri)
        if _FULL32 in (size, length, header) or disk == _FULL16:
            values = [size, length, header]
            wide = _wide(directory[path_stop : path_stop + extra])
            try:
                size, length, header = (next(wide) if value == _FULL32 else value for value in values)
            except RuntimeError:  # what a generator makes of StopIteration
                raise _damaged(f"its directory has no size of {_shown(path)}", uri) from None
        if flags & _ENCRYPTED or method not in (STORED, DEFLATED):
            how = "encrypted" if flags & _ENCRYPTED else f"compressed by method {method}"
            raise CheckpointError(f"{_shown(path)} in it is {how}, which torch does not read", uri=uri)
        if method == STORED and size != length:
            raise _damaged(f"its directory has two sizes of {_shown(path)}", uri)
        yield Record("", header, length, size, crc, method, 0, path)


def _wide(extra: bytes) -> Iterator[int]:
    """The values of zip64's extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            yield from (value for (value,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8]))
            return
        at += 4 + length


def directory_of(entries: Sequence[tuple[bytes, int, int]]) -> bytes:
    """A directory and end of stored records, and nothing else: for torch's own reader, which wants one.

    Args:
        entries: Path, where the local header starts, and size of each.
    """
    made = bytearray()
    for path, header, size in entries:
        extra = struct.pack("<2H3Q", 1, 24, size, size, header)
        made += _ENTRY.pack(
            b"PK\x01\x02", 45, 45, 0, STORED, 0, 0, 0, _FULL32, _FULL32, len(path), len(extra), 0, 0, 0, 0, _FULL32
        )
        made += path + extra
    last = max((header + local_header_size(path) + size for path, header, size in entries), default=0)
    length, count = len(made), len(entries)
    made += _END64.pack(b"PK\x06\x06", _END64.size - 12, 45, 45, 0, 0, count, count, length, last)
    made += _LOCATOR64.pack(b"PK\x06\x07", 0, last + length, 1)
    made += _END.pack(b"PK\x05\x06", 0, 0, _FULL16, _FULL16, _FULL32, _FULL32, 0)
    return bytes(made)


def local_header(path: bytes) -> bytes:
    """A local header of a stored record, which leaves sizes to the directory."""
    return _LOCAL.pack(b"PK\x03\x04", 45, 8, STORED, 0, 0, 0, 0, 0, len(path), 0) + path


def local_header_size(path: bytes) -> int:
    """Bytes of :func:`local_header`."""
    return LOCAL_HEADER + len(path)


def _damaged(words: str, uri: str) -> CheckpointError:
    return CheckpointError(f"damaged, or not a checkpoint: {words}", uri=uri)


def _shown(path: bytes) -> str:
    return repr(path[:200].decode("utf-8", "backslashreplace"))
