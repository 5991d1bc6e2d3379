"""The local cache: what comes out is what was put in, or nothing, whatever happens to the disk and beside."""

import itertools
import multiprocessing
import os
import pickle
import random
import resource
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from processes import in_child

from torch_s3 import CacheError, NotFound
from torch_s3.data import cache
from torch_s3.data.cache import Cache, CachedReader
from torch_s3.uris import Read, read_ahead

URI, ETAG = "s3://bucket/a picture.jpg", "0123456789abcdef"
BODY = bytes(range(256)) * 40
ENTRY = len(BODY) + cache._HEAD.size  # bytes on disk


@pytest.fixture
def kept(tmp_path):
    """A cache without bound, in a folder of its own."""
    return Cache(tmp_path / "kept")


def entries(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".lock"]


def used(folder):
    return sum(path.stat().st_size for path in entries(folder))


def names(count):
    return [f"s3://bucket/{number}" for number in range(count)]


def present(kept, count):
    return {number for number, uri in enumerate(names(count)) if kept.get(uri, ETAG) is not None}


def use(kept, number, seconds_ago):
    """Make the last use of an entry one of the past."""
    os.utime(kept._path(names(number + 1)[number], ETAG), (time.time() - seconds_ago,) * 2)


# ------------------------------------------------------------------ what is in it


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("body", [b"", b"x", BODY, bytes(3_000_000)])
def test_what_was_put_comes_out(kept, body, make):
    kept.put(URI, ETAG, make(body))

    assert kept.get(URI, ETAG) == body
    assert kept.get(URI, ETAG, len(body)) == body


def test_nothing_comes_of_what_was_not_put(kept):
    kept.put(URI, ETAG, BODY)

    assert kept.get(f"{URI}2", ETAG) is None
    assert kept.get(URI, "another version") is None


@pytest.mark.parametrize("etag", [None, ""])
def test_object_without_etag_is_not_kept_which_is_said_once(kept, etag):
    with pytest.warns(RuntimeWarning, match=f"{URI}: objects whose ETag isn't known are not cached"):
        kept.put(URI, etag, BODY)
    kept.put(URI, etag, BODY)

    assert kept.get(URI, etag) is None
    assert entries(kept.folder) == []


def test_versions_are_apart(kept):
    kept.put(URI, "1", b"one")
    kept.put(URI, "2", b"two")

    assert (kept.get(URI, "1"), kept.get(URI, "2")) == (b"one", b"two")


def test_another_size_than_the_listed_one_is_no_hit(kept):
    kept.put(URI, ETAG, BODY)

    assert kept.get(URI, ETAG, len(BODY) + 1) is None


def test_odd_names_are_kept(kept):
    for uri in ("s3://b/ü/\udcff", "s3://b/" + "x" * 1024, "s3://b/../../etc/passwd", "s3://b/a\0b"):
        kept.put(uri, ETAG, uri.encode(errors="replace"))

        assert kept.get(uri, ETAG) == uri.encode(errors="replace")
    assert {path.parent.parent for path in entries(kept.folder)} == {kept.folder}


def test_other_processes_find_it_and_the_cache_pickles(kept):
    again = pickle.loads(pickle.dumps(kept))

    def put_it():
        kept.put(URI, ETAG, BODY)

    assert in_child(put_it) == 0
    assert again.get(URI, ETAG) == BODY


# ------------------------------------------------------------------ damage


def test_damage_anywhere_is_noticed_and_the_entry_dropped(kept):
    kept.put(URI, ETAG, BODY)
    (path,) = entries(kept.folder)
    whole = path.read_bytes()
    rng = random.Random(0)
    for at in [*range(cache._HEAD.size + 4), *rng.sample(range(len(whole)), 40), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)

        assert kept.get(URI, ETAG) is None
        assert not path.exists()


@pytest.mark.parametrize("length", [0, 1, cache._HEAD.size - 1, cache._HEAD.size, ENTRY - 1])
def test_entry_that_was_cut_off_is_dropped(kept, length):
    kept.put(URI, ETAG, BODY)
    (path,) = entries(kept.folder)
    os.truncate(path, length)

    assert kept.get(URI, ETAG) is None
    assert not path.exists()


def test_entry_is_replaced_after_damage(kept):
    kept.put(URI, ETAG, BODY)
    (path,) = entries(kept.folder)
    path.write_bytes(b"damaged")
    kept.get(URI, ETAG)

    kept.put(URI, ETAG, BODY)

    assert kept.get(URI, ETAG) == BODY


# ------------------------------------------------------------------ size


def test_least_recently_used_go_first(tmp_path):
    kept = Cache(tmp_path, 10 * ENTRY)
    for number, uri in enumerate(names(10)):
        kept.put(uri, ETAG, BODY)
        use(kept, number, seconds_ago=1000 + (3, 9, 1, 4, 8, 0, 2, 7, 5, 6)[number])

    kept.put(names(11)[10], ETAG, BODY)

    assert present(kept, 11) == {0, 2, 3, 5, 6, 7, 8, 9, 10}
    assert used(tmp_path) <= 10 * ENTRY


