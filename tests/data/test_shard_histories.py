"""Whatever ranks and workers follow each other, and whatever is damaged: each whole record of an epoch comes once."""

import contextlib
import copy
import itertools
import tempfile
import types
from collections import deque
from pathlib import Path

import pytest
import torch.utils.data
from hypothesis import assume, given
from hypothesis import strategies as st
from records import content, damaged, framed, number_in

from torch_s3.data.tfrecords import S3TFRecordDataset


@contextlib.contextmanager
def as_worker(info):
    """What the block asks is asked by a loader's worker."""
    torch.utils.data._utils.worker._worker_info = info
    try:
        yield
    finally:
        torch.utils.data._utils.worker._worker_info = None


class Loader:
    """A rank's ``DataLoader`` within this process: its workers have turns, and end for good with no batch."""

    def __init__(self, dataset, workers, size):
        self.dataset, self.batches, self._size = dataset, 0, size
        infos = [types.SimpleNamespace(id=n, num_workers=workers, seed=n) for n in range(workers)] or [None]
        self._turns = deque()
        for info in infos:
            with as_worker(info):
                self._turns.append((info, iter(copy.copy(dataset) if workers else dataset)))

    def __iter__(self):
        while self._turns:
            info, samples = self._turns.popleft()
            with as_worker(info):
                batch = list(itertools.islice(samples, self._size))
            if batch:
                self._turns.append((info, samples))
                self.batches += 1
                yield batch

    def close(self):
        for info, samples in self._turns:
            with as_worker(info):
                samples.close()


def store(folder, sizes, bad):
    """Shards of so many records each, of which some are damaged."""
    first = 0
    for shard, size in enumerate(sizes):
        body = b"".join(framed(content(number)) for number in range(first, first + size))
        for number in bad & set(range(first, first + size)):
            body = damaged(body, number - first)
        Path(folder, f"{shard}.tfrecord").write_bytes(body)
        first += size


STRETCH = st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 5))


@pytest.mark.filterwarnings("ignore:epoch 0. skipped")
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.sets(st.integers(0, 20), max_size=4),
    st.one_of(st.just({}), st.fixed_dictionaries({"shuffle": st.just(True), "shuffle_buffer": st.integers(1, 30)})),
    st.lists(STRETCH, min_size=1, max_size=4),
)
def test_each_whole_record_comes_once(sizes, bad, options, stretches):
    """Of each stretch: ranks, workers, batch size, and batches of each rank; the last one goes to the end."""
    assume(sum(sizes) >= 3)
    seen, states, again = [], None, 0
    with tempfile.TemporaryDirectory() as folder:
        store(folder, sizes, bad)
        for number, (ranks, workers, size, batches) in enumerate(stretches, 1):
            loaders = []
            for rank in range(ranks):
                ranked = {"rank": rank, "world_size": ranks, "batch_size": size, "on_error": "skip"}
                dataset = S3TFRecordDataset(f"file://{folder}/", transform=number_in, **ranked, **options)
                if states is not None:
                    dataset.load_state_dict(states)
                loaders.append(Loader(dataset, workers, size))
            again += ranks - 1  # come again, for ranks to have equally many
            for done, step in enumerate(itertools.zip_longest(*loaders), 1):
                seen += itertools.chain(*(batch for batch in step if batch))
                if done == batches and None not in step and number < len(stretches):
                    break
            else:
                break
            states = [loader.dataset.state_dict(batches=loader.batches) for loader in loaders]
            for loader in loaders:
                loader.close()

    assert set(seen) == set(range(sum(sizes))) - bad
    assert len(seen) - len(set(seen)) <= again
