import array
import errno
import gzip
import logging
import os
import pickle
import threading
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import fsspec
import numpy as np
import pytest
from faults import Answer, Faults, answer, edit, stall
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import in_child

import torch_s3
from torch_s3 import errors
from torch_s3.filesystem import S3FileSystem
from torch_s3.uris import resolve

MIB = 1024 * 1024
PART = 5 * MIB
CONTENT = bytes(range(256)) * 4


@pytest.fixture
def fs(s3):
    return S3FileSystem(**s3.storage_options, part_size=PART)


@pytest.fixture
def bucket(fs):
    """As everywhere, but made without a new boto3 client, which takes longer than most of the tests here."""
    name = str(uuid.uuid4())
    fs.mkdir(name)
    return f"s3://{name}"


@pytest.fixture(params=["moto", "rclone"])
def any_s3(request):
    """A filesystem and a bucket of each server: rclone answers ranges with status 200."""
    server = request.getfixturevalue({"moto": "s3"}.get(request.param, request.param))
    fs = S3FileSystem(**server.storage_options, part_size=PART)
    name = str(uuid.uuid4())
    fs.mkdir(name)
    return fs, f"s3://{name}"


@pytest.fixture
def key(fs, bucket):
    """An object with the content `CONTENT`."""
    fs.pipe_file(f"{bucket}/key", CONTENT)
    return f"{bucket}/key"


@pytest.fixture
def tree(fs, bucket):
    fs.pipe({f"{bucket}/{name}": name.encode() for name in ("a", "b/c", "b/d/e", "b/d/f", "bc")})
    return bucket[5:]


def _put_marker(fs, bucket, key):
    """What other tools make of an empty folder."""
    fs.client.call("put_object", bucket, Bucket=bucket[5:], Key=key, Body=b"")


# ---------------------------------------------------------------------- keys

KEYS = [
    "plain",
    "with space",
    " leading and trailing .",
    "a+b",
    "100%",
    "%20",
    "%2F",
    "a//b",
    "/leading",
    "a/./b/../c",
    "ünïcödé/日本語/😀",
    "e\u0301 is not \u00e9",
    "'single' \"double\" `back`",
    "<&amp;>",
    "a?b=c&d#e",
    "semi;colon:at@equals=",
    "!$&'()*,~-._",
    "back\\slash",
    "tab\tand \x7f",
    "k" * 1024,
    "ü" * 512,
    "s3://bucket/key",
    "folder/",
    "folder//",
    "//",
]


@pytest.mark.parametrize("name", KEYS, ids=ascii)
def test_object_of_any_name_is_written_found_read_and_deleted(fs, bucket, name):
    path = f"{bucket[5:]}/{name}"
    fs.pipe_file(path, CONTENT)

    assert fs.cat_file(path) == CONTENT
    assert fs.info(path)["name"] == path
    assert fs.info(path)["size"] == len(CONTENT)
    assert fs.find(bucket) == [path]
    fs.rm_file(path)
    assert not fs.exists(path)


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=100)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(NAMES.filter(lambda name: name.strip("/.")), st.binary(min_size=1, max_size=100))
def test_names_lead_to_their_own_objects(s3, name, content):
    fs = S3FileSystem(**s3.storage_options)
    fs.makedirs("names", exist_ok=True)
    path = f"names/{name}"
    fs.pipe_file(path, content)
    try:
        assert fs.cat_file(f"s3://{path}") == content
        assert fs.info(path)["size"] == len(content)
        assert fs.find("names", detail=True)[path]["size"] == len(content)
    finally:
        fs.rm_file(path)


@pytest.mark.parametrize("name", ["with space", "a+b", "a%20b", "ünï/日本/😀", "'q' \"q\"", "a?b=c&d;e", "!()*~-._"])
def test_names_are_signed_as_servers_expect(rclone, name):
    fs = S3FileSystem(**rclone.storage_options)
    bucket = rclone.create_bucket(os.urandom(8).hex())
    fs.pipe_file(f"{bucket}/{name}", CONTENT)

    assert fs.cat_file(f"{bucket}/{name}", 3, 100) == CONTENT[3:100]
    assert fs.info(f"{bucket}/{name}")["size"] == len(CONTENT)


@pytest.mark.parametrize("path", ["", "s3://", "bucket", "s3://bucket/", "s3:///key"])
def test_path_of_no_object_is_invalid(fs, path):
    for use in (fs.cat_file, fs.open, fs.rm_file, lambda path: fs.pipe_file(path, b"")):
        with pytest.raises(errors.InvalidUri, match="s3://bucket/key"):
            use(path)


@pytest.mark.parametrize("path", ["no bucket/key", "b@d/key", "bucket/\udc80"])
def test_path_that_s3_cannot_have_is_invalid(fs, path):
    for use in (fs.cat_file, fs.info, lambda path: fs.pipe({path: b""})):
        with pytest.raises(errors.InvalidUri):
            use(path)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 3 * PART + 1])
def test_object_of_any_size_is_read_whole(any_s3, size):
    fs, bucket = any_s3
    content = os.urandom(size)
    fs.pipe_file(f"{bucket}/key", content)

    assert fs.cat_file(f"{bucket}/key") == content


EDGES = [
    None,
    0,
    1,
    5,
    len(CONTENT) - 1,
    len(CONTENT),
    len(CONTENT) + 1,
    10**9,
    -1,
    -5,
    -len(CONTENT),
    -len(CONTENT) - 1,
]


