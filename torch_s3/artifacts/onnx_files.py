"""Which files an ONNX model keeps its tensors in, found without the onnx package. Pure, no I/O.

Source of the format: ``onnx/onnx.proto`` (ModelProto and what is in it), in protobuf's wire format.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_LOCATED = 13  # TensorProto.external_data
_TREE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {_LOCATED: "located"},
}
"""What may lead to a tensor: the kind of message under each field's number."""


def external_files(model: memoryview) -> set[str]:
    """The locations of tensors that are not in a model itself, as it writes them.

    Args:
        model: A serialized ``ModelProto``.

    Raises:
        ValueError: It isn't one.
    """
    found = set()
    waiting = [("model", model)]
    while waiting:
        kind, content = waiting.pop()
        if kind == "located":
            entry = {number: bytes(value).decode() for number, value in _fields(content)}
            if entry.get(1) == "location":
                found.add(entry.get(2, ""))
            continue
        below = _TREE[kind]
        waiting += [(below[number], value) for number, value in _fields(content) if number in below]
    return found


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """A message's fields that have a length: number and content.

    Raises:
        ValueError: It is no message.
    """
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, at = _varint(content, at)
        elif wire == _LENGTH:
            length, at = _varint(content, at)
            yield number, content[at : at + length]
            at += length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if at > len(content):
            raise ValueError("it ends within a field")


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(content) or shift > 63:
            raise ValueError("it ends within a number, or has one that is too long")
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
