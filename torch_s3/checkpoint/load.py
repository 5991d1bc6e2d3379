"""Loading: torch.load over parallel ranges."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import fsspec
import torch

from torch_s3 import errors
from torch_s3.checkpoint.watched import WatchedFile
from torch_s3.uris import resolve, translated

_UNSAFE = re.compile(
    r"(Unsupported (?!operand)|Trying to |Can only )[^\n]*?(?= was not | is not in |\. Please |$)", re.MULTILINE
)
_ALLOW = "(weights_only=True runs no code; allow a type that you trust with torch.serialization.add_safe_globals)"
_DAMAGED = re.compile(
    r"PytorchStreamReader|inline_container|hasRecord|magic number|protocol version|corrupt|unexpected E?e?nd|EOF"
    r"|storage has wrong|does not match expected size"
)
_MACHINE = re.compile(r"Attempting to deserialize object on|restore data location|llocat|out of memory")
_ZIP_END = b"PK\x05\x06"
_ZIP_TAIL = 64 * 1024  # holds the end record of 22 bytes, and the comment that others may have put after it


def load_checkpoint(
    uri: str,
    *,
    map_location: Any = None,
    weights_only: bool = True,
    progress: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Any:
    """Load what :func:`torch.save` or :func:`save_checkpoint` saved.

    Large tensors are received by parallel ranges into their own memory: no file and no second copy of the checkpoint is
    made. All of it is read from one version of the object.

    Args:
        uri: ``s3://bucket/key``, or a file of any filesystem that fsspec knows.
        map_location: As in :func:`torch.load`.
        weights_only: As in :func:`torch.load`. ``False`` runs whatever code the file names: only for files that you
            trust.
        progress: Show a progress bar.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for the uri.

    Raises:
        NotFound: There is no such object.
        CheckpointError: It is no checkpoint, or not a whole one.
        UnsafeCheckpoint: It needs ``weights_only=False``; the message names what for.
        ObjectChanged: It was overwritten while it was read.
    """
    uri = os.fspath(uri)
    fs, path = resolve(uri, storage_options=storage_options, filesystem=filesystem)
    with ExitStack() as stack:
        with translated(uri):
            file = stack.enter_context(fs.open(path, "rb"))
            size = file.seek(0, 2)
            is_zip = _check_whole(file, size, uri)
        name = path.rpartition("/")[2]
        watched = stack.enter_context(WatchedFile(file, progress=progress, description=f"loading {name}", total=size))
        location = _Watched(map_location) if callable(map_location) else map_location
        try:
            return torch.load(watched, map_location=location, weights_only=weights_only, mmap=False)
        except Exception as error:
            if watched.error is not None:  # torch may have made another error of it
                with translated(uri):
                    raise watched.error from None
            if isinstance(location, _Watched) and location.failed:
                raise
            if watched.short and not is_zip:
                raise errors.CheckpointError(
                    f"truncated: its content goes on after its {size} bytes", uri=uri
                ) from None
            if unsafe := _UNSAFE.search(str(error)):
                raise errors.UnsafeCheckpoint(f"{unsafe[0]} {_ALLOW}", uri=uri) from None
            if _is_about_the_file(error, weights_only=weights_only):
                reason = str(error).split("\n")[0][:200]
                raise errors.CheckpointError(f"not a checkpoint that torch can load ({reason})", uri=uri) from error
            error.add_note(f"while loading {uri}")
            raise


class _Watched:
    """A caller's ``map_location``, and whether it failed."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.failed = False

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._call(*arguments)
        except BaseException:
            self.failed = True
            raise


def _check_whole(file: Any, size: int, uri: str) -> bool:
    """Tell a truncated or foreign file before torch meets it. True for a zip file, false for torch's old format."""
    file.seek(0)
    start = file.read(4)
    if start == b"PK\x03\x04":
        file.seek(max(0, size - _ZIP_TAIL))
        if _ZIP_END not in file.read(_ZIP_TAIL):
            raise errors.CheckpointError(f"truncated: the file of {size} bytes ends before its directory", uri=uri)
    elif start[:1] != b"\x80":  # every pickle of protocol 2 or later, torch's old format among them
        raise errors.CheckpointError(f"not a checkpoint: torch.save wrote no file that starts with {start!r}", uri=uri)
    file.seek(0)
    return bool(start[:1] == b"P")


def _is_about_the_file(error: Exception, *, weights_only: bool) -> bool:
    """Whether torch's error means that the file is damaged, and not, say, that ``map_location`` names no device."""
    if isinstance(error, (pickle.UnpicklingError, EOFError, ValueError)):
        return True
    if not weights_only:
        return isinstance(error, RuntimeError) and bool(_DAMAGED.search(str(error)))
    # No code but torch's own has run: unless it is about this machine, it is about the file.
    if isinstance(error, (OSError, MemoryError, Warning)):
        return False
    return not _MACHINE.search(str(error))
