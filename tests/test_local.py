import errno
import io
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import uuid
from itertools import chain, repeat
from pathlib import Path

import pytest
from faults import Faults, aim, answer, cut, edit, in_turn, serve, stall
from fsspec.callbacks import Callback

from torch_s3 import S3FileSystem, errors

MIB = 1024 * 1024
PART = 5 * MIB


@pytest.fixture
def fs(s3):
    return S3FileSystem(**s3.storage_options, part_size=PART)


@pytest.fixture
def bucket(fs):
    name = str(uuid.uuid4())
    fs.mkdir(name)
    return name


class Progress(Callback):
    """Keeps what it and its children are told."""

    def __init__(self):
        super().__init__()
        self.children = {}

    def branched(self, path_1, path_2, **_):
        return self.children.setdefault((path_1, path_2), Callback())


# ---------------------------------------------------------------------- get


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART + 1])
def test_object_of_any_size_is_got_whole(fs, bucket, tmp_path, size):
    content = os.urandom(size)
    fs.pipe_file(f"{bucket}/key", content)
    fs.get(f"{bucket}/key", str(tmp_path / "got"))

    assert (tmp_path / "got").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["got"]


def test_many_objects_are_got_at_once(fs, bucket, tmp_path):
    contents = {f"{number:03}": os.urandom(number) for number in range(150)}
    fs.pipe({f"{bucket}/many/{name}": content for name, content in contents.items()})
    before = fs.stats()["requests"]
    fs.get(f"{bucket}/many", str(tmp_path / "got"), recursive=True)

    assert {path.name: path.read_bytes() for path in (tmp_path / "got").iterdir()} == contents
    assert fs.stats()["requests"] < before + len(contents) + 20  # no HEAD before each GET


