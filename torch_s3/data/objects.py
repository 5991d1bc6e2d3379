"""Objects as samples, whatever is in them."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import fsspec
import torch.utils.data

from torch_s3 import errors
from torch_s3.data.cache import Cache, CachedReader, open_cache
from torch_s3.data.manifest import Manifest
from torch_s3.filesystem import S3FileSystem
from torch_s3.reader import S3Reader
from torch_s3.uris import Read, check, read_ahead, resolve, translated

_IN_FLIGHT = 256 << 20  # bytes of a batch on their way at once


class S3Object:
    """One version of an object: what a dataset's ``transform`` is given.

    Pickles, with the bytes if it has them. Any thread.

    Args:
        uri: Its name.
        filesystem: Where it is read from, when it is.
        size: Bytes, ``None`` if unknown.
        etag: The version to read, ``None`` for whatever is there.
        data: Its bytes, read ahead already; nothing is then read again.

    Attributes:
        uri: Its name.
        etag: The version that is read, ``None`` for whatever is there.
    """

    def __init__(
        self,
        uri: str,
        filesystem: fsspec.AbstractFileSystem,
        *,
        size: int | None = None,
        etag: str | None = None,
        data: memoryview | bytes | None = None,
    ) -> None:
        self.uri = uri
        self.etag = etag
        self._fs = filesystem
        self._size = size
        self._data = data

    def __repr__(self) -> str:
        return f"S3Object({self.uri!r})"

    @property
    def size(self) -> int:
        """Bytes; asked for where neither a listing nor the read has told."""
        if self._data is not None:
            return len(self._data)
        if self._size is None:
            with translated(self.uri):
                info = self._fs.info(self._path, refresh=True) if self._ours else self._fs.info(self._path)
            self._size = int(info["size"])
            self.etag = self.etag or (info.get("ETag") or "").strip('"') or None
        return self._size

    def read(self, start: int | None = None, stop: int | None = None) -> bytes:
        """The object's bytes, or those of ``[start, stop)``, clipped and counted from the end as slices are.

        Raises:
            ObjectChanged: It is no longer the version that was listed.
            S3Error: It can't be read.
        """
        if self._data is not None:
            if start is None and stop is None:
                self._data = bytes(self._data)  # which copies once
                return self._data
            return bytes(self._data[start:stop])
        whole = not start and stop is None
        if (start or 0) < 0 or (stop or 0) < 0 or not (self._ours or whole):  # others don't clip
            start, stop, _ = slice(start, stop).indices(self.size)
        start = start or 0
        if stop is not None and stop <= start:
            return b""
        if isinstance(self._fs, S3FileSystem):
            bucket, key, version = self._fs.locate(self._path)
            which = {"etag": self.etag, "version_id": version}
            with self._fs.client.batch() as batch:
                fetch = batch.fetch(bucket, key, start=start, stop=stop, size=self._size if whole else None, **which)
                return bytes(fetch.result())
        if whole:
            (found,) = read_ahead(self._fs, [Read(self._path, self._size, self.etag)], window=1)
            if isinstance(found, errors.S3Error):
                raise found
            return bytes(found)
        with translated(self.uri):
            return bytes(self._fs.cat_file(self._path, start=start, end=stop))

    def open(self) -> Any:
        """A seekable binary file, which reads what is asked of it by ranges; close it after use."""
        if self._data is not None:
            return io.BytesIO(self.read())
        if isinstance(self._fs, S3FileSystem):
            bucket, key, version = self._fs.locate(self._path)
            size = self.size  # which may tell the ETag
            return S3Reader(self._fs.client, bucket, key, size=size, etag=self.etag, version_id=version)
        with translated(self.uri):
            return self._fs.open(self._path, "rb")

    @property
    def _ours(self) -> bool:
        return isinstance(self._fs, S3FileSystem)

    @property
    def _path(self) -> str:
        return str(self._fs._strip_protocol(self.uri))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": None if self._data is None else bytes(self._data)}


class OwnFilesystem:
    """A filesystem for this process. In a forked child, others than ours are made anew: their threads don't fork."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem) -> None:
        self._fs, self._pid = filesystem, os.getpid()

    def __call__(self) -> fsspec.AbstractFileSystem:
        """The filesystem."""
        if self._pid != os.getpid() and not isinstance(self._fs, S3FileSystem):
            remake, *arguments = self._fs.__reduce__()
            self._fs, self._pid = remake(*arguments[0]), os.getpid()
        return self._fs

    def __getstate__(self) -> dict[str, Any]:
        return {"_fs": self._fs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._fs, self._pid = state["_fs"], os.getpid()


SOURCES = "give the uri of a prefix, a list of uris, or a Manifest"


def manifest_of(
    source: str | os.PathLike[str] | Sequence[str] | Manifest,
    *,
    suffixes: str | Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Manifest:
    """The manifest for a dataset's source: itself, a listing of a prefix, or a list of uris."""
    if isinstance(source, Manifest):
        return source
    if isinstance(source, (str, os.PathLike)):
        options: dict[str, Any] = {"storage_options": storage_options, "filesystem": filesystem}
        return Manifest.from_prefix(os.fspath(source), suffixes=suffixes, **options)
    check(storage_options, filesystem)
    whole = filesystem.unstrip_protocol if filesystem is not None else os.fspath
    try:
        uris = [whole(os.fspath(uri)) for uri in source]
    except TypeError:
        raise TypeError(f"source={source!r:.200}: {SOURCES}") from None
    return Manifest.from_uris(uris)


class S3MapDataset(torch.utils.data.Dataset[Any]):
    """Any objects, map-style: for samplers that choose what comes next.

    A ``DataLoader`` asks for a batch at a time, whose objects are then read concurrently. Where the order needn't be
    a sampler's, the iterable datasets are faster: they read ahead from batch to batch. Works under fork, forkserver
    and spawn.

    Args:
        source: ``s3://bucket/prefix/`` (or any uri that fsspec lists), a list of uris, or a
            :class:`~torch_s3.Manifest`.
        transform: Called with an :class:`S3Object`; what it returns is the sample. ``None``: the object itself is.
        prefetch: Read objects whole before the transform gets them. ``False``: it reads what it needs, by
            ``read(start, stop)`` or ``open()``; for objects of which that is little.
        cache_dir: A local folder to keep prefetched objects in, see :class:`~torch_s3.data.cache.Cache`.
        cache_size: The most bytes to keep there, ``None`` for as much as there is room for.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Any fsspec filesystem to use instead.

    Raises:
        NotFound, EmptyDataset, AccessDenied, CacheError, …: The source can't be listed; here, before training starts.
            From reading samples, in any worker: what went wrong with an object, naming its uri.

    Attributes:
        manifest: What is read.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str] | Manifest,
        *,
        transform: Callable[[S3Object], Any] | None = None,
        prefetch: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        self.manifest = manifest_of(source, storage_options=storage_options, filesystem=filesystem)
        fs, _ = resolve(self.manifest.root, storage_options=storage_options, filesystem=filesystem)
        self.transform = transform
        self._prefetch = prefetch
        self._cache = open_cache(cache_dir, cache_size)
        self._filesystem = OwnFilesystem(fs)

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples at these indices, in this order, read concurrently.

        Raises:
            IndexError: There is no such sample.
            S3Error: One could not be read.
        """
        fs = self._filesystem()
        places = [checked(index, len(self)) for index in indices]
        samples = []
        with closing(self._bodies(places, fs)) as bodies:
            for place, body in zip(places, bodies, strict=True):
                if isinstance(body, errors.S3Error):
                    raise body
                uri, read = self.manifest.uri(place), self.manifest.read(place, fs)
                sample: Any = S3Object(uri, fs, size=read.size, etag=read.etag, data=body)
                samples.append(sample if self.transform is None else transformed(self.transform, sample, uri))
        return samples

    def _bodies(self, places: Sequence[int], fs: fsspec.AbstractFileSystem) -> Generator[Any]:
        if self._prefetch:
            yield from read_batch(self.manifest, places, fs, self._cache)
        else:
            yield from itertools.repeat(None, len(places))


def read_batch(
    manifest: Manifest, places: Sequence[int], fs: fsspec.AbstractFileSystem, cache: Cache | None
) -> Generator[memoryview | bytes | errors.S3Error]:
    """The bytes of these objects in order, or the error in its place; asked for all at once, unless they are large."""
    reads = (manifest.read(place, fs) for place in places)
    around = (lambda reader: reader) if cache is None else (lambda reader: CachedReader(reader, cache, fs))
    yield from read_ahead(fs, reads, window=max(1, len(places)), max_bytes=_IN_FLIGHT, around=around)


def checked(index: int, count: int) -> int:
    """An index from 0; from the end, as in sequences, where it is negative.

    Raises:
        IndexError: It is out of range.
    """
    if not -count <= index < count:
        raise IndexError(f"sample {index} of {count}")
    return int(index) % count


def transformed(transform: Callable[[Any], Any], value: Any, uri: str) -> Any:
    """What ``transform`` makes of ``value``; an exception of it is told which sample it was."""
    try:
        return transform(value)
    except StopIteration as error:  # which would end the iteration without a word
        raise RuntimeError(f"the transform raised StopIteration for {uri}") from error
    except Exception as error:
        error.add_note(f"while transforming {uri}")
        raise
