"""Shards that TensorFlow and webdataset have written are read as they read them."""

import io

import numpy as np
import pytest
import torch
import webdataset
from pictures import number_of, picture
from torch.utils.data import DataLoader

from torch_s3.data.example import FixedFeature, SequenceFeature, VarFeature
from torch_s3.data.tars import S3TarDataset
from torch_s3.data.tfrecords import S3TFRecordDataset

COUNT = 30
# webdataset leaves its files to the garbage collection.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def put(fs, folder, tmp_path):
    """Stores the files of ``tmp_path``."""

    def put():
        fs.put(f"{tmp_path}/", f"{folder}/", recursive=True)
        return f"{folder}/"

    return put


def example(tf, number):
    train = tf.train
    features = {
        "number": train.Feature(int64_list=train.Int64List(value=[number])),
        "name": train.Feature(bytes_list=train.BytesList(value=[b"record %d" % number])),
        "weights": train.Feature(float_list=train.FloatList(value=[number / 2, number / 4])),
        "few": train.Feature(int64_list=train.Int64List(value=range(number % 4))),
    }
    return train.Example(features=train.Features(feature=features))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("compression", "suffix"), [("", ""), ("GZIP", ".gz")])
def test_examples_of_tensorflow(tf, put, tmp_path, s3, workers, compression, suffix):
    for shard in range(3):
        with tf.io.TFRecordWriter(f"{tmp_path}/x-0000{shard}-of-00003{suffix}", compression) as writer:
            for number in range(shard, COUNT, 3):
                writer.write(example(tf, number).SerializeToString())
    features = {
        "number": FixedFeature((), dtype=torch.int64),
        "name": FixedFeature((), dtype=bytes),
        "weights": FixedFeature((2,)),
        "few": VarFeature(dtype=torch.int64),
    }
    train = S3TFRecordDataset(put(), features=features, shuffle=True, batch_size=4, storage_options=s3.storage_options)
    seen = [
        record for batch in DataLoader(train, batch_size=4, num_workers=workers, collate_fn=list) for record in batch
    ]
    parsed = {
        number: tf.io.parse_single_example(
            example(tf, number).SerializeToString(),
            {
                "number": tf.io.FixedLenFeature((), tf.int64),
                "name": tf.io.FixedLenFeature((), tf.string),
                "weights": tf.io.FixedLenFeature((2,), tf.float32),
                "few": tf.io.RaggedFeature(tf.int64),
            },
        )
        for number in range(COUNT)
    }

    assert sorted(int(record["number"]) for record in seen) == list(range(COUNT))
    for record in seen:
        theirs = parsed[int(record["number"])]
        assert record["name"] == theirs["name"].numpy()
        assert np.array_equal(record["weights"].numpy(), theirs["weights"].numpy())
        assert np.array_equal(record["few"].numpy(), theirs["few"].numpy())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_records_are_those_that_tensorflow_reads(tf, put, tmp_path, s3):
    rng = np.random.default_rng(0)
    path = f"{tmp_path}/x.tfrecord"
    with tf.io.TFRecordWriter(path) as writer:
        for size in rng.integers(0, 50_000, 40):
            writer.write(rng.bytes(int(size)))

    theirs = [record.numpy() for record in tf.data.TFRecordDataset(path)]
    assert list(S3TFRecordDataset(put() + "x.tfrecord", storage_options=s3.storage_options)) == theirs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sequence_examples_of_tensorflow(tf, put, tmp_path, s3):
    train = tf.train
    with tf.io.TFRecordWriter(f"{tmp_path}/x.tfrecord") as writer:
        for number in range(3):
            steps = [train.Feature(float_list=train.FloatList(value=[step, number])) for step in range(number + 1)]
            lists = train.FeatureLists(feature_list={"steps": train.FeatureList(feature=steps)})
            writer.write(train.SequenceExample(feature_lists=lists).SerializeToString())
    features = {"steps": SequenceFeature(shape=(2,))}
    found = list(S3TFRecordDataset(put(), features=features, storage_options=s3.storage_options))

    assert [record["steps"].tolist() for record in found] == [
        [[step, number] for step in range(number + 1)] for number in range(3)
    ]


# ------------------------------------------------------------------ webdataset


@pytest.fixture
def written(put, tmp_path):
    """The prefix of shards of pictures with labels and a little of everything, by webdataset's own writer."""
    with webdataset.ShardWriter(f"{tmp_path}/train-%06d.tar", maxcount=8, verbose=0) as sink:
        for number in range(20):
            array = io.BytesIO()
            np.save(array, np.arange(number))
            sink.write(
                {
                    "__key__": f"folder/sample{number:04}",
                    "png": picture(number),
                    "cls": str(number).encode(),
                    "json": b'{"number": %d}' % number,
                    "txt": f"größe {number}".encode(),
                    "seg.npy": array.getvalue(),
                }
            )
    return put()


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_of_webdataset(written, s3, workers):
    train = S3TarDataset(written, shuffle=True, shuffle_buffer=5, batch_size=4, storage_options=s3.storage_options)
    seen = [
        sample for batch in DataLoader(train, batch_size=4, num_workers=workers, collate_fn=list) for sample in batch
    ]

    assert sorted(sample["cls"] for sample in seen) == list(range(20))
    for sample in seen:
        number = sample["cls"]
        assert sample["__key__"] == f"folder/sample{number:04}"
        assert sample["__url__"] == f"{written}train-{number // 8:06}.tar"
        assert number_of(sample["png"]) == number
        assert sample["json"] == {"number": number}
        assert sample["txt"] == f"größe {number}"
        assert sample["seg.npy"].tolist() == list(range(number))


def test_undecoded_samples_are_those_that_webdataset_reads(written, s3, tmp_path):
    ours = list(S3TarDataset(written, decode=False, storage_options=s3.storage_options))
    theirs = list(webdataset.WebDataset([str(path) for path in sorted(tmp_path.glob("*.tar"))], shardshuffle=False))
    members = [name for name in theirs[0] if not name.startswith("__")]

    assert [sample["__key__"] for sample in ours] == [sample["__key__"] for sample in theirs]
    for mine, his in zip(ours, theirs, strict=True):
        assert {name: mine[name] for name in members} == {name: his[name] for name in members}
        assert set(mine) == {"__key__", "__url__", *members}


@pytest.mark.parametrize(
    "how", ["pil", "l", {"cls": lambda data: -int(data)}, len], ids=["pil", "l", "mapping", "callable"]
)
def test_other_ways_to_decode(written, s3, how):
    sample = S3TarDataset(written, decode=how, storage_options=s3.storage_options).read(3)

    if how == "pil":
        assert sample["png"].size == (6, 4)
    elif how == "l":
        assert sample["png"].shape == (1, 4, 6)
    elif callable(how):
        assert sample == 7
    else:
        assert (sample["cls"], sample["txt"]) == (-3, "größe 3")


def test_index_is_the_one_that_wds2idx_writes(written, s3, fs, tmp_path):
    """Offsets of members' data, as Python's own tarfile says."""
    import tarfile

    S3TarDataset(written, storage_options=s3.storage_options).write_index()
    text = fs.cat_file(f"{written}train-000002.tar.idx").decode().splitlines()
    with tarfile.open(tmp_path / "train-000002.tar") as archive:
        members = [member for member in archive if member.isfile()]

    assert text[0] == "v1.2 4"
    words = " ".join(text[1:]).split()
    assert [tuple(words[at + 1 : at + 4]) for at in range(0, len(words), 4)] == [
        (str(member.offset_data), str(member.size), member.name) for member in members
    ]
