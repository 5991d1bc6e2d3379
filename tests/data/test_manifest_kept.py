"""Manifests: what is chosen of a listing, labels, tables, subsets, files, and what they weigh."""

import pickle
import tracemalloc

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import number_of, picture
from processes import in_child

from torch_s3 import EmptyDataset, InvalidManifest, InvalidUri, Manifest, NotFound, ObjectChanged
from torch_s3.data.manifest import PackedETags, PackedStrings
from torch_s3.data.strings import StringsBuilder

NAMES = ["a/1.jpg", "a/2.png", "a/b/3.jpg", "c/.hidden/4.jpg", "c/5.jpg", "empty.jpg"]


@pytest.fixture
def listed(fs, folder, s3):
    """Lists `NAMES`, of 1, 2, … bytes, the last one of none."""
    fs.pipe({f"{folder}/{name}": b"x" * (n if n < len(NAMES) else 0) for n, name in enumerate(NAMES, 1)})

    def names(**options):
        manifest = Manifest.from_prefix(folder, storage_options=s3.storage_options, **options)
        return [uri.removeprefix(manifest.root) for uri in manifest]

    return names


# ------------------------------------------------------------------ what is chosen


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, [0, 1, 2, 4]),
        ({"pattern": "*/*.jpg"}, [0, 4]),
        ({"pattern": "**/*.jpg"}, [0, 2, 4]),
        ({"pattern": "a/**"}, [0, 1, 2]),
        ({"suffixes": [".jpg"], "pattern": "a/*"}, [0]),
        ({"keep": lambda uri, size: size > 2 and uri.startswith("s3://")}, [2, 4]),
        ({"hidden": True}, [0, 1, 2, 3, 4]),
        ({"empty": True}, [0, 1, 2, 4, 5]),
    ],
)
def test_objects_are_chosen(listed, options, chosen):
    assert listed(**options) == [NAMES[index] for index in chosen]


def test_nothing_left_says_what_was_asked(listed):
    with pytest.raises(EmptyDataset, match=r"none of the 6 objects here has bytes and .*ends in \.gif and matches q\*"):
        listed(suffixes=[".gif"], pattern="q*", keep=lambda *_: True)


def test_progress_is_shown_where_it_is_asked_for(listed, capfd):
    listed()
    assert capfd.readouterr().err == ""
    listed(progress=False)
    assert capfd.readouterr().err == ""
    listed(progress=True)


# ------------------------------------------------------------------ labels and tables

URIS = ["s3://b/x/1.png", "s3://b/y/2.png", "s3://b/x/3.png"]


@pytest.mark.parametrize("labels", [[3, -1, 2], ["cat", "dog", "öl"]])
@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_labels_are_kept(labels, kind):
    manifest = Manifest.from_uris(URIS, kind(labels))

    assert list(manifest.labels) == labels
    assert list(pickle.loads(pickle.dumps(manifest)).labels) == labels
    assert list(manifest[[2, 0]].labels) == [labels[2], labels[0]]
    assert list(manifest) == URIS


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, 2], "2 labels for 3 uris"),
        ([1, None, 2], r"s3://b/y/2\.png: no label, as 1 of 3 have none"),
        (["a", "", float("nan")], r"s3://b/y/2\.png: no label, as 2 of 3"),
    ],
)
def test_missing_labels_are_refused(labels, words):
    with pytest.raises(ValueError, match=words):
        Manifest.from_uris(URIS, labels)


def test_labels_of_mixed_kinds_are_refused():
    with pytest.raises(TypeError, match="all ints or all strings"):
        Manifest.from_uris(URIS, [1, "2", 3])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("labels", [[1, 2, 3], ["cat", "dog", "cat"], None])
