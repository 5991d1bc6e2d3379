"""Shards are read as the other datasets are: each record once, in a seeded order, to be resumed anywhere."""

import itertools
import json
import multiprocessing
import pickle
import threading
import tracemalloc
from collections import Counter
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from archives import tar_of
from fsspec.implementations.local import LocalFileSystem
from loaders import reading, taken, taken_in_parts
from records import BATCH, COUNT, EACH_ONCE, SIZES, content, framed, names, number_in, put, shards
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from torch_s3 import EmptyDataset, InvalidUri, Manifest, NotFound, ObjectChanged, S3FileSystem, StateMismatch
from torch_s3.data.tars import S3TarDataset
from torch_s3.data.tfrecords import S3TFRecordDataset

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # which StatefulDataLoader calls
KINDS = [(kind, suffix) for kind in ("tfrecord", "tar") for suffix in ("", ".gz", ".zst")]


@pytest.fixture(scope="module", params=KINDS, ids="".join)
def stored(request, s3, fs):
    """Kind and prefix of shards with the records 0 … COUNT-1. Not to be written to."""
    kind, suffix = request.param
    return kind, put(fs, f"{s3.create_bucket(f'shards-{kind}{suffix}')}/train", kind, suffix)


@pytest.fixture(scope="module")
def plain(s3, fs):
    """The prefix of TFRecord shards. Not to be written to."""
    return put(fs, f"{s3.create_bucket('shards')}/train")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few records: as where shards are large."""
    monkeypatch.setattr("torch_s3.data.chunks.piece_size", lambda fs: 300)


@pytest.fixture
def make(s3):
    """Makes datasets whose samples are their numbers."""

    def make(source, kind="tfrecord", **options):
        if "filesystem" not in options:
            options["storage_options"] = s3.storage_options
        options = {"transform": number_in, "batch_size": BATCH} | options
        if kind == "tar":
            return S3TarDataset(source, decode=options.pop("decode", False), **options)
        return S3TFRecordDataset(source, **options)

    return make


# ------------------------------------------------------------------ what is read


def test_records_come_as_they_lie(make, stored, small_chunks):
    kind, prefix = stored
    assert list(make(prefix, kind)) == list(range(COUNT))


def test_records_are_bytes(make, plain):
    assert list(make(plain, transform=None)) == [content(number) for number in range(COUNT)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_shuffled_records_come_once(make, stored, small_chunks, workers):
    kind, prefix = stored
    train = make(prefix, kind, shuffle=True, shuffle_buffer=6)
    first = taken(train, num_workers=workers)
    train.set_epoch(1)
    second = taken(train, num_workers=workers)

    assert Counter(first) == Counter(second) == EACH_ONCE
    assert len({tuple(first), tuple(second), tuple(range(COUNT))}) == 3


def test_order_is_that_of_the_seed_for_any_way_of_reading(make, stored, small_chunks):
    kind, prefix = stored
    options = {"shuffle": True, "seed": 3, "shuffle_buffer": 8}
    expected = list(make(prefix, kind, **options))

    assert list(make(prefix, kind, lookahead_bytes=1, decode_threads=2, **options)) == expected


def test_shuffle_buffer_larger_than_everything(make, plain, small_chunks):
    found = list(make(plain, shuffle=True, shuffle_buffer=10 * COUNT))

    assert Counter(found) == EACH_ONCE
    assert found != sorted(found)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_together_have_every_record_and_equally_many(make, plain, world_size, workers):
    ranks = [
        taken(make(plain, shuffle=True, shuffle_buffer=9, rank=rank, world_size=world_size), num_workers=workers)
        for rank in range(world_size)
    ]
    seen = Counter(itertools.chain(*ranks))

    assert set(seen) == set(EACH_ONCE)
    assert seen.total() == COUNT + -COUNT % world_size
    assert {len(rank) for rank in ranks} == {len(make(plain, rank=0, world_size=world_size))}


def test_single_shard_is_shared_by_four_workers_that_read_their_own_part(make, fs, folder, monkeypatch):
    monkeypatch.setattr("torch_s3.data.chunks.piece_size", lambda fs: 300)
    prefix = put(fs, folder, sizes=(200,))
    train = make(prefix, batch_size=10)
    per_worker = [[], [], [], []]
    with reading(DataLoader(train, batch_size=10, num_workers=4)) as loader:
        for turn, batch in enumerate(loader):
            per_worker[turn % 4] += batch.tolist()

    assert per_worker == [list(range(50 * worker, 50 * worker + 50)) for worker in range(4)]


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_every_start_method(make, plain, method):
    train = make(plain, shuffle=True)
    next(iter(train))  # the process has read before
    context = multiprocessing.get_context(method)
    assert Counter(taken(train, num_workers=2, multiprocessing_context=context)) == EACH_ONCE


def test_record_of_more_than_a_part(make, fs, folder):
    large = bytes(range(256)) * 43_000  # 11 MB, of which a request has 8
    fs.pipe(f"{folder}/s.tfrecord", shards()[1] + framed(large) + shards()[1])
    train = make(f"{folder}/s.tfrecord", transform=None)

    assert list(train) == [content(20), large, content(20)]
    assert train.read(1) == large


def test_persistent_workers_see_the_epoch(make, plain):
    train = make(plain, shuffle=True)
    loader = DataLoader(train, batch_size=BATCH, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        train.set_epoch(epoch)
        epochs.append([number for batch in loader for number in batch.tolist()])

    assert epochs[0] == epochs[2] != epochs[1]
    assert Counter(epochs[1]) == EACH_ONCE


def test_more_workers_than_batches(make, plain):
    assert sorted(taken(make(plain, batch_size=40), num_workers=4)) == list(range(COUNT))


def test_dropping_the_last_batch(make, plain):
    train = make(plain, drop_last=True, rank=1, world_size=2)

    assert len(train) == 24
    assert taken(train, num_workers=2) == [
        *range(24, 28),
        *range(36, 40),
        *range(28, 32),
        *range(40, 44),
        *range(32, 36),
        *range(44, 48),
    ]


def test_no_more_than_the_look_ahead_is_read(make, plain, s3, small_chunks):
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    train = make(plain, filesystem=fs, lookahead_bytes=300)
    before = fs.stats()["bytes_received"]
    with closing(iter(train)) as records:
        next(records)
        assert fs.stats()["bytes_received"] - before < 1000


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_byte_is_read_once(make, plain, s3, small_chunks, shuffle):
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    train = make(plain, filesystem=fs, shuffle=shuffle, shuffle_buffer=7)
    before = fs.stats()["bytes_received"]
    list(train)

    assert fs.stats()["bytes_received"] - before == sum(map(len, shards()))


def test_plans_of_tiny_records_take_no_more_than_these(make, tmp_path):
    (tmp_path / "s.tfrecord").write_bytes(framed(b"1234") * 300_000)
    train = make(f"file://{tmp_path}/", filesystem=LocalFileSystem(), shuffle=True)
    tracemalloc.start()
    with closing(iter(train)) as records:
        next(records)
        _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert most < 20e6  # of which the shard is 6


def test_dropped_in_the_middle_nothing_is_left(make, stored, small_chunks):
    kind, prefix = stored
    before = set(threading.enumerate())
    train = make(prefix, kind, shuffle=True, shuffle_buffer=5, decode_threads=2)
    records = iter(train)
    next(records)
    records.close()

    assert {thread for thread in threading.enumerate() if thread.name.startswith("torch_s3-")} <= before
    assert Counter(train) == EACH_ONCE


# ------------------------------------------------------------------ sources


@pytest.mark.parametrize("pattern", ["s-{000..003}.tfrecord", "s-00{0,1,2,3}.tfrecord"])
def test_braces_name_shards(make, plain, pattern):
    assert list(make(plain + pattern)) == list(range(COUNT))


def test_one_uri_is_one_shard(make, plain):
    assert list(make(plain + "s-002.tfrecord")) == list(range(SIZES[0] + SIZES[1], sum(SIZES[:3])))


def test_list_may_have_braces_and_is_read_in_its_order(make, plain):
    found = list(make([plain + "s-003.tfrecord", plain + "s-{000..001}.tfrecord"]))

    assert found == [*range(COUNT - SIZES[3], COUNT), *range(SIZES[0] + SIZES[1])]


def test_manifest_is_read(make, plain, s3):
    manifest = Manifest.from_prefix(plain, storage_options=s3.storage_options)

    assert list(make(manifest[2:])) == list(range(SIZES[0] + SIZES[1], COUNT))


def test_under_a_prefix_what_is_no_shard_is_left_out(make, fs, folder):
    prefix = put(fs, folder)
    fs.pipe(
        {
            f"{folder}/README.md": b"words",
            f"{folder}/s-000.tfrecord.txt": b"words",
            f"{folder}/data-00001-of-00002": b"",
        }
    )

    assert list(make(prefix)) == list(range(COUNT))


@pytest.mark.parametrize("name", ["x-00000-of-00002", "x.tfrecords", "x.tfrec"])
def test_usual_names_are_known(make, fs, folder, name):
    fs.pipe(f"{folder}/{name}", shards()[1])

    assert list(make(f"{folder}/")) == list(make(f"{folder}/{name}")) == [20]


def test_shard_without_records(make, fs, folder):
    fs.pipe({f"{folder}/a.tfrecord": b"", f"{folder}/b.tfrecord": shards()[0]})

    assert list(make([f"{folder}/a.tfrecord", f"{folder}/b.tfrecord"], shuffle=True, shuffle_buffer=1)) == list(
        range(SIZES[0])
    )


@pytest.mark.parametrize(
    ("source", "error"),
    [("{}/none-{{0..2}}.tfrecord", NotFound), ("{}/none/", EmptyDataset), ("{}/{{0..", InvalidUri)],
)
def test_what_is_not_there_is_named(make, folder, source, error):
    with pytest.raises(error, match=r"none|not closed"):
        make(source.format(folder))


@pytest.mark.parametrize("wrong", [{"shuffle_buffer": 0}, {"batch_size": 0}, {"on_error": "x"}, {"lookahead_bytes": 0}])
def test_what_can_not_be_meant_is_refused_before_anything_is_read(make, fs, folder, wrong):
    fs.pipe(f"{folder}/s.tfrecord", b"not a shard")
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(f"{folder}/", **wrong)


def test_fewer_records_than_ranks(make, plain):
    with pytest.raises(EmptyDataset, match="53 samples for 60 ranks"):
        make(plain, rank=0, world_size=60)


@pytest.mark.parametrize("kind", ["tfrecord", "tar"])
def test_other_filesystems(make, fs, tmp_path, kind, small_chunks):
    for name, body in zip(names(kind), shards(kind), strict=True):
        (tmp_path / name).write_bytes(body)

    assert list(make(f"file://{tmp_path}/", kind, filesystem=LocalFileSystem())) == list(range(COUNT))


# ------------------------------------------------------------------ one sample


def test_samples_by_number(make, stored):
    kind, prefix = stored
    train = make(prefix, kind)

    assert [train.read(number) for number in (0, 19, 20, 21, 52, -1)] == [0, 19, 20, 21, 52, 52]
    with pytest.raises(IndexError, match="sample 53 of 53"):
        train.read(COUNT)


def test_one_sample_is_one_range(make, plain, s3):
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    train = make(plain, filesystem=fs)
    before = fs.stats()
    train.read(7)

    assert fs.stats()["requests"] - before["requests"] == 1
    assert fs.stats()["bytes_received"] - before["bytes_received"] == len(content(7)) + 16


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("before", [(1, 0, 4), (1, 3, 4), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("after", [(1, 2, 5), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("batches", [1, 4])
def test_rest_of_epoch_comes_once_with_other_ranks_workers_and_batches(
    make, plain, small_chunks, before, after, batches
):
    seen, states = [], []
    world_size, workers, batch_size = before
    options = {"shuffle": True, "shuffle_buffer": 10, "seed": 4}
    for rank in range(world_size):
        train = make(plain, rank=rank, world_size=world_size, batch_size=batch_size, **options)
        train.set_epoch(2)
        seen += taken(train, batches, num_workers=workers)
        states.append(json.loads(json.dumps(train.state_dict(batches=batches))))
    assert all(state == states[0] for state in states)

    world_size, workers, batch_size = after
    rest = []
    for rank in range(world_size):
        train = make(plain, rank=rank, world_size=world_size, batch_size=batch_size, **options)
        train.load_state_dict(states[0])
        rest.append(taken(train, num_workers=workers))

    assert len({len(part) for part in rest}) == 1
    everything = Counter(itertools.chain(seen, *rest))
    assert set(everything) == set(EACH_ONCE)
    assert everything.total() - COUNT == -(COUNT - len(seen)) % world_size  # repeats


def test_interrupted_again_and_again(make, stored, small_chunks):
    kind, prefix = stored
    again = partial(make, prefix, kind, shuffle=True, shuffle_buffer=7)

    assert Counter(taken_in_parts(again)) == EACH_ONCE


def test_without_workers_a_state_is_exact_to_the_record(make, plain):
    train, again = make(plain, shuffle=True, shuffle_buffer=9), make(plain, shuffle=True, shuffle_buffer=9)
    records = iter(train)
    seen = list(itertools.islice(records, 17))
    again.load_state_dict(train.state_dict())

    assert seen + list(again) == seen + list(records)


def test_stateful_loader_resumes(make, plain, small_chunks):
    def loader():
        return StatefulDataLoader(make(plain, shuffle=True, shuffle_buffer=9), batch_size=BATCH, num_workers=2)

    first = loader()
    with reading(first) as batches:
        seen = [number for batch in itertools.islice(batches, 5) for number in batch.tolist()]
        state = pickle.loads(pickle.dumps(first.state_dict()))
    again = loader()
    again.load_state_dict(state)

    assert Counter(seen + [number for batch in again for number in batch.tolist()]) == EACH_ONCE


def test_state_of_a_finished_epoch_has_nothing_left(make, plain):
    train, again = make(plain), make(plain)
    batches = len(list(DataLoader(train, batch_size=BATCH, num_workers=3)))
    again.load_state_dict(train.state_dict(batches=batches))

    assert batches == -(-COUNT // BATCH)
    assert taken(again) == []
    assert Counter(taken(again)) == EACH_ONCE


@pytest.mark.parametrize("other", [{"shuffle_buffer": 11}, {"seed": 1}, {"shuffle": False}], ids=str)
def test_state_of_another_order_is_refused(make, plain, other):
    state = make(plain, shuffle=True, shuffle_buffer=10).state_dict()
    with pytest.raises(StateMismatch, match=next(iter(other)).removesuffix("_buffer")):
        make(plain, **{"shuffle": True, "shuffle_buffer": 10} | other).load_state_dict(state)


def test_state_of_other_shards_is_refused(make, plain, fs, folder):
    state = make(plain).state_dict()
    prefix = put(fs, folder)
    make(prefix).load_state_dict(state)  # a copy is the same data
    fs.pipe(f"{folder}/s-001.tfrecord", shards(sizes=(1,))[0])
    with pytest.raises(StateMismatch, match="another data set, or one that has changed"):
        make(prefix).load_state_dict(state)


# ------------------------------------------------------------------ cache and numbers


def test_second_epoch_comes_from_the_cache(make, stored, tmp_path, s3, small_chunks):
    kind, prefix = stored
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    train = make(prefix, kind, filesystem=fs, cache_dir=tmp_path, shuffle=True, shuffle_buffer=6)
    first = list(train)
    train.set_epoch(1)
    before = fs.stats()["requests"]

    assert Counter(train) == Counter(first) == EACH_ONCE
    assert fs.stats()["requests"] == before
    assert train.stats().cache_hits > 0


def test_numbers_are_of_records(make, plain):
    train = make(plain)
    taken(train, num_workers=2)
    stats = train.stats()

    assert (stats.samples, stats.bytes, stats.errors) == (COUNT, sum(map(len, shards())), 0)


def test_shard_that_was_overwritten_is_an_error(make, fs, folder):
    prefix = put(fs, folder)
    train = make(prefix)
    fs.pipe(f"{folder}/s-001.tfrecord", shards(sizes=(1,))[0])
    with pytest.raises(ObjectChanged, match=r"s-001\.tfrecord"):
        list(train)


def test_transform_that_raises_is_told_its_record(make, plain):
    def refuse(record):
        raise KeyError(number_in(record))

    with pytest.raises(KeyError) as caught:
        list(make(plain, transform=refuse))
    assert caught.value.__notes__ == [f"while transforming record 0 of {plain}s-000.tfrecord"]


def test_index_pickles_in_four_bytes_a_record(make, fs, folder):
    index = make(put(fs, folder, sizes=(2000, 2000)))._index
    pickled = pickle.dumps(index)

    assert len(pickled) < 4000 * 4 + 500
    assert np.array_equal(pickle.loads(pickled).of(1), index.of(1))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"shuffle": "False"}, "shuffle='False': give True or False"),
        ({"drop_last": 1}, "drop_last=1: give True or False"),
        ({"seed": 1.5}, "seed=1.5: give a whole number"),
        ({"batch_size": "4"}, "batch_size='4': give a whole number"),
        ({"shuffle_buffer": None}, "shuffle_buffer=None: give a whole number"),
        ({"lookahead_bytes": "1GB"}, "lookahead_bytes='1GB': give a whole number"),
        ({"filesystem": "s3"}, "filesystem='s3': give one made by"),
        ({"storage_options": "anon"}, "storage_options is a str: give a dict"),
        ({"features": ["id"]}, "features=.*: give a dict"),
        ({"source": None}, "source=None: give the uri of a prefix, a list"),
        ({"source": b"s3://b/"}, "source=b's3://b/': give the uri of a prefix, a list"),
    ],
)
def test_what_is_of_the_wrong_type_is_named_before_shards_are_read(given, error):
    with pytest.raises(TypeError, match=error):
        S3TFRecordDataset(**{"source": ["s3://bucket/a.tfrecord"]} | given)


def test_prefix_in_a_list_is_told_to_stand_alone():
    with pytest.raises(InvalidUri, match="s3://bucket/tars/: this is a prefix: give it alone"):
        S3TarDataset(["s3://bucket/tars/"])


def test_dataset_shows_what_it_reads(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"1.txt": b"a", "2.txt": b"b"}))

    assert repr(S3TarDataset(f"{tmp_path.as_uri()}/")) == f"<S3TarDataset {tmp_path.as_uri()}/: 2 samples>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "none of the 1 objects here is named like x.tar: give a list of uris"),
        ("shard.tfrecord", "this is one object: give a prefix, or a list of uris"),
        ("empty/", "nothing is stored here: check the prefix"),
    ],
)
def test_shards_of_other_names_are_told_how_to_be_given(tmp_path, name, message):
    (tmp_path / "shard.tfrecord").write_bytes(b"1")
    (tmp_path / "empty").mkdir()

    with pytest.raises(EmptyDataset, match=message):
        S3TarDataset((tmp_path / name).as_uri())
