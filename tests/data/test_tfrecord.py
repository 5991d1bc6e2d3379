"""TFRecord files and Examples, against TensorFlow's own writer and parser."""

import contextlib
import itertools
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_s3 import DecodeError, IntegrityError
from torch_s3.data.example import Features, FixedFeature, SequenceFeature, VarFeature, example
from torch_s3.data.protobuf import varints
from torch_s3.data.tfrecord import TFRecordScan, frame, record

URI = "s3://b/shard.tfrecord"


def _file(records):
    return b"".join(b"".join(frame(each)) for each in records)


def _bounds(data, step=1 << 30):
    scan = TFRecordScan(URI)
    for start in range(0, len(data), step):
        scan.feed(memoryview(data)[start : start + step])
    return scan.finish().tolist()


def _records(data):
    bounds = _bounds(data)
    pairs = itertools.pairwise(bounds)
    return [
        bytes(record(memoryview(data)[start:stop], URI, number, start)) for number, (start, stop) in enumerate(pairs)
    ]


RECORDS = [b"one", b"", b"x" * 1000, bytes(range(256))]


def test_reads_what_tensorflow_has_written(tf, tmp_path):
    path = str(tmp_path / "records")
    with tf.io.TFRecordWriter(path) as writer:
        for each in RECORDS:
            writer.write(each)

    assert _records((tmp_path / "records").read_bytes()) == RECORDS


def test_tensorflow_reads_what_is_framed_here(tf, tmp_path):
    (tmp_path / "records").write_bytes(_file(RECORDS))

    assert [each.numpy() for each in tf.data.TFRecordDataset(str(tmp_path / "records"))] == RECORDS


def test_pieces_are_framed_as_one_record():
    assert b"".join(frame(b"ab", memoryview(b"c"), b"")) == b"".join(frame(b"abc"))


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 50))
def test_bounds_are_the_same_however_the_bytes_are_cut(records, step):
    expected = np.cumsum([0, *(len(each) + 16 for each in records)]).tolist()

    assert _bounds(_file(records), step) == expected


def test_bounds_until_now_hold_whole_records_only():
    data = memoryview(_file([b"abc", b"defg"]))
    scan = TFRecordScan(URI)
    scan.feed(data[:18])
    assert scan.bounds().tolist() == [0]
    scan.feed(data[18:32])
    assert scan.bounds().tolist() == [0, 19]
    scan.feed(data[32:])
    assert scan.bounds().tolist() == [0, 19, 39]


@pytest.mark.parametrize("cut", [1, 11, 12, 18, 20, 38])
def test_a_shard_that_is_cut_off_is_named(cut):
    data = _file([b"abc", b"defg"])[:cut]
    number, offset = (0, 0) if cut < 19 else (1, 19)

    with pytest.raises(
        IntegrityError, match=rf"^{URI}: record {number}, at byte {offset}: .*cut off after {cut} bytes"
    ):
        _bounds(data)


@given(st.integers(0, 18), st.integers(0, 7))
def test_no_flipped_bit_is_missed(byte, bit):
    data = bytearray(_file([b"abc"]))
    data[byte] ^= 1 << bit

    with pytest.raises(IntegrityError, match="record 0, at byte 0: "):
        _records(bytes(data))


def test_a_record_of_another_length_than_it_says_is_an_error():
    data = memoryview(_file([b"abc"]))

    with pytest.raises(IntegrityError, match="it says that it has 3 bytes, not 2"):
        record(data[:-1], URI, 7, 100)
    with pytest.raises(IntegrityError, match="record 7, at byte 100: it has 15 bytes"):
        record(data[:15], URI, 7, 100)


# ---------------------------------------------------------------------- Examples


def _example(tf, **features):
    kinds = {bytes: "bytes_list", float: "float_list", int: "int64_list"}
    lists = {bytes: tf.train.BytesList, float: tf.train.FloatList, int: tf.train.Int64List}
    made = {}
    for name, values in features.items():
        kind = type(values[0]) if values else int
        made[name] = tf.train.Feature(**{kinds[kind]: lists[kind](value=values)})
    return tf.train.Features(feature=made)


def _decode(spec, data):
    return Features(spec)(data, URI, 3)


