"""Objects kept on a local disk, shared by all that read them on one machine."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import struct
import tempfile
import time
import uuid
import warnings
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from zlib_ng import zlib_ng

from torch_s3 import errors, given
from torch_s3.uris import Read, Reader

_HEAD = struct.Struct("<8sI")  # magic, CRC-32 of the object
_MAGIC = b"torchs3\1"
_USED = struct.Struct("<q")
_UNKNOWN = -(1 << 62)
_FINE = 60  # seconds to which the time of the last use is kept
_STALE = 3600  # seconds after which a file that is still being written has no writer
_KEPT = 0.9  # share of the size that eviction leaves: it looks at every entry, which should be seldom
_SHARD = re.compile("[0-9a-f]{2}")
_ENTRY = re.compile("[0-9a-f]{40}")
_UNFINISHED = re.compile("[.][0-9a-f]{32}")

Part = tuple[int, int] | None
"""Half-open bytes of an object, or all of it."""


class Cache:
    """Objects and parts of them in a folder, each an immutable file named by uri, ETag and part.

    Any number of threads, processes and jobs may use one folder. A file appears at once or not at all; one that is
    damaged is dropped, as its checksum is looked at whenever it is read. Where the objects together are larger than
    ``size``, those go first that were not used for longest, to a minute; it may be exceeded by what the processes are
    writing meanwhile. Pickles.

    Nothing that goes wrong with the disk while reading or writing is an error: an object is then just not there. The
    first write that fails is a warning, and the last in its process.

    Args:
        folder: Made if it isn't there.
        size: Bytes, ``None`` for as much as there is room for.

    Raises:
        CacheError: The folder can't be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], size: int | None = None) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.size = None if size is None else given.whole("cache_size", size, least=1)
        self._off = self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder), self._locked("evict"):
                self._add(0)
        except OSError as error:
            words = f"cannot be used for a cache: {error.strerror}; give a folder that can be written to"
            raise errors.CacheError(words, uri=str(self.folder)) from None

    def get(self, uri: str, etag: str | None, size: int | None = None, part: Part = None) -> memoryview | None:
        """An object's bytes, ``None`` if they aren't here.

        Args:
            uri: The object.
            etag: Its version; without one, nothing is here.
            size: Bytes that it must have, if known.
            part: The part of it, ``None`` for all.
        """
        file = self.open(uri, etag, part)
        return None if file is None else self.read(file, size)

    def open(self, uri: str, etag: str | None, part: Part = None) -> io.FileIO | None:
        """An object's file, for :meth:`read`; the disk is told to fetch it meanwhile."""
        if not etag:
            return None
        try:
            file = io.FileIO(self._path(uri, etag, part))
        except OSError:
            return None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return file

    def read(self, file: io.FileIO, size: int | None = None) -> memoryview | None:
        """The bytes of what :meth:`open` gave, as :meth:`get`; closes it."""
        try:
            with file:
                content = file.readall()
                if time.time() - os.fstat(file.fileno()).st_mtime > _FINE:
                    with contextlib.suppress(OSError):  # it can be read all the same
                        os.utime(file.fileno())
        except OSError:
            return None
        body = memoryview(content)[_HEAD.size :]
        if content[: _HEAD.size] != _head(body) or size not in (None, len(body)):
            with contextlib.suppress(OSError):
                Path(str(file.name)).unlink()
                self._add(-len(content))
            return None
        return body

    def put(self, uri: str, etag: str | None, data: Any, part: Part = None) -> None:
        """Keep an object's bytes, any buffer. Without an ETag, or larger than the cache, it isn't kept."""
        body = memoryview(data)
        nbytes = _HEAD.size + len(body)
        if self._off or (self.size is not None and nbytes > self.size):
            return
        if not etag:
            if not self._warned:
                self._warned = True
                words = "objects whose ETag isn't known are not cached; Manifest.from_prefix finds it, a list has none"
                warnings.warn(f"{uri}: {words}", RuntimeWarning, stacklevel=2)
            return
        try:
            self._write(Path(self._path(uri, etag, part)), body)
            used = self._add(nbytes)
            if self.size is not None and not 0 <= used <= self.size:
                self._evict(self.size)
        except OSError as error:
            self._off = True
            words = f"{self.folder}: nothing more is cached by this process, which goes on without ({error.strerror})"
            warnings.warn(words, RuntimeWarning, stacklevel=2)

    def _path(self, uri: str, etag: str, part: Part = None) -> str:
        what = f"{uri}\0{etag}" if part is None else f"{uri}\0{etag}\0{part[0]}-{part[1]}"
        name = hashlib.blake2b(what.encode(errors="surrogatepass"), digest_size=20).hexdigest()
        return f"{self.folder}/{name[:2]}/{name}"

    def _write(self, path: Path, body: memoryview) -> None:
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        try:
            try:
                file = io.FileIO(temporary, "x")
            except FileNotFoundError:
                path.parent.mkdir(exist_ok=True)
                file = io.FileIO(temporary, "x")
            with file:
                for part in (_head(body), body):
                    left = memoryview(part)
                    while left:  # a disk that is nearly full takes less
                        left = left[file.write(left) :]
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def _add(self, nbytes: int) -> int:
        """Count bytes that came or went: all that are used now, far below 0 until somebody has looked what is there."""
        with self._locked("used") as number:
            counted = os.pread(number, _USED.size, 0)
            used: int = (_USED.unpack(counted)[0] if len(counted) == _USED.size else _UNKNOWN) + nbytes
            os.pwrite(number, _USED.pack(used), 0)
            return used

    def _evict(self, size: int) -> None:
        """Drop what was not used for longest, and count anew. Where another process is at it, leave it to that."""
        with contextlib.suppress(BlockingIOError), self._locked("evict", wait=False):
            before = self._add(0)
            names, sizes, times = self._entries()
            used, left = int(sizes.sum()), size if int(sizes.sum()) <= size else int(size * _KEPT)
            for index in np.argsort(times, kind="stable").tolist():
                if used <= left:
                    break
                name = names[20 * index : 20 * index + 20].hex()
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / name[:2] / name).unlink()
                used -= int(sizes[index])
            self._add(used - before)  # and what came meanwhile stays counted

    def _entries(self) -> tuple[bytearray, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Names (20 bytes each), sizes and times of last use of all entries: packed, for there may be millions."""
        names, sizes, times = bytearray(), array("q"), array("q")
        for shard in os.scandir(self.folder):
            if not _SHARD.fullmatch(shard.name):
                continue
            for entry in os.scandir(shard.path):
                with contextlib.suppress(FileNotFoundError):
                    said = entry.stat()
                    if _ENTRY.fullmatch(entry.name):
                        names += bytes.fromhex(entry.name)
                        sizes.append(said.st_size)
                        times.append(said.st_mtime_ns)
                    elif _UNFINISHED.fullmatch(entry.name) and time.time() - said.st_mtime > _STALE:
                        Path(entry.path).unlink()
        return names, np.frombuffer(sizes, np.int64), np.frombuffer(times, np.int64)

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[int]:
        """A lock of the folder, held by this thread alone: the file's number.

        Raises:
            BlockingIOError: Another has it, with ``wait=False``.
        """
        import fcntl  # Unix only

        number = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(number, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield number
        finally:
            os.close(number)


class CachedReader:
    """A reader that takes from a cache what is there, and keeps what comes; for ``read_ahead(…, around=…)``.

    Args:
        reader: For the rest.
        cache: The cache.
        fs: Of what is read.
        hit: Called for each object that the cache had.
    """

    def __init__(
        self, reader: Reader, cache: Cache, fs: fsspec.AbstractFileSystem, hit: Callable[[], None] = lambda: None
    ) -> None:
        self._reader, self._cache, self._fs, self._hit = reader, cache, fs, hit
        self._open: set[io.FileIO] = set()
        self.part_size = reader.part_size

    def ask(self, read: Read) -> tuple[Read, str, io.FileIO | None, Any]:
        """Open what is there, ask for the rest."""
        uri = self._fs.unstrip_protocol(read.path)
        file = self._cache.open(uri, read.etag, _part(read))
        if file is not None:
            self._open.add(file)
        return read, uri, file, self._reader.ask(read) if file is None else None

    def start(self) -> None:
        """Begin with what was asked for."""
        self._reader.start()

    def outcome(self, coming: tuple[Read, str, io.FileIO | None, Any]) -> memoryview | bytes | errors.S3Error:
        """The bytes, from wherever they are."""
        read, uri, file, asked = coming
        if file is not None:
            self._open.remove(file)
            body = self._cache.read(file, read.length)
            if body is not None:
                self._hit()
                return body
            asked = self._reader.ask(read)
        outcome = self._reader.outcome(asked)
        if not isinstance(outcome, errors.S3Error):
            self._cache.put(uri, read.etag, outcome, _part(read))
        return outcome

    def close(self) -> None:
        """Cancel what is on its way."""
        for file in self._open:
            file.close()
        self._reader.close()


def open_cache(folder: str | os.PathLike[str] | None, size: int | None) -> Cache | None:
    """What ``cache_dir`` and ``cache_size`` of a dataset mean.

    Raises:
        CacheError: The folder can't be written to.
        ValueError: A size without a folder, or without room.
    """
    if folder is not None:
        return Cache(folder, size)
    if size is not None:
        raise ValueError(f"cache_size={size} is that of cache_dir, which isn't given")
    return None


def _part(read: Read) -> Part:
    return None if read.stop is None else (read.start, read.stop)


def _head(body: memoryview) -> bytes:
    return _HEAD.pack(_MAGIC, zlib_ng.crc32(body))
