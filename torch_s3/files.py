"""File objects over the transport: a seekable reader, and a writer that publishes whole objects only."""

from __future__ import annotations

import atexit
import io
import logging
import os
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from fsspec.spec import AbstractBufferedFile

from torch_s3 import errors
from torch_s3.transport.answer import bare_etag
from torch_s3.transport.checksum import joined
from torch_s3.transport.client import Client
from torch_s3.transport.multipart import Multipart
from torch_s3.transport.objects import WRITE_ID, Put

log = logging.getLogger("torch_s3")

_MIB = 1024 * 1024
_FIRST_BLOCK = 64 * 1024
_BLOCKS = 4  # kept: the file's head and tail, where formats look first, and the place of reading
_PATIENCE = 10.0  # seconds to wait for a file that was never closed to be dropped
_PARTS = 10_000  # of one object
_PLANNED = 9_000  # of those, for what is expected
_LARGEST_PART = 5 * 1024 * _MIB
_IN_FLIGHT = 4  # parts
_MEMORY = 128 * _MIB  # of parts, where it is known how much is to come
_DIRECT = 256 * 1024


class S3Reader(io.BufferedIOBase):
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
        self._at = 0
        self._blocks: deque[tuple[int, memoryview]] = deque(maxlen=_BLOCKS)  # (start, bytes), the newest first
        self._block_size = _FIRST_BLOCK

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """The position, in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; past the end is allowed, as in files, and reads nothing there."""
        self._checkClosed()  # io's own, in every io class
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}
        if whence not in bases:
            raise ValueError(f"{self.name}: whence={whence}: use 0 (start), 1 (position) or 2 (end)")
        at = offset + bases[whence]
        if at < 0:
            raise ValueError(f"{self.name}: cannot seek to byte {at}")
        self._at = at
        return at

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


