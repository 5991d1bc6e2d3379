"""The transport's face: reads and writes of objects, one or many at once. boto3 for the calls that carry no data."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from botocore.awsrequest import AWSResponse, HeadersDict
from urllib3 import HTTPResponse

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.transport.answer import bare_etag
from torch_s3.transport.batch import Batch
from torch_s3.transport.endpoint import Account, Place, checked, translated
from torch_s3.transport.fallback import Fallback
from torch_s3.transport.fields import headers_for
from torch_s3.transport.objects import WRITE_ID
from torch_s3.transport.retry import Renew, Renewal
from torch_s3.transport.sigv4 import Credentials
from torch_s3.transport.stats import Stats, summary
from torch_s3.transport.target import Patience, Target
from torch_s3.transport.transfer import Call

log = logging.getLogger("torch_s3")

_CHECK = 1.0  # seconds between looks at the credentials
_SIGNING = ("authorization", "host", "x-amz-date")
_NOT_SENT = (*_SIGNING, "amz-sdk-invocation-id", "amz-sdk-request", "content-length", "expect", "user-agent")
_THREADS = 16
_asked: ContextVar[tuple[str, str]] = ContextVar("asked")  # the uri and bucket that a call of this thread is about
_groups: ContextVar[tuple[_Group, ...]] = ContextVar("groups", default=())  # that its calls belong to


Item = TypeVar("Item")
Result = TypeVar("Result")


class _Group:
    """Calls of several threads, which end together."""

    def __init__(self) -> None:
        self.ended = False
        self._flying: dict[Call, None] = {}  # each step is atomic

    @contextmanager
    def carries(self, call: Call) -> Iterator[None]:
        """While a call is under way."""
        self._flying[call] = None
        try:
            if self.ended:
                call.carrier.cancel([call])
            yield
        finally:
            del self._flying[call]

    def end(self) -> None:
        """Cancel what is under way, and whatever is begun from now on."""
        self.ended = True
        for call in list(self._flying):
            call.carrier.cancel([call])


class Client:
    """Objects of one configuration. Any thread, any process: what holds sockets or locks is made anew after fork and
    never pickled.
    """

    def __init__(self, config: S3Config) -> None:
        self.config = config
        self.algorithm = "crc64nvme" if config.checksums else None  # of what is written
        # What botocore said of each bucket is kept, so that workers need not ask it again: that takes it a while.
        self._places: dict[str, Place] = {}
        self._detours: dict[str, str | None] = {}  # why its data goes by boto3
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
            credentials = self._credentials(own, uri)
            if credentials != own.credentials:
                own.credentials = credentials
            own.checked = now
        target = own.targets.get(bucket)
        if target is None or target.credentials is not own.credentials:
            target = own.targets[bucket] = self._target(own, bucket, uri)
        return target

    def _credentials(self, own: _Own, uri: str) -> Credentials | None:
        config = self.config
        if config.anon:
            return None
        if config.key is None or config.secret is None:
            return own.account.credentials(uri)
        return checked(Credentials(config.key, config.secret, config.token), uri)

    def _target(self, own: _Own, bucket: str, uri: str, moved: Place | None = None) -> Target:
        with translated(uri):
            place = moved or self._places.get(bucket)
            if place is None:
                place = self._places[bucket] = own.account.place(bucket)
            if bucket not in self._detours:
                self._detours[bucket] = own.account.needs_boto3(bucket)
            if reason := self._detours[bucket]:
                log.debug("s3://%s: by boto3, for %s", bucket, reason)
        config, fields = self.config, headers_for(self.config)
        return Target(
            *place,
            credentials=own.credentials,
            patience=Patience(**{name: getattr(config, name) for name in Patience._fields}),
            get_fields=fields.get,
            put_fields=fields.put,
            part_fields=fields.part,
            verify_checksums=config.checksums,
            renew=self._renewed,
            stats=own.stats,
            stamps={},
            fallback=own.fallback if reason else None,
        )

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
                    own.forget_account()
                own.checked = float("-inf")
            else:
                with translated(uri):
                    place = own.account.moved(bucket, refused.hint)
                if place is None or place[:4] == old[:4]:
                    raise refused.error
                if "://" in refused.hint:  # for the time being
                    return self._target(own, bucket, uri, place)
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
        with self._about(uri, parameters) as client:
            return getattr(client, operation)(**self.own(uri).account.parameters_for(operation) | parameters)

    def region(self, uri: str) -> str:
        """The region that calls go to."""
        with translated(uri):
            return str(self.own(uri).account.asked.meta.region_name)

    def pages(self, operation: str, uri: str, **parameters: Any) -> Iterable[dict[str, Any]]:
        """The pages of a listing, errors as in :meth:`call`."""
        pages: Iterator[dict[str, Any]] | None = None
        while True:
            with self._about(uri, parameters) as client:
                if pages is None:
                    parameters = self.own(uri).account.parameters_for(operation) | parameters
                    pages = iter(client.get_paginator(operation).paginate(**parameters))
                page = next(pages, None)
            if page is None:
                return
            yield page

    def side_by_side(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results of ``work``, which makes calls, for each of many items, in order; sixteen at a time.

        The first exception, also one in the calling thread, cancels the calls under way and is raised once they have
        ended.
        """
        items, group = list(items), _Group()
        if len(items) < 2:
            return [work(item) for item in items]
        token = _groups.set((*_groups.get(), group))
        try:
            context = copy_context()
        finally:
            _groups.reset(token)
        executor = ThreadPoolExecutor(min(_THREADS, len(items)), thread_name_prefix="torch_s3-calls")
        try:
            futures = [executor.submit(context.copy().run, work, item) for item in items]
            for future in as_completed(futures):
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            group.end()
            raise
        finally:
            executor.shutdown(cancel_futures=True)

    def batch(self) -> Batch:
        """A group of transfers of the calling thread."""
        return Batch(self)

    def stats(self) -> dict[str, Any]:
        """What has been done in this process, see :meth:`torch_s3.S3FileSystem.stats`."""
        own = self._own
        return summary(own.counters() if own is not None and own.pid == os.getpid() else [Stats()])

    def wrote(self, bucket: str, key: str, write_id: str) -> str | None:
        """Read back: the object's ETag if it carries ``write_id``, ``None`` if it is another one or there is none.

        Raises:
            S3Error: It can't be found out.
        """
        try:
            head = self.call("head_object", f"s3://{bucket}/{key}", Bucket=bucket, Key=key)
        except errors.NotFound:
            return None
        metadata = {name.lower(): value for name, value in head.get("Metadata", {}).items()}  # servers change the case
        return bare_etag(head.get("ETag", "")) if metadata.get(WRITE_ID) == write_id else None

    def own(self, uri: str) -> _Own:
        """What belongs to this process."""
        own = self._own
        if own is None or own.pid != os.getpid():
            own = self._own = _Own(self.config, functools.partial(self._account, uri), own)
        return own

    def _account(self, uri: str) -> Account:
        with translated(uri):
            account = Account(self.config)
            account.check_certificates(uri)
            return account

    @contextmanager
    def _about(self, uri: str, parameters: dict[str, Any]) -> Iterator[Any]:
        """The boto3 client for a call, with the errors of the block translated."""
        own, bucket = self.own(uri), parameters.get("Bucket", "")
        with translated(uri):
            if self.target(bucket or "-", uri).fallback is not None:
                yield own.account.client
                return
            if own.planner is None:
                own.planner = own.account.planner(self._send)
            token = _asked.set((uri, bucket))
            try:
                yield own.planner
            finally:
                _asked.reset(token)

    def _send(self, request: Any, **_: Any) -> Any:
        """Carry a request that botocore has put together: its ``before-send`` handler."""
        url = urlsplit(request.url)
        uri, bucket = _asked.get()
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
        path = url.path[len(self.own(uri).base(bucket)) if bucket else 1 :]
        with self.batch() as batch:
            call = batch.call(
                target, bucket, uri, method=request.method, path=path, query=query, fields=fields, body=body
            )
            batch.start()
            with ExitStack() as stack:
                for group in _groups.get():
                    stack.enter_context(group.carries(call))
                batch.wait(call)
        head, answer = call.answer
        raw = HTTPResponse(io.BytesIO(answer), preload_content=False)
        return AWSResponse(request.url, head.status, HeadersDict(head.all()), raw)

    def _service(self, uri: str, url: SplitResult) -> Target:
        """The service itself, for calls about no bucket."""
        bucket = self.target("-", uri)
        host = url.hostname or ""
        origin = bucket.origin._replace(host=host)

        def renew(old: Target, _: str, refused: Renew) -> Target:
            if refused.renewal is Renewal.PLACE:
                raise refused.error
            return old._replace(credentials=self._renewed(old, "-", refused).credentials)

        return bucket._replace(origin=origin, host=url.netloc, base="/", stamps={}, renew=renew)


