"""A state is exact to the sample: what was consumed before it and what comes after are the epoch, once."""

import copy
import itertools
import json
import multiprocessing
import os
import pickle
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from loaders import reading, taken, taken_in_parts
from pictures import BATCH, COUNT, EACH_ONCE, at_least_once, number_of, picture
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from torch_s3 import Manifest, StateMismatch
from torch_s3.data.stats import Column

LAYOUTS = [(0, BATCH), (3, BATCH), (2, 5)]  # workers, batch size

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # which StatefulDataLoader calls


@pytest.fixture
def numbered(dataset):
    """Makes datasets whose samples are their numbers."""

    def make(*source, **options):
        usual = {"labels": None, "transform": number_of, "shuffle": True, "batch_size": BATCH}
        return dataset(*source, **usual | options)

    return make


def through_json(state):
    return json.loads(json.dumps(state))


# ------------------------------------------------------------------ a plain DataLoader


@pytest.mark.parametrize("persistent", [True, False])
def test_worker_that_begins_late_does_not_use_up_what_was_loaded_meanwhile(numbered, persistent):
    loaded = multiprocessing.get_context("fork").Event()

    def wait(worker):
        assert worker == 0 or loaded.wait(30)

    train = numbered(batch_size=1)
    options = {"num_workers": 2, "persistent_workers": persistent, "worker_init_fn": wait}
    loader = DataLoader(train, batch_size=1, multiprocessing_context="fork", **options)
    iterator = iter(loader)
    seen = next(iterator).tolist()
    train.load_state_dict(train.state_dict(batches=1))
    loaded.set()
    next(iterator)  # of the late worker, which has begun then

    assert Counter(seen + [number for batch in loader for number in batch.tolist()]) == EACH_ONCE


