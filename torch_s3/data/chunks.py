"""Records of shards read in chunks: runs of whole records, several on their way, kept while they are needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import fsspec
import numpy as np
from numpy.typing import NDArray

from torch_s3 import errors
from torch_s3.data.decompress import compression, decompressed
from torch_s3.data.manifest import Manifest
from torch_s3.data.shard_index import Format, ShardIndex, has_records, piece_size, pieces
from torch_s3.uris import Read, Reader, read_ahead

Body = memoryview | errors.S3Error
_CHUNK_BITS = 32  # of a key, below the shard's turn


class Chunk(NamedTuple):
    """A run of a shard's records.

    Attributes:
        key: Ascends in the order of the epoch's shards.
        shard: Which one.
        start: Its first byte, of the decompressed shard.
        stop: One past its last.
    """

    key: int
    shard: int
    start: int
    stop: int


class Plan(NamedTuple):
    """Where some records lie, one item a record but for ``chunks``.

    Attributes:
        chunks: Those that are needed, in the order of their keys.
        keys: The chunk.
        starts: Its first byte in the chunk.
        stops: One past its last.
        last: Whether no later one of these is in its chunk.
    """

    chunks: list[Chunk]
    keys: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    last: NDArray[np.bool_]


class Chunks:
    """Cuts shards into chunks of as many records as ``size`` bytes hold, and at least one. Pure.

    Where a shard is cut depends on its index alone, so that others find the same chunks in a cache.
    """

    def __init__(self, index: ShardIndex, size: int) -> None:
        self._index, self._size = index, size
        self._cuts: dict[int, NDArray[np.int64]] = {}

    def cuts(self, shard: int) -> NDArray[np.int64]:
        """The number of each chunk's first record in the shard, and how many records it has."""
        found = self._cuts.get(shard)
        if found is None:
            bounds = self._index.of(shard)
            cuts, records = [0], len(bounds) - 1
            while cuts[-1] < records:
                fits = int(np.searchsorted(bounds, bounds[cuts[-1]] + self._size, side="right")) - 1
                cuts.append(max(fits, cuts[-1] + 1))
            found = self._cuts[shard] = np.array(cuts, np.int64)
        return found

    def plan(self, records: NDArray[np.int64], turns: NDArray[np.int64]) -> Plan:
        """Where these records lie.

        Args:
            records: Their numbers, over all shards.
            turns: When each shard comes.
        """
        shards = np.searchsorted(self._index.first, records, side="right") - 1
        keys, starts, stops = (np.empty_like(records) for _ in range(3))
        chunks = []
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            bounds, cuts = self._index.of(shard), self.cuts(shard)
            numbers = records[mine] - self._index.first[shard]
            within = np.searchsorted(cuts, numbers, side="right") - 1
            before = bounds[cuts[within]]
            turn = int(turns[shard]) << _CHUNK_BITS
            keys[mine], starts[mine], stops[mine] = (
                turn + within,
                bounds[numbers] - before,
                bounds[numbers + 1] - before,
            )
            chunks += [
                Chunk(turn + chunk, shard, int(bounds[cuts[chunk]]), int(bounds[cuts[chunk + 1]]))
                for chunk in np.unique(within).tolist()
            ]
        last = np.zeros(len(records), bool)
        last[len(records) - 1 - np.unique(keys[::-1], return_index=True)[1]] = True
        return Plan(sorted(chunks), keys, starts, stops, last)


