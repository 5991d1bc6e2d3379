"""Groups of transfers: what a thread has asked for, and waits for."""

from __future__ import annotations

import copy
import itertools
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch_s3 import errors
from torch_s3.transport import loop
from torch_s3.transport.fallback import Fallback
from torch_s3.transport.listing import List
from torch_s3.transport.objects import Get, Put
from torch_s3.transport.ranges import split
from torch_s3.transport.target import Target
from torch_s3.transport.transfer import Call, Sink, Transfer

if TYPE_CHECKING:
    from torch_s3.transport.client import Client

_TICK = 0.05  # seconds between looks at what another thread may have been given
_turns = itertools.count()  # of the loops, from batch to batch


class Batch:
    """Transfers of one thread: started together, waited for in any order.

    Leaving the ``with`` block cancels what is unfinished and waits until nothing writes to its memory any more. A batch
    belongs to the process that made it.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._sink = Sink()
        self._new: list[Transfer] = []
        self._unfinished: set[Transfer] = set()
        self._pid = os.getpid()
        self._turn = next(_turns)
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

    def call(self, target: Target, bucket: str, uri: str, **request: Any) -> Call:
        """Carry a call, see :class:`~torch_s3.transport.transfer.Call`."""
        transfer = Call(target, bucket, uri, self._sink, **request)
        self._new.append(transfer)
        return transfer

    def start(self) -> None:
        """Hand what was asked for to the I/O thread. Several at once is cheaper: each call may have to wake it."""
        if self._pid != os.getpid():
            raise RuntimeError("these transfers were started before fork: start new ones in the child")
        if self._new:
            loops = self._client.config.loops
            by_carrier: dict[loop.Loop | Fallback, list[Transfer]] = {}
            for transfer in self._new:
                fallback = transfer.target.fallback
                if fallback is None:
                    transfer.carrier = loop.running(self._turn % loops)
                    self._turn += 1
                else:
                    transfer.carrier = fallback()
                by_carrier.setdefault(transfer.carrier, []).append(transfer)
            for carrier, some in by_carrier.items():
                self._unfinished.update(some)
                carrier.submit(some)
            self._new = []

    def wait(self, *transfers: Transfer) -> None:
        """Wait until these are finished.

        Raises:
            S3Error: The first one's that failed. The others go on until they are waited for or the batch is closed.
        """
        for transfer in transfers:
            if not transfer.finished:
                self.start()
                self._sink.wanted = transfer
                try:
                    while not transfer.finished:
                        self._take()
                finally:
                    self._sink.wanted = None
            self._unfinished.discard(transfer)
            self._check(transfer)
        while not self._sink.empty():  # let go of what was finished before it was waited for
            self._take()

    def wait_any(self) -> Sequence[Transfer]:
        """Wait for whichever are finished next, and were not waited for before.

        Raises:
            S3Error: One failed, or another thread has closed the batch.
        """
        self.start()
        while not (transfers := self._take()):
            if not self._unfinished:
                raise errors.S3Error("cancelled: another thread has closed the batch")
        for transfer in transfers:
            self._check(transfer)
        return transfers

    def finished(self) -> Sequence[Transfer]:
        """As :meth:`wait_any`, but those that are finished now, which may be none."""
        self.start()
        transfers: Sequence[Transfer] = ()
        while not transfers and not self._sink.empty():
            transfers = self._take()
        for transfer in transfers:
            self._check(transfer)
        return transfers

    def _take(self) -> Sequence[Transfer]:
        """Wait for what is handed back next, but for what was waited for before: it is seen to be finished earlier.

        Nothing, too, where another thread has closed the batch.
        """
        transfers = [transfer for transfer in self._sink.get() if transfer in self._unfinished]
        self._unfinished.difference_update(transfers)
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
        if not isinstance(transfer.error, errors.AlreadyExists | errors.TransferFailed):
            return False
        transfer.answer_etag = self._client.wrote(transfer.bucket, transfer.key, transfer.write_id)
        return transfer.answer_etag is not None

    def wait_whole(self, gets: Sequence[Get], *, size: int | None = None) -> None:
        """Wait for ranges of one object, and check that they are of one version of it.

        Args:
            gets: The ranges.
            size: Bytes of the whole object, if known.

        Raises:
            ObjectChanged: They aren't.
            S3Error: One failed.
        """
        self.wait(*gets)
        for get in gets:
            if get.answer_etag != gets[0].answer_etag or size not in (None, get.size):
                raise errors.ObjectChanged("it was overwritten while it was read: read it again", uri=get.uri)

    def in_io_thread(self) -> bool:
        """Whether this is an I/O thread, as it is where that happens to collect the garbage."""
        return loop.is_io_thread()

    def close(self) -> None:
        """Cancel what is unfinished, and wait until it is, except in the I/O thread itself. Any thread."""
        self._new = []
        if self._pid != os.getpid():
            return
        interrupt, told = None, False
        while unfinished := [transfer for transfer in list(self._unfinished) if not transfer.finished]:
            try:
                if not told:
                    by_carrier: dict[loop.Loop | Fallback, list[Transfer]] = {}
                    for transfer in unfinished:
                        by_carrier.setdefault(transfer.carrier, []).append(transfer)
                    for carrier, some in by_carrier.items():
                        carrier.cancel(some)
                    told = True
                if self.in_io_thread():
                    return
                with suppress(Empty):  # another thread that waits may be given them instead
                    self._sink.get(timeout=_TICK)
            except KeyboardInterrupt as again:  # the second one of somebody in a hurry: it takes but a moment
                interrupt = again
        self._unfinished.clear()
        if told:
            self._sink.put([])  # for that other thread
        if interrupt is not None:
            raise interrupt


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
