"""One request and its answer: what is sent, where the body goes, and whether the answer is the one asked for."""

from __future__ import annotations

import email.utils
import random
import re
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from html import unescape
from queue import SimpleQueue
from typing import TYPE_CHECKING

from torch_s3.errors import S3Error
from torch_s3.transport import sigv4
from torch_s3.transport.answer import Head
from torch_s3.transport.failures import error_for, given_up, renewal_for
from torch_s3.transport.lines import say
from torch_s3.transport.retry import Cause, Quota, Renew, Renewal, Retry, cause_of, delay, retry_after
from torch_s3.transport.stats import Stats
from torch_s3.transport.target import Patience, Stamped, Target

if TYPE_CHECKING:
    from torch_s3.transport.connection import Connection
    from torch_s3.transport.fallback import Fallback
    from torch_s3.transport.loop import Loop

_FIXED_FIELDS = {"user-agent": "torch-s3", "accept-encoding": "identity"}  # not signed
_SKEW = 300  # seconds between the clocks that S3 may have refused
_ERROR_FIELD = re.compile(r"<(Code|Message|Region)>([^<]*)</")
ERROR = b"<Error>"
"""What an answer under status 200 has in it that is none."""


class Sink(SimpleQueue[list["Transfer"]]):
    """Where finished transfers are handed back to the thread that waits for them.

    Attributes:
        wanted: The one that it sleeps for: until that is finished, its loop need not wake it for others.
    """

    wanted: Transfer | None = None


