import hashlib
import os
import pickle
from itertools import repeat

import fsspec
import numpy as np
import pytest
import s3fs
from faults import Faults, cut
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from torch_s3 import EmptyDataset, InvalidUri, Manifest, NotFound, S3Error, TransferFailed
from torch_s3.uris import Read

ODD_NAMES = [
    "a b/c d.png",
    "plus+and%20percent%/x.png",
    "question?mark=1&and#hash/x.png",
    "öl/日本/🙂.png",
    "quotes'\"/x.png",
    "[brackets]{braces}*/x.png",
    "double//slash.png",
    "back\\slash/x.png",
    "trailing space /x.png ",
    "semi;colon:equals=@,$!~()/x.png",
    "tab\t/x.png",
    "ends.with.dots./x.png",
    "no suffix",
]


def uris(manifest):
    return [manifest.uri(index) for index in range(len(manifest))]


def etags(manifest, fs):
    return [manifest.read(index, fs).etag for index in range(len(manifest))]


@pytest.fixture(params=["ours", "s3fs", "memory", "file"])
def store(request, s3, fs, folder, tmp_path):
    """A filesystem, the uri of an empty folder in it, and what makes a manifest of it."""
    if request.param == "ours":
        yield fs, folder, {"storage_options": s3.storage_options}
    elif request.param == "s3fs":
        standin = s3fs.S3FileSystem(**s3.storage_options, use_listings_cache=False)
        yield standin, folder, {"filesystem": standin}
    elif request.param == "memory":
        memory = fsspec.filesystem("memory")
        yield memory, "memory://manifest", {}
        memory.rm("/manifest", recursive=True)
    else:
        yield fsspec.filesystem("file", auto_mkdir=True), f"file://{tmp_path}/manifest", {}


# ------------------------------------------------------------------ listing


def test_everything_under_prefix_is_listed_sorted(store):
    fs, folder, options = store
    names = ["train/b/2.png", "train/a/deep/er/3.png", "train/a/1.png", "train/0.png", "other/4.png", "training/5.png"]
    fs.pipe({f"{folder}/{name}": b"body" for name in names})

    manifest = Manifest.from_prefix(f"{folder}/train/", **options)

    expected = ["0.png", "a/1.png", "a/deep/er/3.png", "b/2.png"]
    assert [uri.removeprefix(manifest.root) for uri in uris(manifest)] == expected
    assert manifest.root.rstrip("/").endswith("/train")


def test_listed_objects_can_be_read_by_their_uris(store):
    fs, folder, options = store
    fs.pipe({f"{folder}/a/1.png": b"one", f"{folder}/b/2.png": b"two"})

    manifest = Manifest.from_prefix(folder, **options)

    assert [fs.cat_file(uri) for uri in uris(manifest)] == [b"one", b"two"]
    assert [fs.cat_file(manifest.read(index, fs).path) for index in range(2)] == [b"one", b"two"]


@pytest.mark.parametrize("end", ["", "/"])
def test_whole_bucket_is_listed(fs, bucket, s3, end):
    fs.pipe({f"{bucket}/0.png": b"body", f"{bucket}/a/1.png": b"body"})

    manifest = Manifest.from_prefix(f"{bucket}{end}", storage_options=s3.storage_options)

    assert uris(manifest) == [f"{bucket}/0.png", f"{bucket}/a/1.png"]
    assert list(manifest.folders()) == ["", "a"]


def test_slash_at_end_of_prefix_makes_no_difference(store):
    fs, folder, options = store
    fs.pipe({f"{folder}/a/1.png": b"1", f"{folder}/ab/2.png": b"2"})

    with_slash, without = (Manifest.from_prefix(f"{folder}/a{end}", **options) for end in ("/", ""))

    assert uris(with_slash) == uris(without)
    assert len(with_slash) == 1


def test_sizes_are_bytes(store):
    fs, folder, options = store
    fs.pipe({f"{folder}/a": b"1", f"{folder}/b": b"22", f"{folder}/c": bytes(100_000)})

    manifest = Manifest.from_prefix(folder, **options)

    assert manifest.sizes.dtype == np.int64
    assert manifest.sizes.tolist() == [1, 2, 100_000]
    assert [manifest.read(index, fs).size for index in range(3)] == [1, 2, 100_000]


def test_etags_are_bare(store):
    fs, folder, options = store
    bodies = [b"one", b"two"]
    fs.pipe({f"{folder}/{number}": body for number, body in enumerate(bodies)})

    manifest = Manifest.from_prefix(folder, **options)

    has_etags = folder.startswith("s3://")
    assert etags(manifest, fs) == [hashlib.md5(body).hexdigest() if has_etags else None for body in bodies]


