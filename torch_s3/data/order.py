"""Which sample comes when: arithmetic on (seed, epoch, ranks, workers, batch size, step). Pure, no state, no I/O.

An epoch is one sequence of positions ``0 … n-1``. With shuffling, :func:`permute` says which sample stands at a
position; without, sample ``i`` stands at position ``i``. :func:`deal` says which places of a sequence a worker of a
rank yields, and in which order; the sequence is the epoch, or what is left of it (:mod:`torch_s3.data.progress`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_CHUNK = 4096  # places computed at a time


def length(count: int, *, world_size: int, batch_size: int, drop_last: bool) -> int:
    """Samples of each rank, the same for all, of a sequence of ``count``.

    With ``drop_last``, what fills no global batch of ``world_size * batch_size`` is left out. Without, up to
    ``world_size - 1`` repeats fill up what the ranks don't divide.
    """
    if drop_last:
        return count // (world_size * batch_size) * batch_size
    return -(-count // world_size)


def deal(
    count: int,
    *,
    rank: int,
    world_size: int,
    worker: int,
    workers: int,
    batch_size: int,
    drop_last: bool,
    taken: int = 0,
) -> Iterator[NDArray[np.int64]]:
    """The places in a sequence of ``count`` that one worker of one rank yields, in order, in chunks.

    Rank ``r`` of ``R`` has the places ``r, r + R, r + 2R, …``: with batches of ``B`` a rank, the ``k``-th global batch
    is the places ``kBR … (k+1)BR - 1`` whatever ``R`` is. Within a rank, batch ``k`` goes to worker ``k mod workers``,
    which is the order in which DataLoader collects them: the sequence of batches is the same for any number of workers.
    Every place is yielded by exactly one worker of one rank, unless ``drop_last`` leaves it out.

    Args:
        count: Length of the sequence, over all ranks.
        rank: This rank, from 0.
        world_size: Number of ranks.
        worker: This worker, from 0.
        workers: Workers of each rank, at least 1.
        batch_size: Samples of one batch of one rank.
        drop_last: See :func:`length`.
        taken: Begin after so many of this worker's places.

    Returns:
        int64 arrays of places. Those from ``count`` on are the repeats of :func:`length`.
    """
    own = length(count, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
    while True:
        step = np.arange(taken, taken + _CHUNK, dtype=np.int64)
        batch, within = step // batch_size, step % batch_size
        of_rank = (batch * workers + worker) * batch_size + within
        if of_rank[-1] >= own:
            yield of_rank[of_rank < own] * world_size + rank
            return
        yield of_rank * world_size + rank
        taken += _CHUNK


def permute(
    positions: NDArray[np.int64], count: int, *, seed: int, epoch: int, block: int | None = None
) -> NDArray[np.int64]:
    """The samples at these positions of a shuffled epoch: a keyed permutation of ``0 … count-1``, never held as a
    whole.

    A balanced Feistel network of eight rounds over the next power of four, cycle-walked into range, its round function
    the finalizer of SplitMix64. Sources: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002);
    Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014).

    Args:
        positions: int64, each in ``[0, count)``.
        count: Samples of the epoch.
        seed: Any integer; the same one gives the same order in every process.
        epoch: From 0; each has its own order.
        block: From 0, of an epoch that is permuted in blocks; each has its own order.

    Returns:
        int64, of the positions' shape, distinct for distinct positions.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    entropy = [seed % 2**64, epoch] if block is None else [seed % 2**64, epoch, block + 1]  # what ends in 0 is the same
    keys = np.random.SeedSequence(entropy).generate_state(_ROUNDS, np.uint64)
    samples = positions.astype(np.uint64)
    outside = np.ones(samples.shape, dtype=bool)
    while outside.any():
        some = samples[outside]
        left, right = some >> half, some & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        samples[outside] = (left << half) | right
        outside = samples >= count
    return samples.astype(np.int64)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
