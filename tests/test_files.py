import array
import gc
import gzip
import io
import os
import pickle
import tarfile
import uuid
from itertools import repeat

import numpy as np
import pytest
from faults import Faults, answer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import in_child, program

from torch_s3 import errors
from torch_s3.filesystem import S3FileSystem

MIB = 1024 * 1024
PART = 5 * MIB
LARGE = os.urandom(3 * MIB + 7)


@pytest.fixture
def fs(s3):
    return S3FileSystem(**s3.storage_options, part_size=PART)


@pytest.fixture
def bucket(fs):
    """As everywhere, but made without a new boto3 client, which takes longer than most of the tests here."""
    name = str(uuid.uuid4())
    fs.mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def open_uploads(fs, bucket):
    """The bucket's multipart uploads that are neither published nor aborted."""

    def list_them():
        answer = fs.client.call("list_multipart_uploads", bucket, Bucket=bucket[5:])
        return [upload["Key"] for upload in answer.get("Uploads", [])]

    return list_them


@pytest.fixture(scope="module")
def large(rclone):
    """A file of an object with the content `LARGE`, from a server that is fast."""
    rclone.create_bucket("large")
    (rclone.root / "large" / "object").write_bytes(LARGE)
    return S3FileSystem(**rclone.storage_options).open("s3://large/object")


@pytest.fixture
def text(fs, bucket):
    fs.pipe_file(f"{bucket}/text", "one\ntwo\r\nünf\n\nlast".encode())
    return f"{bucket}/text"


# ---------------------------------------------------------------------- reading

POSITIONS = st.integers(0, len(LARGE) + 10)
LENGTHS = st.one_of(st.integers(0, 10), st.integers(0, len(LARGE) + 10))
STEPS = st.one_of(
    st.tuples(st.just("seek"), POSITIONS, st.just(io.SEEK_SET)),
    st.tuples(st.just("seek"), POSITIONS.map(lambda position: -position), st.just(io.SEEK_END)),
    st.tuples(st.just("seek"), st.integers(-1000, 1000), st.just(io.SEEK_CUR)),
    st.tuples(st.just("read"), LENGTHS),
    st.tuples(st.just("read1"), LENGTHS),
    st.tuples(st.just("readline"), LENGTHS),
    st.tuples(st.just("readinto"), LENGTHS),
    st.tuples(st.sampled_from(["read", "readline"])),
)


def _do(file, name, *arguments):
    """What a step gives, in a form that compares."""
    try:
        if name == "readinto":
            buffer = bytearray(arguments[0])
            count = file.readinto(buffer)
            return count, bytes(buffer[:count]), file.tell()
        return getattr(file, name)(*arguments), file.tell()
    except ValueError:
        return "refused", file.tell()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.lists(STEPS, max_size=8))
def test_reader_reads_as_a_file_does(large, steps):
    reference = io.BytesIO(LARGE)
    large.seek(0)
    for step in steps:
        if step[0] == "seek" and [0, reference.tell(), len(LARGE)][step[2]] + step[1] < 0:
            continue  # BytesIO stops at 0, files and we refuse
        assert _do(large, *step) == _do(reference, *step), step


def test_reader_refuses_to_seek_before_the_start(large):
    large.seek(5)
    with pytest.raises(ValueError, match="cannot seek to byte -1"):
        large.seek(-6, io.SEEK_CUR)

    assert large.tell() == 5


def test_reader_refuses_an_unknown_whence(large):
    with pytest.raises(ValueError):
        large.seek(0, 9)


def test_reader_peeks_without_moving(large):
    large.seek(100)

    assert large.peek(10)[:10] == LARGE[100:110]
    assert large.tell() == 100
    assert large.read(10) == LARGE[100:110]


def test_reader_peeks_nothing_at_the_end(large):
    large.seek(0, whence=io.SEEK_END)

    assert large.peek(10) == b""


@pytest.mark.parametrize("length", [0, 1, 65_535, 65_536, 65_537, 262_143, 262_144, 262_145, 2 * MIB, len(LARGE)])
def test_readinto_fills_exactly(large, length):
    buffer = bytearray(b"?" * (length + 10))
    large.seek(5)

    count = large.readinto(memoryview(buffer)[:length])

    assert count == min(length, len(LARGE) - 5)
    assert buffer[:count] == LARGE[5 : 5 + count]
    assert set(buffer[count:]) == {ord("?")}


def test_readinto_fills_arrays_of_any_shape(large):
    wanted = np.zeros((3, 5, 7), np.float32)
    large.seek(0)

    assert large.readinto(wanted) == wanted.nbytes
    assert wanted.tobytes() == LARGE[: wanted.nbytes]


