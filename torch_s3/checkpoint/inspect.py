"""What is in a checkpoint, from its first and last few kilobytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import fsspec
import torch

from torch_s3 import errors
from torch_s3.checkpoint import pickled, sharded
from torch_s3.checkpoint.archive import PICKLE, STORAGES, StandIn, is_script, is_zip, read_archive, read_records
from torch_s3.checkpoint.pickled import PickledTensor
from torch_s3.checkpoint.tensors import is_safetensors, read_layout
from torch_s3.checkpoint.torch_load import unsafe_globals
from torch_s3.source import Source, opened
from torch_s3.uris import resolve


class TensorInfo(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        name: Its path, by which ``load_checkpoint(keys=…)`` loads it.
        dtype: Of its elements; ``None`` where torch here has no such dtype.
        shape: Its sizes.
        bytes: Of its elements.
        offset: Of its first element in the file, ``None`` where it is compressed.
        file: Where that is.
    """

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    bytes: int
    offset: int | None
    file: str


class CheckpointInfo(NamedTuple):
    """What is in a checkpoint.

    Attributes:
        uri: Of what was looked at.
        format: ``"torch"`` or ``"safetensors"``.
        bytes: Size of the file, or of all shards together.
        etag: The file's version, ``None`` where the filesystem has none.
        tensors: In the order in which the checkpoint names them.
        unsafe_globals: The functions and classes that it asks for and ``weights_only=True`` refuses.
        metadata: Strings by strings that a safetensors file keeps.
    """

    uri: str
    format: str
    bytes: int
    etag: str | None
    tensors: tuple[TensorInfo, ...]
    unsafe_globals: tuple[str, ...]
    metadata: dict[str, str]


def inspect_checkpoint(
    uri: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> CheckpointInfo:
    """What is in a checkpoint, without loading it: nothing is unpickled, imported or run, and no tensor is read.

    Args:
        uri: As for :func:`load_checkpoint`. torch's old format, which has no directory, cannot be looked into.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for the uri.

    Raises:
        NotFound: There is no such object.
        CheckpointError: It is no checkpoint that can be looked into, or not a whole one.
    """
    uri = os.fspath(uri)
    fs, path = resolve(uri, storage_options=storage_options, filesystem=filesystem)
    with opened(fs, path, uri) as source:
        if is_safetensors(source.head):
            return _safetensors(source)
        if is_zip(source.head):
            return _zip(source)
        if not sharded.is_index(source.head):
            raise errors.CheckpointError("not a checkpoint that can be looked into without loading it", uri=uri)
        files = list(dict.fromkeys(sharded.weight_map(source).values()))
    folder = uri.rpartition("/")[0]
    shards = [
        inspect_checkpoint(f"{folder}/{file}", storage_options=storage_options, filesystem=filesystem)
        for file in files
        if not file.endswith(".json")  # an index of indices would have no end
    ]
    return CheckpointInfo(
        uri=uri,
        format=shards[0].format if shards else "safetensors",
        bytes=sum(shard.bytes for shard in shards),
        etag=source.etag,
        tensors=tuple(tensor for shard in shards for tensor in shard.tensors),
        unsafe_globals=tuple(sorted({name for shard in shards for name in shard.unsafe_globals})),
        metadata={name: value for shard in shards for name, value in shard.metadata.items()},
    )


def _safetensors(source: Source) -> CheckpointInfo:
    layout = read_layout(source)
    tensors = tuple(
        TensorInfo(each.name, each.dtype, each.shape, each.stop - each.start, each.start, source.uri)
        for each in layout.tensors
    )
    return CheckpointInfo(source.uri, "safetensors", source.size, source.etag, tensors, (), layout.metadata)


def _zip(source: Source) -> CheckpointInfo:
    records = read_records(source)
    if is_script(records):
        raise errors.CheckpointError(
            "it is a TorchScript archive, a program, and has no names of tensors", uri=source.uri
        )
    archive = read_archive(source, records, verify=True)
    tensors = []
    for each in pickled.tensors_in(archive.small[PICKLE], uri=source.uri):
        dtype = _dtype(each)
        width = dtype.itemsize if dtype is not None else 1
        start = archive.starts.get(f"{STORAGES}{each.storage.key}")
        offset = None if start is None else start + each.offset * width
        tensors.append(
            TensorInfo(each.path, dtype, each.shape, pickled.elements(each.shape) * width, offset, source.uri)
        )
    unsafe = unsafe_globals(StandIn(archive, lambda *_: None))
    return CheckpointInfo(source.uri, "torch", source.size, source.etag, tuple(tensors), tuple(unsafe), {})


def _dtype(tensor: PickledTensor) -> torch.dtype | None:
    """What torch calls its elements' kind."""
    name = tensor.dtype or pickled.STORAGES.get(tensor.storage.kind.rpartition(".")[2], "")
    found = getattr(torch, name.rpartition(".")[2], None)
    return found if isinstance(found, torch.dtype) else None