class Transfer(ABC):
    """A request that is tried until it succeeds or fails for good.

    Made and waited for by a caller's thread; while it is with the loop, only the loop's thread touches it. It is handed
    back through ``sink``, once, with ``finished`` set and either its answer or ``error``.

    Attributes:
        attempt: Number of the attempt under way, from 1.
        began: When the first one began, in the loop's time; 0 before.
        began_attempt: When this one did.
        carrier: What it is with.
        deadline: When the whole is given up, in the loop's time.
        paid: Tokens that its last retry cost, see :class:`~torch_s3.transport.retry.Quota`.
        renewed: What has been found anew for it.
        hurried: It was slow to answer, and has been sent again for that.
    """

    __slots__ = (
        "_sink", "answer_etag", "attempt", "began", "began_attempt", "body", "bucket", "carrier", "connection",
        "deadline", "error", "etag", "finished", "hurried", "key", "paid", "renewed", "target", "uri",
    )  # fmt: skip
    method = "GET"
    partial = False  # the answer has more than is received
    collect_limit = 1024 * 1024  # bytes of an answer that has no place of its own

    def __init__(self, target: Target, bucket: str, key: str, sink: Sink, etag: str | None) -> None:
        self.target = target
        self.bucket = bucket
        self.key = key
        self.uri = f"s3://{bucket}/{key}"
        self._sink = sink
        self.etag = etag  # pinned: the answer must be of this version
        self.body = memoryview(b"")  # sent
        self.attempt = 0
        self.began = self.began_attempt = self.deadline = 0.0
        self.paid = 0
        self.renewed: tuple[Renewal, ...] = ()
        self.hurried = False
        self.carrier: Loop | Fallback
        self.connection: Connection | None = None
        self.answer_etag: str | None = None
        self.error: BaseException | None = None
        self.finished = False

    @property
    def operation(self) -> str:
        """S3's name of the call, "" where botocore reads the answer."""
        return ""

    @property
    def query(self) -> str:
        """Encoded query string."""
        return ""

    @property
    def path(self) -> str:
        """Encoded path."""
        return self.target.base + sigv4.encode_key(self.key)

    @property
    def range(self) -> tuple[int, int] | None:
        """The bytes that errors name."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of data that it has received."""
        return 0

    @property
    def patience(self) -> Patience:
        """How long it is waited for."""
        return self.target.patience

    @property
    def small(self) -> bool:
        """Whether it may be sent a second time just because its answer is late."""
        return False

    @abstractmethod
    def headers(self) -> dict[str, str]:
        """Header fields of this kind of request, lower case, without those of every request."""

    def conditions(self) -> dict[str, str]:
        """Those of them that aren't signed, for the answer shows whether they were heeded."""
        return {}

    @property
    def alike(self) -> str:
        """What requests have in common whose signed header fields are the same; "" where they are each its own."""
        return ""

    @abstractmethod
    def receive(self, head: Head) -> memoryview | None:
        """Check a successful answer's head.

        Returns:
            The memory for its body, exactly as long as the body; ``None`` when the body has no place of its own.
        """

    def received(self) -> None:  # noqa: B027 - nothing, unless a kind has bodies with a place
        """Check the body that has come whole into the memory that :meth:`receive` gave.

        Raises:
            Retry: It is damaged.
        """

    def collected(self, head: Head, body: bytes) -> None:
        """Take a whole answer whose body has no place of its own.

        Raises:
            Retry, Renew, S3Error: What it means, where it isn't a success.
        """
        if head.status not in (200, 206):
            self.refuse(head, body)

    def interrupted(self, missing: int) -> None:  # noqa: B027 - ditto
        """Note that an attempt broke off when ``missing`` bytes of the body had not come."""

    def release(self) -> None:
        """Let go of the caller's memory, for callers may keep the transfer."""
        self.body = memoryview(b"")

    def request(self, now: float) -> bytes:
        """The request's head, signed as of ``now``, in seconds since the epoch by the server's clock."""
        second, alike, stamps = int(now), self.alike, self.target.stamps
        stamped = stamps.get(alike)
        if stamped is None or stamped.second != second:
            stamped = self._stamped(second)
            if alike:
                stamps[alike] = stamped
        path, query = self.path, self.query
        where = f"{path}?{query}" if query else path
        signature = f"authorization: {stamped.stamp.authorization(path, query)}\r\n" if stamped.stamp else ""
        conditions = self.conditions()
        lines = f"{_lines(conditions) if conditions else ''}{stamped.lines}{signature}"
        return f"{self.method} {where} HTTP/1.1\r\n{lines}\r\n".encode()

    def _stamped(self, second: int) -> Stamped:
        target, fields = self.target, self.headers()
        for name in self.conditions():
            del fields[name]
        fields["host"] = target.host
        stamp = None
        if target.credentials is not None:
            fields["x-amz-date"] = sigv4.amz_date(second)
            if target.credentials.token:
                fields["x-amz-security-token"] = target.credentials.token
            stamp = sigv4.Stamp(self.method, fields, credentials=target.credentials, region=target.region)
        return Stamped(second, stamp, _lines(fields | _FIXED_FIELDS))

    def refuse(self, head: Head, body: bytes) -> None:
        """Raise what an unsuccessful answer means; return where it is a success after all.

        Raises:
            Retry: Another attempt may succeed.
            Renew: One may, with what was assumed of the bucket found anew.
            S3Error: None will.
        """
        said = dict(_ERROR_FIELD.findall(body.decode("utf-8", "replace")))
        code, message = said.get("Code", ""), unescape(said.get("Message", ""))
        words = f"{code or f'HTTP {head.status}'}{message and ': '}{message}"
        if cause := cause_of(head.status, code):
            raise Retry(cause, words, after=retry_after(head.get("retry-after")))
        region = head.get("x-amz-bucket-region") or said.get("Region")
        error = error_for(
            head.status, code, words, uri=self.uri, range=self.range, region=region, operation=self.operation
        )
        renewal = renewal_for(head.status, code)
        if self.method == "HEAD" and renewal is None:  # answers to HEAD have no body to say why
            renewal = self._likely(head, region)
        if renewal is not None:
            hints = {Renewal.CLOCK: head.get("date"), Renewal.PLACE: region or head.get("location")}
            raise Renew(renewal, error, hints.get(renewal) or "")
        raise error

    def _likely(self, head: Head, region: str | None) -> Renewal | None:
        """What is worth finding anew after a refusal that gives no reason."""
        if head.status not in (400, 403):
            return None
        if region not in (None, self.target.region):
            return Renewal.PLACE
        said = email.utils.parsedate_tz(head.get("date") or "")
        if said is not None and abs(email.utils.mktime_tz(said) - time.time()) > _SKEW:
            return Renewal.CLOCK
        return Renewal.CREDENTIALS if head.status == 400 else None

    def until_next(
        self, failed: Retry, now: float, *, quota: Quota, rng: random.Random, stats: Stats
    ) -> float | S3Error:
        """Pay for another attempt after one that failed, if there is to be one.

        Args:
            failed: How.
            now: Seconds, by the clock of ``began`` and ``deadline``.
            quota: Of the server.
            rng: Spreads the attempts of many.
            stats: Counts them.

        Returns:
            Seconds to wait for it, or the error where there is none: not raised, for it would hold frames, and these
            the caller's memory.
        """
        cause, reason = failed.cause, str(failed)
        wait = max(failed.after, delay(cause, self.attempt, rng))
        patience = self.target.patience
        if now + wait >= self.deadline:
            cause, reason = Cause.TIMEOUT, f"not done within {patience.total_timeout:g} s; at last: {reason}"
        elif self.attempt < patience.attempts:
            self.paid = quota.take(cause)
            if self.paid:
                stats.retries[cause.value] += 1
                say("%s: %s (attempt %d), again in %.2f s", self.uri, reason, self.attempt, wait)
                return wait
            reason += "; too many requests to this server have failed to try more often"
        return self.given_up(cause, reason, now)

    def given_up(self, cause: Cause, reason: str, now: float) -> S3Error:
        """The error where it isn't tried again, see :func:`~torch_s3.transport.failures.given_up`."""
        tries = (self.attempt, self.target.patience.attempts, now - self.began)
        return given_up(cause, reason, *tries, uri=self.uri, range=self.range)

    def finish(self, error: BaseException | None = None) -> Sink:
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


