"""Objects as samples, and the map-style dataset of them."""

import io
import pickle
from collections import Counter

import fsspec
import pytest
import s3fs
from torch.utils.data import DataLoader, RandomSampler

from torch_s3 import Manifest, NotFound, ObjectChanged, S3FileSystem, S3MapDataset, S3Object

pytestmark = pytest.mark.timeout(60)

COUNT = 11
LARGE = bytes(range(256)) * 4000  # several blocks of a reader


@pytest.fixture(params=["ours", "s3fs", "memory", "file"])
def store(request, fs, s3, folder, tmp_path):
    """A filesystem, the uri of an empty prefix in it, and the same filesystem as pickled options would make it."""
    if request.param == "ours":
        yield fs, folder
    elif request.param == "s3fs":
        yield s3fs.S3FileSystem(**s3.storage_options), folder
    elif request.param == "file":
        yield fsspec.filesystem("file"), f"file://{tmp_path}"
    else:
        memory = fsspec.filesystem("memory")
        yield memory, "memory://objects"
        memory.rm("/objects", recursive=True)


@pytest.fixture
def objects(folder, fs):
    """The uri of a prefix with COUNT objects, of which each says its number."""
    fs.pipe({f"{folder}/{number:02}": f"object {number}".encode() for number in range(COUNT)})
    return folder


@pytest.fixture
def counting(s3):
    """A filesystem that nobody else uses, whose requests can be counted."""
    return S3FileSystem(**s3.storage_options, skip_instance_cache=True)


def text(item):
    return item.read().decode()


def listed(items):
    return items


# ------------------------------------------------------------------ one object

SLICES = [(None, None), (0, 5), (3, None), (None, 7), (-4, None), (2, -2), (5, 5), (7, 3), (0, 10**9), (10**9, None)]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("start", "stop"), SLICES)
def test_read_takes_slices(store, ahead, start, stop):
    fs, uri = store
    body = bytes(range(200))
    fs.pipe_file(f"{uri}/a", body)

    item = S3Object(f"{uri}/a", fs, data=memoryview(body) if ahead else None)

    assert item.read(start, stop) == body[start:stop]
    assert type(item.read(start, stop)) is bytes


@pytest.mark.parametrize("size", [None, len(LARGE)])
def test_size_is_known_or_asked_for(store, size):
    fs, uri = store
    fs.pipe_file(f"{uri}/a", LARGE)

    assert S3Object(f"{uri}/a", fs, size=size).size == len(LARGE)


@pytest.mark.parametrize("ahead", [False, True])
def test_open_gives_a_seekable_file(store, ahead):
    fs, uri = store
    fs.pipe_file(f"{uri}/a", LARGE)

    with S3Object(f"{uri}/a", fs, data=LARGE if ahead else None).open() as file:
        assert file.read(10) == LARGE[:10]
        file.seek(-100, io.SEEK_END)
        assert file.tell() == len(LARGE) - 100
        assert file.read() == LARGE[-100:]
        file.seek(1000)
        assert file.read(3) == LARGE[1000:1003]


def test_bytes_read_ahead_cost_no_request(counting, objects):
    item = S3Object(f"{objects}/01", counting, data=memoryview(bytearray(b"object 1")))

    assert (item.size, item.read(), item.read(2, 4), item.open().read()) == (8, b"object 1", b"je", b"object 1")
    assert counting.stats()["requests"] == 0


def test_range_costs_one_request_of_that_size(counting, fs, folder):
    fs.pipe_file(f"{folder}/a", LARGE)

    assert S3Object(f"{folder}/a", counting, size=len(LARGE)).read(-100) == LARGE[-100:]
    assert (counting.stats()["requests"], counting.stats()["bytes_received"]) == (1, 100)


@pytest.mark.parametrize("ahead", [False, True])
def test_object_pickles(fs, objects, ahead):
    item = S3Object(f"{objects}/01", fs, size=8, etag=None, data=memoryview(b"object 1") if ahead else None)

    again = pickle.loads(pickle.dumps(item))

    assert (again.uri, again.size, again.etag, again.read()) == (item.uri, 8, None, b"object 1")
    assert "01" in repr(again)


@pytest.mark.parametrize("read", [S3Object.read, lambda item: item.read(2, 4), lambda item: item.open().read(3)])
def test_version_is_pinned(fs, objects, s3, read):
    item = S3MapDataset(objects, prefetch=False, storage_options=s3.storage_options)[1]
    assert item.etag
    fs.pipe_file(item.uri, b"OBJECT 1")

    with pytest.raises(ObjectChanged) as caught:
        read(item)

    assert caught.value.uri == item.uri


