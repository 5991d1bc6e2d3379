"""Saving: torch.save, streamed, whole or not at all."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from torch_s3 import errors
from torch_s3.checkpoint.watched import WatchedFile
from torch_s3.files import S3Writer
from torch_s3.filesystem import S3FileSystem
from torch_s3.transport.answer import bare_etag
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
    uri = os.fspath(uri)
    fs, path = resolve(uri, storage_options=storage_options, filesystem=filesystem)
    if uri.endswith("/"):
        raise errors.InvalidUri("this names a folder: give the checkpoint a name in it", uri=uri)
    if not overwrite:
        # Who may write but not list is told nothing here; on S3 the condition of the last request decides.
        with suppress(FileNotFoundError, errors.AccessDenied), translated(uri):
            if fs.info(path)["type"] == "file":
                raise errors.AlreadyExists("there is something already, and overwrite=False", uri=uri)
    publishing = _publishing(fs, path, uri, only_new=not overwrite)
    name = path.rpartition("/")[2]
    with publishing as file, WatchedFile(file, progress=progress, description=f"saving {name}") as watched:
        try:
            torch.save(obj, watched)
        except BaseException:
            if watched.error is not None:  # torch may have made another error of it
                with translated(uri):
                    raise watched.error from None
            raise
    etag = file.etag if isinstance(file, S3Writer) else None
    with suppress(OSError):  # it is saved, whatever its ETag
        etag = etag or fs.info(path).get("ETag")
    return Saved(uri, watched.bytes, bare_etag(etag) if etag else None, time.perf_counter() - began)


@contextmanager
def _publishing(fs: fsspec.AbstractFileSystem, path: str, uri: str, *, only_new: bool) -> Iterator[Any]:
    """A file to write, published as ``path`` when the block ends well and dropped when it doesn't.

    Only ours streams. A local file is written beside its place and renamed. Elsewhere, when an opened file becomes
    visible and whether an upload can be dropped differs from filesystem to filesystem: there, a temporary file
    comes first, and how whole the object appears is up to the filesystem's ``put_file``.
    """
    if isinstance(fs, S3FileSystem):
        with fs.open(path, "xb" if only_new else "wb") as file:
            yield file
        return
    local = Path(path).resolve() if isinstance(fs, LocalFileSystem) else None
    with translated(uri):
        if local:
            local.parent.mkdir(parents=True, exist_ok=True)
        folder = local.parent if local else Path(tempfile.gettempdir())
        partial = folder / f"{Path(path).name}.{uuid.uuid4().hex}.partial"
        file = partial.open("xb")
    try:
        yield file
        with translated(uri):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            if local:
                if local.exists():
                    partial.chmod(local.stat().st_mode)
                partial.replace(local)
            else:
                fs.put_file(str(partial), path)
    finally:
        with suppress(OSError):  # said already, if it matters
            file.close()
        partial.unlink(missing_ok=True)