def test_hidden_empty_and_directory_marker_objects_are_left_out(store):
    fs, folder, options = store
    for name in ("a/1.png", "a/.hidden.png", ".thumbs/2.png", "a/.git/3.png", "a/b.c/4.png", "..5.png"):
        fs.pipe_file(f"{folder}/{name}", b"body")
    fs.pipe_file(f"{folder}/a/empty.png", b"")
    if folder.startswith("s3://"):
        fs.pipe_file(f"{folder}/a/marker/", b"")

    manifest = Manifest.from_prefix(folder, **options)

    assert [uri.removeprefix(manifest.root) for uri in uris(manifest)] == ["a/1.png", "a/b.c/4.png"]


def test_prefix_may_itself_be_hidden(store):
    fs, folder, options = store
    fs.pipe_file(f"{folder}/.cache/a/1.png", b"body")

    assert len(Manifest.from_prefix(f"{folder}/.cache", **options)) == 1


def test_suffixes_choose_in_upper_and_lower_case(store):
    fs, folder, options = store
    for name in ("1.png", "2.PNG", "3.Jpg", "4.txt", "5png", "png/6"):
        fs.pipe_file(f"{folder}/{name}", b"body")

    manifest = Manifest.from_prefix(folder, suffixes=[".png", ".JPG"], **options)

    assert [uri.rpartition("/")[2] for uri in uris(manifest)] == ["1.png", "2.PNG", "3.Jpg"]


def test_odd_names_are_listed_and_can_be_read(fs, folder, s3):
    fs.pipe({f"{folder}/data/{name}": name.encode() for name in ODD_NAMES})

    manifest = Manifest.from_prefix(f"{folder}/data", storage_options=s3.storage_options)

    assert uris(manifest) == [f"{folder}/data/{name}" for name in sorted(ODD_NAMES)]
    reads = [manifest.read(index, fs) for index in range(len(manifest))]
    assert fs.cat_ranges([read.path for read in reads], None, None) == [name.encode() for name in sorted(ODD_NAMES)]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_prefix_may_have_an_odd_name(fs, folder, s3, name):
    fs.pipe_file(f"{folder}/{name}/1.png", b"body")

    manifest = Manifest.from_prefix(f"{folder}/{name}/", storage_options=s3.storage_options)

    assert uris(manifest) == [f"{folder}/{name}/1.png"]


def test_local_name_that_is_no_utf8_is_listed_and_can_be_read(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"body")

    manifest = Manifest.from_prefix(f"file://{tmp_path}")

    fs = fsspec.filesystem("file")
    assert fs.cat_file(manifest.read(0, fs).path) == b"body"


def test_more_than_a_page_is_listed(fs, folder, s3):
    fs.pipe({f"{folder}/{number:04}": b"body" for number in range(1001)})

    assert len(Manifest.from_prefix(folder, storage_options=s3.storage_options)) == 1001


class Unsorted(MemoryFileSystem):
    """Lists in an order of its own, as some servers do."""

    def find(self, path, **kwargs):
        found = super().find(path, **kwargs)
        return dict(reversed(found.items())) if kwargs.get("detail") else found


def test_keys_are_sorted_where_the_server_does_not():
    unsorted = Unsorted()
    unsorted.pipe({f"/unsorted/{name}": name.encode() for name in ("b/1.png", "a.png", "a/é.png", "a/z.png")})
    try:
        manifest = Manifest.from_prefix("/unsorted", filesystem=unsorted)

        names = ["a.png", "a/z.png", "a/é.png", "b/1.png"]
        assert [uri.removeprefix(manifest.root) for uri in uris(manifest)] == names
        assert manifest.sizes.tolist() == [len(name.encode()) for name in names]
    finally:
        unsorted.rm("/unsorted", recursive=True)


def test_listing_that_breaks_off_is_an_error():
    """It must not pass for a smaller data set."""
    with (
        Faults(repeat(cut(1, 0.5)), objects={"/bucket/": bytes(1000)}) as server,
        pytest.raises(TransferFailed) as caught,
    ):
        Manifest.from_prefix("s3://bucket/train", storage_options=server.storage_options | {"attempts": 2})

    assert caught.value.uri == "s3://bucket/train/"


def test_root_of_memory_filesystem_can_be_listed():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/manifest-root/1.png", b"body")
    try:
        manifest = Manifest.from_prefix("memory://")

        assert "manifest-root" in manifest.folders()
        assert memory.cat_file(manifest.uri(list(manifest.folders()).index("manifest-root"))) == b"body"
    finally:
        memory.rm("/manifest-root", recursive=True)