def test_large_object_is_got_in_bounded_memory(fs, bucket, tmp_path):
    size = 26 * PART
    fs.pipe_file(f"{bucket}/key", bytes(size))
    tracemalloc.start()
    try:
        fs.get_file(f"{bucket}/key", str(tmp_path / "got"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert (tmp_path / "got").stat().st_size == size
    assert peak < 19 * PART


def test_progress_of_get_is_told_in_files_and_bytes(fs, bucket, tmp_path):
    fs.pipe({f"{bucket}/in/small": b"12345", f"{bucket}/in/large": bytes(2 * PART + 1)})
    progress = Progress()
    fs.get(f"{bucket}/in/", str(tmp_path), recursive=True, callback=progress)

    told = {Path(remote).name: (child.size, child.value) for (remote, _), child in progress.children.items()}
    assert told["small"] == (5, 5)
    assert told["large"] == (2 * PART + 1, 2 * PART + 1)
    assert progress.size == progress.value == len(progress.children)


def test_progress_of_one_file_is_told_in_bytes(fs, bucket, tmp_path):
    fs.pipe_file(f"{bucket}/key", b"12345")
    (got, put) = (Callback(), Callback())
    fs.get_file(f"{bucket}/key", str(tmp_path / "got"), callback=got)
    fs.put_file(str(tmp_path / "got"), f"{bucket}/put", callback=put)

    assert (got.size, got.value) == (put.size, put.value) == (5, 5)


def test_object_is_got_into_an_open_file(fs, bucket):
    fs.pipe_file(f"{bucket}/key", b"content")
    file = io.BytesIO()
    fs.get_file(f"{bucket}/key", file)
    fs.get_file(f"{bucket}/key", None, outfile=file)

    assert file.getvalue() == b"contentcontent"


def test_missing_folders_are_made(fs, bucket, tmp_path):
    fs.pipe_file(f"{bucket}/key", b"content")
    fs.get_file(f"{bucket}/key", str(tmp_path / "a" / "b" / "got"))

    assert (tmp_path / "a" / "b" / "got").read_bytes() == b"content"


def test_file_that_is_replaced_keeps_its_mode_and_links(fs, bucket, tmp_path):
    fs.pipe_file(f"{bucket}/key", b"content")
    (tmp_path / "got").touch(mode=0o640)
    (tmp_path / "link").symlink_to("got")
    fs.get_file(f"{bucket}/key", str(tmp_path / "link"))

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "got").read_bytes() == b"content"
    assert (tmp_path / "got").stat().st_mode & 0o777 == 0o640


def test_new_file_has_the_mode_of_any_new_file(fs, bucket, tmp_path):
    fs.pipe_file(f"{bucket}/key", b"content")
    fs.get_file(f"{bucket}/key", str(tmp_path / "got"))
    (tmp_path / "new").touch()

    assert (tmp_path / "got").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_device_stays_one(fs, bucket):
    fs.pipe_file(f"{bucket}/key", b"content")
    fs.get_file(f"{bucket}/key", os.devnull)

    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("use", ["get", "get_file"])
def test_get_of_what_is_missing_is_not_found_and_leaves_nothing(fs, bucket, tmp_path, use):
    with pytest.raises(errors.NotFound, match=f"^s3://{bucket}/missing"):
        getattr(fs, use)(f"{bucket}/missing", str(tmp_path / "got"))

    assert list(tmp_path.iterdir()) == []


def test_get_from_a_missing_bucket_is_not_found(fs, tmp_path):
    with pytest.raises(errors.NotFound, match=r"^s3://missing-bucket: no such bucket"):
        fs.get_file("missing-bucket/key", str(tmp_path / "got"))


def test_get_that_breaks_off_leaves_what_was_there(tmp_path):
    (tmp_path / "got").write_bytes(b"before")
    objects = {"/bucket/key": bytes(3 * PART)}
    with Faults(chain([edit()], repeat(answer(403))), objects=objects) as server:
        fs = S3FileSystem(**server.storage_options, part_size=PART)
        with pytest.raises(errors.AccessDenied, match=r"^s3://bucket/key"):
            fs.get_file("bucket/key", str(tmp_path / "got"))

    assert (tmp_path / "got").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["got"]


def test_object_that_changes_while_it_is_got_is_an_error(fs, bucket, tmp_path):
    fs.pipe_file(f"{bucket}/key", bytes(20 * PART))

    class Overwrite(Callback):
        def set_size(self, size):
            fs.pipe_file(f"{bucket}/key", os.urandom(20 * PART))

    with pytest.raises(errors.ObjectChanged, match=f"^s3://{bucket}/key"):
        fs.get_file(f"{bucket}/key", str(tmp_path / "got"), callback=Overwrite())
    assert list(tmp_path.iterdir()) == []


def test_folder_in_the_way_is_an_error_that_names_both(fs, bucket, tmp_path):
    fs.pipe_file(f"{bucket}/key", b"content")
    with pytest.raises(IsADirectoryError, match=re.escape(f"s3://{bucket}/key): '{tmp_path}'")):
        fs.get_file(f"{bucket}/key", str(tmp_path))


def test_file_where_a_folder_should_be_is_an_error_that_names_both(fs, bucket, tmp_path):
    fs.pipe_file(f"{bucket}/key", b"content")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=re.escape(f"s3://{bucket}/key): '{tmp_path}/file'")):
        fs.get_file(f"{bucket}/key", str(tmp_path / "file" / "got"))


def test_full_disk_is_an_error_that_names_both_and_leaves_nothing(fs, s3, bucket, tmp_path):
    fs.pipe_file(f"{bucket}/key", bytes(3 * PART))
    script = f"""
        import resource, torch_s3
        resource.setrlimit(resource.RLIMIT_FSIZE, ({PART}, {PART}))
        fs = torch_s3.S3FileSystem(**{s3.storage_options!r}, part_size={PART})
        try:
            fs.get("{bucket}/key", "{tmp_path}/got")
        except OSError as error:
            print(error.errno, error)
    """
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)

    assert done.stdout.startswith(
        f"{errno.EFBIG} [Errno {errno.EFBIG}] File too large (while getting s3://{bucket}/key"
    )
    assert done.stdout.endswith(f"'{tmp_path}/got'\n")
    assert list(tmp_path.iterdir()) == []


def test_full_device_is_an_error_that_names_both(fs, bucket):
    fs.pipe_file(f"{bucket}/key", bytes(2 * PART))
    with pytest.raises(OSError, match=re.escape(f"(while getting s3://{bucket}/key): '/dev/full'")) as caught:
        fs.get_file(f"{bucket}/key", "/dev/full")

    assert caught.value.errno == errno.ENOSPC


