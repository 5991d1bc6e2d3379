"""Writing one shard: objects read ahead, their samples in order, whole or not at all."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NamedTuple

import fsspec
import numpy as np

from torch_s3 import errors
from torch_s3.data import index_file, policy, tar, tfrecord
from torch_s3.data.manifest import Manifest
from torch_s3.data.pack_plan import record_of
from torch_s3.publish import publishing, read_back
from torch_s3.uris import Reader, read_ahead

_WINDOW = 64  # requests
_READ_AHEAD = 64 << 20  # bytes


class Skipped(NamedTuple):
    """An object that was left out, with the sample that it is of.

    Attributes:
        uri: Its name.
        error: The error's type, such as ``NotFound``.
        message: What went wrong.
    """

    uri: str
    error: str
    message: str


class Shard(NamedTuple):
    """A shard that was written.

    Attributes:
        uri: Its name.
        records: Its samples.
        bytes: Its size.
        etag: Its version, ``None`` where the filesystem has none.
        skipped: What was left out of it.
    """

    uri: str
    records: int
    bytes: int
    etag: str | None
    skipped: tuple[Skipped, ...] = ()


class Job(NamedTuple):
    """What one shard is to hold, and where. Pickles.

    Attributes:
        uri: Of the shard.
        index_uri: Of its index.
        objects: In the order of writing, those of a sample one after the other.
        labels: Of each, or ``None``.
        format: ``"tar"`` or ``"tfrecord"``.
        size: Bytes of the shard, if nothing is left out.
        skip: Leave out what can't be read, rather than fail.
        source: Where the objects are.
        target: Where the shard goes.
    """

    uri: str
    index_uri: str
    objects: Manifest
    labels: list[int] | None
    format: str
    size: int
    skip: bool
    source: fsspec.AbstractFileSystem
    target: fsspec.AbstractFileSystem


class Stopped(Exception):
    """Somebody asked to stop."""


class Stop:
    """Lets another thread end the writing of shards, also where it waits for the network."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closers: list[Callable[[], Any]] = []
        self._stopped = False

    def set(self) -> None:
        """End it."""
        with self._lock:
            self._stopped = True
            closers = list(self._closers)
        for close in closers:
            close()

    def check(self) -> None:
        """Raise :class:`Stopped` once it is set."""
        if self._stopped:
            raise Stopped

    @contextmanager
    def closes(self, close: Callable[[], Any]) -> Iterator[None]:
        """While the block runs, ``close`` is what makes its waiting end."""
        with self._lock:
            self.check()
            self._closers.append(close)
        try:
            yield
        finally:
            with self._lock:
                self._closers.remove(close)


class _Object(NamedTuple):
    """An object of a sample, read."""

    name: str
    uri: str
    label: int | None
    body: Any


def write(job: Job, progress: Callable[[int], Any] | None = None, stop: Stop | None = None) -> Shard:
    """Write a shard, then its index.

    Args:
        job: What to write.
        progress: Called with the bytes of each sample's objects, read.
        stop: Ends it before.

    Raises:
        S3Error: An object could not be read, or the shard not written: then it isn't there.
        Stopped: By ``stop``; likewise. If it waited for the network, an S3Error says that it was cancelled.
    """
    stop = stop or Stop()
    kind: Any = _Tar if job.format == "tar" else _TFRecord
    path = job.target._strip_protocol(job.uri)
    skipped: list[Skipped] = []
    with publishing(job.target, path, job.uri, only_new=False, expected=job.size) as file:
        shard = kind(file)
        with stop.closes(getattr(file, "discard", file.close)), closing(_samples(job, stop)) as samples:
            for sample in samples:
                stop.check()
                if progress is not None:
                    progress(sum(len(each.body) for each in sample if not isinstance(each.body, errors.S3Error)))
                if failed := [each for each in sample if isinstance(each.body, errors.S3Error)]:
                    _check_skippable(job, failed, skipped, shard.records)
                    skipped += [Skipped(each.uri, type(each.body).__name__, str(each.body)) for each in failed]
                else:
                    shard.append(sample)
        shard.end()
    stored = read_back(job.target, path, job.uri, file, shard.size)
    with publishing(job.target, job.target._strip_protocol(job.index_uri), job.index_uri, only_new=False) as index:
        index.write(shard.index().encode(errors="surrogateescape"))
    return Shard(job.uri, shard.records, shard.size, stored.etag, tuple(skipped))


def _check_skippable(job: Job, failed: list[_Object], skipped: list[Skipped], records: int) -> None:
    for each in failed:
        hopeless = policy.hopeless(len(skipped) + 1, records)
        if not job.skip or not isinstance(each.body, policy.OF_ONE_OBJECT) or hopeless:
            raise each.body


def _samples(job: Job, stop: Stop) -> Generator[list[_Object]]:
    """The objects of each sample, read ahead; an error in the place of what could not be read."""
    with closing(_objects(job, stop)) as objects:
        if job.format == "tfrecord":
            yield from ([each] for each in objects)
        else:
            yield from (list(sample) for _, sample in itertools.groupby(objects, lambda each: _key(each.name)))


def _objects(job: Job, stop: Stop) -> Generator[_Object]:
    with closing(_bodies(job, stop)) as bodies:
        for place, body in enumerate(bodies):
            uri = job.objects.uri(place)
            label = None if job.labels is None else job.labels[place]
            yield _Object(uri[len(job.objects.root) :], uri, label, body)


def _bodies(job: Job, stop: Stop) -> Generator[Any]:
    reads = (job.objects.read(place, job.source) for place in range(len(job.objects)))
    with ExitStack() as stack:

        def around(reader: Reader) -> Reader:
            stack.enter_context(stop.closes(reader.close))
            return reader

        yield from read_ahead(job.source, reads, window=_WINDOW, max_bytes=_READ_AHEAD, around=around)


def _key(name: str) -> str:
    """The sample that an object is of; the plan has none of others."""
    parts = tar.split(name)
    assert parts is not None
    return parts[0]


class _Tar:
    """Writes samples as a tar's members."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._members: list[list[tar.Member]] = []
        self.size = 0

    @property
    def records(self) -> int:
        return len(self._members)

    def append(self, sample: list[_Object]) -> None:
        self._members.append([self._member(each.name, each.body) for each in sample])
        if sample[0].label is not None:
            name = f"{_key(sample[0].name)}.cls"
            self._members[-1].append(self._member(name, str(sample[0].label).encode()))

    def _member(self, name: str, data: Any) -> tar.Member:
        before, after = tar.member(name, len(data))
        member = tar.Member(name, self.size, self.size + len(before), len(data))
        for piece in (before, data, after):
            self._file.write(piece)
        self.size = member.stop
        return member

    def end(self) -> None:
        self._file.write(tar.END)
        self.size += len(tar.END)

    def index(self) -> str:
        return index_file.text(np.zeros(1, np.int64), "tar", self._members)


class _TFRecord:
    """Writes objects as Examples."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._bounds = [0]

    @property
    def records(self) -> int:
        return len(self._bounds) - 1

    @property
    def size(self) -> int:
        return self._bounds[-1]

    def append(self, sample: list[_Object]) -> None:
        (each,) = sample
        pieces = tfrecord.frame(*record_of(each.name, each.label, each.body))
        for piece in pieces:
            self._file.write(piece)
        self._bounds.append(self.size + sum(map(len, pieces)))

    def end(self) -> None: ...

    def index(self) -> str:
        return index_file.text(np.array(self._bounds, np.int64), "tfrecord")
