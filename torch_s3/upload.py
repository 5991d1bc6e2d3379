"""Writing an object as a file: a writer that publishes whole objects only."""

from __future__ import annotations

import atexit
import io
import logging
import os
import threading
import uuid
import weakref
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from torch_s3 import errors
from torch_s3.reader import flat
from torch_s3.transport.answer import bare_etag
from torch_s3.transport.checksum import joined
from torch_s3.transport.client import Client
from torch_s3.transport.multipart import Multipart
from torch_s3.transport.objects import WRITE_ID, Put

log = logging.getLogger("torch_s3")

_MIB = 1024 * 1024
_PATIENCE = 10.0  # seconds to wait for a file that was never closed to be dropped
_PARTS = 10_000  # of one object
_PLANNED = 9_000  # of those, for what is expected
_LARGEST_PART = 5 * 1024 * _MIB
_IN_FLIGHT = 4  # parts
_MEMORY = 128 * _MIB  # of parts, where it is known how much is to come


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
