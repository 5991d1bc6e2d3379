"""Where the records of shards lie: found, made, checked and kept."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from tqdm import tqdm

from torch_s3 import errors
from torch_s3.data import index_file
from torch_s3.data.decompress import SUFFIXES, compression, decompressed
from torch_s3.data.manifest import Manifest
from torch_s3.filesystem import S3FileSystem
from torch_s3.publish import publishing
from torch_s3.uris import Read, read_ahead, resolve, translated

PIECE = 8 << 20  # bytes of a read, of filesystems that don't say what is best
_WINDOW = 64  # reads on their way
_HELD = 128 << 20  # bytes on their way
_BLOCK, _END = 512, 1024  # bytes of a tar's blocks, and of the mark at its end
_MAGIC = {b"\x1f\x8b": "gzip, name it .gz", b"\x28\xb5\x2f\xfd": "zstd, name it .zst"}
_RATIO = 1 << 15  # zstd and gzip compress nothing to less than one byte for so many

Bounds = NDArray[np.int64]
"""Where each of a shard's n records starts, and the last one ends: int64 (n + 1,), of its decompressed bytes."""


class Scan(Protocol):
    """What finds a shard's records, fed with its bytes in order."""

    def feed(self, data: memoryview) -> None:
        """Take the next bytes."""

    def finish(self) -> Bounds:
        """All that was found; an error if the shard is cut off."""

    def bounds(self) -> Bounds:
        """What was found so far."""


class Format(Protocol):
    """A format of shards.

    Attributes:
        kind: ``"tfrecord"`` or ``"tar"``.
    """

    kind: str

    def scan(self, uri: str) -> Scan:
        """What finds a shard's records."""


