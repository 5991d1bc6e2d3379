"""Saving: torch.save, streamed, whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec
import torch

from torch_s3 import errors
from torch_s3.checkpoint.watched import WatchedFile
from torch_s3.filesystem import S3FileSystem
from torch_s3.uris import resolve, translated


class Saved(NamedTuple):
    """What was saved.

    Attributes:
        uri: Where.
        bytes: Size of the object.
        etag: Its version, ``None`` where the filesystem has none.
        seconds: How long it took.
    """

    uri: str
    bytes: int
    etag: str | None
    seconds: float


def save_checkpoint(
    obj: Any,
    uri: str,
    *,
    overwrite: bool = True,
    progress: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Saved:
    """Save ``obj`` as :func:`torch.save` does, streaming: parts are uploaded while it still writes, so memory is
    bounded.

    The object appears whole when all of it is stored, or not at all: after any exception, what was there before is
    still there, and no upload stays open.

    Args:
        obj: What torch.save takes: a state_dict, or a dict of several.
        uri: ``s3://bucket/key``, or a file of any filesystem that fsspec knows.
        overwrite: Whether an existing object may be replaced. On S3 the condition is part of the final request, so of
            two writers one wins; elsewhere it is checked first.
        progress: Show a progress bar.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for the uri.

    Raises:
        AlreadyExists: With ``overwrite=False``, where there is something; before anything is pickled if it was there
            then.
        NotFound: No such bucket.
        S3Error: It could not be stored.
        Exception: What pickling ``obj`` raised.
    """
    began = time.perf_counter()
    fs, path = resolve(uri, storage_options=storage_options, filesystem=filesystem)
    if uri.endswith("/"):
        raise errors.InvalidUri("this names a folder: give the checkpoint a name in it", uri=uri)
    with translated(uri):
        if not overwrite and fs.exists(path):
            raise errors.AlreadyExists("there is something already, and overwrite=False", uri=uri)
        name = path.rpartition("/")[2]
        with (
            _publishing(fs, path, only_new=not overwrite) as file,
            WatchedFile(file, progress=progress, description=f"saving {name}") as watched,
        ):
            try:
                torch.save(obj, watched)
            except BaseException:
                if watched.error is not None:
                    raise watched.error from None
                raise
    return Saved(uri, watched.bytes, getattr(file, "etag", None), time.perf_counter() - began)


@contextmanager
def _publishing(fs: fsspec.AbstractFileSystem, path: str, *, only_new: bool) -> Iterator[Any]:
    """A file to write, published when the block ends well and dropped when it doesn't."""
    if isinstance(fs, S3FileSystem):
        with fs.open(path, "xb" if only_new else "wb") as file:
            yield file
    else:
        fs.makedirs(fs._parent(path), exist_ok=True)
        with fs.transaction:  # fsspec's way: committed at the block's end, discarded after an exception
            file = fs.open(path, "wb")
            try:
                yield file
            finally:
                file.close()