def test_range_is_what_a_slice_would_be(any_s3):
    fs, bucket = any_s3
    path = f"{bucket}/key"
    fs.pipe_file(path, CONTENT)
    ranges = [(start, end) for start in EDGES for end in EDGES]

    got = fs.cat_ranges([path] * len(ranges), [start for start, _ in ranges], [end for _, end in ranges])

    assert got == [CONTENT[start:end] for start, end in ranges]
    for start, end in [(3, 7), (-7, -3), (None, 3), (-3, None), (10**9, None), (7, 3)]:
        assert fs.cat_file(path, start, end) == CONTENT[start:end]


def test_range_of_an_empty_object_is_empty(any_s3):
    fs, bucket = any_s3
    fs.pipe_file(f"{bucket}/key", b"")

    for start, end in [(None, None), (0, None), (0, 10), (5, 10), (-5, None)]:
        assert fs.cat_file(f"{bucket}/key", start, end) == b""


def test_range_over_parts_is_exact(any_s3):
    fs, bucket = any_s3
    content = os.urandom(3 * PART)
    fs.pipe_file(f"{bucket}/key", content)

    for start, end in [(PART - 1, PART + 1), (1, 2 * PART + 1), (PART, 2 * PART), (PART + 1, None), (-PART - 1, -1)]:
        assert fs.cat_file(f"{bucket}/key", start, end) == content[start:end]


def test_read_into_fills_exactly_the_buffer(any_s3):
    fs, bucket = any_s3
    content = os.urandom(2 * PART + 3)
    fs.pipe_file(f"{bucket}/key", content)
    memory = bytearray(b"?" * (len(content) + 20))

    fs.read_into(f"{bucket}/key", 1, memoryview(memory)[10 : 10 + 2 * PART])

    assert memory == b"?" * 10 + content[1 : 1 + 2 * PART] + b"?" * 13


def test_read_into_fills_arrays_of_any_shape(fs, key):
    wanted = np.zeros((3, 4, 5), np.int16)
    fs.read_into(key, 2, wanted)

    assert wanted.tobytes() == CONTENT[2 : 2 + wanted.nbytes]


def test_read_into_nothing_is_nothing(fs, key):
    fs.read_into(key, 0, bytearray())
    fs.read_into(key, 0, np.zeros((0, 3)))


def test_read_into_readonly_memory_is_a_type_error(fs, key):
    with pytest.raises(TypeError, match="bytes is read-only"):
        fs.read_into(key, 0, bytes(10))


def test_read_into_scattered_memory_is_a_type_error(fs, key):
    with pytest.raises(TypeError):
        fs.read_into(key, 0, np.zeros(10, np.uint8)[::2])


def test_read_into_from_before_the_start_is_a_value_error(fs, key):
    with pytest.raises(ValueError):
        fs.read_into(key, -1, bytearray(10))


@pytest.mark.parametrize(("start", "length"), [(0, 1025), (1024, 1), (1, 1024), (10**9, 10), (0, 2 * PART)])
def test_read_into_past_the_end_is_an_integrity_error(any_s3, start, length):
    fs, bucket = any_s3
    fs.pipe_file(f"{bucket}/key", CONTENT)

    with pytest.raises(errors.IntegrityError, match=f"^{bucket}/key bytes "):
        fs.read_into(f"{bucket}/key", start, bytearray(length))


def test_buffer_is_free_after_a_failed_read_into(fs, key):
    buffer = bytearray(2 * PART)
    with pytest.raises(errors.IntegrityError):
        fs.read_into(key, 0, buffer)

    del buffer[:]


def test_ranges_come_in_the_order_asked_for(fs, bucket):
    contents = {f"{bucket}/{i}": os.urandom(100 + i) for i in range(150)}
    fs.pipe(contents)
    paths = sorted(contents, reverse=True)

    assert fs.cat_ranges(paths, 5, 50) == [contents[path][5:50] for path in paths]
    assert fs.cat_ranges(paths * 2, None, None) == [contents[path] for path in paths] * 2


def test_failed_range_is_returned_in_its_place(fs, bucket, key):
    got = fs.cat_ranges([key, f"{bucket}/missing", key], [0, 0, 2], [1, 1, 3])

    assert got[::2] == [CONTENT[:1], CONTENT[2:3]]
    assert isinstance(got[1], errors.NotFound)
    assert got[1].uri == f"{bucket}/missing"


def test_failed_range_from_the_end_is_returned_in_its_place(fs, bucket, key):
    got = fs.cat_ranges([f"{bucket}/missing", key], [-5, -5], [None, None])

    assert isinstance(got[0], errors.NotFound)
    assert got[1] == CONTENT[-5:]


def test_failed_range_is_raised_where_that_is_asked_for(fs, bucket, key):
    with pytest.raises(errors.NotFound, match=f"^{bucket}/missing: "):
        fs.cat_ranges([key, f"{bucket}/missing"], 0, 1, on_error="raise")


def test_ranges_of_unequal_number_are_a_value_error(fs, key):
    with pytest.raises(ValueError, match="2 paths, 1 starts and 2 ends"):
        fs.cat_ranges([key, key], [0], [1, 1])


def test_no_ranges_are_no_bytes(fs):
    assert fs.cat_ranges([], [], []) == []


