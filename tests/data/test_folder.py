"""The map-style folder: torchvision's interface, any sampler, batches read at once."""

import multiprocessing.forkserver
import pickle
import threading
from collections import Counter

import fsspec
import pytest
import s3fs
import torch
import torchvision
from loaders import error_of_worker
from pictures import BATCH, CLASSES, COUNT, EACH_ONCE, number_of, picture, tree, write
from PIL import Image
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)

from torch_s3 import (
    CacheError,
    DecodeError,
    EmptyDataset,
    Manifest,
    NotFound,
    ObjectChanged,
    S3FileSystem,
    S3ImageFolder,
    S3Object,
    TooManyErrors,
    TransferFailed,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def folder_of(images, s3):
    """Makes folders of the samples 0 … COUNT-1."""

    def make(root=images, *args, **options):
        if not {"storage_options", "filesystem"} & options.keys():
            options["storage_options"] = s3.storage_options
        return S3ImageFolder(root, *args, **options)

    return make


@pytest.fixture
def counting(s3):
    """A filesystem that nobody else uses, whose requests can be counted."""
    return S3FileSystem(**s3.storage_options, skip_instance_cache=True)


@pytest.fixture
def train(folder, fs):
    """The uri of a prefix with samples 0 … 7, in two classes."""
    fs.pipe({f"{folder}/train/{'ab'[number % 2]}/{number}.png": picture(number) for number in range(8)})
    return f"{folder}/train"


def numbers(source, **options):
    loader = DataLoader(source, **{"batch_size": BATCH, **options})
    return [number_of(image) for images, _ in loader for image in images]


def number_in(uri):
    """Which sample of `tree()` a uri is."""
    return next(number for number, name in enumerate(tree()) if uri.endswith(name))


# ------------------------------------------------------------------ as torchvision's


def test_interface_is_that_of_torchvisions_folder(folder_of, tmp_path, images):
    write(tree(), tmp_path)
    theirs = torchvision.datasets.ImageFolder(tmp_path, allow_empty=True)

    ours = folder_of()

    assert ours.classes == theirs.classes == sorted(CLASSES)
    assert ours.class_to_idx == theirs.class_to_idx
    assert len(ours) == len(theirs) == len(ours.samples) == len(ours.imgs) == COUNT
    assert ours.targets.tolist() == theirs.targets
    expected = [(path.replace(f"{tmp_path}/", images), target) for path, target in theirs.samples]
    assert list(ours.samples) == list(ours.imgs) == expected


@pytest.mark.parametrize("index", [0, 5, COUNT - 1, -1, -COUNT])
def test_sample_is_image_and_class(folder_of, index):
    ours = folder_of()

    image, target = ours[index]

    uri, expected = ours.samples[index]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 4, 6)
    assert number_of(image) == number_in(uri)
    assert (type(target), target) == (int, expected)
    assert ours.classes[target] == CLASSES[number_of(image) % len(CLASSES)]


@pytest.mark.parametrize("index", [COUNT, -COUNT - 1])
def test_index_outside_is_an_index_error(folder_of, index):
    with pytest.raises(IndexError, match=f"sample {index} of {COUNT}"):
        folder_of()[index]


def test_iterating_without_a_loader_ends(folder_of):
    assert Counter(number_of(image) for image, _ in folder_of()) == EACH_ONCE


def test_samples_are_a_sequence(folder_of):
    samples = folder_of().samples

    assert samples[-1] == list(samples)[-1]
    assert samples[2:9:3] == list(samples)[2:9:3]
    assert samples[1] in samples
    with pytest.raises(IndexError):
        samples[COUNT]


def test_transforms_are_called(folder_of, images):
    ours = folder_of(images, lambda image: image.float() / 255, lambda target: f"class {target}")

    image, target = ours[3]

    assert image.dtype == torch.float32
    assert target == f"class {ours.targets[3]}"


def test_transforms_may_be_set_later_as_in_torchvision(folder_of):
    ours = folder_of()
    ours.transform = number_of

    assert ours[4] == (number_in(ours.samples[4][0]), ours.targets[4])


