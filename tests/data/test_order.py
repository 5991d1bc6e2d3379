import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_s3.data import order

# One, two, three, and around the powers of two, where the permutation's domain grows.
COUNTS = [1, 2, 3, *(2**power + off for power in range(2, 13) for off in (-1, 0, 1))]
SMALL = [2, 3, 4, 5, 7, 8, 9, 16, 17, 64]

counts = st.integers(1, 300) | st.sampled_from(COUNTS)
seeds = st.integers() | st.integers(-(2**70), 2**70)
epochs = st.integers(0, 2**40)
few = st.integers(1, 5)
splits = {"count": counts, "world_size": few, "workers": few, "batch_size": st.integers(1, 20)}


def permuted(count, *, seed=0, epoch=0):
    return order.permute(np.arange(count), count, seed=seed, epoch=epoch)


def of_worker(count, *, drop_last=False, **split):
    return np.concatenate(list(order.deal(count, drop_last=drop_last, **split))).tolist()


def batches(positions, size):
    return [positions[at : at + size] for at in range(0, len(positions), size)]


def collected(count, *, rank, world_size, workers, batch_size):
    """The batches of a rank as DataLoader collects them: one of each worker in turn, those that are done left out."""
    each = [
        batches(
            of_worker(count, rank=rank, world_size=world_size, worker=w, workers=workers, batch_size=batch_size),
            batch_size,
        )
        for w in range(workers)
    ]
    return [batch for turn in itertools.zip_longest(*each) for batch in turn if batch is not None]


# ------------------------------------------------------------------ the permutation


@given(count=counts, seed=seeds, epoch=epochs)
def test_shuffled_epoch_has_every_sample_once(count, seed, epoch):
    assert sorted(permuted(count, seed=seed, epoch=epoch)) == list(range(count))


@pytest.mark.parametrize("count", COUNTS)
def test_every_sample_is_there_once_around_powers_of_two(count):
    for epoch in range(5):
        assert sorted(permuted(count, epoch=epoch)) == list(range(count))


@given(count=counts, seed=seeds, epoch=epochs, data=st.data())
def test_position_says_its_sample_without_the_others(count, seed, epoch, data):
    some = data.draw(st.lists(st.integers(0, count - 1), max_size=20))

    found = order.permute(np.array(some, dtype=np.int64), count, seed=seed, epoch=epoch)

    assert found.tolist() == permuted(count, seed=seed, epoch=epoch)[some].tolist()


@given(count=st.integers(30, 3000), seed=seeds, epochs=st.lists(epochs, min_size=2, max_size=2, unique=True))
def test_epochs_differ(count, seed, epochs):
    one, other = (permuted(count, seed=seed, epoch=epoch) for epoch in epochs)

    assert (one == other).mean() < 0.5


@given(
    count=st.integers(30, 3000),
    epoch=epochs,
    seeds=st.lists(st.integers(-(2**31), 2**64 - 1), min_size=2, max_size=2, unique_by=lambda seed: seed % 2**64),
)
def test_seeds_differ(count, epoch, seeds):
    one, other = (permuted(count, seed=seed, epoch=epoch) for seed in seeds)

    assert (one == other).mean() < 0.5


def test_seed_and_epoch_are_not_added_up():
    assert permuted(1000, seed=1, epoch=2).tolist() != permuted(1000, seed=2, epoch=1).tolist()


def test_order_is_the_same_in_every_version():
    """Resuming depends on it: who changes this breaks runs that are under way."""
    assert permuted(10, seed=3, epoch=2).tolist() == [5, 7, 0, 9, 3, 6, 2, 1, 8, 4]


def too_uneven(observed):
    """Whether Pearson's chi-square lies more than six standard deviations above what chance gives."""
    expected = observed.sum() / observed.size
    freedom = (observed.shape[0] - 1) * (observed.shape[-1] - 1) if observed.ndim == 2 else observed.size - 1
    return ((observed - expected) ** 2 / expected).sum() > freedom + 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("by", ["seed", "epoch"])
@pytest.mark.parametrize("count", SMALL)
def test_every_sample_stands_at_every_position_equally_often(count, by):
    observed = np.zeros((count, count))
    for number in range(1000):
        observed[np.arange(count), permuted(count, **{by: number})] += 1

    assert not too_uneven(observed)


@pytest.mark.parametrize("count", [3, 4])
def test_every_permutation_comes_equally_often(count):
    places = count ** np.arange(count)
    codes = [int(permuted(count, epoch=epoch) @ places) for epoch in range(1000)]

    _, observed = np.unique(codes, return_counts=True)

    assert len(observed) == np.prod(np.arange(1, count + 1))
    assert not too_uneven(observed)


