import bz2
import gc
import gzip
import hashlib
import io
import os
import threading
import uuid
from contextlib import closing
from itertools import repeat

import fsspec
import pytest
from faults import Faults, aim, answer, in_turn, lose, serve

from torch_s3 import S3FileSystem, errors

PART = 5 * 1024 * 1024


@pytest.fixture
def fs(s3):
    return S3FileSystem(**s3.storage_options, part_size=PART)


@pytest.fixture
def path(fs):
    """Of an object with the content `b"before"`."""
    bucket = str(uuid.uuid4())
    fs.mkdir(bucket)
    fs.pipe_file(f"{bucket}/key", b"before")
    return f"{bucket}/key"


class Mishap(Exception):
    pass


# ---------------------------------------------------------------------- appending


@pytest.mark.parametrize("size", [0, 1, PART, 2 * PART + 1])
def test_append_keeps_what_is_there(fs, path, size):
    content = os.urandom(size)
    fs.pipe_file(path, content)
    with fs.open(path, "ab") as file:
        assert file.tell() == size
        file.write(b" and more")

    assert fs.cat_file(path) == content + b" and more"


def test_append_to_nothing_writes_anew(fs, path):
    with fs.open(f"{path}-new", "a") as file:
        file.write("text")

    assert fs.cat_file(f"{path}-new") == b"text"


def test_append_that_fails_leaves_what_was_there(fs, path):
    with pytest.raises(Mishap), fs.open(path, "ab") as file:
        file.write(b" and more")
        raise Mishap

    assert fs.cat_file(path) == b"before"


@pytest.mark.parametrize("size", [1, PART + 1])
def test_append_keeps_all_that_the_object_carries(fs, path, size):
    bucket, key = path.split("/")
    where = {"Bucket": bucket, "Key": key}
    settings = {"ContentType": "text/csv", "CacheControl": "no-store", "Metadata": {"a": "b"}, "Tagging": "x+y=z%2F1"}
    fs.client.call("put_object", path, **where, **settings, StorageClass="STANDARD_IA", Body=bytes(size))
    with fs.open(path, "ab") as file:
        file.write(b"more")

    head = fs.client.call("head_object", path, **where)
    assert (head["ContentType"], head["CacheControl"], head["StorageClass"]) == ("text/csv", "no-store", "STANDARD_IA")
    assert fs.metadata(path) == {"a": "b"}
    assert fs.client.call("get_object_tagging", path, **where)["TagSet"] == [{"Key": "x y", "Value": "z/1"}]
    assert fs.cat_file(path) == bytes(size) + b"more"


@pytest.mark.parametrize("size", [1, PART + 1])
@pytest.mark.parametrize("change", [lambda fs, path: fs.pipe_file(path, b"other"), lambda fs, path: fs.rm_file(path)])
def test_append_to_what_somebody_else_changes_is_an_error_and_changes_nothing(fs, path, size, change):
    fs.pipe_file(path, bytes(size))
    with pytest.raises(errors.ObjectChanged, match=f"^s3://{path}: "), fs.open(path, "ab") as file:
        file.write(b"more")
        change(fs, path)

    assert fs.find(path) == [] or fs.cat_file(path) == b"other"
    bucket = path.partition("/")[0]
    assert "Uploads" not in fs.client.call("list_multipart_uploads", path, Bucket=bucket)


def test_append_is_published_on_condition(s3, path):
    conditions = []

    def note(exchange):
        conditions.append(exchange.fields.get("if-match"))
        answer(412, "PreconditionFailed")(exchange)

    with Faults(repeat(aim("put", note)), upstream=s3.endpoint_url) as proxy:
        fs = S3FileSystem(**s3.storage_options | {"endpoint_url": proxy.endpoint_url})
        with pytest.raises(errors.ObjectChanged), fs.open(path, "ab") as file:
            file.write(b"more")

    assert conditions == [f'"{hashlib.md5(b"before").hexdigest()}"']


@pytest.mark.parametrize(("kind", "size"), [("put", 1), ("complete", PART + 1)])
def test_append_whose_answer_is_lost_is_done(s3, fs, path, kind, size):
    fs.pipe_file(path, bytes(size))
    with Faults(repeat(aim(kind, in_turn(lose, serve))), upstream=s3.endpoint_url) as proxy:
        through = S3FileSystem(**s3.storage_options | {"endpoint_url": proxy.endpoint_url}, part_size=PART)
        with through.open(path, "ab") as file:
            file.write(b"more")

    assert fs.cat_file(path) == bytes(size) + b"more"
    assert fs.metadata(path) == {}


# ---------------------------------------------------------------------- compression


@pytest.mark.parametrize(("name", "compression"), [("key.gz", "infer"), ("key", "gzip"), ("key.bz2", "infer")])
def test_compressed_object_is_written(fs, path, name, compression):
    with fs.open(f"{path}/{name}", "wb", compression=compression) as file:
        file.write(b"content")
    opened = {"key.bz2": bz2}.get(name, gzip)

    assert opened.decompress(fs.cat_file(f"{path}/{name}")) == b"content"


def test_compressed_text_is_written(fs, path):
    with fs.open(f"{path}.gz", "w", compression="infer", encoding="utf-16") as file:
        file.write("ünf")

    assert gzip.decompress(fs.cat_file(f"{path}.gz")).decode("utf-16") == "ünf"