def test_readinto_nothing_reads_nothing(large):
    large.seek(3)

    assert large.readinto(np.zeros((0, 3))) == 0
    assert large.tell() == 3


@pytest.mark.parametrize("length", [10, MIB])
def test_readinto_readonly_memory_is_a_type_error(large, length):
    large.seek(0)
    with pytest.raises((TypeError, BufferError)):
        large.readinto(bytes(length))


def test_reading_on_in_order_takes_few_requests():
    content = os.urandom(4 * MIB)
    with Faults(objects={"/bucket/key": content}) as server:
        with S3FileSystem(**server.storage_options).open("s3://bucket/key") as file:
            read = b"".join(iter(lambda: file.read(10_000), b""))

        assert read == content
        assert len(server.requests) < 12


def test_small_header_before_each_large_record_takes_one_round_trip_a_record():
    content = os.urandom(3 * MIB)
    with Faults(objects={"/bucket/key": content}) as server:
        with S3FileSystem(**server.storage_options).open("s3://bucket/key") as file:
            file.read(100)
            file.readinto(bytearray(MIB))
            before = len(server.requests)
            file.read(100)

        assert len(server.requests) == before


def test_reader_of_an_empty_object(fs, bucket):
    fs.pipe_file(f"{bucket}/empty", b"")
    with fs.open(f"{bucket}/empty") as file:
        assert (file.read(), file.read(1), file.readinto(bytearray(1)), file.peek(), file.readlines()) == (
            b"",
            b"",
            0,
            b"",
            [],
        )


def test_closed_reader_refuses(text, fs):
    with fs.open(text) as file:
        pass

    for read in (file.read, file.readline, lambda: file.readinto(bytearray(1))):
        with pytest.raises(ValueError, match="closed"):
            read()


def test_reader_refuses_to_write(text, fs):
    with fs.open(text) as file, pytest.raises(io.UnsupportedOperation):
        file.write(b"")


def test_reader_reads_one_version(fs, bucket):
    fs.pipe_file(f"{bucket}/key", b"1" * MIB)
    with fs.open(f"{bucket}/key") as file:
        file.read(1)
        fs.pipe_file(f"{bucket}/key", b"2" * MIB)

        with pytest.raises(errors.ObjectChanged):
            file.read()


def test_reader_reads_one_version_of_servers_that_ignore_if_match(rclone):
    rclone.create_bucket("versions")
    (rclone.root / "versions" / "key").write_bytes(b"1" * MIB)
    with S3FileSystem(**rclone.storage_options).open("s3://versions/key") as file:
        file.read(1)
        (rclone.root / "versions" / "key").write_bytes(b"2" * MIB)

        with pytest.raises(errors.ObjectChanged):
            file.read()


def test_reader_of_a_missing_object_is_not_found_at_once(fs, bucket):
    with pytest.raises(errors.NotFound, match=f"^{bucket}/missing: "):
        fs.open(f"{bucket}/missing")


def test_reader_of_a_prefix_is_not_found(fs, bucket):
    fs.pipe_file(f"{bucket}/folder/key", b"")
    with pytest.raises(errors.NotFound, match="prefix"):
        fs.open(f"{bucket}/folder")


def test_reader_goes_on_in_a_forked_child(large):
    def read_in_child():
        assert large.read() == LARGE[10:]

    large.seek(0)
    large.read(10)

    assert in_child(read_in_child) == 0
    assert large.read(10) == LARGE[10:20]


def test_lines_of_text(fs, text):
    with fs.open(text, "r", encoding="utf-8") as file:
        assert file.readlines() == ["one\n", "two\n", "ünf\n", "\n", "last"]


def test_lines_of_bytes(fs, text):
    with fs.open(text) as file:
        assert list(file) == [b"one\n", b"two\r\n", "ünf\n".encode(), b"\n", b"last"]


def test_text_options_are_those_of_open(fs, text):
    with fs.open(text, "rt", encoding="latin-1", newline="") as file:
        assert file.read() == "one\ntwo\r\nÃ¼nf\n\nlast"


def test_compressed_text_is_read(fs, bucket):
    fs.pipe_file(f"{bucket}/text.gz", gzip.compress(b"text"))
    with fs.open(f"{bucket}/text.gz", "r", compression="infer") as file:
        assert file.read() == "text"


