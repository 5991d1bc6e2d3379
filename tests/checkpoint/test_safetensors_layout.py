"""The layout of safetensors files, beside the format's own library."""

import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_s3 import errors
from torch_s3.checkpoint.safetensors import DTYPES, MAX_HEADER, PREFIX, build, header_size, parse

_URI = "s3://b/model.safetensors"


def _file(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def _parsed(content):
    length = header_size(content[:PREFIX], size=len(content), uri=_URI)
    return parse(content[PREFIX : PREFIX + length], size=len(content), uri=_URI)


def _entry(dtype="F32", shape=(1,), data_offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(data_offsets)} | more


_THEIRS = [dtype for name, dtype in DTYPES.items() if name != "F8_E8M0"]  # that one it does not load
_TENSORS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(_THEIRS), st.lists(st.integers(0, 4), max_size=4)),
    max_size=6,
)
_METADATA = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


@given(_TENSORS, _METADATA)
def test_what_is_built_is_what_their_library_reads(tensors, metadata):
    first, placed = build(tensors, metadata)
    size = placed[-1].stop if placed else len(first)
    content = first + bytes(index % 2 for index in range(size - len(first)))

    got = safetensors.torch.load(content)
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in got.items()} == tensors
    for tensor in placed:
        if tensor.stop > tensor.start:
            assert got[tensor.name].flatten().view(torch.uint8).numpy().tobytes() == content[tensor.start : tensor.stop]
        assert tensor.start % tensor.dtype.itemsize == 0
    assert _parsed(content) == (tuple(sorted(placed, key=lambda tensor: (tensor.start, tensor.stop))), metadata)


@given(_TENSORS, _METADATA)
def test_what_their_library_writes_is_parsed(tensors, metadata):
    state = {name: torch.ones(shape, dtype=torch.uint8).to(dtype) for name, (dtype, shape) in tensors.items()}
    content = safetensors.torch.save(state, metadata or None)  # of {} and {} it makes no JSON

    layout = _parsed(content)

    assert layout.metadata == metadata
    assert {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in layout.tensors} == tensors
    for tensor in layout.tensors:
        if math.prod(tensor.shape):
            assert (
                content[tensor.start : tensor.stop] == state[tensor.name].flatten().view(torch.uint8).numpy().tobytes()
            )


@given(st.binary(max_size=60), st.integers(0, 100))
def test_any_bytes_are_a_layout_or_a_checkpoint_error(header, data):
    with pytest.raises(errors.CheckpointError):
        _parsed(_file(b"{" + header, bytes(data)))


def test_header_may_end_in_spaces_and_hold_no_metadata():
    header = json.dumps({"__metadata__": None, "a": _entry()}).encode() + b"   "

    assert [tensor[:3] for tensor in _parsed(_file(header, bytes(4))).tensors] == [("a", torch.float32, (1,))]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no header"),
        (b"\x05\0\0", "no header"),
        (bytes(8), "no header"),
        (MAX_HEADER.to_bytes(8, "little"), "truncated"),
        ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", "100000000 are allowed"),
        (b"\xff" * 8 + b"{}", "are allowed"),
        (_file(b"[]"), "no JSON object"),
        (_file(b" {}"), "no JSON object"),
        (_file(b"{} x"), "no JSON"),
        (_file(b"\xff\xfe{}"), "no JSON"),
        (_file(b'{"a":' * 100), "no JSON"),
        (_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested"),
        (_file(b'{"a":' + b"[          " * 100_000 + b"]" * 100_000 + b"}"), "no JSON"),
        (_file({"__metadata__": {"a": 1}}), "metadata"),
        (_file({"__metadata__": []}), "metadata"),
        (_file({"a": None}), "no tensor"),
        (_file({"a": _entry(shape=[1.0])}, bytes(4)), "no tensor"),
        (_file({"a": _entry(shape=[True])}, bytes(4)), "no tensor"),
        (_file({"a": _entry(shape=[-1])}, bytes(4)), "no tensor"),
        (_file({"a": _entry(data_offsets=[0])}, bytes(4)), "no tensor"),
        (_file({"a": _entry(data_offsets=[0, 2**63])}, bytes(4)), "no tensor"),
        (_file({"a": _entry(dtype="F4", shape=[8])}, bytes(4)), "torch does not have"),
        (_file({"a": _entry(shape=[2])}, bytes(4)), "does not fit"),
        (_file({"a": _entry(shape=[2**62] * 5000)}, bytes(4)), "does not fit"),
        (_file({"a": _entry(data_offsets=[8, 4])}, bytes(4)), "does not fit"),
        (_file({"a": _entry(data_offsets=[4, 8])}, bytes(8)), "does not start where"),
        (_file({"a": _entry(), "b": _entry()}, bytes(4)), "does not start where"),
        (_file({"a": _entry(shape=[2], data_offsets=[0, 8]), "b": _entry(data_offsets=[4, 8])}, bytes(8)), "not start"),
        (_file({"a": _entry(shape=[10**13], data_offsets=[0, 4 * 10**13])}, bytes(4)), "truncated"),
        (_file({"a": _entry()}, bytes(3)), "truncated"),
        (_file({"a": _entry()}, bytes(5)), "tensors end after"),
        (_file(b'{"a":' + json.dumps(_entry(shape=[0], data_offsets=[0, 0])).encode() + b","
               b'"a":' + json.dumps(_entry()).encode() + b"}", bytes(4)), "one name twice"),
    ],
)  # fmt: skip
def test_what_breaks_the_format_is_a_checkpoint_error(content, words):
    with pytest.raises(errors.CheckpointError, match=words) as caught:
        _parsed(content)

    assert caught.value.uri == _URI
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a": (torch.complex128, [1])}, None),
        ({"__metadata__": (torch.float32, [1])}, None),
        ({1: (torch.float32, [1])}, None),
        ({}, {"epoch": 1}),
    ],
    ids=["dtype", "reserved name", "name", "metadata"],
)
def test_what_the_format_has_no_place_for_is_a_value_error(tensors, metadata):
    with pytest.raises(ValueError, match="safetensors"):
        build(tensors, metadata)