class _Own:
    """What one process has of a client: sockets, locks and counters."""

    def __init__(self, config: S3Config, make_account: Callable[[], Account], inherited: _Own | None) -> None:
        self.pid = os.getpid()
        self._inherited = inherited  # of a forked worker's parent: to let go of botocore takes as long as to make it
        self._make_account = make_account
        self._account: Account | None = None
        self.stats = [Stats() for _ in range(config.loops)]
        self._config = config
        self._fallback: Fallback | None = None
        self.planner: Any = None
        self.targets: dict[str, Target] = {}
        self.credentials: Credentials | None = None
        self._bases: dict[str, str] = {}
        self.checked = float("-inf")  # when the credentials were asked for
        self.lock = threading.Lock()

    @property
    def account(self) -> Account:
        """botocore's view, made when it is first needed."""
        if self._account is None:
            self._account = self._make_account()
        return self._account

    def forget_account(self) -> None:
        """Let files and environment be read again."""
        self._account = None

    def fallback(self) -> Fallback:
        """What carries data by boto3, made when it is first needed."""
        if self._fallback is None:
            self._fallback = Fallback(self._config)
        return self._fallback

    def base(self, bucket: str) -> str:
        """What botocore puts before the keys of a bucket, wherever that may have moved to meanwhile."""
        if bucket not in self._bases:
            self._bases[bucket] = self.account.place(bucket).base
        return self._bases[bucket]

    def counters(self) -> list[Stats]:
        """All that there are."""
        return self.stats + (self._fallback.stats if self._fallback is not None else [])