def test_reading_is_using(tmp_path):
    kept = Cache(tmp_path, 10 * ENTRY)
    for number, uri in enumerate(names(10)):
        kept.put(uri, ETAG, BODY)
        use(kept, number, seconds_ago=1000 - number)
    kept.get(names(1)[0], ETAG)

    kept.put(names(11)[10], ETAG, BODY)

    assert 0 in present(kept, 11)
    assert 1 not in present(kept, 11)


def test_size_is_kept_whatever_is_put(tmp_path):
    kept, rng = Cache(tmp_path, 20 * ENTRY), random.Random(0)
    for uri in names(200):
        kept.put(uri, ETAG, BODY[: rng.randrange(len(BODY))])

        assert used(tmp_path) <= 20 * ENTRY
    assert used(tmp_path) > 10 * ENTRY


def test_object_larger_than_the_cache_is_not_kept(tmp_path):
    kept = Cache(tmp_path, ENTRY)
    kept.put(names(1)[0], ETAG, BODY)

    kept.put(URI, ETAG, BODY + b"x")

    assert present(kept, 1) == {0}
    assert kept.get(URI, ETAG) is None


def test_smaller_size_than_before_holds_from_the_next_write_on(tmp_path):
    for uri in names(20):
        Cache(tmp_path).put(uri, ETAG, BODY)

    Cache(tmp_path, 5 * ENTRY).put(URI, ETAG, BODY)

    assert used(tmp_path) <= 5 * ENTRY


@pytest.mark.parametrize("count", [None, b"", b"garbage", bytes(8)])
def test_lost_count_is_made_anew(tmp_path, count):
    kept = Cache(tmp_path, 5 * ENTRY)
    for uri in names(5):
        kept.put(uri, ETAG, BODY)
    counter = tmp_path / "used.lock"
    counter.unlink() if count is None else counter.write_bytes(count)

    for uri in names(20)[5:]:
        kept.put(uri, ETAG, BODY)

    assert used(tmp_path) <= (10 if count == bytes(8) else 5) * ENTRY  # a wrong number is noticed at the next eviction


def test_entries_that_were_deleted_by_hand_take_no_room_for_long(tmp_path):
    kept = Cache(tmp_path, 10 * ENTRY)
    for uri in names(10):
        kept.put(uri, ETAG, BODY)
    for path in entries(tmp_path):
        path.unlink()

    for uri in names(10):
        kept.put(uri, ETAG, BODY)

    assert present(kept, 10) == set(range(10))


def test_files_of_others_in_the_folder_stay(tmp_path):
    theirs = [tmp_path / "notes.txt", tmp_path / "ab" / "notes.txt", tmp_path / "data" / ("0" * 40)]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10_000))
        os.utime(path, (0, 0))
    kept = Cache(tmp_path, 2 * ENTRY)
    for uri in names(10):
        kept.put(uri, ETAG, BODY)

    assert all(path.exists() for path in theirs)


# ------------------------------------------------------------------ several at once, and killed


def test_many_processes_and_threads_keep_to_the_size(tmp_path):
    kept, count = Cache(tmp_path, 30 * ENTRY), 60

    def work():
        rng = random.Random(os.getpid() ^ threading.get_ident())
        for _ in range(100):
            number = rng.randrange(count)
            uri, body = names(count)[number], bytes([number]) * len(BODY)
            found = kept.get(uri, ETAG)
            assert found in (None, body)
            if found is None:
                kept.put(uri, ETAG, body)

    def work_in_threads():
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(work) for _ in range(3)]:
                done.result()

    context = multiprocessing.get_context("fork")
    several = [context.Process(target=work_in_threads) for _ in range(3)]
    for process in several:
        process.start()
    work_in_threads()
    for process in several:
        process.join()

    assert [process.exitcode for process in several] == [0, 0, 0]
    kept.put(URI, ETAG, BODY)  # after which nobody is writing meanwhile
    assert used(tmp_path) <= 30 * ENTRY


def test_eviction_of_another_process_is_not_waited_for(tmp_path):
    kept = Cache(tmp_path, 3 * ENTRY)
    with kept._locked("evict"):
        for uri in names(5):
            kept.put(uri, ETAG, BODY)

    assert present(kept, 5) == {0, 1, 2, 3, 4}


def test_what_others_write_while_the_first_eviction_looks_is_counted(tmp_path):
    """It was not, and the folder grew by that over its size for good."""
    other = Cache(tmp_path, 3 * ENTRY)

    class Looking(Cache):
        def _entries(self):
            found = super()._entries()
            for uri in names(5):
                other.put(uri, ETAG, BODY)
            return found

    Looking(tmp_path, 3 * ENTRY).put(URI, ETAG, BODY)
    other.put("s3://bucket/5", ETAG, BODY)

    assert used(tmp_path) <= 3 * ENTRY


def put_for_ever(folder, said):
    kept = Cache(folder, 50_000_000)
    for number in itertools.count():
        kept.put(f"s3://bucket/{number}", "etag", bytes([number % 251]) * 1_000_000)
        said.send(number)


