import copy
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
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
from torch.utils.data import DataLoader

from torch_s3 import EmptyDataset, Manifest

# ------------------------------------------------------------------ each sample exactly once


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_comes_once(dataset, monkeypatch, world_size, workers, shuffle):
    train = dataset(shuffle=shuffle, batch_size=BATCH)
    seen = Counter()
    for rank in range(world_size):
        be_rank(monkeypatch, rank, world_size)
        seen += Counter(numbers(train, num_workers=workers))

    assert at_least_once(seen, world_size)


@pytest.mark.parametrize("batch_size", [None, 1, 5, 100])
def test_every_sample_comes_once_whatever_batch_size_is_given(dataset, monkeypatch, batch_size):
    train = dataset(shuffle=True, batch_size=batch_size)
    seen = Counter()
    for rank in range(2):
        be_rank(monkeypatch, rank, 2)
        seen += Counter(numbers(train, num_workers=3))

    assert at_least_once(seen, 2)


def test_more_workers_than_samples(fs, folder, dataset):
    fs.pipe({f"{folder}/a/{number}.png": picture(number) for number in range(2)})

    assert numbers(dataset(folder), num_workers=3) == [0, 1]


def test_more_ranks_than_samples_are_refused_before_the_first_batch(fs, folder, dataset, monkeypatch):
    fs.pipe({f"{folder}/a/{number}.png": picture(number) for number in range(2)})
    be_rank(monkeypatch, 0, 3)

    with pytest.raises(EmptyDataset, match="2 samples for 3 ranks"):
        dataset(folder)


def test_fewer_samples_than_a_batch_with_drop_last_are_refused(dataset):
    with pytest.raises(EmptyDataset, match="23 samples fill no batch of 12 on 2 ranks"):
        dataset(batch_size=12, drop_last=True, rank=0, world_size=2)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_dropping_the_last_batch_gives_ranks_equal_and_full_batches(dataset, world_size, workers):
    seen = []
    for rank in range(world_size):
        train = dataset(shuffle=True, batch_size=BATCH, drop_last=True, rank=rank, world_size=world_size)
        batches = read(train, num_workers=workers)
        assert [len(batch) for batch in batches] == [BATCH] * (COUNT // (BATCH * world_size))
        assert len(train) == BATCH * len(batches)
        seen += [number for batch in batches for number, _ in batch]

    assert len(seen) == len(set(seen)) == COUNT // (BATCH * world_size) * BATCH * world_size


def test_ranks_given_go_before_those_of_the_environment(dataset, monkeypatch):
    be_rank(monkeypatch, 1, 4)
    seen = Counter()
    for rank in range(2):
        seen += Counter(numbers(dataset(rank=rank, world_size=2)))

    assert at_least_once(seen, 2)


@pytest.mark.parametrize("lookahead", [1, 2, 3, 100])
def test_lookahead_changes_nothing_but_the_speed(dataset, lookahead):
    assert numbers(dataset(shuffle=True, lookahead=lookahead)) == numbers(dataset(shuffle=True))


def test_length_is_samples_of_rank(dataset, monkeypatch):
    train = dataset()
    lengths = []
    for rank in range(3):
        be_rank(monkeypatch, rank, 3)
        lengths.append(len(train))
        assert len(numbers(train)) == lengths[-1]

    assert lengths == [8, 8, 8]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_length_of_loader_is_its_number_of_batches(dataset, workers):
    loader = DataLoader(dataset(batch_size=BATCH), batch_size=BATCH, num_workers=workers)

    assert len(loader) == len(list(loader)) == 6


@pytest.mark.parametrize(("rank", "world_size"), [("2", "2"), ("-1", "2"), ("1", None)])
def test_rank_outside_world_is_refused(dataset, monkeypatch, rank, world_size):
    """It would train on less than all of the data, and say nothing."""
    monkeypatch.setenv("RANK", rank)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)

    with pytest.raises(ValueError, match="RANK"):
        list(dataset())


def test_rank_is_that_of_the_process_that_reads(dataset, monkeypatch):
    """A launcher makes the dataset and sends it to its ranks, which alone know their number."""
    sent = pickle.dumps(dataset())
    seen = []
    for rank in range(2):
        be_rank(monkeypatch, rank, 2)
        seen += numbers(pickle.loads(sent))

    assert at_least_once(Counter(seen), 2)


