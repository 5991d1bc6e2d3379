"""What the iterable datasets share: an order, reads ahead along it, what becomes of errors, state and numbers."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import fsspec
import numpy as np
import torch.utils.data
from numpy.typing import NDArray

from torch_s3 import given
from torch_s3.data import order, policy
from torch_s3.data.cache import CachedReader, open_cache
from torch_s3.data.manifest import Manifest
from torch_s3.data.objects import OwnFilesystem
from torch_s3.data.progress import Rest
from torch_s3.data.resumable import Resumable, Run
from torch_s3.data.stats import Column, LoaderStats, Row
from torch_s3.errors import S3Error, TooManyErrors
from torch_s3.filesystem import S3FileSystem
from torch_s3.uris import Reader, read_ahead, resolve

_WINDOW = 64  # of filesystems that don't say how many requests they can have in flight
_DECODE_THREADS = 2  # without workers, by default
_RETRIES_EVERY = 256  # samples between looks at the transport's counters

Body = Any
"""An object's bytes, any buffer; ``None`` where they aren't read ahead."""


class Item(NamedTuple):
    """An object on its way through a worker.

    Attributes:
        position: In the epoch.
        number: Index of the sample.
        body: What was read.
        decoded: What was made of it, or the error.
    """

    position: int
    number: int
    body: Body
    decoded: Any


class S3Stream(Resumable):
    """The base of the iterable datasets, which say what is made of an object's bytes.

    Its arguments are those of :class:`~torch_s3.S3ImageDataset`, but for these:

    Args:
        manifest: What is read.
        samples: Indices of the manifest that are samples; ``None`` for all.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        samples: NDArray[np.int64] | None = None,
        shuffle: bool,
        seed: int,
        batch_size: int | None,
        drop_last: bool,
        rank: int | None,
        world_size: int | None,
        on_error: str,
        max_errors: float | None,
        lookahead: int | None,
        lookahead_bytes: int,
        cache_dir: str | os.PathLike[str] | None,
        cache_size: int | None,
        decode_threads: int | None = 1,
        storage_options: Mapping[str, Any] | None,
        filesystem: fsspec.AbstractFileSystem | None,
    ) -> None:
        counts = {
            "lookahead": lookahead,
            "lookahead_bytes": lookahead_bytes,
            "decode_threads": decode_threads,
        }
        for name, value in counts.items():
            if value is not None:
                given.whole(name, value, least=1)
        policy.check(on_error, max_errors)
        fs, _ = resolve(manifest.root, storage_options=storage_options, filesystem=filesystem)
        self._filesystem = OwnFilesystem(fs)
        self._max_errors = max_errors
        connections = fs.config.max_connections if isinstance(fs, S3FileSystem) else _WINDOW // 2
        self._lookahead, self._lookahead_bytes = lookahead or 2 * connections, lookahead_bytes
        self._decode_threads = decode_threads
        self._cache = open_cache(cache_dir, cache_size)
        super().__init__(
            manifest,
            samples=samples,
            shuffle=shuffle,
            seed=seed,
            batch_size=batch_size,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            on_error=on_error,
        )
        self._runs = 0

    # ------------------------------------------------------------------ what the datasets say

    @abstractmethod
    def _decode(self, index: int, body: Body) -> Any:
        """What is made of a sample's bytes, before transforms. Any thread.

        Raises:
            S3Error: Nothing can be.
        """

    @abstractmethod
    def _sample(self, index: int, decoded: Any) -> Any:
        """The sample: what transforms make of it."""

    def _bodies(
        self, run: Run, fs: fsspec.AbstractFileSystem, indices: Iterable[NDArray[np.int64]], row: Row
    ) -> Iterator[Body]:
        """The samples' bytes, or the error in place of them, in order."""
        around = self._around(fs, row)
        reads = (self.manifest.read(index, fs) for some in indices for index in some.tolist())
        return read_ahead(fs, reads, window=self._lookahead, max_bytes=self._lookahead_bytes, around=around)

    def _around(self, fs: fsspec.AbstractFileSystem, row: Row) -> Callable[[Reader], Reader]:
        """What puts the cache between, if there is one."""
        cache = self._cache
        if cache is None:
            return lambda reader: reader
        return lambda reader: CachedReader(reader, cache, fs, lambda: row.add(Column.CACHE_HITS, 1))

    # ------------------------------------------------------------------ iterating

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        slot, workers = (0, 1) if worker is None else (worker.id + 1, worker.num_workers)
        rank, world_size = self._rank_and_world_size()
        self._runs += 1
        base = 0 if worker is None else (worker.seed - worker.id) % 2**32  # the same for all of a loader
        group = base << 20 | self._runs % 2**20
        try:
            start = self._start(group)
        except RuntimeError as error:
            return _raising(error)
        self._run = run = Run(start, start.taken, rank, world_size, slot, workers, group)
        row = self._board.writer(slot)
        row.begin(
            group=group,
            epoch=start.epoch,
            workers=workers,
            start=start.load,
            used=0 if start.load else self._used_up(group),
            ended=not start.rest.runs,  # also where nobody asks for what isn't there, as StatefulDataLoader
        )
        return self._iterate(run, row)

    def _iterate(self, run: Run, row: Row) -> Iterator[Any]:
        fs = self._filesystem()
        retries = _retries(fs)
        try:
            with closing(self._items(run, fs, row)) as items:
                for number, (index, decoded) in enumerate(self._usable(items, run, row)):
                    if number % _RETRIES_EVERY == 0:
                        retries = self._note_retries(fs, retries, row)
                    began = time.perf_counter()
                    sample = self._sample(index, decoded)
                    ended = time.perf_counter()
                    row.add(Column.TRANSFORM, ended - began)
                    row.add(Column.SAMPLES, 1)
                    row.add(Column.YIELDED, 1)
                    run.taken += 1
                    yield sample
                    del sample
                    row.add(Column.CONSUMER, time.perf_counter() - ended)
                    row.tick()
            row.values[Column.ENDED] = 1
            self._own_start = None
            self._warn(run)
        finally:
            self._note_retries(fs, retries, row)
            row.tick()

    def _usable(self, items: Iterable[Item], run: Run, row: Row) -> Iterator[tuple[int, Any]]:
        """What is to be yielded, with its index: the items without errors, or others in their places."""
        good: Item | None = None
        owed: list[S3Error] = []  # to be replaced by the first one that can be used
        for item in items:
            if not isinstance(item.decoded, S3Error):
                if self._on_error == "replace":
                    good = item
                for _ in owed:
                    yield item.number, self._decode(item.number, item.body)
                owed.clear()
                yield item.number, item.decoded
                continue
            self._failed(item.decoded, run.taken + len(owed), item.position, run, row)
            if self._on_error == "skip":
                run.taken += 1
            elif good is None:
                owed.append(item.decoded)
            else:
                yield good.number, self._decode(good.number, good.body)
        if not owed:
            return
        # Of what this worker has to give, as at the end of a resumed epoch: then by the rank's first that can be used.
        whole = Run(
            run.start._replace(rest=self._course.whole(), taken=0), 0, run.rank, run.world_size, 0, 1, run.group
        )
        with closing(self._items(whole, self._filesystem(), row)) as others:
            for item in itertools.islice(others, policy.HOPELESS):
                if not isinstance(item.decoded, S3Error):
                    for _ in owed:
                        yield item.number, self._decode(item.number, item.body)
                    return
        raise owed[-1]

    def _items(self, run: Run, fs: fsspec.AbstractFileSystem, row: Row) -> Generator[Item]:
        dealt, ahead = itertools.tee(self._dealt(run))
        places = (place for some in dealt for place in zip(some[0].tolist(), some[1].tolist(), strict=True))
        bodies = self._bodies(run, fs, (indices for _, indices in ahead), row)
        alone = run.slot == 0 and (os.cpu_count() or 1) > 1  # a worker is one of as many as there are cores
        threads = self._decode_threads or (_DECODE_THREADS if alone else 1)
        flying: deque[tuple[int, int, Body, Future[Any] | Any]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="torch_s3-decode") if threads > 1 else None
        try:
            for place in itertools.chain(places, itertools.repeat(None, threads if pool else 0)):
                if place is not None:
                    began = time.perf_counter()
                    body = next(bodies)
                    row.add(Column.READ, time.perf_counter() - began)
                    if isinstance(body, S3Error):
                        flying.append((*place, None, body))
                    else:
                        row.add(Column.BYTES, 0 if body is None else len(body))
                        began, index = time.perf_counter(), place[1]
                        decoded = (
                            self._outcome(index, body) if pool is None else pool.submit(self._outcome, index, body)
                        )
                        flying.append((*place, body, decoded))
                        row.add(Column.DECODE, time.perf_counter() - began)
                if flying and (pool is None or place is None or len(flying) > threads):
                    position, index, body, decoded = flying.popleft()
                    if isinstance(decoded, Future):
                        began = time.perf_counter()
                        decoded = decoded.result()
                        row.add(Column.DECODE, time.perf_counter() - began)
                    yield Item(position, index, body, decoded)
                    del body, decoded
        finally:
            bodies.close()  # type: ignore[attr-defined]  # a generator: cancels what is in flight
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _outcome(self, index: int, body: Body) -> Any:
        try:
            return self._decode(index, body)
        except S3Error as error:
            error.__context__ = None  # whose frames, as the traceback's, hold the bytes, the dataset and the error
            return error.with_traceback(None)

    def _dealt(self, run: Run) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Positions in the epoch, and which samples stand there, of what this worker of this rank yields, in order."""
        rest, epoch = run.start.rest, run.start.epoch
        worker = max(0, run.slot - 1)
        share: dict[str, Any] = {"rank": run.rank, "worker": worker, "workers": run.workers, "taken": run.start.taken}
        for places in order.deal(len(rest), **share, **self._split(run.world_size)._asdict()):
            positions = self._positions(rest, places)
            found = positions
            if self._shuffle:
                found = order.permute(positions, self._count, seed=self._seed, epoch=epoch)
            yield positions, found if self._samples is None else self._samples[found]

    def _positions(self, rest: Rest, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions at these places of what is left; behind its end are the repeats that make ranks equal."""
        positions = (places - len(rest)) % self._count
        inside = places < len(rest)
        positions[inside] = rest.positions(places[inside])
        return positions

    def _failed(self, error: S3Error, place: int, position: int, run: Run, row: Row) -> None:
        """Note it, or raise it where it can't be passed over."""
        if self._record is None or not isinstance(error, policy.OF_ONE_OBJECT):
            raise error
        worker = run.slot - 1 if run.slot else None
        message, kind = str(error), type(error).__name__
        failure = policy.Failure(error.uri or "", kind, message, worker, run.start.epoch, position)
        self._record.append(policy.Entry(run.group, run.slot, place, failure))
        row.add(Column.FAILED, 1)
        row.add(Column.ERRORS, 1)
        rows = self._board.rows()
        failed = int(rows[rows[:, Column.GROUP] == run.group, Column.FAILED].sum())
        if failed > policy.limit(self._max_errors, len(self)):
            raise TooManyErrors(
                f"{failed} samples of epoch {run.start.epoch} failed, max_errors={self._max_errors}; last: {message}",
                uri=error.uri,
            ) from error
        if policy.hopeless(int(row.values[Column.FAILED]), int(row.values[Column.YIELDED])):
            raise error

    def _warn(self, run: Run) -> None:
        """Warn once an epoch of what failed in it: the last worker to end does."""
        if self._record is None:
            return
        rows = self._board.rows()
        mine = rows[1 : 1 + run.workers] if run.slot else rows[:1]
        if not ((mine[:, Column.GROUP] == run.group) & (mine[:, Column.ENDED] == 1)).all():
            return
        if failures := [entry.failure for entry in self._record.entries() if entry.group == run.group]:
            warnings.warn(policy.summary(self._on_error, failures), stacklevel=3)

    def _note_retries(self, fs: fsspec.AbstractFileSystem, before: int, row: Row) -> int:
        now = _retries(fs)
        row.add(Column.RETRIES, now - before)
        return now

    # ------------------------------------------------------------------ numbers

    @property
    def errors(self) -> list[policy.Failure]:
        """Every object that a worker of this rank could not use, with ``on_error="skip"`` or ``"replace"``."""
        return [] if self._record is None else [entry.failure for entry in self._record.entries()]

    def stats(self) -> LoaderStats:
        """What this rank's workers have done since the dataset was made; ``print`` shows it. Cheap, at any time."""
        return self._board.stats()

    def plot_stats(self, path: str | os.PathLike[str]) -> None:
        """Draw rates and shares over time into a picture. Needs matplotlib.

        Raises:
            ValueError: Nothing has been read for long enough.
        """
        self._board.plot(path)


def _raising(error: Exception) -> Iterator[Any]:
    """Raise at the first sample: a worker that persists dies, saying nothing, where an iterator can't be made."""
    yield from ()
    raise error


def _retries(fs: fsspec.AbstractFileSystem) -> int:
    return sum(fs.stats()["retries"].values()) if isinstance(fs, S3FileSystem) else 0
