"""Trees that a disk could not hold: names that end in slashes, have two in a row, or are a folder's too."""

import uuid

import pytest

from torch_s3 import S3FileSystem, errors

NAMES = ["a", "a/b", "a//b", "a///c", "a/b/d", "folder/", "folder/key", "/leading", "twin", "twin/key", "x//y//z"]


@pytest.fixture
def fs(s3):
    fs = S3FileSystem(**s3.storage_options)
    fs.invalidate_cache()
    return fs


@pytest.fixture
def tree(fs):
    """A bucket with objects of all these names; each contains its name."""
    bucket = str(uuid.uuid4())
    fs.mkdir(bucket)
    fs.pipe({f"{bucket}/{name}": name.encode() for name in NAMES})
    fs.pipe_file(f"{bucket}/marker/", b"")
    return bucket


def paths(tree, *names):
    return sorted(f"{tree}/{name}" for name in names)


def test_each_object_is_found_and_read_by_its_name(fs, tree):
    found = fs.find(tree, detail=True)

    assert sorted(found) == paths(tree, *NAMES)
    for path, entry in found.items():
        content = path.removeprefix(f"{tree}/").encode()
        assert fs.cat(path) == fs.cat([path])[path] == fs.open(path).read() == content
        assert fs.info(path)["size"] == fs.info(path, refresh=True)["size"] == entry["size"] == len(content)
    assert fs.cat(list(found)) == {path: path.removeprefix(f"{tree}/").encode() for path in found}


@pytest.mark.parametrize("keep", [True, False])
def test_walk_and_ls_lead_to_each_object_once(s3, tree, keep):
    fs = S3FileSystem(**s3.storage_options, use_listings_cache=keep)
    walked = [entry["name"] for _, _, files in fs.walk(tree, detail=True) for entry in files.values()]

    assert sorted(walked) == paths(tree, *NAMES)
    assert fs.ls(tree, detail=False) == sorted(
        [*paths(tree, "a", "a", "folder", "marker", "twin", "twin", "x"), f"{tree}//"]
    )
    assert fs.ls(f"{tree}/a", detail=False) == paths(tree, "a//", "a/b", "a/b")
    assert fs.ls(f"{tree}/a//", detail=False) == paths(tree, "a///", "a//b")
    assert fs.ls(f"{tree}/folder", detail=False) == fs.ls(f"{tree}/folder/", detail=False)
    assert fs.ls(f"{tree}/folder/", detail=False) == paths(tree, "folder/", "folder/key")


def test_depths_add_up_to_all(fs, tree):
    assert fs.find(tree, maxdepth=9) == fs.find(tree)
    assert fs.find(tree, maxdepth=9, withdirs=True) == fs.find(tree, withdirs=True)


def test_prefix_does_not_hide_the_object_of_its_name(fs, tree):
    for where in ({"maxdepth": 1}, {"maxdepth": 2}, {}):
        found = fs.find(tree, detail=True, withdirs=True, **where)
        assert [found[path]["type"] for path in paths(tree, "a", "twin")] == ["file", "file"]
    assert fs.find(tree, maxdepth=1) == paths(tree, "a", "twin")
    assert {path: entry["size"] for path, entry in fs.glob(f"{tree}/t*", detail=True).items()} == {f"{tree}/twin": 4}


def test_name_that_ends_in_a_slash_is_the_directory_or_what_has_content(fs, tree):
    assert fs.info(f"{tree}/folder/") == fs.find(f"{tree}/folder", detail=True)[f"{tree}/folder/"] | {
        "LastModified": fs.info(f"{tree}/folder/")["LastModified"]
    }
    for name in ("marker/", "twin/", "a/", "a//", "x/", "/"):
        assert fs.isdir(f"{tree}/{name}"), name
    for name in ("folder", "marker"):
        assert fs.info(f"{tree}/{name}") == {"name": f"{tree}/{name}", "size": 0, "type": "directory"}
    assert not fs.exists(f"{tree}/b/")


def test_objects_are_deleted_by_their_names_alone(fs, tree):
    gone = paths(tree, "a//b", "folder/", "twin", "/leading")
    fs.rm(gone)

    assert fs.find(tree) == [path for path in paths(tree, *NAMES) if path not in gone]


