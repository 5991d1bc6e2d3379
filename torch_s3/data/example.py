"""``tf.train.Example`` and ``SequenceExample``, without TensorFlow. Pure: no I/O.

Source: ``example.proto`` and ``feature.proto`` of TensorFlow.
"""

from __future__ import annotations

import copy
import math
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torch_s3 import errors
from torch_s3.data.protobuf import (
    BYTES,
    FIXED32,
    VARINT,
    Malformed,
    delimited,
    encoded,
    fields,
    head_of,
    varint_ends,
    varints,
)

_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3  # fields of a Feature
_KINDS: dict[Any, int] = {bytes: _BYTES_LIST, torch.float32: _FLOAT_LIST, torch.int64: _INT64_LIST}
_KIND_NAMES = {_BYTES_LIST: "bytes", _FLOAT_LIST: "float32", _INT64_LIST: "int64"}
_LISTED = 20  # names in a message
_MOST_STEPS = 1 << 20  # with Python objects each


@dataclass(frozen=True, slots=True)
class FixedFeature:
    """A feature with the same number of values in every record, as ``tf.io.FixedLenFeature``.

    Becomes a tensor of this shape; with ``bytes``, one value for the shape ``()``, else a list of all.
    """

    shape: Sequence[int] = ()
    dtype: Any = torch.float32
    """``torch.float32``, ``torch.int64`` or ``bytes``: what Examples hold."""
    default: Any = None
    """For records without it: one value, or as many as the shape holds. ``None``: they are an error."""


@dataclass(frozen=True, slots=True)
class VarFeature:
    """A feature of any number of values, as ``tf.io.VarLenFeature``; none where a record doesn't have it.

    Becomes a tensor (n,), or a list of ``bytes``.
    """

    dtype: Any = torch.float32


@dataclass(frozen=True, slots=True)
class SequenceFeature:
    """A feature list of a ``tf.train.SequenceExample``, as ``tf.io.FixedLenSequenceFeature``.

    Becomes a tensor (steps, *shape); with ``bytes``, a list of what :class:`FixedFeature` gives.
    """

    shape: Sequence[int] | None = ()
    """Of each step. ``None``: any number of values, as ``tf.io.RaggedFeature``; becomes a list of tensors (n,), or of
    lists of ``bytes``, which is empty where a record doesn't have it."""
    dtype: Any = torch.float32


class Features:
    """Decodes records that are a ``tf.train.Example`` or ``tf.train.SequenceExample``.

    Tensors have memory of their own. Of features that weren't asked for, nothing is decoded.

    Args:
        spec: What to decode, by name. A SequenceExample's context is what an Example's features are.

    Raises:
        ValueError: A dtype that records don't hold, or a default that doesn't fit its shape.
    """

    def __init__(self, spec: Mapping[str, FixedFeature | VarFeature | SequenceFeature]) -> None:
        given: Any = spec
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise TypeError(f"features={spec!r:.200}: give a dict from names to FixedFeature, VarFeature …")
        self.spec = dict(spec)
        self._context: dict[bytes, str] = {}
        self._lists: dict[bytes, str] = {}
        self._defaults: dict[str, Any] = {}
        for name, wanted in self.spec.items():
            if not isinstance(wanted, (FixedFeature, VarFeature, SequenceFeature)):
                raise TypeError(f"feature {name!r}: {wanted!r} is no FixedFeature, VarFeature or SequenceFeature")
            if wanted.dtype not in _KINDS:
                raise ValueError(
                    f"feature {name!r}: records hold torch.float32, torch.int64 or bytes, not {wanted.dtype}"
                )
            shape: Any = () if isinstance(wanted, VarFeature) else wanted.shape
            if shape is None and isinstance(wanted, SequenceFeature):
                shape = ()
            if not (isinstance(shape, Sequence) and all(isinstance(size, int) and size >= 0 for size in shape)):
                raise ValueError(f"feature {name!r}: shape={shape!r} is no sequence of sizes")
            names = self._lists if isinstance(wanted, SequenceFeature) else self._context
            names[name.encode()] = name
            if isinstance(wanted, FixedFeature) and wanted.default is not None:
                self._defaults[name] = _default(name, wanted)

    def __call__(self, record: memoryview | bytes, uri: str, number: int) -> dict[str, Any]:
        """The features of one record, in the order asked for.

        Args:
            record: Its data, without the frame.
            uri: The shard, for errors.
            number: Of the record in the shard, from 0.

        Raises:
            DecodeError: It is no Example, a feature is missing, or is not as asked for.
        """
        try:
            return self._decoded(memoryview(record))
        except (Malformed, IndexError, struct.error) as error:
            reason = str(error) if isinstance(error, Malformed) else "it ends within a field"
            raise errors.DecodeError(
                f"record {number}: not a tf.train.Example as asked for: {reason}", uri=uri
            ) from None

    def _decoded(self, data: memoryview) -> dict[str, Any]:
        found: dict[int, dict[str, memoryview]] = {}  # by the map's field: 1 has features, 2 has lists
        for field, wire, start, stop in fields(data):
            if wire == BYTES and field in (1, 2):
                names = self._context if field == 1 else self._lists
                found.setdefault(field, {}).update(_entries(data[start:stop], names))
        features, lists = found.get(1, {}), found.get(2, {})
        decoded: dict[str, Any] = {}
        for name, wanted in self.spec.items():
            if isinstance(wanted, SequenceFeature):
                steps = lists.get(name)
                if steps is None and wanted.shape is not None:
                    raise Malformed(f"no feature list {name!r}; it has {_contents(data)}")
                decoded[name] = _sequence(name, wanted, steps if steps is not None else memoryview(b""))
                continue
            if name not in features and 2 in found and name.encode() in _names(data, 2):
                raise Malformed(f"{name!r} is a feature list, for SequenceFeature")
            kind, values = _values(features[name]) if name in features else (0, None)
            if kind == 0 and isinstance(wanted, FixedFeature):
                if name not in self._defaults:
                    raise Malformed(f"no feature {name!r}, and there is no default; it has {_contents(data)}")
                default = self._defaults[name]
                decoded[name] = default.clone() if isinstance(default, torch.Tensor) else copy.copy(default)
                continue
            typed = _typed(name, wanted.dtype, kind, values)
            decoded[name] = _shaped(name, wanted, typed) if isinstance(wanted, FixedFeature) else typed
        return decoded