def test_loader_takes_the_place_of_decoding(folder_of):
    seen = []

    def load(item):
        seen.append(item)
        return Image.open(item.open()).convert("RGB")

    ours = folder_of(loader=load)

    image, _ = ours[2]
    assert image.size == (6, 4)
    assert isinstance(seen[0], S3Object)
    assert seen[0].uri == ours.samples[2][0]


def test_mode_gray_gives_one_channel(folder_of):
    assert folder_of(mode="GRAY")[0][0].shape == (1, 4, 6)


def test_files_are_chosen_by_is_valid_file(folder_of):
    ours = folder_of(is_valid_file=lambda uri: uri.endswith(".bmp"))

    assert {uri.rpartition(".")[2] for uri, _ in ours.samples} == {"bmp"}
    assert sorted(numbers(ours)) == list(range(3, COUNT, 4))


def test_images_outside_any_folder_are_no_samples(fs, folder, folder_of):
    fs.pipe({f"{folder}/a/1.png": picture(1), f"{folder}/0.png": picture(0), f"{folder}/b/2.png": picture(2)})
    ours = folder_of(folder)

    assert [number_of(image) for image, _ in ours] == [1, 2]
    assert ours.targets.tolist() == [0, 1]


# ------------------------------------------------------------------ batches, samplers, workers


def test_batch_is_in_the_order_asked(folder_of):
    ours = folder_of()
    indices = [7, 0, 22, 7, -1, 3]

    assert [number_of(image) for image, _ in ours.__getitems__(indices)] == [
        number_in(ours.samples[index][0]) for index in indices
    ]


def test_batch_may_be_empty_or_of_numpy_and_torch_integers(folder_of):
    ours = folder_of()

    assert ours.__getitems__([]) == []
    assert number_of(ours.__getitems__(list(torch.tensor([1, 2])))[1][0]) == number_in(ours.samples[2][0])


def test_batch_is_read_concurrently(together):
    manifest = Manifest.from_uris([f"s3://bucket/a/{number}.jpg" for number in range(8)])

    samples = S3ImageFolder(manifest, loader=S3Object.read, filesystem=together).__getitems__(range(8))

    assert samples == [(b"body", 0)] * 8


def test_connections_are_kept_between_batches(images, counting):
    ours = S3ImageFolder(images, filesystem=counting)
    for _ in range(10):
        ours.__getitems__(range(COUNT))

    assert counting.stats()["connections"] <= counting.config.max_connections < 10 * COUNT


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_number_of_threads_changes_nothing_but_the_speed(folder_of, threads):
    ours = folder_of(decode_threads=threads)
    before = threading.active_count()

    assert [number_of(image) for image, _ in ours.__getitems__(range(COUNT))] == [number_of(image) for image, _ in ours]
    assert threading.active_count() <= before + 1  # the I/O thread


def test_transform_is_called_in_order_by_the_calling_thread(folder_of):
    calls = []
    ours = folder_of(decode_threads=3)
    ours.transform = lambda image: calls.append((threading.get_ident(), number_of(image)))

    ours.__getitems__(range(COUNT))

    assert calls == [(threading.get_ident(), number_in(uri)) for uri, _ in ours.samples]


