"""From a uri to a filesystem, and many reads at once from any filesystem."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import fsspec
import numpy as np
from fsspec.utils import stringify_path
from numpy.typing import NDArray

from torch_s3 import errors
from torch_s3.filesystem import S3FileSystem
from torch_s3.transport import endpoint
from torch_s3.transport.batch import Fetch
from torch_s3.transport.objects import Get

_THREADS = 8
_KEPT = 64  # buffers to use again
_PROBE = [object()]
_UNSEEN = sys.getrefcount(_PROBE[0])  # of what only a list has


def resolve(
    uri: str, *, storage_options: Mapping[str, Any] | None = None, filesystem: fsspec.AbstractFileSystem | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem for a uri, and the path in it.

    ``s3://`` is :class:`S3FileSystem`; other schemes are what fsspec knows. With ``filesystem`` given, that one is
    used, and a path without scheme is taken as its own.

    Raises:
        InvalidUri: No scheme, or one that nothing here can open.
    """
    uri = stringify_path(uri)
    check(storage_options, filesystem)
    if filesystem is not None:
        if storage_options:
            raise ValueError(
                "storage_options are for the filesystem that torch_s3 makes: leave them out with filesystem="
            )
        return filesystem, filesystem._strip_protocol(uri)
    scheme, mark, _ = uri.partition("://")
    if not mark:
        raise errors.InvalidUri("no scheme: write s3://bucket/key, or file:///folder/file for a local one", uri=uri)
    options = dict(storage_options or {})
    if scheme in S3FileSystem.protocol:
        return S3FileSystem(**options), S3FileSystem._strip_protocol(uri)
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError) as error:
        raise errors.InvalidUri(f"cannot open {scheme}:// ({error})", uri=uri) from None
    return kind(**options), kind._strip_protocol(uri)


def check(storage_options: Any, filesystem: Any) -> None:
    """Refuse what says of no filesystem where it is.

    Raises:
        TypeError: One of them is something else.
    """
    if filesystem is not None and not isinstance(filesystem, fsspec.AbstractFileSystem):
        raise TypeError(f"filesystem={filesystem!r:.200}: give one made by fsspec.filesystem(…), or storage_options")
    if storage_options is not None and not isinstance(storage_options, Mapping):
        raise TypeError(f"storage_options is a {type(storage_options).__name__}: give a dict")


@contextlib.contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn the exceptions of any filesystem into the package's own, naming ``uri``."""
    try:
        with endpoint.translated(uri):  # s3fs lets botocore's through
            yield
    except errors.S3Error:
        raise
    except FileNotFoundError:
        raise errors.NotFound("no such file", uri=uri) from None
    except PermissionError as error:
        raise errors.AccessDenied(str(error), uri=uri) from None
    except OSError as error:
        raise errors.S3Error(f"{type(error).__name__}: {error}", uri=uri) from None


class Read(NamedTuple):
    """One object to read whole, or bytes ``[start, stop)`` of it, which it must have.

    Attributes:
        path: In its filesystem.
        size: Bytes of the whole object, ``None`` if unknown.
        etag: The version to read, ``None`` for whatever is there.
        start: First byte.
        stop: One past the last byte, ``None`` for all of the object.
    """

    path: str
    size: int | None = None
    etag: str | None = None
    start: int = 0
    stop: int | None = None

    @property
    def length(self) -> int | None:
        """Bytes that are read, ``None`` if unknown."""
        return self.size if self.stop is None else self.stop - self.start

    def check(self, got: int, uri: str) -> None:
        """Refuse an answer of another length.

        Raises:
            ObjectChanged: The object has other bytes than these.
        """
        if self.stop is not None and got != self.stop - self.start:
            words = f"it ends at byte {self.start + got:,}, and should have more: it is another object than it was"
            raise errors.ObjectChanged(words, uri=uri, range=(self.start, self.stop))
        if self.stop is None and self.size not in (None, got):
            raise errors.ObjectChanged(f"it has {got} bytes, not {self.size} as listed", uri=uri)


class Reader(Protocol):
    """How objects are read: asked for, started some at a time, and taken in the order asked. Of one thread.

    Attributes:
        part_size: Bytes of a request; larger objects take several.
    """

    @property
    def part_size(self) -> int: ...

    def ask(self, read: Read) -> Any:
        """What :meth:`outcome` takes."""

    def start(self) -> None:
        """Begin with what was asked for."""

    def outcome(self, coming: Any) -> memoryview | bytes | errors.S3Error:
        """Wait for it."""

    def close(self) -> None:
        """Cancel what is on its way."""