def _default(name: str, wanted: FixedFeature) -> Any:
    count = math.prod(wanted.shape)
    if wanted.dtype is bytes:
        values = [wanted.default] * count if isinstance(wanted.default, bytes) else list(wanted.default)
        if len(values) == count and all(isinstance(value, bytes) for value in values):
            return values if wanted.shape else values[0]
    else:
        given = np.asarray(wanted.default)
        if given.dtype.kind in ("iu" if wanted.dtype is torch.int64 else "iuf") and given.size in (1, count):
            tensor = torch.as_tensor(given.tolist(), dtype=wanted.dtype)
            return tensor.reshape(-1).expand(count).reshape(tuple(wanted.shape)).clone()
    raise ValueError(
        f"feature {name!r}: the default {wanted.default!r} does not fit {wanted.dtype}, {tuple(wanted.shape)}"
    )


def _shaped(name: str, wanted: FixedFeature | SequenceFeature, values: Any) -> Any:
    """The values of one feature in its shape."""
    shape = wanted.shape or ()
    if len(values) != math.prod(shape):
        raise Malformed(f"feature {name!r} has {len(values)} values, not {tuple(shape)}")
    if wanted.dtype is bytes:
        return values if shape else values[0]
    return values.reshape(*shape) if shape else values[0]


def _typed(name: str, dtype: Any, kind: int, values: Any) -> Any:
    """Values as they are returned, in one dimension."""
    if kind not in (0, _KINDS[dtype]):
        raise Malformed(f"feature {name!r} holds {_KIND_NAMES[kind]}, not {_KIND_NAMES[_KINDS[dtype]]}")
    if dtype is bytes:
        return values or []
    if kind == 0:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(_numbers(kind, values))


def _numbers(kind: int, packed: memoryview | bytearray) -> NDArray[Any]:
    """Numbers from their packed encoding, in memory of their own."""
    if kind == _INT64_LIST:
        return varints(packed)
    return np.frombuffer(packed, "<f4").astype(np.float32)  # a copy


