"""What becomes of objects that are missing, changed or broken, alone, in workers, and on ranks that go in step."""

import itertools
import os
import pickle
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from loaders import reading
from pictures import BATCH, number_of, picture
from torch.utils.data import DataLoader

from torch_s3 import DecodeError, Manifest, NotFound, ObjectChanged, S3ImageDataset, TooManyErrors

COUNT = 25
BAD = {2: "missing", 3: "corrupt", 9: "changed", 13: "corrupt", 18: "missing", 24: "changed"}
GOOD = sorted(set(range(COUNT)) - BAD.keys())
KINDS = {"missing": NotFound, "corrupt": DecodeError, "changed": ObjectChanged}

pytestmark = pytest.mark.filterwarnings("ignore:epoch .. (skipped|replaced)")


def damage(fs, uri, how, number):
    if how == "missing":
        fs.rm_file(uri)
    elif how == "changed":
        fs.pipe_file(uri, picture(number)[::-1])


@pytest.fixture(scope="module")
def damaged(s3, fs):
    """A manifest of samples of which some were damaged since it was made, or before."""
    bucket = s3.create_bucket("damaged")
    bodies = {n: b"no image" if BAD.get(n) == "corrupt" else picture(n) for n in range(COUNT)}
    fs.pipe({f"{bucket}/a/{n:02}.png": body for n, body in bodies.items()})
    manifest = Manifest.from_prefix(bucket, storage_options=s3.storage_options)
    for number, how in BAD.items():
        damage(fs, f"{bucket}/a/{number:02}.png", how, number)
    return manifest


@pytest.fixture
def make(damaged, s3):
    def make_dataset(on_error="skip", **options):
        usual = {"labels": None, "transform": number_of, "batch_size": BATCH, "storage_options": s3.storage_options}
        return S3ImageDataset(damaged, on_error=on_error, **usual | options)

    return make_dataset


def read(dataset, **options):
    return list(itertools.chain(*batches(dataset, None, **options)))


def batches(dataset, count, **options):
    """The first batches of a loader."""
    with reading(DataLoader(dataset, batch_size=BATCH, **options)) as loader:
        return [batch.tolist() for batch in itertools.islice(loader, count)]


# ------------------------------------------------------------------ the policies


def test_first_bad_object_is_raised_by_default(make):
    with pytest.raises(NotFound, match="s3://damaged/a/02"):
        read(make("raise"))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("decode_threads", [1, 2])
def test_skipping_leaves_bad_objects_out(make, workers, decode_threads):
    assert sorted(read(make(decode_threads=decode_threads), num_workers=workers)) == GOOD


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_replacing_keeps_the_number_of_samples(make, workers, shuffle):
    seen = read(make("replace", shuffle=shuffle), num_workers=workers)

    assert len(seen) == COUNT
    assert set(seen) == set(GOOD)


def test_replaced_is_by_the_one_before(make):
    seen = read(make("replace"))

    expected, last = [], None
    for number in range(COUNT):
        last = number if number not in BAD else last
        expected.append(last)
    assert seen == expected


def test_replaced_is_by_the_next_one_where_there_is_none_before(make, s3, damaged):
    seen = list(S3ImageDataset(
        damaged[2:6], labels=None, transform=number_of, on_error="replace", storage_options=s3.storage_options
    ))  # fmt: skip

    assert seen == [4, 4, 4, 5]


