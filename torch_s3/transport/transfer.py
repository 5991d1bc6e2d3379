"""One request and its answer: what is sent, where the body goes, and whether the answer is the one asked for."""

from __future__ import annotations

import base64
import re
import time
from abc import ABC, abstractmethod
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from zlib_ng import zlib_ng

from torch_s3 import errors
from torch_s3.transport import sigv4
from torch_s3.transport.failures import error_for
from torch_s3.transport.retry import Retry, cause_of

if TYPE_CHECKING:
    from torch_s3.transport.connection import Connection

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_FIXED_FIELDS = "user-agent: torch-s3\r\naccept-encoding: identity\r\n"
_ERROR_FIELD = re.compile(r"<(Code|Message|Region)>([^<]*)</")


class Origin(NamedTuple):
    """Where connections go and how they behave; connections are shared by equal origins."""

    scheme: str
    host: str
    port: int
    verify: bool | str
    max_connections: int
    connect_timeout: float
    read_timeout: float


class Target(NamedTuple):
    """A bucket as the transport sees it."""

    origin: Origin
    host: str  # the Host header
    base: str  # encoded path before the key, ending in "/"
    region: str
    credentials: sigv4.Credentials | None  # None: unsigned
    attempts: int


class Head:
    """Status line and header fields of an answer."""

    __slots__ = ("_lower", "_raw", "status")

    def __init__(self, raw: bytes) -> None:
        if not raw.startswith(b"HTTP/1.") or not raw[9:12].isdigit():
            raise ConnectionError("the server's answer is not HTTP/1.1")
        self._raw = raw
        self._lower = raw.lower()
        self.status = int(raw[9:12])

    def get(self, name: bytes) -> str | None:
        """The value of the first field called ``name`` (lower case), ``None`` if there is none."""
        at = self._lower.find(b"\r\n" + name + b":")
        if at < 0:
            return None
        at += len(name) + 3
        return self._raw[at : self._raw.find(b"\r\n", at)].strip().decode("latin-1")

    def length(self) -> int | None:
        """Content-Length, ``None`` if the server doesn't say."""
        value = self.get(b"content-length")
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) < 20):
            raise ConnectionError(f"Content-Length {value[:20]!r} is not a number of bytes")
        return int(value)

    def etag(self) -> str | None:
        """The ETag without quotes and weakness mark: servers differ in both."""
        value = self.get(b"etag")
        return bare_etag(value) if value else None

    def keeps_alive(self) -> bool:
        """Whether another request may follow on the same connection."""
        connection = (self.get(b"connection") or "").lower()
        return "close" not in connection and (self._raw[7:8] != b"0" or "keep-alive" in connection)


def bare_etag(etag: str) -> str:
    """An ETag as it is compared: without quotes and weakness mark."""
    return etag.removeprefix("W/").strip('"')


