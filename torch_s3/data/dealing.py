"""What is left of an epoch that is dealt out to ranks and workers, after some of it was taken. Pure: no I/O.

Objects of their own are dealt interleaved, so that global batches hold the same samples for any number of ranks.
Records of shards are dealt in contiguous stretches, so that each worker reads its own bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch_s3.data import order
from torch_s3.data.progress import Rest, left_of_all, left_of_rank

Left = tuple[Sequence[Sequence[int]], int]
"""What one rank has left: half-open ranges, and where what nobody has touched begins; in the dealing's own count."""


class Split(NamedTuple):
    """What all ranks and workers share.

    Attributes:
        world_size: Number of ranks.
        batch_size: Samples of one batch of one rank.
        drop_last: See :func:`order.length`.
    """

    world_size: int
    batch_size: int
    drop_last: bool


class Dealing(Protocol):
    """What is left where the places of a sequence go to the workers of all ranks by some rule.

    ``count`` is the sequence's length over all ranks, ``taken`` how many places each worker of a rank has behind it.
    """

    def left_in_step(self, rest: Rest, taken: Sequence[int], split: Split) -> Rest:
        """What all have left of ``rest`` where the workers of every rank are as far as these."""

    def left_of_rank(self, count: int, taken: Sequence[int], split: Split, *, rank: int) -> Left:
        """What one rank has left, for :meth:`left_of_all`."""

    def left_of_all(self, rest: Rest, ranks: Sequence[Left]) -> Rest:
        """What all ranks together have left of ``rest``."""


class Interleaved:
    """Place ``p`` goes to rank ``p mod R``; :func:`order.deal` has the whole rule."""

    def left_in_step(self, rest: Rest, taken: Sequence[int], split: Split) -> Rest:
        """See :class:`Dealing`."""
        return rest.after(sum(taken) * split.world_size)

    def left_of_rank(self, count: int, taken: Sequence[int], split: Split, *, rank: int) -> Left:
        """See :class:`Dealing`."""
        return left_of_rank(count, taken, rank=rank, world_size=split.world_size, batch_size=split.batch_size)

    def left_of_all(self, rest: Rest, ranks: Sequence[Left]) -> Rest:
        """See :class:`Dealing`."""
        return left_of_all(rest, ranks)


class Contiguous:
    """Each rank has a stretch of the sequence, all equally long, and each of its workers a stretch of that.

    Workers have whole batches, the first ones one more where they don't divide; a batch that isn't full belongs to the
    worker whose turn is last, as DataLoader takes one of each in turn. What is left is then one stretch a worker.
    """

    def stretch(self, count: int, split: Split, *, rank: int, worker: int, workers: int, taken: int = 0) -> range:
        """The places of one worker; those from ``count`` on are the repeats of :func:`order.length`."""
        own = order.length(count, **split._asdict())
        start, stop = _stretches(own, workers, split.batch_size)[worker]
        return range(min(stop, start + taken) + rank * own, stop + rank * own)

    def left_in_step(self, rest: Rest, taken: Sequence[int], split: Split) -> Rest:
        """See :class:`Dealing`."""
        ranks = [self.left_of_rank(len(rest), taken, split, rank=rank) for rank in range(split.world_size)]
        return self.left_of_all(rest, ranks)

    def left_of_rank(self, count: int, taken: Sequence[int], split: Split, *, rank: int) -> Left:
        """See :class:`Dealing`. The ranges are places."""
        own = order.length(count, **split._asdict())
        ranges: list[tuple[int, int]] = []
        for (start, stop), done in zip(_stretches(own, len(taken), split.batch_size), taken, strict=True):
            first, last = min(count, rank * own + start + done), min(count, rank * own + stop)
            if first < last:
                if ranges and ranges[-1][1] == first:
                    first = ranges.pop()[0]
                ranges.append((first, last))
        return ranges, min(count, own * split.world_size)

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
