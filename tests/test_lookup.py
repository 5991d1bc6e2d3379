import urllib.request
import uuid
from itertools import repeat

import pytest
from faults import Faults, aim, answer, edit

from torch_s3 import S3FileSystem, errors


@pytest.fixture
def fs(s3):
    fs = S3FileSystem(**s3.storage_options)
    fs.invalidate_cache()
    return fs


@pytest.fixture
def other(s3):
    """A filesystem that `fs` hears nothing of, as in another process."""
    return S3FileSystem(**s3.storage_options, skip_instance_cache=True)


@pytest.fixture
def tree(fs):
    bucket = str(uuid.uuid4())
    fs.mkdir(bucket)
    fs.pipe({f"{bucket}/{name}": name.encode() for name in ("a", "b/c", "b/d/e")})
    return bucket


@pytest.fixture
def versioned(s3, fs, tree):
    """A filesystem that knows of versions, an object and the VersionIds of its contents `b"one"` and `b"second"`."""
    settings = {"Bucket": tree, "VersioningConfiguration": {"Status": "Enabled"}}
    fs.client.call("put_bucket_versioning", f"s3://{tree}", **settings)
    path = f"{tree}/versioned"
    fs.pipe_file(path, b"one")
    fs.pipe_file(path, b"second")
    aware = S3FileSystem(**s3.storage_options, version_aware=True)
    return aware, path, [entry["VersionId"] for entry in aware.object_version_info(path)][::-1]


# ---------------------------------------------------------------------- kept listings


def test_listing_is_asked_for_once(fs, tree):
    fs.ls(tree)
    before = fs.stats()["requests"]

    assert fs.ls(tree, detail=False) == [f"{tree}/a", f"{tree}/b"]
    assert fs.info(f"{tree}/a")["size"] == 1
    assert fs.isdir(f"{tree}/b")
    assert fs.exists(f"{tree}/a")
    assert fs.stats()["requests"] == before


def test_listing_is_the_callers_own(fs, tree):
    fs.ls(tree, detail=True).clear()

    assert len(fs.ls(tree, detail=True)) == 2


@pytest.mark.parametrize("how", ["refresh", "invalidate", "invalidate parent", "invalidate all"])
def test_what_others_wrote_shows_once_asked_for(fs, other, tree, how):
    fs.ls(f"{tree}/b")
    other.pipe_file(f"{tree}/b/new", b"")
    if how != "refresh":
        fs.invalidate_cache({"invalidate": f"{tree}/b", "invalidate parent": tree}.get(how))

    assert f"{tree}/b/new" in fs.ls(f"{tree}/b", detail=False, refresh=how == "refresh")


def test_size_that_others_changed_shows_with_refresh(fs, other, tree):
    fs.ls(tree)
    other.pipe_file(f"{tree}/a", b"longer")

    assert fs.info(f"{tree}/a", refresh=True)["size"] == 6


def test_kept_listing_is_not_believed_about_what_is_missing(fs, other, tree):
    fs.ls(tree)
    other.pipe_file(f"{tree}/new", b"content")

    assert fs.exists(f"{tree}/new")
    assert fs.info(f"{tree}/new")["size"] == 7


