"""A torch zip file in a source: its records, read and checked, and a stand-in of it for torch's own reader."""

from __future__ import annotations

import io
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from zlib_ng import zlib_ng

from torch_s3.checkpoint import torch_zip
from torch_s3.checkpoint.torch_zip import STORED, Record
from torch_s3.errors import CheckpointError, IntegrityError
from torch_s3.seekable import Seekable
from torch_s3.source import Source

PICKLE = "data.pkl"
STORAGES = "data/"
"""What the names of the storages' records start with."""
_SMALL = (".format_version", ".storage_alignment", "byteorder", "version", ".data/version", ".data/serialization_id")
_MAX_SMALL = 4096  # bytes of each of those
_MAX_PICKLE = 64 * 1024 * 1024  # bytes of a pickle that is compressed: torch.save's is not, and large ones take long
_MAX_RATIO = 1032  # of deflate's bytes, out of one; more than that nobody can have compressed
_HEADERS_GAP = 64 * 1024
_FOLDER = b"archive/"
_EXPORTED = {"models/model.json", "serialized_exported_program.json"}  # of torch.export.save, now and before 2.8


class Archive(NamedTuple):
    """What is known of a file before any tensor of it is read.

    Attributes:
        records: All of them, by name.
        starts: Where the payloads are, by name.
        small: The contents of ``data.pkl`` and of what says how to read it, by name.
    """

    records: dict[str, Record]
    starts: dict[str, int]
    small: dict[str, bytes]


def is_zip(head: memoryview) -> bool:
    """Whether a file that starts so is a zip file."""
    return bytes(head[:4]) == b"PK\x03\x04"


def read_records(source: Source) -> dict[str, Record]:
    """The records of a zip file by name, in its order.

    Raises:
        CheckpointError: It is damaged, or torch wrote no such file.
        S3Error: It could not be read.
    """
    uri, size = source.uri, source.size
    tail_start = max(0, size - torch_zip.TAIL)
    [tail] = source.read([(tail_start, size)])
    where = torch_zip.find_directory(bytes(tail), size=size, uri=uri)
    if where.start >= tail_start:
        directory = tail[where.start - tail_start : where.stop - tail_start]
    else:
        [directory] = source.read([(where.start, where.stop)])
    return torch_zip.records(bytes(directory), where, uri=uri)


def is_script(records: Mapping[str, Record]) -> bool:
    """Whether torch.jit.save wrote it."""
    return "constants.pkl" in records


def has_sums(records: Mapping[str, Record]) -> bool:
    """Whether CRC32s were saved: with torch's ``save.compute_crc32`` turned off, each is 0."""
    return any(record.crc for record in records.values())


def read_archive(source: Source, records: dict[str, Record], *, verify: bool) -> Archive:
    """Read what torch reads first of a zip file.

    Args:
        source: The file.
        records: Its own.
        verify: Check the CRC32s of what is returned.

    Raises:
        CheckpointError: It is damaged, or torch.save wrote no such file.
        IntegrityError: A record's CRC32 is wrong.
        S3Error: It could not be read.
    """
    uri = source.uri
    if not _EXPORTED.isdisjoint(records):
        words = "it is a torch.export archive, a program: load a file of it with torch.export.load"
        raise CheckpointError(words, uri=uri)
    if PICKLE not in records:
        raise CheckpointError("not a checkpoint that torch.save wrote: a zip file without data.pkl", uri=uri)
    verify = verify and has_sums(records)
    small = {name: records[name] for name in (PICKLE, *_SMALL) if name in records}
    for name, record in small.items():
        most = _MAX_SMALL if name != PICKLE else record.size if record.method == STORED else _MAX_PICKLE
        if record.size > most:
            raise CheckpointError(f"damaged, or not a checkpoint: {name} of {record.size} bytes", uri=uri)
    alignment = torch_zip.ALIGNMENT
    if (said := records.get(".storage_alignment")) is not None:
        starts = payloads(source, {said.name: said}, alignment)
        value = _contents(source, {said.name: said}, starts, verify=verify)[said.name]
        alignment = int(value) if value.isdigit() and 0 < int(value) <= 2**30 else alignment
    starts = payloads(source, records, alignment)
    return Archive(records, starts, _contents(source, small, starts, verify=verify))