def test_worker_that_is_about_to_begin_is_not_taken_for_one_that_has_ended(numbered):
    other, train = numbered(batch_size=BATCH), numbered(batch_size=BATCH)
    seen = taken(other, 1, num_workers=2)
    taken(train, num_workers=2)
    train.load_state_dict(other.state_dict(batches=1))
    train._board.writer(1).values[Column.START] = train._course.loads  # what begin() writes first

    assert Counter(seen + taken(train, num_workers=2)) == EACH_ONCE


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize(("workers", "batch_size"), LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_rest_of_epoch_comes_once_with_other_workers_and_batch_size(numbered, workers, batch_size, after, batches):
    first = numbered(batch_size=batch_size)
    first.set_epoch(3)
    seen = taken(first, batches, num_workers=workers)
    state = through_json(first.state_dict(batches=batches))

    again = numbered(batch_size=after[1])
    again.load_state_dict(state)
    rest = taken(again, num_workers=after[0])

    assert len(seen) == batches * batch_size
    assert Counter(seen + rest) == EACH_ONCE


def test_uninterrupted_and_resumed_batches_are_the_same(numbered):
    whole = taken(numbered(), num_workers=2)
    first, again = numbered(), numbered()
    seen = taken(first, 3, num_workers=2)
    again.load_state_dict(first.state_dict(batches=3))

    assert seen + taken(again, num_workers=3) == whole


def test_epochs_after_the_resumed_one_are_whole(numbered):
    first, again = numbered(), numbered()
    first.set_epoch(1)
    taken(first, 3)
    again.load_state_dict(first.state_dict(batches=3))
    epochs = []
    for epoch in (1, 2, 3):
        again.set_epoch(epoch)
        epochs.append(taken(again, num_workers=2))
    first.set_epoch(2)

    assert len(epochs[0]) == COUNT - 3 * BATCH
    assert epochs[1] == taken(first)
    assert Counter(epochs[2]) == EACH_ONCE


@pytest.mark.parametrize("workers", [0, 2])
def test_state_waits_for_its_epoch_with_a_warning(numbered, workers):
    first, again = numbered(), numbered()
    first.set_epoch(2)
    taken(first, 3)
    again.load_state_dict(first.state_dict(batches=3))
    lengths = []
    for epoch in range(4):
        with pytest.warns(UserWarning, match="a state of epoch 2 was loaded") if epoch < 2 else nullcontext():
            again.set_epoch(epoch)
        lengths.append(len(taken(again, num_workers=workers)))
    again.set_epoch(2)

    assert lengths == [COUNT, COUNT, COUNT - 3 * BATCH, COUNT]
    assert Counter(taken(again, num_workers=workers)) == EACH_ONCE


def test_state_of_an_epochs_end_lets_the_next_begin(numbered):
    first, again = numbered(), numbered()
    taken(first)
    again.load_state_dict(first.state_dict())

    again.set_epoch(1)

    assert Counter(taken(again)) == EACH_ONCE


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_after_the_resumed_one_are_whole_without_set_epoch(numbered, workers):
    first, again = numbered(shuffle=False), numbered(shuffle=False)
    taken(first, 3)
    again.load_state_dict(first.state_dict(batches=3))

    assert len(taken(again, num_workers=workers)) == COUNT - 3 * BATCH
    assert Counter(taken(again, num_workers=workers)) == EACH_ONCE


def test_resumed_epoch_that_was_broken_off_begins_anew_for_all_workers(numbered):
    """Those that had ended, having read ahead, began with a whole epoch, and the others with the rest."""
    train = numbered(shuffle=False)
    whole = taken(train)
    train.load_state_dict(train.state_dict(batches=0) | {"rest": [[3, COUNT, 1]]})
    with reading(DataLoader(train, batch_size=BATCH, num_workers=2)) as loader:
        list(itertools.islice(loader, 2))  # so that the second worker has been asked for more than it has
        while not (ended := train._board.rows()[1:3, Column.ENDED].tolist())[1]:
            os.sched_yield()
    assert ended == [0, 1]

    assert taken(train, num_workers=2) == whole[3:]
    assert taken(train, num_workers=2) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_state_of_a_finished_epoch_has_nothing_left_of_it(numbered, workers):
    first, again = numbered(), numbered()
    taken(first, num_workers=workers)
    again.load_state_dict(first.state_dict(batches=6))

    assert taken(again, num_workers=workers) == []
    assert Counter(taken(again, num_workers=workers)) == EACH_ONCE


def test_resuming_is_seen_by_persistent_workers(numbered):
    train = numbered()
    loader = DataLoader(train, batch_size=BATCH, num_workers=2, persistent_workers=True)
    seen = [batch.tolist() for batch in loader]
    state = train.state_dict(batches=4)
    train.set_epoch(1)
    list(loader)

    train.load_state_dict(state)

    assert [batch.tolist() for batch in loader] == seen[4:]


def test_more_left_over_than_fits_is_an_error_of_persistent_workers(numbered):
    """They would begin with something else."""
    train = numbered()
    loader = DataLoader(train, batch_size=BATCH, num_workers=1, persistent_workers=True)
    list(loader)
    state = train.state_dict(batches=0)
    train.load_state_dict(state | {"rest": [[n % COUNT, n % COUNT + 1, 1] for n in range(300)]})

    with pytest.raises(RuntimeError, match="make the DataLoader anew"):
        list(loader)
    assert len(taken(train)) == 300


def test_interrupted_again_and_again(numbered):
    assert Counter(taken_in_parts(numbered)) == EACH_ONCE


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_rest_of_epoch_comes_once_with_other_ranks(numbered, before, after):
    seen, states = [], []
    for rank in range(before):
        train = numbered(rank=rank, world_size=before, batch_size=2)
        seen += taken(train, 3)
        states.append(train.state_dict(batches=3))
    rest = []
    for rank in range(after):
        train = numbered(rank=rank, world_size=after)
        train.load_state_dict(states[0])
        rest.append(taken(train, num_workers=rank))

    assert all(state == states[0] for state in states)
    assert len({len(part) for part in rest}) == 1  # ranks stay in step
    everything = Counter(itertools.chain(seen, *rest))
    assert set(everything) == set(EACH_ONCE)
    assert everything.total() - COUNT == -(COUNT - len(seen)) % after  # repeats


def test_dropping_the_last_batch_is_as_without_the_interruption(numbered):
    whole = taken(numbered(drop_last=True))
    first, again = numbered(drop_last=True), numbered(drop_last=True)
    seen = taken(first, 2)
    again.load_state_dict(first.state_dict(batches=2))

    assert seen + taken(again) == whole


# ------------------------------------------------------------------ without a loader, or without workers


def test_what_is_iterated_in_the_process_is_counted_to_the_sample(numbered):
    first, again = numbered(batch_size=None), numbered(batch_size=None)
    reading = iter(first)
    seen = list(itertools.islice(reading, 10))
    state = first.state_dict()
    again.load_state_dict(state)

    assert seen + list(again) == seen + list(reading)
    assert len(seen) == 10


def test_loader_without_workers_needs_no_count(numbered):
    first, again = numbered(batch_size=None), numbered()
    seen = taken(first, 3, batch_size=5)
    again.load_state_dict(first.state_dict())

    assert len(seen) == 15
    assert Counter(seen + taken(again)) == EACH_ONCE


def test_state_before_anything_is_that_of_the_whole_epoch(numbered):
    train = numbered()
    train.set_epoch(2)
    state = train.state_dict()

    assert state == train.state_dict(batches=0)
    assert (state["epoch"], state["rest"]) == (2, [[0, COUNT, 1]])


def test_state_is_of_what_was_loaded_until_it_is_iterated(numbered):
    first, again = numbered(), numbered()
    taken(first, 3)
    state = first.state_dict(batches=3)
    again.load_state_dict(state)

    assert again.state_dict() == again.state_dict(batches=0) == state


@pytest.mark.parametrize("workers", [0, 1])
def test_state_before_the_first_batch_is_what_was_loaded_though_all_was_read(numbered, workers):
    train, again = numbered(), numbered()
    train.load_state_dict(train.state_dict() | {"rest": [[COUNT - 3, COUNT, 1]]})
    rest = taken(train, num_workers=workers)
    again.load_state_dict(train.state_dict(batches=0))

    assert taken(again) == rest
    assert len(rest) == 3


def test_state_is_small_and_of_plain_values(numbered):
    train = numbered()
    taken(train, 3, num_workers=3)
    state = train.state_dict(batches=3)

    assert through_json(state) == state
    assert len(pickle.dumps(state)) < 300


# ------------------------------------------------------------------ what can't be


def test_batches_of_workers_must_be_counted_by_the_caller(numbered):
    train = numbered()
    taken(train, 1, num_workers=1)

    with pytest.raises(ValueError, match=r"state_dict\(batches=…\)"):
        train.state_dict()


def test_batches_cannot_be_counted_without_their_size(numbered):
    train = numbered(batch_size=None)
    taken(train, 1, batch_size=BATCH)

    with pytest.raises(ValueError, match="needs the dataset's batch_size"):
        train.state_dict(batches=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_more_batches_than_were_read_are_refused(numbered, workers):
    """As where the loader's batch_size is smaller than the dataset's."""
    train = numbered()
    taken(train, 6, num_workers=workers, batch_size=2, **({"prefetch_factor": 1} if workers else {}))

    with pytest.raises(ValueError, match=r"batches=6, but only \d+ samples were read, and batch_size=4"):
        train.state_dict(batches=6)


def test_batches_of_another_epoch_are_refused(numbered):
    train = numbered()
    taken(train, 2)
    train.set_epoch(1)

    with pytest.raises(ValueError, match="of epoch 1, none has been read"):
        train.state_dict(batches=2)
    with pytest.raises(ValueError, match="none has been read yet"):
        numbered().state_dict(batches=2)
    with pytest.raises(ValueError, match="count from 0"):
        train.state_dict(batches=-1)


def test_batches_from_before_a_state_was_loaded_are_refused(numbered):
    train = numbered()
    taken(train, 4)
    train.load_state_dict(train.state_dict(batches=2))

    with pytest.raises(ValueError, match="of epoch 0, none has been read"):
        train.state_dict(batches=3)
    taken(train, 1)
    assert train.state_dict(batches=1)["rest"] == [[3 * BATCH, COUNT, 1]]


def test_batches_after_a_resumed_epoch_that_ended_are_counted_from_the_next(numbered):
    train = numbered(shuffle=False)
    taken(train, 4)
    train.load_state_dict(train.state_dict(batches=4))
    taken(train)
    taken(train, 2)

    assert train.state_dict(batches=2)["rest"] == [[2 * BATCH, COUNT, 1]]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"version": 2}, "version 2, this torch_s3 has 1"),
        ({"data": "0" * 32}, "another data set"),
        ({"samples": 5}, "of 5 samples, here are 23"),
        ({"seed": 7}, "seed=7, here is 0"),
        ({"shuffle": False}, "shuffle=False, here is True"),
    ],
)
def test_state_of_something_else_is_refused(numbered, changed, words):
    train = numbered()

    with pytest.raises(StateMismatch, match=words):
        train.load_state_dict(train.state_dict() | changed)


