import os
import uuid
from itertools import repeat

import pytest
from faults import Faults, aim, answer, in_turn, lose, serve

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
    settings = {
        "ContentType": "text/csv",
        "Metadata": {"a": "b"},
        "StorageClass": "STANDARD_IA",
        "Tagging": "x+y=z%2F1",
    }
    fs.client.call("put_object", f"s3://{bucket}", Body=CONTENT, **settings, **place)
    return place


def copy(fs, source, **changed):
    head = fs.client.call("head_object", f"s3://{source['Bucket']}", **source)
    target = {"Bucket": source["Bucket"], "Key": "copy"}
    copying.copy_by_parts(fs.client, source, target, head | changed, part_size=5 * MIB)
    return fs.client.call("head_object", f"s3://{source['Bucket']}", **target)


def test_copy_by_parts_is_whole_and_keeps_metadata_storage_class_and_tags(fs, source):
    head = copy(fs, source)

    assert fs.cat_file(f"{source['Bucket']}/copy") == CONTENT
    assert head["ETag"].endswith('-3"')
    assert (head["ContentType"], head["StorageClass"]) == ("text/csv", "STANDARD_IA")
    assert fs.metadata(f"{source['Bucket']}/copy") == {"a": "b"}
    where = {"Bucket": source["Bucket"], "Key": "copy"}
    tags = fs.client.call("get_object_tagging", f"s3://{source['Bucket']}", **where)["TagSet"]
    assert tags == [{"Key": "x y", "Value": "z/1"}]


def test_copy_by_parts_whose_tags_may_not_be_read_is_access_denied(s3, source):
    def deny(exchange):
        (answer(403, "AccessDenied") if "?tagging" in exchange.target else serve)(exchange)

    with Faults(repeat(deny), upstream=s3.endpoint_url) as proxy, pytest.raises(errors.AccessDenied):
        copy(S3FileSystem(**s3.storage_options | {"endpoint_url": proxy.endpoint_url}), source)


def test_copy_by_parts_whose_answer_is_lost_is_done(s3, fs, source):
    with Faults(repeat(aim("complete", in_turn(lose, serve))), upstream=s3.endpoint_url) as proxy:
        copy(S3FileSystem(**s3.storage_options | {"endpoint_url": proxy.endpoint_url}), source)

        assert [method for method, _ in proxy.requests].count("POST") == 3  # it began once, and ended twice
    assert fs.cat_file(f"{source['Bucket']}/copy") == CONTENT
    assert fs.metadata(f"{source['Bucket']}/copy") == {"a": "b"}


def test_copy_by_parts_that_was_never_completed_is_an_error_and_leaves_nothing(s3, fs, source):
    fs.pipe_file(f"{source['Bucket']}/copy", b"before")
    fault = aim("complete", answer(404, "NoSuchUpload"))
    with Faults(repeat(fault), upstream=s3.endpoint_url) as proxy, pytest.raises(errors.NotFound):
        copy(S3FileSystem(**s3.storage_options | {"endpoint_url": proxy.endpoint_url}), source)

    assert fs.cat_file(f"{source['Bucket']}/copy") == b"before"
    listed = fs.client.call("list_multipart_uploads", "s3://", Bucket=source["Bucket"])
    assert "Uploads" not in listed


def test_source_that_changes_while_it_is_copied_by_parts_is_an_error(s3, fs, source):
    fault = aim("part", in_turn(serve, answer(412, "PreconditionFailed")))
    with Faults(repeat(fault), upstream=s3.endpoint_url) as proxy, pytest.raises(errors.ObjectChanged):
        copy(S3FileSystem(**s3.storage_options | {"endpoint_url": proxy.endpoint_url}), source)

    assert "Uploads" not in fs.client.call("list_multipart_uploads", "s3://", Bucket=source["Bucket"])


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
