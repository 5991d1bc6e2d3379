"""The transport's face: reads and writes of objects, one or many at once. boto3 for the calls that carry no data."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.transport import loop
from torch_s3.transport.endpoint import Account, Place, translated
from torch_s3.transport.listing import List
from torch_s3.transport.ranges import split
from torch_s3.transport.transfer import Get, Put, Target, Transfer


class Client:
    """Objects of one configuration. Any thread, any process: what holds sockets or locks is made anew after fork and
    never pickled.
    """

    def __init__(self, config: S3Config) -> None:
        self.config = config
        self._places: dict[str, Place] = {}
        self._targets: dict[str, Target] = {}
        self._current: Account | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "_places": self._places, "_targets": {}, "_current": None}

    def target(self, bucket: str, uri: str) -> Target:
        """The bucket with the credentials of now.

        Raises:
            NoCredentials: There are none.
        """
        credentials = self._account(uri).credentials(uri)
        target = self._targets.get(bucket)
        if target is None or target.credentials != credentials:
            place = self._places.get(bucket)
            if place is None:
                with translated(uri):
                    place = self._places[bucket] = self._account(uri).place(bucket)
            target = self._targets[bucket] = Target(*place, credentials, self.config.attempts)
        return target

    def call(self, operation: str, uri: str, **parameters: Any) -> Any:
        """One boto3 call that carries no object data, e.g. ``call("head_object", uri, Bucket=…, Key=…)``.

        Raises:
            S3Error: What botocore raised, translated.
        """
        with translated(uri):
            return getattr(self._account(uri).client, operation)(**parameters)

    def region(self, uri: str) -> str:
        """The region that calls go to."""
        with translated(uri):
            return str(self._account(uri).client.meta.region_name)

    def pages(self, operation: str, uri: str, **parameters: Any) -> Iterable[dict[str, Any]]:
        """The pages of a boto3 listing, errors translated as in :meth:`call`."""
        with translated(uri):
            yield from self._account(uri).client.get_paginator(operation).paginate(**parameters)

    def batch(self) -> Batch:
        """A group of transfers of the calling thread."""
        return Batch(self)

    def _account(self, uri: str) -> Account:
        account = self._current
        if account is None or account.pid != os.getpid():
            with translated(uri):
                account = Account(self.config)
                account.check_certificates(uri)
                self._current = account
        return account


class Batch:
    """Transfers of one thread: started together, waited for in any order.

    Leaving the ``with`` block cancels what is unfinished and waits until nothing writes to its memory any more. A batch
    belongs to the process that made it.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._sink: SimpleQueue[Transfer] = SimpleQueue()
        self._new: list[Transfer] = []
        self._unfinished: set[Transfer] = set()
        self._loop = loop.running()
        self._pid = os.getpid()
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
    ) -> Get:
        """Ask for bytes, see :class:`~torch_s3.transport.transfer.Get`; sent by the next start() or wait()."""
        target = self._client.target(bucket, f"s3://{bucket}/{key}")
        transfer = Get(target, bucket, key, self._sink, start=start, stop=stop, into=into, etag=etag, open_end=open_end)
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
    ) -> list[Get]:
        """Ask for ``len(buffer)`` bytes from ``start`` in parallel ranges, received into ``buffer`` itself.

        Wait for them with :meth:`wait_whole`.
        """
        parts = split(start, start + len(buffer), part_size=part_size or self.part_size)
        return [self.get(bucket, key, start=a, stop=b, into=buffer[a - start : b - start], etag=etag) for a, b in parts]

    def fetch(
        self,
        bucket: str,
        key: str,
        *,
        start: int = 0,
        stop: int | None = None,
        size: int | None = None,
        etag: str | None = None,
    ) -> Fetch:
        """Ask for an object, or what there is of ``[start, stop)``; see :class:`Fetch`."""
        return Fetch(self, bucket, key, start, stop, size, etag)

    def put(
        self, bucket: str, key: str, body: memoryview, *, part: tuple[str, int] | None = None, only_new: bool = False
    ) -> Put:
        """Send an object or a part, see :class:`~torch_s3.transport.transfer.Put`. ``body`` isn't copied."""
        target = self._client.target(bucket, f"s3://{bucket}/{key}")
        transfer = Put(target, bucket, key, self._sink, body, part=part, only_new=only_new)
        self._new.append(transfer)
        return transfer

    def page(self, bucket: str, prefix: str, *, delimiter: str = "", token: str | None = None) -> List:
        """Ask for a page of a listing, see :class:`~torch_s3.transport.listing.List`."""
        target = self._client.target(bucket, f"s3://{bucket}/{prefix}")
        transfer = List(target, bucket, prefix, self._sink, delimiter=delimiter, token=token)
        self._new.append(transfer)
        return transfer

    def start(self) -> None:
        """Hand what was asked for to the I/O thread. Several at once is cheaper: each call may have to wake it."""
        if self._pid != os.getpid():
            raise RuntimeError("these transfers were started before fork: start new ones in the child")
        if self._new:
            self._unfinished.update(self._new)
            self._loop = loop.running()
            self._loop.submit(self._new)
            self._new = []

    def wait(self, *transfers: Transfer) -> None:
        """Wait until these are finished.

        Raises:
            S3Error: The first one's that failed. The others go on until they are waited for or the batch is closed.
        """
        for transfer in transfers:
            while not transfer.finished:
                self.start()
                self._unfinished.discard(self._sink.get())
            _raise(transfer)
        while not self._sink.empty():  # let go of what was finished before it was waited for
            self._unfinished.discard(self._sink.get())

    def wait_any(self) -> Transfer:
        """Wait for whichever is finished next, and was not waited for before.

        Raises:
            S3Error: It failed.
        """
        self.start()
        transfer = self._sink.get()
        self._unfinished.discard(transfer)
        _raise(transfer)
        return transfer

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
        """Whether this is the I/O thread, as it is where that happens to collect the garbage."""
        return self._loop.is_current_thread()

    def close(self) -> None:
        """Cancel what is unfinished, and wait until it is, except in the I/O thread itself."""
        self._new = []
        if self._pid != os.getpid():
            return
        self._unfinished = {transfer for transfer in self._unfinished if not transfer.finished}
        if self._unfinished:
            self._loop.cancel(list(self._unfinished))
            while self._unfinished and not self.in_io_thread():
                self._unfinished.discard(self._sink.get())


