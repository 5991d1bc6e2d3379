import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_s3.transport.ranges import coalesce, split


@given(st.integers(0, 10**15), st.integers(0, 200), st.integers(1, 250))
def test_ranges_are_every_byte_once_and_in_order(start, length, part_size):
    covered = [byte for first, stop in split(start, start + length, part_size=part_size) for byte in range(first, stop)]

    assert covered == list(range(start, start + length))


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


_RANGES = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 40)).map(lambda at: (at[0], at[0] + at[1])), max_size=12
)


@given(_RANGES, st.integers(0, 30), st.integers(1, 120))
def test_every_range_lies_in_exactly_one_span(ranges, max_gap, max_span):
    spans = coalesce(ranges, max_gap=max_gap, max_span=max_span)

    assert sorted(index for span in spans for index in span.members) == list(range(len(ranges)))
    for start, stop, members in spans:
        assert start == min(ranges[index][0] for index in members)
        assert stop == max(ranges[index][1] for index in members)
        assert stop - start <= max_span or len(members) == 1
        wanted = {byte for index in members for byte in range(*ranges[index])}
        gaps = "".join(" -"[byte in wanted] for byte in range(start, stop)).split("-")
        assert max(map(len, gaps)) <= max_gap
    assert [span.start for span in spans] == sorted(span.start for span in spans)


@given(_RANGES, st.integers(0, 30), st.integers(1, 120))
def test_neighbouring_spans_could_not_be_one(ranges, max_gap, max_span):
    spans = coalesce(ranges, max_gap=max_gap, max_span=max_span)

    for left, right in itertools.pairwise(spans):
        first = ranges[right.members[0]]
        assert first[0] - left.stop > max_gap or max(first[1], left.stop) - left.start > max_span


@pytest.mark.parametrize("wrong", [(3, 3), (4, 2), (-1, 2)])
def test_no_bytes_cannot_be_merged(wrong):
    with pytest.raises(ValueError, match="cannot read"):
        coalesce([(0, 1), wrong], max_gap=0, max_span=10)