def test_reader_pickles_as_the_version_it_reads_and_its_place(fs, text):
    with fs.open(text) as reader:
        reader.read(4)
        again = pickle.loads(pickle.dumps(reader))

        assert again.fs is fs
        assert (again.tell(), again.readline(), reader.tell()) == (4, b"two\r\n", 4)
        other = pickle.loads(pickle.dumps(reader))
        fs.pipe_file(text, b"something else")
        with pytest.raises(errors.ObjectChanged):
            other.read()


def test_closed_reader_is_not_pickled(fs, text):
    reader = fs.open(text)
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        pickle.dumps(reader)


@pytest.mark.parametrize("mode", ["rb", "wb", "xb", "ab"])
def test_files_tell_their_mode_and_name(fs, bucket, text, mode):
    with fs.open(text if mode == "rb" else f"{bucket}/new", mode) as file:
        assert file.mode == mode
        assert file.name == (text if mode == "rb" else f"{bucket}/new")


def test_tar_is_written_and_read_in_place(fs, bucket):
    with fs.open(f"{bucket}/tar", "wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
        member = tarfile.TarInfo("member")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"text"))
    with fs.open(f"{bucket}/tar") as file, tarfile.open(fileobj=file) as tar:
        assert tar.extractfile("member").read() == b"text"


def test_writers_are_not_pickled(fs, bucket):
    with fs.open(f"{bucket}/new", "wb") as writer, pytest.raises(TypeError, match="pickle"):
        pickle.dumps(writer)


# ---------------------------------------------------------------------- writing


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART, 2 * PART + 1])
def test_written_object_has_what_was_written(fs, bucket, open_uploads, size):
    content = os.urandom(size)
    with fs.open(f"{bucket}/key", "wb") as file:
        file.write(content)

    assert fs.cat_file(f"{bucket}/key") == content
    assert open_uploads() == []


@pytest.mark.parametrize("piece", [1_000_003, 7 * MIB])
def test_writes_of_any_size_make_one_object(fs, bucket, piece):
    content = os.urandom(31 * MIB + 3)  # more parts than are in flight
    with fs.open(f"{bucket}/key", "wb") as file:
        for at in range(0, len(content), piece):
            assert file.write(content[at : at + piece]) == min(piece, len(content) - at)
            assert file.tell() == min(at + piece, len(content))

    assert fs.cat_file(f"{bucket}/key") == content


def test_memory_that_was_written_may_be_used_again(fs, bucket):
    buffer = bytearray(2 * MIB)
    with fs.open(f"{bucket}/key", "wb") as file:
        for i in range(16):
            buffer[:] = bytes([i]) * len(buffer)
            file.write(buffer)

    assert fs.cat_file(f"{bucket}/key") == b"".join(bytes([i]) * len(buffer) for i in range(16))


@pytest.mark.parametrize(
    "data",
    [
        np.arange(100, dtype=np.int64).reshape(4, 25),
        np.zeros((0, 3)),
        array.array("d", range(100)),
        memoryview(b"bytes"),
        bytearray(b"bytes"),
        b"",
    ],
    ids=["2-d", "empty 2-d", "array", "memoryview", "bytearray", "bytes"],
)
def test_any_contiguous_memory_is_written(fs, bucket, data):
    with fs.open(f"{bucket}/key", "wb") as file:
        assert file.write(data) == memoryview(data).nbytes

    assert fs.cat_file(f"{bucket}/key") == memoryview(data).tobytes()


def test_text_is_not_written_as_bytes(fs, bucket):
    with pytest.raises(TypeError), fs.open(f"{bucket}/key", "wb") as file:
        file.write("text")

    assert not fs.exists(f"{bucket}/key")


def test_object_appears_only_when_its_file_is_closed(fs, bucket):
    with fs.open(f"{bucket}/key", "wb") as file:
        file.write(bytes(2 * PART))
        file.flush()
        assert not fs.exists(f"{bucket}/key")

    assert fs.exists(f"{bucket}/key")


def test_writer_is_closed_once(fs, bucket):
    file = fs.open(f"{bucket}/key", "wb")
    file.write(b"first")
    file.close()
    fs.pipe_file(f"{bucket}/key", b"second")
    file.close()

    assert fs.cat_file(f"{bucket}/key") == b"second"


def test_closed_writer_refuses(fs, bucket):
    with fs.open(f"{bucket}/key", "wb") as file:
        pass

    with pytest.raises(ValueError, match="closed"):
        file.write(b"")


def test_writer_refuses_to_read_and_seek(fs, bucket):
    with fs.open(f"{bucket}/key", "wb") as file:
        assert not file.seekable()
        for refused in (file.read, lambda: file.seek(0)):
            with pytest.raises(io.UnsupportedOperation):
                refused()