def _sequence(name: str, wanted: SequenceFeature, steps: memoryview) -> Any:
    """The steps of a feature list: all their numbers decoded at once."""
    kind = _KINDS[wanted.dtype]
    each = None if wanted.shape is None else math.prod(wanted.shape)
    packed, counts, texts = bytearray(), array("q"), []
    for field, wire, start, stop in fields(steps):
        if wire != BYTES or field != 1:
            continue
        found, values = _values(steps[start:stop])
        if found not in (0, kind):
            raise Malformed(f"feature list {name!r} holds {_KIND_NAMES[found]}, not {_KIND_NAMES[kind]}")
        if kind == _BYTES_LIST:
            count = len(values or [])
            texts.append(values or [])
        else:
            values = values or b""
            count = len(values) // 4 if kind == _FLOAT_LIST else varint_ends(values).size
            packed += values
        if each is not None and count != each:
            raise Malformed(f"step {len(counts)} of feature list {name!r} has {count} values, not {each}")
        counts.append(count)
        if len(counts) > _MOST_STEPS and (kind == _BYTES_LIST or not each):
            raise Malformed(f"feature list {name!r} has more than {_MOST_STEPS} steps")
    if kind == _BYTES_LIST:
        return texts if wanted.shape is None or wanted.shape else [values[0] for values in texts]
    tensor = torch.from_numpy(_numbers(kind, packed))
    if wanted.shape is None:
        return list(torch.split(tensor, list(counts)))
    return tensor.reshape(len(counts), *wanted.shape)


def _contents(data: memoryview) -> str:
    """The names in a record, for errors."""
    features, lists = (sorted(repr(name.decode(errors="replace")) for name in _names(data, field)) for field in (1, 2))
    found = ", ".join(features[:_LISTED]) or "no features"
    return found + (f", and the feature lists {', '.join(lists[:_LISTED])}" if lists else "")


def _names(data: memoryview, field: int) -> set[bytes]:
    """Of features (1), or of feature lists (2)."""
    maps = (data[start:stop] for number, wire, start, stop in fields(data) if (number, wire) == (field, BYTES))
    return {key for some in maps for key, _ in _pairs(some)}


def _entries(data: memoryview, names: Mapping[bytes, str]) -> Iterator[tuple[str, memoryview]]:
    """The entries of a map that are wanted: name and message. Where a name is there twice, the last one counts."""
    for key, value in _pairs(data):
        if (name := names.get(key)) is not None:
            yield name, value


def _pairs(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    for field, wire, start, stop in fields(data):
        if wire != BYTES or field != 1:
            continue
        entry = data[start:stop]
        key, value = b"", entry[:0]
        for number, kind, first, last in fields(entry):
            if kind == BYTES and number == 1:
                key = bytes(entry[first:last]) if last - first <= 65536 else b""
            elif kind == BYTES and number == 2:
                value = entry[first:last]
        yield key, value


def _values(feature: memoryview) -> tuple[int, Any]:
    """What a Feature holds: its kind, 0 for nothing; and a list of bytes, or numbers in their packed encoding."""
    kind = 0
    values: Any = None
    for field, wire, start, stop in fields(feature):
        if wire != BYTES or field not in _KIND_NAMES:
            continue
        if field != kind:  # of a oneof, the last one counts
            kind, values = field, None
        message = feature[start:stop]
        if kind == _BYTES_LIST:
            found = [bytes(message[a:b]) for number, how, a, b in fields(message) if number == 1 and how == BYTES]
            values = values or []
            values += found  # in place: it may be there any number of times
            continue
        alone = VARINT if kind == _INT64_LIST else FIXED32
        for number, how, a, b in fields(message):
            if number == 1 and how in (BYTES, alone):  # packed, or one that is not: the same bytes
                if (b - a) % 4 if alone == FIXED32 else b > a and message[b - 1] >= 0x80:
                    raise Malformed("a list of numbers ends within one")
                if values is None:
                    values = message[a:b]
                else:
                    values = values if isinstance(values, bytearray) else bytearray(values)
                    values += message[a:b]
        values = b"" if values is None else values
    return kind, values


def example(features: Mapping[str, bytes | memoryview | int]) -> list[bytes | memoryview]:
    """The buffers of a ``tf.train.Example`` with one value for each feature; large ones are not copied.

    Args:
        features: Bytes become a bytes_list, ints an int64_list.
    """
    pieces: list[bytes | memoryview] = []
    for name, value in features.items():
        if isinstance(value, int):
            number = encoded(value & 0xFFFFFFFFFFFFFFFF)
            inner: list[bytes | memoryview] = [delimited(_INT64_LIST, [delimited(1, [number])])]
        else:
            head = head_of(1, len(value))
            inner = [head_of(_BYTES_LIST, len(head) + len(value)), head, value]
        size = sum(map(len, inner))
        key = delimited(1, [name.encode()])
        head = head_of(2, size)
        pieces += [head_of(1, len(key) + len(head) + size), key, head, *inner]
    return [head_of(1, sum(map(len, pieces))), *pieces]
