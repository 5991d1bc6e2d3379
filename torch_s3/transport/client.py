"""The transport's face: reads and writes of objects, one or many at once. boto3 for the calls that carry no data."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

from botocore.awsrequest import AWSResponse, HeadersDict
from urllib3 import HTTPResponse

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.transport import loop
from torch_s3.transport.answer import bare_etag
from torch_s3.transport.endpoint import Account, Place, translated
from torch_s3.transport.listing import List
from torch_s3.transport.objects import WRITE_ID, Get, Put
from torch_s3.transport.ranges import split
from torch_s3.transport.retry import Renew, Renewal
from torch_s3.transport.sigv4 import Credentials
from torch_s3.transport.stats import Stats, summary
from torch_s3.transport.transfer import Call, Patience, Sink, Target, Transfer

_CHECK = 1.0  # seconds between looks at the credentials
_SIGNING = ("authorization", "host", "x-amz-date")
_NOT_SENT = (*_SIGNING, "amz-sdk-invocation-id", "amz-sdk-request", "content-length", "expect", "user-agent")
_asked: ContextVar[str] = ContextVar("asked")  # the uri that a call of this thread is about


class Client:
    """Objects of one configuration. Any thread, any process: what holds sockets or locks is made anew after fork and
    never pickled.
    """

    def __init__(self, config: S3Config) -> None:
        self.config = config
        self.algorithm = "crc64nvme" if config.checksums else None  # of what is written
        self._places: dict[str, Place] = {}
        self._own: _Own | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": None}

    def target(self, bucket: str, uri: str) -> Target:
        """The bucket with the credentials of now.

        Raises:
            NoCredentials: There are none.
        """
        own, now = self.own(uri), time.monotonic()
        if now >= own.checked + _CHECK:  # botocore refreshes credentials minutes before they expire
            credentials = own.account.credentials(uri)
            if credentials != own.credentials:
                own.targets.clear()
            own.checked, own.credentials = now, credentials
        target = own.targets.get(bucket)
        if target is None:
            target = own.targets[bucket] = self._target(own, bucket, uri)
        return target

    def _target(self, own: _Own, bucket: str, uri: str) -> Target:
        place = self._places.get(bucket)
        if place is None:
            with translated(uri):
                place = self._places[bucket] = own.account.place(bucket)
        config = self.config
        patience = Patience(
            config.attempts, config.first_byte_timeout, config.read_timeout, config.total_timeout, config.slow_after
        )
        return Target(*place, own.credentials, patience, (), (), (), config.checksums, self._renewed, own.stats)

    def _renewed(self, old: Target, bucket: str, refused: Renew) -> Target:
        """A target for one that was refused. In a thread of its own, for it may block.

        Raises:
            S3Error: There is no other.
        """
        uri = f"s3://{bucket}"
        own = self.own(uri)
        with own.lock:  # of many that were refused at once, one finds anew
            if refused.renewal is Renewal.CREDENTIALS:
                if own.credentials == old.credentials:
                    own.account = self._account(uri)  # reads files and environment again
                own.checked = float("-inf")
            else:
                with translated(uri):
                    place = own.account.moved(bucket, refused.hint)
                if place is None or place[:4] == old[:4]:
                    raise refused.error
                self._places[bucket] = place
                own.targets.pop(bucket, None)
            target = self.target(bucket, uri)
        if target.credentials == old.credentials and refused.renewal is Renewal.CREDENTIALS:
            raise refused.error
        return target

    def call(self, operation: str, uri: str, **parameters: Any) -> Any:
        """One S3 call that carries no object data, e.g. ``call("head_object", uri, Bucket=…, Key=…)``.

        botocore puts it together and reads the answer; the transport signs and carries it, and tries again.

        Raises:
            S3Error: It failed.
        """
        with translated(uri), self._about(uri):
            return getattr(self._planner(uri), operation)(**parameters)

    def region(self, uri: str) -> str:
        """The region that calls go to."""
        with translated(uri):
            return str(self._planner(uri).meta.region_name)

    def pages(self, operation: str, uri: str, **parameters: Any) -> Iterable[dict[str, Any]]:
        """The pages of a listing, errors as in :meth:`call`."""
        with translated(uri):
            pages = iter(self._planner(uri).get_paginator(operation).paginate(**parameters))
            while True:
                with self._about(uri):
                    page = next(pages, None)
                if page is None:
                    return
                yield page

    def batch(self) -> Batch:
        """A group of transfers of the calling thread."""
        return Batch(self)

    def stats(self) -> dict[str, Any]:
        """What has been done in this process, see :meth:`torch_s3.S3FileSystem.stats`."""
        own = self._own
        return summary(own.stats if own is not None and own.pid == os.getpid() else [Stats()])

    def wrote(self, bucket: str, key: str, write_id: str) -> str | None:
        """Read back: the object's ETag if it carries ``write_id``, ``None`` if it is another one or there is none.

        Raises:
            S3Error: It can't be found out.
        """
        try:
            head = self.call("head_object", f"s3://{bucket}/{key}", Bucket=bucket, Key=key)
        except errors.NotFound:
            return None
        return bare_etag(head["ETag"]) if head.get("Metadata", {}).get(WRITE_ID) == write_id else None

    def own(self, uri: str) -> _Own:
        """What belongs to this process."""
        own = self._own
        if own is None or own.pid != os.getpid():
            account = self._account(uri)
            own = self._own = _Own(account, [Stats() for _ in range(self.config.loops)])
        return own

    def _account(self, uri: str) -> Account:
        with translated(uri):
            account = Account(self.config)
            account.check_certificates(uri)
            return account

    def _planner(self, uri: str) -> Any:
        own = self.own(uri)
        if own.planner is None:
            own.planner = own.account.planner(self._send)
        return own.planner

    @contextmanager
    def _about(self, uri: str) -> Iterator[None]:
        token = _asked.set(uri)
        try:
            yield
        finally:
            _asked.reset(token)

    def _send(self, request: Any, **_: Any) -> Any:
        """Carry a request that botocore has put together: its ``before-send`` handler."""
        url = urlsplit(request.url)
        uri = _asked.get()
        bucket = uri.removeprefix("s3://").partition("/")[0]
        target = self.target(bucket, uri) if bucket else self._service(uri, url)
        given = ((name.lower(), value) for name, value in request.headers.items())
        fields = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in given
            if name not in _NOT_SENT
        }
        body = request.body or b""
        body = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else body.read()
        fields["x-amz-content-sha256"] = hashlib.sha256(body).hexdigest()
        if body or request.method in ("PUT", "POST"):
            fields["content-length"] = str(len(body))
        query = "&".join(sorted(part if "=" in part else f"{part}=" for part in url.query.split("&") if part))
        with self.batch() as batch:
            call = batch.call(target, uri, method=request.method, path=url.path, query=query, fields=fields, body=body)
            batch.wait(call)
        head, answer = call.answer
        raw = HTTPResponse(io.BytesIO(answer), preload_content=False)
        return AWSResponse(request.url, head.status, HeadersDict(head.all()), raw)

    def _service(self, uri: str, url: SplitResult) -> Target:
        """The service itself, for calls about no bucket."""
        bucket = self.target("-", uri)
        host = url.hostname or ""
        origin = bucket.origin._replace(host=host)
        return bucket._replace(origin=origin, host=url.netloc, base="/")


class _Own:
    """What one process has of a client: sockets, locks and counters."""

    def __init__(self, account: Account, stats: list[Stats]) -> None:
        self.pid = os.getpid()
        self.account = account
        self.stats = stats
        self.planner: Any = None
        self.targets: dict[str, Target] = {}
        self.credentials: Credentials | None = None
        self.checked = float("-inf")  # when the credentials were asked for
        self.lock = threading.Lock()


class Batch:
    """Transfers of one thread: started together, waited for in any order.

    Leaving the ``with`` block cancels what is unfinished and waits until nothing writes to its memory any more. A batch
    belongs to the process that made it.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._sink: Sink = SimpleQueue()
        self._new: list[Transfer] = []
        self._unfinished: set[Transfer] = set()
        self._pid = os.getpid()
        self._turn = 0  # of the loops
        self.part_size = client.config.part_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(
        self,
        bucket: str,
        key: str,
        *,
        start: int = 0,
        stop: int | None = None,
        into: memoryview | None = None,
        etag: str | None = None,
        open_end: bool = False,
        at_most: int | None = None,
        version_id: str | None = None,
    ) -> Get:
        """Ask for bytes, see :class:`~torch_s3.transport.transfer.Get`; sent by the next start() or wait()."""
        target = self._client.target(bucket, f"s3://{bucket}/{key}")
        transfer = Get(
            target,
            bucket,
            key,
            self._sink,
            start=start,
            stop=stop,
            into=into,
            etag=etag,
            open_end=open_end,
            at_most=at_most,
            version_id=version_id,
        )
        self._new.append(transfer)
        return transfer

    def get_into(
        self,
        bucket: str,
        key: str,
        start: int,
        buffer: memoryview,
        *,
        etag: str | None = None,
        part_size: int | None = None,
        version_id: str | None = None,
    ) -> list[Get]:
        """Ask for ``len(buffer)`` bytes from ``start`` in parallel ranges, received into ``buffer`` itself.

        Wait for them with :meth:`wait_whole`.
        """
        parts = split(start, start + len(buffer), part_size=part_size or self.part_size)
        return [
            self.get(bucket, key, start=a, stop=b, into=buffer[a - start : b - start], etag=etag, version_id=version_id)
            for a, b in parts
        ]

    def fetch(
        self,
        bucket: str,
        key: str,
        *,
        start: int = 0,
        stop: int | None = None,
        size: int | None = None,
        etag: str | None = None,
        version_id: str | None = None,
    ) -> Fetch:
        """Ask for an object, or what there is of ``[start, stop)``; see :class:`Fetch`."""
        return Fetch(self, bucket, key, start, stop, size, etag, version_id)

    def put(
        self,
        bucket: str,
        key: str,
        body: memoryview,
        *,
        part: tuple[str, int] | None = None,
        only_new: bool = False,
        algorithm: str | None = None,
    ) -> Put:
        """Send an object or a part, see :class:`~torch_s3.transport.objects.Put`. ``body`` isn't copied.

        Args:
            bucket: Where.
            key: Of the object.
            body: Its bytes, or the part's.
            part: ``(upload id, part number)``.
            only_new: Fail where the key exists already.
            algorithm: Of a part's checksum, which its upload was begun with.
        """
        target = self._client.target(bucket, f"s3://{bucket}/{key}")
        write_id = uuid.uuid4().hex if only_new else None
        algorithm = self._client.algorithm if part is None else algorithm
        transfer = Put(target, bucket, key, self._sink, body, algorithm=algorithm, part=part, write_id=write_id)
        self._new.append(transfer)
        return transfer

    def page(self, bucket: str, prefix: str, *, delimiter: str = "", token: str | None = None) -> List:
        """Ask for a page of a listing, see :class:`~torch_s3.transport.listing.List`."""
        target = self._client.target(bucket, f"s3://{bucket}/{prefix}")
        transfer = List(target, bucket, prefix, self._sink, delimiter=delimiter, token=token)
        self._new.append(transfer)
        return transfer

    def call(self, target: Target, uri: str, **request: Any) -> Call:
        """Carry a call, see :class:`~torch_s3.transport.transfer.Call`."""
        transfer = Call(target, uri, self._sink, **request)
        self._new.append(transfer)
        return transfer

    def start(self) -> None:
        """Hand what was asked for to the I/O thread. Several at once is cheaper: each call may have to wake it."""
        if self._pid != os.getpid():
            raise RuntimeError("these transfers were started before fork: start new ones in the child")
        if self._new:
            self._unfinished.update(self._new)
            loops = self._client.config.loops
            for number in range(min(loops, len(self._new))):
                some = self._new[number::loops]
                carrier = loop.running((self._turn + number) % loops)
                for transfer in some:
                    transfer.carrier = carrier
                carrier.submit(some)
            self._turn += len(self._new)
            self._new = []

    def wait(self, *transfers: Transfer) -> None:
        """Wait until these are finished.

        Raises:
            S3Error: The first one's that failed. The others go on until they are waited for or the batch is closed.
        """
        for transfer in transfers:
            while not transfer.finished:
                self.start()
                self._unfinished.difference_update(self._sink.get())
            self._check(transfer)
        while not self._sink.empty():  # let go of what was finished before it was waited for
            self._unfinished.difference_update(self._sink.get())

    def wait_any(self) -> Sequence[Transfer]:
        """Wait for whichever are finished next, and were not waited for before.

        Raises:
            S3Error: One failed.
        """
        self.start()
        transfers = self._sink.get()
        self._unfinished.difference_update(transfers)
        for transfer in transfers:
            self._check(transfer)
        return transfers

    def _check(self, transfer: Transfer) -> None:
        if transfer.error is not None and not self._settled(transfer):
            # A copy: the error's own traceback would hold this frame, this frame the transfer, and that the error and
            # the caller's memory, until the garbage collector comes by.
            raise copy.copy(transfer.error)

    def _settled(self, transfer: Transfer) -> bool:
        """Whether a failed PUT of a new object has succeeded after all, and only its answer was lost."""
        if not isinstance(transfer, Put) or transfer.write_id is None:
            return False
        refused = isinstance(transfer.error, errors.AlreadyExists) and transfer.attempt > 1
        if not refused and not isinstance(transfer.error, errors.TransferFailed):
            return False
        transfer.answer_etag = self._client.wrote(transfer.bucket, transfer.key, transfer.write_id)
        return transfer.answer_etag is not None

    def wait_whole(self, gets: Sequence[Get]) -> None:
        """Wait for ranges of one object, and check that they are of one version of it.

        Raises:
            ObjectChanged: They aren't.
            S3Error: One failed.
        """
        self.wait(*gets)
        for get in gets:
            if get.answer_etag != gets[0].answer_etag:
                raise errors.ObjectChanged("it was overwritten while it was read: read it again", uri=get.uri)

    def in_io_thread(self) -> bool:
        """Whether this is an I/O thread, as it is where that happens to collect the garbage."""
        return loop.is_io_thread()

    def close(self) -> None:
        """Cancel what is unfinished, and wait until it is, except in the I/O thread itself."""
        self._new = []
        if self._pid != os.getpid():
            return
        self._unfinished = {transfer for transfer in self._unfinished if not transfer.finished}
        if self._unfinished:
            by_carrier: dict[loop.Loop, list[Transfer]] = {}
            for transfer in self._unfinished:
                by_carrier.setdefault(transfer.carrier, []).append(transfer)
            for carrier, some in by_carrier.items():
                carrier.cancel(some)
            while self._unfinished and not self.in_io_thread():
                self._unfinished.difference_update(self._sink.get())


