"""Epochs by a ``DataLoader`` whose workers are gone afterwards."""

import contextlib
import itertools

import pytest
from torch.utils.data import DataLoader


@contextlib.contextmanager
def reading(loader):
    """An iterator whose workers are gone after the block. Left to the garbage collection, that can take 5 s."""
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()


def taken(dataset, batches=None, **options):
    """The samples of the first batches, of a dataset of numbers."""
    with reading(DataLoader(dataset, **{"batch_size": dataset._batch_size} | options)) as loader:
        return [number for batch in itertools.islice(loader, batches) for number in batch.tolist()]


def taken_in_parts(make):
    """The samples of an epoch that is broken off again and again, with ``make(batch_size=…)`` for each part."""
    state, seen = None, []
    for workers, batch_size, batches in ((2, 4, 1), (0, 3, 2), (3, 2, 3), (1, 5, None)):
        train = make(batch_size=batch_size)
        if state:
            train.load_state_dict(state)
        seen += taken(train, batches, num_workers=workers)
        if batches:
            state = train.state_dict(batches=batches)
    return seen


def error_of_worker(dataset, **options):
    """What reaches the main process of what a worker raises."""
    with reading(DataLoader(dataset, num_workers=1, **options)) as loader, pytest.raises(Exception) as caught:
        list(loader)
    return caught.value