SAMPLERS = {
    "RandomSampler": RandomSampler,
    "SubsetRandomSampler": lambda ours: SubsetRandomSampler(range(len(ours))),
    "DistributedSampler": lambda ours: DistributedSampler(ours, num_replicas=1, rank=0),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_see_every_sample_once(folder_of, sampler, workers):
    ours = folder_of()

    assert Counter(numbers(ours, sampler=SAMPLERS[sampler](ours), num_workers=workers)) == EACH_ONCE


def test_weighted_sampler_draws_by_targets(folder_of):
    ours = folder_of()
    weights = [float(target == 1) for target in ours.targets]
    loader = DataLoader(ours, batch_size=BATCH, sampler=WeightedRandomSampler(weights, 40))

    assert {label for _, labels in loader for label in labels.tolist()} == {1}


def test_distributed_sampler_gives_each_rank_its_share(folder_of):
    ours = folder_of()
    ranks = [numbers(ours, sampler=DistributedSampler(ours, num_replicas=2, rank=rank)) for rank in (0, 1)]

    assert len(ranks[0]) == len(ranks[1]) == 12
    assert set(ranks[0]) | set(ranks[1]) == set(range(COUNT))


def test_subsets_and_splits_read_batches_at_once(images, s3):
    asked = []

    class Asked(S3ImageFolder):
        def __getitems__(self, indices):
            asked.append(len(indices))
            return super().__getitems__(indices)

    ours = Asked(images, storage_options=s3.storage_options)
    part = Subset(ours, [5, 3, 8, 1, 2])
    halves = random_split(ours, [0.5, 0.5], generator=torch.Generator().manual_seed(0))

    assert numbers(part) == [number_in(ours.samples[index][0]) for index in part.indices]
    assert Counter(numbers(halves[0]) + numbers(halves[1])) == EACH_ONCE
    assert max(asked) == BATCH


@pytest.mark.parametrize("context", ["fork", "forkserver", "spawn"])
def test_workers_of_every_kind_read_after_their_parent_has(folder_of, context):
    if context == "forkserver":
        multiprocessing.forkserver.ensure_running()
    ours = folder_of()
    alone = numbers(ours)
    options = {"num_workers": 2 if context == "fork" else 1, "multiprocessing_context": context}  # others import torch
    loader = DataLoader(ours, batch_size=BATCH, persistent_workers=True, **options)

    for _ in range(2):
        assert [number_of(image) for images, _ in loader for image in images] == alone


@pytest.mark.parametrize("kind", ["s3fs", "memory", "file"])
@pytest.mark.parametrize("workers", [0, 2])
def test_other_filesystems_stand_in(folder_of, images, s3, tmp_path, kind, workers):
    if kind == "s3fs":
        ours = folder_of(filesystem=s3fs.S3FileSystem(**s3.storage_options))
    elif kind == "memory":
        memory = fsspec.filesystem("memory")
        memory.pipe({f"/folder/{name}": body for name, body in tree().items()})
        ours = folder_of("memory://folder", filesystem=memory)
    else:
        write(tree(), tmp_path)
        ours = folder_of(f"file://{tmp_path}", storage_options={"auto_mkdir": False})
    ours[0]  # so that workers fork from a process that has read

    assert Counter(numbers(ours, num_workers=workers)) == EACH_ONCE
    if kind == "memory":
        memory.rm("/folder", recursive=True)


def test_manifest_is_a_root_and_needs_no_listing(images, s3, folder_of):
    manifest = Manifest.from_prefix(images, storage_options=s3.storage_options)

    ours = folder_of(pickle.loads(pickle.dumps(manifest)))

    assert list(ours.samples) == list(folder_of().samples)
    assert Counter(numbers(ours)) == EACH_ONCE


def test_pickle_holds_little_more_than_the_names():
    names = [f"class-{number % 100:03}/image-{number:08}.jpeg" for number in range(10_000)]
    ours = S3ImageFolder(Manifest.from_uris([f"s3://a-bucket/{name}" for name in names]))

    assert len(pickle.dumps(ours)) < sum(map(len, names)) + 64 * len(names)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda fs, uri: fs.rm_file(uri), NotFound),
        (lambda fs, uri: fs.pipe_file(uri, picture(3) + b"more"), ObjectChanged),
        (lambda fs, uri: fs.pipe_file(uri, picture(5)), ObjectChanged),
    ],
    ids=["gone", "grown", "changed"],
)
def test_failing_sample_of_a_batch_raises_naming_its_object(fs, train, folder_of, spoil, kind, threads):
    ours = folder_of(train, decode_threads=threads)
    spoil(fs, f"{train}/b/3.png")

    with pytest.raises(kind) as caught:
        ours.__getitems__(range(8))

    assert caught.value.uri == f"{train}/b/3.png"
    assert [number_of(image) for image, _ in ours.__getitems__([0, 1])] == [0, 2]  # the others can be read