def test_writer_knows_the_version_it_published(fs, bucket):
    for size in (1, PART + 1):
        with fs.open(f"{bucket}/key", "wb") as file:
            file.write(bytes(size))

        assert file.etag == fs.info(f"{bucket}/key")["ETag"]


SIZES = pytest.mark.parametrize(
    "size", [0, 1, PART, PART + 1, 3 * PART], ids=["nothing", "a byte", "a part", "more than a part", "three parts"]
)


@SIZES
def test_exception_in_the_block_publishes_nothing(fs, bucket, open_uploads, size):
    fs.pipe_file(f"{bucket}/key", b"before")
    with pytest.raises(ZeroDivisionError), fs.open(f"{bucket}/key", "wb") as file:
        file.write(bytes(size))
        raise ZeroDivisionError

    assert fs.cat_file(f"{bucket}/key") == b"before"
    assert open_uploads() == []
    assert file.closed


@SIZES
def test_discarded_file_publishes_nothing(fs, bucket, open_uploads, size):
    with fs.open(f"{bucket}/key", "wb") as file:
        file.write(bytes(size))
        file.discard()

    assert not fs.exists(f"{bucket}/key")
    assert open_uploads() == []


@SIZES
def test_collected_file_publishes_nothing(fs, bucket, open_uploads, size):
    file = fs.open(f"{bucket}/key", "wb")
    file.write(bytes(size))
    file.itself = file
    del file
    gc.collect()

    assert not fs.exists(f"{bucket}/key")
    assert open_uploads() == []


def test_collected_text_publishes_nothing(fs, bucket, open_uploads):
    file = fs.open(f"{bucket}/key", "w")
    file.write("x" * (2 * PART))
    file.flush()
    del file
    gc.collect()

    assert not fs.exists(f"{bucket}/key")
    assert open_uploads() == []


def test_file_that_nobody_closed_delays_no_exit_and_leaves_no_upload(s3, bucket, open_uploads):
    text = f"""
        file = fs.open("{bucket}/key", "wb")
        file.write(bytes(2 * {PART} + 1))
    """
    with program(text, s3.storage_options | {"part_size": PART}) as process:
        written = process.communicate(timeout=40)

    assert (process.returncode, *written) == (0, "", "")
    assert open_uploads() == []


def test_file_of_a_failed_transfer_publishes_nothing(fs, bucket, open_uploads):
    fs = S3FileSystem(**fs.storage_options, attempts=1)
    file = fs.open(f"{bucket}/key", "wb")
    file.write(bytes(PART + 1))
    fs.client.call("abort_multipart_upload", bucket, Bucket=bucket[5:], Key="key", UploadId=file._upload.id)
    with pytest.raises(errors.S3Error), file:  # moto answers 500, S3 404
        file.write(bytes(6 * PART))

    assert file.closed
    assert not fs.exists(f"{bucket}/key")
    assert open_uploads() == []


def test_failed_write_in_one_piece_is_an_error_at_close():
    with Faults(repeat(answer(403, "AccessDenied"))) as server:
        file = S3FileSystem(**server.storage_options).open("s3://bucket/key", "wb")
        file.write(b"content")
        with pytest.raises(errors.AccessDenied, match=r"^s3://bucket/key: "):
            file.close()

        assert file.closed
        assert server.objects == {}


def test_write_to_a_missing_bucket_is_not_found(fs):
    for size in (1, 2 * PART):
        with pytest.raises(errors.NotFound, match=r"^s3://no-such-bucket: "):
            fs.pipe_file("s3://no-such-bucket/key", bytes(size))


def test_forked_childs_copy_of_a_file_leaves_its_parents_alone(fs, bucket):
    files = [fs.open(f"{bucket}/key", "wb")]
    files[0].write(bytes(PART) + b"1")

    def drop():
        files[0].discard()
        files.clear()
        gc.collect()

    assert in_child(drop) == 0
    files[0].write(b"2")
    files[0].close()
    assert fs.cat_file(f"{bucket}/key") == bytes(PART) + b"12"


def test_forked_child_may_not_publish_its_parents_file(fs, bucket):
    file = fs.open(f"{bucket}/key", "wb")
    file.write(b"1")

    def publish():
        with pytest.raises(RuntimeError):
            file.close()

    assert in_child(publish) == 0
    assert not fs.exists(f"{bucket}/key")
    file.close()
    assert fs.cat_file(f"{bucket}/key") == b"1"


