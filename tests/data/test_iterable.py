"""S3IterableDataset, and what all iterable datasets do on the way to an object: looking ahead, faults, cleaning up."""

import gc
import itertools
import multiprocessing
import os
import random
import threading
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from faults import Faults, answer, cut, reset, serve, serve_then_close
from loaders import reading
from pictures import EACH_ONCE, number_of
from torch.utils.data import DataLoader

from torch_s3 import CacheError, Manifest, NotFound, S3FileSystem, S3IterableDataset, S3Object
from torch_s3.uris import Read, read_ahead

COUNT = 60


@pytest.fixture(scope="module")
def things(s3, fs):
    bucket = s3.create_bucket("things")
    fs.pipe({f"{bucket}/{number:03}": b"%d" % number + bytes(number) for number in range(COUNT)})
    return bucket


@pytest.fixture
def make(things, s3):
    def make_dataset(source=things, **options):
        return S3IterableDataset(source, **{"storage_options": s3.storage_options, "batch_size": 4} | options)

    return make_dataset


def number_in(thing):
    return int(thing.read().rstrip(b"\0"))


def read(dataset, **options):
    return list(itertools.chain(*(batch.tolist() for batch in DataLoader(dataset, batch_size=4, **options))))


# ------------------------------------------------------------------ objects


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("prefetch", [True, False])
def test_every_object_comes_once_to_the_transform(make, workers, prefetch):
    assert read(make(transform=number_in, prefetch=prefetch), num_workers=workers) == list(range(COUNT))
    assert sorted(read(make(transform=number_in, prefetch=prefetch, shuffle=True))) == list(range(COUNT))


def test_objects_are_samples_without_transform(make, things):
    for number, thing in enumerate(make()):
        assert isinstance(thing, S3Object)
        assert (thing.uri, thing.size) == (f"{things}/{number:03}", len(str(number)) + number)
        with thing.open() as file:
            file.seek(1)
            assert file.read() == thing.read()[1:]


def test_samples_have_no_index(make, things):
    with pytest.raises(TypeError, match="S3IterableDataset has an order of its own: iterate it"):
        make(things)[0]


def test_what_is_read_ahead_is_not_read_again(make, s3):
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    dataset = S3IterableDataset("s3://things", filesystem=fs)
    before = fs.stats()["requests"]
    for thing in dataset:
        thing.read(), thing.size, thing.open().read()

    assert fs.stats()["requests"] - before == COUNT


def test_nothing_is_read_that_is_not_asked_for(make, s3):
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    dataset = S3IterableDataset("s3://things", prefetch=False, filesystem=fs)
    before = fs.stats()["requests"]

    assert next(iter(dataset)).read(0, 1) == b"0"
    assert fs.stats()["requests"] - before == 1


def test_transform_that_raises_stop_iteration_does_not_end_the_epoch(make, things):
    with pytest.raises(RuntimeError, match="the transform raised StopIteration for s3://"):
        list(make(transform=lambda _: next(iter(()))))


def test_raising_transform_is_shown_with_its_sample(make, things):
    def transform(thing):
        return 1 // (number_in(thing) - 3)

    with pytest.raises(ZeroDivisionError) as caught:
        list(make(transform=transform))
    assert caught.value.__notes__ == [f"while transforming {things}/003"]


def test_missing_object_is_skipped(make, things, s3):
    uris = [f"{things}/000", f"{things}/none", f"{things}/002"]
    with pytest.raises(NotFound, match="none"):
        list(make(uris))
    with pytest.warns(UserWarning, match="skipped 1"):
        assert [number_in(thing) for thing in make(uris, on_error="skip")] == [0, 2]


def test_objects_of_several_buckets(make, things, s3, fs):
    other = s3.create_bucket("other-things")
    fs.pipe_file(f"{other}/7", b"7")

    assert list(make([f"{things}/005", f"{other}/7"], transform=number_in)) == [5, 7]


def test_state_is_that_of_the_images(make):
    first, again = make(transform=number_in, shuffle=True), make(transform=number_in, shuffle=True)
    with reading(DataLoader(first, batch_size=4, num_workers=2)) as loader:
        seen = [number for batch in itertools.islice(loader, 5) for number in batch.tolist()]
    again.load_state_dict(first.state_dict(batches=5))

    assert sorted(seen + read(again, num_workers=1)) == list(range(COUNT))


# ------------------------------------------------------------------ looking ahead


def counted(reads, asked):
    for read_ in reads:
        asked.append(read_)
        yield read_


@pytest.mark.parametrize("known", [True, False])
def test_reads_ahead_are_bounded_in_bytes(s3, fs, folder, known):
    size = 100_000
    fs.pipe({f"{folder}/{number:02}": bytes(size) for number in range(20)})
    reads = [Read(f"{folder}/{number:02}".removeprefix("s3://"), size if known else None) for number in range(20)]
    asked = []
    for number, body in enumerate(read_ahead(fs, counted(reads, asked), window=64, max_bytes=3 * size)):
        assert len(body) == size
        if known or number > 15:  # the guess of what is unknown gets better
            assert len(asked) <= number + 5


def test_object_above_the_bound_is_read_alone(fs, folder):
    fs.pipe({f"{folder}/{number}": bytes(1000) for number in range(3)})
    reads = [Read(f"{folder}/{number}".removeprefix("s3://"), 1000) for number in range(3)]

    assert [len(body) for body in read_ahead(fs, reads, window=8, max_bytes=10)] == [1000] * 3


