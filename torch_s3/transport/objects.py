"""The transfers that carry an object's bytes."""

from __future__ import annotations

import re

from torch_s3 import errors
from torch_s3.transport import sigv4
from torch_s3.transport.answer import Head
from torch_s3.transport.checksum import ALGORITHMS, checksum
from torch_s3.transport.retry import Cause, Retry
from torch_s3.transport.target import Target
from torch_s3.transport.transfer import ERROR, Sink, Transfer

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_ERROR_LIMIT = 4096
_SMALL = 1024 * 1024
WRITE_ID = "torch-s3-write-id"
"""Metadata that tells whether an object is the one that a writer, who has lost the answer, has written."""


class Get(Transfer):
    """Receive ``[start, stop)`` of an object, or all of it.

    An attempt that breaks off is resumed where it broke off, from the same version of the object.

    Args:
        start: First byte, 0 for a whole object.
        stop: One past the last byte. ``None``, with ``start`` 0: the whole object, in one answer.
        into: Writable memory of ``stop - start`` bytes, filled in place; ``None``: allocated when the answer's length
            is known.
        open_end: ``stop`` may lie past the object's end; what there is, is received. ``size`` then tells how long the
            object is.
        at_most: Of a whole object that is longer, receive just its first ``at_most`` bytes.
        version_id: The version to read, ``None`` for the latest.
    """

    __slots__ = (
        "_at_most", "_checksum", "_have", "buffer", "into", "open_end", "partial", "size", "start", "stop",
        "version_id",
    )  # fmt: skip

    def __init__(
        self,
        target: Target,
        bucket: str,
        key: str,
        sink: Sink,
        *,
        start: int = 0,
        stop: int | None = None,
        into: memoryview | None = None,
        etag: str | None = None,
        open_end: bool = False,
        at_most: int | None = None,
        version_id: str | None = None,
    ) -> None:
        super().__init__(target, bucket, key, sink, etag)
        self.start = start
        self.stop = stop
        self.into = into
        self.open_end = open_end
        self._at_most = at_most
        self.version_id = version_id
        self.partial = False
        self.buffer = memoryview(b"")  # the answer: ``into``, or what was allocated
        self.size = 0  # of the whole object, once answered
        self._have = 0  # bytes in ``buffer`` from attempts that broke off
        self._checksum: tuple[str, str] | None = None  # algorithm and value, of the whole answer

    @property
    def operation(self) -> str:
        return "GetObject"

    @property
    def query(self) -> str:
        return "" if self.version_id is None else f"versionId={sigv4.encode_query(self.version_id)}"

    @property
    def range(self) -> tuple[int, int] | None:
        return None if self.stop is None else (self.start, self.stop)

    @property
    def small(self) -> bool:
        return self.stop is None or self.stop - self.start <= _SMALL

    def headers(self) -> dict[str, str]:
        fields = {"x-amz-content-sha256": sigv4.EMPTY_SHA256}
        if self.alike == "whole":
            fields["x-amz-checksum-mode"] = "ENABLED"
        fields.update(self.target.get_fields)
        return fields | self.conditions()

    def conditions(self) -> dict[str, str]:
        fields = {}
        if self._have:
            fields["range"] = f"bytes={self.start + self._have}-{self.start + len(self.buffer) - 1}"
        elif self.stop is not None:
            fields["range"] = f"bytes={self.start}-{self.stop - 1}"
        etag = self.answer_etag if self._have else self.etag
        if etag is not None:
            fields["if-match"] = f'"{etag}"'
        return fields

    @property
    def alike(self) -> str:
        return "part" if self._have or self.stop is not None or not self.target.verify_checksums else "whole"

    def receive(self, head: Head) -> memoryview | None:
        length, answer_range = head.length(), head.get("content-range")
        if length is None or head.get("transfer-encoding") is not None:
            raise self._wrong("the server did not say how long its answer is (Content-Length)")
        first, last, size = 0, length - 1, length
        if answer_range is not None:
            match = _CONTENT_RANGE.fullmatch(answer_range)
            if match is None or match[1] is None:
                raise self._wrong(f"the server answered with Content-Range {answer_range!r}")
            first, last, size = int(match[1]), int(match[2]), int(match[3])
        elif head.status == 206:
            raise self._wrong("the server answered 206 without Content-Range")
        etag = head.etag()
        if self.etag is not None and etag is not None and etag != self.etag:
            raise errors.ObjectChanged(f"its ETag is {etag}, expected {self.etag}", uri=self.uri, range=self.range)
        if self._have and (answer_range is None or (etag, size) != (self.answer_etag, self.size)):
            self._start_over()  # another version, or all of it
            if answer_range is not None:
                raise Retry(Cause.INTEGRITY, "it was overwritten while it was read")
        start = self.start + self._have
        stop = size if self.stop is None or (self.open_end and size < self.stop) else self.stop
        if self._have:
            stop = self.start + len(self.buffer)
        if (first, last + 1) != (start, stop) or length != stop - start:
            got = f"bytes {first}-{last} of {size}" if answer_range else f"the whole object of {length} bytes"
            raise self._wrong(f"the server answered with {got}, {length} bytes long")
        if self._have:
            return self.buffer[self._have :]
        if self.into is not None and len(self.into) != length:
            raise self._wrong(f"the object has {length} bytes, expected {len(self.into)}")
        self.answer_etag, self.size = etag, size
        if self._at_most is not None and length > self._at_most:
            length, self.partial = self._at_most, True
        elif self.stop is None and self.target.verify_checksums:
            self._checksum = _stored_checksum(head)
        self.buffer = memoryview(bytearray(length)) if self.into is None else self.into
        return self.buffer

    @property
    def nbytes(self) -> int:
        return len(self.buffer)

    def received(self) -> None:
        if self.answer_etag is None and ERROR in bytes(self.buffer[:_ERROR_LIMIT]):
            self.refuse(Head(b"HTTP/1.1 200 \r\n"), bytes(self.buffer[:_ERROR_LIMIT]))  # every object has an ETag
        if self._checksum is not None:
            algorithm, stored = self._checksum
            if checksum(algorithm, self.buffer) != stored:
                self._start_over()
                raise Retry(Cause.INTEGRITY, f"the bytes received don't have the stored {algorithm.upper()}")

    def interrupted(self, missing: int) -> None:
        # Without an ETag nothing says that the rest would be of the same version.
        self._have = len(self.buffer) - missing if self.answer_etag is not None else 0

    def refuse(self, head: Head, body: bytes) -> None:
        if head.status == 412 and self.etag is not None:
            raise errors.ObjectChanged(f"its ETag is no longer {self.etag}", uri=self.uri, range=self.range)
        if head.status in (412, 416) and self._have:
            self._start_over()
            raise Retry(Cause.INTEGRITY, "it was overwritten while it was read")
        if head.status == 416 and self.open_end:
            # It ends before ``start``: nothing is there, and an empty object has no byte 0.
            self.buffer, self.size = memoryview(b""), 0
            return
        super().refuse(head, body)

    def release(self) -> None:
        super().release()
        self.into, self.buffer = None, memoryview(b"")

    def _start_over(self) -> None:
        self._have, self._checksum, self.answer_etag = 0, None, None

    def _wrong(self, message: str) -> errors.IntegrityError:
        return errors.IntegrityError(message, uri=self.uri, range=self.range)