def test_cat_gives_bytes_of_one_and_a_dict_of_several(fs, tree):
    assert fs.cat(f"s3://{tree}/a") == b"a"
    assert fs.cat([f"{tree}/a"]) == {f"{tree}/a": b"a"}
    assert fs.cat([f"{tree}/a", f"{tree}/b/c"]) == {f"{tree}/a": b"a", f"{tree}/b/c": b"b/c"}
    assert fs.cat(f"{tree}/b/*") == {f"{tree}/b/c": b"b/c"}
    assert fs.cat(f"{tree}/b", recursive=True) == {
        f"{tree}/{name}": name.encode() for name in ("b/c", "b/d/e", "b/d/f")
    }


def test_cat_of_several_raises_omits_or_returns_what_fails(fs, tree):
    paths = [f"{tree}/a", f"{tree}/missing"]

    with pytest.raises(errors.NotFound):
        fs.cat(paths)
    assert fs.cat(paths, on_error="omit") == {f"{tree}/a": b"a"}
    assert isinstance(fs.cat(paths, on_error="return")[f"{tree}/missing"], errors.NotFound)


def test_pattern_that_matches_nothing_is_not_found(fs, tree):
    with pytest.raises(errors.NotFound, match=tree):
        fs.cat(f"{tree}/*.none")


def test_missing_object_is_not_found_and_named(any_s3):
    fs, bucket = any_s3

    for use in (fs.cat_file, fs.info, fs.rm_file, fs.open, fs.ls, lambda path: fs.read_into(path, 0, bytearray(1))):
        with pytest.raises(errors.NotFound, match=f"^{bucket}/missing"):
            use(f"{bucket}/missing")


def test_missing_bucket_is_not_found_and_named(any_s3):
    fs, _ = any_s3

    for use in (fs.cat_file, fs.info, fs.ls, fs.open, fs.find, lambda path: fs.pipe_file(path, b"")):
        with pytest.raises(errors.NotFound, match=r"^s3://missing-bucket: no such bucket"):
            use("s3://missing-bucket/key")


# ---------------------------------------------------------------------- what is there


def test_info_of_an_object(any_s3):
    fs, bucket = any_s3
    fs.pipe_file(f"{bucket}/key", CONTENT)
    info = fs.info(f"{bucket}/key")

    assert info.keys() == {"name", "size", "type", "ETag", "LastModified"}
    assert (info["name"], info["size"], info["type"]) == (f"{bucket[5:]}/key", len(CONTENT), "file")
    assert '"' not in info["ETag"]
    assert info["LastModified"].tzinfo
    assert fs.modified(f"{bucket}/key") == info["LastModified"]


def test_listing_agrees_with_info(any_s3):
    fs, bucket = any_s3
    fs.pipe_file(f"{bucket}/key", CONTENT)
    info = fs.info(f"{bucket}/key")

    for entry in (fs.ls(bucket, detail=True)[0], fs.find(bucket, detail=True)[f"{bucket[5:]}/key"]):
        assert {name: entry[name] for name in ("name", "size", "type", "ETag")} == {
            name: info[name] for name in ("name", "size", "type", "ETag")
        }


def test_info_of_a_prefix_is_a_directory(fs, tree):
    assert fs.info(f"{tree}/b") == {"name": f"{tree}/b", "size": 0, "type": "directory"}
    assert fs.info(f"s3://{tree}/b/d/") == {"name": f"{tree}/b/d", "size": 0, "type": "directory"}
    assert fs.info(tree) == {"name": tree, "size": 0, "type": "directory"}


def test_part_of_a_name_is_no_prefix(fs, tree):
    assert not fs.exists(f"{tree}/b/d/ef")
    with pytest.raises(errors.NotFound):
        fs.info(f"{tree}/b/dd")


def test_objects_prefixes_and_buckets_exist(fs, tree):
    assert [fs.exists(f"{tree}{rest}") for rest in ("", "/a", "/b", "/b/d", "/missing", "/b/d/missing")] == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    assert not fs.exists("s3://missing-bucket")
    assert not fs.exists("s3://missing-bucket/key")


def test_files_and_directories_are_told_apart(fs, tree):
    assert fs.isfile(f"{tree}/a")
    assert not fs.isdir(f"{tree}/a")
    assert fs.isdir(f"{tree}/b")
    assert not fs.isfile(f"{tree}/b")
    assert fs.size(f"{tree}/b/c") == 3


def test_ls_lists_what_lies_directly_below_sorted(fs, tree):
    assert fs.ls(tree, detail=False) == [f"{tree}/a", f"{tree}/b", f"{tree}/bc"]
    assert fs.ls(f"s3://{tree}/b/", detail=False) == [f"{tree}/b/c", f"{tree}/b/d"]
    assert [entry["type"] for entry in fs.ls(tree, detail=True)] == ["file", "directory", "file"]


def test_ls_of_an_object_is_the_object(fs, tree):
    assert fs.ls(f"{tree}/a", detail=False) == [f"{tree}/a"]


def test_ls_of_nothing_lists_the_buckets(fs, tree):
    assert tree in fs.ls("", detail=False)
    assert tree in fs.ls("s3://", detail=False)


def test_ls_of_an_empty_bucket_is_empty(fs, bucket):
    assert fs.ls(bucket) == []


def test_find_lists_all_objects_below(fs, tree):
    assert fs.find(tree) == [f"{tree}/{name}" for name in ("a", "b/c", "b/d/e", "b/d/f", "bc")]
    assert fs.find(f"{tree}/b") == [f"{tree}/{name}" for name in ("b/c", "b/d/e", "b/d/f")]
    assert fs.find(f"{tree}/a") == [f"{tree}/a"]
    assert fs.find(f"{tree}/missing") == []


