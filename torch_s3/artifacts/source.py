"""A whole object in one piece of memory, and a file over it."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import fsspec

from torch_s3 import errors
from torch_s3.memory import new_storage, populate, view_of
from torch_s3.reader import flat
from torch_s3.seekable import Seekable
from torch_s3.source import Source, opened
from torch_s3.uris import resolve

MAX_BYTES = 64 << 30
"""Bytes of an artifact, in S3 or unpacked, where the caller doesn't say: more than that is a mistake, or meant ill."""

MAX_MESSAGE = 2**31 - 1
"""Bytes of a message of protobuf."""


def resolve_object(
    uri: str,
    *,
    storage_options: Mapping[str, Any] | None,
    filesystem: fsspec.AbstractFileSystem | None,
) -> tuple[fsspec.AbstractFileSystem, str]:
    """As :func:`~torch_s3.uris.resolve`, of what is one object.

    Raises:
        InvalidUri: It is a prefix, or nothing here can open it.
    """
    if uri.endswith("/"):
        raise errors.InvalidUri("this is a prefix: name one object", uri=uri)
    return resolve(uri, storage_options=storage_options, filesystem=filesystem)


def read_whole(
    uri: str,
    *,
    max_bytes: int = MAX_BYTES,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> memoryview:
    """One version of an object, received by parallel ranges into the memory that is returned: writable, and nobody
    else's.

    Raises:
        InvalidUri: It is a prefix.
        NotFound: There is no such object.
        ArtifactError: It has more than ``max_bytes``; no memory was taken.
        ObjectChanged: It was overwritten while it was read.
    """
    uri = os.fspath(uri)
    fs, path = resolve_object(uri, storage_options=storage_options, filesystem=filesystem)
    with opened(fs, path, uri) as source:
        return receive(source, max_bytes=max_bytes)


def receive(source: Source, *, max_bytes: int) -> memoryview:
    """As :func:`read_whole`, of a source."""
    if source.size > max_bytes:
        raise errors.ArtifactError(f"it has {source.size} bytes, and max_bytes={max_bytes}", uri=source.uri)
    storage = new_storage(source.size)
    buffer, begun = view_of(storage), len(source.head)
    if begun:  # or it is memory that cannot be written to
        buffer[:begun] = source.head
    under_way = 0
    for start in range(begun, source.size, source.part_size):
        part = buffer[start : start + source.part_size]
        populate(storage, start, start + len(part))
        source.ask(start, part, None)
        source.begin()
        under_way += 1 - len(source.finished(wait=under_way >= 2 * source.in_flight))
    while under_way:
        under_way -= len(source.finished(wait=True))
    source.check_unchanged()
    return buffer


class MemoryFile(Seekable, io.BufferedIOBase):
    """A seekable file over memory that is not copied. Not thread-safe, as files aren't.

    Args:
        memory: What is read.
        name: For those who look for one.
    """

    mode = "rb"

    def __init__(self, memory: memoryview, name: str = "") -> None:
        self.memory, self.size, self.name = memory, len(memory), name

    def view(self, size: int | None = -1) -> memoryview:
        """As :meth:`read`, without a copy."""
        self._checkClosed()  # io's own, in every io class
        found = self.memory[self._at :] if size is None or size < 0 else self.memory[self._at : self._at + size]
        self._at += len(found)
        return found

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes, or all that are left; fewer only at the end."""
        return bytes(self.view(size))

    read1 = read

    def peek(self, size: int = 0, /) -> bytes:
        """The next bytes, without moving the position."""
        return bytes(self.memory[self._at : self._at + max(size, 64)])

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` from the position on; less only at the end."""
        into = flat(buffer)
        found = self.view(len(into))
        into[: len(found)] = found
        return len(found)

    readinto1 = readinto

    def readline(self, size: int | None = -1, /) -> bytes:
        """The bytes up to the next line's start."""
        line, at = bytearray(), self._at
        while not line.endswith(b"\n") and (piece := bytes(self.memory[at : at + 4096])):
            line += piece[: piece.find(b"\n") + 1 or None]
            at = self._at + len(line)
        return self.read(len(line) if size is None or size < 0 else min(size, len(line)))
