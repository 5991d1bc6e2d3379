"""Where records lie is found, made, checked and kept."""

import gzip
import io
import itertools
import os
import tarfile
from contextlib import closing

import numpy as np
import pytest
from archives import tar_of
from faults import Faults, answer, serve
from records import COUNT, SIZES, compressed, damaged, names, number_in, put, shards

from torch_s3 import IntegrityError, InvalidManifest, ObjectChanged, S3FileSystem
from torch_s3.data import shard_index
from torch_s3.data.chunks import Chunks
from torch_s3.data.shard_index import ShardIndex
from torch_s3.data.tars import S3TarDataset
from torch_s3.data.tfrecords import S3TFRecordDataset

KINDS = ["tfrecord", "tar"]


@pytest.fixture
def make(s3):
    """Makes datasets, with a filesystem that nobody else uses."""

    def make(source, kind="tfrecord", **options):
        options.setdefault("filesystem", S3FileSystem(**s3.storage_options, skip_instance_cache=True))
        options["transform"] = number_in
        return S3TarDataset(source, decode=False, **options) if kind == "tar" else S3TFRecordDataset(source, **options)

    return make


def npy(array):
    file = io.BytesIO()
    np.save(file, np.array(array))
    return file.getvalue()


def received(dataset):
    return dataset._filesystem().stats()["bytes_received"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_index_each_shard_is_read_once(make, fs, folder, kind, monkeypatch):
    monkeypatch.setattr(shard_index, "piece_size", lambda fs: 1000)
    train = make(put(fs, folder, kind), kind)

    assert received(train) == sum(map(len, shards(kind)))
    assert len(train) == COUNT


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_index_that_was_written_beside_the_shards_is_used(make, fs, folder, kind, suffix):
    prefix = put(fs, folder, kind, suffix)
    make(prefix, kind).write_index()
    train = make(prefix, kind)

    assert sorted(os.path.basename(path) for path in fs.ls(folder) if path.endswith(".idx")) == [  # noqa: PTH119
        f"{name}.idx" for name in names(kind, suffix)
    ]
    behind = 512 if kind == "tar" and not suffix else 0  # bytes that show that no samples follow
    assert received(train) == sum(fs.info(f"{folder}/{name}.idx")["size"] + behind for name in names(kind, suffix))
    assert list(train) == list(range(COUNT))
    assert train.read(30) == 30


def test_index_may_be_named_by_the_stem(make, fs, folder):
    """As NVIDIA's tools are often told to."""
    prefix = put(fs, folder, "tar")
    make(prefix, "tar").write_index()
    for name in names("tar"):
        fs.mv(f"{folder}/{name}.idx", f"{folder}/{name.removesuffix('.tar')}.idx")

    train = make(prefix, "tar")
    assert received(train) < 10_000
    assert list(train) == list(range(COUNT))


@pytest.mark.parametrize("kind", KINDS)
def test_index_of_another_shard_is_refused_naming_both(make, fs, folder, kind):
    prefix = put(fs, folder, kind)
    make(prefix, kind).write_index()
    fs.pipe(f"{folder}/s-001.{kind}", shards(kind, sizes=(30,))[0])

    with pytest.raises(
        InvalidManifest, match=rf"s-001\.{kind}\.idx: .* another shard than s3:.*s-001\.{kind}: "
    ) as caught:
        make(prefix, kind)
    assert caught.value.uri.endswith(".idx")


@pytest.mark.parametrize(
    "text", [b"", b"words\n", b"\xff\xfe", b"0 10\n20 10\n", b"0 99999999999999999999\n"], ids=repr
)
@pytest.mark.parametrize("kind", KINDS)
def test_file_that_is_no_index_is_refused(make, fs, folder, kind, text):
    prefix = put(fs, folder, kind)
    fs.pipe(f"{folder}/s-000.{kind}.idx", text)

    with pytest.raises(InvalidManifest, match=rf"s-000\.{kind}\.idx: "):
        make(prefix, kind)


def test_stale_index_of_a_compressed_shard_is_found_when_it_is_read(make, fs, folder):
    prefix = put(fs, folder, suffix=".gz")
    make(prefix).write_index()
    fs.pipe(f"{folder}/s-000.tfrecord.gz", compressed(shards(sizes=(3,))[0], ".gz"))

    with pytest.raises((IntegrityError, OSError), match=r"s-000\.tfrecord\.gz"):
        list(make(prefix))


def test_index_of_a_compressed_shard_that_has_more_records_is_found_when_it_is_read(make, fs, folder):
    """Those would be missed."""
    prefix = put(fs, folder, suffix=".gz", sizes=(3,))
    make(prefix).write_index()
    fs.pipe(f"{folder}/s-000.tfrecord.gz", compressed(shards(sizes=(4,))[0], ".gz"))

    with pytest.raises(ObjectChanged, match=r"s-000\.tfrecord\.gz: it has more records than its index"):
        list(make(prefix))


def test_index_of_more_than_can_have_been_compressed_is_refused(make, fs, folder):
    prefix = put(fs, folder, suffix=".gz", sizes=(3,))
    fs.pipe(f"{folder}/s-000.tfrecord.gz.idx", b"0 999999999999999\n")

    with pytest.raises(InvalidManifest, match="999,999,999,999,999"):
        make(prefix)


def test_index_of_a_tar_of_the_same_size_with_fewer_samples_is_refused(make, fs, folder):
    samples = [(f"{n}.{kind}", value) for n in range(5) for kind, value in (("bin", bytes(700)), ("cls", b"1"))]
    fewer, more = tar_of(dict(samples[:-2])), tar_of(dict(samples))
    assert len(fewer) == len(more)  # tarfile pads to 10,240 bytes
    fs.pipe_file(f"{folder}/a.tar", fewer)
    S3TarDataset(f"{folder}/a.tar", filesystem=fs).write_index()
    fs.pipe_file(f"{folder}/a.tar", more)

    with pytest.raises(InvalidManifest, match="index of another shard"):
        S3TarDataset(f"{folder}/a.tar", filesystem=fs)


@pytest.mark.parametrize(
    ("magic", "words"), [(b"\x1f\x8b\x08\x00", "gzip, name it .gz"), (b"\x28\xb5\x2f\xfd", "zstd")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_shard_without_its_suffix_is_told_so(make, fs, folder, kind, magic, words):
    fs.pipe_file(f"{folder}/a.{kind}", magic + bytes(1000))

    with pytest.raises(IntegrityError, match=f"it is no {kind}, but compressed: {words}"):
        make(f"{folder}/", kind)


def test_index_of_a_compressed_tar_with_fewer_samples_is_told_at_its_end(fs, folder):
    samples = {f"{number}.bin": bytes(700) for number in range(50)}
    fs.pipe_file(f"{folder}/a.tar.gz", gzip.compress(tar_of(dict(list(samples.items())[:5]))))
    S3TarDataset(f"{folder}/a.tar.gz", filesystem=fs).write_index()
    fs.pipe_file(f"{folder}/a.tar.gz", gzip.compress(tar_of(samples)))

    with pytest.raises(ObjectChanged, match="more records than its index"):
        list(S3TarDataset(f"{folder}/a.tar.gz", filesystem=fs))


def test_index_kept_for_a_file_on_disk_is_not_for_another_one_of_its_size(tmp_path):
    place = {"source": f"file://{tmp_path}/a.tar", "index_dir": tmp_path / "kept"}
    sizes = [(700, 1), (1, 700)]
    for first, second in sizes:
        members = {"1.bin": bytes(first), "2.bin": bytes(second)}
        (tmp_path / "a.tar").write_bytes(tar_of(members))
        assert [len(sample["bin"]) for sample in S3TarDataset(**place)] == [first, second]


@pytest.mark.parametrize("behind", ["padding", "a file that is no sample"])
def test_tar_with_much_behind_its_samples_has_an_index(make, fs, folder, behind):
    samples = {"0.txt": b"0", "1.txt": b"1"}
    body = tar_of(samples) + bytes(100_000) if behind == "padding" else tar_of(samples | {"README": bytes(100_000)})
    fs.pipe(f"{folder}/s.tar", body)
    make(f"{folder}/s.tar", "tar").write_index()

    assert list(make(f"{folder}/s.tar", "tar")) == [0, 1]


def test_state_fits_whether_an_index_was_found_or_made(make, fs, folder):
    """They differ in where the samples of a tar with folders start."""
    members = []
    for number in range(9):
        if number % 3 == 0:
            info = tarfile.TarInfo(f"{number}/")
            info.type = tarfile.DIRTYPE
            members.append((info, b""))
        members.append((f"{number // 3 * 3}/{number}.txt", b"%d" % number))
    fs.pipe(f"{folder}/s.tar", tar_of(members))
    train = make(f"{folder}/s.tar", "tar")
    with closing(iter(train)) as records:
        seen = list(itertools.islice(records, 4))
    train.write_index()
    again = make(f"{folder}/s.tar", "tar")
    again.load_state_dict(train.state_dict())

    assert seen + list(again) == list(range(9))


def test_shard_that_is_damaged_gets_no_index(make, fs, folder):
    """Or all who come later would take the part of it for the whole."""
    prefix = put(fs, folder, suffix=".gz")
    fs.pipe(f"{folder}/s-003.tfrecord.gz", compressed(shards()[3], ".gz")[:-10])
    with pytest.warns(UserWarning, match="damaged shards"):
        train = make(prefix, on_error="skip")

    with pytest.raises(IntegrityError, match=r"s-003\.tfrecord\.gz: its gzip is cut off"):
        train.write_index()
    assert not [path for path in fs.ls(folder) if path.endswith(".idx")]


# ------------------------------------------------------------------ kept


@pytest.mark.parametrize("where", ["a folder", "the bucket"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_index_is_kept_for_the_next_time(make, fs, folder, tmp_path, where, suffix):
    prefix = put(fs, f"{folder}/train", suffix=suffix)
    kept = tmp_path / "new" / "folder" if where == "a folder" else f"{folder}/kept"
    make(prefix, index_dir=kept)
    train = make(prefix, index_dir=kept)

    assert received(train) < 5_000 if where == "the bucket" else received(train) == 0
    assert list(train) == list(range(COUNT))
    if where == "a folder":
        assert {path.suffix for path in kept.iterdir()} == {".npy"}


def test_kept_index_of_a_shard_that_has_changed_is_made_anew(make, fs, folder, tmp_path):
    prefix = put(fs, folder)
    make(prefix, index_dir=tmp_path)
    fs.pipe(f"{folder}/s-003.tfrecord", shards()[0])

    assert len(make(prefix, index_dir=tmp_path)) == COUNT - SIZES[3] + SIZES[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"words", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x10\x00{'descr':'<i8'(}", npy([[0, 1]])],
    ids=repr,
)
def test_kept_index_that_is_damaged_is_made_anew(make, fs, folder, tmp_path, content):
    prefix = put(fs, folder)
    make(prefix, index_dir=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(content)

    assert list(make(prefix, index_dir=tmp_path)) == list(range(COUNT))
    assert all(path.read_bytes() != content for path in tmp_path.iterdir())


def test_part_of_a_damaged_shard_is_not_kept(make, fs, folder, tmp_path):
    prefix = put(fs, folder)
    fs.pipe(f"{folder}/s-002.tfrecord", damaged(shards()[2], 5, at=0))
    with pytest.warns(UserWarning, match="damaged shards"):
        make(prefix, index_dir=tmp_path, on_error="skip")

    assert len(list(tmp_path.iterdir())) == 3


def test_who_may_not_list_is_told_that_files_are_refused(make, fs, s3, folder):
    """S3 answers so of what isn't there, without ListBucket."""
    prefix = put(fs, folder)
    refused = []

    def refuse_indexes(exchange):
        if exchange.path.endswith(".idx"):
            refused.append(exchange.path)
            answer(403, "AccessDenied")(exchange)
        else:
            serve(exchange)

    with Faults(itertools.repeat(refuse_indexes), upstream=s3.endpoint_url) as proxy:
        assert list(make(prefix, filesystem=S3FileSystem(**proxy.storage_options))) == list(range(COUNT))
    assert len(refused) == 2 * len(SIZES)  # under either name


# ------------------------------------------------------------------ cut into chunks


@pytest.mark.parametrize("size", [1, 40, 100, 10_000])
def test_chunks_are_whole_records_and_no_longer_than_asked_unless_one_record(size):
    rng = np.random.default_rng(0)
    bounds = [np.concatenate([[3], 3 + np.cumsum(rng.integers(1, 60, count))]) for count in (30, 0, 1, 50)]
    chunks = Chunks(ShardIndex(bounds), size)
    for shard, own in enumerate(bounds):
        cuts = chunks.cuts(shard)
        assert (cuts[0], cuts[-1]) == (0, len(own) - 1)
        for first, stop in itertools.pairwise(cuts):
            assert stop > first
            assert own[stop] - own[first] <= size or stop == first + 1
            assert stop == len(own) - 1 or own[stop + 1] - own[first] > size


def test_plan_says_where_each_record_lies():
    rng = np.random.default_rng(1)
    bounds = [np.concatenate([[0], np.cumsum(rng.integers(1, 60, count))]) for count in (30, 20, 1, 50)]
    index = ShardIndex(bounds)
    records, turns = rng.integers(0, len(index), 200), np.array([2, 0, 3, 1])
    plan = Chunks(index, 100).plan(records, turns)
    chunks = {chunk.key: chunk for chunk in plan.chunks}

    assert list(chunks) == sorted(chunks)
    assert [turns[chunk.shard] for chunk in plan.chunks] == sorted(turns[chunk.shard] for chunk in plan.chunks)
    seen = set()
    for record, key, start, stop, last in reversed(list(zip(records.tolist(), *plan[1:], strict=True))):
        shard = int(np.searchsorted(index.first, record, side="right")) - 1
        number = record - index.first[shard]
        chunk = chunks[key]
        assert chunk.shard == shard
        assert (chunk.start + start, chunk.start + stop) == (bounds[shard][number], bounds[shard][number + 1])
        assert last == (key not in seen)
        seen.add(key)


def test_what_is_held_is_what_comes_next(make, fs, folder, monkeypatch):
    """Beside the look-ahead: the chunks of a block and its neighbour."""
    monkeypatch.setattr("torch_s3.data.chunks.piece_size", lambda fs: 400)
    train = make(put(fs, folder, sizes=(300,)), shuffle=True, shuffle_buffer=20, lookahead_bytes=400)
    reader = train._reader(fs)
    wanted = [at + np.random.default_rng(at).permutation(20) for at in range(0, 300, 20)]
    most = 0
    with closing(reader.records(iter(wanted), np.zeros(1, np.int64))) as records:
        for _ in records:
            most = max(most, len(records.gi_frame.f_locals["held"]))

    assert 1 < most <= 5