@pytest.mark.parametrize("state", [{}, {"epoch": 1}, [], None, "text", [None]])
def test_what_is_no_state_is_refused(numbered, state):
    with pytest.raises(StateMismatch, match=r"no state|empty list"):
        numbered().load_state_dict(state)


@pytest.mark.parametrize(
    "changed",
    [
        *({"epoch": epoch} for epoch in (-1, None, "1")),
        *({"rest": rest} for rest in (None, "ab", [[0, 99, 1]], [[-5, 3, 1]], [[0, 3, 0]], [[0, 3]])),
    ],
)
def test_damaged_state_is_refused(numbered, changed):
    train = numbered()

    with pytest.raises(StateMismatch, match="damaged"):
        train.load_state_dict(train.state_dict() | changed)


@pytest.mark.parametrize("epoch", [1.5, "1", None])
def test_epoch_is_a_whole_number(numbered, epoch):
    with pytest.raises(TypeError, match="give a whole number"):
        numbered().set_epoch(epoch)


def test_state_of_changed_data_is_refused(numbered, fs, folder, s3):
    fs.pipe({f"{folder}/a/{number}.png": picture(number) for number in range(3)})
    state = numbered(folder).state_dict()
    fs.pipe_file(f"{folder}/a/1.png", picture(2))

    with pytest.raises(StateMismatch, match="another data set, or one that has changed"):
        numbered(folder).load_state_dict(state)


