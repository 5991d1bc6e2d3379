"""Loading: torch.load over parallel ranges."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from typing import Any

import fsspec
import torch

from torch_s3 import errors
from torch_s3.checkpoint.watched import WatchedFile
from torch_s3.uris import resolve, translated

_UNSAFE = re.compile(r"(Unsupported|Trying to|Can only) [^\n]*?(?= was not | is not in |\. Please |$)", re.MULTILINE)
_ALLOW = "(weights_only=True runs no code; allow a type that you trust with torch.serialization.add_safe_globals)"
_DAMAGED = re.compile(r"PytorchStreamReader|magic number|corrupt|unexpected EOF|unexpected end|storage has wrong")
_ZIP_END = b"PK\x05\x06"
_ZIP_TAIL = 22 + 65535  # the end record and the longest comment after it (APPNOTE.TXT 4.3.16)


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
    fs, path = resolve(uri, storage_options=storage_options, filesystem=filesystem)
    with translated(uri), fs.open(path, "rb") as file:
        size = file.seek(0, 2)
        _check_whole(file, size, uri)
        with WatchedFile(
            file, progress=progress, description=f"loading {path.rpartition('/')[2]}", total=size
        ) as watched:
            try:
                return torch.load(watched, map_location=map_location, weights_only=weights_only)
            except Exception as error:
                if watched.error is not None:
                    raise watched.error from None
                if unsafe := _UNSAFE.search(str(error)):
                    raise errors.UnsafeCheckpoint(f"{unsafe[0]} {_ALLOW}", uri=uri) from None
                if _is_about_the_file(error, weights_only=weights_only):
                    reason = str(error).split("\n")[0][:200]
                    raise errors.CheckpointError(f"not a checkpoint that torch can load ({reason})", uri=uri) from error
                error.add_note(f"while loading {uri}")
                raise


def _check_whole(file: Any, size: int, uri: str) -> None:
    """Tell a truncated or foreign file before torch meets it."""
    file.seek(0)
    start = file.read(4)
    if start == b"PK\x03\x04":
        file.seek(max(0, size - _ZIP_TAIL))
        if _ZIP_END not in file.read(_ZIP_TAIL):
            raise errors.CheckpointError(f"truncated: the file of {size} bytes ends before its directory", uri=uri)
    elif start[:1] != b"\x80":  # every pickle of protocol 2 or later, torch's old format among them
        raise errors.CheckpointError(f"not a checkpoint: torch.save wrote no file that starts with {start!r}", uri=uri)
    file.seek(0)


def _is_about_the_file(error: Exception, *, weights_only: bool) -> bool:
    """Whether torch's error means that the file is damaged, and not, say, that ``map_location`` names no device."""
    if isinstance(error, RuntimeError):
        return bool(_DAMAGED.search(str(error)))
    # With weights_only, no code but torch's own runs: whatever else it raises, it stumbled over the file.
    return isinstance(error, (pickle.UnpicklingError, EOFError)) or (weights_only and not isinstance(error, OSError))
