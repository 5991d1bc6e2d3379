"""Files that appear whole, or not at all, in any filesystem; and a look at what has appeared."""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from torch_s3 import errors
from torch_s3.filesystem import S3FileSystem
from torch_s3.transport.answer import bare_etag
from torch_s3.transport.objects import WRITE_ID
from torch_s3.upload import S3Writer
from torch_s3.uris import translated

log = logging.getLogger("torch_s3")

PARTIAL = ".partial"
"""What names of files end in that are being written, or were when their writer was killed."""


@contextmanager
def publishing(
    fs: fsspec.AbstractFileSystem, path: str, uri: str, *, only_new: bool, expected: int = 0
) -> Iterator[Any]:
    """A file to write, published as ``path`` when the block ends well and dropped when it doesn't.

    Only ours streams. A local file is written beside its place and renamed. Elsewhere, when an opened file becomes
    visible and whether an upload can be dropped differs from filesystem to filesystem: there, a temporary file
    comes first, and how whole the object appears is up to the filesystem's ``put_file``.

    Args:
        fs: Where.
        path: In it.
        uri: For errors.
        only_new: Fail with :class:`~torch_s3.AlreadyExists` where there is something when it would be published.
        expected: About how many bytes will be written.
    """
    if isinstance(fs, S3FileSystem):
        with fs.open(path, "xb" if only_new else "wb", expected=expected) as file:
            yield file
        return
    local = Path(path).resolve() if isinstance(fs, LocalFileSystem) else None
    folder = local.parent if local else Path(tempfile.gettempdir())
    partial = folder / f"{Path(path).name}.{uuid.uuid4().hex}{PARTIAL}"
    with translated(uri if local else f"{partial}, the temporary file for {uri}"):
        if local:
            folder.mkdir(parents=True, exist_ok=True)
        file = partial.open("xb")
    try:
        yield file
        with translated(uri):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            try:
                if local:
                    _put_in_place(partial, local, only_new=only_new)
                else:
                    fs.put_file(str(partial), path, **({"mode": "create"} if only_new else {}))
            except FileExistsError:
                raise errors.AlreadyExists(
                    "something is there already, and was not to be overwritten", uri=uri
                ) from None
    finally:
        with suppress(OSError):  # said already, if it matters
            file.close()
        partial.unlink(missing_ok=True)


def _put_in_place(partial: Path, local: Path, *, only_new: bool) -> None:
    """Give a file its name, in one step that outlasts a loss of power."""
    if only_new:
        local.hardlink_to(partial)  # which a rename would not refuse
    else:
        if local.exists():
            partial.chmod(local.stat().st_mode)
        partial.replace(local)
    folder = os.open(local.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Stored(NamedTuple):
    """What is there, by its own account.

    Attributes:
        etag: Its version, without quotes; ``None`` where the filesystem has none.
        checksum: Of all its bytes, ``(algorithm, value in base64)``; ``None`` where the server keeps none.
    """

    etag: str | None
    checksum: tuple[str, str] | None


def read_back(fs: fsspec.AbstractFileSystem, path: str, uri: str, file: Any, size: int) -> Stored:
    """See that what was published is there: its size, and on S3 its ETag and checksum.

    Args:
        fs: Where.
        path: In it.
        uri: For errors.
        file: What was written to.
        size: Bytes that were written.

    Raises:
        IntegrityError: It is not what was sent.
        ObjectChanged: Somebody else has written there since.
        NotFound: It is gone.
    """
    if isinstance(file, S3Writer):
        try:
            return _head(fs, path, uri, file, size)
        except errors.AccessDenied as error:  # who may write but not read has only the server's word
            log.warning("saved, but it could not be read back: %s", error)
            return Stored(file.etag, file.checksum)
    with translated(uri):
        fs.invalidate_cache(fs._parent(path))
        info = fs.info(path)
    if info["size"] != size:
        raise errors.IntegrityError(f"{size} bytes were saved, but {info['size']} are there", uri=uri)
    etag = info.get("ETag")
    return Stored(bare_etag(etag) if etag else None, None)


def _head(fs: S3FileSystem, path: str, uri: str, file: S3Writer, size: int) -> Stored:
    bucket, key = fs.bucket_and_key(path)
    head = fs.client.call("head_object", uri, Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    etag = bare_etag(head.get("ETag", ""))
    marks = {name.lower(): value for name, value in head.get("Metadata", {}).items()}  # servers change the case
    # rclone answers the end of an upload with another ETag than it has from then on: the mark counts too.
    if etag != file.etag and (file.write_id is None or marks.get(WRITE_ID) != file.write_id):
        raise errors.ObjectChanged("somebody else has written there since it was saved", uri=uri)
    if head["ContentLength"] != size:
        raise errors.IntegrityError(f"{size} bytes were saved, but {head['ContentLength']} are there", uri=uri)
    if file.checksum is None:
        return Stored(etag, None)
    algorithm, wanted = file.checksum
    found = head.get(f"Checksum{algorithm.upper()}")
    if found is not None and found != wanted:
        raise errors.IntegrityError(f"its {algorithm.upper()} is {found}, of what was sent {wanted}", uri=uri)
    return Stored(etag, file.checksum)
