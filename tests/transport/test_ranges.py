import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_s3.transport.ranges import split


@settings(deadline=None)
@given(st.integers(0, 10**15), st.integers(0, 200), st.integers(1, 250))
def test_ranges_are_every_byte_once_and_in_order(start, length, part_size):
    covered = [byte for first, stop in split(start, start + length, part_size=part_size) for byte in range(first, stop)]

    assert covered == list(range(start, start + length))


@settings(deadline=None)
@given(st.integers(0, 10**15), st.integers(1, 10**6), st.integers(10**4, 10**7))
def test_ranges_are_whole_parts_but_for_the_last(start, length, part_size):
    *whole, last = [stop - first for first, stop in split(start, start + length, part_size=part_size)]

    assert set(whole) <= {part_size}
    assert 0 < last <= part_size


def test_nothing_is_no_range():
    assert list(split(7, 7, part_size=1)) == []


@pytest.mark.parametrize(("start", "stop", "part_size"), [(2, 1, 8), (-1, 1, 8), (0, 1, 0), (0, 1, -8)])
def test_impossible_ranges_are_a_value_error_at_once(start, stop, part_size):
    with pytest.raises(ValueError, match=r"cannot cut \["):
        split(start, stop, part_size=part_size)