def _raise(transfer: Transfer) -> None:
    """Raise what a transfer failed with, if it did."""
    if transfer.error is not None:
        # A copy: the error's own traceback would hold this frame, this frame the transfer, and that the error and the
        # caller's memory, until the garbage collector comes by.
        raise copy.copy(transfer.error)


class Fetch:
    """An object on its way, or what there is of ``[start, stop)``: clipped at the object's end, as slices are.

    Large ones come by parallel ranges of one version. Where ``size``, the whole object's, isn't known, the first range
    tells it.
    """

    def __init__(
        self, batch: Batch, bucket: str, key: str, start: int, stop: int | None, size: int | None, etag: str | None
    ) -> None:
        self._batch, self._bucket, self._key = batch, bucket, key
        self._start, self._stop, self._size = start, stop, size
        part_size = batch.part_size
        if size is None or start > 0 or stop is not None:
            first_stop = start + part_size if stop is None else min(stop, start + part_size)
            self._gets = [batch.get(bucket, key, start=start, stop=first_stop, etag=etag, open_end=True)]
        elif size <= part_size:
            self._gets = [batch.get(bucket, key, etag=etag)]
        else:
            self._buffer = memoryview(bytearray(size))
            self._gets = batch.get_into(bucket, key, 0, self._buffer, etag=etag)

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
                self._bucket, self._key, self._start + got, self._buffer[got:], etag=first.answer_etag
            )
        self._batch.wait_whole(self._gets)
        return self._buffer

    def outcome(self) -> memoryview | errors.S3Error:
        """As :meth:`result`, but an error is returned."""
        try:
            return self.result()
        except errors.S3Error as error:
            return error
