"""Sharded checkpoints of Hugging Face: an index, ``model.safetensors.index.json``, and the files that it names.

Format: ``{"metadata": {…}, "weight_map": {"name of a tensor": "file beside the index", …}}``.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import fsspec
import torch

from torch_s3.checkpoint import tree
from torch_s3.checkpoint.checkpoint import Checkpoint, Options
from torch_s3.checkpoint.progress import Progress
from torch_s3.checkpoint.recognize import recognized
from torch_s3.checkpoint.tree import Keys
from torch_s3.errors import CheckpointError
from torch_s3.source import Source, opened

_MAX_INDEX = 100_000_000  # bytes


def is_index(head: memoryview) -> bool:
    """Whether a file that starts so may be an index: JSON's object."""
    return bytes(head[:1]) == b"{"


def weight_map(source: Source) -> dict[str, str]:
    """The file of each tensor, by the tensor's name.

    Raises:
        CheckpointError: It is no index, or names files that aren't beside it.
    """
    if source.size > _MAX_INDEX:
        raise CheckpointError(f"not an index of shards: {source.size} bytes, {_MAX_INDEX} are allowed", uri=source.uri)
    [content] = source.read([(0, source.size)])
    try:
        said = json.loads(bytes(content))["weight_map"]
        files = {str(name): str(file) for name, file in said.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError("not an index of shards: JSON without a weight_map", uri=source.uri) from None
    for file in set(files.values()):
        if not file or file in (".", "..") or any(character in file for character in "/\\?#%:\0"):
            raise CheckpointError(f"its index names a file that is not beside it: {file[:200]!r}", uri=source.uri)
    return files


def load(
    source: Source,
    fs: fsspec.AbstractFileSystem,
    path: str,
    options: Options,
    progress: Progress,
    *,
    keys: Keys | None,
    into: Any,
) -> dict[str, Any]:
    """Load the shards that an index names as one dict of tensors; see :func:`~torch_s3.load_checkpoint`."""
    files = weight_map(source)
    if keys is not None:
        files = keys.select(files, uri=source.uri)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        shards: list[tuple[Checkpoint, Keys]] = []
        for file in dict.fromkeys(files.values()):
            names = [name for name, its in files.items() if its == file]
            beside = f"{path.rpartition('/')[0]}/{file}"
            shard = stack.enter_context(opened(fs, beside, f"{source.uri.rpartition('/')[0]}/{file}"))
            shards.append((recognized(shard, options, progress, fs, beside), Keys(names=names)))
        if into is not None:
            return _fill(source, shards, files, into, all_of_it=keys is None)
        for checkpoint, names_in_it in shards:
            found.update(checkpoint.selected(names_in_it))
    return {name: found[name] for name in files}


def _fill(
    source: Source, shards: list[tuple[Checkpoint, Keys]], files: dict[str, str], into: Any, *, all_of_it: bool
) -> dict[str, Any]:
    outlines = [(checkpoint, *checkpoint.outlined(keys)) for checkpoint, keys in shards]
    have: dict[str, torch.Tensor] = {}
    for _, outline, _ in outlines:
        have.update(tree.tensors(outline, uri=source.uri))
    targets = {
        name: tensor for name, tensor in tree.tensors(into, uri=source.uri).items() if all_of_it or name in files
    }
    tree.check_alike(have, targets, uri=source.uri)
    found: dict[str, Any] = {}
    for checkpoint, outline, held in outlines:
        found.update(checkpoint.fill(outline, held, targets))
    return {name: found[name] for name in files}
