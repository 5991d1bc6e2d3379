"""Loading: whatever the file is, parallel ranges into the tensors' own memory."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import fsspec

from torch_s3.checkpoint import sharded, tree
from torch_s3.checkpoint.checkpoint import Checkpoint, Options
from torch_s3.checkpoint.progress import Loaded, Progress
from torch_s3.checkpoint.recognize import recognized
from torch_s3.checkpoint.tensors import is_safetensors
from torch_s3.checkpoint.torch_load import Placement
from torch_s3.checkpoint.tree import Keys
from torch_s3.filesystem import S3FileSystem
from torch_s3.source import opened
from torch_s3.uris import resolve

_PUBLIC = ("http", "https", "github", "git", "hf", "ftp")  # schemes of what somebody else has put there


def load_checkpoint(
    uri: str,
    *,
    map_location: Any = None,
    weights_only: bool = True,
    safe_globals: Sequence[Any] = (),
    keys: Sequence[str] | None = None,
    into: Any = None,
    verify: bool = True,
    progress: bool | Callable[[int, int], Any] = False,
    report: Callable[[Loaded], Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Any:
    """Load what :func:`torch.save`, :func:`save_checkpoint` or safetensors saved.

    Tensors are received by parallel ranges into their own memory, large ones cut and small ones merged: no file and no
    second copy of the checkpoint is made. All of it is read from one version of the object.

    Args:
        uri: ``s3://bucket/key``, or a file of any filesystem that fsspec knows: a file of torch.save, a safetensors
            file, or the ``….index.json`` of a sharded one. What it is, its content tells.
        map_location: As in :func:`torch.load`. On the way to a GPU, bytes pass through a ring of at most 32 pinned
            buffers.
        weights_only: As in :func:`torch.load`. ``False`` runs whatever code the file names: only for files that you
            trust.
        safe_globals: Types and functions that the file may ask for in addition to torch's own, see
            :func:`torch.serialization.add_safe_globals`.
        keys: Load nothing but what these match: paths in nested dicts and lists, joined by dots, with ``*`` for
            anything. ``["model.layers.3.*", "epoch"]`` gives ``{"model": {"layers.3.…": …}, "epoch": 7}``, and fetches
            no other tensor's bytes.
        into: Fill these tensors, in a dict, list or tuple nested as the checkpoint is, in place of making new ones.
            Paths, dtypes and shapes must be the same, and are compared before anything is written; after an error while
            bytes are being received, their content is undefined. With ``keys``, just those that match.
        verify: Compare CRC32s with those that torch.save wrote, where it did.
        progress: Show a progress bar; or call this with the bytes that have come, and those that there are to come.
        report: Called at the end with what it took, see :class:`~torch_s3.Loaded`: ``report=print``.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for the uri.

    Returns:
        What was saved; of safetensors, a dict of tensors. With ``into``, the same with those tensors in it.

    Raises:
        NotFound: There is no such object.
        CheckpointError: It is no checkpoint, or not a whole one.
        CheckpointMismatch: It hasn't the ``keys``, or not those of ``into``.
        UnsafeCheckpoint: It asks for what ``weights_only=True`` refuses; the message lists that.
        IntegrityError: Its bytes are not those that were saved; the message names the record.
        ObjectChanged: It was overwritten while it was read.
    """
    began = time.perf_counter()
    uri = os.fspath(uri)
    if into is not None and map_location is not None:
        raise ValueError("into= says where tensors go: leave out map_location=")
    given: Any = safe_globals
    allowed = tuple(given) if isinstance(given, Iterable) else None
    if allowed is None or any(isinstance(each, str) for each in allowed):
        raise TypeError(f"safe_globals={safe_globals!r}: give a list of the types and functions themselves")
    fs, path = resolve(uri, storage_options=storage_options, filesystem=filesystem)
    if not weights_only and _is_of_others(fs):
        warnings.warn(
            f"weights_only=False runs code from {uri}, where others may have put it: load it with safe_globals=[…]",
            UserWarning,
            stacklevel=2,
        )
    options = Options(placement=Placement(map_location), weights_only=weights_only, safe_globals=allowed, verify=verify)
    wanted = None if keys is None else Keys([keys] if isinstance(keys, str) else keys)
    counted = Progress(progress, f"loading {path.rpartition('/')[2]}")
    try:
        with opened(fs, path, uri) as source:
            if sharded.is_index(source.head) and not is_safetensors(source.head):
                found = sharded.load(source, fs, path, options, counted, keys=wanted, into=into)
            else:
                checkpoint = recognized(source, options, counted, fs, path)
                found = _load(checkpoint, wanted, into)
            size, etag = source.size, source.etag
    finally:
        counted.close()
    if report is not None:
        report(counted.loaded(uri, size, etag, time.perf_counter() - began))
    return found


def _load(checkpoint: Checkpoint, keys: Keys | None, into: Any) -> Any:
    if into is None:
        return checkpoint.load() if keys is None else checkpoint.selected(keys)
    uri = checkpoint.source.uri
    outline, held = checkpoint.outlined(keys)
    have, targets = tree.tensors(outline, uri=uri), tree.tensors(into, uri=uri)
    if keys is not None:
        targets = {path: tensor for path, tensor in targets.items() if path in have}
    tree.check_alike(have, targets, uri=uri)
    return checkpoint.fill(outline, held, targets)


def _is_of_others(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether what is there may well be somebody else's: a public bucket, or the web."""
    if isinstance(fs, S3FileSystem):
        return fs.config.anon or fs.config.requester_pays
    names = fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)
    return bool(getattr(fs, "anon", False)) or any(name in _PUBLIC for name in names)
