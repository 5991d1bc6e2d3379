"""What workers have done: counters in shared memory, of which each row has one writer."""

from __future__ import annotations

import os
import time
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from torch_s3.data import shared

WORKERS = 128
"""Workers of one dataset that can be counted, besides the process itself."""

_SNAPSHOTS = 64  # of each worker; when they are full, every other one goes
_INTERVAL = 0.5  # seconds between the first of them


class Column(IntEnum):
    """Columns of a row. From ``SAMPLES`` on they are totals, before that of the iteration under way."""

    GROUP = 0  # the same for all workers of one loader's iteration, and of no other
    BEGAN = 1  # of time.monotonic(), which all processes share
    EPOCH = 2
    WORKERS = 3
    START = 4  # the load_state_dict that it began from; 0 for a whole epoch
    ENDED = 5
    YIELDED = 6
    FAILED = 7
    USED = 8  # the load_state_dict that was used up before, and so isn't begun from
    SAMPLES = 9
    BYTES = 10
    SECONDS = 11
    READ = 12
    DECODE = 13
    TRANSFORM = 14
    CONSUMER = 15
    RETRIES = 16
    ERRORS = 17
    CACHE_HITS = 18


_TOTALS = slice(Column.SAMPLES, Column.CACHE_HITS + 1)


class LoaderStats(NamedTuple):
    """What a dataset's workers have done together, since it was made.

    The shares are of the workers' time. They add up to 1 with what is left for everything else, mostly the order and
    Python itself.

    Attributes:
        samples: Yielded.
        bytes: Of the objects read, from wherever.
        seconds: While the busiest worker was iterating.
        samples_per_second: Over that time.
        bytes_per_second: Over that time.
        waiting: Share spent waiting for reads: the store is what holds the workers back.
        decoding: Share spent decoding.
        transforming: Share spent in your transforms.
        consuming: Share spent in collating, handing over and waiting until somebody wants the next sample: the training
            is what holds the workers back, as it should be.
        retries: Requests that were sent again.
        errors: Objects that could not be used.
        cache_hits: Objects that came from the local cache.
    """

    samples: int
    bytes: int
    seconds: float
    samples_per_second: float
    bytes_per_second: float
    waiting: float
    decoding: float
    transforming: float
    consuming: float
    retries: int
    errors: int
    cache_hits: int

    def __str__(self) -> str:
        return (
            f"{self.samples:,} samples, {self.samples_per_second:,.0f}/s, {self.bytes_per_second / 1e6:,.1f} MB/s; "
            f"workers: {self.waiting:.0%} waiting for reads, {self.decoding:.0%} decoding, "
            f"{self.transforming:.0%} transforming, {self.consuming:.0%} waiting for training; "
            f"{self.retries:,} retries, {self.errors:,} errors, {self.cache_hits:,} from the cache"
        )