def test_prefix_without_scheme_is_a_path_of_the_filesystem_given(fs, folder):
    fs.pipe_file(f"{folder}/a/1.png", b"body")

    assert uris(Manifest.from_prefix(f"{folder.removeprefix('s3://')}/a", filesystem=fs)) == [f"{folder}/a/1.png"]


def test_uri_of_one_object_is_that_object_or_an_error(fs, folder, s3):
    """It was listed as `…/1.png/`, which is not there to be read."""
    fs.pipe_file(f"{folder}/a/1.png", b"body")

    try:
        found = uris(Manifest.from_prefix(f"{folder}/a/1.png", storage_options=s3.storage_options))
    except S3Error as error:
        assert error.uri.rstrip("/") == f"{folder}/a/1.png"  # noqa: PT017
    else:
        assert found == [f"{folder}/a/1.png"]


# ------------------------------------------------------------------ lists of uris


def test_list_keeps_its_order_and_repetitions():
    given_uris = ["s3://b/x/2.png", "s3://b/1.png", "s3://b/x/2.png"]

    manifest = Manifest.from_uris(given_uris, allow_duplicates=True)

    assert uris(manifest) == list(manifest) == given_uris
    assert manifest.sizes.tolist() == [-1, -1, -1]


def test_uri_that_is_in_a_list_twice_is_an_invalid_uri():
    with pytest.raises(InvalidUri, match="twice") as caught:
        Manifest.from_uris(["s3://b/1.png", "s3://b/2.png", "s3://b/3.png", "s3://b/2.png"])

    assert caught.value.uri == "s3://b/2.png"


def test_sizes_and_etags_of_a_list_are_unknown(fs):
    read = Manifest.from_uris(["s3://b/a/1.png"]).read(0, fs)

    assert read == Read("b/a/1.png", None, None)