def test_find_goes_as_deep_as_told(fs, tree):
    assert fs.find(tree, maxdepth=1) == [f"{tree}/a", f"{tree}/bc"]
    assert f"{tree}/b/d" in fs.find(tree, withdirs=True)


def test_listing_goes_over_all_pages(fs, bucket):
    fs.pipe({f"{bucket}/{i:04}": b"" for i in range(1005)})

    assert len(fs.find(bucket)) == len(fs.ls(bucket)) == 1005
    fs.rm(f"{bucket}/*")
    assert fs.find(bucket) == []


def test_glob_and_walk_follow_fsspec(fs, tree):
    assert fs.glob(f"{tree}/b/**/e") == [f"{tree}/b/d/e"]
    assert fs.glob(f"{tree}/b*") == [f"{tree}/b", f"{tree}/bc"]
    assert [(path, sorted(files)) for path, _, files in fs.walk(tree)] == [
        (tree, ["a", "bc"]),
        (f"{tree}/b", ["c"]),
        (f"{tree}/b/d", ["e", "f"]),
    ]


def test_directory_markers_are_no_objects(fs, bucket):
    _put_marker(fs, bucket, "folder/")

    assert fs.find(bucket) == []
    assert fs.ls(f"{bucket}/folder") == []
    assert fs.isdir(f"{bucket}/folder")


# ---------------------------------------------------------------------- writing


def test_pipe_writes_one_and_several(fs, bucket):
    fs.pipe(f"{bucket}/one", b"1")
    fs.pipe({f"{bucket}/{i}": bytes([i]) * i for i in range(100)} | {f"{bucket}/large": bytes(PART + 1)})

    assert fs.cat_file(f"{bucket}/one") == b"1"
    assert all(fs.cat_file(f"{bucket}/{i}") == bytes([i]) * i for i in range(100))
    assert fs.info(f"{bucket}/large")["size"] == PART + 1


@pytest.mark.parametrize(
    "value",
    [array.array("i", range(100)), np.arange(12.0).reshape(3, 4), bytearray(b"bytes"), memoryview(b"bytes")],
    ids=["array", "2-d", "bytearray", "memoryview"],
)
def test_pipe_writes_any_memory(fs, bucket, value):
    fs.pipe({f"{bucket}/key": value})
    fs.pipe_file(f"{bucket}/other", value)

    assert fs.cat_file(f"{bucket}/key") == fs.cat_file(f"{bucket}/other") == memoryview(value).tobytes()


def test_pipe_replaces_unless_told_to_create(fs, key):
    fs.pipe_file(key, b"new")
    for create in (fs.pipe_file, fs.pipe):
        with pytest.raises(errors.AlreadyExists, match=f"^{key}: "):
            create(key, b"newer", mode="create")

    assert fs.cat_file(key) == b"new"


def test_failed_pipe_of_several_names_the_one(fs, bucket):
    with pytest.raises(errors.NotFound, match=r"^s3://missing-bucket: "):
        fs.pipe({f"{bucket}/one": b"1", "s3://missing-bucket/two": b"2"})


def test_copy_stays_when_its_source_goes(fs, key, bucket):
    fs.cp_file(key, f"{bucket}/a copy+ü")
    fs.rm_file(key)

    assert fs.cat_file(f"{bucket}/a copy+ü") == CONTENT


def test_copy_of_a_missing_object_is_not_found(fs, bucket):
    with pytest.raises(errors.NotFound, match=f"^{bucket}/missing: "):
        fs.cp_file(f"{bucket}/missing", f"{bucket}/copy")


def test_copy_to_a_missing_bucket_names_that_one(fs, key):
    with pytest.raises(errors.NotFound, match=r"^s3://missing-bucket: "):
        fs.cp_file(key, "s3://missing-bucket/copy")


def test_move_leaves_nothing_behind(fs, key, bucket):
    fs.mv(key, f"{bucket}/moved")

    assert fs.find(bucket) == [f"{bucket[5:]}/moved"]
    assert fs.cat_file(f"{bucket}/moved") == CONTENT


def test_rm_deletes_what_is_named(fs, tree):
    fs.rm([f"{tree}/a", f"{tree}/bc"])
    assert fs.find(tree) == [f"{tree}/{name}" for name in ("b/c", "b/d/e", "b/d/f")]

    fs.rm(f"{tree}/b/d", recursive=True)
    assert fs.find(tree) == [f"{tree}/b/c"]


def test_rm_of_a_pattern_deletes_what_matches(fs, tree):
    fs.rm(f"{tree}/b/d/*")

    assert fs.find(tree) == [f"{tree}/{name}" for name in ("a", "b/c", "bc")]


@pytest.mark.parametrize("recursive", [False, True])
def test_rm_of_nothing_is_not_found(fs, tree, recursive):
    with pytest.raises(errors.NotFound, match=f"{tree}/missing"):
        fs.rm(f"{tree}/missing", recursive=recursive)


def test_rm_of_a_prefix_leaves_no_marker(fs, bucket):
    _put_marker(fs, bucket, "folder/")
    fs.pipe_file(f"{bucket}/folder/key", b"")
    fs.rm(f"{bucket}/folder", recursive=True)

    assert not fs.exists(f"{bucket}/folder")


def test_rm_of_a_prefix_without_recursive_deletes_nothing(fs, tree):
    with pytest.raises(OSError):
        fs.rm(f"{tree}/b")

    assert len(fs.find(f"{tree}/b")) == 3


