"""Where bytes come from: ranges of one version of one file, many at once, each into its own memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import fsspec
from fsspec.implementations.local import LocalFileSystem

from torch_s3 import errors
from torch_s3.filesystem import S3FileSystem
from torch_s3.transport.objects import Get
from torch_s3.uris import translated

HEAD = 64 * 1024
"""Bytes of a file's start that are read before anything is known of it."""
_THREADS = 8
_MIB = 1024 * 1024


class Source(ABC):
    """A file that is read by ranges, all of one version of it. For one thread.

    Attributes:
        uri: What errors name.
        size: Its bytes.
        etag: Its version, ``None`` where there is no name for it.
        head: Its first ``HEAD`` bytes, or all.
        part_size: Bytes of the largest range that is read at once.
        in_flight: How many ranges may be read at once.
    """

    uri: str
    size: int
    etag: str | None
    head: memoryview
    part_size = 8 * _MIB
    in_flight: int

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give up what is under way; after that nothing is written to anybody's memory."""

    @abstractmethod
    def ask(self, start: int, into: memoryview, job: Any) -> None:
        """Have ``into`` filled with the file's bytes from ``start``; :meth:`finished` will give ``job``."""

    def begin(self) -> None:  # noqa: B027 - threads begin by themselves
        """Send what was asked for, rather than with the next call of :meth:`finished`."""

    @abstractmethod
    def finished(self, *, wait: bool) -> Sequence[Any]:
        """The jobs that are finished, and were not given before. With ``wait``, at least one.

        Raises:
            ObjectChanged: The file was overwritten.
            S3Error: One could not be read.
        """

    def check_unchanged(self) -> None:  # noqa: B027 - where every range is pinned, there is nothing to ask
        """Raise ``ObjectChanged`` where the file is another one now."""

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The bytes of half-open ranges, in order, read at once; what is in ``head`` is not read again."""
        found: list[memoryview] = []
        missing = 0
        for start, stop in ranges:
            if stop <= len(self.head):
                found.append(self.head[start:stop])
                continue
            buffer = memoryview(bytearray(stop - start))
            found.append(buffer)
            for at in range(start, stop, self.part_size):
                self.ask(at, buffer[at - start : at - start + self.part_size], None)
                missing += 1
        while missing:
            missing -= len(self.finished(wait=True))
        return found


@contextmanager
def opened(fs: fsspec.AbstractFileSystem, path: str, uri: str) -> Iterator[Source]:
    """The file as a source.

    Raises:
        NotFound: There is none.
        S3Error: It cannot be read.
    """
    source: Source
    if isinstance(fs, S3FileSystem):
        source = _S3(fs, path, uri)
    elif isinstance(fs, LocalFileSystem):
        source = _Local(path, uri)
    else:
        source = _Any(fs, path, uri)
    with source:
        yield source


class _S3(Source):
    def __init__(self, fs: S3FileSystem, path: str, uri: str) -> None:
        self.uri = uri
        self._bucket, self._key, self._version = fs.locate(path)
        self._batch = fs.client.batch()
        self.part_size, self.in_flight = fs.config.part_size, fs.config.max_connections
        self._jobs: dict[Get, Any] = {}

    def __enter__(self) -> Self:
        first = self._batch.get(self._bucket, self._key, stop=HEAD, open_end=True, version_id=self._version)
        self._batch.wait(first)
        self.size, self.etag, self.head = first.size, first.answer_etag, first.buffer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batch.close()
        self._jobs.clear()

    def ask(self, start: int, into: memoryview, job: Any) -> None:
        get = self._batch.get(
            self._bucket,
            self._key,
            start=start,
            stop=start + len(into),
            into=into,
            etag=self.etag,
            version_id=self._version,
        )
        self._jobs[get] = job

    def begin(self) -> None:
        self._batch.start()

    def finished(self, *, wait: bool) -> Sequence[Any]:
        done: Any = self._batch.wait_any() if wait else self._batch.finished()  # Gets, all of them
        for get in done:
            if get.size != self.size or get.answer_etag != self.etag:
                raise errors.ObjectChanged("it was overwritten while it was read: read it again", uri=self.uri)
            get.release()
        return [self._jobs.pop(get) for get in done]


class _Threaded(Source):
    """Read by a few threads that block."""

    in_flight = _THREADS

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.etag = None
        self._done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="torch_s3-read")

    @abstractmethod
    def read_into(self, start: int, into: memoryview) -> int:
        """Fill ``into``; fewer bytes than it has where the file ends. Any thread."""

    def ask(self, start: int, into: memoryview, job: Any) -> None:
        self._pool.submit(self._read, start, into, job)

    def _read(self, start: int, into: memoryview, job: Any) -> None:
        failed: BaseException | None = None
        try:
            with translated(self.uri):
                count = self.read_into(start, into)
            if count != len(into):
                words = f"it ended after {count} bytes of {len(into)}: it was overwritten while it was read"
                failed = errors.ObjectChanged(words, uri=self.uri, range=(start, start + len(into)))
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
            failed = error
        del into
        self._done.put((job, failed))

    def finished(self, *, wait: bool) -> Sequence[Any]:
        jobs = []
        while wait or not self._done.empty():
            job, failed = self._done.get()
            if failed is not None:
                raise failed
            jobs.append(job)
            wait = False
        return jobs

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Local(_Threaded):
    """An open file stays what it is when another takes its name."""

    def __init__(self, path: str, uri: str) -> None:
        super().__init__(uri)
        self._path = path

    def __enter__(self) -> Self:
        with translated(self.uri):
            self._file = open(self._path, "rb", buffering=0)  # noqa: PTH123 - closed below
        self._state = self._stat()
        self.size = self._state[0]
        self.head = memoryview(os.pread(self._file.fileno(), HEAD, 0))
        return self

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def read_into(self, start: int, into: memoryview) -> int:
        got = 0
        while got < len(into) and (count := os.preadv(self._file.fileno(), [into[got:]], start + got)):
            got += count
        return got

    def check_unchanged(self) -> None:
        if self._stat() != self._state:
            raise errors.ObjectChanged("it was written to while it was read: read it again", uri=self.uri)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._file.close()


class _Any(_Threaded):
    """Of any other filesystem, whose ranges cannot be pinned: what it says of the file is compared at the end."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, uri: str) -> None:
        super().__init__(uri)
        self._fs, self._path = fs, path

    def __enter__(self) -> Self:
        with translated(self.uri):
            info = self._fs.info(self._path, refresh=True)
            self._state = str(info)
            self.size = info["size"]
            self.head = memoryview(self._fs.cat_file(self._path, start=0, end=min(HEAD, self.size)))
        self.etag = info.get("ETag")
        return self

    def read_into(self, start: int, into: memoryview) -> int:
        content = self._fs.cat_file(self._path, start=start, end=start + len(into))
        into[: len(content)] = content
        return len(content)

    def check_unchanged(self) -> None:
        with translated(self.uri):
            if str(self._fs.info(self._path, refresh=True)) != self._state:
                raise errors.ObjectChanged("it was overwritten while it was read: read it again", uri=self.uri)