@pytest.mark.parametrize("name", ["folder/", "a//b", "twin", "//"])
def test_object_is_copied_and_moved_and_deleted_by_its_name(fs, tree, name):
    if name == "//":
        fs.pipe_file(f"{tree}/{name}", b"//")
    before = fs.find(tree)
    fs.cp_file(f"{tree}/{name}", f"{tree}/copy")
    fs.rm_file(f"{tree}/{name}")

    assert fs.find(tree) == sorted({*before, f"{tree}/copy"} - {f"{tree}/{name}"})
    fs.mv([f"{tree}/copy"], [f"{tree}/{name}"])
    assert fs.find(tree) == before
    assert fs.cat(f"{tree}/{name}") == name.encode()


def test_object_goes_with_the_prefix_of_its_name(fs, tree):
    assert fs.cat(f"{tree}/twin", recursive=True) == {f"{tree}/twin": b"twin", f"{tree}/twin/key": b"twin/key"}
    fs.cp(f"{tree}/twin", f"{tree}/copy", recursive=True)
    assert fs.cat(f"{tree}/copy", recursive=True) == {f"{tree}/copy": b"twin", f"{tree}/copy/key": b"twin/key"}
    fs.mv(f"{tree}/copy", f"{tree}/moved", recursive=True)
    assert fs.find(tree, prefix="copy") == []
    assert fs.find(tree, prefix="moved") == paths(tree, "moved", "moved/key")


def test_object_and_prefix_of_one_name_are_not_got_as_one_file(fs, tree, tmp_path):
    with pytest.raises(FileExistsError, match=f"s3://{tree}/twin/key.*{tmp_path}/got"):
        fs.get(f"{tree}/twin", str(tmp_path / "got"), recursive=True)


def test_tree_is_copied_within_s3_as_it_is(fs, tree):
    fs.cp(f"{tree}/x", f"{tree}/y", recursive=True)

    assert fs.cat(f"{tree}/y//y//z") == b"x//y//z"


def test_objects_are_got_by_their_names(fs, tree, tmp_path):
    for number, name in enumerate(NAMES):
        fs.get_file(f"{tree}/{name}", str(tmp_path / str(number)))
        assert (tmp_path / str(number)).read_bytes() == name.encode()
    fs.get(f"{tree}/x", str(tmp_path / "x"), recursive=True)
    assert (tmp_path / "x" / "y" / "z").read_bytes() == b"x//y//z"


def test_objects_that_would_be_one_local_file_are_refused_and_named(fs, tree, tmp_path):
    with pytest.raises(errors.S3Error, match=f"^s3://{tree}/a/.*b.* would both be {tmp_path}/got/b: "):
        fs.get(f"{tree}/a", str(tmp_path / "got"), recursive=True)

    assert list(tmp_path.iterdir()) == []


def test_object_that_no_local_file_can_be_is_an_error_that_names_it(fs, tree, tmp_path):
    with pytest.raises(IsADirectoryError, match=f"s3://{tree}/folder/"):
        fs.get(f"{tree}/folder", str(tmp_path / "got"), recursive=True)


def test_everything_under_a_prefix_is_deleted(fs, tree):
    fs.rm(f"{tree}/a", recursive=True)
    assert fs.find(tree) == [path for path in paths(tree, *NAMES) if not path.startswith(f"{tree}/a")]

    fs.rm(f"{tree}/x//", recursive=True)
    fs.rm([f"{tree}/folder", f"{tree}/twin"], recursive=True)
    assert fs.find(tree) == [f"{tree}//leading"]


def test_sizes_add_up(fs, tree):
    assert fs.du(tree) == fs.du(tree, maxdepth=9) == sum(map(len, NAMES))
    assert fs.du(f"{tree}/folder") == len("folder/") + len("folder/key")


def test_kept_listing_forgets_what_is_written_beside_the_slashes(fs, tree):
    list(fs.walk(tree))
    fs.touch(f"{tree}/a//new")
    fs.rm_file(f"{tree}/folder/")

    assert f"{tree}/a//new" in fs.ls(f"{tree}/a//", detail=False)
    assert fs.ls(f"{tree}/folder", detail=False) == [f"{tree}/folder/key"]