def test_an_example_becomes_what_tensorflow_makes_of_it(tf):
    values = {
        "image": [b"\xff\xd8jpeg"],
        "words": [b"a", b"", b"bc"],
        "label": [-3],
        "box": [0.5, -1.25, 3e30, float("inf")],
        "ids": [0, 1, 127, 128, 2**40, -1, 2**63 - 1, -(2**63)],
        "unused": [1.0] * 1000,
    }
    data = tf.train.Example(features=_example(tf, **values)).SerializeToString()
    io = tf.io
    theirs = io.parse_single_example(
        data,
        {
            "image": io.FixedLenFeature((), tf.string),
            "words": io.VarLenFeature(tf.string),
            "label": io.FixedLenFeature((), tf.int64),
            "box": io.FixedLenFeature((2, 2), tf.float32),
            "ids": io.VarLenFeature(tf.int64),
            "absent": io.VarLenFeature(tf.float32),
            "default": io.FixedLenFeature((2,), tf.int64, default_value=[7, 8]),
        },
    )
    spec = {
        "image": FixedFeature((), bytes),
        "words": VarFeature(bytes),
        "label": FixedFeature((), torch.int64),
        "box": FixedFeature((2, 2)),
        "ids": VarFeature(torch.int64),
        "absent": VarFeature(),
        "default": FixedFeature((2,), torch.int64, default=[7, 8]),
    }

    ours = _decode(spec, data)

    assert list(ours) == list(spec)
    assert ours["image"] == theirs["image"].numpy()
    assert ours["words"] == theirs["words"].values.numpy().tolist()
    for name in ("label", "box", "default"):
        assert ours[name].numpy().tolist() == theirs[name].numpy().tolist()
        assert ours[name].numpy().shape == theirs[name].numpy().shape
    assert ours["ids"].tolist() == theirs["ids"].values.numpy().tolist() == values["ids"]
    assert ours["absent"].shape == (0,)


def test_a_sequence_example_becomes_what_tensorflow_makes_of_it(tf):
    def steps(kind, *lists):
        features = [_example(tf, x=values).feature["x"] if values else tf.train.Feature() for values in lists]
        return tf.train.FeatureList(feature=features)

    data = tf.train.SequenceExample(
        context=_example(tf, length=[3]),
        feature_lists=tf.train.FeatureLists(
            feature_list={
                "frames": steps(bytes, [b"a"], [b"b"], [b"c"]),
                "boxes": steps(float, [1.0, 2.0], [3.0, 4.0]),
                "tokens": steps(int, [1, 300], [], [-1]),
            }
        ),
    ).SerializeToString()
    context, lists = tf.io.parse_single_sequence_example(
        data,
        {"length": tf.io.FixedLenFeature((), tf.int64)},
        {
            "frames": tf.io.FixedLenSequenceFeature((), tf.string),
            "boxes": tf.io.FixedLenSequenceFeature((2,), tf.float32),
            "tokens": tf.io.RaggedFeature(tf.int64),
        },
    )

    ours = _decode(
        {
            "length": FixedFeature((), torch.int64),
            "frames": SequenceFeature((), bytes),
            "boxes": SequenceFeature((2,), torch.float32),
            "tokens": SequenceFeature(None, torch.int64),
            "absent": SequenceFeature(None, torch.int64),
        },
        data,
    )

    assert ours["length"].item() == context["length"].numpy()
    assert ours["frames"] == lists["frames"].numpy().tolist()
    assert ours["boxes"].tolist() == lists["boxes"].numpy().tolist()
    assert [each.tolist() for each in ours["tokens"]] == lists["tokens"].to_list()
    assert ours["absent"] == []


def _field(number, body):
    return bytes([number << 3 | 2, len(body)]) + body


def _feature(kind, *values):
    return b"".join(_field(kind, each) for each in values)


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [(2, [bytes(6), bytes(6)]), (2, [b"\0\0", b"\0\0"]), (3, [b"\1\x80", b"\1"]), (3, [b"\x80", b"\1"])],
)
def test_numbers_cut_in_two_are_not_put_together(kind, pieces):
    pieces = [_field(1, each) for each in pieces]
    dtype = {2: torch.float32, 3: torch.int64}[kind]
    features = _field(1, _field(1, _field(1, b"x") + _field(2, _feature(kind, *pieces))))
    steps = b"".join(_field(1, _feature(kind, each)) for each in pieces)
    lists = _field(2, _field(1, _field(1, b"x") + _field(2, steps)))

    for data, wanted in [(features, VarFeature(dtype)), *((lists, SequenceFeature(s, dtype)) for s in ((), None))]:
        with pytest.raises(DecodeError, match="a list of numbers ends within one"):
            _decode({"x": wanted}, data)


def test_one_default_fills_any_shape():
    decoded = _decode(
        {
            "number": FixedFeature((), torch.int64, default=3),
            "listed": FixedFeature((), default=[1.5]),
            "matrix": FixedFeature((2, 1), default=2),
        },
        b"",
    )

    assert {name: value.tolist() for name, value in decoded.items()} == {
        "number": 3,
        "listed": 1.5,
        "matrix": [[2.0], [2.0]],
    }


def test_unpacked_numbers_and_mixtures_are_read():
    def made(kind, values):
        return _field(1, _field(1, _field(1, b"x") + _field(2, _field(kind, values))))

    floats = b"\x0d" + struct.pack("<f", 1.5) + _field(1, struct.pack("<2f", 2.5, 3.5)) + b"\x0d" + struct.pack("<f", 4)
    ints = b"\x08\x05" + _field(1, b"\x06\xac\x02") + b"\x08\x80\x01"

    assert _decode({"x": VarFeature()}, made(2, floats))["x"].tolist() == [1.5, 2.5, 3.5, 4.0]
    assert _decode({"x": VarFeature(torch.int64)}, made(3, ints))["x"].tolist() == [5, 6, 300, 128]