def test_buckets_are_made_and_removed(fs):
    fs.mkdir("s3://made-here")
    assert fs.exists("s3://made-here")
    fs.makedirs("s3://made-here", exist_ok=True)
    fs.rmdir("s3://made-here")
    assert not fs.exists("s3://made-here")


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_bucket_is_made_in_the_region_of_the_environment(s3, monkeypatch, name):
    monkeypatch.setenv(name, "eu-west-1")
    fs = S3FileSystem(key="testing", secret="testing", endpoint_url=s3.endpoint_url, skip_instance_cache=True)
    bucket = f"in-{name.lower().replace('_', '-')}"
    fs.mkdir(bucket)

    assert fs.client.call("get_bucket_location", bucket, Bucket=bucket)["LocationConstraint"] == "eu-west-1"


def test_prefixes_need_no_making(fs, bucket):
    fs.makedirs(f"{bucket}/a/b")
    fs.mkdir(f"{bucket}/c")
    fs.rmdir(f"{bucket}/c")

    assert fs.find(bucket) == []


def test_bucket_that_is_there_is_not_made_again(fs, bucket):
    for use in (fs.mkdir, fs.makedirs):
        with pytest.raises(errors.AlreadyExists, match=f"^{bucket}: "):
            use(bucket)


def test_bucket_of_a_prefix_is_made_unless_told_otherwise(fs):
    name = str(uuid.uuid4())
    with pytest.raises(errors.NotFound, match=f"^s3://{name}: no such bucket"):
        fs.mkdir(f"{name}/prefix", create_parents=False)
    fs.makedirs(f"{name}/prefix")

    assert fs.exists(name)


def test_prefix_and_bucket_that_are_not_empty_are_not_removed(fs, tree):
    for path in (f"{tree}/b", tree):
        with pytest.raises(errors.S3Error, match=f"^s3://{path}: .*not empty"):
            fs.rmdir(path)

    assert len(fs.find(tree)) == 5


@pytest.mark.parametrize("empty", [False, True])
def test_rm_of_a_bucket_removes_it(fs, tree, empty):
    if empty:
        fs.rm(f"{tree}/**")
    fs.rm(tree, recursive=True)

    assert not fs.exists(tree)


def test_rm_of_an_object_that_shares_its_name_with_a_prefix_removes_both(fs, tree):
    fs.touch(f"{tree}/b")
    fs.rm(f"{tree}/b", recursive=True)

    assert fs.find(tree) == [f"{tree}/a", f"{tree}/bc"]


def test_prefix_is_moved_with_all_below(fs, tree):
    fs.mv(f"{tree}/b", f"{tree}/moved", recursive=True)

    assert fs.cat(f"{tree}/moved", recursive=True) == {
        f"{tree}/moved/{name}": f"b/{name}".encode() for name in ("c", "d/e", "d/f")
    }
    assert not fs.exists(f"{tree}/b")


@pytest.mark.parametrize(
    "use", ["open", "cat_file", "head", "tail", "metadata", "setxattr", "rm", "rm_file", "modified"]
)
def test_prefix_where_an_object_is_meant_is_an_error_that_names_it(any_s3, use):
    fs, bucket = any_s3
    fs.pipe_file(f"{bucket}/prefix/key", CONTENT)
    with pytest.raises(errors.S3Error, match=f"^{bucket}/prefix: "):
        getattr(fs, use)(f"{bucket}/prefix")

    assert fs.cat_file(f"{bucket}/prefix/key") == CONTENT


def test_block_is_read_between_delimiters(fs, bucket):
    fs.pipe_file(f"{bucket}/lines", b"one\ntwo\nthree\n")

    assert fs.read_block(f"{bucket}/lines", 2, 4, delimiter=b"\n") == b"two\n"


def test_files_are_put_and_got(fs, bucket, tmp_path):
    (tmp_path / "local").write_bytes(CONTENT)
    fs.put(str(tmp_path / "local"), f"{bucket}/remote")
    fs.get(f"{bucket}/remote", str(tmp_path / "back"))

    assert (tmp_path / "back").read_bytes() == CONTENT


def test_fsspec_helpers_work(fs, bucket):
    fs.write_text(f"{bucket}/text", "ünf")
    fs.touch(f"{bucket}/touched")

    assert fs.read_text(f"{bucket}/text") == "ünf"
    assert (fs.head(f"{bucket}/text", 1), fs.tail(f"{bucket}/text", 1)) == (b"\xc3", b"f")
    assert fs.info(f"{bucket}/touched")["size"] == 0
    assert fs.du(bucket) == 4


def test_gzip_written_by_others_is_read(fs, bucket):
    fs.pipe_file(f"{bucket}/key.gz", gzip.compress(CONTENT))
    with fs.open(f"{bucket}/key.gz", compression="infer") as file:
        assert file.read() == CONTENT


# ---------------------------------------------------------------------- the instance


def test_filesystem_survives_pickling(fs, key):
    again = pickle.loads(pickle.dumps(fs))

    assert again.config == fs.config
    assert again.cat_file(key) == CONTENT


def test_filesystem_is_made_once_for_the_same_options():
    assert S3FileSystem(key="id", secret="one") is S3FileSystem(key="id", secret="one")