def payloads(source: Source, records: dict[str, Record], alignment: int = torch_zip.ALIGNMENT) -> dict[str, int]:
    """Where the payloads of records are."""
    known = {name: torch_zip.start_by_rule(record, alignment) for name, record in records.items()}
    starts = {name: start for name, start in known.items() if start is not None}
    asked = [records[name] for name, start in known.items() if start is None]
    if asked:
        spans = torch_zip.headers(asked, max_gap=_HEADERS_GAP, max_span=source.part_size)
        for span, content in zip(spans, source.read([span[:2] for span in spans]), strict=True):
            for member in span.members:
                record = asked[member]
                header = bytes(content[record.header - span.start :][: torch_zip.LOCAL_HEADER])
                starts[record.name] = torch_zip.start_by_header(record, header, uri=source.uri)
    return starts


def _contents(source: Source, records: dict[str, Record], starts: dict[str, int], *, verify: bool) -> dict[str, bytes]:
    ranges = [(starts[name], starts[name] + record.length) for name, record in records.items()]
    found = source.read(ranges)
    return {
        record.name: unpacked(record, content, source=source, verify=verify)
        for record, content in zip(records.values(), found, strict=True)
    }


def unpacked(record: Record, content: memoryview, *, source: Source, verify: bool) -> bytes:
    """What a record has, out of its bytes in the file.

    Raises:
        CheckpointError: It isn't what the directory says, or claims to be larger than it can be.
        IntegrityError: Its CRC32 is wrong.
    """
    data = bytes(content)
    if record.method != STORED:
        if record.size > record.length * _MAX_RATIO:
            words = f"{record.name} cannot have {record.size} bytes, compressed to {record.length}"
            raise CheckpointError(f"damaged: {words}", uri=source.uri)
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflate.decompress(data, record.size + 1)
        except zlib.error as error:
            raise CheckpointError(f"damaged: {record.name} cannot be decompressed ({error})", uri=source.uri) from None
        if len(data) != record.size:
            raise CheckpointError(f"damaged: {record.name} does not have its {record.size} bytes", uri=source.uri)
    if verify and zlib_ng.crc32(data) != record.crc:
        source.check_unchanged()
        words = f"{record.name} is damaged: its bytes don't have the CRC32 that was saved with them"
        start = record.header
        raise IntegrityError(words, uri=source.uri, range=(start, record.limit))
    return data


class StandIn(Seekable, io.RawIOBase):
    """A zip file that never was, for torch.load to read: the archive's small records, and storages on request.

    torch's own zip reader so sees no byte of the original's structure. It reads a storage by one ``readinto`` of all
    its bytes; ``deliver`` is asked to give them, and may as well leave the memory as it is.

    Args:
        archive: What it stands for.
        deliver: Called with a storage's record, and the memory that torch wants it in.
    """

    def __init__(self, archive: Archive, deliver: Callable[[Record, memoryview], None]) -> None:
        self._deliver = deliver
        self.error: BaseException | None = None
        self.truncated = False
        self._parts: list[bytes | Record] = []
        self._begins: list[int] = []
        self._storages: dict[int, Record] = {}
        entries = []
        for name, record in archive.records.items():
            content = archive.small.get(name)
            if content is None and not name.startswith(STORAGES):
                continue
            path = _FOLDER + name.encode("utf-8", "surrogateescape")
            size = record.size if content is None else len(content)
            entries.append((path, self.size, size))
            self._add(torch_zip.local_header(path), torch_zip.local_header_size(path))
            if content is None:
                self._storages[self.size] = record
            self._add(record if content is None else content, size)
        end = torch_zip.directory_of(entries)
        self._add(end, len(end))

    def _add(self, part: bytes | Record, size: int) -> None:
        if size:
            self._begins.append(self.size)
            self._parts.append(part)
            self.size += size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        record = self._storages.get(self._at)
        if record is not None and len(view) == record.size:
            try:
                self._deliver(record, view)
            except BaseException as error:
                self.error = error  # torch calls from C++, and may make another one of it
                raise
            self._at += record.size
            return len(view)
        got = 0
        while got < len(view) and self._at < self.size:
            index = bisect_right(self._begins, self._at) - 1
            part, begin = self._parts[index], self._at - self._begins[index]
            if isinstance(part, Record):  # on its way to the directory, which it looks for from the end
                some = bytes(min(part.size - begin, len(view) - got))
            else:
                some = part[begin : begin + len(view) - got]
            view[got : got + len(some)] = some
            got += len(some)
            self._at += len(some)
        return got
