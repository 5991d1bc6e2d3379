"""Packing a prefix into shards: read back with webdataset and TensorFlow, stopped, resumed, and on a Ray cluster."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import types
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import in_child
from webdataset import tariterators

from torch_s3 import (
    AlreadyExists,
    EmptyDataset,
    InvalidUri,
    Manifest,
    NotFound,
    ObjectChanged,
    S3Error,
    S3FileSystem,
    TransferFailed,
)
from torch_s3.data import index_file, pack_plan, tar, tfrecord
from torch_s3.data.example import Features, FixedFeature
from torch_s3.data.pack import pack
from torch_s3.data.strings import PackedETags, StringsBuilder
from torch_s3.data.tars import S3TarDataset

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def photos(fs, bucket):
    """The uri of a prefix with 20 objects of 1 to 20 KB in two folders."""
    fs.pipe({f"{bucket}/photos/{name}/{n:02}.jpg": _body(n) for n in range(10) for name in ("cat", "dog")})
    return f"{bucket}/photos/"


def _body(number):
    return bytes([number]) * (1000 + 2000 * number)


def _tar_samples(fs, packed):
    samples = []
    for shard in packed.shards:
        with fs.open(shard.uri, "rb") as stream:
            files = list(tariterators.tar_file_expander([{"url": "", "stream": stream}]))
        samples += tariterators.group_by_keys(files)
    return samples


def _records(fs, packed):
    for shard in packed.shards:
        data = memoryview(fs.cat_file(shard.uri))
        bounds = index_file.parse(fs.cat_file(shard.uri.replace(".tfrecord", ".idx")), "tfrecord")
        scan = tfrecord.TFRecordScan(shard.uri)
        scan.feed(data)
        assert scan.finish().tolist() == bounds.tolist()
        for number in range(len(bounds) - 1):
            start, stop = bounds[number : number + 2]
            yield tfrecord.record(data[start:stop], shard.uri, number, start)


def test_a_prefix_becomes_tars_that_webdataset_reads(fs, bucket, photos):
    packed = pack(photos, f"{bucket}/shards/", labels="folder", shard_size=50_000, filesystem=fs)

    assert packed.uris == f"{bucket}/shards/shard-{{000000..{len(packed.shards) - 1:06}}}.tar"
    assert len(packed.shards) > 3
    assert (packed.records, packed.resumed, packed.skipped, packed.classes) == (20, 0, (), ["cat", "dog"])
    assert all(shard.bytes <= 50_000 for shard in packed.shards)
    assert {shard.uri: shard.etag for shard in packed.shards}.items() <= {
        f"s3://{each['name']}": each["ETag"].strip('"') for each in fs.ls(f"{bucket}/shards", detail=True)
    }.items()
    samples = _tar_samples(fs, packed)
    assert [sample["__key__"] for sample in samples] == [f"{name}/{n:02}" for name in ("cat", "dog") for n in range(10)]
    assert [sample["jpg"] for sample in samples] == [_body(n) for n in range(10)] * 2
    assert [sample["cls"] for sample in samples] == [b"0"] * 10 + [b"1"] * 10


def test_indices_say_where_the_samples_lie(fs, bucket, photos):
    packed = pack(photos, f"{bucket}/shards", labels="folder", shard_size=50_000, filesystem=fs)

    shard = packed.shards[1]
    data, text = fs.cat_file(shard.uri), fs.cat_file(shard.uri.replace(".tar", ".idx"))
    scan = tar.TarScan(shard.uri)
    scan.feed(memoryview(data))
    assert scan.finish().tolist() == index_file.parse(text, "tar").tolist()
    for line in text.decode().splitlines()[1:]:
        words = line.split()
        assert words[0::4] == ["jpg", "cls"]
        start, size = int(words[1]), int(words[2])
        assert data[start : start + size] == _body(int(words[3][-6:-4]))


def test_a_prefix_becomes_tfrecords_that_tensorflow_reads(tf, fs, bucket, photos, tmp_path):
    packed = pack(photos, f"{bucket}/shards", format="tfrecord", labels="folder", shard_size=60_000, filesystem=fs)

    assert len(packed.shards) > 3
    assert all(shard.bytes <= 60_000 for shard in packed.shards)
    paths = []
    for shard in packed.shards:
        paths.append(str(tmp_path / shard.uri.rpartition("/")[2]))
        Path(paths[-1]).write_bytes(fs.cat_file(shard.uri))
    spec = {
        "key": tf.io.FixedLenFeature((), tf.string),
        "label": tf.io.FixedLenFeature((), tf.int64),
        "data": tf.io.FixedLenFeature((), tf.string),
    }
    read = [tf.io.parse_single_example(each, spec) for each in tf.data.TFRecordDataset(paths)]
    expected = [
        (f"{name}/{n:02}.jpg".encode(), label, _body(n)) for label, name in enumerate(("cat", "dog")) for n in range(10)
    ]
    assert [(each["key"].numpy(), each["label"].numpy(), each["data"].numpy()) for each in read] == expected
    assert len(list(_records(fs, packed))) == packed.records == 20


def test_the_manifest_says_what_was_written(fs, bucket, photos):
    packed = pack(photos, f"{bucket}/shards", shard_size=50_000, filesystem=fs)

    written = json.loads(fs.cat_file(packed.manifest))

    assert (written["plan"], written["complete"], written["records"]) == (packed.plan, True, 20)
    assert written["uris"] == packed.uris
    assert written["shards"] == [
        {"uri": each.uri, "records": each.records, "bytes": each.bytes, "etag": each.etag} for each in packed.shards
    ]


def test_objects_that_are_one_sample_stay_together(fs, folder):
    names = [f"{n}.{kind}" for kind in ("jpg", "json", "seg.png") for n in range(5)]
    uris = [f"{folder}/in/{name}" for name in names]
    fs.pipe({uri: uri.encode() for uri in uris})

    packed = pack(uris, f"{folder}/out", shard_size=7168, filesystem=fs)

    samples = _tar_samples(fs, packed)
    assert [shard.records for shard in packed.shards] == [2, 2, 1]
    assert [sample["__key__"] for sample in samples] == list("01234")
    assert all(set(sample) == {"__key__", "__url__", "jpg", "json", "seg.png"} for sample in samples)


def test_shuffled_shards_hold_every_sample_once_in_the_seeds_order(fs, bucket, photos):
    options = {"shard_size": 50_000, "filesystem": fs, "shuffle": True}
    keys = [
        [sample["__key__"] for sample in _tar_samples(fs, pack(photos, f"{bucket}/{name}", seed=seed, **options))]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]

    assert keys[0] == keys[1] != keys[2]
    assert keys[0] != sorted(keys[0]) == sorted(keys[2])


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        ([7, 8, 9], [7, 8, 9], None),
        (["b", "a", "b"], [1, 0, 1], ["a", "b"]),
        (lambda uri: uri[-5], [0, 1, 2], ["0", "1", "2"]),
        ("auto", None, None),
    ],
)
def test_labels_are_numbers_or_numbered(fs, folder, labels, numbers, classes):
    fs.pipe({f"{folder}/in/{n}.txt": b"x" for n in range(3)})

    packed = pack(f"{folder}/in/", f"{folder}/out", labels=labels, filesystem=fs)

    assert packed.classes == classes
    found = [sample.get("cls") for sample in _tar_samples(fs, packed)]
    assert found == ([None] * 3 if numbers is None else [b"%d" % number for number in numbers])


# ---------------------------------------------------------------------- going on


def test_what_is_there_already_is_not_made_again(fs, bucket, photos):
    first = pack(photos, f"{bucket}/shards", shard_size=50_000, filesystem=fs)
    fs.rm(first.shards[1].uri)
    fs.rm(first.shards[2].uri.replace(".tar", ".idx"))
    before = {each["name"]: each["LastModified"] for each in fs.ls(f"{bucket}/shards", detail=True)}

    again = pack(photos, f"{bucket}/shards", shard_size=50_000, filesystem=fs)

    assert again.resumed == len(first.shards) - 2
    assert again.shards == first.shards
    after = {each["name"]: each["LastModified"] for each in fs.ls(f"{bucket}/shards", detail=True)}
    kept = first.shards[0].uri.removeprefix("s3://")
    assert after[kept] == before[kept]
    assert first.shards[1].uri.removeprefix("s3://") in after


class Failing(fsspec.AbstractFileSystem):
    """Another filesystem, that fails with one object."""

    protocol = "s3"
    cachable = False

    def __init__(self, fs, name, error):
        super().__init__()
        self.fs, self.name, self.error = fs, name, error

    def cat_file(self, path, **kwargs):
        if path.endswith(self.name):
            raise self.error
        return self.fs.cat_file(path, **kwargs)

    def find(self, path, **kwargs):
        return self.fs.find(path, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("s3://").rstrip("/")


def test_a_failed_run_leaves_whole_shards_only_and_the_next_one_goes_on(fs, bucket, photos):
    broken = Failing(fs, "dog/05.jpg", TransferFailed("the connection broke", uri="s3://b/dog/05.jpg"))
    options = {"shard_size": 30_000, "labels": "folder", "out_filesystem": fs}
    with pytest.raises(TransferFailed, match="the connection broke"):
        pack(photos, f"{bucket}/shards", filesystem=broken, workers=1, on_error="skip", **options)
    left = fs.ls(f"{bucket}/shards", detail=False)
    assert json.loads(fs.cat_file(f"{bucket}/shards/manifest.json"))["complete"] is False

    packed = pack(photos, f"{bucket}/shards", filesystem=Failing(fs, "none", OSError()), **options)

    assert packed.resumed == sum(name.endswith(".idx") for name in left) >= 3
    assert [sample["jpg"] for sample in _tar_samples(fs, packed)] == [_body(n) for n in range(10)] * 2


def test_a_failed_shard_leaves_no_upload(s3, fs, folder):
    fs.pipe({f"{folder}/in/{n}.bin": bytes(3 << 20) for n in range(5)})
    broken = Failing(fs, "4.bin", TransferFailed("the connection broke", uri="s3://b/4.bin"))
    small_parts = S3FileSystem(**s3.storage_options, part_size=5 << 20)

    with pytest.raises(TransferFailed):
        pack(f"{folder}/in/", f"{folder}/out", filesystem=broken, out_filesystem=small_parts)

    assert fs.ls(f"{folder}/out", detail=False) == [f"{folder}/out/manifest.json".removeprefix("s3://")]
    bucket, _, prefix = f"{folder}/out".removeprefix("s3://").partition("/")
    assert "Uploads" not in fs.client.call("list_multipart_uploads", folder, Bucket=bucket, Prefix=prefix)


def test_a_sample_that_is_gone_is_skipped_and_named(fs, bucket, photos):
    manifest = Manifest.from_prefix(photos, filesystem=fs)
    fs.rm(f"{photos}cat/03.jpg")
    fs.pipe_file(f"{photos}dog/04.jpg", b"another version")
    options = {"filesystem": fs, "shard_size": 50_000}

    with pytest.raises((NotFound, ObjectChanged)):
        pack(manifest, f"{bucket}/strict", **options)
    packed = pack(manifest, f"{bucket}/shards", on_error="skip", **options)

    assert {(each.uri, each.error) for each in packed.skipped} == {
        (f"{photos}cat/03.jpg", "NotFound"),
        (f"{photos}dog/04.jpg", "ObjectChanged"),
    }
    assert len(S3TarDataset(packed, filesystem=fs)) == packed.records == 18
    assert len(_tar_samples(fs, packed)) == 18
    assert pack(manifest, f"{bucket}/shards", on_error="skip", **options).resumed == len(packed.shards)
    assert len(json.loads(fs.cat_file(packed.manifest))["skipped"]) == 2


def test_what_was_left_out_is_wanted_again_without_skipping(fs, folder):
    fs.pipe({f"{folder}/in/{n}.txt": b"x" for n in range(4)})
    broken = Failing(fs, "1.txt", NotFound("it is gone", uri="s3://b/1.txt"))
    assert pack(f"{folder}/in/", f"{folder}/out", filesystem=broken, out_filesystem=fs, on_error="skip").records == 3

    with pytest.raises(NotFound, match="it is gone"):
        pack(f"{folder}/in/", f"{folder}/out", filesystem=broken, out_filesystem=fs)
    packed = pack(f"{folder}/in/", f"{folder}/out", filesystem=fs, out_filesystem=fs)
    assert (packed.records, packed.resumed) == (4, 0)


@pytest.mark.parametrize("shard_size", [1 << 20, 40_000, 1000])
def test_where_nothing_can_be_read_skipping_ends(fs, bucket, photos, shard_size):
    manifest = Manifest.from_prefix(photos, filesystem=fs)
    fs.rm(photos, recursive=True)

    with pytest.raises((NotFound, EmptyDataset), match=r"\.jpg: no such key"):
        pack(manifest, f"{bucket}/shards", on_error="skip", shard_size=shard_size, filesystem=fs)


def test_a_shard_of_which_nothing_could_be_read_is_tried_again(fs, folder):
    fs.pipe({f"{folder}/in/{n}.txt": b"x" for n in range(2)})
    options = {"shard_size": 1, "on_error": "skip", "out_filesystem": fs}
    broken = Failing(fs, "1.txt", NotFound("it is gone", uri="s3://b/1.txt"))
    assert pack(f"{folder}/in/", f"{folder}/out", filesystem=broken, **options).records == 1

    packed = pack(f"{folder}/in/", f"{folder}/out", filesystem=Failing(fs, "none", OSError()), **options)

    assert (packed.records, packed.resumed) == (2, 1)


class Killing(Failing):
    """Another filesystem, whose process is killed at the read of one object."""

    def cat_file(self, path, **kwargs):
        if path.endswith(self.name):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().cat_file(path, **kwargs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
@pytest.mark.parametrize("kind", pack_plan.FORMATS)
def test_packing_that_is_killed_goes_on(fs, bucket, photos, kind):
    options = {"shard_size": 30_000, "format": kind, "out_filesystem": fs, "workers": 2}
    for name in ("cat/00.jpg", "cat/08.jpg", "dog/06.jpg"):

        def run(name=name):
            pack(photos, f"{bucket}/shards", filesystem=Killing(fs, name, OSError()), progress=False, **options)

        assert in_child(run) == -signal.SIGKILL
        for left in fs.ls(f"{bucket}/shards", detail=False, refresh=True):
            if left.endswith(kind):
                scan = {"tar": tar.TarScan, "tfrecord": tfrecord.TFRecordScan}[kind](left)
                scan.feed(memoryview(fs.cat_file(left)))
                assert len(scan.finish()) > 1

    packed = pack(photos, f"{bucket}/shards", filesystem=Failing(fs, "none", OSError()), **options)

    assert 0 < packed.resumed < len(packed.shards)
    if kind == "tar":
        assert [sample["jpg"] for sample in _tar_samples(fs, packed)] == [_body(n) for n in range(10)] * 2
    else:
        decode = Features({"data": FixedFeature((), bytes)})
        found = [decode(each, "", 0)["data"] for each in _records(fs, packed)]
        assert found == [_body(n) for n in range(10)] * 2


def test_a_file_that_was_half_written_when_its_writer_was_killed_is_no_obstacle(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.txt").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json.0123.partial").write_bytes(b"{")

    assert pack(f"file://{tmp_path}/in", f"file://{tmp_path}/out").records == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits a fork")
def test_a_shard_that_the_disk_has_no_room_for_is_named(fs, folder, tmp_path):
    resource = pytest.importorskip("resource")
    fs.pipe_file(f"{folder}/in/0.bin", bytes(3 << 20))

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(S3Error, match=rf"^file://{tmp_path}/out/shard-000000.tar: OSError: "):
            pack(f"{folder}/in/", f"file://{tmp_path}/out", filesystem=fs)

    assert in_child(run) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_shards_of_another_plan_are_not_mixed(fs, bucket, photos):
    pack(photos, f"{bucket}/shards", filesystem=fs)

    with pytest.raises(AlreadyExists, match=r"manifest.json: these shards are of other objects, versions or options"):
        pack(photos, f"{bucket}/shards", shard_size=50_000, filesystem=fs)
    with pytest.raises(AlreadyExists, match="other things are there"):
        pack([f"{photos}cat/00.jpg"], f"{photos}dog", filesystem=fs)


def test_a_manifest_of_somebody_elses_is_left_alone(fs, folder, photos):
    fs.pipe_file(f"{folder}/out/manifest.json", b"[1, 2]")

    with pytest.raises(AlreadyExists, match="was not written by pack"):
        pack(photos, f"{folder}/out", filesystem=fs)
    assert fs.cat_file(f"{folder}/out/manifest.json") == b"[1, 2]"


def test_sizes_that_no_listing_told_are_asked_for(fs, folder, photos):
    packed = pack([f"{photos}cat/0{n}.jpg" for n in range(4)], f"{folder}/out", shard_size=6000, filesystem=fs)

    assert [shard.records for shard in packed.shards] == [1, 1, 1, 1]


def test_shards_go_to_another_filesystem(fs, photos, tmp_path):
    packed = pack(photos, f"file://{tmp_path}/shards", filesystem=fs, labels="folder")

    local = fsspec.filesystem("file")
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "manifest.json",
        "shard-000000.idx",
        "shard-000000.tar",
    ]
    assert len(_tar_samples(local, packed)) == 20
    assert pack(photos, f"file://{tmp_path}/shards", filesystem=fs, labels="folder").resumed == 1


# ---------------------------------------------------------------------- refused before anything is written


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a.jpg", "README"], {}, "README: readers of tars pass over names without an extension"),
        (["a.jpg", "a.JPG"], {}, "a.jpg: its sample 'a' has 'jpg' already"),
        (["a.jpg", "a.cls"], {"labels": [1, 2]}, "a.cls: its sample 'a' has 'cls' already"),
        (["a.jpg"], {"labels": "folder"}, "no class folders"),
        (["a.jpg"], {"labels": "folders"}, "labels='folders'"),
        (["a.jpg"], {"labels": [1, 2]}, "2 labels for 1 objects"),
        (["a.jpg"], {"labels": [""]}, "no label"),
        (["a.jpg"], {"format": "zip"}, "format='zip'"),
        (["a.jpg"], {"on_error": "replace"}, "on_error='replace'"),
        (["a.jpg"], {"shard_size": 0}, "shard_size=0"),
        (["a.jpg"], {"out": "{a,b}"}, "who reads the shards would expand the braces"),
        (["a.jpg"], {"out": "in/shards"}, "would lie among what is packed"),
    ],
)
def test_what_can_not_be_packed_is_refused_at_once(fs, folder, names, options, message):
    fs.pipe({f"{folder}/in/{name}": b"x" for name in names})
    out = f"{folder}/{options.pop('out', 'out')}"

    with pytest.raises(ValueError, match=message):
        pack(f"{folder}/in/", out, filesystem=fs, **options)
    assert not fs.exists(out)


@pytest.mark.parametrize("labels", [{"a.jpg": 0}, {0}])
def test_labels_have_an_order(fs, folder, photos, labels):
    with pytest.raises(TypeError, match="give a list in the order of the objects"):
        pack(photos, f"{folder}/out", labels=labels, filesystem=fs)


def test_other_things_below_the_place_are_not_mixed_in(fs, folder, photos):
    fs.pipe_file(f"{folder}/out/other/more.tar", b"1")

    with pytest.raises(AlreadyExists, match=r"other things are there, such as .*/out/other"):
        pack(photos, f"{folder}/out", filesystem=fs)


def test_a_manifest_without_objects_is_refused(fs, folder, photos):
    manifest = Manifest.from_prefix(photos, filesystem=fs)

    with pytest.raises(EmptyDataset, match="the manifest has no objects"):
        pack(manifest[:0], f"{folder}/out", filesystem=fs)


def test_suffixes_choose_from_a_prefix_only(fs, folder, photos):
    for source in (Manifest.from_prefix(photos, filesystem=fs), [f"{photos}cat/00.jpg"]):
        with pytest.raises(ValueError, match="suffixes are for a prefix"):
            pack(source, f"{folder}/out", suffixes=[".txt"], filesystem=fs)


def test_sizes_may_be_numpys_or_floats(fs, bucket, photos):
    first = pack(photos, f"{bucket}/shards", shard_size=np.int64(10**6), filesystem=fs)

    assert pack(photos, f"{bucket}/shards", shard_size=1e6, filesystem=fs).resumed == len(first.shards)


# ---------------------------------------------------------------------- the plan


def test_an_object_that_tensorflow_could_not_read_is_refused():
    options = {"shard_size": 1, "shuffle": False, "seed": 0}
    with pytest.raises(InvalidUri, match=r"^s3://b/a\.x: TensorFlow reads no Example of 2 GiB"):
        pack_plan.make(_manifest(["a.x"], [(2 << 30) - 20]), None, format="tfrecord", **options)
    assert pack_plan.make(_manifest(["a.x"], [2 << 30]), None, format="tar", **options).sizes[0] > 2 << 30


def _manifest(names, sizes):
    etags = PackedETags.pack(StringsBuilder("" for _ in names).packed())
    packed = StringsBuilder(names).packed()
    return Manifest("s3://b/", packed, np.array(sizes, np.int64), etags, listed=True)


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=30),
    st.integers(1, 20_000),
    st.sampled_from(pack_plan.FORMATS),
    st.booleans(),
    st.integers(1, 3),
)
def test_a_plan_has_every_object_once_in_shards_as_full_as_they_get(sizes, shard_size, format, shuffle, parts):
    names = [f"{n // parts}.{n % parts}" for n in range(len(sizes))]
    options = {"format": format, "shard_size": shard_size, "shuffle": shuffle, "seed": 5}

    plan = pack_plan.make(_manifest(names, sizes), None, **options)

    assert sorted(plan.order.tolist()) == list(range(len(sizes)))
    shards = np.split(plan.order, plan.starts[1:-1])
    assert all(len(shard) for shard in shards)
    samples = [[names[n].partition(".")[0] if format == "tar" else names[n] for n in shard] for shard in shards]
    assert sum(len(set(each)) for each in samples) == len(set().union(*samples))
    for each, size in zip(samples, plan.sizes.tolist(), strict=True):
        assert size <= shard_size or len(set(each)) == 1
    assert plan == plan._replace(id=pack_plan.make(_manifest(names, sizes), None, **options).id)


def test_plans_of_other_objects_or_options_have_other_ids():
    options = {"format": "tar", "shard_size": 1000, "shuffle": False, "seed": 0}
    labels = pack_plan.Labels(np.array([0, 1]), None)
    ids = {
        pack_plan.make(_manifest(names, sizes), label, **options | changed).id
        for names, sizes, label, changed in [
            (["a.x", "b.x"], [1, 2], None, {}),
            (["a.x", "b.y"], [1, 2], None, {}),
            (["a.x", "b.x"], [1, 3], None, {}),
            (["a.x", "b.x"], [1, 2], labels, {}),
            (["a.x", "b.x"], [1, 2], labels._replace(classes=["p", "q"]), {}),
            (["a.x", "b.x"], [1, 2], None, {"format": "tfrecord"}),
            (["a.x", "b.x"], [1, 2], None, {"shard_size": 1001}),
            (["a.x", "b.x"], [1, 2], None, {"shuffle": True}),
            (["a.x", "b.x"], [1, 2], None, {"shuffle": True, "seed": 1}),
        ]
    }
    assert len(ids) == 9


# ---------------------------------------------------------------------- Ray

_ON_RAY = """
    import sys, json, ray, torch_s3
    from torch_s3.data.pack import pack

    source, missing, out, folder = sys.argv[1:]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder, logging_level="error")
    try:
        packed = pack(source, out, shard_size=50_000, labels="folder", ray=True)
        again = pack(source, out, shard_size=50_000, labels="folder", ray=True)
        manifest = torch_s3.Manifest.from_prefix(source)
        torch_s3.S3FileSystem().rm(missing)
        try:
            pack(manifest, out + "-strict", shard_size=50_000, ray=True)
        except torch_s3.NotFound as error:
            failed = str(error)
        print(json.dumps([packed.uris, packed.records, len(packed.shards), again.resumed, failed]))
    finally:
        ray.shutdown()
