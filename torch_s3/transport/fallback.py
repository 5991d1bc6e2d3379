"""The transfers of objects' data that boto3 carries, where the transport can't: S3 Express, SigV4A, proxies.

As exact as the I/O thread, but not as fast: a few threads, each of which carries one transfer at a time. They end when
there is nothing to carry, and start again when there is.

Contract, any difference is a bug: that of :mod:`torch_s3.transport.loop`. Every submitted transfer is handed back
exactly once, finished; after that nothing writes to its memory. One that is cancelled, or too late, while an answer is
awaited comes back at once, and its thread when boto3 lets go of it; one whose body comes, when its socket is shut.
"""

from __future__ import annotations

import email.utils
import io
import os
import random
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import botocore.exceptions as refused
import urllib3.exceptions
from botocore import xform_name

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.seekable import Seekable
from torch_s3.transport import sigv4
from torch_s3.transport.answer import Head
from torch_s3.transport.endpoint import Account, translated
from torch_s3.transport.failures import final
from torch_s3.transport.retry import Cause, Quota, Renew, Renewal, Retry
from torch_s3.transport.stats import Stats
from torch_s3.transport.transfer import Transfer

_THREADS = 16
_BLOCK = 64 * 1024
_PROGRESS = 64 * 1024  # bytes that count as progress, as in the transport
_SIGNED = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/\d{8}/(?P<region>[^/]+)/s3/aws4_request, ?"
    r"SignedHeaders=(?P<names>[^,]+), ?Signature="
)
_METADATA = "x-amz-meta-"
_BOTO3S_OWN = ("content-length", "x-amz-content-sha256")
_LATE = (
    refused.ConnectTimeoutError,
    refused.ReadTimeoutError,
    TimeoutError,
    urllib3.exceptions.ReadTimeoutError,
)
_BROKEN = (
    refused.ConnectionError,
    refused.HTTPClientError,
    refused.IncompleteReadError,
    ConnectionError,
    urllib3.exceptions.HTTPError,
)
_Cancelled = SimpleQueue[None]  # empty until it is; not an Event, whose lock a garbage collection could find held


class _HandedBack(Exception):
    """The transfer is no longer this thread's."""