class Board:
    """The rows of one dataset: one for the process itself, one for each worker.

    Lives in shared memory, and reaches workers of every start method; a copy that is pickled elsewhere begins at zero.
    """

    def __init__(self) -> None:
        self._rows, self._history = _floats(len(Column)), _floats(_SNAPSHOTS, 8)

    def writer(self, slot: int) -> Row:
        """The row of the process itself (0) or of worker ``slot - 1``, which alone may write it."""
        if slot > WORKERS:
            raise ValueError(f"{slot} workers: at most {WORKERS} can be kept account of")
        return Row(self._rows.numpy()[slot], self._history.numpy()[slot])

    def rows(self) -> NDArray[np.float64]:
        """A copy of all rows as they are now."""
        found: NDArray[np.float64] = self._rows.numpy().copy()
        return found

    def stats(self) -> LoaderStats:
        """All rows together."""
        rows = self.rows()
        return _summary(rows[:, _TOTALS].sum(axis=0), float(rows[:, Column.SECONDS].max()))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw samples a second and the shares of time over time. Needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plot_stats needs matplotlib: pip install matplotlib") from None
        series = [kept[np.argsort(kept[:, 0])] for kept in (rows[rows[:, 0] > 0] for rows in self._history.numpy())]
        series = [kept for kept in series if len(kept) > 1]
        if not series:
            raise ValueError("nothing to plot yet: a second of iterating gives the first points")
        began, ended = min(kept[0, 0] for kept in series), max(kept[-1, 0] for kept in series)
        edges = np.linspace(began, ended, min(_SNAPSHOTS, max(map(len, series))))
        columns = range(1, series[0].shape[1])
        # Each worker's totals at common times; what it did between two of them is their difference.
        done = sum(np.diff([np.interp(edges, kept[:, 0], kept[:, c]) for c in columns]) for kept in series)
        samples, size, seconds, *parts = np.asarray(done)[[0, 1, 2, 3, 4, 5, 6]]
        times, width = (edges[1:] + edges[:-1]) / 2 - began, np.diff(edges)
        figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
        rate, share = figure.subplots(2, sharex=True)
        rate.plot(times, samples / width, color="C0")
        rate.set(ylabel="samples/s", ylim=(0, None))
        bytes_axis = rate.twinx()
        bytes_axis.plot(times, size / width / 1e6, color="C1", linestyle=":")
        bytes_axis.set(ylabel="MB/s (dotted)", ylim=(0, None))
        labels = ["waiting for reads", "decoding", "transforming", "waiting for training"]
        share.stackplot(times, [100 * part / np.maximum(seconds, 1e-9) for part in parts], labels=labels)
        share.set(xlabel="seconds", ylabel="workers' time (%)", ylim=(0, 100))
        share.legend(loc="lower right")
        figure.savefig(path)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if not self._rows.is_shared():  # type: ignore[no-untyped-call] # a copy, not a worker's
            self.__init__()  # type: ignore[misc]


class Row:
    """One worker's row, for its owner to write."""

    def __init__(self, values: NDArray[np.float64], history: NDArray[np.float64]) -> None:
        self.values = values
        self._cells: Any = values.data  # the same; an item of it costs a third of numpy's
        self._history = history
        self._kept = int((history[:, 0] > 0).sum())
        self._interval, self._next = _INTERVAL, 0.0
        self._began = self._before = 0.0

    def begin(self, *, group: int, epoch: int, workers: int, start: int, used: int, ended: bool) -> None:
        """Note the start of an iteration. Others look meanwhile: the group tells them that the start is there."""
        row = self.values
        row[Column.START], row[Column.USED] = start, used
        row[[Column.ENDED, Column.YIELDED, Column.FAILED]] = ended, 0, 0
        row[[Column.EPOCH, Column.WORKERS]] = epoch, workers
        row[Column.BEGAN] = self._began = time.monotonic()
        row[Column.GROUP] = group
        self._before = float(row[Column.SECONDS])

    def add(self, column: Column, value: float) -> None:
        """Add to a counter."""
        self._cells[column] += value

    def tick(self) -> None:
        """Bring the time up to now, and keep a snapshot of the totals now and then."""
        now = time.monotonic()
        self._cells[Column.SECONDS] = self._before + now - self._began
        if now < self._next:
            return
        self._next = now + self._interval
        if self._kept == _SNAPSHOTS:
            half = self._history[::2].copy()
            self._history[:] = 0
            self._history[: len(half)] = half
            self._kept, self._interval = len(half), 2 * self._interval
        self._history[self._kept] = now, *self.values[_TOTALS][:7]
        self._kept += 1


def _summary(totals: NDArray[np.float64], seconds: float) -> LoaderStats:
    samples, size, all_seconds, read, decode, transform, consumer, retries, failed, hits = totals.tolist()
    time_of_all, busy = all_seconds or 1.0, seconds or 1.0
    return LoaderStats(
        samples=int(samples),
        bytes=int(size),
        seconds=seconds,
        samples_per_second=samples / busy,
        bytes_per_second=size / busy,
        waiting=read / time_of_all,
        decoding=decode / time_of_all,
        transforming=transform / time_of_all,
        consuming=consumer / time_of_all,
        retries=int(retries),
        errors=int(failed),
        cache_hits=int(hits),
    )


def _floats(*shape: int) -> torch.Tensor:
    return shared.zeros(1 + WORKERS, *shape, dtype=torch.float64)
