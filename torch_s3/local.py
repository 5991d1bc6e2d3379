"""Between S3 and local files: many at once, in bounded memory, whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.callbacks import DEFAULT_CALLBACK, Callback
from fsspec.utils import isfilelike, stringify_path

from torch_s3 import errors
from torch_s3.listings import Listings
from torch_s3.transport.batch import Batch
from torch_s3.transport.objects import Get, Put

_MIB = 1024 * 1024
_MEMORY = 128 * _MIB  # of objects on their way, where those to come are no larger than those seen
_AHEAD = 16  # parts of one large object in flight


class LocalFiles(Listings):
    """The part of :class:`~torch_s3.S3FileSystem` that copies from and to local files."""

    def get(
        self,
        rpath: Any,
        lpath: Any,
        recursive: bool = False,
        callback: Callback = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Receive objects, what lies under a prefix, or what matches a pattern, into local files, many at once.

        A file takes its place when it is whole: after an error there are none of the bytes of the one that failed.

        Args:
            rpath: Object, prefix, pattern, or list of them.
            lpath: Local path or folder, or as many paths as objects.
            recursive: With all that lies under prefixes.
            callback: Told of each file; its ``branched`` ones of bytes.
            maxdepth: Levels to descend.
            **kwargs: ``version_id`` of the object.

        Raises:
            NotFound: Nothing is there.
            S3Error: Two objects would be one local file: S3 tells ``a//b`` from ``a/b``, a disk doesn't. None is
                received.
            ValueError: As many paths as objects were promised, and there are more or fewer.
            OSError: A local file could not be written, as on a full disk; with the number that says why.
        """
        local = lpath if isinstance(lpath, list) else stringify_path(lpath)
        pairs = Pairs(self, rpath, local)
        fsspec.AbstractFileSystem.get(pairs, rpath, local, recursive=recursive, maxdepth=maxdepth, refresh=True)
        pairs.check_apart(self._uri, _place, "get one alone")
        for _, folder in pairs.folders:
            Path(folder).mkdir(parents=True, exist_ok=True)
        callback.set_size(len(pairs.found))
        self._get(pairs.found, callback.branched, callback.relative_update, **kwargs)

    def get_file(
        self,
        rpath: str,
        lpath: Any,
        callback: Callback = DEFAULT_CALLBACK,
        outfile: Any = None,
        version_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Receive one object into a local file or writable file object, by parallel ranges; see :meth:`get`."""
        pair = (rpath, lpath if outfile is None else outfile)
        self._get([pair], lambda *_: nullcontext(callback), lambda: None, version_id)

    def put(
        self,
        lpath: Any,
        rpath: Any,
        recursive: bool = False,
        callback: Callback = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Send local files, folders or what matches a pattern, many at once.

        Args:
            lpath: Local path, folder, pattern, or list of them.
            rpath: Object or prefix, or as many objects as files.
            recursive: With all that lies in folders.
            callback: Told of each file; its ``branched`` ones of bytes.
            maxdepth: Levels to descend.
            **kwargs: ``mode="create"`` to overwrite nothing.

        Raises:
            FileNotFoundError: There is no such local file.
            AlreadyExists: With ``"create"``, where there is something.
            S3Error: Two files would be one object; none is sent.
            ValueError: As many objects as files were promised, and there are more or fewer.
        """
        local = lpath if isinstance(lpath, list) else stringify_path(lpath)
        pairs = Pairs(self, local, rpath)
        fsspec.AbstractFileSystem.put(pairs, local, rpath, recursive=recursive, maxdepth=maxdepth)
        pairs.check_apart(str, self._uri, "nothing was sent")
        callback.set_size(len(pairs.found))
        self._put(pairs.found, callback, **kwargs)

    def put_file(
        self, lpath: Any, rpath: str, callback: Callback = DEFAULT_CALLBACK, mode: str = "overwrite", **kwargs: Any
    ) -> None:
        """Send one local file, read as it is sent; see :meth:`put`. What was there stays when that fails."""
        if Path(lpath).is_dir():  # prefixes need no making
            return
        buffer = memoryview(bytearray(_MIB))
        with Path(lpath).open("rb", buffering=0) as source:
            callback.set_size(os.fstat(source.fileno()).st_size)
            with self.open(rpath, "xb" if mode == "create" else "wb") as target:
                while count := source.readinto(buffer):
                    target.write(buffer[:count])
                    callback.relative_update(count)

    def _get(
        self,
        pairs: list[tuple[str, Any]],
        branched: Callable[[str, Any], Any],
        got: Callable[[], None],
        version_id: str | None = None,
    ) -> None:
        part = self.config.part_size
        flying: deque[tuple[Get, str, Any]] = deque()
        largest = 0  # bytes that an object takes up until it is written

        def take() -> None:
            nonlocal largest
            first, remote, local = flying.popleft()
            with branched(remote, local) as child:
                self._write(batch, first, remote, local, child, version_id)
            largest = max(largest, min(part, first.size), 1)
            got()

        with self.client.batch() as batch:
            for number, (remote, local) in enumerate(pairs):
                bucket, key, version = self.locate(remote)
                first = batch.get(bucket, key, stop=part, open_end=True, version_id=version_id or version)
                flying.append((first, remote, local))
                if number % 8 == 0:
                    batch.start()
                if len(flying) >= min(self.config.max_connections, _MEMORY // (largest or part)):
                    take()
            while flying:
                take()

    def _write(
        self, batch: Batch, first: Get, remote: str, local: Any, callback: Callback, version_id: str | None
    ) -> None:
        """Write one object, whose first part is on its way, to its file. Of a prefix, make a folder."""
        try:
            batch.wait(first)
        except errors.NotFound:
            if isfilelike(local) or not self.isdir(remote):
                raise
            Path(local).mkdir(parents=True, exist_ok=True)
            return
        bucket, key, version = self.locate(remote)
        size, at, part = first.size, len(first.buffer), self.config.part_size
        flying: deque[Get] = deque()
        spare: list[memoryview] = []
        callback.set_size(size)
        with _whole_file(local, first.uri) as file:
            file.write(first.buffer)
            callback.relative_update(at)
            while at < size or flying:
                while at < size and len(flying) < _AHEAD:
                    stop = min(size, at + part)
                    into = (spare.pop() if spare else memoryview(bytearray(part)))[: stop - at]
                    flying += batch.get_into(
                        bucket, key, at, into, etag=first.answer_etag, version_id=version_id or version
                    )
                    at = stop
                got = flying.popleft()
                batch.wait_whole([first, got])
                file.write(got.buffer)
                callback.relative_update(len(got.buffer))
                spare.append(memoryview(got.buffer.obj))

    def _put(self, pairs: list[tuple[Any, str]], callback: Callback, mode: str = "overwrite") -> None:
        flying: deque[tuple[Put, int, Any, str]] = deque()
        held = 0  # bytes

        def take() -> None:
            nonlocal held
            put, size, local, remote = flying.popleft()
            batch.wait(put)
            held -= size
            with callback.branched(local, remote) as child:
                child.set_size(size)
                child.relative_update(size)
            callback.relative_update(1)

        try:
            with self.client.batch() as batch:
                for local, remote in pairs:
                    path = Path(local)
                    if self._intrans or not path.is_file() or path.stat().st_size > self.config.part_size:
                        with callback.branched(local, remote) as child:
                            self.put_file(local, remote, callback=child, mode=mode)
                        callback.relative_update(1)
                        continue
                    if mode == "create":
                        self.check_new(remote)
                    content = memoryview(path.read_bytes())
                    put = batch.put(*self.bucket_and_key(remote), content, only_new=mode == "create")
                    flying.append((put, len(content), local, remote))
                    held += len(content)
                    batch.start()
                    while len(flying) > self.config.max_connections or held > _MEMORY:
                        take()
                while flying:
                    take()
        finally:
            for _, remote in pairs:
                self._changed(self._strip_protocol(remote))


class Pairs:
    """Stands in for a filesystem where fsspec works out which file goes where, and takes that down.

    Args:
        fs: The filesystem.
        sources: What is to be copied.
        targets: Where to.

    Attributes:
        found: Source and target of each object, or of what nobody was asked about.
        folders: Likewise of prefixes.

    Raises:
        ValueError: Both are lists, of unequal length: fsspec would pass over what is too many.
    """

    def __init__(self, fs: Listings, sources: Any, targets: Any) -> None:
        if isinstance(sources, list) and isinstance(targets, list) and len(sources) != len(targets):
            raise ValueError(f"{len(sources)} sources and {len(targets)} targets: give as many of each")
        self._fs = fs
        self._known: dict[str, dict[str, Any] | None] = {}
        self.found: list[tuple[Any, Any]] = []
        self.folders: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def expand_path(self, *args: Any, **kwargs: Any) -> list[str]:
        self._known = self._fs.expand(*args, **kwargs)
        return sorted(self._known)

    def isdir(self, path: str) -> bool:
        known = self._known.get(path)
        return self._fs.isdir(path) if known is None else known["type"] == "directory"

    def get_file(self, source: Any, target: Any, **_: Any) -> None:
        known = self._known.get(source)
        which = self.folders if known is not None and known["type"] == "directory" else self.found
        which.append((source, target))

    put_file = cp_file = get_file

    def check_apart(self, name: Callable[[Any], str], place: Callable[[Any], Any], advice: str) -> None:
        """See that each source has a place of its own.

        Args:
            name: Of a source, as it is shown.
            place: What tells a target from others.
            advice: The end of the error's message.

        Raises:
            S3Error: Two would be the same one.
        """
        taken: dict[Any, Any] = {}
        for source, target in self.found:
            where = place(target)
            if (other := taken.setdefault(where, source)) != source:
                raise errors.S3Error(f"this and {name(other)} would both be {where}: {advice}", uri=name(source))


def _place(local: Any) -> Any:
    """What tells a local file from others; of a file object, something that none else has."""
    return object() if isfilelike(local) else os.path.normpath(local)


@contextmanager
def _whole_file(local: Any, uri: str) -> Iterator[IO[bytes]]:
    """A local file to write, which takes its place when the block ends well, and is gone when it doesn't.

    Raises:
        OSError: It cannot be written; of the kind that the cause is, and naming both ends.
    """
    if isfilelike(local):
        yield local
        return
    path = Path(os.path.realpath(local))  # a link stays one
    try:
        if os.fspath(local).endswith("/"):
            raise IsADirectoryError(errno.EISDIR, "a file's name doesn't end in a slash", local)
        if path.exists() and not path.is_file():  # a device, a pipe, or a folder, which is an error now
            with path.open("wb") as file:
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            with partial.open("xb") as file:
                yield file
            if path.exists():
                partial.chmod(path.stat().st_mode)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except errors.S3Error:
        raise
    except OSError as error:
        where = path.parent if error.filename == str(path.parent) else path  # not the partial one
        raise OSError(error.errno, f"{error.strerror} (while getting {uri})", str(where)) from None