class Transfer(ABC):
    """A request that is tried until it succeeds or fails for good.

    Made and waited for by a caller's thread; while it is with the loop, only the loop's thread touches it. It is handed
    back through ``sink``, once, with ``finished`` set and either its answer or ``error``.
    """

    __slots__ = (
        "_sink", "answer_etag", "attempt", "began", "body", "connection", "error", "etag", "finished", "key", "target",
        "uri",
    )  # fmt: skip
    method = "GET"
    collect_limit = 1024 * 1024  # bytes of an answer whose body has no place of its own

    def __init__(self, target: Target, bucket: str, key: str, sink: SimpleQueue[Transfer], etag: str | None) -> None:
        self.target = target
        self.uri = f"s3://{bucket}/{key}"
        self.key = key
        self._sink = sink
        self.etag = etag  # pinned: the answer must be of this version
        self.body = memoryview(b"")  # sent
        self.attempt = 0
        self.began = 0.0
        self.connection: Connection | None = None
        self.answer_etag: str | None = None
        self.error: BaseException | None = None
        self.finished = False

    @property
    def query(self) -> str:
        """Encoded query string."""
        return ""

    @property
    def range(self) -> tuple[int, int] | None:
        """The bytes that errors name."""
        return None

    @abstractmethod
    def headers(self) -> dict[str, str]:
        """Header fields of this kind of request, lower case."""

    @abstractmethod
    def receive(self, head: Head) -> memoryview | None:
        """Check a successful answer's head.

        Returns:
            The memory for its body, exactly as long as the body; ``None`` for one that :meth:`collect` takes.
        """

    def collect(self, head: Head, body: bytes) -> None:  # noqa: B027 - to most kinds it says nothing
        """Take a successful answer's body, of at most ``collect_limit`` bytes.

        Raises:
            Retry: Another attempt may bring the right one.
            S3Error: None will.
        """

    def release(self) -> None:
        """Let go of the caller's memory, for callers may keep the transfer."""
        self.body = memoryview(b"")

    def request(self) -> bytes:
        """The request's head, signed now."""
        target = self.target
        path = target.base + sigv4.encode_key(self.key)
        fields = self.headers()
        fields["host"] = target.host
        if target.credentials is not None:
            fields["x-amz-date"] = sigv4.amz_date(time.time())
            if target.credentials.token:
                fields["x-amz-security-token"] = target.credentials.token
            fields["authorization"] = sigv4.authorization(
                self.method, path, self.query, fields, credentials=target.credentials, region=target.region
            )
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
        where = f"{path}?{self.query}" if self.query else path
        return f"{self.method} {where} HTTP/1.1\r\n{lines}{_FIXED_FIELDS}\r\n".encode()

    def refuse(self, head: Head, body: bytes) -> None:
        """Raise what an unsuccessful answer means; return where it is a success after all.

        Raises:
            Retry: Another attempt may succeed.
            S3Error: None will.
        """
        said = dict(_ERROR_FIELD.findall(body.decode("utf-8", "replace")))
        code, message = said.get("Code", ""), said.get("Message", "")
        words = f"{code or f'HTTP {head.status}'}{message and ': '}{message}"
        if cause := cause_of(head.status, code):
            raise Retry(cause, words)
        region = head.get(b"x-amz-bucket-region") or said.get("Region")
        raise error_for(head.status, code, words, uri=self.uri, range=self.range, region=region)

    def finish(self, error: BaseException | None = None) -> SimpleQueue[Transfer]:
        """Mark the transfer as done with.

        Returns:
            Where it has to be put, by whom it was finished. It forgets that itself, for it would hold what holds it.
        """
        self.error = error
        if error is not None:
            self.release()
        self.connection = None
        self.finished = True
        sink = self._sink
        del self._sink
        return sink