# ------------------------------------------------------------------ order


def test_unshuffled_order_is_that_of_the_keys(dataset):
    train = dataset()
    keys = {name: number for number, name in enumerate(tree())}

    assert numbers(train) == [keys[name] for name in sorted(keys)]


@pytest.mark.parametrize("workers", [0, 2])
def test_order_of_a_list_is_kept(dataset, images, workers):
    uris = [images + name for name in tree()]

    assert numbers(dataset(uris, batch_size=BATCH), num_workers=workers) == list(range(COUNT))


def test_shuffled_order_follows_from_seed_and_epoch(dataset):
    one, same, other_seed = dataset(shuffle=True, seed=5), dataset(shuffle=True, seed=5), dataset(shuffle=True, seed=6)
    first = numbers(one)

    assert first == numbers(one) == numbers(same)
    assert first != numbers(other_seed)
    one.set_epoch(1)
    assert first != numbers(one)
    same.set_epoch(1)
    assert numbers(one) == numbers(same)
    one.set_epoch(0)
    assert numbers(one) == first


def test_shuffling_shuffles(dataset):
    assert numbers(dataset(shuffle=True)) != numbers(dataset())


def test_unshuffled_order_is_the_same_in_every_epoch(dataset):
    train = dataset()
    first = numbers(train)
    train.set_epoch(1)

    assert numbers(train) == first