class Put(Transfer):
    """Send an object, or one part of a multipart upload, with its checksum for the server to check.

    Args:
        body: The bytes; not copied, so it must not change until the transfer is finished.
        algorithm: Of the checksum, ``None`` for none.
        part: ``(upload id, part number)`` of a multipart upload.
        write_id: Fail where the key exists already. The object is marked with this, so that one who has lost the answer
            can tell whether it is this one that exists.
    """

    __slots__ = ("algorithm", "checksum", "part", "write_id")
    method = "PUT"

    def __init__(
        self,
        target: Target,
        bucket: str,
        key: str,
        sink: Sink,
        body: memoryview,
        *,
        algorithm: str | None,
        part: tuple[str, int] | None = None,
        write_id: str | None = None,
    ) -> None:
        super().__init__(target, bucket, key, sink, None)
        self.body = body
        self.part = part
        self.write_id = write_id
        self.algorithm = algorithm
        self.checksum = "" if algorithm is None else checksum(algorithm, body)

    @property
    def operation(self) -> str:
        return "PutObject" if self.part is None else "UploadPart"

    @property
    def query(self) -> str:
        if self.part is None:
            return ""
        return f"partNumber={self.part[1]}&uploadId={sigv4.encode_query(self.part[0])}"

    def headers(self) -> dict[str, str]:
        fields = {"content-length": str(len(self.body)), "x-amz-content-sha256": sigv4.UNSIGNED_PAYLOAD}
        if self.algorithm is not None:
            fields[f"x-amz-checksum-{self.algorithm}"] = self.checksum
        if self.write_id is not None:
            fields |= {"if-none-match": "*", f"x-amz-meta-{WRITE_ID}": self.write_id}
        fields.update(self.target.put_fields if self.part is None else self.target.part_fields)
        return fields

    def receive(self, head: Head) -> memoryview | None:
        self.answer_etag = head.etag()
        return None

    def collected(self, head: Head, body: bytes) -> None:
        super().collected(head, body)
        if ERROR in body:
            self.refuse(head, body)  # a failure that S3 saw too late for another status
        if self.answer_etag is None:
            raise Retry(Cause.SERVER, "the answer is not that of S3 to a write: it has no ETag")

    def refuse(self, head: Head, body: bytes) -> None:
        if self.write_id is not None and head.status == 412:
            raise errors.AlreadyExists("the object exists already, and overwriting was not allowed", uri=self.uri)
        super().refuse(head, body)


def _stored_checksum(head: Head) -> tuple[str, str] | None:
    """The checksum of the whole object that an answer tells; not one of its parts' checksums, which ends in ``-N``."""
    for algorithm in ALGORITHMS if head.stored_checksums() else ():
        value = head.get(f"x-amz-checksum-{algorithm}")
        if value and "-" not in value:
            return algorithm, value
    return None
