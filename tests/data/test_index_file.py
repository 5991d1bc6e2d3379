"""DALI's index files."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_s3 import IntegrityError
from torch_s3.data import index_file
from torch_s3.data.tar import Member

URI = "s3://b/shard.idx"


@given(st.lists(st.integers(16, 1 << 40), max_size=20))
def test_a_tfrecord_index_is_read_as_written(sizes):
    bounds = np.cumsum([0, *sizes], dtype=np.int64)

    assert index_file.parse(index_file.text(bounds, "tfrecord"), "tfrecord").tolist() == bounds.tolist()


def test_a_tfrecord_index_looks_as_tfrecord2idx_writes_it():
    assert index_file.text(np.array([0, 19, 39]), "tfrecord") == "0 19\n19 20\n"


def test_a_tar_index_looks_as_wds2idx_writes_it():
    samples = [
        [Member("a/0.jpg", 0, 512, 700), Member("a/0.CLS", 1536, 2048, 1)],
        [Member("a/1 x.seg.png", 2560, 3072, 0)],
    ]

    text = index_file.text(np.array([]), "tar", samples)

    assert text == "v1.2 2\njpg 512 700 a/0.jpg cls 2048 1 a/0.CLS\nseg.png 3072 0 a/1_x.seg.png\n"
    assert index_file.parse(text.encode(), "tar").tolist() == [0, 2560, 3072]


def test_an_index_of_version_1_1_has_no_names():
    assert index_file.parse("v1.1 1\njpg 512 700 cls 2048 1\n", "tar").tolist() == [0, 2560]


def test_an_empty_shards_index_has_one_bound():
    assert index_file.parse("", "tfrecord").tolist() == [0]
    assert index_file.parse("v1.2 0\n", "tar").tolist() == [0]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("tfrecord", "0 19\n20 20\n"),
        ("tfrecord", "5 19\n"),
        ("tfrecord", "0 19\n19\n"),
        ("tfrecord", "0 19\n19 x\n"),
        ("tfrecord", "0 -19\n"),
        ("tfrecord", "0 99999999999999999999\n"),
        ("tfrecord", "v1.2 0\n"),
        ("tar", ""),
        ("tar", "v1.2 2\njpg 512 700 a.jpg\n"),
        ("tar", "v9 1\njpg 512 700 a.jpg\n"),
        ("tar", "v1.2 1\njpg 512 700\n"),
        ("tar", "v1.2 2\njpg 1024 700 a.jpg\njpg 512 7 a.jpg\n"),
        ("tar", "v1.2 1\njpg 512 99999999999999999999 a.jpg\n"),
    ],
)
def test_what_is_no_index_is_named(kind, text):
    with pytest.raises(IntegrityError, match=f"^{URI}: not a whole index"):
        index_file.parse(text, kind, URI)


@given(st.sampled_from(index_file.KINDS), st.text("v1.2 0a\n9-", max_size=30))
def test_any_text_is_read_or_refused(kind, text):
    with contextlib.suppress(IntegrityError):
        assert (np.diff(index_file.parse(text, kind)) > 0).all()