def test_killed_writers_leave_whole_entries_and_no_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    for stop in range(10):
        hears, says = context.Pipe(duplex=False)
        process = context.Process(target=put_for_ever, args=(tmp_path, says))
        process.start()
        while hears.recv() < 55 + stop:
            pass
        process.kill()
        process.join()
    kept = Cache(tmp_path, 50_000_000)

    found = [(number, kept.get(f"s3://bucket/{number}", "etag")) for number in range(200)]
    whole = [number for number, body in found if body is not None and body == bytes([number % 251]) * 1_000_000]
    assert len(whole) == len([body for _, body in found if body is not None]) >= 20
    assert used(tmp_path) <= kept.size + 10 * 1_000_012  # what was being written


def test_what_killed_writers_were_writing_is_removed_in_the_end(tmp_path):
    kept = Cache(tmp_path, 5 * ENTRY)
    for uri in names(5):
        kept.put(uri, ETAG, BODY)
    shard = entries(tmp_path)[0].parent
    stale, fresh = (shard / f".{uuid.uuid4().hex}" for _ in range(2))
    stale.write_bytes(b"half")
    fresh.write_bytes(b"half")
    os.utime(stale, (time.time() - 2 * cache._STALE,) * 2)

    kept.put(URI, ETAG, BODY)

    assert not stale.exists()
    assert fresh.exists()


# ------------------------------------------------------------------ disks


def test_full_disk_is_survived_with_one_warning(tmp_path):
    kept = Cache(tmp_path)
    kept.put(names(1)[0], ETAG, BODY)

    def fill_it():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the kernel takes part of what is written
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for uri in names(5)[1:]:
                kept.put(uri, ETAG, BODY)
        assert [str(tmp_path) in str(each.message) for each in caught] == [True]
        assert present(kept, 5) == {0}
        assert len(entries(tmp_path)) == 1  # nothing half-written either

    assert in_child(fill_it) == 0


def test_folder_that_vanishes_is_survived(tmp_path):
    kept = Cache(tmp_path / "kept")
    kept.put(URI, ETAG, BODY)
    (tmp_path / "kept").rename(tmp_path / "moved")

    assert kept.get(URI, ETAG) is None
    with pytest.warns(RuntimeWarning, match="nothing more is cached"):
        kept.put(URI, ETAG, BODY)
    kept.put(URI, ETAG, BODY)


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_folder_that_cannot_be_written_to_is_an_error_at_once(tmp_path, below):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(CacheError, match="give a folder that can be written to") as caught:
        Cache(tmp_path / below)

    assert caught.value.uri == str(tmp_path / below)


def test_folder_without_permission_is_an_error_at_once(tmp_path):
    tmp_path.chmod(0o500)

    def make_it():
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(CacheError, match="Permission denied"):
            Cache(tmp_path)

    assert in_child(make_it) == 0


def test_size_may_be_written_as_a_float(tmp_path):
    assert Cache(tmp_path, 50e9).size == 50_000_000_000


# ------------------------------------------------------------------ between reads


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.pipe({f"/cached/{number}": str(number).encode() * 100 for number in range(20)})
    yield fs
    fs.rm("/cached", recursive=True)


def reads(count, etag="1"):
    return [Read(f"/cached/{number}", None, etag) for number in range(count)]


def test_reads_ahead_take_from_the_cache_what_is_there_and_keep_what_comes(kept, memory):
    hits = []

    def around(reader):
        return CachedReader(reader, kept, memory, hit=lambda: hits.append(1))

    expected = [str(number).encode() * 100 for number in range(20)]
    assert list(read_ahead(memory, reads(5), window=3, around=around)) == expected[:5]
    assert len(hits) == 0
    assert list(read_ahead(memory, reads(20), window=3, around=around)) == expected
    assert len(hits) == 5
    memory.pipe({f"/cached/{number}": b"changed" for number in range(20)})
    assert list(read_ahead(memory, reads(20), window=3, around=around)) == expected


def test_damaged_entry_is_read_anew_at_its_place(kept, memory):
    def around(reader):
        return CachedReader(reader, kept, memory)

    first = list(read_ahead(memory, reads(20), window=3, around=around))
    for path in entries(kept.folder)[::2]:
        path.write_bytes(b"damaged")

    assert list(read_ahead(memory, reads(20), window=3, around=around)) == first


def test_dropped_reads_ahead_leave_no_file_open(kept, memory):
    def around(reader):
        return CachedReader(reader, kept, memory)

    list(read_ahead(memory, reads(20), window=3, around=around))
    before = len(list(Path("/proc/self/fd").iterdir()))
    reading = read_ahead(memory, reads(20), window=10, around=around)
    next(reading)
    assert len(list(Path("/proc/self/fd").iterdir())) > before
    reading.close()

    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_errors_are_not_kept(kept, memory):
    def around(reader):
        return CachedReader(reader, kept, memory)

    (outcome,) = read_ahead(memory, [Read("/cached/none", None, "1")], window=1, around=around)

    assert isinstance(outcome, NotFound)
    assert entries(kept.folder) == []


@pytest.mark.parametrize("size", ["1GB", 0, -1, 1.5])
def test_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises((TypeError, ValueError), match=f"cache_size={size!r}: "):
        Cache(tmp_path, size)