def test_tensors_do_not_share_the_records_memory():
    data = bytearray(b"".join(example({"x": 5})))
    before = _decode({"x": VarFeature(torch.int64)}, data)["x"]
    data[:] = bytes(len(data))

    assert before.tolist() == [5]


def test_a_written_example_is_the_one_that_tensorflow_reads(tf):
    features = {"key": "é".encode(), "label": 3, "low": -2, "data": memoryview(b"x" * 300)}

    read = tf.train.Example.FromString(b"".join(example(features))).features.feature

    assert read["key"].bytes_list.value == ["é".encode()]
    assert read["label"].int64_list.value == [3]
    assert read["low"].int64_list.value == [-2]
    assert read["data"].bytes_list.value == [b"x" * 300]


EXAMPLE = b"".join(example({"x": 5, "data": b"abc"}))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"y": FixedFeature((), torch.int64)}, "no feature 'y', and there is no default; it has 'data', 'x'"),
        ({"x": FixedFeature((2,), torch.int64)}, r"feature 'x' has 1 values, not \(2,\)"),
        ({"x": FixedFeature(())}, "feature 'x' holds int64, not float32"),
        ({"data": VarFeature()}, "feature 'data' holds bytes, not float32"),
        ({"x": SequenceFeature()}, "no feature list 'x'; it has 'data', 'x'"),
    ],
)
def test_what_is_not_as_asked_for_is_named(spec, message):
    with pytest.raises(DecodeError, match=rf"^{URI}: record 3: .*: {message}"):
        _decode(spec, EXAMPLE)


def test_a_feature_list_is_not_taken_for_a_feature_that_is_not_there(tf):
    steps = tf.train.FeatureList(feature=[tf.train.Feature(int64_list=tf.train.Int64List(value=[1]))])
    lists = tf.train.FeatureLists(feature_list={"s": steps})
    record = tf.train.SequenceExample(feature_lists=lists).SerializeToString()

    with pytest.raises(DecodeError, match="'s' is a feature list, for SequenceFeature"):
        _decode({"s": VarFeature(torch.int64)}, record)
    with pytest.raises(DecodeError, match=r"no feature 'x', .*; it has no features, and the feature lists 's'"):
        _decode({"x": FixedFeature()}, record)


@pytest.mark.parametrize(
    "spec",
    [
        {"x": FixedFeature((), torch.uint8)},
        {"x": FixedFeature((3,), torch.int64, default=[1, 2])},
        {"x": FixedFeature((), bytes, default="text")},
        {"x": FixedFeature((), torch.int64, default=1.5)},
        {"x": FixedFeature((), torch.int64, default=2**70)},
        {"x": FixedFeature((2,), default="ab")},
        {"x": FixedFeature((-1,))},
        {"x": FixedFeature(3)},
        {"x": SequenceFeature(shape=3)},
    ],
)
def test_a_spec_that_can_not_be_meant_is_refused(spec):
    with pytest.raises(ValueError, match="'x'"):
        Features(spec)


def test_defaults_are_not_shared_between_records():
    features = Features({"y": FixedFeature((2,), torch.int64, default=1), "z": FixedFeature((1,), bytes, default=b"a")})
    first = features(EXAMPLE, URI, 0)
    first["y"][0] = 9
    first["z"].append(b"b")

    second = features(EXAMPLE, URI, 1)
    assert second["y"].tolist() == [1, 1]
    assert second["z"] == [b"a"]


SPEC = {
    "x": VarFeature(torch.int64),
    "data": FixedFeature((), bytes, default=b""),
    "s": SequenceFeature(None, torch.int64),
}


@given(st.binary(max_size=60))
def test_any_bytes_are_decoded_or_refused(data):
    with contextlib.suppress(DecodeError):
        assert set(_decode(SPEC, data)) == set(SPEC)


@given(st.integers(0, len(EXAMPLE) - 1), st.integers(0, 255))
def test_any_changed_byte_is_decoded_or_refused(at, value):
    data = bytearray(EXAMPLE)
    data[at] = value
    with contextlib.suppress(DecodeError):
        _decode(SPEC, data)


def test_a_list_of_a_million_empty_steps_is_refused():
    def head(number, size):
        return bytes([number << 3 | 2]) + _varint(size)

    steps = b"\x0a\x00" * (1 << 20) + b"\x0a\x00"
    entry = b"\x0a\x01s" + head(2, len(steps)) + steps
    body = head(1, len(entry)) + entry

    with pytest.raises(DecodeError, match="more than 1048576 steps"):
        _decode(SPEC, head(2, len(body)) + body)


def _varint(number):
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_varints_are_what_protobuf_says(numbers):
    assert varints(b"".join(_varint(number % 2**64) for number in numbers)).tolist() == numbers


@pytest.mark.parametrize("data", [b"\x80", b"\x01\xff", b"\xff" * 10 + b"\x01"])
def test_broken_varints_are_errors(data):
    with pytest.raises(ValueError, match=r"a list of numbers ends|more than 10 bytes"):
        varints(data)