class Fallback:
    """boto3 with the face of :class:`~torch_s3.transport.loop.Loop`. It belongs to the process that made it.

    Attributes:
        pid: Of that process.
        stats: Counters, one for each thread.
    """

    def __init__(self, config: S3Config) -> None:
        self.pid = os.getpid()
        self.stats = [Stats() for _ in range(min(_THREADS, config.max_connections))]
        self._config = config
        self._free = deque(self.stats)  # of threads that don't run
        # A garbage collection may cancel in the middle of anything: so these have no lock, and each step is atomic.
        self._taken: dict[Transfer, _Cancelled] = {}
        self._waiting: OrderedDict[Transfer, None] = OrderedDict()
        self._awaiting: dict[Transfer, None] = {}  # an answer's head; whoever takes it out of here hands it back
        self._bodies: dict[Transfer, Any] = {}  # that are being received
        self._quota = Quota()
        self._rng = random.Random()
        self._made: Any = None
        self._account: Account | None = None
        self._clock_offset = 0.0  # seconds that the server's clock is ahead
        self._making = threading.Lock()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """Queue transfers, in this order. Any thread."""
        self._taken.update((transfer, SimpleQueue()) for transfer in transfers)
        self._waiting.update(dict.fromkeys(transfers))
        try:
            for _ in transfers:
                if self._free:
                    threading.Thread(target=self._run, name="torch_s3-io-boto3", daemon=True).start()
        except RuntimeError:  # the interpreter is exiting
            self.cancel(transfers)

    def cancel(self, transfers: Sequence[Transfer]) -> None:
        """Give up transfers; each comes back through its sink, finished. Any thread."""
        for transfer in transfers:
            cancelled = self._taken.get(transfer)
            if cancelled is not None:
                cancelled.put(None)
            waited = self._waiting.pop(transfer, False) is None
            if waited or (cancelled is None and not transfer.finished):  # no thread has taken it, nor will one
                self._hand_back(transfer, _ended(transfer))
            else:
                self._interrupt(transfer, _ended(transfer))

    def _interrupt(self, transfer: Transfer, error: errors.S3Error) -> None:
        """End a transfer that a thread has. Any thread."""
        if self._awaiting.pop(transfer, transfer) is None:
            self._hand_back(transfer, error)
        elif (body := self._bodies.get(transfer)) is not None:
            with suppress(AttributeError, OSError, RuntimeError, ValueError):  # it has ended, or urllib3 is old
                body.shutdown()

    # ------------------------------------------------------------------ the threads

    def _run(self) -> None:
        while self._waiting:
            try:
                stats = self._free.popleft()
            except IndexError:
                return  # enough run already
            while (transfer := self._next()) is not None:
                self._carry(transfer, stats)
            self._free.append(stats)  # and look again: whoever queued one just now may have found none free

    def _next(self) -> Transfer | None:
        try:
            return self._waiting.popitem(last=False)[0]
        except KeyError:
            return None

    def _carry(self, transfer: Transfer, stats: Stats) -> None:
        """Bring a transfer to its end, whatever that is."""
        error: BaseException | None = None
        try:
            with translated(transfer.uri):
                self._try(transfer, self._taken[transfer], stats)
            stats.received += transfer.nbytes
            stats.sent += len(transfer.body)
        except _HandedBack:
            stats.failed += 1
            return
        except Exception as failure:  # noqa: BLE001 - whatever it is belongs to this transfer, others go on
            error = final(failure, uri=transfer.uri, range=transfer.range).with_traceback(None)
            error.__context__ = None  # it and the traceback would hold frames, and these the transfer and its memory
            stats.failed += 1
        self._hand_back(transfer, error)

    def _hand_back(self, transfer: Transfer, error: BaseException | None) -> None:
        sink = transfer.finish(error)
        self._taken.pop(transfer, None)
        sink.put([transfer])

    def _try(self, transfer: Transfer, cancelled: _Cancelled, stats: Stats) -> None:
        """Try a transfer until it succeeds.

        Raises:
            S3Error, BotoCoreError: It didn't.
        """
        transfer.began = time.monotonic()
        transfer.deadline = transfer.began + transfer.target.patience.total_timeout
        while True:
            _go_on(transfer, cancelled)
            transfer.attempt += 1
            stats.requests += 1
            try:
                self._attempt(transfer, cancelled)
            except Renew as refusal:
                # The place is boto3's own concern. Credentials and clock are found again once.
                if refusal.renewal is Renewal.PLACE or refusal.renewal in transfer.renewed:
                    raise refusal.error from None
                if refusal.renewal is Renewal.CREDENTIALS:
                    self._made = None
                elif said := email.utils.parsedate_tz(refusal.hint):
                    self._clock_offset = email.utils.mktime_tz(said) - time.time()
                else:
                    raise refusal.error from None
                transfer.renewed += (refusal.renewal,)
                transfer.attempt -= 1
                continue
            except refused.SSLError:
                raise
            except _LATE as error:
                retry = Retry(Cause.TIMEOUT, str(error))
            except _BROKEN as error:
                retry = Retry(Cause.CONNECTION, str(error))
            except Retry as error:
                retry = error
            else:
                self._quota.give_back(transfer.paid)
                return
            self._pause(transfer, retry, cancelled, stats)

    def _pause(self, transfer: Transfer, retry: Retry, cancelled: _Cancelled, stats: Stats) -> None:
        """Wait until the next attempt.

        Raises:
            S3Error: There is none.
        """
        wait = transfer.until_next(retry, time.monotonic(), quota=self._quota, rng=self._rng, stats=stats)
        if isinstance(wait, errors.S3Error):
            raise wait
        with suppress(Empty):
            cancelled.get(timeout=wait)
            raise _ended(transfer)

    def _attempt(self, transfer: Transfer, cancelled: _Cancelled) -> None:
        """Make the transfer's request through boto3, and take its answer."""
        client = self._client()
        operation = "GetObject" if transfer.method == "GET" else "UploadPart" if transfer.query else "PutObject"
        parameters = _parameters(client.meta.service_model.operation_model(operation), transfer)
        if operation != "GetObject":
            parameters["Body"] = _Body(transfer, cancelled)
        try:
            with self._answer_awaited(transfer, cancelled):
                answer = getattr(client, xform_name(operation))(**parameters)
        except refused.ClientError as error:
            said = error.response.get("Error", {})
            words = [f"<{name}>{escape(said.get(name) or '')}</{name}>" for name in ("Code", "Message")]
            transfer.collected(_head(error.response), "".join(words).encode())
            return
        head = _head(answer)
        if operation != "GetObject":
            transfer.receive(head)
            return
        with answer["Body"] as body:
            rest = transfer.receive(head)
            assert rest is not None
            self._bodies[transfer] = body
            try:
                with self._in_time(transfer):
                    self._receive(transfer, body, rest, cancelled)
            finally:
                del self._bodies[transfer]
        transfer.received()

    @contextmanager
    def _answer_awaited(self, transfer: Transfer, cancelled: _Cancelled) -> Iterator[None]:
        """While boto3 makes the request: meanwhile others may hand the transfer back."""
        self._awaiting[transfer] = None
        try:
            _go_on(transfer, cancelled)
            with self._in_time(transfer):
                yield
        finally:
            if self._awaiting.pop(transfer, transfer) is not None:
                raise _HandedBack from None

    @contextmanager
    def _in_time(self, transfer: Transfer) -> Iterator[None]:
        """End a transfer that is still under way when its time is up, though every read of its socket is in time."""
        left = max(0.0, transfer.deadline - time.monotonic())
        timer = threading.Timer(min(left, threading.TIMEOUT_MAX), self._interrupt, [transfer, _late(transfer)])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _receive(self, transfer: Transfer, body: Any, rest: memoryview, cancelled: _Cancelled) -> None:
        """Receive a body into its memory."""
        receive = getattr(body, "read1", body.read)  # urllib3 2 has read1, which takes what is there
        patience, since, moved = transfer.target.patience.read_timeout, time.monotonic(), 0
        try:
            while rest:
                piece = receive(min(len(rest), _BLOCK))
                _go_on(transfer, cancelled)
                if not piece:
                    raise ConnectionResetError(f"the connection closed {len(rest)} bytes before the answer's end")
                rest[: len(piece)] = piece
                rest, moved = rest[len(piece) :], moved + len(piece)
                if moved >= _PROGRESS:
                    since, moved = time.monotonic(), 0
                elif rest and time.monotonic() > since + patience:
                    raise Retry(Cause.TIMEOUT, f"only {moved} bytes came in {patience:g} s")
        except BaseException:
            transfer.interrupted(len(rest))
            raise

    def _sign_anew(self, request: Any, **_: Any) -> None:
        """Sign by the server's clock, where that is known to be another: botocore goes by this machine's."""
        given = request.headers.get("Authorization", b"")
        signed = _SIGNED.match(given.decode() if isinstance(given, bytes) else given)
        credentials = self._account.credentials("s3://") if signed and self._clock_offset and self._account else None
        if signed is None or credentials is None or credentials.key != signed["key"]:
            return
        url = urlsplit(request.url)
        request.headers["X-Amz-Date"] = date = sigv4.amz_date(int(time.time() + self._clock_offset))
        fields = {"host": url.netloc}
        for name in signed["names"].split(";"):
            value = request.headers.get(name)
            if value is not None:
                fields[name] = value.decode() if isinstance(value, bytes) else value
        fields["x-amz-date"] = date
        stamp = sigv4.Stamp(request.method, fields, credentials=credentials, region=signed["region"])
        query = "&".join(sorted(part if "=" in part else f"{part}=" for part in url.query.split("&") if part))
        request.headers["Authorization"] = stamp.authorization(url.path, query)

    def _client(self) -> Any:
        with self._making:
            if self._made is None:  # the transfers bring their checksums, and compare; and it is here that they retry
                self._account = Account(self._config)
                made = self._account.make_client(
                    attempts=1,
                    max_pool_connections=len(self.stats),
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                )
                made.meta.events.register("before-send.s3", self._sign_anew)
                self._made = made
            return self._made