def test_kept_listing_never_decides_what_is_read(fs, other, tree, tmp_path):
    fs.ls(tree)
    other.pipe_file(f"{tree}/a", b"longer than it was")

    with fs.open(f"{tree}/a") as file:
        assert file.read() == b"longer than it was"
    assert fs.cat_file(f"{tree}/a", -3) == b"was"
    fs.get(f"{tree}/a", str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == b"longer than it was"


def test_kept_listing_expires(s3, fs, tree, other):
    brief = S3FileSystem(**s3.storage_options, listings_expiry_time=0)
    brief.ls(tree)
    other.rm_file(f"{tree}/a")

    assert brief.ls(tree, detail=False) == [f"{tree}/b"]


def test_no_listing_is_kept_where_told_so(s3, tree, other):
    forgetful = S3FileSystem(**s3.storage_options, use_listings_cache=False)
    forgetful.ls(tree)
    other.rm_file(f"{tree}/a")

    assert forgetful.ls(tree, detail=False) == [f"{tree}/b"]


WRITES = {
    "pipe_file": lambda fs, tree, _: fs.pipe_file(f"{tree}/new", b""),
    "pipe": lambda fs, tree, _: fs.pipe({f"{tree}/new": b""}),
    "open": lambda fs, tree, _: fs.open(f"{tree}/new", "w").close(),
    "touch": lambda fs, tree, _: fs.touch(f"{tree}/new"),
    "deeper": lambda fs, tree, _: fs.touch(f"{tree}/new/er"),
    "cp_file": lambda fs, tree, _: fs.cp_file(f"{tree}/a", f"{tree}/new"),
    "put": lambda fs, tree, local: fs.put(local, f"{tree}/new"),
    "put_file": lambda fs, tree, local: fs.put_file(local, f"{tree}/new"),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_own_write_shows_at_once(fs, tree, tmp_path, write):
    (tmp_path / "local").write_bytes(b"")
    fs.ls(tree)
    write(fs, tree, str(tmp_path / "local"))

    assert f"{tree}/new" in fs.ls(tree, detail=False)


@pytest.mark.parametrize("delete", [S3FileSystem.rm_file, S3FileSystem.rm], ids=["rm_file", "rm"])
def test_own_delete_shows_at_once(fs, tree, delete):
    fs.ls(tree)
    delete(fs, f"{tree}/a")

    assert fs.ls(tree, detail=False) == [f"{tree}/b"]
    assert not fs.exists(f"{tree}/a")


def test_own_recursive_delete_shows_at_once(fs, tree):
    list(fs.walk(tree))
    fs.rm(f"{tree}/b", recursive=True)

    assert fs.ls(tree, detail=False) == [f"{tree}/a"]
    assert not fs.exists(f"{tree}/b/d")


def test_own_bucket_shows_at_once(fs, tree):
    fs.ls("")
    fs.mkdir(f"{tree}-2")
    assert f"{tree}-2" in fs.ls("", detail=False)

    fs.rmdir(f"{tree}-2")
    assert f"{tree}-2" not in fs.ls("", detail=False)


# ---------------------------------------------------------------------- what is there


def test_sizes_add_up_in_one_listing(fs, tree):
    before = fs.stats()["requests"]

    assert fs.du(tree) == 1 + 3 + 5
    assert fs.du(tree, total=False) == {f"{tree}/a": 1, f"{tree}/b/c": 3, f"{tree}/b/d/e": 5}
    assert fs.stats()["requests"] == before + 2


def test_prefixes_are_found_with_their_objects(fs, tree):
    assert fs.find(f"{tree}/b", withdirs=True) == [f"{tree}/{name}" for name in ("b", "b/c", "b/d", "b/d/e")]
    assert fs.find(tree, withdirs=True) == fs.find(tree, maxdepth=9, withdirs=True)


def test_object_and_prefix_of_one_name_are_both_there(fs, tree):
    fs.pipe_file(f"{tree}/b", b"object")

    assert [entry["type"] for entry in fs.ls(tree, detail=True)] == ["file", "file", "directory"]
    assert fs.info(f"{tree}/b")["size"] == fs.info(f"{tree}/b", refresh=True)["size"] == 6
    assert f"{tree}/b" in fs.find(tree)


def test_path_of_a_list_that_is_missing_is_named(fs, tree):
    with pytest.raises(errors.NotFound, match=f"^s3://{tree}/x\\*: nothing is there, nor at the 1 others$"):
        fs.expand_path([f"{tree}/x*", f"{tree}/y*"])


def test_prefix_has_no_date(fs, tree):
    with pytest.raises(errors.NotFound, match=f"^s3://{tree}/b: this is a prefix"):
        fs.modified(f"{tree}/b")


def test_checksum_follows_the_content(fs, other, tree):
    before, key = fs.checksum(f"{tree}/a"), fs.ukey(f"{tree}/a")
    other.pipe_file(f"{tree}/a", b"other")
    assert fs.checksum(f"{tree}/a") != before
    assert fs.ukey(f"{tree}/a") != key

    other.pipe_file(f"{tree}/a", b"a")
    assert fs.checksum(f"{tree}/a") == before


def test_checksum_of_a_server_without_etags_is_a_number():
    with Faults(repeat(edit(ETag=None)), objects={"/bucket/key": b"content"}) as server:
        assert isinstance(S3FileSystem(**server.storage_options).checksum("bucket/key"), int)


# ---------------------------------------------------------------------- versions, metadata, URLs


def test_version_is_read_by_its_id(fs, versioned, tmp_path):
    _, path, (first, _) = versioned

    assert fs.cat_file(path, version_id=first) == b"one"
    assert fs.cat_file(path, -2, version_id=first) == b"ne"
    assert fs.info(path, version_id=first)["size"] == 3
    with fs.open(path, version_id=first) as file:
        assert file.read() == b"one"
    fs.get_file(path, str(tmp_path / "got"), version_id=first)
    assert (tmp_path / "got").read_bytes() == b"one"


def test_version_is_read_by_its_path(versioned, tmp_path):
    aware, path, (first, second) = versioned
    old = f"s3://{path}?versionId={first}"
    memory = bytearray(3)
    aware.read_into(old, 0, memory)
    aware.get_file(old, str(tmp_path / "got"))
    aware.cp_file(old, f"{path}-copy")

    assert aware.cat(old) == aware.cat_ranges([old], 0, 9)[0] == aware.open(old).read() == memory == b"one"
    assert (tmp_path / "got").read_bytes() == aware.cat(f"{path}-copy") == b"one"
    assert (aware.info(old)["VersionId"], aware.info(path)["VersionId"]) == (first, second)
    with urllib.request.urlopen(aware.url(old)) as answer:
        assert answer.read() == b"one"


def test_opened_version_is_read_on_when_overwritten(versioned):
    aware, path, _ = versioned
    with aware.open(path) as file:
        aware.pipe_file(path, b"third")

        assert file.read() == b"second"


def test_version_that_is_missing_is_not_found(fs, versioned):
    _, path, _ = versioned
    for use in (fs.cat_file, fs.info, fs.open):
        with pytest.raises(errors.S3Error, match=f"^s3://{path}"):
            use(path, version_id=str(uuid.uuid4()))


def test_version_is_not_written(versioned):
    aware, path, (first, _) = versioned
    for use in (aware.rm_file, aware.touch, lambda path: aware.pipe({path: b""})):
        with pytest.raises(errors.InvalidUri, match=r"leave \?versionId= out"):
            use(f"{path}?versionId={first}")


def test_question_mark_is_a_character_without_version_aware(fs, tree):
    fs.pipe_file(f"{tree}/key?versionId=1", b"content")

    assert fs.cat_file(f"{tree}/key?versionId=1") == b"content"


def test_metadata_is_set_and_removed_one_by_one(fs, tree):
    settings = {
        "Bucket": tree,
        "Key": "key",
        "Metadata": {"colour": "red", "shape": "round"},
        "ContentType": "text/csv",
    }
    fs.client.call("put_object", f"s3://{tree}/key", Body=b"content", **settings)
    fs.setxattr(f"{tree}/key", colour="blue", shape=None, size="small")

    assert fs.metadata(f"{tree}/key") == {"colour": "blue", "size": "small"}
    assert fs.getxattr(f"{tree}/key", "colour") == "blue"
    assert fs.getxattr(f"{tree}/key", "shape") is None
    assert fs.cat_file(f"{tree}/key") == b"content"
    assert fs.client.call("head_object", f"s3://{tree}/key", Bucket=tree, Key="key")["ContentType"] == "text/csv"


def test_metadata_of_what_changes_meanwhile_is_object_changed(s3, tree):
    with (
        Faults(repeat(aim("put", answer(412, "PreconditionFailed"))), upstream=s3.endpoint_url) as proxy,
        pytest.raises(errors.ObjectChanged, match=f"^s3://{tree}/a: "),
    ):
        S3FileSystem(**s3.storage_options | {"endpoint_url": proxy.endpoint_url}).setxattr(f"{tree}/a", colour="blue")


def test_metadata_that_is_set_leaves_storage_class_and_tags(fs, tree):
    where = {"Bucket": tree, "Key": "key"}
    fs.client.call("put_object", f"s3://{tree}/key", **where, StorageClass="STANDARD_IA", Tagging="x=y", Body=b"")
    fs.setxattr(f"{tree}/key", colour="blue")

    assert fs.client.call("head_object", f"s3://{tree}/key", **where)["StorageClass"] == "STANDARD_IA"
    tags = fs.client.call("get_object_tagging", f"s3://{tree}/key", **where)["TagSet"]
    assert tags == [{"Key": "x", "Value": "y"}]


def test_metadata_is_the_users_only(fs, tree):
    fs.pipe_file(f"{tree}/key", b"", mode="create")

    assert fs.metadata(f"{tree}/key") == {}


def test_signed_url_reads_the_object(fs, tree):
    fs.pipe_file(f"{tree}/a key+ü", b"content")
    for url in (fs.sign(f"{tree}/a key+ü"), fs.url(f"{tree}/a key+ü", expires=60)):
        assert "X-Amz-Signature=" in url
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == b"content"


def test_url_of_anonymous_is_plain(s3):
    stranger = S3FileSystem(anon=True, endpoint_url=s3.endpoint_url)

    assert stranger.url("s3://bucket/a key") == f"{s3.endpoint_url}/bucket/a%20key"


# ---------------------------------------------------------------------- what moves and goes


def test_move_deletes_what_it_copied_and_nothing_else(fs, other, tree):
    fs.ls(f"{tree}/b")
    other.pipe_file(f"{tree}/b/new", b"new")
    fs.mv(f"{tree}/b/*", f"{tree}/moved/")

    assert fs.cat(f"{tree}/moved/new") == b"new"
    assert fs.find(f"{tree}/b", refresh=True) == [f"{tree}/b/d/e"]


def test_move_into_itself_keeps_everything(fs, tree):
    fs.mv(f"{tree}/b", f"{tree}/b/old", recursive=True)

    assert fs.find(f"{tree}/b") == [f"{tree}/b/old/c", f"{tree}/b/old/d/e"]


def test_move_onto_itself_is_refused(fs, tree):
    with pytest.raises(errors.S3Error, match="nothing was moved"):
        fs.mv(f"s3://{tree}/a", f"{tree}/a")

    assert fs.cat(f"{tree}/a") == b"a"


def test_move_of_some_levels_leaves_the_others(fs, tree):
    fs.mv(f"{tree}/b", f"{tree}/moved", recursive=True, maxdepth=1)

    assert fs.cat(f"{tree}/b/d/e") == b"b/d/e"


def test_version_is_not_deleted_by_rm(s3, tree):
    aware = S3FileSystem(**s3.storage_options, version_aware=True)
    with pytest.raises(errors.InvalidUri):
        aware.rm(f"{tree}/a?versionId=1")

    assert aware.cat(f"{tree}/a") == b"a"


def test_name_that_looks_like_a_pattern_is_meant_where_it_exists(fs, tree):
    fs.pipe({f"{tree}/a[1].txt": b"brackets", f"{tree}/a1.txt": b"none"})
    assert fs.cat(f"{tree}/a[1].txt") == b"brackets"
    assert fs.expand_path([f"{tree}/a[1].txt"], recursive=True) == [f"{tree}/a[1].txt"]
    fs.rm(f"{tree}/a[1].txt")

    assert not fs.exists(f"{tree}/a[1].txt", refresh=True)
    assert fs.cat(f"{tree}/a1.txt") == b"none"


def test_listing_that_fails_is_not_taken_for_an_empty_one():
    nobody = S3FileSystem(key="id", secret="secret", endpoint_url="http://127.0.0.1:1", attempts=1)
    for ask in (lambda: nobody.glob("bucket/*"), lambda: list(nobody.walk("bucket")), lambda: nobody.isdir("bucket/a")):
        with pytest.raises(errors.TransferFailed):
            ask()


def test_leading_slash_means_nothing(fs, tree):
    assert fs.ls(f"/{tree}/b", detail=False) == fs.ls(f"{tree}/b", detail=False)
    assert not fs.exists(f"/{tree}/nothing")


def test_options_of_boto3_are_refused_by_open_not_ignored(fs, tree):
    with pytest.raises(TypeError, match="ServerSideEncryption"):
        fs.open(f"{tree}/secret", "wb", ServerSideEncryption="aws:kms")


def test_dict_without_passwords_has_none(s3):
    said = S3FileSystem(**s3.storage_options).to_dict(include_password=False)

    assert "testing" not in str(said)