"""


def test_a_shard_whose_ray_task_was_lost_is_named(fs, folder, photos, monkeypatch):
    class LostError(Exception):
        """As Ray's own."""

    def get(_):
        raise LostError("the worker died")

    fake = types.SimpleNamespace(
        exceptions=types.SimpleNamespace(RayTaskError=type("RayTaskError", (LostError,), {}), RayError=LostError),
        is_initialized=lambda: True,
        cluster_resources=dict,
        remote=lambda **_: lambda _: types.SimpleNamespace(remote=lambda job: job.uri),
        wait=lambda flying, num_returns: (flying[:num_returns], flying[num_returns:]),
        cancel=lambda _: None,
        get=get,
    )
    monkeypatch.setitem(sys.modules, "ray", fake)

    with pytest.raises(S3Error, match=r"/out/shard-000000.tar: its Ray task ended: the worker died"):
        pack(photos, f"{folder}/out", ray=True, filesystem=fs)


@pytest.fixture
def short_folder():
    """A folder whose path is short enough for Ray's sockets."""
    path = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_shards_are_packed_by_ray_tasks(fs, s3, bucket, photos, short_folder):
    pytest.importorskip("ray")
    env = os.environ | {
        "AWS_ENDPOINT_URL": s3.endpoint_url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "PYTHONPATH": str(ROOT),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    missing = f"{photos}dog/09.jpg"
    command = [sys.executable, "-c", textwrap.dedent(_ON_RAY), photos, missing, f"{bucket}/shards", short_folder]

    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110, check=False)

    assert done.returncode == 0, done.stderr
    uris, records, shards, resumed, failed = json.loads(done.stdout.splitlines()[-1])
    assert (records, resumed) == (20, shards)
    assert uris.endswith(f"/shards/shard-{{000000..{shards - 1:06}}}.tar")
    assert failed.startswith(f"{missing}: ")
    names = sorted(fs.glob(f"{bucket}/shards/*.tar"))
    assert len(names) == shards
    found = []
    for name in names:
        with fs.open(name, "rb") as stream:
            found += tariterators.group_by_keys(list(tariterators.tar_file_expander([{"url": "", "stream": stream}])))
    assert [sample["jpg"] for sample in found] == [_body(n) for n in range(10)] * 2
    assert _processes_with(short_folder) == []


def _processes_with(text):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if text.encode() in (process / "cmdline").read_bytes():
                found.append((process / "cmdline").read_bytes())
    return found