def test_no_compression_is_inferred_from_a_plain_name(fs, path):
    with fs.open(path, "wb", compression="infer") as file:
        file.write(b"content")

    assert fs.cat_file(path) == b"content"


@pytest.mark.parametrize("mode", ["wb", "w"])
def test_compressed_object_is_dropped_after_an_exception(fs, path, mode):
    with pytest.raises(Mishap), fs.open(path, mode, compression="gzip") as file:
        file.write(b"content" if mode == "wb" else "content")
        raise Mishap

    assert fs.cat_file(path) == b"before"


def test_compressed_object_that_nobody_closed_is_dropped(fs, path):
    file = fs.open(path, "wb", compression="gzip")
    file.write(b"content")
    del file
    gc.collect()

    assert fs.cat_file(path) == b"before"


# ---------------------------------------------------------------------- blocks of others


def opened(fs, path, mode, **settings):
    """As `fsspec.open` opens it."""
    return fsspec.core.OpenFile(fs, path, mode, **settings)


@pytest.mark.parametrize("mode", ["wb", "w"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_exception_in_a_block_of_fsspecs_drops_the_object(fs, path, mode, compression):
    with pytest.raises(Mishap), opened(fs, path, mode, compression=compression, encoding="ascii") as file:
        file.write(b"content" if mode == "wb" else "content")
        raise Mishap

    assert fs.cat_file(path) == b"before"


def test_exception_in_a_block_that_closes_the_file_drops_the_object(fs, path):
    with pytest.raises(Mishap), closing(fs.open(path, "wb")) as file:
        file.write(b"content")
        raise Mishap

    assert fs.cat_file(path) == b"before"


def test_clean_block_within_the_handling_of_an_exception_publishes(fs, path):
    try:
        raise Mishap
    except Mishap:
        with opened(fs, path, "wb") as file:
            file.write(b"content")

    assert fs.cat_file(path) == b"content"


def test_close_within_the_handling_of_an_exception_publishes(fs, path):
    file = fs.open(path, "wb")
    try:
        raise Mishap
    except Mishap:
        file.write(b"failed")
        file.close()

    assert fs.cat_file(path) == b"failed"


def test_report_that_an_exit_writes_is_published(fs, path):
    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *given):
            with opened(fs, path, "w") as file:
                file.write(repr(given[1]))

    with pytest.raises(Mishap), Run():
        raise Mishap

    assert fs.cat_file(path) == b"Mishap()"


# ---------------------------------------------------------------------- transactions


def write_some(fs, path):
    """By every way there is."""
    with fs.open(f"{path}/opened", "wb") as file:
        file.write(b"content")
    with fs.open(f"{path}/text", "w") as file:
        file.write("content")
    fs.pipe({f"{path}/piped": b"content"})
    fs.pipe_file(f"{path}/large", bytes(PART + 1))


def test_transaction_publishes_at_its_end(fs, path, tmp_path):
    (tmp_path / "local").write_bytes(b"content")
    with fs.transaction:
        write_some(fs, path)
        fs.put(str(tmp_path / "local"), f"{path}/put")
        assert fs.find(f"{path}/") == [path]

    assert fs.cat(f"{path}/*")[f"{path}/large"] == bytes(PART + 1)
    names = ("large", "opened", "piped", "put", "text")
    assert fs.ls(path, detail=False) == [f"{path}/{name}" for name in names]


def test_transaction_is_its_threads_own(fs, path):
    with fs.transaction:
        fs.pipe_file(path, b"at the end")
        thread = threading.Thread(target=fs.pipe_file, args=[f"{path}-other", b"at once"])
        thread.start()
        thread.join()

        assert fs.cat_file(f"{path}-other") == b"at once"
        assert fs.cat_file(path) == b"before"
    assert fs.cat_file(path) == b"at the end"


def test_transaction_with_an_exception_publishes_nothing(fs, path):
    with pytest.raises(Mishap), fs.transaction:
        write_some(fs, path)
        raise Mishap

    assert fs.ls(path, detail=False) == [path]
    bucket = path.partition("/")[0]
    assert "Uploads" not in fs.client.call("list_multipart_uploads", f"s3://{bucket}", Bucket=bucket)
    fs.pipe_file(path, b"after")
    assert fs.cat_file(path) == b"after"


# ---------------------------------------------------------------------- new objects only


def test_new_object_is_refused_at_once_where_there_is_one(fs, path):
    with pytest.raises(errors.AlreadyExists, match=f"^s3://{path}: "):
        fs.open(path, "xb")
    with pytest.raises(errors.AlreadyExists, match=f"^s3://{path}: "):
        fs.touch(path, truncate=False)

    assert fs.cat_file(path) == b"before"


def test_compressed_file_of_a_transaction_is_published_with_it(fs, path):
    with fs.transaction, fs.open(f"{path}.gz", "wb", compression="infer") as file:
        file.write(b"content")

    assert gzip.decompress(fs.cat_file(f"{path}.gz")) == b"content"


@pytest.mark.parametrize("wrap", [io.BufferedWriter, io.TextIOWrapper])
def test_wrapped_writer_that_nobody_closed_publishes_nothing(fs, path, wrap):
    file = wrap(fs.open(path, "wb"))
    file.write("text" if wrap is io.TextIOWrapper else b"bytes")
    del file
    gc.collect()

    assert fs.cat_file(path) == b"before"