class ChunkReader:
    """Reads records, given which will be wanted. Of one thread.

    Args:
        manifest: The shards.
        index: Theirs.
        fs: Where they are.
        window: Most requests on their way or read ahead.
        max_bytes: Most bytes of them. What the records that come next are in is kept beside that.
        around: What is put between, such as a cache.
        format: Tells whether there is more than a shard's index knows. Of compressed ones, only their end shows it.
        damaged: The uris of shards whose ends can't be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        index: ShardIndex,
        fs: fsspec.AbstractFileSystem,
        *,
        window: int,
        max_bytes: int,
        around: Callable[[Reader], Reader] = lambda reader: reader,
        format: Format,
        damaged: Collection[str] = (),
    ) -> None:
        self._manifest, self._index, self._fs = manifest, index, fs
        self._format, self._damaged = format, damaged
        self._piece = piece_size(fs)
        self._chunks = Chunks(index, self._piece)
        self._options: dict[str, Any] = {"window": window, "max_bytes": max_bytes, "around": around}

    def records(self, numbers: Iterable[NDArray[np.int64]], turns: NDArray[np.int64]) -> Generator[Body]:
        """The bytes of these records in order, or the error in place of them.

        Args:
            numbers: Over all shards. What is in one array, and in the next, may be read at the same time.
            turns: When each shard comes in this order; compressed ones must come in it.
        """
        numbers, ahead = itertools.tee(numbers)  # planned twice: the plans of all that is ahead would be larger than it
        plans = (self._chunks.plan(some, turns) for some in numbers)
        wanted = _wanted(self._chunks.plan(some, turns).chunks for some in ahead)
        held: dict[int, Body] = {}
        with closing(self._read(wanted)) as arriving:
            for plan, following in itertools.pairwise(itertools.chain(plans, [None])):
                assert plan is not None
                later = set() if following is None else {chunk.key for chunk in following.chunks}
                for key, start, stop, last in zip(*(some.tolist() for some in plan[1:]), strict=True):
                    while key not in held:
                        arrived, body = next(arriving)
                        held[arrived] = body
                    body = held[key]
                    if last and key not in later:
                        del held[key]
                    yield body if isinstance(body, errors.S3Error) else body[start:stop]
                    del body

    def record(self, shard: int, number: int) -> Body:
        """One record of a shard, by a range of its own, or the error in place of it."""
        chunk = Chunk(0, shard, self._index.offset(shard, number), self._index.offset(shard, number + 1))
        with closing(self._read(iter([chunk]))) as arriving:
            return next(arriving)[1]

    def _read(self, wanted: Iterator[Chunk]) -> Generator[tuple[int, Body]]:
        for shard, group in itertools.groupby(wanted, self._compressed):
            if shard is not None:
                yield from self._stream(shard, group)
                continue
            chunks, asked = itertools.tee(group)
            with closing(read_ahead(self._fs, map(self._range, asked), **self._options)) as bodies:  # type: ignore[type-var]
                for chunk, body in zip(chunks, bodies, strict=False):
                    yield chunk.key, body if isinstance(body, errors.S3Error) else memoryview(body)
                    del body

    def _compressed(self, chunk: Chunk) -> int | None:
        return chunk.shard if compression(self._manifest.uri(chunk.shard)) else None

    def _range(self, chunk: Chunk) -> Read:
        return self._manifest.read(chunk.shard, self._fs)._replace(start=chunk.start, stop=chunk.stop)

    def _stream(self, shard: int, chunks: Iterable[Chunk]) -> Generator[tuple[int, Body]]:
        """Chunks of a compressed shard: read from its start, and once more where one lies before what was read."""
        stream, rest, at = self._open(shard), memoryview(b""), 0
        error: errors.S3Error | None = None
        end = int(self._index.of(shard)[-1])
        try:
            for chunk in chunks:
                if chunk.start < at and error is None:
                    stream.close()
                    stream, rest, at = self._open(shard), memoryview(b""), 0
                found = memoryview(bytearray(chunk.stop - chunk.start))
                try:
                    while error is None and at < chunk.stop:
                        rest = rest or next(stream, memoryview(b""))
                        if not rest:
                            words = f"it has {at:,} bytes decompressed, and by its index {chunk.stop:,} or more"
                            raise errors.ObjectChanged(words, uri=self._manifest.uri(shard))
                        take = min(len(rest), (chunk.start if at < chunk.start else chunk.stop) - at)
                        if at >= chunk.start:
                            found[at - chunk.start : at - chunk.start + take] = rest[:take]
                        rest, at = rest[take:], at + take
                    if error is None and chunk.stop == end:
                        self._finish(shard, itertools.chain([rest], stream))
                except errors.S3Error as broken:
                    error = broken.with_traceback(None)
                yield chunk.key, found if error is None else error
        finally:
            stream.close()

    def _finish(self, shard: int, rest: Iterable[memoryview]) -> None:
        """Read what follows a compressed shard's last record: its checksum, and what its index doesn't know."""
        uri = self._manifest.uri(shard)
        if uri in self._damaged:
            return
        if has_records(rest, self._format, uri):
            words = "it has more records than its index: remove that, and make it anew by write_index()"
            raise errors.ObjectChanged(words, uri=uri)

    def _open(self, shard: int) -> Generator[memoryview]:
        uri = self._manifest.uri(shard)
        kind = compression(uri)
        assert kind is not None
        reads = pieces(self._manifest.read(shard, self._fs), self._piece)
        with closing(read_ahead(self._fs, reads, **self._options)) as found:  # type: ignore[type-var]
            yield from decompressed(found, kind, uri)


def _wanted(plans: Iterable[list[Chunk]]) -> Iterator[Chunk]:
    """The chunks to read, in order: what the plan before needs too is there yet."""
    before: set[int] = set()
    for chunks in plans:
        yield from (chunk for chunk in chunks if chunk.key not in before)
        before = {chunk.key for chunk in chunks}