def test_tables_are_read(fs, folder, s3, kind, labels):
    import pandas as pd

    table = pd.DataFrame({"where": URIS} | ({} if labels is None else {"what": labels}))
    table["more"] = 1.5
    body = table.to_csv(index=False).encode() if kind == "csv" else table.to_parquet()
    fs.pipe_file(f"{folder}/table", body)
    read = Manifest.from_csv if kind == "csv" else Manifest.from_parquet
    columns = {"uri_column": "where", "label_column": None if labels is None else "what"}

    manifest = read(f"{folder}/table", **columns, storage_options=s3.storage_options)

    assert list(manifest) == URIS
    assert manifest.labels is None if labels is None else list(manifest.labels) == labels
    with pytest.raises(ValueError, match=r"no column 'uri'; there are 'where'"):
        read(f"{folder}/table", storage_options=s3.storage_options)


def test_table_on_disk_with_a_missing_label_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text("uri,label\ns3://b/1,a\ns3://b/2,\n")

    with pytest.raises(ValueError, match="s3://b/2: no label"):
        Manifest.from_csv(str(tmp_path / "table.csv"), label_column="label")


def test_packed_strings_are_counted_from_the_end_too():
    texts = ["one", "", "three"]
    packed = StringsBuilder(texts).packed()

    assert [packed[index] for index in range(-3, 3)] == 2 * texts
    with pytest.raises(IndexError):
        packed[-4]


@pytest.mark.parametrize("missing", ["", None])
def test_list_with_a_missing_uri_is_refused(missing):
    with pytest.raises(InvalidUri, match="number 1 of the list, counted from 0, is no uri"):
        Manifest.from_uris(["s3://b/1", missing])


@pytest.mark.parametrize(("read", "words"), [("csv", "not UTF-8"), ("parquet", "not a parquet file")])
def test_table_of_another_kind_is_named(tmp_path, read, words):
    (tmp_path / "table").write_bytes(b"uri\ns3://b/\xff\n")

    with pytest.raises(ValueError, match=rf"{tmp_path / 'table'}: .*{words}"):
        getattr(Manifest, f"from_{read}")(str(tmp_path / "table"))


def test_labels_of_a_manifest_are_those_of_the_dataset(dataset, fs, folder):
    uris = [f"{folder}/{number}.png" for number in range(3)]
    fs.pipe({uri: picture(number) for number, uri in enumerate(uris)})

    named = dataset(Manifest.from_uris(uris, ["dog", "cat", "dog"]))
    numbered = dataset(Manifest.from_uris(uris, [7, 8, 9]))

    assert named.classes == ["cat", "dog"]
    assert [(number_of(image), label) for image, label in named] == [(0, 1), (1, 0), (2, 1)]
    assert [label for _, label in numbered] == [7, 8, 9]
    assert dataset(Manifest.from_uris(uris, [7, 8, 9]), labels="folder").classes == [folder.rpartition("/")[2]]


# ------------------------------------------------------------------ subsets, and files


def test_subset_keeps_the_versions(fs, folder, s3):
    fs.pipe({f"{folder}/{number}": b"%d" % number for number in range(5)})
    manifest = Manifest.from_prefix(folder, storage_options=s3.storage_options)
    expected = [manifest.read(index, fs) for index in range(5)]

    for which in (slice(1, 4), [4, 0, 0], np.array([True, False, True, False, True]), slice(None, None, -2)):
        part = manifest[which]
        assert [part.read(index, fs) for index in range(len(part))] == [
            expected[index] for index in np.arange(5)[which].tolist()
        ]
    with pytest.raises(TypeError, match=r"manifest\.uri"):
        manifest[3]


def test_shuffled_part_is_trained_on(dataset, images, s3):
    manifest = Manifest.from_prefix(images, storage_options=s3.storage_options)
    part = manifest[np.random.default_rng(0).permutation(len(manifest))[:7]]

    assert [uri for _, uri in dataset(part, labels=str)] == list(part)


