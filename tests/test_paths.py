import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_s3.paths import parent, prefix_of, split_path, trimmed

BUCKETS = [
    "bucket",
    "dotted.bucket",
    "name-abcdefghijklmnopqrstuvwxyz-s3alias",
    "bucket--usw2-az1--x-s3",
    "arn:aws:s3:eu-west-1:123456789012:accesspoint/name",
    "arn:aws:s3:eu-west-1:123456789012:accesspoint:name",
    "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/name",
    "arn:aws:s3::123456789012:accesspoint/name.mrap",
    "arn:aws:s3-object-lambda:eu-west-1:123456789012:accesspoint/name",
    "arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-1/accesspoint/name",
    "arn:aws:s3-outposts:eu-west-1:123456789012:outpost:op-1:accesspoint:name",
]


@pytest.mark.parametrize("bucket", BUCKETS)
def test_path_is_bucket_and_key(bucket):
    assert split_path(f"{bucket}/some/key") == (bucket, "some/key")


@pytest.mark.parametrize("bucket", BUCKETS)
def test_bucket_alone_has_no_key(bucket):
    assert split_path(bucket) == split_path(f"{bucket}/") == (bucket, "")


@given(st.sampled_from(BUCKETS), st.text())
def test_key_is_as_it_stands(bucket, key):
    assert split_path(f"{bucket}/{key}") == (bucket, key)


def test_nothing_is_the_empty_path():
    assert split_path("") == ("", "")


PATHS = st.text("ab/", min_size=1, max_size=8).map(lambda path: f"bucket/{path}")


@given(PATHS)
def test_directory_has_one_path(path):
    assert trimmed(trimmed(path)) == trimmed(path)
    assert trimmed(prefix_of(trimmed(path))) == trimmed(path)


@given(PATHS)
def test_parents_lead_up_to_the_bucket_one_slash_at_a_time(path):
    above, slashes = parent(path), path.removesuffix("/").count("/")
    for _ in range(slashes):
        assert path.startswith(prefix_of(above))
        above, below = parent(above), above
    assert (below, above) == ("bucket", "")


def test_everything_is_in_the_directory_before_its_last_slash():
    assert [parent(path) for path in ("b/a", "b/a/c", "b/a//c", "b/a//", "b//", "b///", "b")] == [
        "b",
        "b/a",
        "b/a//",
        "b/a",
        "b",
        "b//",
        "",
    ]