def test_filesystem_is_one_for_all_threads():
    made = []
    threads = [threading.Thread(target=lambda: made.append(S3FileSystem(key="id", secret="two"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {id(fs) for fs in made} == {id(S3FileSystem(key="id", secret="two"))}
    assert pickle.loads(pickle.dumps(made[0])) is made[0]
    assert S3FileSystem.current() is made[0]


def test_filesystem_of_a_forked_child_is_its_own():
    parents = S3FileSystem(key="id", secret="three")

    def look():
        assert S3FileSystem(key="id", secret="three") is not parents
        assert S3FileSystem(key="id", secret="three") is S3FileSystem(key="id", secret="three")

    assert in_child(look) == 0


def test_kept_listings_are_right_while_threads_list_and_write(fs, bucket):
    def use(number):
        for turn in range(10):
            name = f"{bucket[5:]}/{number}/{turn}"
            fs.touch(name)
            assert name in fs.ls(f"{bucket}/{number}", detail=False)
            assert f"{bucket[5:]}/{number}" in fs.ls(bucket, detail=False)
            fs.rm_file(name)
            assert not fs.exists(name)

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(use, range(8)))


def test_filesystem_is_another_for_each_secret():
    options = {"key": "id", "endpoint_url": "http://127.0.0.1:9"}
    filesystems = [S3FileSystem(**options, secret="one"), S3FileSystem(**options, secret="two")]

    assert [fs.config.secret for fs in filesystems] == ["one", "two"]


def test_filesystem_is_another_where_the_cache_is_skipped():
    options = {"key": "id", "secret": "secret", "skip_instance_cache": True}

    assert S3FileSystem(**options) is not S3FileSystem(**options)


def test_unknown_option_is_a_value_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="storage_options has no 'endpoint': did you mean 'endpoint_url'"):
        S3FileSystem(endpoint="http://127.0.0.1")


@pytest.mark.parametrize("uri", ["s3://bucket/key", "s3a://bucket/key"])
def test_uris_of_s3_are_ours(uri):
    fs, path = resolve(uri)

    assert isinstance(fs, S3FileSystem)
    assert path == "bucket/key"
    assert fs.unstrip_protocol(path) == "s3://bucket/key"


def test_filesystem_works_behind_fsspecs_open_files(fs, key):
    file = fsspec.core.OpenFile(fs, key, mode="rb")
    with file as opened:
        assert opened.read() == CONTENT


def test_threads_share_a_filesystem(fs, bucket):
    contents = {f"{bucket}/{i}": os.urandom(1000) for i in range(8)}
    wrong = []

    def use(path):
        fs.pipe_file(path, contents[path])
        wrong.extend(path for _ in range(5) if fs.cat_file(path) != contents[path] or fs.info(path)["size"] != 1000)

    threads = [threading.Thread(target=use, args=[path]) for path in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert fs.cat(list(contents)) == {path[5:]: content for path, content in contents.items()}


@pytest.mark.parametrize("left_out", ["ETag", "Last_Modified"])
def test_object_of_a_server_that_says_less_is_read(left_out):
    with (
        Faults(repeat(edit(**{left_out: None})), objects={"/bucket/key": CONTENT}) as server,
        S3FileSystem(**server.storage_options).open("s3://bucket/key") as file,
    ):
        assert file.read() == CONTENT


# ---------------------------------------------------------------------- who is asked, and how


def test_wrong_secret_is_access_denied(rclone):
    bucket = rclone.create_bucket(os.urandom(8).hex())
    fs = S3FileSystem(**rclone.storage_options | {"secret": "wrong"})

    for use in (fs.cat_file, fs.info, fs.exists, fs.ls, fs.open, lambda path: fs.pipe_file(path, b"")):
        with pytest.raises(errors.AccessDenied, match=f"^{bucket}/.*check the credentials"):
            use(f"{bucket}/key")


def test_wrong_key_id_is_access_denied(rclone):
    bucket = rclone.create_bucket(os.urandom(8).hex())
    fs = S3FileSystem(**rclone.storage_options | {"key": "wrong"})

    for use in (fs.cat_file, fs.info, fs.ls, lambda path: fs.pipe_file(path, b"")):
        with pytest.raises(errors.AccessDenied, match=f"^{bucket}/"):
            use(f"{bucket}/key")


def test_no_credentials_are_an_error_before_any_request():
    with Faults() as server:
        fs = S3FileSystem(endpoint_url=server.endpoint_url)
        for use in (fs.cat_file, fs.info, fs.ls, fs.open, lambda path: fs.pipe_file(path, b"")):
            with pytest.raises(errors.NoCredentials, match=r"^s3://bucket/key/?: .*AWS_ACCESS_KEY_ID"):
                use("s3://bucket/key")

        assert server.requests == []


def test_credentials_of_the_environment_are_used(rclone, monkeypatch):
    bucket = rclone.create_bucket(os.urandom(8).hex())
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "rclone-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "rclone-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", rclone.endpoint_url)
    fs = S3FileSystem(skip_instance_cache=True)
    fs.pipe_file(f"{bucket}/key", CONTENT)

    assert fs.cat_file(f"{bucket}/key") == CONTENT
    assert fs.info(f"{bucket}/key")["size"] == len(CONTENT)


def test_endpoint_for_s3_of_the_environment_is_used(rclone, monkeypatch):
    bucket = rclone.create_bucket(os.urandom(8).hex())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", rclone.endpoint_url)
    fs = S3FileSystem(key="rclone-id", secret="rclone-secret", skip_instance_cache=True)
    fs.pipe_file(f"{bucket}/key", CONTENT)

    assert fs.cat_file(f"{bucket}/key") == CONTENT
    assert fs.ls(bucket, detail=True)[0]["size"] == len(CONTENT)


@pytest.mark.parametrize("by", ["AWS_PROFILE", "profile="])
def test_profile_is_used(rclone, monkeypatch, tmp_path, by):
    bucket = rclone.create_bucket(os.urandom(8).hex())
    lines = [
        "[profile team]",
        "aws_access_key_id = rclone-id",
        "aws_secret_access_key = rclone-secret",
        "region = eu-west-1",
        f"endpoint_url = {rclone.endpoint_url}",
    ]
    (tmp_path / "config").write_text("\n".join(lines))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    if by == "AWS_PROFILE":
        monkeypatch.setenv("AWS_PROFILE", "team")
    options = {"profile": "team"} if by == "profile=" else {}
    fs = S3FileSystem(**options, skip_instance_cache=True)
    fs.pipe_file(f"{bucket}/key", CONTENT)

    assert fs.cat_file(f"{bucket}/key") == CONTENT
    assert fs.info(f"{bucket}/key")["size"] == len(CONTENT)


def test_unknown_profile_is_an_error_that_names_it():
    fs = S3FileSystem(profile="nobody")

    for use in (fs.cat_file, fs.info):
        with pytest.raises(errors.NoCredentials, match="nobody"):
            use("s3://bucket/key")


def test_bucket_of_another_account_is_access_denied_and_named(tmp_path):
    (tmp_path / "local").write_bytes(CONTENT)
    with Faults(repeat(answer(403, "AccessDenied"))) as server:
        fs = S3FileSystem(**server.storage_options)
        for use in (
            fs.cat_file,
            fs.cat,
            fs.info,
            fs.ls,
            fs.find,
            fs.exists,
            fs.open,
            fs.rm,
            fs.rm_file,
            fs.touch,
            fs.metadata,
            lambda path: fs.read_into(path, 0, bytearray(1)),
            lambda path: fs.get(path, str(tmp_path / "got")),
            lambda path: fs.put(str(tmp_path / "local"), path),
            lambda path: fs.cp(path, "other/key"),
            lambda path: fs.mv(path, "other/key"),
            lambda path: fs.rm([path, "bucket/other"]),
            lambda path: fs.open(path, "ab"),
            lambda path: fs.pipe(path, bytes(6 * MIB)),
        ):
            with pytest.raises(errors.AccessDenied, match=r"^s3://bucket.*: check the credentials") as caught:
                use("s3://bucket/key")
            assert caught.value.errno == errno.EACCES
            assert caught.value.filename.startswith("s3://bucket")
        for use in (fs.isdir, fs.isfile):
            assert not use("s3://bucket/key")
    assert [path.name for path in tmp_path.iterdir()] == ["local"]


def test_anonymous_reads_what_is_public_only(fs, s3, bucket):
    fs.client.call("put_object", bucket, Bucket=bucket[5:], Key="public", Body=CONTENT, ACL="public-read")
    fs.pipe_file(f"{bucket}/private", CONTENT)
    stranger = S3FileSystem(anon=True, endpoint_url=s3.endpoint_url)

    assert stranger.cat_file(f"{bucket}/public") == CONTENT
    assert stranger.info(f"{bucket}/public")["size"] == len(CONTENT)
    for use in (stranger.cat_file, stranger.info):
        with pytest.raises(errors.AccessDenied):
            use(f"{bucket}/private")


def test_bucket_is_reached_by_its_host(s3, fs, bucket):
    options = s3.storage_options | {"endpoint_url": s3.endpoint_url.replace("127.0.0.1", "localhost")}
    virtual = S3FileSystem(**options, addressing_style="virtual", part_size=PART)
    virtual.pipe({f"{bucket}/a key": CONTENT})

    assert virtual.client.target(bucket[5:], bucket).host.startswith(bucket[5:])
    assert fs.cat_file(f"{bucket}/a key") == CONTENT
    assert virtual.cat_file(f"{bucket}/a key", 3, 9) == CONTENT[3:9]


def test_tls_trusts_the_given_certificates(rclone_tls):
    fs = S3FileSystem(**rclone_tls.storage_options, part_size=PART)
    bucket = rclone_tls.create_bucket(os.urandom(8).hex())
    content = os.urandom(3 * PART + 1)
    fs.pipe_file(f"{bucket}/key", content)

    assert fs.cat_file(f"{bucket}/key") == content
    assert fs.cat_file(f"{bucket}/key", 3, 9) == content[3:9]
    assert fs.info(f"{bucket}/key")["size"] == len(content)


def test_tls_trusts_the_certificates_of_the_environment(rclone_tls, monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", rclone_tls.ca_file)
    fs = S3FileSystem(
        key="rclone-id", secret="rclone-secret", endpoint_url=rclone_tls.endpoint_url, skip_instance_cache=True
    )
    bucket = rclone_tls.create_bucket(os.urandom(8).hex())
    fs.pipe_file(f"{bucket}/key", CONTENT)

    assert fs.cat_file(f"{bucket}/key") == CONTENT
    assert fs.info(f"{bucket}/key")["size"] == len(CONTENT)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_tls_trusts_anybody_where_told_to(rclone_tls):
    fs = S3FileSystem(**rclone_tls.storage_options | {"client_kwargs": {"verify": False}})
    bucket = rclone_tls.create_bucket(os.urandom(8).hex())
    fs.pipe_file(f"{bucket}/key", CONTENT)

    assert fs.cat_file(f"{bucket}/key") == CONTENT
    assert fs.info(f"{bucket}/key")["size"] == len(CONTENT)


def test_tls_of_a_stranger_is_an_error_that_says_what_to_set_and_is_not_tried_again(rclone_tls, caplog):
    caplog.set_level(logging.DEBUG, "torch_s3")
    fs = S3FileSystem(**rclone_tls.storage_options | {"client_kwargs": {}})

    for use in (fs.cat_file, fs.info, fs.ls, lambda path: fs.pipe_file(path, b"")):
        with pytest.raises(errors.TransferFailed, match=r"^s3://bucket/key/?.*: .*AWS_CA_BUNDLE"):
            use("s3://bucket/key")
    assert "again in" not in caplog.text


def test_tls_certificate_of_another_host_is_an_error(rclone_tls):
    options = rclone_tls.storage_options
    fs = S3FileSystem(
        **options | {"endpoint_url": options["endpoint_url"].replace("127.0.0.1", "127.0.0.2")}, attempts=2
    )

    with pytest.raises(errors.TransferFailed):
        fs.cat_file("s3://bucket/key")


def test_missing_certificate_file_is_an_error_that_names_it():
    with Faults() as server:
        fs = S3FileSystem(
            key="id",
            secret="secret",
            endpoint_url=server.endpoint_url.replace("http:", "https:"),
            client_kwargs={"verify": "/no/such/ca.pem"},
            attempts=2,
        )
        for use in (fs.cat_file, fs.info):
            with pytest.raises(errors.S3Error, match=r"/no/such/ca\.pem"):
                use("s3://bucket/key")


def test_unreachable_endpoint_is_transfer_failed():
    with Faults() as server:
        pass
    fs = S3FileSystem(**server.storage_options, attempts=2)

    for use in (fs.cat_file, fs.info, fs.ls, fs.open, lambda path: fs.pipe_file(path, b"")):
        with pytest.raises(errors.TransferFailed, match=r"^s3://bucket/key") as caught:
            use("s3://bucket/key")
        assert len(str(caught.value)) < 200


# ---------------------------------------------------------------------- secrets

CANARIES = {"key": "AKIDCANARY", "secret": "SECRETCANARY", "token": "TOKENCANARY"}


def _echo(exchange):
    """Refuse as S3 does, with what it was sent."""
    said = "".join(f"{name}: {value}\n" for name, value in exchange.fields.items())
    body = (
        "<Error><Code>SignatureDoesNotMatch</Code><Message>The signature does not match.</Message>"
        f"<AWSAccessKeyId>AKIDCANARY</AWSAccessKeyId><CanonicalRequest>{said}</CanonicalRequest></Error>"
    ).encode()
    refused = Answer(403, {"Content-Length": str(len(body))}, body)
    exchange.send(refused.head, b"" if exchange.method == "HEAD" else refused.body)


@pytest.mark.parametrize("fault", [_echo, answer(503, "SlowDown"), stall], ids=["403", "503", "stall"])
def test_secrets_are_in_no_error_and_no_log(caplog, fault):
    caplog.set_level(logging.DEBUG, "torch_s3")
    shown = []
    with Faults(repeat(fault)) as server:
        options = server.storage_options | CANARIES
        fs = S3FileSystem(**options, attempts=2, first_byte_timeout=0.5, read_timeout=0.5)
        for use in (fs.cat_file, fs.info, fs.ls, lambda path: fs.pipe_file(path, b"")):
            with pytest.raises(errors.S3Error) as caught:
                use("s3://bucket/key")
            error = caught.value
            shown += [str(error), repr(error), repr(error.__dict__), *traceback.format_exception(error)]
            shown.append(str(pickle.dumps(error)))
    shown += [repr(fs), str(fs), repr(fs.config), repr(fs.client), str(fs.client.target("bucket", "s3://bucket"))]

    assert "CANARY" not in "".join(shown) + caplog.text


def test_pickles_carry_only_secrets_that_were_given(s3, key, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", CANARIES["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARIES["secret"])
    monkeypatch.setenv("AWS_SESSION_TOKEN", CANARIES["token"])
    fs = S3FileSystem(endpoint_url=s3.endpoint_url)
    with fs.open(key) as reader:
        reader.read(1)
        for one in (fs, fs.client, fs.config, reader):
            assert b"CANARY" not in pickle.dumps(one)
        assert "CANARY" not in str(fs.to_dict(include_password=True)) + fs.to_json() + repr(reader) + repr(vars(fs))

    given = pickle.dumps(S3FileSystem(**CANARIES))
    assert all(secret.encode() in given for secret in CANARIES.values())


def test_secrets_that_were_given_are_in_dicts_that_ask_for_them_alone():
    fs = S3FileSystem(**CANARIES)

    assert fs.to_dict()["secret"] == CANARIES["secret"]
    assert "CANARY" not in str(fs.to_dict(include_password=False)) + fs.to_json(include_password=False)
    assert "CANARY" not in repr(fs) + str(fs) + repr(fs.config) + repr(fs.client) + repr(hash(fs)) + fs._fs_token


def test_secrets_are_in_no_error_about_options():
    for options in (CANARIES | {"secrets": "SECRETCANARY"}, {"key": "AKIDCANARY"}, CANARIES | {"anon": True}):
        with pytest.raises(ValueError) as caught:
            S3FileSystem(**options)

        assert "CANARY" not in "".join(traceback.format_exception(caught.value))


def test_package_says_its_version():
    assert torch_s3.__version__.count(".") == 2
