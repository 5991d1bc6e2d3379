"""The order of records, and how it is dealt, against references that write every position out."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_s3.data import order
from torch_s3.data.dealing import Contiguous, Split
from torch_s3.data.progress import Rest, batches_of_workers, taken_with
from torch_s3.data.shard_order import ShardOrder

few = st.integers(1, 5)
counts_of_shards = st.lists(st.integers(0, 30), min_size=1, max_size=8)
splits = {"count": st.integers(0, 120), "world_size": few, "workers": few, "batch_size": st.integers(1, 9)}


def first_of(counts):
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def epoch_of(counts, *, buffer, seed=0, epoch=0):
    found = ShardOrder(first_of(counts), buffer=buffer, seed=seed, epoch=epoch)
    records, at = [], 0
    while at < sum(counts):
        start, stop = found.block(at)
        assert start == at
        records += found.records(np.arange(start, stop)).tolist()
        at = stop
    return records


def share(count, *, world_size, batch_size, drop_last=False, **whose):
    return list(Contiguous().stretch(count, Split(world_size, batch_size, drop_last), **whose))


def shares(count, *, world_size, workers, batch_size, drop_last=False):
    """Of each rank, the places of each worker."""
    split = {"world_size": world_size, "workers": workers, "batch_size": batch_size, "drop_last": drop_last}
    return [
        [share(count, rank=rank, worker=worker, **split) for worker in range(workers)] for rank in range(world_size)
    ]


def collected(workers, batch_size):
    """The batches as DataLoader collects them: one of each worker in turn, those that are done left out."""
    each = [[places[at : at + batch_size] for at in range(0, len(places), batch_size)] for places in workers]
    return [batch for turn in itertools.zip_longest(*each) for batch in turn if batch is not None]


# ------------------------------------------------------------------ the order


@given(counts=counts_of_shards, buffer=st.integers(1, 50), seed=st.integers(), epoch=st.integers(0, 99))
def test_shuffled_epoch_has_every_record_once(counts, buffer, seed, epoch):
    assert sorted(epoch_of(counts, buffer=buffer, seed=seed, epoch=epoch)) == list(range(sum(counts)))


@given(counts=counts_of_shards)
def test_without_shuffling_records_come_as_listed(counts):
    assert epoch_of(counts, buffer=None) == list(range(sum(counts)))


@given(counts=counts_of_shards, buffer=st.integers(1, 50), seed=st.integers(0, 99))
def test_records_move_within_their_block_of_the_shuffled_shards(counts, buffer, seed):
    found = epoch_of(counts, buffer=buffer, seed=seed)
    first = first_of(counts)
    shards = order.permute(np.arange(len(counts)), len(counts), seed=seed, epoch=0).tolist()
    in_order = [record for shard in shards for record in range(first[shard], first[shard + 1])]

    for at in range(0, len(found), buffer):
        assert sorted(found[at : at + buffer]) == sorted(in_order[at : at + buffer])


def test_shards_come_in_their_turns():
    counts = [3] * 20
    turns = ShardOrder(first_of(counts), buffer=1, seed=5, epoch=2).turns.tolist()

    assert epoch_of(counts, buffer=1, seed=5, epoch=2) == [
        3 * turns.index(turn) + within for turn in range(20) for within in range(3)
    ]


def test_blocks_and_epochs_and_seeds_have_orders_of_their_own():
    of = {
        "epoch 0": epoch_of([2000], buffer=1000),
        "epoch 1": epoch_of([2000], buffer=1000, epoch=1),
        "seed 1": epoch_of([2000], buffer=1000, seed=1),
    }
    orders = [[record % 1000 for record in found[at : at + 1000]] for found in of.values() for at in (0, 1000)]

    assert len({tuple(found) for found in orders}) == 6
    assert max(abs(np.corrcoef(a, b)[0, 1]) for a, b in itertools.combinations(orders, 2)) < 0.15


@given(counts=counts_of_shards, buffer=st.integers(1, 50), data=st.data())
def test_some_positions_of_a_block_have_the_records_that_they_have_in_the_whole(counts, buffer, data):
    count = sum(counts)
    if not count:
        return
    whole = epoch_of(counts, buffer=buffer)
    found = ShardOrder(first_of(counts), buffer=buffer, seed=0, epoch=0)
    start, stop = found.block(data.draw(st.integers(0, count - 1)))
    some = data.draw(st.lists(st.integers(start, stop - 1), min_size=1))

    assert found.records(np.array(some)).tolist() == [whole[position] for position in some]


# ------------------------------------------------------------------ how it is dealt


@given(**splits)
def test_every_place_is_dealt_once_and_ranks_get_equally_many(count, world_size, workers, batch_size):
    ranks = shares(count, world_size=world_size, workers=workers, batch_size=batch_size)
    dealt = Counter(place for rank in ranks for places in rank for place in places)

    assert set(range(count)) <= set(dealt)
    assert max(dealt.values(), default=1) == 1
    assert dealt.total() == count + -count % world_size
    assert len({sum(map(len, rank)) for rank in ranks}) == 1


@given(**splits)
def test_dropping_the_last_leaves_whole_batches(count, world_size, workers, batch_size):
    ranks = shares(count, world_size=world_size, workers=workers, batch_size=batch_size, drop_last=True)
    dealt = [place for rank in ranks for places in rank for place in places]

    assert dealt == list(range(len(dealt)))
    assert len(dealt) == count // (world_size * batch_size) * world_size * batch_size


@given(**splits)
def test_workers_have_stretches_and_only_the_batch_that_comes_last_may_be_short(count, world_size, workers, batch_size):
    for rank in shares(count, world_size=world_size, workers=workers, batch_size=batch_size):
        own = [place for places in rank for place in places]
        assert own == list(range(own[0], own[0] + len(own))) if own else True
        sizes = [len(batch) for batch in collected(rank, batch_size)]
        assert len(sizes) == -(-len(own) // batch_size)
        assert all(size == batch_size for size in sizes[:-1])
        batches = [-(-len(places) // batch_size) for places in rank]
        assert batches == sorted(batches, reverse=True)
        assert max(batches) - min(batches) <= 1


@given(taken=st.integers(0, 130), **splits)
def test_stretch_begins_after_what_was_taken(count, world_size, workers, batch_size, taken):
    split = {"rank": world_size - 1, "world_size": world_size, "worker": workers - 1, "workers": workers}
    split |= {"batch_size": batch_size}

    assert share(count, taken=taken, **split) == share(count, **split)[taken:]


runs = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 80), st.integers(1, 3)), max_size=4)


def written_out(rest):
    return [position for run in rest.runs for position in range(*run)]


@settings(max_examples=200)
@given(
    runs=runs,
    world_size=few,
    workers=few,
    batch_size=st.integers(1, 6),
    drop_last=st.booleans(),
    in_step=st.booleans(),
    data=st.data(),
)
def test_what_all_have_left_is_what_none_has_had(runs, world_size, workers, batch_size, drop_last, in_step, data):
    rest = Rest(runs)
    split = {"world_size": world_size, "batch_size": batch_size, "drop_last": drop_last}
    had, left, taken = set(), [], []
    for rank, each in enumerate(shares(len(rest), workers=workers, **split)):
        if not (in_step and taken):
            taken = [data.draw(st.integers(0, len(places))) for places in each]
        for places, count in zip(each, taken, strict=True):
            had.update(place for place in places[:count] if place < len(rest))
        left.append(Contiguous().left_of_rank(len(rest), taken, Split(**split), rank=rank))

    united = Contiguous().left_of_all(rest, left)

    everything = written_out(rest)
    assert written_out(united) == [everything[n] for n in range(len(rest)) if n not in had]
    assert len(united.runs) <= len(rest.runs) + world_size * workers + 1
    if in_step:
        assert united.runs == Contiguous().left_in_step(rest, taken, Split(**split)).runs


@settings(max_examples=100)
@given(count=st.integers(1, 120), seed=st.integers(0, 2**32))
def test_resumed_again_and_again_everything_comes_once(count, seed):
    """With other workers, ranks and batch sizes each time, skipping some places; the plainest consumer there is."""
    rng = random.Random(seed)
    broken = {position for position in range(count) if rng.random() < 0.1}
    rest, seen = Rest([(0, count, 1)]), []
    for _ in range(4):
        world_size, workers, batch_size = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 5)
        batches, left = rng.randint(0, 5), []
        for rank, each in enumerate(shares(len(rest), world_size=world_size, workers=workers, batch_size=batch_size)):
            positions = [
                rest.positions(np.array([p for p in places if p < len(rest)], int)).tolist() for places in each
            ]
            usable = [[found for found in share if found not in broken] for share in positions]
            totals = [-(-len(share) // batch_size) for share in usable]
            given_batches = batches_of_workers(min(batches, sum(totals)), totals)
            taken = []
            for share_, good, number in zip(positions, usable, given_batches, strict=True):
                used = good[: number * batch_size]
                seen += used
                skipped = [at for at, position in enumerate(share_) if position in broken]
                end = number * batch_size >= len(good)
                taken.append(len(share_) if end else taken_with(len(used), skipped))
            split = Split(world_size, batch_size, drop_last=False)
            left.append(Contiguous().left_of_rank(len(rest), taken, split, rank=rank))
        rest = Contiguous().left_of_all(rest, left)
    seen += written_out(rest)

    assert sorted(position for position in seen if position not in broken) == [
        position for position in range(count) if position not in broken
    ]


@pytest.mark.parametrize("drop_last", [False, True])
def test_epoch_that_was_resumed_ends_as_one_that_was_not(drop_last):
    split = {"world_size": 2, "batch_size": 4, "drop_last": drop_last}
    rest = Contiguous().left_in_step(Rest([(0, 50, 1)]), [8, 4], Split(**split))
    again = [place for rank in shares(len(rest), workers=3, **split) for places in rank for place in places]

    assert len(again) == (24 if drop_last else 26)
