"""What of an epoch is left, and what a consumer has had of it. Pure: no state, no I/O.

What is left is kept as runs of positions, so that a state is small however large the data is: where nothing was
skipped, it is one run, from the first position that nobody has had to the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Run = tuple[int, int, int]
"""Positions ``range(start, stop, step)``."""


class Rest:
    """Positions of an epoch that are to be yielded yet, in this order: the runs one after the other.

    A place is an index into that sequence.
    """

    def __init__(self, runs: Sequence[Sequence[int]]) -> None:
        ranges = [range(*run) for run in runs]
        self.runs: list[Run] = [(found.start, found.stop, found.step) for found in ranges if found]
        self._starts = np.array([run[0] for run in self.runs], dtype=np.int64)
        self._steps = np.array([run[2] for run in self.runs], dtype=np.int64)
        self._ends = np.cumsum([len(range(*run)) for run in self.runs], dtype=np.int64)  # places

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.runs else 0

    def positions(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions at these places, each below the length."""
        run = np.searchsorted(self._ends, places, side="right")
        before = np.concatenate([np.zeros(1, np.int64), self._ends])[run]
        found: NDArray[np.int64] = self._starts[run] + (places - before) * self._steps[run]
        return found

    def at(self, first: int, stop: int, step: int = 1) -> list[Run]:
        """The positions at the places ``range(first, stop, step)``, as runs."""
        found, before = [], 0
        for (start, _, run_step), end in zip(self.runs, self._ends.tolist(), strict=True):
            inside = range(first + max(0, -(-(before - first) // step)) * step, min(stop, end), step)
            if inside:
                a, b = (start + (place - before) * run_step for place in (inside[0], inside[-1]))
                found.append((a, b + 1, run_step * step))
            before = end
        return found

    def after(self, taken: int) -> Rest:
        """Without the first ``taken``."""
        return Rest(self.at(taken, len(self)))


def batches_of_workers(batches: int, totals: Sequence[int | None]) -> list[int]:
    """How many of a loader's first ``batches`` came from each worker.

    DataLoader takes one of each worker in turn, and leaves out those that have no more.

    Args:
        batches: Taken so far.
        totals: All that each worker has to give; ``None`` where that isn't known yet, but more than was taken.
    """
    known = [batches if total is None else total for total in totals]
    low, high = 0, batches  # the rounds that are complete
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(total, middle) for total in known) <= batches else (low, middle - 1)
    more = batches - sum(min(total, low) for total in known)
    taken = []
    for total in known:
        extra = total > low and more > 0
        more -= extra
        taken.append(min(total, low) + extra)
    return taken


def taken_with(good: int, skipped: Sequence[int]) -> int:
    """How many places a worker has behind it with its ``good``-th sample, having skipped these: ascending, from 0."""
    taken = good
    for place in skipped:
        taken += place < taken
    return taken


def left_of_rank(
    count: int, taken: Sequence[int], *, rank: int, world_size: int, batch_size: int
) -> tuple[list[tuple[int, int]], int]:
    """What a rank has left of its share of a sequence, with its workers at different points.

    Args:
        count: Length of the sequence, over all ranks.
        taken: How many places each worker has behind it, as :func:`~torch_s3.data.order.deal` deals them.
        rank: This rank.
        world_size: Number of ranks.
        batch_size: Samples of one batch of one rank.

    Returns:
        Half-open ranges of the rank's own places, ascending (the ``i``-th is place ``i * world_size + rank``), and
        where its untouched rest begins, which lasts to the end and isn't among the ranges.
    """
    workers = len(taken)
    own = len(range(rank, count, world_size))
    first, last = min(taken) // batch_size, -(-max(taken) // batch_size)
    ranges: list[tuple[int, int]] = []
    for batch in range(first * workers, last * workers):
        done = min(batch_size, max(0, taken[batch % workers] - batch // workers * batch_size))
        start, stop = batch * batch_size + done, min(own, (batch + 1) * batch_size)
        if start < stop:
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, stop))
    untouched = min(own, last * workers * batch_size)
    if ranges and ranges[-1][1] == untouched:
        untouched = ranges.pop()[0]
    return ranges, untouched


def left_of_all(rest: Rest, ranks: Sequence[tuple[Sequence[Sequence[int]], int]]) -> Rest:
    """What all ranks together have left of ``rest``, from what :func:`left_of_rank` says of each."""
    world_size = len(ranks)
    common = max(untouched for _, untouched in ranks)  # of every rank: from there on, nobody has touched anything
    runs: list[Run] = []
    for rank, (ranges, untouched) in enumerate(ranks):
        for start, stop in [*ranges, (untouched, common)]:
            runs += rest.at(start * world_size + rank, min(stop * world_size, len(rest)), world_size)
    return Rest([*sorted(runs), *rest.at(common * world_size, len(rest))])