class ShardIndex:
    """The bounds of all shards' records, packed: 8 bytes a record. Pickles in half of it, where no record has 4 GiB.

    Args:
        bounds: Of each shard.

    Attributes:
        first: int64 (shards + 1,): the number of each shard's first record, over all shards, and of all records.
    """

    def __init__(self, bounds: Sequence[Bounds]) -> None:
        counts = np.array([len(some) - 1 for some in bounds], np.int64)
        self.first: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self._bounds = np.concatenate([np.zeros(0, np.int64), *bounds])

    def __len__(self) -> int:
        return int(self.first[-1])

    def of(self, shard: int) -> Bounds:
        """Those of one shard; not a copy."""
        return self._bounds[self.first[shard] + shard : self.first[shard + 1] + shard + 1]

    def offset(self, shard: int, number: int) -> int:
        """Where a record starts in its shard."""
        return int(self._bounds.item(self.first.item(shard) + shard + number))

    @property
    def fingerprint(self) -> str:
        """A hash of how many records each shard has, 32 hex digits.

        Not of where they start: of a tar with folders, indexes differ in whose their headers are.
        """
        return hashlib.blake2b(self.first.tobytes(), digest_size=16).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        steps = np.diff(self._bounds, prepend=0)
        fit = len(steps) == 0 or (steps.min() >= -(1 << 31) and steps.max() < 1 << 31)
        return {"first": self.first, "steps": steps.astype(np.int32) if fit else steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.first = state["first"]
        self._bounds = np.cumsum(state["steps"], dtype=np.int64)


def load_index(
    manifest: Manifest,
    fs: fsspec.AbstractFileSystem,
    format: Format,
    *,
    folder: str | os.PathLike[str] | None = None,
    partial: bool = False,
) -> tuple[ShardIndex, list[errors.IntegrityError]]:
    """The index of these shards: from ``folder``, from the files beside them, or made by reading them once.

    Args:
        manifest: The shards, of known sizes.
        fs: Where they are.
        format: What they are.
        folder: Where indexes are kept for the next time, a folder or a uri.
        partial: Take what can be read of a damaged shard.

    Returns:
        It, and what is wrong with damaged shards, with ``partial``.

    Raises:
        InvalidManifest: An index file beside a shard is not that shard's.
        IntegrityError: A shard is damaged, unless ``partial``.
    """
    kept = None if folder is None else _Kept(os.fspath(folder), fs)
    found: list[Bounds | None] = [None] * len(manifest)
    if kept is not None:
        found = list(kept.load(manifest, format.kind))
    for shard, bounds in _beside(manifest, fs, format, _missing(found)):
        found[shard] = bounds
    wrong = []
    for shard, bounds, error in _made(manifest, fs, format, _missing(found)):
        if error is not None:
            if not partial:
                raise error
            wrong.append(error)
        elif kept is not None:
            kept.save(manifest, shard, format.kind, bounds)
        found[shard] = bounds
    return ShardIndex([bounds for bounds in found if bounds is not None]), wrong


def piece_size(fs: fsspec.AbstractFileSystem) -> int:
    """Bytes of one read."""
    return fs.config.part_size if isinstance(fs, S3FileSystem) else PIECE


def pieces(read: Read, size: int) -> Iterator[Read]:
    """Reads of an object from ``read.start`` to its end, in order."""
    assert read.size is not None
    for start in range(read.start, read.size, size):
        yield read._replace(start=start, stop=min(read.size, start + size))


def _missing(found: Sequence[Bounds | None]) -> list[int]:
    return [shard for shard, bounds in enumerate(found) if bounds is None]


def _beside(
    manifest: Manifest, fs: fsspec.AbstractFileSystem, format: Format, shards: Iterable[int]
) -> Iterator[tuple[int, Bounds]]:
    """The index files there are beside shards: ``shard.tar.idx``, or else ``shard.idx``."""
    uris = [(shard, name) for shard in shards for name in _names(manifest.uri(shard))]
    done: dict[int, tuple[Bounds, str]] = {}
    reads = (Read(fs._strip_protocol(name)) for _, name in uris)
    for (shard, name), text in zip(uris, read_ahead(fs, reads, window=_WINDOW), strict=True):
        # Who may not list a bucket is refused what isn't there.
        if isinstance(text, (errors.NotFound, errors.AccessDenied)) or shard in done:
            continue
        if isinstance(text, errors.S3Error):
            raise text
        try:
            bounds = index_file.parse(bytes(text), format.kind, name)
        except errors.IntegrityError as error:
            raise errors.InvalidManifest(str(error).removeprefix(f"{name}: "), uri=name) from None
        _check(bounds, manifest, shard, format.kind, name)
        done[shard] = bounds, name
    if format.kind == "tar":
        _check_behind(done, manifest, fs, format)
    yield from ((shard, bounds) for shard, (bounds, _) in done.items())


def _names(uri: str) -> list[str]:
    stem = uri
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    folder, slash, name = stem.rpartition("/")
    stem = folder + slash + name.rpartition(".")[0] if "." in name else stem
    return list(dict.fromkeys([f"{uri}.idx", f"{stem}.idx"]))


def _check(bounds: Bounds, manifest: Manifest, shard: int, kind: str, name: str) -> None:
    """Refuse bounds that can't be the shard's."""
    uri, size = manifest.uri(shard), int(manifest.sizes[shard])
    end = int(bounds[-1])
    if compression(uri) is not None:
        fits = end <= size * _RATIO  # its decompressed size isn't known
    elif kind == "tar":
        fits = end <= size
    else:
        fits = end == size
    if not fits or bounds[0] < 0 or (np.diff(bounds) <= 0).any():
        raise _stranger(manifest, shard, end, name)


def _check_behind(
    found: Mapping[int, tuple[Bounds, str]], manifest: Manifest, fs: fsspec.AbstractFileSystem, format: Format
) -> None:
    """Refuse bounds of tars that have samples behind them. Where no end mark comes next, all that does is looked at."""
    ends = {shard: int(bounds[-1]) for shard, (bounds, _) in found.items() if compression(manifest.uri(shard)) is None}
    ends = {shard: end for shard, end in ends.items() if end + _END < manifest.sizes[shard]}
    reads = (manifest.read(shard, fs)._replace(start=end, stop=end + _BLOCK) for shard, end in ends.items())
    for (shard, end), block in zip(ends.items(), read_ahead(fs, reads, window=_WINDOW), strict=True):
        if isinstance(block, errors.S3Error):
            raise block
        if not bytes(block).strip(b"\0"):
            continue
        rest = pieces(manifest.read(shard, fs)._replace(start=end), piece_size(fs))
        behind = read_ahead(fs, rest, window=_WINDOW, max_bytes=_HELD)
        with contextlib.closing(behind):  # type: ignore[type-var]  # a generator
            if has_records(map(_good, behind), format, manifest.uri(shard)):
                raise _stranger(manifest, shard, end, found[shard][1])


def has_records(rest: Iterable[memoryview], format: Format, uri: str) -> bool:
    """Whether there are records, or damage, in the rest of a shard, which begins where one could. All of it is taken.

    Raises:
        S3Error: What taking it raises.
    """
    scan, size, damaged = format.scan(uri), 0, False
    for piece in rest:
        size += len(piece)
        try:
            if not damaged:
                scan.feed(piece)
        except errors.IntegrityError:
            damaged = True
    try:
        return damaged or (size > 0 and len(scan.finish()) > 1)
    except errors.IntegrityError:
        return True


def _good(piece: memoryview | bytes | errors.S3Error) -> memoryview:
    if isinstance(piece, errors.S3Error):
        raise piece
    return memoryview(piece)


def _stranger(manifest: Manifest, shard: int, end: int, name: str) -> errors.InvalidManifest:
    uri, size = manifest.uri(shard), int(manifest.sizes[shard])
    words = f"it is the index of another shard than {uri}: its records end at byte {end:,}, the shard at {size:,}"
    return errors.InvalidManifest(f"{words}; remove it, and make it anew by write_index()", uri=name)


def _made(
    manifest: Manifest, fs: fsspec.AbstractFileSystem, format: Format, shards: Sequence[int]
) -> Iterator[tuple[int, Bounds, errors.IntegrityError | None]]:
    """What a pass over the shards finds; all of their bytes are read, several pieces at a time."""
    size = piece_size(fs)
    reads = (piece for shard in shards for piece in pieces(manifest.read(shard, fs), size))
    total = int(manifest.sizes[list(shards)].sum()) if shards else 0
    bar = tqdm(desc=f"indexing {manifest.root}", unit="B", unit_scale=True, total=total, delay=1, disable=None)
    ahead = read_ahead(fs, reads, window=_WINDOW, max_bytes=_HELD)
    with bar, contextlib.closing(ahead):  # type: ignore[type-var]  # a generator
        for shard in shards:
            uri, error = manifest.uri(shard), None
            own = itertools.islice(ahead, -(-int(manifest.sizes[shard]) // size))
            scan, head = format.scan(uri), b""
            try:
                for some in _bytes(own, uri, bar):
                    head = head or bytes(some[:4])
                    scan.feed(some)
                bounds = scan.finish()
            except errors.IntegrityError as damage:
                error, bounds = damage.with_traceback(None), scan.bounds()
                if packed := next((words for magic, words in _MAGIC.items() if head.startswith(magic)), None):
                    error = errors.IntegrityError(f"it is no {format.kind}, but compressed: {packed}", uri=uri)
                deque(own, 0)  # the rest of it
            yield shard, bounds, error


def _bytes(own: Iterator[Any], uri: str, bar: tqdm[Any]) -> Iterator[memoryview]:
    """A shard's bytes, decompressed."""

    def counted() -> Iterator[memoryview]:
        for piece in map(_good, own):
            bar.update(len(piece))
            yield piece

    kind = compression(uri)
    return counted() if kind is None else decompressed(counted(), kind, uri)


class _Kept:
    """Indexes kept in a folder, or under a uri, in files named by the shard's uri, size, and ETag or, on disk, time."""

    def __init__(self, folder: str, fs: fsspec.AbstractFileSystem) -> None:
        self._source = fs
        scheme, mark, _ = folder.partition("://")
        if not mark:
            self._fs, self._path = resolve(f"file://{Path(folder).expanduser().absolute()}")
        else:
            own = scheme in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)
            self._fs, self._path = resolve(folder, filesystem=fs if own else None)

    def load(self, manifest: Manifest, kind: str) -> Iterator[Bounds | None]:
        """Of each shard what there is."""
        reads = (Read(self._name(manifest, shard, kind)) for shard in range(len(manifest)))
        for shard, content in enumerate(read_ahead(self._fs, reads, window=_WINDOW)):
            bounds = None
            if not isinstance(content, errors.S3Error):
                with contextlib.suppress(Exception):  # numpy raises whatever it hits; it is made anew
                    found = np.load(io.BytesIO(content), allow_pickle=False).astype(np.int64)
                    _check(found, manifest, shard, kind, "")
                    bounds = found
            elif not isinstance(content, errors.NotFound):
                raise content
            yield bounds

    def save(self, manifest: Manifest, shard: int, kind: str, bounds: Bounds) -> None:
        """Keep one; it appears at once."""
        path = self._name(manifest, shard, kind)
        where = self._fs.unstrip_protocol(path)
        with translated(where), publishing(self._fs, path, where, only_new=False) as file:
            np.save(file, bounds)

    def _name(self, manifest: Manifest, shard: int, kind: str) -> str:
        read = manifest.read(shard, self._source)
        version = read.etag or ""
        if isinstance(self._source, LocalFileSystem):
            version = str(Path(read.path).stat().st_mtime_ns)
        what = "\0".join([kind, manifest.uri(shard), version, str(read.size)])
        name = hashlib.blake2b(what.encode(errors="surrogatepass"), digest_size=20).hexdigest()
        return f"{self._path.rstrip('/')}/{name}.npy"
