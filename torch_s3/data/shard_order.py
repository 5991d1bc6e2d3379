"""Which record of which shard comes when: arithmetic on (seed, epoch, records of each shard, buffer). Pure.

An epoch's sequence is that of the shards, permuted, with their records as they lie. It is cut into blocks of
``buffer`` records, and each block is permuted: what a shuffle buffer does, but as arithmetic, so that nothing of it is
lost when training is broken off and goes on elsewhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torch_s3.data import order


class ShardOrder:
    """The order of one epoch.

    Args:
        first: int64 (shards + 1,): the number of each shard's first record, over all shards, and of all records.
        buffer: Records of a block; ``None`` to leave everything as it lies.
        seed: Any integer.
        epoch: From 0.

    Attributes:
        turns: int64 (shards,): when each shard comes, from 0.
    """

    def __init__(self, first: NDArray[np.int64], *, buffer: int | None, seed: int, epoch: int) -> None:
        self._first, self._buffer, self._seed, self._epoch = first, buffer, seed, epoch
        shards = np.arange(len(first) - 1, dtype=np.int64)
        self._shards = shards
        if buffer is not None and len(shards):
            self._shards = order.permute(shards, len(shards), seed=seed, epoch=epoch)
        self._ends = np.cumsum(np.diff(first)[self._shards])
        self.turns = np.empty_like(shards)
        self.turns[self._shards] = shards

    def block(self, position: int) -> tuple[int, int]:
        """The block that a position lies in: half-open."""
        size = self._buffer or 1
        start = position // size * size
        return start, min(start + size, int(self._first[-1]))

    def records(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the records at these positions, of one block if there are blocks.

        Args:
            positions: int64, each in ``[0, records)``.
        """
        if self._buffer is not None and len(positions):
            start, stop = self.block(int(positions[0]))
            within = {"seed": self._seed, "epoch": self._epoch, "block": start // self._buffer}
            positions = start + order.permute(positions - start, stop - start, **within)
        turn = np.searchsorted(self._ends, positions, side="right")
        before = np.concatenate([np.zeros(1, np.int64), self._ends])[turn]
        found: NDArray[np.int64] = self._first[self._shards[turn]] + positions - before
        return found