def _lines(fields: dict[str, str]) -> str:
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    if not lines.count("\r") == lines.count("\n") == len(fields):
        raise ValueError("a header field, such as metadata, has a line break in it")
    return lines


class Call(Transfer):
    """A request that botocore has put together and whose answer it will read; its body is collected whole.

    Args:
        uri: What it is about.
        method: GET, HEAD, PUT, POST or DELETE.
        path: Encoded, what follows the target's base.
        query: Encoded, its parameters sorted by name.
        fields: Header fields by lower-case name, without those of a signature.
        body: Sent after the head.
    """

    __slots__ = ("_fields", "_path", "_query", "answer", "method")
    collect_limit = 64 * 1024 * 1024

    def __init__(
        self,
        target: Target,
        bucket: str,
        uri: str,
        sink: Sink,
        *,
        method: str,
        path: str,
        query: str,
        fields: dict[str, str],
        body: bytes,
    ) -> None:
        super().__init__(target, bucket, "", sink, None)
        self.uri = uri
        self.method = method
        self._path = path
        self._query = query
        self._fields = fields
        self.body = memoryview(body)
        self.answer: tuple[Head, bytes]

    @property
    def query(self) -> str:
        return self._query

    @property
    def path(self) -> str:
        return self.target.base + self._path

    @property
    def patience(self) -> Patience:
        given = self.target.patience
        if "x-amz-copy-source" not in self._fields and not (self.method == "POST" and self.body):
            return given
        longer = given.completion_timeout  # S3 copies, completes or deletes before it answers
        return given._replace(
            first_byte_timeout=max(given.first_byte_timeout, longer), read_timeout=max(given.read_timeout, longer)
        )

    def headers(self) -> dict[str, str]:
        return dict(self._fields)

    def receive(self, head: Head) -> memoryview | None:
        return None

    def collected(self, head: Head, body: bytes) -> None:
        if head.status >= 300 or ERROR in body[:4096]:  # under status 200 too: a failure that S3 saw too late
            with suppress(S3Error):  # botocore reads the answer
                self.refuse(head, body)
        elif self.method == "HEAD" and self._path and head.etag() is None and head.get("last-modified") is None:
            raise Retry(Cause.SERVER, "the answer is not about an object: it has neither ETag nor Last-Modified")
        self.answer = head, body