def test_list_may_span_buckets(fs):
    manifest = Manifest.from_uris(["s3://bucket-a/1.png", "s3://bucket-b/2.png"])

    assert uris(manifest) == ["s3://bucket-a/1.png", "s3://bucket-b/2.png"]
    assert [manifest.read(index, fs).path for index in range(2)] == ["bucket-a/1.png", "bucket-b/2.png"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_any_names_come_back_from_a_list(names):
    given_uris = [f"s3://bucket/{name}" for name in names]

    manifest = Manifest.from_uris(given_uris, allow_duplicates=True)

    assert len(manifest) == len(names)
    assert uris(manifest) == given_uris
    assert all(uri.startswith(manifest.root) for uri in given_uris)
    assert manifest.root.endswith("/")


def test_list_may_be_any_sequence():
    assert len(Manifest.from_uris(("s3://b/1", "s3://b/2"))) == 2
    assert len(Manifest.from_uris(np.array(["s3://b/1", "s3://b/2"]))) == 2


# ------------------------------------------------------------------ folders


def test_folder_is_first_one_under_the_prefix(store):
    fs, folder, options = store
    for name in ("0.png", "a/1.png", "a/b/2.png", "c/d/e/3.png"):
        fs.pipe_file(f"{folder}/train/{name}", b"body")

    assert list(Manifest.from_prefix(f"{folder}/train", **options).folders()) == ["", "a", "a", "c"]


def test_folder_of_a_uri_in_a_list_is_the_one_it_lies_in():
    manifest = Manifest.from_uris(["s3://b/train/a/1.png", "s3://b/train/c/d/2.png", "s3://b/train/a/3.png"])

    assert list(manifest.folders()) == ["a", "d", "a"]


def test_folder_of_a_single_uri_is_the_one_it_lies_in():
    assert list(Manifest.from_uris(["s3://b/train/a/1.png"]).folders()) == ["a"]


# ------------------------------------------------------------------ pickling


def test_unpickled_manifest_is_the_same(fs, folder, s3):
    fs.pipe({f"{folder}/a/{number}.png": b"body" for number in range(5)})
    manifest = Manifest.from_prefix(folder, storage_options=s3.storage_options)

    again = pickle.loads(pickle.dumps(manifest))

    assert uris(again) == uris(manifest)
    assert again.root == manifest.root
    assert again.sizes.tolist() == manifest.sizes.tolist()
    assert etags(again, fs) == etags(manifest, fs)
    assert list(again.folders()) == list(manifest.folders())


def test_pickle_holds_little_more_than_the_names():
    names = [f"class-{number % 100:03}/image-{number:08}.jpeg" for number in range(10_000)]
    manifest = Manifest.from_uris([f"s3://a-bucket/with/a/long/prefix/{name}" for name in names])

    assert len(pickle.dumps(manifest)) < sum(map(len, names)) + 32 * len(names)


# ------------------------------------------------------------------ errors


def test_empty_prefix_is_an_error_that_names_it(store):
    fs, folder, options = store
    fs.pipe_file(f"{folder}/a/1.png", b"body")

    with pytest.raises(S3Error, match=r"nothing is stored here|no such") as caught:
        Manifest.from_prefix(f"{folder}/b/", **options)

    assert isinstance(caught.value, EmptyDataset | NotFound)
    assert caught.value.uri.rstrip("/").endswith(f"{folder.partition('://')[2].lstrip('/')}/b")


def test_prefix_without_matching_suffix_is_an_error_that_says_so(store):
    fs, folder, options = store
    fs.pipe_file(f"{folder}/a/1.npy", b"body")

    with pytest.raises(EmptyDataset, match=r"none of the 1 objects here .*ends in \.png, \.jpg"):
        Manifest.from_prefix(folder, suffixes=[".png", ".jpg"], **options)


def test_only_hidden_or_empty_objects_are_an_error_that_does_not_blame_the_suffix(fs, folder, s3):
    fs.pipe({f"{folder}/.hidden.png": b"body"})
    fs.pipe_file(f"{folder}/empty.png", b"")

    with pytest.raises(EmptyDataset) as caught:
        Manifest.from_prefix(folder, storage_options=s3.storage_options)

    assert "ends in" not in str(caught.value)


def test_missing_bucket_is_not_found(s3):
    with pytest.raises(NotFound, match="no such bucket") as caught:
        Manifest.from_prefix("s3://no-such-bucket-here/train/", storage_options=s3.storage_options)

    assert caught.value.uri == "s3://no-such-bucket-here"


def test_missing_bucket_is_not_found_by_s3fs(s3):
    standin = s3fs.S3FileSystem(**s3.storage_options)

    with pytest.raises(NotFound) as caught:
        Manifest.from_prefix("s3://no-such-bucket-here/train/", filesystem=standin)

    assert caught.value.uri.startswith("s3://no-such-bucket-here")


def test_credentials_that_s3fs_does_not_find_are_an_error_of_ours(s3, folder):
    standin = s3fs.S3FileSystem(endpoint_url=s3.endpoint_url, skip_instance_cache=True)

    with pytest.raises(S3Error, match="credentials") as caught:
        Manifest.from_prefix(folder, filesystem=standin)

    assert caught.value.uri.startswith(folder)


@pytest.mark.parametrize("uri", ["bucket/train", "/data/train", "train"])
def test_prefix_without_scheme_is_an_invalid_uri(uri):
    with pytest.raises(InvalidUri, match="no scheme: write s3://bucket/key") as caught:
        Manifest.from_prefix(uri)

    assert caught.value.uri == uri


def test_prefix_without_bucket_is_an_invalid_uri(s3):
    with pytest.raises(InvalidUri, match=r"^s3://"):
        Manifest.from_prefix("s3://", storage_options=s3.storage_options)


def test_unknown_scheme_is_an_invalid_uri():
    with pytest.raises(InvalidUri, match="cannot open nosuch://") as caught:
        Manifest.from_prefix("nosuch://bucket/train")

    assert caught.value.uri == "nosuch://bucket/train"


def test_empty_list_is_an_empty_dataset():
    with pytest.raises(EmptyDataset, match="empty"):
        Manifest.from_uris([])


def test_list_with_several_schemes_is_an_invalid_uri():
    with pytest.raises(InvalidUri, match="start alike") as caught:
        Manifest.from_uris(["s3://b/1.png", "s3://b/2.png", "file:///3.png"])

    assert caught.value.uri == "file:///3.png"


def test_list_without_scheme_is_an_invalid_uri_that_says_so():
    with pytest.raises(InvalidUri, match="no scheme") as caught:
        Manifest.from_uris(["bucket/1.png", "bucket/2.png"])

    assert caught.value.uri == "bucket/1.png"


def test_one_uri_in_place_of_a_list_is_refused_with_what_to_write():
    with pytest.raises((TypeError, ValueError), match="list"):
        Manifest.from_uris("s3://bucket/1.png")


def test_storage_options_beside_a_filesystem_are_refused(fs, folder, s3):
    with pytest.raises(ValueError, match="leave them out with filesystem="):
        Manifest.from_prefix(folder, filesystem=fs, storage_options=s3.storage_options)


def test_label_that_fits_no_int64_is_refused_by_name():
    with pytest.raises(ValueError, match="s3://b/two: its label has more than 64 bits"):
        Manifest.from_uris(["s3://b/one", "s3://b/two"], labels=[1, 2**63])


def test_one_suffix_may_be_a_string(tmp_path):
    for name in ("a.jpg", "b.png", "c.log"):
        (tmp_path / name).write_bytes(b"x")

    assert [uri[-5:] for uri in Manifest.from_prefix(tmp_path.as_uri(), suffixes=".jpg")] == ["a.jpg"]