class Fetch:
    """An object on its way, or what there is of ``[start, stop)``: clipped at the object's end, as slices are.

    Large ones come by parallel ranges of one version. Where ``size``, the whole object's, isn't known, the first range
    tells it.
    """

    def __init__(
        self,
        batch: Batch,
        bucket: str,
        key: str,
        start: int,
        stop: int | None,
        size: int | None,
        etag: str | None,
        version_id: str | None,
    ) -> None:
        self._batch, self._bucket, self._key, self._version_id = batch, bucket, key, version_id
        self._start, self._stop, self._size = start, stop, size
        part_size = batch.part_size
        if start > 0 or stop is not None:
            first_stop = start + part_size if stop is None else min(stop, start + part_size)
            self._gets = [
                batch.get(bucket, key, start=start, stop=first_stop, etag=etag, open_end=True, version_id=version_id)
            ]
        elif size is None:
            self._gets = [batch.get(bucket, key, etag=etag, at_most=part_size, version_id=version_id)]
        elif size <= part_size:
            self._gets = [batch.get(bucket, key, etag=etag, version_id=version_id)]
        else:
            self._buffer = memoryview(bytearray(size))
            self._gets = batch.get_into(bucket, key, 0, self._buffer, etag=etag, version_id=version_id)

    def result(self) -> memoryview:
        """Wait for the bytes.

        Raises:
            ObjectChanged: The object isn't of the size or version given, or changed meanwhile.
            S3Error: It could not be read.
        """
        first = self._gets[0]
        self._batch.wait(first)
        if self._size not in (None, first.size):
            raise errors.ObjectChanged(f"it has {first.size} bytes, not {self._size} as listed", uri=first.uri)
        if len(self._gets) == 1:
            got = len(first.buffer)
            stop = first.size if self._stop is None else min(self._stop, first.size)
            if self._start + got >= stop:
                return first.buffer
            self._buffer = memoryview(bytearray(stop - self._start))
            self._buffer[:got] = first.buffer
            self._gets += self._batch.get_into(
                self._bucket,
                self._key,
                self._start + got,
                self._buffer[got:],
                etag=first.answer_etag,
                version_id=self._version_id,
            )
        self._batch.wait_whole(self._gets)
        return self._buffer

    def outcome(self) -> memoryview | errors.S3Error:
        """As :meth:`result`, but an error is returned."""
        try:
            return self.result()
        except errors.S3Error as error:
            return error