@pytest.mark.parametrize("size", [1, 2 * PART])
def test_exclusive_file_is_published_where_there_is_none(fs, bucket, size):
    with fs.open(f"{bucket}/key", "xb") as file:
        file.write(bytes(size))

    assert fs.info(f"{bucket}/key")["size"] == size


@pytest.mark.parametrize("size", [1, 2 * PART])
def test_exclusive_file_replaces_nothing(fs, bucket, open_uploads, size):
    fs.pipe_file(f"{bucket}/key", b"before")
    with pytest.raises(errors.AlreadyExists, match=f"^{bucket}/key: "), fs.open(f"{bucket}/key", "xb") as file:
        file.write(bytes(size))

    assert fs.cat_file(f"{bucket}/key") == b"before"
    assert open_uploads() == []


@pytest.mark.parametrize("mode", ["r+b", "r+", "w+b", "a+b", "rw", "q"])
def test_other_modes_are_a_value_error(fs, bucket, mode):
    with pytest.raises(ValueError):
        fs.open(f"{bucket}/key", mode)


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize("mode", ["w", "wt", "x", "xt"])
def test_text_is_written(fs, bucket, mode):
    with fs.open(f"{bucket}/key", mode, encoding="utf-16-le", newline="\r\n") as file:
        file.write("ein\nzwö")

    assert fs.cat_file(f"{bucket}/key") == "ein\r\nzwö".encode("utf-16-le")


def test_exclusive_text_replaces_nothing(fs, bucket):
    fs.pipe_file(f"{bucket}/key", b"before")
    with pytest.raises(errors.AlreadyExists), fs.open(f"{bucket}/key", "x") as file:
        file.write("after")

    assert fs.cat_file(f"{bucket}/key") == b"before"


def test_exception_in_the_block_of_a_text_publishes_nothing(fs, bucket):
    with pytest.raises(ZeroDivisionError), fs.open(f"{bucket}/key", "w") as file:
        file.write("text")
        raise ZeroDivisionError

    assert not fs.exists(f"{bucket}/key")


def test_text_that_cannot_be_encoded_publishes_nothing(fs, bucket):
    with pytest.raises(UnicodeEncodeError), fs.open(f"{bucket}/key", "w", encoding="ascii") as file:
        file.write("fine")
        file.write("ünf")

    assert not fs.exists(f"{bucket}/key")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_unknown_encoding_is_a_lookup_error_and_nothing_else(fs, bucket):
    with pytest.raises(LookupError):
        fs.open(f"{bucket}/key", "w", encoding="klingon")
    gc.collect()


# ---------------------------------------------------------------------- fsspec's transactions and compression


@pytest.mark.parametrize(("mode", "content"), [("wb", b"content"), ("w", "content")])
def test_transaction_publishes_all_of_its_files_at_its_end(fs, bucket, mode, content):
    with fs.transaction:
        for name in ("one", "two", "three"):
            with fs.open(f"{bucket}/{name}", mode) as file:
                file.write(content)
        assert fs.find(bucket) == []

    assert list(fs.cat([f"{bucket}/{name}" for name in ("one", "two", "three")]).values()) == [b"content"] * 3


@pytest.mark.parametrize(("mode", "content"), [("wb", b"content"), ("w", "content")])
def test_exception_in_a_transaction_publishes_nothing(fs, bucket, open_uploads, mode, content):
    with pytest.raises(ZeroDivisionError), fs.transaction:
        for name in ("one", "two"):
            with fs.open(f"{bucket}/{name}", mode) as file:
                file.write(content * MIB)
        raise ZeroDivisionError

    assert fs.find(bucket) == []
    assert open_uploads() == []


@pytest.mark.parametrize(("mode", "content"), [("wb", b"content"), ("wt", "content")])
def test_compressed_file_is_published_or_refused(fs, bucket, mode, content):
    """fsspec's compressors don't close the file below them: it must not silently be dropped."""
    try:
        with fs.open(f"{bucket}/key.gz", mode, compression="gzip") as file:
            file.write(content)
    except ValueError:
        return
    del file

    assert gzip.decompress(fs.cat_file(f"{bucket}/key.gz")) == b"content"


def test_exception_in_the_block_of_a_compressed_file_publishes_nothing(fs, bucket):
    with pytest.raises((ZeroDivisionError, ValueError)), fs.open(f"{bucket}/key.gz", "wb", compression="gzip") as file:
        file.write(b"content")
        raise ZeroDivisionError
    file = None
    gc.collect()

    assert not fs.exists(f"{bucket}/key.gz")
