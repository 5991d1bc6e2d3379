"""What the datasets of shards share: their order, how their records are read, and their index."""

from __future__ import annotations

import os
import re
import warnings
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from torch_s3 import errors, given
from torch_s3.data import policy
from torch_s3.data.braces import expand
from torch_s3.data.chunks import ChunkReader
from torch_s3.data.dealing import Contiguous
from torch_s3.data.decompress import check_installed
from torch_s3.data.manifest import Manifest
from torch_s3.data.objects import SOURCES, checked, transformed
from torch_s3.data.resumable import Run
from torch_s3.data.resume import Identity
from torch_s3.data.shard_index import Scan, load_index
from torch_s3.data.shard_order import ShardOrder
from torch_s3.data.stats import Row
from torch_s3.data.stream import Body, S3Stream
from torch_s3.uris import Reader, check, translated

_PIECE = 4096  # records planned at a time, where there is no shuffle buffer

Source = str | os.PathLike[str] | Sequence[str] | Manifest


class Shards(S3Stream):
    """The base of the datasets of shards, which say what a record is, and what is made of it.

    Its arguments are those of :class:`~torch_s3.S3TFRecordDataset`.
    """

    _dealing = Contiguous()
    kind: str
    """``"tfrecord"`` or ``"tar"``."""

    def __init__(
        self,
        source: Source,
        *,
        names: re.Pattern[str],
        transform: Callable[[Any], Any] | None,
        shuffle: bool,
        shuffle_buffer: int,
        index_dir: str | os.PathLike[str] | None,
        storage_options: Mapping[str, Any] | None,
        filesystem: fsspec.AbstractFileSystem | None,
        **options: Any,
    ) -> None:
        block = given.whole("shuffle_buffer", shuffle_buffer, least=1)
        self.transform = transform
        self._buffer = block if given.flag("shuffle", shuffle) else None
        self._index_dir = index_dir
        storage: dict[str, Any] = {"storage_options": storage_options, "filesystem": filesystem}
        manifest = _manifest_of(source, names, self.kind, **storage)
        for uri in manifest:
            check_installed(uri)
        super().__init__(manifest, shuffle=shuffle, lookahead=None, **options, **storage)

    # ------------------------------------------------------------------ what the datasets say

    @abstractmethod
    def scan(self, uri: str) -> Scan:
        """What finds the records of a shard."""

    @abstractmethod
    def _text(self, shard: int, records: Iterator[memoryview]) -> str:
        """The text of a shard's index file; ``records`` reads them."""

    @abstractmethod
    def _value(self, data: memoryview, uri: str, number: int, offset: int) -> Any:
        """What is made of a record, before the transform. Any thread."""

    # ------------------------------------------------------------------ users' own

    def write_index(self) -> None:
        """Put an index file beside each shard, ``<shard>.idx``, for everybody who reads them later.

        Raises:
            IntegrityError: A shard is damaged, and was read as far as it goes; no index is written.
            AccessDenied, …: One can't be written.
        """
        if self._damaged:
            first = self._damaged[0]
            raise errors.IntegrityError(first.message.removeprefix(f"{first.uri}: "), uri=first.uri)
        fs, turns = self._filesystem(), np.arange(len(self.manifest), dtype=np.int64)
        for shard in range(len(self.manifest)):
            records = [np.arange(self._first[shard], self._first[shard + 1], dtype=np.int64)]
            with closing(self._reader(fs).records(records, turns)) as bodies:
                text = self._text(shard, map(_good, bodies))
            uri = f"{self.manifest.uri(shard)}.idx"
            with translated(uri):
                fs.pipe_file(fs._strip_protocol(uri), text.encode(errors="surrogateescape"))

    def read(self, number: int) -> Any:
        """One sample, by its number over all shards as they are listed, after the transform: one range is read.

        Of a compressed shard, everything before it is read too.

        Raises:
            IndexError: There is no such sample.
            S3Error: It can't be read.
        """
        number = checked(number, self._count)
        body = _good(self._reader(self._filesystem()).record(*self._where(number)))
        return self._sample(number, self._decode(number, body))

    @property
    def errors(self) -> list[policy.Failure]:
        """Every record that a worker of this rank could not use, with ``on_error="skip"`` or ``"replace"``, and before
        them the shards that are damaged: of those, what lies before the damage is read. Their position is -1.
        """
        return [*self._damaged, *super().errors]

    # ------------------------------------------------------------------ for the base

    def _prepare(self) -> None:
        fs = self._filesystem()
        self.manifest = self.manifest.known(fs)
        partial = self._on_error != "raise"
        self._index, wrong = load_index(self.manifest, fs, self, folder=self._index_dir, partial=partial)
        self._damaged = [
            policy.Failure(error.uri or "", type(error).__name__, str(error), None, 0, -1) for error in wrong
        ]
        if wrong:
            words = f"damaged shards, read as far as they go: {len(wrong)}; the first: {wrong[0]}"
            warnings.warn(words, stacklevel=5)
        if wrong and not len(self._index):
            raise errors.EmptyDataset(f"nothing can be read of {len(wrong)} shards: {wrong[0]}", uri=self.manifest.root)
        self._first: list[int] = self._index.first.tolist()
        self._uri = -1, ""  # of the shard that was decoded last
        self._fingerprint = f"{self.manifest.fingerprint}-{self._index.fingerprint}"

    @property
    def _count(self) -> int:
        return len(self._index)

    def _identity(self) -> Identity:
        return Identity(self._fingerprint, self._count, self._buffer or False, self._seed)

    def _order(self, epoch: int) -> ShardOrder:
        return ShardOrder(self._index.first, buffer=self._buffer, seed=self._seed, epoch=epoch)

    def _dealt(self, run: Run) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        rest, order = run.start.rest, self._order(run.start.epoch)
        worker, split = max(0, run.slot - 1), self._split(run.world_size)
        own = self._dealing.stretch(
            len(rest), split, rank=run.rank, worker=worker, workers=run.workers, taken=run.start.taken
        )
        at = own.start
        while at < own.stop:
            size = _PIECE
            if self._buffer is not None:  # up to the end of its block
                first = int(self._positions(rest, np.array([at]))[0])
                start, end = order.block(first)
                size = end - first
            positions = self._positions(rest, np.arange(at, min(own.stop, at + size)))
            if self._buffer is not None:
                outside = (positions < start) | (positions >= end)
                positions = positions[: int(outside.argmax())] if outside.any() else positions
            yield positions, order.records(positions)
            at += len(positions)

    def _bodies(
        self, run: Run, fs: fsspec.AbstractFileSystem, indices: Iterable[NDArray[np.int64]], row: Row
    ) -> Iterator[Body]:
        reader = self._reader(fs, self._around(fs, row))
        return reader.records(indices, self._order(run.start.epoch).turns)

    def _reader(
        self, fs: fsspec.AbstractFileSystem, around: Callable[[Reader], Reader] = lambda reader: reader
    ) -> ChunkReader:
        return ChunkReader(
            self.manifest,
            self._index,
            fs,
            window=self._lookahead,
            max_bytes=self._lookahead_bytes,
            around=around,
            format=self,
            damaged={failure.uri for failure in self._damaged},
        )

    def _where(self, index: int) -> tuple[int, int]:
        """Shard, and number in it."""
        shard = bisect_right(self._first, index) - 1
        return shard, index - self._first[shard]

    def _decode(self, index: int, body: Body) -> Any:
        shard, number = self._where(index)
        known, uri = self._uri
        if known != shard:
            uri = self.manifest.uri(shard)
            self._uri = shard, uri
        return self._value(body, uri, number, self._index.offset(shard, number))

    def _sample(self, index: int, decoded: Any) -> Any:
        if self.transform is None:
            return decoded
        shard, number = self._where(index)
        return transformed(self.transform, decoded, f"record {number} of {self.manifest.uri(shard)}")


