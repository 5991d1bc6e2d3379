"""Damaged shards: named by shard, record and byte, and passed over where that was asked for."""

import itertools
from collections import Counter
from contextlib import closing

import pytest
import zstandard
from archives import tar_of
from loaders import reading
from records import BATCH, COUNT, SIZES, compressed, content, damaged, framed, number_in, put, shards
from torch.utils.data import DataLoader

from torch_s3 import EmptyDataset, IntegrityError, StateMismatch, TooManyErrors
from torch_s3.data.decompress import decompressed
from torch_s3.data.tars import S3TarDataset
from torch_s3.data.tfrecords import S3TFRecordDataset

SECOND = SIZES[0] + SIZES[1]  # the first record of s-002
ALL = set(range(COUNT))


@pytest.fixture
def make(s3):
    def make(source, kind="tfrecord", **options):
        options = {"transform": number_in, "storage_options": s3.storage_options, "batch_size": BATCH} | options
        return S3TarDataset(source, decode=False, **options) if kind == "tar" else S3TFRecordDataset(source, **options)

    return make


@pytest.fixture
def flipped(fs, folder):
    """A prefix where record 3 of s-002 has a bit flipped in its data."""
    prefix = put(fs, folder)
    fs.pipe(f"{folder}/s-002.tfrecord", damaged(shards()[2], 3))
    return prefix


def offset_of(number, shard=2):
    start = sum(SIZES[:shard])
    return sum(len(framed(content(n))) for n in range(start, start + number))


@pytest.mark.parametrize("workers", [0, 2])
def test_flipped_bit_is_named_by_shard_record_and_byte(make, flipped, workers):
    with pytest.raises(
        IntegrityError, match=rf"s-002\.tfrecord: record 3, at byte {offset_of(3)}: the data's checksum"
    ):
        list(DataLoader(make(flipped), batch_size=BATCH, num_workers=workers))


def test_flipped_bit_in_a_length_is_found_at_once(make, fs, folder):
    prefix = put(fs, folder)
    fs.pipe(f"{folder}/s-002.tfrecord", damaged(shards()[2], 3, at=1))
    with pytest.raises(IntegrityError, match=rf"s-002\.tfrecord: record 3, at byte {offset_of(3)}: the length's"):
        make(prefix)


