import os
import uuid

import pytest

from torch_s3 import S3FileSystem, copying, errors

MIB = 1024 * 1024
CONTENT = os.urandom(11 * MIB)


@pytest.fixture
def fs(s3):
    return S3FileSystem(**s3.storage_options)


@pytest.fixture
def source(fs):
    """The parameters of an object with metadata."""
    bucket = str(uuid.uuid4())
    fs.mkdir(bucket)
    place = {"Bucket": bucket, "Key": "source ü"}
    fs.client.call("put_object", f"s3://{bucket}", Body=CONTENT, ContentType="text/csv", Metadata={"a": "b"}, **place)
    return place


def copy(fs, source, **changed):
    head = fs.client.call("head_object", f"s3://{source['Bucket']}", **source)
    target = {"Bucket": source["Bucket"], "Key": "copy"}
    copying.copy_by_parts(fs.client, source, target, head | changed, part_size=5 * MIB)
    return fs.client.call("head_object", f"s3://{source['Bucket']}", **target)


def test_copy_by_parts_is_whole_and_keeps_metadata(fs, source):
    head = copy(fs, source)

    assert fs.cat_file(f"{source['Bucket']}/copy") == CONTENT
    assert head["ETag"].endswith('-3"')
    assert (head["ContentType"], fs.metadata(f"{source['Bucket']}/copy")) == ("text/csv", {"a": "b"})


def test_copy_by_parts_that_fails_leaves_nothing(fs, source):
    with pytest.raises(errors.S3Error, match=f"^s3://{source['Bucket']}/copy: "):
        copy(fs, source, ContentLength=len(CONTENT) + 10 * MIB)

    bucket = source["Bucket"]
    assert not fs.exists(f"{bucket}/copy")
    assert "Uploads" not in fs.client.call("list_multipart_uploads", f"s3://{bucket}", Bucket=bucket)


def test_object_too_large_for_one_request_is_copied_by_parts(fs, source, monkeypatch):
    monkeypatch.setattr("torch_s3.upkeep.ONE_REQUEST", 1)
    bucket = source["Bucket"]
    fs.ls(bucket)
    fs.cp_file(f"{bucket}/source ü", f"{bucket}/copy")

    assert fs.cat_file(f"{bucket}/copy") == CONTENT
    assert f"{bucket}/copy" in fs.ls(bucket, detail=False)