class _Body(Seekable, io.RawIOBase):
    """A transfer's body as a file that boto3 can send without a copy. Reading fails once the transfer is cancelled."""

    def __init__(self, transfer: Transfer, cancelled: _Cancelled) -> None:
        self._transfer, self._cancelled = transfer, cancelled
        self.size, self.name = len(transfer.body), transfer.uri

    def __len__(self) -> int:
        return self.size

    def readinto(self, buffer: Any, /) -> int:
        _go_on(self._transfer, self._cancelled)
        view = memoryview(buffer)
        piece = self._transfer.body[self._at : self._at + len(view)]
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _parameters(operation: Any, transfer: Transfer) -> dict[str, Any]:
    """boto3's parameters for what a transfer would put into its request's head itself."""
    names = {}
    for name, shape in operation.input_shape.members.items():
        if shape.serialization.get("location") in ("header", "querystring"):
            names[shape.serialization["name"].lower()] = (name, int if shape.type_name == "integer" else str)
    parameters: dict[str, Any] = {"Bucket": transfer.bucket, "Key": transfer.key}
    metadata = {}
    for word, value in [*transfer.headers().items(), *parse_qsl(transfer.query)]:
        if word.startswith(_METADATA):
            metadata[word.removeprefix(_METADATA)] = value
        elif word not in _BOTO3S_OWN:
            name, kind = names[word.lower()]
            parameters[name] = kind(value)
    return parameters | ({"Metadata": metadata} if metadata else {})


def _head(answer: dict[str, Any]) -> Head:
    said = answer["ResponseMetadata"]
    lines = "".join([f"{name}: {value}\r\n" for name, value in said["HTTPHeaders"].items()])
    return Head(f"HTTP/1.1 {said['HTTPStatusCode']}\r\n{lines}".encode("latin-1", "replace"))


def _go_on(transfer: Transfer, cancelled: _Cancelled) -> None:
    if not cancelled.empty():
        raise _ended(transfer)
    if time.monotonic() >= transfer.deadline:
        raise _late(transfer)


def _late(transfer: Transfer) -> errors.DeadlineExceeded:
    words = f"not done within {transfer.target.patience.total_timeout:g} s"
    return errors.DeadlineExceeded(words, uri=transfer.uri, range=transfer.range)


def _ended(transfer: Transfer) -> errors.S3Error:
    return errors.S3Error("cancelled", uri=transfer.uri, range=transfer.range)