@pytest.mark.parametrize("arrives", ["as made", "pickled", "copied"])
def test_epoch_reaches_persistent_workers(dataset, arrives):
    train = {"as made": lambda d: d, "pickled": lambda d: pickle.loads(pickle.dumps(d)), "copied": copy.deepcopy}[
        arrives
    ](dataset(shuffle=True, batch_size=BATCH))
    loader = DataLoader(train, batch_size=BATCH, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        train.set_epoch(epoch)
        epochs.append([number_of(image) for images, _ in loader for image in images])

    assert epochs[0] == epochs[2] != epochs[1]
    assert Counter(epochs[1]) == EACH_ONCE


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_the_same_for_any_number_of_workers(dataset, shuffle):
    train = dataset(shuffle=shuffle, batch_size=BATCH)
    alone = read(train)

    assert [len(batch) for batch in alone] == [4, 4, 4, 4, 4, 3]
    assert read(train, num_workers=1) == alone
    assert read(train, num_workers=3) == alone


def test_global_batches_are_the_same_for_any_number_of_ranks(dataset, monkeypatch):
    alone = [sorted(batch) for batch in read(dataset(shuffle=True, batch_size=6), batch_size=6)]
    for world_size in (2, 3):
        train = dataset(shuffle=True, batch_size=6 // world_size)
        parts = []
        for rank in range(world_size):
            be_rank(monkeypatch, rank, world_size)
            parts.append(read(train, batch_size=6 // world_size))

        united = [sorted(itertools.chain(*batch)) for batch in zip(*parts, strict=True)]
        assert united[:-1] == alone[:-1]
        assert len(united[-1]) == len(alone[-1]) + -COUNT % world_size  # repeats, so that ranks are equal


def test_samples_one_by_one_come_in_the_same_order_for_any_number_of_workers(dataset):
    train = dataset(shuffle=True)

    one_by_one = [number_of(image) for image, _ in DataLoader(train, batch_size=None, num_workers=3)]

    assert one_by_one == [number_of(image) for image, _ in train]


# ------------------------------------------------------------------ images, labels, transforms


def test_image_is_the_whole_picture_in_uint8(dataset):
    for image, _ in dataset():
        assert image.dtype == torch.uint8
        assert image.shape == (3, 4, 6)
        assert image.max() - image.min() <= 1


def test_classes_are_those_of_torchvisions_imagefolder(dataset, tmp_path):
    write(tree(), tmp_path)
    theirs, ours = torchvision.datasets.ImageFolder(str(tmp_path)), dataset()

    assert ours.classes == theirs.classes == sorted(CLASSES)
    assert ours.class_to_idx == theirs.class_to_idx
    of_theirs = {number_of(np.asarray(theirs.loader(path))): label for path, label in theirs.samples}
    assert {number_of(image): label for image, label in ours} == of_theirs


def test_images_outside_class_folders_are_left_out_as_by_imagefolder(fs, folder, dataset, tmp_path):
    files = {f"{name}.png": picture(number) for number, name in enumerate(["z", "a/1", "b/c/2", "b/3"])}
    write(files, tmp_path)
    fs.pipe({f"{folder}/{name}": body for name, body in files.items()})
    theirs, ours = torchvision.datasets.ImageFolder(str(tmp_path)), dataset(folder)

    assert ours.class_to_idx == theirs.class_to_idx == {"a": 0, "b": 1}
    assert sorted((number_of(image), label) for image, label in ours) == [(1, 0), (2, 1), (3, 1)]
    assert len(ours) == len(theirs) == 3


def test_objects_that_are_no_images_by_their_names_are_left_out(fs, folder, dataset):
    images = {"a/1.png": picture(1), "b/2.PNG": picture(2)}
    others = {"a/labels.csv": b"1,2", "_SUCCESS": b"done", "texts/a.txt": b"text"}
    fs.pipe({f"{folder}/{name}": body for name, body in (images | others).items()})

    assert dataset(folder).classes == ["a", "b"]
    assert numbers(dataset(folder)) == [1, 2]


def test_folder_labels_of_a_list_are_the_folders_the_objects_lie_in(dataset, images):
    uris = [images + name for name in tree() if "/more/" not in name]

    train = dataset(uris)

    assert train.classes == sorted(CLASSES)
    assert all(train.classes[label] == CLASSES[number % 3] for number, label in itertools.chain(*read(train)))


def test_folder_labels_are_plain_ints(dataset):
    assert {type(label) for _, label in dataset()} == {int}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_sequence_labels_every_image_in_order_of_the_source(dataset, images, kind, workers):
    uris = [images + name for name in tree()]
    train = dataset(uris, labels=kind([100 + number for number in range(COUNT)]), shuffle=True)

    assert train.classes == []
    for number, label in itertools.chain(*read(train, num_workers=workers)):
        assert label == 100 + number


def test_sequence_may_hold_anything(dataset, images):
    train = dataset([images + name for name in tree()], labels=[{"number": str(n)} for n in range(COUNT)])

    assert all(label == {"number": str(number_of(image))} for image, label in train)


def label_of(uri):
    return len(uri.rpartition("/")[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_callable_labels_a_uri(dataset, workers):
    names = list(tree())
    train = dataset(labels=label_of)

    for number, label in itertools.chain(*read(train, num_workers=workers)):
        assert label == label_of(names[number])


def test_callable_is_given_the_whole_uri(dataset, images):
    assert {uri for _, uri in dataset(labels=lambda uri: uri)} == {images + name for name in tree()}


def test_without_labels_images_come_alone(dataset):
    images_alone = list(dataset(labels=None))

    assert all(isinstance(image, torch.Tensor) for image in images_alone)
    assert Counter(map(number_of, images_alone)) == EACH_ONCE


def test_without_labels_transform_may_return_anything(dataset):
    assert Counter(dataset(labels=None, transform=number_of)) == EACH_ONCE


def test_transforms_are_applied(dataset):
    train = dataset(transform=lambda image: -number_of(image), target_transform=lambda label: label + 0.5)

    for number, label in train:
        assert label == sorted(CLASSES).index(CLASSES[-number % 3]) + 0.5


def test_torchvisions_transforms_work(dataset):
    from torchvision.transforms import v2

    train = dataset(transform=v2.Compose([v2.Resize((8, 8)), v2.ToDtype(torch.float32, scale=True)]))
    batch, _ = next(iter(DataLoader(train, batch_size=COUNT)))

    assert batch.shape == (COUNT, 3, 8, 8)
    assert batch.dtype == torch.float32


def test_manifest_is_a_source(dataset, images, s3):
    manifest = Manifest.from_prefix(images, storage_options=s3.storage_options)

    assert numbers(dataset(manifest)) == numbers(dataset())


def test_dataset_shows_its_manifest(dataset, images):
    manifest = dataset().manifest

    assert len(manifest) == COUNT
    assert manifest.root == images
