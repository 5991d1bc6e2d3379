"""The layout of a safetensors file: its header read, checked and built. Pure, no I/O.

Format (https://github.com/huggingface/safetensors, "Format"): 8 bytes, the header's size as a little-endian u64; the
header, a JSON object of at most 100 MB that starts with ``{`` and may end in spaces; the tensors' bytes, little-endian,
in C order, without holes or overlaps up to the file's end. The header has, for each tensor,
``"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}``, the offsets counted from the header's end,
and may have ``"__metadata__": {"key": "value"}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torch_s3.errors import CheckpointError

PREFIX = 8
"""Bytes that say how long the header is."""
MAX_HEADER = 100_000_000
"""Bytes of the longest header that the format allows."""
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""By the format's names, those that torch has too."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_ALIGNMENT = 8  # of the first tensor's bytes, as other writers do it
_MAX_BYTES = 2**63 - 1


class TensorBytes(NamedTuple):
    """A tensor of a file, and where its bytes are.

    Attributes:
        name: Its key.
        dtype: Of its elements.
        shape: Its sizes.
        start: Of its first byte, counted from the file's start.
        stop: One past its last byte.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Layout(NamedTuple):
    """What a header says.

    Attributes:
        tensors: In the order of their bytes.
        metadata: The file's own, strings by strings.
    """

    tensors: tuple[TensorBytes, ...]
    metadata: dict[str, str]


def header_size(start: bytes, *, size: int, uri: str) -> int:
    """How many bytes of header follow a file's first eight.

    Args:
        start: The file's first bytes, at least :data:`PREFIX` where it has as many.
        size: Bytes of the whole file.
        uri: For errors.

    Raises:
        CheckpointError: No safetensors file starts so.
    """
    length = int.from_bytes(start[:PREFIX], "little")
    if len(start) < PREFIX or length < 2:
        raise CheckpointError("not a safetensors file: it starts with no header", uri=uri)
    if length > MAX_HEADER:
        raise CheckpointError(f"not a safetensors file: a header of {length} bytes, {MAX_HEADER} are allowed", uri=uri)
    if PREFIX + length > size:
        raise CheckpointError(f"truncated: the file of {size} bytes ends within its header", uri=uri)
    return length


def parse(header: bytes, *, size: int, uri: str) -> Layout:
    """What a header says, checked against the file's size.

    Args:
        header: All of it, without the eight bytes before it.
        size: Bytes of the whole file.
        uri: For errors.

    Raises:
        CheckpointError: It breaks the format's rules, or the file is truncated.
    """
    tensors, metadata = [], {}
    for name, said in _object(header, uri):
        if name == _METADATA:
            metadata = _strings(said, uri)
        else:
            tensors.append(_tensor(name, said, PREFIX + len(header), uri))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise CheckpointError("damaged: its header has one name twice", uri=uri)
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    at = PREFIX + len(header)
    for tensor in tensors:
        if tensor.start != at:
            raise CheckpointError(f"damaged: {tensor.name!r} does not start where the one before it ends", uri=uri)
        at = tensor.stop
    if at > size:
        raise CheckpointError(f"truncated: its tensors take {at} bytes, the file has {size}", uri=uri)
    if at < size:
        raise CheckpointError(f"damaged: its tensors end after {at} bytes of {size}", uri=uri)
    return Layout(tuple(tensors), metadata)


def build(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[TensorBytes]]:
    """What comes first in a file of these tensors, and where each one's bytes go.

    Args:
        tensors: dtype and shape by name.
        metadata: Strings by strings, kept with them.

    Returns:
        The file's first bytes, the header's size among them; and the tensors in the order in which their bytes follow,
        without holes: the widest elements first, so that each is aligned, and by name, so that equal tensors make
        equal files. The last one's ``stop`` is the file's size.

    Raises:
        ValueError: A name, dtype or metadata that the format has no place for.
    """
    names: list[Any] = list(tensors)  # whatever callers' types promise
    if wrong := [name for name in names if not isinstance(name, str) or name == _METADATA]:
        raise ValueError(f"safetensors keeps tensors by names, which are strings, and not {wrong[0]!r}")
    if strange := [dtype for dtype, _ in tensors.values() if dtype not in _NAMES]:
        raise ValueError(f"safetensors has no {strange[0]}: save as .pt, which keeps every dtype")
    strings: list[tuple[Any, Any]] = [*(metadata or {}).items()]
    if not all(isinstance(each, str) for pair in strings for each in pair):
        raise ValueError("safetensors keeps metadata as strings by strings: write numbers as text, or JSON")
    said: dict[str, Any] = {_METADATA: dict(strings)} if strings else {}
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    placed, at = [], 0
    for name in order:
        dtype, shape = tensors[name][0], tuple(int(size) for size in tensors[name][1])
        placed.append(TensorBytes(name, dtype, shape, at, at + math.prod(shape) * dtype.itemsize))
        at = placed[-1].stop
        said[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [placed[-1].start, at]}
    header = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-(PREFIX + len(header)) % _ALIGNMENT)
    if len(header) > MAX_HEADER:
        raise ValueError(f"safetensors allows {MAX_HEADER} bytes of header, these {len(tensors)} names take more")
    first = len(header).to_bytes(PREFIX, "little") + header
    return first, [tensor._replace(start=len(first) + tensor.start, stop=len(first) + tensor.stop) for tensor in placed]


def _object(header: bytes, uri: str) -> list[tuple[str, Any]]:
    """The header's names and values."""
    # Few characters may become many lists: for one tensor of at least 50 there are three of these.
    if header.count(b"[") + header.count(b"{") > len(header) // 8 + 64:
        raise CheckpointError("damaged: its header is nested deeply", uri=uri)
    try:
        said = json.loads(header, object_pairs_hook=_Pairs, parse_constant=float)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"not a safetensors file: its header is no JSON ({error})", uri=uri) from None
    if header[:1] != b"{" or not isinstance(said, _Pairs):
        raise CheckpointError("not a safetensors file: its header is no JSON object", uri=uri)
    return said


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON, of which a dict would hide what it says twice."""


def _strings(said: object, uri: str) -> dict[str, str]:
    if said is None:
        return {}
    if not isinstance(said, _Pairs) or not all(isinstance(value, str) for _, value in said):
        raise CheckpointError("damaged: its metadata are not strings", uri=uri)
    return dict(said)


def _tensor(name: str, said: object, base: int, uri: str) -> TensorBytes:
    fields: dict[str, Any] = dict(said) if isinstance(said, _Pairs) else {}
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    kind = fields.get("dtype")
    if not (isinstance(kind, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"damaged: its header describes no tensor under {name[:200]!r}", uri=uri)
    if kind not in DTYPES:
        raise CheckpointError(f"{name[:200]!r} is of dtype {kind[:20]!r}, which torch does not have", uri=uri)
    nbytes = DTYPES[kind].itemsize
    for size in shape:  # stops before the product is too large a number to work with
        nbytes *= size
        if nbytes > _MAX_BYTES:
            break
    if 0 in shape:
        nbytes = 0
    begin, end = offsets
    if end - begin != nbytes:
        raise CheckpointError(f"damaged: the shape of {name[:200]!r} does not fit its {end - begin} bytes", uri=uri)
    return TensorBytes(name, DTYPES[kind], tuple(shape), base + begin, base + end)


def _sizes(said: Any) -> bool:
    """Whether it is a list of whole numbers, none negative."""
    if type(said) is not list:
        return False
    for size in said:  # noqa: SIM110 - all() takes twice as long
        if type(size) is not int or not 0 <= size <= _MAX_BYTES:
            return False
    return True