@pytest.fixture(params=["s3", "disk", "path", "memory"])
def place(request, folder, s3, tmp_path):
    """Where a manifest may be kept, and the options for it."""
    if request.param == "s3":
        return f"{folder}/kept.manifest", {"storage_options": s3.storage_options}
    if request.param == "memory":
        return "memory://kept.manifest", {}
    return (f"file://{tmp_path}/kept.manifest" if request.param == "disk" else tmp_path / "kept.manifest"), {}


def test_saved_manifest_is_the_same(fs, folder, s3, place):
    fs.pipe({f"{folder}/data/{name}": b"x" for name in ("a/1", "ü/2", "c/3")})
    where, options = place
    listed = Manifest.from_prefix(f"{folder}/data", storage_options=s3.storage_options)
    for manifest in (listed, Manifest.from_uris(URIS, [1, 2, 3]), Manifest.from_uris(URIS, ["a", "b", "c"])):
        manifest.save(where, **options)
        again = Manifest.load(where, **options)

        assert list(again) == list(manifest)
        assert [again.read(n, fs) for n in range(3)] == [manifest.read(n, fs) for n in range(3)]
        assert list(again.folders()) == list(manifest.folders())
        assert again.fingerprint == manifest.fingerprint
        assert (again.labels is None and manifest.labels is None) or list(again.labels) == list(manifest.labels)


def test_save_that_fails_leaves_the_old_one_alone(tmp_path, monkeypatch):
    old = Manifest.from_uris(URIS)
    old.save(tmp_path / "kept")
    monkeypatch.setattr(np, "savez", lambda file, **_: file.write(b"half") and 1 / 0)

    with pytest.raises(ZeroDivisionError):
        Manifest.from_uris(URIS[:1]).save(tmp_path / "kept")

    assert list(Manifest.load(tmp_path / "kept")) == URIS
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_is_no_manifest_is_refused(tmp_path):
    path = tmp_path / "kept"
    Manifest.from_uris(URIS).save(path)
    whole = path.read_bytes()
    np.savez(tmp_path / "evil.npz", format=np.array([1]), root=np.array([print], dtype=object))
    np.savez(tmp_path / "later.npz", format=np.array([2]))
    with np.load(path) as arrays:
        np.savez(tmp_path / "short.npz", **dict(arrays) | {"sizes": np.zeros(2, np.int64)})
    damaged = bytearray(whole)
    damaged[whole.index(b"s3://b/")] ^= 1
    others = [(tmp_path / f"{name}.npz").read_bytes() for name in ("evil", "later", "short")]
    for body in (b"", b"no manifest", whole[:-30], bytes(damaged), *others):
        path.write_bytes(body)
        with pytest.raises(InvalidManifest, match="not a manifest") as caught:
            Manifest.load(path)
        assert caught.value.uri == f"file://{path}"
    with pytest.raises(NotFound):
        Manifest.load(tmp_path / "none")


def test_changed_object_is_known_by_a_loaded_manifest(dataset, fs, folder, s3, tmp_path):
    fs.pipe({f"{folder}/a/{number}.png": picture(number) for number in range(2)})
    Manifest.from_prefix(folder, storage_options=s3.storage_options).save(tmp_path / "kept")
    fs.pipe_file(f"{folder}/a/1.png", picture(2))

    with pytest.raises(ObjectChanged, match="1"):
        list(dataset(Manifest.load(tmp_path / "kept")))


def test_fingerprint_is_of_names_sizes_versions_and_order(fs, folder, s3):
    fs.pipe({f"{folder}/{name}": name.encode() for name in ("a", "b", "c")})

    def found(which=slice(None)):
        return Manifest.from_prefix(folder, storage_options=s3.storage_options)[which].fingerprint

    first = found()
    assert found() == first != found([0, 2, 1])
    assert found(slice(2)) != first
    fs.pipe_file(f"{folder}/b", b"B")
    assert found() != first
    assert (
        Manifest.from_uris(["s3://b/1", "s3://b/2"]).fingerprint
        != Manifest.from_uris(["s3://c/1", "s3://c/2"]).fingerprint
    )