def _good(body: Body) -> memoryview:
    if isinstance(body, errors.S3Error):
        raise body
    found: memoryview = body
    return found


def _manifest_of(source: Source, names: re.Pattern[str], kind: str, **storage: Any) -> Manifest:
    """The shards that a source stands for.

    Args:
        source: A uri with braces, that of one shard, or of a prefix; a list of those with braces or of shards; or a
            manifest.
        names: What the names of shards look like, to tell a shard from a prefix, and from what lies beside it.
        kind: What they are, for errors.
        **storage: The filesystem.
    """
    if isinstance(source, Manifest):
        return source
    check(**storage)
    source = getattr(source, "uris", source)  # of what pack returns
    try:
        patterns = [os.fspath(uri) for uri in ([source] if isinstance(source, (str, os.PathLike)) else source)]
    except TypeError:
        raise TypeError(f"source={source!r:.200}: {SOURCES}") from None
    for pattern in [] if isinstance(source, (str, os.PathLike)) else patterns:
        if pattern.endswith("/"):
            raise errors.InvalidUri("this is a prefix: give it alone, without a list", uri=pattern)
    uris = [uri for pattern in patterns for uri in (expand(pattern) if "{" in pattern else [pattern])]
    if isinstance(source, (str, os.PathLike)) and len(uris) == 1 and not names.search(uris[0]):
        found = Manifest.from_prefix(uris[0], **storage)
        shards = [number for number, uri in enumerate(found) if names.search(uri)]
        if not shards:
            words = (
                f"none of the {len(found)} objects here is named like x.{kind}: give a list of uris of those that are"
            )
            raise errors.EmptyDataset(words, uri=found.root)
        return found[shards]
    whole = os.fspath if storage["filesystem"] is None else storage["filesystem"].unstrip_protocol
    return Manifest.from_uris([whole(uri) for uri in uris])