def test_interrupted_get_leaves_nothing(fs, s3, bucket, tmp_path):
    fs.pipe({f"{bucket}/many/{number}": bytes(3 * PART) for number in range(3)})

    def interrupt(exchange):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        stall(exchange)

    fault = aim("get", in_turn(serve, cut(body=0.5, then=interrupt), stall))
    with Faults(repeat(fault), upstream=s3.endpoint_url) as proxy:
        options = s3.storage_options | {"endpoint_url": proxy.endpoint_url}
        with pytest.raises(KeyboardInterrupt):
            S3FileSystem(**options, part_size=PART, read_timeout=600.0).get(
                [f"{bucket}/many/{number}" for number in range(3)], str(tmp_path / "got")
            )

    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size != 3 * PART]


@pytest.mark.parametrize("size", [1, 2 * PART])
def test_interrupted_put_publishes_nothing(s3, fs, bucket, tmp_path, size):
    (tmp_path / "local").write_bytes(bytes(size))

    def interrupt(exchange):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        stall(exchange)

    fault = aim("put" if size == 1 else "part", interrupt)
    with Faults(repeat(fault), upstream=s3.endpoint_url) as proxy:
        options = s3.storage_options | {"endpoint_url": proxy.endpoint_url}
        with pytest.raises(KeyboardInterrupt):
            S3FileSystem(**options, part_size=PART, first_byte_timeout=600.0).put(
                str(tmp_path / "local"), f"{bucket}/key"
            )

    assert fs.find(bucket) == []
    assert "Uploads" not in fs.client.call("list_multipart_uploads", bucket, Bucket=bucket)


# ---------------------------------------------------------------------- put


def test_many_files_are_put_at_once(fs, bucket, tmp_path):
    contents = {f"{number:03}": os.urandom(number) for number in range(150)} | {"large": os.urandom(2 * PART + 1)}
    (tmp_path / "folder" / "empty").mkdir(parents=True)
    for name, content in contents.items():
        (tmp_path / "folder" / name).write_bytes(content)
    progress = Progress()
    fs.put(str(tmp_path / "folder"), f"{bucket}/put", recursive=True, callback=progress)

    assert fs.cat(f"{bucket}/put", recursive=True) == {f"{bucket}/put/{name}": contents[name] for name in contents}
    told = {Path(local).name: (child.size, child.value) for (local, _), child in progress.children.items()}
    assert {name: told[name] for name in contents} == {name: (len(contents[name]),) * 2 for name in contents}
    assert progress.value == progress.size


def test_large_file_is_put_in_bounded_memory(fs, bucket, tmp_path):
    size = 20 * PART
    with (tmp_path / "local").open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        fs.put(str(tmp_path / "local"), f"{bucket}/key")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert fs.info(f"{bucket}/key")["size"] == size
    assert peak < 8 * PART


def test_put_of_a_missing_file_is_not_found_and_leaves_what_was_there(fs, bucket, tmp_path):
    fs.pipe_file(f"{bucket}/key", b"before")
    for use in (fs.put, fs.put_file):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/missing")):
            use(str(tmp_path / "missing"), f"{bucket}/key")

    assert fs.cat_file(f"{bucket}/key") == b"before"


def test_put_that_fails_while_it_reads_leaves_what_was_there(fs, bucket, tmp_path):
    fs.pipe_file(f"{bucket}/key", b"before")
    with (tmp_path / "local").open("wb") as file:
        file.truncate(3 * PART)

    class Fail(Callback):
        def relative_update(self, inc=1):
            raise OSError(errno.EIO, "the disk is broken")

    with pytest.raises(OSError, match="the disk is broken"):
        fs.put_file(str(tmp_path / "local"), f"{bucket}/key", callback=Fail())
    assert fs.cat_file(f"{bucket}/key") == b"before"
    assert "Uploads" not in fs.client.call("list_multipart_uploads", f"s3://{bucket}", Bucket=bucket)


@pytest.mark.parametrize("size", [1, PART + 1])
def test_put_replaces_unless_told_to_create(fs, bucket, tmp_path, size):
    (tmp_path / "local").write_bytes(bytes(size))
    fs.put(str(tmp_path / "local"), f"{bucket}/key")
    for use in (fs.put, fs.put_file):
        with pytest.raises(errors.AlreadyExists, match=f"^s3://{bucket}/key"):
            use(str(tmp_path / "local"), f"{bucket}/key", mode="create")


def test_put_to_a_missing_bucket_is_not_found(fs, tmp_path):
    (tmp_path / "local").write_bytes(b"content")
    with pytest.raises(errors.NotFound, match=r"^s3://missing-bucket: no such bucket"):
        fs.put(str(tmp_path / "local"), "missing-bucket/key")