def part_size(number: int, *, first: int, expected: int) -> int:
    """How large a part to make, so that S3's 10,000 parts hold the object. Pure.

    Parts are all alike as long as no more comes than is expected. What is more goes into parts that double, up to ten
    times over those that are left: every 1,000 parts where nothing is expected.

    Source: "Amazon S3 multipart upload limits", Amazon S3 User Guide: 10,000 parts of 5 MiB to 5 GiB, 48.8 TiB in all.

    Args:
        number: Of the part, from 0.
        first: Bytes of the smallest part to make.
        expected: Bytes of the object as far as is known.
    """
    size = max(first, -(-expected // _PLANNED // _MIB) * _MIB)
    planned = min(_PARTS, -(-expected // size))
    doubled = max(0, number - planned) // max(1, (_PARTS - planned) // 10)
    return min(size << doubled, _LARGEST_PART)


class S3Writer(io.BufferedIOBase):
    """Writes one object, which appears whole, at a clean :meth:`close`, or not at all.

    Up to one part is sent by a single PUT. More go up as a multipart upload while writing continues: memory is bounded,
    and a write waits when the network is slower. Five parts are held at most; where ``expected`` tells how much is to
    come, 128 MiB of them, but always two. An exception in the ``with`` block, :meth:`discard` and garbage collection
    abort the upload; whatever was there before stays.

    Args:
        client: Whose transport is used.
        bucket: The object's bucket.
        key: The object's key.
        mode: ``"wb"``; ``"xb"`` to fail with :class:`~torch_s3.AlreadyExists` where the key exists when the object
            would be published; or ``"ab"``.
        replaces: ETag of the version in whose place alone it is published: otherwise it fails with
            :class:`~torch_s3.ObjectChanged`.
        same: What it carries beside its bytes, as parameters of boto3's ``put_object``.
        autocommit: Publish at :meth:`close`. Where false, :meth:`commit` does it after ``close`` (fsspec's protocol).
        expected: About how many bytes will be written, 0 where nobody knows. More or less may come.

    Attributes:
        etag: The object's, once published.
        checksum: Its algorithm and value in base64, of the whole object, once published; ``None`` without checksums.
        write_id: What its metadata says in ``WRITE_ID``, if it went up by parts.
    """

    def __init__(
        self,
        client: Client,
        bucket: str,
        key: str,
        *,
        mode: str = "wb",
        replaces: str | None = None,
        same: Mapping[str, Any] | None = None,
        autocommit: bool = True,
        expected: int = 0,
    ) -> None:
        self._client, self._bucket, self._key, self.mode = client, bucket, key, mode
        self._replaces, self._same = replaces, same
        self._autocommit, self._expected = autocommit, expected
        self.name = f"s3://{bucket}/{key}"
        self.etag: str | None = None
        self.checksum: tuple[str, str] | None = None
        self.write_id: str | None = None
        size = part_size(0, first=client.config.part_size, expected=expected)
        self._in_flight = max(1, _MEMORY // size - 1) if expected else _IN_FLIGHT
        self._part = memoryview(bytearray(size))  # untouched pages cost nothing
        self._filled = 0
        self._parts: list[Put] = []
        self._sizes: list[int] = []
        self._sent = 0  # of these parts, how many are known to be
        self._upload: Multipart | None = None
        self._algorithm = client.algorithm
        self._size = 0
        self._settled = False  # committed or discarded
        self._pid = os.getpid()
        self._batch = client.batch()
        _open_writers.add(self)

    def _dealloc_warn(self, source: object) -> None:
        """io's call before the garbage collector closes what was wrapped around this: publish nothing then."""
        self.discard()

    def writable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, data: Any, /) -> int:
        """Take ``data``; its memory may be reused on return.

        Raises:
            S3Error: A part could not be sent. The upload is aborted.
        """
        self._checkClosed()  # io's own, in every io class
        view = flat(data)
        taken = len(view)
        while view:
            if self._filled == len(self._part):  # only now: what is there might have been the only part
                self._send_part()
            count = min(len(view), len(self._part) - self._filled)
            self._part[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
        self._size += taken
        return taken

    def close(self) -> None:
        """Publish the object (with ``autocommit``); does nothing the second time.

        Raises:
            S3Error: It could not be published; nothing is left of it.
        """
        if self.closed:
            return
        try:
            if self._autocommit:
                self.commit()
        finally:
            super().close()

    def commit(self) -> None:
        """Publish what was written as the object.

        Raises:
            S3Error: It could not be published; nothing is left of it.
        """
        if self._settled:
            return
        try:
            if self._upload is not None:
                self._send_part()
                self._batch.wait(*self._parts)
                self._complete(self._upload)
            elif self._same is not None:
                self.etag = self._put_in_place(self._same)
            else:
                only_new = self.mode == "xb"
                put = self._batch.put(self._bucket, self._key, self._part[: self._filled], only_new=only_new)
                self._batch.wait(put)
                self.etag = put.answer_etag
                self._sizes.append(self._filled)
                self._parts.append(put)
        except BaseException:
            self.discard()
            raise
        self._settled = True
        if self._algorithm is not None and self._parts:
            self.checksum = self._algorithm, joined([put.checksum for put in self._parts], self._sizes)
        self._batch.close()

    def discard(self) -> None:
        """Drop what was written: no object, no open upload. Does nothing once published or discarded."""
        if not self._settled and self._pid == os.getpid():  # a forked child must not abort its parent's upload
            self._settled = True
            try:
                self._batch.close()
            finally:
                if self._upload is not None:
                    self._upload.abort()
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        """Never publishes: an object that nobody closed is not whole."""
        if getattr(self, "_settled", True):
            return
        log.warning("%s was written but never closed: it is dropped", self.name)
        # In a thread of its own: garbage is collected anywhere, in the middle of what discarding needs as well.
        thread = threading.Thread(target=self.discard)
        thread.start()
        if not self._batch.in_io_thread():
            thread.join(_PATIENCE)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.name}: an open file cannot be pickled; open it where it is used")

    def _send_part(self) -> None:
        """Start sending the part that is full, once few enough are under way."""
        try:
            if self._upload is None:
                self._upload = self._begin_upload()
            number = len(self._parts) + 1
            spare: Any = None
            oldest = self._parts[self._sent] if self._parts else None
            if oldest is not None and (oldest.finished or number - self._sent > self._in_flight):
                self._batch.wait(oldest)
                self._sent += 1
                spare = oldest.body.obj
                oldest.release()
            body = self._part[: self._filled]
            self._sizes.append(len(body))
            self._parts.append(
                self._batch.put(
                    self._bucket, self._key, body, part=(self._upload.id, number), algorithm=self._algorithm
                )
            )
            self._batch.start()
        except BaseException:
            self.discard()
            raise
        size = part_size(number, first=self._client.config.part_size, expected=self._expected)
        self._part = memoryview(spare if spare and len(spare) == size else bytearray(size))
        self._filled = 0

    def _begin_upload(self) -> Multipart:
        checksums = {} if self._algorithm is None else {"ChecksumAlgorithm": self._algorithm.upper()}
        return Multipart(self._client, self._bucket, self._key, **self._same or {}, **checksums)

    def _complete(self, upload: Multipart) -> None:
        parts: list[dict[str, Any]] = [
            {"PartNumber": number, "ETag": f'"{put.answer_etag}"'} for number, put in enumerate(self._parts, start=1)
        ]
        if self._algorithm is not None:
            for part, put in zip(parts, self._parts, strict=True):
                part[f"Checksum{self._algorithm.upper()}"] = put.checksum
        try:
            self.etag = upload.complete(parts, **self._condition())
        except errors.AlreadyExists:
            raise self._refused() from None
        self.write_id = upload.write_id

    def _put_in_place(self, same: Mapping[str, Any]) -> str:
        """Send the object in one request, with what the one before carried."""
        write_id = uuid.uuid4().hex
        same = {**same, "Metadata": same.get("Metadata", {}) | {WRITE_ID: write_id}, **self._condition()}
        where = {"Bucket": self._bucket, "Key": self._key, "Body": bytes(self._part[: self._filled])}
        try:
            return bare_etag(self._client.call("put_object", self.name, **where, **same)["ETag"])
        except (errors.AlreadyExists, errors.NotFound, errors.TransferFailed) as error:
            # Perhaps it is done, and only the answer was lost.
            if (etag := self._client.wrote(self._bucket, self._key, write_id)) is not None:
                return etag
            if self._replaces is None or isinstance(error, errors.TransferFailed):
                raise
            raise self._refused() from None

    def _condition(self) -> dict[str, str]:
        """On which the object is published."""
        if self._replaces is None:
            return {"IfNoneMatch": "*"} if self.mode == "xb" else {}
        where = {"Bucket": self._bucket, "Key": self._key}
        with suppress(errors.NotFound):  # not all servers heed the condition
            if bare_etag(self._client.call("head_object", self.name, **where).get("ETag", "")) == self._replaces:
                return {"IfMatch": f'"{self._replaces}"'}
        raise self._refused()

    def _refused(self) -> errors.S3Error:
        if self._replaces is None:
            return errors.AlreadyExists("the object exists already, and overwriting was not allowed", uri=self.name)
        message = "it was overwritten or deleted while it was written after: what was to be added is dropped"
        return errors.ObjectChanged(message, uri=self.name)


class S3TextWriter(io.TextIOWrapper):
    """Text over an :class:`S3Writer`, with its promise: an exception or garbage collection publishes nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.buffer.discard()  # type: ignore[attr-defined]  # an S3Writer
        super().__exit__(kind, error, trace)

    def __del__(self) -> None:
        """Never publishes."""
        with suppress(ValueError, AttributeError):  # it was not even opened
            if not self.closed:
                self.buffer.discard()  # type: ignore[attr-defined]  # an S3Writer


_open_writers: weakref.WeakSet[S3Writer] = weakref.WeakSet()


@atexit.register
def _discard_open_writers() -> None:
    """Before the interpreter takes apart what discarding needs."""
    for writer in list(_open_writers):
        writer.discard()