# ------------------------------------------------------------------ packed

strings = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=30)
md5s = st.text("0123456789abcdef", min_size=32, max_size=32)
etags = st.lists(
    st.just("") | md5s | st.builds("{}-{}".format, md5s, st.integers(0, 10_001)) | st.text("aZ9-", max_size=40)
)


@given(strings=strings, data=st.data())
def test_packed_strings_are_those_that_were_given(strings, data):
    packed = StringsBuilder(strings).packed()
    some = data.draw(st.lists(st.integers(0, max(0, len(strings) - 1)), max_size=40 if strings else 0))

    assert list(packed) == [packed[index] for index in range(len(packed))] == strings
    assert list(packed.take(np.array(some, dtype=np.int64))) == [strings[index] for index in some]


@given(etags=etags | st.lists(md5s), data=st.data())
def test_packed_etags_are_those_that_were_given(etags, data):
    packed = PackedETags.pack(StringsBuilder(etags).packed())
    some = data.draw(st.lists(st.integers(0, max(0, len(etags) - 1)), max_size=40 if etags else 0))
    part = packed.take(np.array(some, dtype=np.int64))

    assert [packed[index] for index in range(len(etags))] == [etag or None for etag in etags]
    assert [part[index] for index in range(len(some))] == [etags[index] or None for index in some]


def synthetic(count):
    """A listing's manifest of so many keys, made by numpy alone."""
    digits = np.frombuffer(np.char.zfill(np.arange(10_000).astype("S4"), 4).tobytes(), np.uint8).reshape(-1, 4)
    names = np.empty((count, 40), np.uint8)
    names[:] = np.frombuffer(b"class-00/a-folder-of-image/00000000.jpeg", np.uint8)
    number = np.arange(count)
    names[:, 27:31], names[:, 31:35] = digits[number // 10_000 % 10_000], digits[number % 10_000]
    text = PackedStrings(names.reshape(-1), np.arange(40, 40 * count + 1, 40))
    etags = PackedETags(np.zeros((count, 16), np.uint8), np.zeros(count, np.int32), StringsBuilder().packed())
    return Manifest("s3://bucket/", text, np.full(count, 90_000), etags, np.zeros(count, np.int64), listed=True)


def test_ten_million_keys_weigh_less_than_a_hundred_bytes_each_beyond_their_text(dataset):
    count = 10_000_000
    tracemalloc.start()
    try:
        manifest = synthetic(count)
        uri = manifest.uri(9_876_543)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert uri == "s3://bucket/class-00/a-folder-of-image/09876543.jpeg"
    assert held < count * (40 + 100)
    train = dataset(manifest, shuffle=True, labels=None)
    assert len(train) == count


def test_million_keys_are_listed_pickled_and_saved_in_their_weight(tmp_path, monkeypatch):
    """Of what numpy holds; nothing is kept per key."""
    manifest = synthetic(1_000_000)

    manifest.save(tmp_path / "kept")
    loaded = Manifest.load(tmp_path / "kept")

    assert (tmp_path / "kept").stat().st_size < 1_000_000 * (40 + 60)
    assert len(pickle.dumps(loaded)) < 1_000_000 * (40 + 60)
    assert loaded.fingerprint == manifest.fingerprint
    assert loaded.uri(999_999) == manifest.uri(999_999)


def test_forked_worker_shares_the_pages():
    """Reading keys writes to none of their pages: no reference is counted there."""
    manifest = synthetic(1_000_000)
    private = fsspec.filesystem("file")

    def use():
        before = _private_kilobytes()
        for index in range(0, 1_000_000, 100):
            manifest.read(index, private)
        assert _private_kilobytes() - before < 20_000  # of 76 MB

    assert in_child(use) == 0


def _private_kilobytes():
    with open("/proc/self/smaps_rollup") as file:  # noqa: PTH123
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))
