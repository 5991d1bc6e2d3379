"""Memory of ranges is used again, but only where nobody sees it."""

import itertools

import numpy as np
import pytest

from torch_s3 import ObjectChanged
from torch_s3.uris import Read, read_ahead

SIZE = 8 << 20


@pytest.fixture
def reads(fs, folder):
    """Of ten parts, each full of its number."""
    for number in range(10):
        fs.pipe(f"{folder}/{number}", bytes([number]) * SIZE)
    return [Read(f"{folder[5:]}/{number}", SIZE, None, 1, SIZE - number) for number in range(10)]


def test_what_somebody_still_has_is_not_written_to(fs, reads):
    bodies = list(read_ahead(fs, reads, window=4))

    assert [(body[0], body[-1], len(body)) for body in bodies] == [(n, n, SIZE - n - 1) for n in range(10)]


def test_slice_keeps_all_of_it(fs, reads):
    slices = [body[100:200] for body in read_ahead(fs, reads, window=1)]

    assert [bytes(body) for body in slices] == [bytes([number]) * 100 for number in range(10)]


def test_what_nobody_has_is_used_again(fs, reads):
    places = set()
    for number, body in enumerate(read_ahead(fs, reads, window=1)):
        assert body[0] == number
        places.add(np.frombuffer(body, np.uint8).ctypes.data)
        del body

    assert len(places) <= 3


def test_range_beyond_the_object_is_an_error_in_its_place(fs, reads):
    path = reads[0].path
    found = list(read_ahead(fs, [reads[1], Read(path, SIZE - 1, None, 0, 100), reads[2]], window=2))

    assert isinstance(found[1], ObjectChanged)
    assert [body[0] for body in itertools.compress(found, [1, 0, 1])] == [1, 2]