class Get(Transfer):
    """Receive ``[start, stop)`` of an object, or all of it.

    Args:
        start: First byte, 0 for a whole object.
        stop: One past the last byte. ``None``, with ``start`` 0: the whole object, in one answer.
        into: Writable memory of ``stop - start`` bytes, filled in place; ``None``: allocated when the answer's length
            is known.
        open_end: ``stop`` may lie past the object's end; what there is, is received. ``size`` then tells how long the
            object is.
    """

    __slots__ = ("buffer", "into", "open_end", "size", "start", "stop")

    def __init__(
        self,
        target: Target,
        bucket: str,
        key: str,
        sink: SimpleQueue[Transfer],
        *,
        start: int = 0,
        stop: int | None = None,
        into: memoryview | None = None,
        etag: str | None = None,
        open_end: bool = False,
    ) -> None:
        super().__init__(target, bucket, key, sink, etag)
        self.start = start
        self.stop = stop
        self.into = into
        self.open_end = open_end
        self.buffer = memoryview(b"")  # the answer: ``into``, or what was allocated
        self.size = 0  # of the whole object, once answered

    @property
    def range(self) -> tuple[int, int] | None:
        return None if self.stop is None else (self.start, self.stop)

    def headers(self) -> dict[str, str]:
        fields = {"x-amz-content-sha256": sigv4.EMPTY_SHA256}
        if self.stop is not None:
            fields["range"] = f"bytes={self.start}-{self.stop - 1}"
        if self.etag is not None:
            fields["if-match"] = f'"{self.etag}"'
        return fields

    def receive(self, head: Head) -> memoryview | None:
        length, answer_range = head.length(), head.get(b"content-range")
        if length is None or head.get(b"transfer-encoding") is not None:
            raise self._wrong("the server did not say how long its answer is (Content-Length)")
        first, last, size = 0, length - 1, length
        if answer_range is not None:
            match = _CONTENT_RANGE.fullmatch(answer_range)
            if match is None or match[1] is None:
                raise self._wrong(f"the server answered with Content-Range {answer_range!r}")
            first, last, size = int(match[1]), int(match[2]), int(match[3])
        elif head.status == 206:
            raise self._wrong("the server answered 206 without Content-Range")
        stop = size if self.stop is None or (self.open_end and size < self.stop) else self.stop
        if (first, last + 1) != (self.start, stop) or length != stop - self.start:
            got = f"bytes {first}-{last} of {size}" if answer_range else f"the whole object of {length} bytes"
            raise self._wrong(f"the server answered with {got}, {length} bytes long")
        etag = head.etag()
        if self.etag is not None and etag is not None and etag != self.etag:
            raise errors.ObjectChanged(f"its ETag is {etag}, expected {self.etag}", uri=self.uri, range=self.range)
        if self.into is not None and len(self.into) != length:
            raise self._wrong(f"the object has {length} bytes, expected {len(self.into)}")
        self.buffer = memoryview(bytearray(length)) if self.into is None else self.into
        self.answer_etag, self.size = etag, size
        return self.buffer

    def refuse(self, head: Head, body: bytes) -> None:
        if head.status == 412 and self.etag is not None:
            raise errors.ObjectChanged(f"its ETag is no longer {self.etag}", uri=self.uri, range=self.range)
        if head.status == 416 and self.open_end:
            # It ends before ``start``: nothing is there, and an empty object has no byte 0.
            self.buffer, self.size = memoryview(b""), 0  # not what an attempt that broke off left
            return
        super().refuse(head, body)

    def release(self) -> None:
        super().release()
        self.into, self.buffer = None, memoryview(b"")

    def _wrong(self, message: str) -> errors.IntegrityError:
        return errors.IntegrityError(message, uri=self.uri, range=self.range)


class Put(Transfer):
    """Send an object, or one part of a multipart upload, with its CRC32 for the server to check.

    Args:
        body: The bytes; not copied, so it must not change until the transfer is finished.
        part: ``(upload id, part number)`` of a multipart upload.
        only_new: Fail where the key exists already.
    """

    __slots__ = ("crc32", "only_new", "part")
    method = "PUT"

    def __init__(
        self,
        target: Target,
        bucket: str,
        key: str,
        sink: SimpleQueue[Transfer],
        body: memoryview,
        *,
        part: tuple[str, int] | None = None,
        only_new: bool = False,
    ) -> None:
        super().__init__(target, bucket, key, sink, None)
        self.body = body
        self.part = part
        self.only_new = only_new
        self.crc32 = base64.b64encode(zlib_ng.crc32(body).to_bytes(4, "big")).decode()

    @property
    def query(self) -> str:
        if self.part is None:
            return ""
        return f"partNumber={self.part[1]}&uploadId={sigv4.encode_query(self.part[0])}"

    def headers(self) -> dict[str, str]:
        fields = {
            "content-length": str(len(self.body)),
            "x-amz-checksum-crc32": self.crc32,
            "x-amz-content-sha256": sigv4.UNSIGNED_PAYLOAD,
        }
        if self.only_new:
            fields["if-none-match"] = "*"
        return fields

    def receive(self, head: Head) -> memoryview | None:
        self.answer_etag = head.etag()
        return None

    def refuse(self, head: Head, body: bytes) -> None:
        if self.only_new and head.status in (409, 412):
            raise errors.AlreadyExists("the object exists already, and overwriting was not allowed", uri=self.uri)
        super().refuse(head, body)
