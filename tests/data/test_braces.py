"""Brace expansion, against bash."""

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_s3 import InvalidUri
from torch_s3.data.braces import expand

PATTERNS = [
    "s3://b/shard-{000000..000012}.tar",
    "{a,b}{1..3}",
    "x{a,b{1..2},{c,d}e}y",
    "{3..1}",
    "{-2..2}",
    "{08..11}",
    "{0..9..4}",
    "{a..e..2}",
    "{,x}y",
    "plain",
    "{x}",
    "{}",
    "{1..}",
    "a,b}",
    "{{1..2},z}",
    "{a,{b}}",
]


@pytest.mark.skipif(shutil.which("bash") is None, reason="compares with bash")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_names_are_those_of_bash(pattern):
    words = subprocess.run(
        ["bash", "-c", f"for word in {pattern}; do echo $word; done"], capture_output=True, text=True, check=True
    )

    assert expand(pattern) == words.stdout.splitlines()


def test_a_thousand_shards_come_in_order():
    names = expand("s3://bucket/shard-{000000..001023}.tar")

    assert len(names) == 1024
    assert (names[0], names[-1]) == ("s3://bucket/shard-000000.tar", "s3://bucket/shard-001023.tar")
    assert names == sorted(names)


@pytest.mark.parametrize("pattern", ["s3://b/{0..3", "{a,b", "{", "a{b,{c}", "{1..2}{"])
def test_a_brace_that_is_not_closed_is_an_error(pattern):
    with pytest.raises(InvalidUri, match="is not closed"):
        expand(pattern)


@pytest.mark.parametrize(
    "pattern", ["{0..1000000}", "{0..999999999999999999}", "{0..9}" * 7, "{0..999999..0}{a,b}", "{" * 30 + "}" * 30]
)
def test_what_would_not_end_is_refused(pattern):
    with pytest.raises(InvalidUri, match="more than"):
        expand(pattern)


@given(st.text("{},.a0", max_size=12))
def test_anything_is_expanded_or_refused(pattern):
    try:
        assert all(len(name) <= 2 * len(pattern) for name in expand(pattern))
    except InvalidUri:
        assert "{" in pattern