def test_broken_image_in_a_worker_is_a_decode_error_that_names_it(fs, train, folder_of):
    fs.pipe_file(f"{train}/b/3.png", b"no image at all")

    error = error_of_worker(folder_of(train), batch_size=BATCH)

    assert isinstance(error, DecodeError)
    assert error.uri == f"{train}/b/3.png"


def test_image_of_too_many_pixels_is_a_decode_error(folder_of):
    with pytest.raises(DecodeError, match="6 x 4 pixels"):
        folder_of(max_pixels=23)[0]


def test_batch_that_failed_leaves_no_thread_though_its_error_is_kept(folder_of):
    def fail(_):
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        folder_of(transform=fail, decode_threads=3).__getitems__(range(COUNT))

    assert caught.tb is not None  # which holds the frames
    assert not [thread for thread in threading.enumerate() if "decode" in thread.name]


@pytest.mark.parametrize("which", ["transform", "target_transform", "loader"])
def test_what_raises_is_told_its_sample(folder_of, which):
    def fail(_):
        raise KeyError("mine")

    ours = folder_of(**{which: fail})

    with pytest.raises(KeyError, match="mine") as caught:
        ours[1]
    assert caught.value.__notes__ == [f"while transforming {ours.samples[1][0]}"]


def test_prefix_without_class_folders_is_an_error(folder_of, train):
    with pytest.raises(EmptyDataset, match="no class folders here") as caught:
        folder_of(f"{train}/a")

    assert caught.value.uri == f"{train}/a/"


def test_empty_prefix_is_an_error(folder_of, folder):
    with pytest.raises(EmptyDataset, match="nothing is stored here"):
        folder_of(f"{folder}/nothing")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mode": "CMYK"}, "use 'RGB' or 'GRAY'"),
        ({"decode_threads": 0}, "decode_threads=0: must be at least 1"),
        ({"on_error": "skip"}, "use 'raise' or 'replace'"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"max_errors": 3}, "max_errors is for"),
        ({"cache_size": 10}, "cache_size=10 is that of cache_dir"),
    ],
)
def test_wrong_argument(folder_of, wrong, words):
    with pytest.raises(ValueError, match=words):
        folder_of(**wrong)


# ------------------------------------------------------------------ replacing


def spoiled(fs, train):
    """Of the samples 0 … 7, in the order 0 2 4 6 1 3 5 7, one is gone, one has changed, and one is broken."""
    fs.rm_file(f"{train}/a/2.png")
    fs.pipe_file(f"{train}/b/3.png", picture(3) + b"more")
    return {"NotFound": f"{train}/a/2.png", "ObjectChanged": f"{train}/b/3.png", "DecodeError": f"{train}/b/7.png"}


@pytest.fixture
def replacing(fs, train, folder_of):
    fs.pipe_file(f"{train}/b/7.png", b"no image at all")

    def make(**options):
        ours = folder_of(train, on_error="replace", **options)
        return ours, spoiled(fs, train)

    return make


@pytest.mark.filterwarnings("ignore:replaced ")
def test_failing_samples_are_replaced_by_others_of_their_batch_and_recorded(replacing):
    ours, expected = replacing()

    got = [number_of(image) for image, _ in ours.__getitems__([0, 1, 4, 5, 7])]

    assert got == [0, 1, 1, 1, 0]  # the good ones are 0 and 1
    assert {failure.error: failure.uri for failure in ours.errors} == expected
    assert sorted(failure.position for failure in ours.errors) == [1, 5, 7]


@pytest.mark.filterwarnings("ignore:replaced ")
def test_label_is_that_of_the_replacement(replacing):
    ours, _ = replacing()

    image, label = ours.__getitems__([1, 4])[0]

    assert (number_of(image), label) == (1, 1)


