"""What is left of an epoch, against references that write every position out."""

import itertools
import random

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_s3.data import order
from torch_s3.data.progress import Rest, batches_of_workers, left_of_all, left_of_rank, taken_with

few = st.integers(1, 5)
runs = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 80), st.integers(1, 7)), max_size=5)


def written_out(rest):
    return [position for run in rest.runs for position in range(*run)]


@given(runs=runs, data=st.data())
def test_places_of_runs_are_those_of_the_list(runs, data):
    rest = Rest(runs)
    everything = [position for run in runs for position in range(*run)]

    assert len(rest) == len(everything)
    assert written_out(rest) == everything
    places = data.draw(st.lists(st.integers(0, max(0, len(rest) - 1)), max_size=20 if everything else 0))
    assert rest.positions(np.array(places, dtype=np.int64)).tolist() == [everything[place] for place in places]


@given(runs=runs, first=st.integers(0, 100), stop=st.integers(0, 100), step=st.integers(1, 9))
def test_slices_of_runs_are_those_of_the_list(runs, first, stop, step):
    rest = Rest(runs)

    assert written_out(Rest(rest.at(first, stop, step))) == written_out(rest)[first:stop:step]
    assert written_out(rest.after(first)) == written_out(rest)[first:]


@given(totals=st.lists(st.integers(0, 9), min_size=1, max_size=5), data=st.data())
def test_batches_of_workers_are_counted_as_a_loader_collects_them(totals, data):
    turns = [worker for turn in range(9) for worker, total in enumerate(totals) if turn < total]
    batches = data.draw(st.integers(0, len(turns)))
    expected = [turns[:batches].count(worker) for worker in range(len(totals))]

    known = [None if total > count and data.draw(st.booleans()) else total for total, count in zip(totals, expected)]  # noqa: B905

    assert batches_of_workers(batches, totals) == expected
    assert batches_of_workers(batches, known) == expected


@given(places=st.lists(st.booleans(), max_size=40), data=st.data())
def test_places_behind_a_number_of_good_samples(places, data):
    """``places``: whether each could be used."""
    good = data.draw(st.integers(0, sum(places)))
    expected = next(n for n in range(len(places) + 1) if sum(places[:n]) == good)

    assert taken_with(good, [place for place, usable in enumerate(places) if not usable]) == expected


def dealt(count, **split):
    return np.concatenate(list(order.deal(count, drop_last=False, **split))).tolist()


@settings(max_examples=200)
@given(
    runs=runs.filter(lambda runs: len({p for run in runs for p in range(*run)}) == sum(len(range(*r)) for r in runs)),
    world_size=few,
    workers=few,
    batch_size=st.integers(1, 6),
    data=st.data(),
)
@example(runs=[(0, 10, 1)], world_size=1, workers=2, batch_size=2, data=None)
def test_what_all_have_left_is_what_none_has_had(runs, world_size, workers, batch_size, data):
    rest = Rest(runs)
    split = {"world_size": world_size, "workers": workers, "batch_size": batch_size}
    had, left = set(), []
    for rank in range(world_size):
        taken = []
        for worker in range(workers):
            places = dealt(len(rest), rank=rank, worker=worker, **split)
            taken.append(data.draw(st.integers(0, len(places))) if data else len(places) // 2)
            had.update(place for place in places[: taken[-1]] if place < len(rest))
        own = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
        left.append(left_of_rank(len(rest), taken, **own))

    united = left_of_all(rest, left)

    everything = written_out(rest)
    assert sorted(written_out(united)) == sorted(everything[n] for n in range(len(rest)) if n not in had)
    assert len(united.runs) <= max(1, len(rest.runs)) * world_size * (workers * 16 + 2)


def test_state_of_a_long_epoch_is_small_when_workers_are_at_different_points():
    rest = Rest([(0, 10_000_000_000, 1)])
    batches = 1_000_000  # of each worker
    left = [
        left_of_rank(len(rest), [batches * 256 + skipped for skipped in (0, 3, 90, 7)], **own)
        for own in ({"rank": rank, "world_size": 8, "batch_size": 256} for rank in range(8))
    ]

    united = left_of_all(rest, left)

    assert len(united) == 10_000_000_000 - 8 * (4 * batches * 256 + 100)
    assert len(united.runs) <= 8 * 4 + 1


@settings(max_examples=100)
@given(count=st.integers(1, 120), seed=st.integers(0, 2**32), data=st.data())
def test_resumed_again_and_again_everything_comes_once(count, seed, data):
    """With other workers, ranks and batch sizes each time, skipping some places; the plainest consumer there is."""
    rng = random.Random(seed)
    broken = {position for position in range(count) if rng.random() < 0.1}
    rest, seen = Rest([(0, count, 1)]), []
    for _ in range(4):
        world_size, workers, batch_size = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 5)
        loaders = [
            [
                dealt(
                    len(rest), rank=rank, worker=worker, world_size=world_size, workers=workers, batch_size=batch_size
                )
                for worker in range(workers)
            ]
            for rank in range(world_size)
        ]
        batches = rng.randint(0, 5)
        left = []
        for rank, shares in enumerate(loaders):
            positions = [
                [(place, int(rest.positions(np.array([place]))[0])) for place in share if place < len(rest)]
                for share in shares
            ]
            usable = [[found for found in share if found[1] not in broken] for share in positions]
            totals = [-(-len(share) // batch_size) for share in usable]
            given_batches = batches_of_workers(min(batches, sum(totals)), totals)
            taken = []
            for share, good, number in zip(positions, usable, given_batches, strict=True):
                used = good[: number * batch_size]
                seen += [position for _, position in used]
                skipped = [at for at, (_, position) in enumerate(share) if position in broken]
                end = number * batch_size >= len(good)
                taken.append(len(share) if end else taken_with(len(used), skipped))
            left.append(left_of_rank(len(rest), taken, rank=rank, world_size=world_size, batch_size=batch_size))
        rest = left_of_all(rest, left)
    seen += itertools.chain.from_iterable(range(*run) for run in rest.runs)

    assert sorted(position for position in seen if position not in broken) == [
        position for position in range(count) if position not in broken
    ]