@pytest.mark.parametrize("kind", ["tfrecord", "tar"])
def test_shard_that_is_cut_off_is_found_at_once(make, fs, folder, kind):
    prefix = put(fs, folder, kind)
    body = shards(kind)[2]
    fs.pipe(f"{folder}/s-002.{kind}", body[: len(body) // 2 + 3])
    with pytest.raises(IntegrityError, match=rf"s-002\.{kind}: record \d+, at byte \d+: .*cut off"):
        make(prefix, kind)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("how", ["cut off", "damaged"])
def test_damaged_compression_is_found_at_once(make, fs, folder, suffix, how):
    prefix = put(fs, folder, suffix=suffix)
    body = bytearray(compressed(shards()[2], suffix))
    if how == "cut off":
        del body[-10:]
    else:
        body[len(body) // 2 + 20 :] = bytes(len(body) - len(body) // 2 - 20)
    fs.pipe(f"{folder}/s-002.tfrecord{suffix}", bytes(body))
    with pytest.raises(IntegrityError, match=rf"s-002\.tfrecord\{suffix}: "):
        make(prefix)


def test_zstd_bomb_fills_no_memory():
    bomb = zstandard.ZstdCompressor().compress(bytes(400 << 20))
    with closing(decompressed([bomb], "zstd", "s3://b/k.zst")) as pieces:
        assert len(bomb) < 64 << 10
        assert len(next(pieces)) <= 256 << 20


def test_tar_with_a_link_is_refused(make, fs, folder):
    import tarfile

    link = tarfile.TarInfo("000001.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    fs.pipe(f"{folder}/s.tar", tar_of({"000000.txt": b"0"})[:1024] + link.tobuf() + bytes(1024))
    with pytest.raises(IntegrityError, match=r"s\.tar: record 0, at byte 1024: '000001\.txt' is a symbolic link"):
        make(f"{folder}/s.tar", "tar")


# ------------------------------------------------------------------ skipped and replaced


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.filterwarnings("ignore:epoch 0. skipped")
def test_skipping_leaves_one_record_out(make, flipped, workers, shuffle):
    train = make(flipped, on_error="skip", shuffle=shuffle, shuffle_buffer=10)
    with reading(DataLoader(train, batch_size=BATCH, num_workers=workers)) as loader:
        found = [number for batch in loader for number in batch.tolist()]

    assert sorted(found) == sorted(ALL - {SECOND + 3})
    (failure,) = train.errors
    assert (failure.error, failure.uri) == ("IntegrityError", f"{flipped}s-002.tfrecord")
    assert "record 3" in failure.message


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:epoch 0. replaced")
def test_replacing_gives_another_record_in_its_place(make, flipped, workers):
    train = make(flipped, on_error="replace")
    found = Counter(n for batch in DataLoader(train, batch_size=BATCH, num_workers=workers) for n in batch.tolist())

    assert found.total() == COUNT
    assert set(found) == ALL - {SECOND + 3}


@pytest.mark.filterwarnings("ignore:epoch 0. replaced")
def test_what_is_left_and_damaged_is_replaced_by_the_rank_s_first(make, flipped):
    train = make(flipped, on_error="replace")
    train.load_state_dict(train.state_dict() | {"rest": [[SECOND + 3, SECOND + 4, 1]]})

    assert list(train) == [0]


def test_too_many_errors(make, fs, folder):
    prefix = put(fs, folder)
    fs.pipe(f"{folder}/s-000.tfrecord", damaged(damaged(shards()[0], 3), 7))
    with pytest.raises(TooManyErrors, match=r"2 samples of epoch 0 failed, max_errors=1; last: .*record 7"):
        list(make(prefix, on_error="skip", max_errors=1))


@pytest.mark.filterwarnings("ignore:epoch 0. skipped")
@pytest.mark.parametrize("policy", ["skip", "replace"])
@pytest.mark.parametrize(
    ("damage", "left"),
    [(lambda body: damaged(body, 3, at=1), 3), (lambda body: body[: offset_of(5) + 4], 5)],
    ids=["length", "cut off"],
)
def test_shard_is_read_up_to_where_its_records_are_lost(make, fs, folder, policy, damage, left):
    prefix = put(fs, folder)
    fs.pipe(f"{folder}/s-002.tfrecord", damage(shards()[2]))
    with pytest.warns(UserWarning, match=r"damaged shards, read as far as they go: 1; the first: .*s-002"):
        train = make(prefix, on_error=policy)

    assert list(train) == sorted(ALL - set(range(SECOND + left, SECOND + SIZES[2])))
    assert [(failure.uri, failure.position) for failure in train.errors] == [(f"{prefix}s-002.tfrecord", -1)]


@pytest.mark.parametrize("kind", ["tfrecord", "tar"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_shard_is_read_up_to_where_it_is_cut_off(make, fs, folder, kind, suffix, monkeypatch):
    monkeypatch.setattr("torch_s3.data.decompress._BITES", {"gzip": 50, "zstd": 50})
    monkeypatch.setattr("torch_s3.data.chunks.piece_size", lambda fs: 500)
    prefix = put(fs, folder, kind, suffix)
    body = compressed(shards(kind, sizes=(COUNT,))[0], suffix)
    fs.pipe(f"{folder}/s-000.{kind}{suffix}", body[:-60])
    with pytest.warns(UserWarning, match="damaged shards"):
        train = make(f"{prefix}s-000.{kind}{suffix}", kind, on_error="skip")
    found = list(train)

    assert found == list(range(len(found)))
    assert COUNT // 2 - 2 < len(found) < COUNT


@pytest.mark.filterwarnings("ignore:epoch 0. skipped")
def test_skipping_ranks_resume_with_the_states_of_all(make, flipped):
    """Rank 1 has the damaged record, and so has gone further."""
    seen, states = [], []
    for rank in range(2):
        train = make(flipped, on_error="skip", rank=rank, world_size=2)
        with reading(DataLoader(train, batch_size=BATCH, num_workers=2)) as loader:
            seen += [number for batch in itertools.islice(loader, 3) for number in batch.tolist()]
        states.append(train.state_dict(batches=3))
    again = make(flipped, on_error="skip")
    again.load_state_dict(states)

    assert sorted([*seen, *again]) == sorted(ALL - {SECOND + 3})


@pytest.mark.filterwarnings("ignore:epoch 0. skipped")
def test_skipping_ranks_may_end_with_their_workers_at_other_places(make, fs, folder):
    body = shards(sizes=(8,))[0]
    fs.pipe_file(f"{folder}/a.tfrecord", damaged(body, 0))
    seen, states = [], []
    for rank in range(2):
        train = make(f"{folder}/", on_error="skip", batch_size=1, rank=rank, world_size=2)
        with reading(DataLoader(train, batch_size=1, num_workers=2)) as loader:
            seen += [number for batch in itertools.islice(loader, 3) for number in batch.tolist()]
        states.append(train.state_dict(batches=3))
    again = make(f"{folder}/", on_error="skip")
    again.load_state_dict(states)

    assert sorted([*seen, *again]) == list(range(1, 8))
    states[1]["rank"]["batches"] = 2
    with pytest.raises(StateMismatch, match="after different numbers of batches"):
        again.load_state_dict(states)


@pytest.mark.filterwarnings("ignore:damaged shards")
def test_where_no_shard_can_be_read_the_first_damage_is_named(make, fs, folder):
    fs.pipe_file(f"{folder}/a.tfrecord", damaged(shards(sizes=(8,))[0], 0, at=0))

    with pytest.raises(EmptyDataset, match=r"nothing can be read of 1 shards: .*a.tfrecord: record 0, at byte 0"):
        make(f"{folder}/", on_error="skip")


@pytest.mark.filterwarnings("ignore:epoch 0. skipped")
def test_shard_that_is_gone_costs_its_records_only(make, fs, folder):
    prefix = put(fs, folder)
    train = make(prefix, on_error="skip")
    fs.rm(f"{folder}/s-003.tfrecord")

    assert list(train) == list(range(COUNT - SIZES[3]))
    assert {failure.error for failure in train.errors} == {"NotFound"}
    assert len(train.errors) == SIZES[3]