@pytest.mark.filterwarnings("ignore:replaced ")
def test_sample_without_a_good_one_in_its_batch_is_replaced_by_the_same_other_always(replacing):
    ours, _ = replacing()

    first, again = number_of(ours[1][0]), number_of(ours[1][0])

    assert first == again
    assert first in {0, 4, 6, 1, 5}


def test_replacing_warns_naming_the_sample(replacing):
    ours, expected = replacing()

    with pytest.warns(UserWarning, match=f"replaced {expected['NotFound']}"):
        ours.__getitems__([0, 1])


@pytest.mark.filterwarnings("ignore:replaced ")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_stay_whole_and_failures_of_workers_are_known(replacing, workers, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    ours, expected = replacing()
    loader = DataLoader(ours, batch_size=3, num_workers=workers)

    for _ in range(2):
        assert [len(images) for images, _ in loader] == [3, 3, 2]
    assert {failure.error: failure.uri for failure in ours.errors} == expected
    assert {failure.worker for failure in ours.errors} <= ({0, 1} if workers else {None})


@pytest.mark.filterwarnings("ignore:replaced ")
@pytest.mark.parametrize("limit", [2, 0.3])
def test_too_many_different_failures_end_it(replacing, limit):
    ours, _ = replacing(max_errors=limit)
    for _ in range(3):
        ours.__getitems__([0, 1, 5])

    with pytest.raises(TooManyErrors, match=f"3 samples failed, max_errors={limit}") as caught:
        ours.__getitems__([0, 7])
    assert caught.value.uri.endswith("/b/7.png")


@pytest.mark.filterwarnings("ignore:replaced ")
def test_where_nothing_can_be_read_it_is_no_matter_of_single_samples(fs, train, folder_of):
    ours = folder_of(train, on_error="replace")
    fs.rm(train, recursive=True)

    with pytest.raises(NotFound):
        ours[0]


def test_what_is_no_matter_of_one_object_is_raised(train, folder_of, s3):
    listed = folder_of(train).manifest
    options = s3.storage_options | {"endpoint_url": "http://127.0.0.1:1", "attempts": 1}

    with pytest.raises(TransferFailed):
        folder_of(listed, on_error="replace", storage_options=options)[0]


# ------------------------------------------------------------------ the cache


def test_second_epoch_asks_for_nothing(images, counting, tmp_path):
    ours = S3ImageFolder(images, filesystem=counting, cache_dir=tmp_path)
    first = numbers(ours)
    before = counting.stats()["requests"]

    assert numbers(ours) == first
    assert counting.stats()["requests"] == before


def test_workers_share_the_cache(images, counting, tmp_path):
    ours = S3ImageFolder(images, filesystem=counting, cache_dir=tmp_path)
    first = numbers(ours, num_workers=2)
    before = counting.stats()["requests"]

    assert numbers(ours) == first
    assert counting.stats()["requests"] == before


def test_damaged_entry_is_fetched_again(images, counting, tmp_path):
    ours = S3ImageFolder(images, filesystem=counting, cache_dir=tmp_path)
    first = numbers(ours)
    for path in tmp_path.glob("??/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    assert numbers(ours) == first
    before = counting.stats()["requests"]
    assert numbers(ours) == first
    assert counting.stats()["requests"] == before


def test_changed_object_does_not_come_from_the_cache(fs, train, folder_of, tmp_path):
    assert [number_of(image) for image, _ in folder_of(train, cache_dir=tmp_path)] == [0, 2, 4, 6, 1, 3, 5, 7]
    fs.pipe_file(f"{train}/b/3.png", picture(9))

    assert [number_of(image) for image, _ in folder_of(train, cache_dir=tmp_path)] == [0, 2, 4, 6, 1, 9, 5, 7]


def test_small_cache_is_no_obstacle(folder_of, tmp_path):
    ours = folder_of(cache_dir=tmp_path, cache_size=500)
    for _ in range(2):
        assert Counter(numbers(ours)) == EACH_ONCE
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 500


def test_cache_folder_that_cannot_be_made_is_an_error_at_once(folder_of, tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(CacheError, match="cannot be used for a cache"):
        folder_of(cache_dir=tmp_path / "file")