@pytest.mark.parametrize("read", [S3Object.read, lambda item: item.read(2, 4), lambda item: item.size])
def test_missing_object_is_not_found(store, read):
    fs, uri = store
    fs.pipe_file(f"{uri}/a", b"body")

    with pytest.raises(NotFound) as caught:
        read(S3Object(f"{uri}/b", fs))

    assert caught.value.uri.endswith("/b")


# ------------------------------------------------------------------ the dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_sampler_sees_every_object_once(objects, s3, workers):
    ours = S3MapDataset(objects, transform=text, storage_options=s3.storage_options)
    loader = DataLoader(ours, batch_size=3, sampler=RandomSampler(ours), num_workers=workers)

    found = Counter(body for batch in loader for body in batch)

    assert found == Counter(f"object {number}" for number in range(COUNT))


def test_batch_is_in_the_order_asked(objects, s3):
    ours = S3MapDataset(objects, transform=text, storage_options=s3.storage_options)

    assert ours.__getitems__([3, 0, -1, 3]) == ["object 3", "object 0", f"object {COUNT - 1}", "object 3"]


def test_batch_is_read_concurrently(together):
    ours = S3MapDataset([f"s3://bucket/{number}" for number in range(8)], transform=text, filesystem=together)

    assert ours.__getitems__(range(8)) == ["body"] * 8


def test_samples_without_transform_are_objects_with_their_bytes(objects, s3):
    ours = S3MapDataset(objects, storage_options=s3.storage_options)
    (batch,) = DataLoader(ours, batch_size=COUNT, num_workers=1, collate_fn=listed)

    assert [item.read() for item in batch] == [f"object {number}".encode() for number in range(COUNT)]


def test_without_prefetch_nothing_is_read_but_what_the_transform_does(counting, fs, folder):
    fs.pipe({f"{folder}/{number}": LARGE for number in range(3)})
    manifest = Manifest.from_prefix(folder, filesystem=fs)
    ours = S3MapDataset(manifest, transform=lambda item: item.read(0, 10), prefetch=False, filesystem=counting)

    assert ours.__getitems__([0, 1, 2]) == [LARGE[:10]] * 3
    assert counting.stats()["bytes_received"] == 30


def test_failing_object_of_a_batch_raises_naming_it(fs, objects, s3):
    ours = S3MapDataset(objects, transform=text, storage_options=s3.storage_options)
    fs.rm_file(f"{objects}/04")

    with pytest.raises(NotFound) as caught:
        ours.__getitems__(range(COUNT))

    assert caught.value.uri == f"{objects}/04"
    assert ours[5] == "object 5"


def test_transform_that_raises_is_told_its_sample(objects, s3):
    ours = S3MapDataset(objects, transform=lambda item: {}[item.uri], storage_options=s3.storage_options)

    with pytest.raises(KeyError) as caught:
        ours[1]

    assert caught.value.__notes__ == [f"while transforming {objects}/01"]


@pytest.mark.parametrize("index", [COUNT, -COUNT - 1])
def test_index_outside_is_an_index_error(objects, s3, index):
    with pytest.raises(IndexError, match=f"sample {index} of {COUNT}"):
        S3MapDataset(objects, storage_options=s3.storage_options)[index]


def test_objects_come_from_any_filesystem(store):
    fs, uri = store
    fs.pipe({f"{uri}/{number}": str(number).encode() for number in range(5)})

    ours = S3MapDataset([f"{uri}/{number}" for number in (4, 2, 0)], transform=text, filesystem=fs)

    assert list(ours) == ["4", "2", "0"]
    assert [body for batch in DataLoader(ours, num_workers=1) for body in batch] == ["4", "2", "0"]


def test_cached_objects_are_not_asked_for_again(counting, objects, tmp_path):
    ours = S3MapDataset(objects, transform=text, cache_dir=tmp_path, filesystem=counting)
    first = ours.__getitems__(range(COUNT))
    before = counting.stats()["requests"]

    assert ours.__getitems__(range(COUNT)) == first
    assert counting.stats()["requests"] == before


def test_large_objects_of_a_batch_come_whole(counting, fs, folder, monkeypatch):
    monkeypatch.setattr("torch_s3.data.objects._IN_FLIGHT", 2 * len(LARGE))
    fs.pipe({f"{folder}/{number}": LARGE + bytes([number]) for number in range(6)})

    bodies = [item.read() for item in S3MapDataset(folder, filesystem=counting).__getitems__(range(6))]

    assert bodies == [LARGE + bytes([number]) for number in range(6)]
