"""The dataset in worker processes and process groups, over other filesystems, and what it leaves behind."""

import gc
import itertools
import json
import multiprocessing.forkserver
import pickle
import threading
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import s3fs
import torch
import torch.multiprocessing
from pictures import (
    BATCH,
    CLASSES,
    COUNT,
    EACH_ONCE,
    at_least_once,
    be_rank,
    number_of,
    numbers,
    picture,
    read,
    tree,
    write,
)
from processes import in_child
from torch.utils.data import DataLoader

from torch_s3 import S3ImageDataset

# ------------------------------------------------------------------ processes


@pytest.mark.parametrize("context", ["fork", "forkserver", "spawn"])
def test_workers_of_every_kind_read_after_their_parent_has(dataset, context, monkeypatch):
    if context == "forkserver":
        multiprocessing.forkserver.ensure_running()  # so that its environment is that of before
    be_rank(monkeypatch, 1, 2)
    train = dataset(shuffle=True, batch_size=BATCH)
    alone = []
    for epoch in (0, 1):
        train.set_epoch(epoch)
        alone.append(read(train))
    options = {"num_workers": 2 if context == "fork" else 1, "multiprocessing_context": context}  # others import torch
    loader = DataLoader(train, batch_size=BATCH, persistent_workers=True, **options)
    for epoch in (0, 1):
        train.set_epoch(epoch)
        together = [list(zip(map(number_of, batch), labels.tolist(), strict=True)) for batch, labels in loader]

        assert together == alone[epoch]


def test_workers_fork_while_parent_is_reading(dataset):
    train = dataset()
    reading = iter(train)
    next(reading)

    assert Counter(numbers(train, num_workers=2)) == EACH_ONCE
    assert len(list(reading)) == COUNT - 1


def test_dataset_is_made_in_a_fork_of_a_process_whose_torch_has_used_its_threads(dataset):
    """Sharing a large tensor's memory hung there, for it is copied by OpenMP."""
    torch.ones(10_000_000).add_(1)

    def make():
        assert Counter(numbers(dataset(on_error="skip"))) == EACH_ONCE

    assert in_child(make) == 0