@pytest.mark.parametrize("count", [1000, 1024, 1025, 4097])
def test_neighbours_are_unrelated(count):
    observed = np.zeros(10)
    for epoch in range(20):
        steps = np.diff(permuted(count, epoch=epoch)) % count
        observed += np.bincount(steps * 10 // count, minlength=10)

    assert not too_uneven(observed)


# ------------------------------------------------------------------ ranks, workers, batches


def reference(count, *, rank, world_size, worker, workers, batch_size, drop_last):
    """Everything written out: the padded or cut sequence, dealt to ranks one by one and to workers by batches."""
    sequence = list(range(count))
    if drop_last:
        sequence = [place for batch in batches(sequence, world_size * batch_size) for place in batch]
        sequence = sequence[: len(sequence) - len(sequence) % (world_size * batch_size)]
    while len(sequence) % world_size:
        sequence.append(len(sequence))  # from count on: repeats
    return [
        place
        for number, batch in enumerate(batches(sequence[rank::world_size], batch_size))
        if number % workers == worker
        for place in batch
    ]


@given(**splits, drop_last=st.booleans(), taken=st.integers(0, 50))
def test_places_are_dealt_as_the_plain_reference_deals_them(count, world_size, workers, batch_size, drop_last, taken):
    split = {"world_size": world_size, "workers": workers, "batch_size": batch_size, "drop_last": drop_last}
    for rank in range(world_size):
        for worker in range(workers):
            expected = reference(count, rank=rank, worker=worker, **split)

            assert of_worker(count, rank=rank, worker=worker, **split) == expected
            assert of_worker(count, rank=rank, worker=worker, taken=taken, **split) == expected[taken:]


@given(**splits, drop_last=st.booleans())
@example(count=1, world_size=5, workers=5, batch_size=20, drop_last=False)
def test_every_place_is_dealt_once_and_ranks_are_equal(count, world_size, workers, batch_size, drop_last):
    ranks = [
        [
            place
            for worker in range(workers)
            for place in of_worker(
                count,
                rank=rank,
                world_size=world_size,
                worker=worker,
                workers=workers,
                batch_size=batch_size,
                drop_last=drop_last,
            )
        ]
        for rank in range(world_size)
    ]
    length = order.length(count, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
    dealt = length * world_size

    assert {len(rank) for rank in ranks} == {length}
    assert sorted(itertools.chain(*ranks)) == list(range(dealt))
    assert (count - world_size * batch_size < dealt <= count) if drop_last else (count <= dealt < count + world_size)


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 1), (3, 1), (3, 64), (2, 5000), (4, 100_000)])
def test_every_place_is_dealt_once_beyond_one_chunk(workers, batch_size):
    count = 5 * order._CHUNK + 1
    everything = [
        place
        for rank in range(2)
        for worker in range(workers)
        for place in of_worker(count, rank=rank, world_size=2, worker=worker, workers=workers, batch_size=batch_size)
    ]

    assert sorted(everything) == list(range(count + 1))


@settings(max_examples=50)
@given(**splits)
def test_batches_of_a_rank_are_the_same_for_any_number_of_workers(count, world_size, workers, batch_size):
    for rank in range(world_size):
        split = {"rank": rank, "world_size": world_size, "batch_size": batch_size}

        assert collected(count, workers=workers, **split) == collected(count, workers=1, **split)


@settings(max_examples=50)
@given(count=counts, workers=few, per_rank=st.integers(1, 4))
def test_global_batches_are_the_same_sets_for_any_number_of_ranks(count, workers, per_rank):
    size = 12 * per_rank  # divides by 1, 2, 3, 4 and 6 ranks
    for world_size in (1, 2, 3, 4, 6):
        ranks = [
            collected(count, rank=rank, world_size=world_size, workers=workers, batch_size=size // world_size)
            for rank in range(world_size)
        ]
        united = [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]

        assert united == batches(list(range(count + -count % world_size)), size)


def test_ten_billion_samples_take_no_memory():
    count = 10_000_000_000
    tracemalloc.start()
    try:
        dealt = order.deal(
            count, rank=3, world_size=64, worker=7, workers=8, batch_size=256, drop_last=False, taken=19_000_000
        )
        first = order.permute(next(dealt), count, seed=1, epoch=2)
        length = order.length(count, world_size=64, batch_size=256, drop_last=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert length == count // 64
    assert len(set(first.tolist())) == len(first)
    assert 0 <= first.min() < first.max() < count
    assert peak < 2_000_000
