"""Reading an object as a file: seekable, and of one version."""

from __future__ import annotations

import io
from collections import deque
from typing import Any

from fsspec.spec import AbstractBufferedFile

from torch_s3.seekable import Seekable
from torch_s3.transport.client import Client

_MIB = 1024 * 1024
_FIRST_BLOCK = 64 * 1024
_BLOCKS = 4  # kept: the file's head and tail, where formats look first, and the place of reading
_DIRECT = 256 * 1024


class S3Reader(Seekable, io.BufferedIOBase):
    """One version of an object, read from anywhere.

    Large reads are received by parallel ranges into the caller's own memory. Small ones come from blocks that grow
    from 64 KiB to 8 MiB while reading goes on in order, and every large read brings the next 64 KiB with it: formats
    that put a small header before each large record cost one round trip a record. Every range pins the ETag. Not
    thread-safe, as files aren't. Pickles as what it reads, and where: the copy reads the same version.

    Args:
        client: Whose transport is used.
        bucket: The object's bucket.
        key: The object's key.
        size: The object's bytes.
        etag: The version to read, ``None`` for whatever is there.
        version_id: S3's name of the version to read, ``None`` for the latest.
        fs: The filesystem that has opened it.
    """

    mode = "rb"

    def __init__(
        self,
        client: Client,
        bucket: str,
        key: str,
        *,
        size: int,
        etag: str | None,
        version_id: str | None = None,
        fs: Any = None,
    ) -> None:
        self.fs, self.path = fs, f"{bucket}/{key}"
        self._client, self._bucket, self._key = client, bucket, key
        self._version: dict[str, Any] = {"etag": etag, "version_id": version_id}
        self.size = size
        self.name = f"s3://{bucket}/{key}"
        self._blocks: deque[tuple[int, memoryview]] = deque(maxlen=_BLOCKS)  # (start, bytes), the newest first
        self._block_size = _FIRST_BLOCK

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes, or all that are left; fewer only at the end."""
        left = max(0, self.size - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        buffer = bytearray(wanted)
        self._fill(memoryview(buffer))
        return bytes(buffer)

    read1 = read

    def peek(self, size: int = 0, /) -> bytes:
        """Some of the next bytes, at least one unless at the end, without moving the position."""
        self._checkClosed()  # io's own, in every io class
        if self._at >= self.size:
            return b""
        return bytes((self._here() or self._next_block())[: max(size, _FIRST_BLOCK)])

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` from the position on; less only at the end. Received in place, without a copy, when large."""
        view = flat(buffer)[: max(0, self.size - self._at)]
        self._fill(view)
        return len(view)

    readinto1 = readinto

    def __reduce__(self) -> tuple[Any, ...]:
        self._checkClosed()  # io's own, in every io class
        return _reopened, (self.fs, self._bucket, self._key, self._version | {"size": self.size}, self._at)

    def receive(self, start: int, stop: int) -> memoryview:
        """The bytes of ``[start, stop)``, wherever the position is, in memory of their own."""
        block = memoryview(bytearray(stop - start))
        with self._client.batch() as batch:
            part = _part(len(block))
            gets = batch.get_into(self._bucket, self._key, start, block, part_size=part, **self._version)
            batch.wait_whole(gets, size=self.size)
        return block

    def _fill(self, view: memoryview) -> None:
        """Fill ``view``, which doesn't reach past the end, and move the position."""
        self._checkClosed()  # io's own, in every io class
        while view:
            here = self._here()
            if here is None and len(view) >= _DIRECT:
                count = self._receive(view)
            else:
                here = here or self._next_block()
                count = min(len(view), len(here))
                view[:count] = here[:count]
            self._at += count
            view = view[count:]

    def _here(self) -> memoryview | None:
        """What the blocks hold from the position on."""
        for start, block in self._blocks:
            if start <= self._at < start + len(block):
                return block[self._at - start :]
        return None

    def _receive(self, view: memoryview) -> int:
        """Receive into the caller's memory, and the next small block with it."""
        after = self._at + len(view)
        block = memoryview(bytearray(min(_FIRST_BLOCK, self.size - after)))
        with self._client.batch() as batch:
            gets = batch.get_into(self._bucket, self._key, self._at, view, part_size=_part(len(view)), **self._version)
            if block:
                gets += batch.get_into(self._bucket, self._key, after, block, **self._version)
            batch.wait_whole(gets, size=self.size)
        self._blocks.appendleft((after, block))
        self._block_size = _FIRST_BLOCK
        return len(view)

    def _next_block(self) -> memoryview:
        """Receive a block from the position on."""
        if any(self._at == start + len(block) for start, block in self._blocks):
            self._block_size = min(8 * _MIB, 4 * self._block_size)  # read in order: ask for more
        else:
            self._block_size = _FIRST_BLOCK
        block = self.receive(self._at, min(self.size, self._at + self._block_size))
        self._blocks.appendleft((self._at, block))
        return block


def _reopened(fs: Any, bucket: str, key: str, which: dict[str, Any], at: int) -> S3Reader:
    reader = S3Reader(fs.client, bucket, key, fs=fs, **which)
    reader.seek(at)
    return reader


class BlockFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """One version of an object as fsspec's own kind of file, for those that bring a cache of blocks.

    Args:
        reader: Of the object.
        block_size: Bytes that the cache asks for at a time, at least; ``None`` for fsspec's choice.
        cache_options: Of fsspec's cache.
    """

    def __init__(self, reader: S3Reader, block_size: int | None = None, cache_options: Any = None) -> None:
        self._reader = reader
        settings = {"cache_type": "none", "cache_options": cache_options, "size": reader.size}
        super().__init__(reader.fs, reader.path, "rb", block_size, **settings)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self._reader.receive(start, min(end, self.size)))


def flat(buffer: Any) -> memoryview:
    """A C-contiguous buffer's memory as bytes."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses shapes with a zero


def _part(length: int) -> int:
    """The range size for a read: enough ranges to use several connections, none too small to be worth one."""
    return min(8 * _MIB, max(_MIB, length // 16))