def test_copy_of_the_data_in_another_bucket_is_the_same_data(numbered, fs, folder):
    files = {f"a/{number}.png": picture(number) for number in range(3)}
    for place in ("here", "there"):
        fs.pipe({f"{folder}/{place}/{name}": body for name, body in files.items()})

    numbered(f"{folder}/there").load_state_dict(numbered(f"{folder}/here").state_dict())


def test_pickled_and_copied_datasets_go_their_own_way(numbered):
    train = numbered()
    taken(train, 2)
    for other in (copy.deepcopy(train), pickle.loads(pickle.dumps(train))):
        other.set_epoch(5)
        assert Counter(taken(other)) == EACH_ONCE
        assert other.stats().samples == COUNT
    assert train.state_dict()["epoch"] == 0
    assert train.stats().samples == 2 * BATCH


# ------------------------------------------------------------------ torchdata's StatefulDataLoader


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("batches", [1, 4, 6])
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader_resumes(numbered, workers, batches, every):
    def loader():
        return StatefulDataLoader(numbered(), batch_size=BATCH, num_workers=workers, snapshot_every_n_steps=every)

    whole = [batch.tolist() for batch in loader()]
    first = loader()
    reading = iter(first)
    seen = [next(reading).tolist() for _ in range(batches)]
    state = first.state_dict()
    again = loader()
    again.load_state_dict(through_json(state) if workers == 0 else state)

    assert seen + [batch.tolist() for batch in again] == whole
    assert [batch.tolist() for batch in again] == whole  # the next epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader_resumes_in_the_epoch_it_was_in(numbered, workers):
    train = numbered()
    train.set_epoch(4)
    loader = StatefulDataLoader(train, batch_size=BATCH, num_workers=workers)
    reading = iter(loader)
    seen = [next(reading).tolist() for _ in range(2)]
    state = loader.state_dict()
    left = [batch.tolist() for batch in reading]
    again = numbered()
    resumed = StatefulDataLoader(again, batch_size=BATCH, num_workers=workers)
    resumed.load_state_dict(state)

    assert [batch.tolist() for batch in resumed] == left
    assert again.state_dict(batches=0)["epoch"] == 4
    assert Counter(itertools.chain(*seen, *left)) == EACH_ONCE


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_dataloader_at_an_epochs_end_goes_on_with_the_next(numbered, workers):
    first = StatefulDataLoader(numbered(), batch_size=BATCH, num_workers=workers)
    list(first)
    state = first.state_dict()
    train = numbered()
    again = StatefulDataLoader(train, batch_size=BATCH, num_workers=workers)
    again.load_state_dict(state)
    train.set_epoch(1)

    assert Counter(itertools.chain(*(batch.tolist() for batch in again))) == EACH_ONCE


