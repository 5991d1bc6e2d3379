"""From a uri to a filesystem, and many reads at once from any filesystem."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import fsspec
from fsspec.utils import stringify_path

from torch_s3 import errors
from torch_s3.filesystem import S3FileSystem
from torch_s3.transport import endpoint
from torch_s3.transport.batch import Fetch

_THREADS = 8


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
    """One object to read whole.

    Attributes:
        path: In its filesystem.
        size: Bytes, ``None`` if unknown.
        etag: The version to read, ``None`` for whatever is there.
    """

    path: str
    size: int | None = None
    etag: str | None = None


def read_ahead(
    fs: fsspec.AbstractFileSystem, reads: Iterable[Read], *, window: int
) -> Iterator[memoryview | bytes | errors.S3Error]:
    """Read many objects, yielding their bytes in order while up to ``window`` of the next are on their way.

    A read that failed is yielded as its error, at its place; the others go on. Closing the iterator cancels what is in
    flight and leaves no thread. Ours is read by the I/O thread; other filesystems by a few threads, up to eight.
    """
    return _read_ahead_s3(fs, reads, window) if isinstance(fs, S3FileSystem) else _read_ahead_threads(fs, reads, window)


def _read_ahead_s3(fs: S3FileSystem, reads: Iterable[Read], window: int) -> Iterator[memoryview | errors.S3Error]:
    with fs.client.batch() as batch:
        flying: deque[Fetch] = deque()
        for number, read in enumerate(reads):
            flying.append(batch.fetch(*fs.bucket_and_key(read.path), size=read.size, etag=read.etag))
            if number % max(1, window // 8) == 0:
                batch.start()
            if len(flying) >= window:
                yield flying.popleft().outcome()
        while flying:
            yield flying.popleft().outcome()


def _read_ahead_threads(
    fs: fsspec.AbstractFileSystem, reads: Iterable[Read], window: int
) -> Iterator[bytes | errors.S3Error]:
    def read_one(read: Read) -> bytes | errors.S3Error:
        uri = fs.unstrip_protocol(read.path)
        try:
            with translated(uri):
                content = bytes(fs.cat_file(read.path))
        except errors.S3Error as error:
            return error
        if read.size not in (None, len(content)):
            return errors.ObjectChanged(f"it has {len(content)} bytes, not {read.size} as listed", uri=uri)
        return content

    executor = ThreadPoolExecutor(min(window, _THREADS), thread_name_prefix="torch_s3-read")
    try:
        flying: deque[Future[bytes | errors.S3Error]] = deque()
        for read in reads:
            flying.append(executor.submit(read_one, read))
            if len(flying) >= window:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
