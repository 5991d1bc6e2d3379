"""How what is left of an epoch is dealt out to ranks and workers, and what is left after some of it. Pure: no I/O.

Objects of their own are dealt interleaved, so that global batches hold the same samples for any number of ranks.
Records of shards are dealt in contiguous stretches, so that each worker reads its own bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from torch_s3.data import order
from torch_s3.data.progress import Rest, left_of_all, left_of_rank

_CHUNK = 4096  # places computed at a time

Left = tuple[Sequence[Sequence[int]], int]
"""What one rank has left: half-open ranges, and where what nobody has touched begins; in the dealing's own count."""


class Dealing(Protocol):
    """A rule by which the places of a sequence go to the workers of all ranks.

    ``count`` is the sequence's length over all ranks, ``taken`` how many places each worker of a rank has behind it.
    """

    def places(
        self,
        count: int,
        *,
        rank: int,
        world_size: int,
        worker: int,
        workers: int,
        batch_size: int,
        drop_last: bool,
        taken: int,
    ) -> Iterator[NDArray[np.int64]]:
        """The places that one worker yields, in order, after its first ``taken``; see :func:`order.deal`."""

    def left_in_step(
        self, rest: Rest, taken: Sequence[int], *, world_size: int, batch_size: int, drop_last: bool
    ) -> Rest:
        """What all have left of ``rest`` where the workers of every rank are as far as these."""

    def left_of_rank(
        self, count: int, taken: Sequence[int], *, rank: int, world_size: int, batch_size: int, drop_last: bool
    ) -> Left:
        """What one rank has left, for :meth:`left_of_all`."""

    def left_of_all(self, rest: Rest, ranks: Sequence[Left]) -> Rest:
        """What all ranks together have left of ``rest``."""


class Interleaved:
    """Place ``p`` goes to rank ``p mod R``; :func:`order.deal` has the whole rule."""

    def places(
        self,
        count: int,
        *,
        rank: int,
        world_size: int,
        worker: int,
        workers: int,
        batch_size: int,
        drop_last: bool,
        taken: int,
    ) -> Iterator[NDArray[np.int64]]:
        """See :class:`Dealing`."""
        return order.deal(
            count,
            rank=rank,
            world_size=world_size,
            worker=worker,
            workers=workers,
            batch_size=batch_size,
            drop_last=drop_last,
            taken=taken,
        )

    def left_in_step(
        self, rest: Rest, taken: Sequence[int], *, world_size: int, batch_size: int, drop_last: bool
    ) -> Rest:
        """See :class:`Dealing`."""
        return rest.after(sum(taken) * world_size)

    def left_of_rank(
        self, count: int, taken: Sequence[int], *, rank: int, world_size: int, batch_size: int, drop_last: bool
    ) -> Left:
        """See :class:`Dealing`."""
        return left_of_rank(count, taken, rank=rank, world_size=world_size, batch_size=batch_size)

    def left_of_all(self, rest: Rest, ranks: Sequence[Left]) -> Rest:
        """See :class:`Dealing`."""
        return left_of_all(rest, ranks)


class Contiguous:
    """Each rank has a stretch of the sequence, all equally long, and each of its workers a stretch of that.

    Workers have whole batches, the first ones one more where they don't divide; a batch that isn't full belongs to the
    worker whose turn is last, as DataLoader takes one of each in turn. What is left is then one stretch a worker.
    """

    def stretch(
        self,
        count: int,
        *,
        rank: int,
        world_size: int,
        worker: int,
        workers: int,
        batch_size: int,
        drop_last: bool,
        taken: int = 0,
    ) -> range:
        """The places of one worker; those from ``count`` on are the repeats of :func:`order.length`."""
        own = order.length(count, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
        start, stop = _stretches(own, workers, batch_size)[worker]
        return range(min(stop, start + taken) + rank * own, stop + rank * own)

    def places(
        self,
        count: int,
        *,
        rank: int,
        world_size: int,
        worker: int,
        workers: int,
        batch_size: int,
        drop_last: bool,
        taken: int,
    ) -> Iterator[NDArray[np.int64]]:
        """See :class:`Dealing`."""
        split = {"world_size": world_size, "workers": workers, "batch_size": batch_size, "taken": taken}
        own = self.stretch(count, rank=rank, worker=worker, drop_last=drop_last, **split)
        for start in range(own.start, own.stop, _CHUNK):
            yield np.arange(start, min(own.stop, start + _CHUNK), dtype=np.int64)

    def left_in_step(
        self, rest: Rest, taken: Sequence[int], *, world_size: int, batch_size: int, drop_last: bool
    ) -> Rest:
        """See :class:`Dealing`."""
        split = {"world_size": world_size, "batch_size": batch_size}
        ranks = [
            self.left_of_rank(len(rest), taken, rank=rank, drop_last=drop_last, **split) for rank in range(world_size)
        ]
        return self.left_of_all(rest, ranks)

    def left_of_rank(
        self, count: int, taken: Sequence[int], *, rank: int, world_size: int, batch_size: int, drop_last: bool
    ) -> Left:
        """See :class:`Dealing`. The ranges are places."""
        own = order.length(count, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
        ranges: list[tuple[int, int]] = []
        for (start, stop), done in zip(_stretches(own, len(taken), batch_size), taken, strict=True):
            first, last = min(count, rank * own + start + done), min(count, rank * own + stop)
            if first < last:
                if ranges and ranges[-1][1] == first:
                    first = ranges.pop()[0]
                ranges.append((first, last))
        return ranges, min(count, own * world_size)

    def left_of_all(self, rest: Rest, ranks: Sequence[Left]) -> Rest:
        """See :class:`Dealing`."""
        untouched = ranks[0][1]
        ranges = [*(found for found, _ in ranks), [(untouched, len(rest))]]
        merged: list[list[int]] = []
        for start, stop in (pair for some in ranges for pair in some):
            if merged and merged[-1][1] == start:
                merged[-1][1] = stop
            else:
                merged.append([start, stop])
        return Rest([run for start, stop in merged for run in rest.at(start, stop)])


def _stretches(own: int, workers: int, batch_size: int) -> list[tuple[int, int]]:
    """Of a rank's places ``0 … own-1``, those of each worker: half-open."""
    batches = -(-own // batch_size)
    found, start = [], 0
    for worker in range(workers):
        size = (batches // workers + (worker < batches % workers)) * batch_size
        if batches and worker == (batches - 1) % workers:
            size -= batches * batch_size - own
        found.append((start, start + size))
        start += size
    return found