def test_stateful_dataloader_with_another_batch_size_is_refused(numbered):
    first = StatefulDataLoader(numbered(), batch_size=BATCH, num_workers=1)
    list(first)
    again = StatefulDataLoader(numbered(batch_size=2), batch_size=2, num_workers=1)
    again.load_state_dict(first.state_dict())

    with pytest.raises(StateMismatch, match="batch_size 4, here 2"):
        list(again)


def test_workers_state_is_refused_outside_of_one(numbered):
    of_worker = numbered().state_dict() | {"worker": {"worker": 0, "workers": 1, "taken": 4}}

    with pytest.raises(StateMismatch, match="StatefulDataLoader"):
        numbered().load_state_dict(of_worker)


@pytest.mark.filterwarnings("ignore:epoch 0. skipped")
def test_skipping_stateful_dataloader_resumes(numbered, fs, folder, s3):
    fs.pipe({f"{folder}/a/{number:02}.png": picture(number) for number in range(COUNT)})
    manifest = Manifest.from_prefix(folder, storage_options=s3.storage_options)
    for number in (0, 3, 4, 11, 12, 13, 20):
        fs.pipe_file(f"{folder}/a/{number:02}.png", b"no image")
    train = {"on_error": "skip", "shuffle": False}
    first = StatefulDataLoader(numbered(manifest, **train), batch_size=BATCH, num_workers=2)
    reading = iter(first)
    seen = torch.cat([next(reading) for _ in range(3)]).tolist()
    again = StatefulDataLoader(numbered(manifest, **train), batch_size=BATCH, num_workers=2)
    again.load_state_dict(first.state_dict())

    assert sorted(seen + torch.cat(list(again)).tolist()) == sorted(set(range(COUNT)) - {0, 3, 4, 11, 12, 13, 20})


def test_ranks_are_equal_in_repeats_too(numbered):
    """What is repeated to make ranks equal is the epoch's beginning, resumed or not."""
    ends = []
    for resumed in (False, True):
        train = numbered(rank=1, world_size=2)
        if resumed:
            train.load_state_dict(train.state_dict() | {"rest": [[2 * BATCH, COUNT, 1]]})
        ends.append(taken(train)[-1])
    first = taken(numbered(rank=0, world_size=2))

    assert ends[0] == ends[1] == first[0]
    assert at_least_once(Counter(first + taken(numbered(rank=1, world_size=2))), 2)
