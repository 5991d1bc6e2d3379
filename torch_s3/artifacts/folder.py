"""A folder of one's own, for libraries that read nothing but files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch_s3 import errors

_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder made in it is nobody else's
_SPARE = 64 << 20  # bytes that are left to others


@contextmanager
def private_folder(workdir: str | os.PathLike[str] | None, *, size: int, uri: str) -> Iterator[Path]:
    """An empty folder that only this user can look into (mode 0700), removed with all that is in it after the block.

    Args:
        workdir: Where it is made. ``None``: in ``/dev/shm``, which is memory, where that is there and has room, or else
            where :mod:`tempfile` makes them (``TMPDIR``).
        size: Bytes that it will hold.
        uri: For errors.

    Raises:
        S3Error: There is no room for it, or it can't be made.
    """
    where = Path(workdir or (_MEMORY if _has_room(_MEMORY, size + _SPARE) else tempfile.gettempdir()))
    try:
        free = shutil.disk_usage(where).free
        if free < size:
            message = f"{where} has {free} bytes free, and it needs {size}: give another workdir="
            raise errors.S3Error(message, uri=uri)
        made = tempfile.TemporaryDirectory(prefix="torch_s3-", dir=where, ignore_cleanup_errors=True)
    except OSError as error:
        if isinstance(error, errors.S3Error):
            raise
        message = f"no folder can be made in {where} ({error.strerror}): give another workdir="
        raise errors.S3Error(message, uri=uri) from None
    with made as folder:
        yield Path(folder)


def _has_room(folder: Path, size: int) -> bool:
    try:
        return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= size
    except OSError:
        return False


def lies_within(name: str) -> bool:
    """Whether a path with slashes is relative, leads nowhere out, and is a file's on every system."""
    return "\\" not in name and name.isprintable() and {"", ".", ".."}.isdisjoint(name.split("/"))


def place_in(folder: Path, name: str, *, uri: str) -> Path:
    """The path for a member in a folder; the folders that it needs are made.

    Args:
        folder: Where.
        name: Relative, with slashes.
        uri: For errors.

    Raises:
        ArtifactError: The name is absolute, or leads out of the folder, or is no name of a file.
    """
    if not lies_within(name):
        raise errors.ArtifactError(f"a member's name is {name!r:.200}, which is not written to disk", uri=uri)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