def test_label_of_a_replaced_sample_is_that_of_what_is_there(make):
    for image, uri in make("replace", labels=lambda uri: uri, transform=None):
        assert uri.endswith(f"{number_of(image):02}.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_one_that_alone_is_left_of_an_epoch_is_replaced(make, workers):
    """Else training could never go on from there."""
    dataset = make("replace")
    dataset.load_state_dict(dataset.state_dict() | {"rest": [[24, 25, 1]]})

    assert read(dataset, num_workers=workers) == [0]
    assert [failure.position for failure in dataset.errors] == [24]


def test_nothing_to_replace_by_is_the_error(make, damaged, s3):
    with pytest.raises(DecodeError, match="03"):
        list(S3ImageDataset(damaged[2:4], labels=None, on_error="replace", storage_options=s3.storage_options))


@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_where_nothing_can_be_read_that_is_an_error(fs, folder, s3, on_error):
    """It is no matter of single objects, and must not go on for ever."""
    fs.pipe({f"{folder}/a/{number}.png": b"no image" for number in range(12)})
    dataset = S3ImageDataset(folder, on_error=on_error, storage_options=s3.storage_options)

    with pytest.raises(DecodeError):
        list(dataset)
    assert len(dataset.errors) == 10


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("on_error", ["skip", "replace"])
def test_one_in_a_hundred_bad_under_each_policy_with_two_ranks_in_step(fs, folder, s3, how, on_error):
    files = {f"{folder}/a/{n:03}.png": picture(n % 25) for n in range(200)}
    bad = [f"{folder}/a/{n:03}.png" for n in (5, 152)]
    fs.pipe(files | (dict.fromkeys(bad, b"no image") if how == "corrupt" else {}))
    options = {"storage_options": s3.storage_options}
    manifest = Manifest.from_prefix(folder, **options)
    for uri in bad:
        damage(fs, uri, how, 9)
    options |= {"labels": None, "decode": False, "on_error": on_error, "batch_size": 8, "world_size": 2}
    if how == "corrupt":
        options |= {"decode": True, "transform": number_of}
    ranks = [S3ImageDataset(manifest, shuffle=True, rank=rank, **options) for rank in range(2)]

    lengths = [[len(batch) for batch in DataLoader(rank, batch_size=8, num_workers=2)] for rank in ranks]

    failures = [failure for rank in ranks for failure in rank.errors]
    assert sorted(failure.uri for failure in failures) == bad
    assert {failure.error for failure in failures} == {KINDS[how].__name__}
    assert sum(map(sum, lengths)) == 200 - (2 if on_error == "skip" else 0)
    if on_error == "replace":
        assert lengths[0] == lengths[1] == [8] * 12 + [4]


# ------------------------------------------------------------------ the record, the limit, the warning


@pytest.mark.parametrize(
    ("on_error", "context"), [("skip", None), ("replace", None), ("skip", "fork"), ("replace", "spawn")]
)
def test_every_failure_is_recorded_in_the_parent(make, context, on_error):
    dataset = make(on_error)
    dataset.set_epoch(0)
    workers = {None: 0, "fork": 2, "spawn": 1}[context]
    read(dataset, num_workers=workers, multiprocessing_context=context)

    failures = sorted(dataset.errors)
    assert [failure.uri for failure in failures] == [f"s3://damaged/a/{number:02}.png" for number in BAD]
    assert [failure.error for failure in failures] == [KINDS[how].__name__ for how in BAD.values()]
    assert [failure.position for failure in failures] == list(BAD)
    assert {failure.worker for failure in failures} == (set(range(workers)) or {None})
    assert {failure.epoch for failure in failures} == {0}
    assert all(failure.message.startswith(failure.uri) for failure in failures)
    assert dataset.stats().errors == len(BAD)
    assert dataset.stats().samples == (len(GOOD) if on_error == "skip" else COUNT)


def test_nothing_is_recorded_where_nothing_failed(dataset):
    train = dataset(on_error="skip")
    list(train)

    assert train.errors == dataset().errors == []


def test_one_warning_tells_how_many(make):
    with pytest.warns(UserWarning, match="skipped") as caught:
        list(make())

    (warning,) = caught
    words = (
        "epoch 0: skipped 6 (2 DecodeError, 2 NotFound, 2 ObjectChanged), the first: s3://damaged/a/02.png: no such key"
    )
    assert str(warning.message).startswith(words)


def test_last_of_the_workers_warns(make, capfd, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", lambda message, *_: os.write(2, f"{message}\n".encode()))
    with warnings.catch_warnings(action="always"):
        read(make("replace"), num_workers=3)

    assert capfd.readouterr().err.count("epoch 0: replaced 6 (2 DecodeError") == 1


@pytest.mark.parametrize(("limit", "enough"), [(5, False), (np.int64(6), True), (0, False), (0.2, False), (0.24, True)])
@pytest.mark.parametrize("workers", [0, 2])
def test_more_errors_than_allowed_are_an_error(make, limit, enough, workers):
    dataset = make(max_errors=limit)
    if enough:
        assert sorted(read(dataset, num_workers=workers)) == GOOD
        return
    with pytest.raises(TooManyErrors, match=rf"samples of epoch 0 failed, max_errors={limit}; last: s3://") as caught:
        read(dataset, num_workers=workers)
    assert caught.value.uri.startswith("s3://damaged/a/")


def test_errors_are_counted_anew_each_epoch(make):
    dataset = make(max_errors=6)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert len(list(dataset)) == len(GOOD)
    assert len(dataset.errors) == 18


@pytest.mark.parametrize("workers", [0, 2])
def test_record_that_somebody_has_deleted_begins_anew(make, workers):
    """As services that tidy the folder for temporary files up do."""
    dataset = make()
    for epoch in range(2):
        dataset.set_epoch(epoch)
        Path(dataset._record.path).unlink()
        assert dataset.errors[6 * epoch :] == []
        assert sorted(read(dataset, num_workers=workers)) == GOOD
        assert len(dataset.errors) == 6 * (epoch + 1)


def test_record_goes_with_the_dataset(make):
    dataset = make()
    path = Path(dataset._record.path)
    pickled = pickle.dumps(dataset)
    list(dataset)
    assert path.exists()
    del dataset
    assert not path.exists()

    again = pickle.loads(pickled)

    list(again)
    assert len(again.errors) == len(BAD)
    assert again._record.path != str(path)


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_skipping_epoch_is_resumed_exactly(make, workers, count):
    """Batches of a worker that skipped hold samples from further on."""
    first, again = make(shuffle=True), make(shuffle=True, batch_size=3)
    seen = batches(first, count, num_workers=workers)
    state = first.state_dict(batches=len(seen))
    again.load_state_dict(state)

    assert sorted(itertools.chain(*seen, again)) == GOOD


@pytest.mark.parametrize("after", [1, 2, 3])
def test_skipping_ranks_are_resumed_exactly_from_all_their_states(make, after):
    seen, states = [], []
    for rank in range(2):
        train = make(shuffle=True, rank=rank, world_size=2)
        seen += itertools.chain(*batches(train, 2, num_workers=2 * rank))
        states.append(train.state_dict(batches=2))
    left = []
    for rank in range(after):
        train = make(shuffle=True, rank=rank, world_size=after)
        train.load_state_dict(states)
        left += list(train)

    everything = Counter(seen + left)
    assert sorted(everything) == GOOD
    assert everything.total() <= len(GOOD) + 1 + after - 1  # the repeats that make ranks equal, before and after


def test_skipping_rank_alone_is_resumed_with_a_warning_and_loses_nothing(make):
    seen, states = [], []
    for rank in range(2):
        train = make(shuffle=True, rank=rank, world_size=2)
        seen += itertools.chain(*batches(train, 2))
        states.append(train.state_dict(batches=2))
    train = make(shuffle=True)
    with pytest.warns(UserWarning, match="rank 1 alone, of 2 that skip errors"):
        train.load_state_dict(states[1])
    everything = Counter(seen + list(train))

    assert sorted(everything) == GOOD
    assert everything.total() <= len(GOOD) + len(BAD)


def test_states_of_some_ranks_are_refused(make):
    states = []
    for rank in range(3):
        train = make(rank=rank, world_size=3)
        next(iter(DataLoader(train, batch_size=BATCH)))
        states.append(train.state_dict(batches=1))
    with pytest.raises(ValueError, match=r"2 states, of ranks \[0, 2\]: give one of each of the 3 ranks"):
        make().load_state_dict([states[0], states[2]])
    with pytest.raises(ValueError, match="different numbers of batches"):
        make().load_state_dict([states[0], states[1], states[2] | {"rank": states[2]["rank"] | {"batches": 2}}])


def test_replacing_epoch_is_resumed_exactly(make):
    first, again = make("replace", shuffle=True), make("replace", shuffle=True)
    seen = list(itertools.chain(*batches(first, 3, num_workers=2)))
    again.load_state_dict(first.state_dict(batches=3))
    rest = list(again)

    assert len(seen + rest) == COUNT
    assert set(seen + rest) == set(GOOD)