def be_one_of_two(rank, rendezvous, images, damaged, options, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    train = S3ImageDataset(images, shuffle=True, batch_size=BATCH, storage_options=options)
    workers = {"num_workers": 1, "multiprocessing_context": ("fork", "spawn")[rank]}
    found = [len(train), numbers(train, **workers)]

    train = S3ImageDataset(damaged, on_error="replace", shuffle=True, batch_size=BATCH, storage_options=options)
    steps = 0
    for epoch in range(2):
        train.set_epoch(epoch)
        for batch, _ in DataLoader(train, batch_size=BATCH):
            sizes = torch.tensor([len(batch), 1])
            torch.distributed.all_reduce(sizes)  # which waits for the other one
            assert sizes.tolist() == [2 * len(batch), 2]
            steps += 1
    (results / str(rank)).write_text(json.dumps([*found, steps, len(train.errors)]))
    torch.distributed.destroy_process_group()


def test_process_group_shares_the_samples_and_stays_in_step(images, s3, fs, folder, tmp_path, monkeypatch):
    """Without further settings; and where objects are replaced, which are more of one rank's than of the other's."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    files = {f"{folder}/a/{number:02}.png": picture(number) for number in range(COUNT)}
    fs.pipe(files | dict.fromkeys(list(files)[3:10:3], b"no image"))
    torch.multiprocessing.spawn(
        be_one_of_two, args=(tmp_path / "rendezvous", images, folder, s3.storage_options, tmp_path), nprocs=2
    )

    lengths, seen, steps, failed = zip(
        *[json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)], strict=True
    )
    assert lengths == (12, 12)
    assert tuple(map(len, seen)) == lengths
    assert at_least_once(Counter(itertools.chain(*seen)), 2)
    assert steps == (2 * 3, 2 * 3)
    assert sum(failed) >= 2 * 3


# ------------------------------------------------------------------ other filesystems


@pytest.fixture(params=["s3fs", "memory", "file"])
def elsewhere(request, images, s3, tmp_path):
    """A source with the same samples in another filesystem, and the options for it."""
    if request.param == "s3fs":
        yield images, {"filesystem": s3fs.S3FileSystem(**s3.storage_options)}
    elif request.param == "memory":
        memory = fsspec.filesystem("memory")
        memory.pipe({f"/elsewhere/{name}": body for name, body in tree().items()})
        yield "memory://elsewhere", {"filesystem": memory}
        memory.rm("/elsewhere", recursive=True)
    else:
        write(tree(), tmp_path)
        yield f"file://{tmp_path}", {"storage_options": {"auto_mkdir": False}}


@pytest.mark.parametrize("workers", [0, 2])
def test_other_filesystems_stand_in(dataset, elsewhere, workers):
    source, options = elsewhere
    train = dataset(source, shuffle=True, batch_size=BATCH, **options)
    next(iter(train))  # so that workers fork from a process that has read

    assert train.classes == sorted(CLASSES)
    assert read(train, num_workers=workers) == read(dataset(shuffle=True, batch_size=BATCH))


def test_list_of_uris_in_another_filesystem(dataset, elsewhere):
    source, options = elsewhere
    uris = [f"{source.rstrip('/')}/{name}" for name in tree()]

    assert numbers(dataset(uris, **options)) == list(range(COUNT))


def test_prefix_may_be_a_path_of_the_filesystem_given(dataset, elsewhere):
    source, options = elsewhere
    fs = options.get("filesystem") or fsspec.filesystem("file")

    assert Counter(numbers(dataset(fs._strip_protocol(source), filesystem=fs))) == EACH_ONCE


def test_our_filesystem_may_be_given(dataset, fs):
    assert Counter(numbers(dataset(filesystem=fs), num_workers=2)) == EACH_ONCE


def test_dataset_with_another_filesystem_survives_pickling(dataset, s3):
    standin = s3fs.S3FileSystem(**s3.storage_options)
    train = dataset(filesystem=standin, batch_size=BATCH)
    next(iter(train))

    again = pickle.loads(pickle.dumps(train))

    assert Counter(numbers(again)) == EACH_ONCE


# ------------------------------------------------------------------ stopping early, and what is left behind


def threads():
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("torch_s3")}


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_breaking_off_and_iterating_again(dataset):
    train = dataset(shuffle=True)
    loader = DataLoader(train, batch_size=BATCH)
    for stop in (1, 3):
        for _ in itertools.islice(loader, stop):
            pass

    assert Counter(numbers(train)) == EACH_ONCE


def test_breaking_off_with_persistent_workers_and_iterating_again(dataset):
    loader = DataLoader(dataset(batch_size=BATCH), batch_size=BATCH, num_workers=2, persistent_workers=True)
    for _ in loader:
        break

    assert Counter(number_of(image) for images, _ in loader for image in images) == EACH_ONCE


def test_dropped_iterator_leaves_the_io_thread_alone(dataset):
    train = dataset()
    next(iter(train))
    loading = iter(DataLoader(train, batch_size=BATCH))
    next(loading)
    del loading
    gc.collect()

    assert threads() == {"torch_s3-io"}


def test_dropped_iterator_of_another_filesystem_leaves_no_thread(dataset, elsewhere):
    source, options = elsewhere
    before = threads()
    reading = iter(dataset(source, **options))
    next(reading)
    assert any("read" in name for name in threads())
    del reading
    gc.collect()

    assert threads() <= before | {"torch_s3-io"}


def test_dropped_iterators_leave_no_sockets(dataset, s3):
    train = dataset(storage_options=s3.storage_options | {"max_connections": 4})
    list(train)
    before = open_files()
    for _ in range(20):
        next(iter(train))  # dropped at once
    gc.collect()

    assert open_files() <= before + 4


def test_dropped_iterators_of_another_filesystem_leave_no_files(dataset, elsewhere):
    source, options = elsewhere
    train = dataset(source, **options)
    list(train)
    before = open_files()
    for _ in range(20):
        next(iter(train))  # dropped at once
    gc.collect()

    assert open_files() <= before + 10  # as many connections as s3fs keeps


def test_two_iterators_at_once_each_see_everything(dataset):
    train = dataset(shuffle=True)
    one, other = [], []
    for (image, _), (its, _) in zip(train, train, strict=True):
        one.append(number_of(image))
        other.append(number_of(its))

    assert one == other
    assert Counter(one) == EACH_ONCE


def test_iterators_may_share_one_connection(dataset, s3):
    train = dataset(lookahead=3, storage_options=s3.storage_options | {"max_connections": 1})
    interleaved = zip(train, train, train, strict=True)

    assert Counter(number_of(image) for triple in interleaved for image, _ in triple) == Counter(3 * list(range(COUNT)))


def test_iterator_goes_on_when_another_that_had_the_only_connection_is_dropped(fs, folder, dataset, s3):
    """Its last read waited for a connection, which the other one's end had closed, and nobody opened a new one."""
    fs.pipe({f"{folder}/a/{number}.png": picture(number) for number in range(9)})
    train = dataset(folder, lookahead=8, storage_options=s3.storage_options | {"max_connections": 1})

    def read_on():
        one, other = iter(train), iter(train)
        next(one)
        next(other)
        next(one)  # asks for the last image, behind what the other has asked for
        other.close()
        assert len(list(one)) == 7

    assert in_child(read_on) == 0  # whose I/O thread has no other connections that would wake it


def test_iterating_in_several_threads(dataset):
    train = dataset(shuffle=True)
    seen = []

    def go():
        seen.append(Counter(number_of(image) for image, _ in train))

    several = [threading.Thread(target=go) for _ in range(4)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()

    assert seen == [EACH_ONCE] * 4


def test_interrupted_consumer_leaves_dataset_usable(dataset):
    train = dataset()
    with pytest.raises(KeyboardInterrupt):
        for number, _ in enumerate(train):
            if number == 3:
                raise KeyboardInterrupt

    assert Counter(numbers(train)) == EACH_ONCE