def test_large_objects_take_more_of_the_window(s3, folder):
    fs = S3FileSystem(**s3.storage_options, part_size=5 << 20)
    body = os.urandom(11 << 20)
    fs.pipe({f"{folder}/{number}": body for number in range(4)})
    asked = []
    reads = counted([Read(f"{folder}/{number}".removeprefix("s3://"), len(body)) for number in range(4)], asked)
    bodies = read_ahead(fs, reads, window=6)

    assert next(bodies) == body
    assert len(asked) == 3  # of three requests each: two are on their way, one was asked for when the first was there
    bodies.close()


def test_error_is_at_its_place(fs, things):
    reads = [Read(f"things/{name}") for name in ("001", "none", "003")]
    one, error, three = read_ahead(fs, reads, window=8)

    assert (bytes(one)[:1], type(error), bytes(three)[:1]) == (b"1", NotFound, b"3")


@pytest.mark.parametrize("workers", [0, 2])
def test_second_epoch_comes_from_the_cache(make, s3, tmp_path, workers):
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    dataset = make(transform=number_in, shuffle=True, cache_dir=tmp_path, storage_options=None, filesystem=fs)
    assert sorted(read(dataset)) == list(range(COUNT))
    before = fs.stats()["requests"]
    dataset.set_epoch(1)

    assert sorted(read(dataset, num_workers=workers)) == list(range(COUNT))
    assert fs.stats()["requests"] == before
    assert dataset.stats().cache_hits == COUNT


def test_cache_folder_that_cannot_be_written_is_an_error_before_the_first_batch(make, tmp_path):
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(CacheError):
        make(cache_dir=tmp_path / "file")


# ------------------------------------------------------------------ faults, and what is left behind


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_is_exact_whatever_the_network_does(things, s3, workers):
    rng = random.Random(workers)
    faults = [reset, cut(0.5), cut(1, 0.5), answer(500), answer(503, "SlowDown"), serve_then_close]
    script = (rng.choice(faults) if rng.random() < 0.2 else serve for _ in itertools.count())
    with Faults(script, upstream=s3.endpoint_url) as proxy:
        options = s3.storage_options | {"endpoint_url": proxy.storage_options["endpoint_url"]}
        dataset = S3IterableDataset(things, transform=number_in, shuffle=True, batch_size=4, storage_options=options)

        assert sorted(read(dataset, num_workers=workers)) == list(range(COUNT))
        assert dataset.stats().retries > 0


def threads_and_files():
    return Counter(thread.name for thread in threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))


def test_loaders_dropped_mid_epoch_a_hundred_times_leave_nothing(make, s3):
    dataset = make(transform=number_in, shuffle=True, storage_options=s3.storage_options | {"max_connections": 4})
    for workers in (0, 1):
        with reading(DataLoader(dataset, batch_size=4, num_workers=workers)) as loader:
            next(loader)
    gc.collect()
    threads, files = threads_and_files()
    for turn in range(100):
        loader = iter(DataLoader(dataset, batch_size=4, num_workers=1 if turn % 4 == 0 else 0))
        next(loader)
        del loader
    gc.collect()
    threads_after, files_after = threads_and_files()

    assert not threads_after - threads  # one that ended late is none of ours
    assert files_after <= files + 4  # connections that wait to be used again
    assert multiprocessing.active_children() == []


def test_memory_is_flat_over_epochs(make, s3):
    few = s3.storage_options | {"max_connections": 2}  # each has a buffer
    dataset = make(transform=number_in, shuffle=True, storage_options=few)
    list(dataset)
    tracemalloc.start()
    try:
        sizes = []
        for epoch in range(7):
            dataset.set_epoch(epoch)
            assert sum(1 for _ in dataset) == COUNT
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()

    assert min(sizes[-2:]) - min(sizes[:3]) < 12_000  # 50 bytes a sample would be more


def test_images_too_come_once_through_decoding_threads(dataset):
    train = dataset(labels=None, transform=number_of, shuffle=True, decode_threads=3)

    assert Counter(train) == EACH_ONCE
    assert not any("decode" in thread.name for thread in threading.enumerate())


def test_decoding_threads_end_with_a_dropped_iterator(dataset):
    images = iter(dataset(decode_threads=3))
    next(images)
    assert any("decode" in thread.name for thread in threading.enumerate())
    del images
    gc.collect()

    assert not any("decode" in thread.name for thread in threading.enumerate())


def test_bytes_without_decoding_and_gray(dataset, images, fs):
    raw = {bytes(body) for body, _ in dataset(decode=False)}
    shapes = {image.shape for image, _ in dataset(mode="GRAY")}

    assert raw == set(fs.cat(images, recursive=True).values())
    assert shapes == {(1, 4, 6)}


def test_manifest_of_the_data_may_be_kept_in_the_bucket(make, things, s3, folder):
    Manifest.from_prefix(things, storage_options=s3.storage_options).save(
        f"{folder}/things.manifest", storage_options=s3.storage_options
    )
    manifest = Manifest.load(f"{folder}/things.manifest", storage_options=s3.storage_options)

    assert list(make(manifest, transform=number_in)) == list(range(COUNT))
    assert Path(manifest.uri(3)).name == "003"