def read_ahead(
    fs: fsspec.AbstractFileSystem,
    reads: Iterable[Read],
    *,
    window: int,
    max_bytes: int = 256 << 20,
    around: Callable[[Reader], Reader] = lambda reader: reader,
) -> Iterator[memoryview | bytes | errors.S3Error]:
    """Read many objects, yielding their bytes in order while the next are on their way.

    A read that failed is yielded as its error, at its place; the others go on. Closing the iterator cancels what is in
    flight and leaves no thread. Ours is read by the I/O thread; other filesystems by a few threads, up to eight.

    Args:
        fs: Where they are.
        reads: What to read.
        window: Most requests on their way or read ahead; a large object takes several.
        max_bytes: Most bytes of objects on their way or read ahead, unless it is a single one. One whose size isn't
            known counts as the mean of those that were read.
        around: What is put between, such as a cache.
    """
    flying: deque[tuple[Any, int, int]] = deque()
    held = requests = asked = 0
    read_bytes, read_count = 1 << 20, 1  # a guess that soon loses its weight
    reader = around(_Objects(fs) if isinstance(fs, S3FileSystem) else _Files(fs, min(window, _THREADS)))
    with contextlib.closing(reader):
        for read in itertools.chain(reads, [None]):
            length = None if read is None else read.length
            size = read_bytes // read_count if length is None else length
            needs = -(-size // reader.part_size) or 1
            while flying and (read is None or requests + needs > window or held + size > max_bytes):
                coming, its_size, its_needs = flying.popleft()
                outcome = reader.outcome(coming)
                if not isinstance(outcome, errors.S3Error):
                    read_bytes, read_count = read_bytes + len(outcome), read_count + 1
                yield outcome
                del outcome
                held, requests = held - its_size, requests - its_needs
            if read is not None:
                flying.append((reader.ask(read), size, needs))
                held, requests = held + size, requests + needs
                asked += 1
                if (asked - 1) % max(1, window // 8) == 0:  # the first one at once; then several, for each start costs
                    reader.start()


class _Objects:
    """Reads of ours, by the I/O thread."""

    def __init__(self, fs: S3FileSystem) -> None:
        self._fs, self._batch = fs, fs.client.batch()
        self.part_size = self._batch.part_size
        self._buffers = _Buffers(self.part_size)

    def ask(self, read: Read) -> tuple[Read, Fetch | _Range]:
        bucket, key, version = self._fs.locate(read.path)
        which: dict[str, Any] = {"etag": read.etag, "version_id": version}
        if read.stop is None:
            return read, self._batch.fetch(bucket, key, size=read.size, **which)
        buffer = self._buffers.take(read.stop - read.start)
        return read, _Range(buffer, self._batch.get_into(bucket, key, read.start, buffer, **which))

    def start(self) -> None:
        self._batch.start()

    def outcome(self, coming: Any) -> memoryview | bytes | errors.S3Error:
        read, asked = coming
        if isinstance(asked, Fetch):
            found: memoryview | errors.S3Error = asked.outcome()
            return found
        try:
            self._batch.wait_whole(asked.gets, size=read.size)
        except errors.S3Error as error:
            return error
        whole: memoryview = asked.buffer
        return whole

    def close(self) -> None:
        self._batch.close()


class _Range(NamedTuple):
    """A part of an object on its way into a buffer."""

    buffer: memoryview
    gets: list[Get]


class _Buffers:
    """Memory for ranges, used again when nobody has a view of it any more: fresh memory costs as much as receiving.

    Args:
        size: Bytes of a buffer; ranges of less than half of that, or of more, get memory of their own.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._all: list[NDArray[np.uint8]] = []

    def take(self, length: int) -> memoryview:
        """Some that nobody else has."""
        if not self._size // 2 <= length <= self._size:
            return memoryview(bytearray(length))
        for at in range(len(self._all)):
            if sys.getrefcount(self._all[at]) == _UNSEEN:
                return self._all[at].data[:length]
        del self._all[:-_KEPT]
        self._all.append(np.empty(self._size, np.uint8))  # not cleared, and of huge pages where there are such
        return self._all[-1].data[:length]


class _Files:
    """Reads of other filesystems, by threads."""

    part_size = 1 << 62

    def __init__(self, fs: fsspec.AbstractFileSystem, threads: int) -> None:
        self._fs = fs
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="torch_s3-read")

    def ask(self, read: Read) -> Future[bytes | errors.S3Error]:
        return self._executor.submit(self._read, read)

    def start(self) -> None: ...

    def outcome(self, coming: Any) -> memoryview | bytes | errors.S3Error:
        found: bytes | errors.S3Error = coming.result()
        return found

    def _read(self, read: Read) -> bytes | errors.S3Error:
        uri = self._fs.unstrip_protocol(read.path)
        try:
            with translated(uri):
                part = {} if read.stop is None else {"start": read.start, "end": read.stop}
                content = bytes(self._fs.cat_file(read.path, **part))
            read.check(len(content), uri)
        except errors.S3Error as error:
            return error
        return content

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
