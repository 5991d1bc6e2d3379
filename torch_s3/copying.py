"""Copies within S3 of objects that are too large for one request."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch_s3 import errors
from torch_s3.lookup import OBJECT_HEADERS
from torch_s3.transport.client import Client
from torch_s3.transport.multipart import Multipart
from torch_s3.transport.ranges import split

ONE_REQUEST = 5 * 1024**3
"""Bytes that one CopyObject request copies at most."""
_PART = 512 * 1024**2
_PARTS = 10_000  # of one object
_THREADS = 8


def copy_by_parts(
    client: Client,
    source: Mapping[str, str],
    target: Mapping[str, str],
    head: Mapping[str, Any],
    part_size: int = _PART,
) -> None:
    """Copy an object of any size by a multipart upload, its metadata included.

    Args:
        client: Whose calls are used.
        source: ``CopySource``: ``Bucket``, ``Key`` and maybe ``VersionId``.
        target: ``Bucket`` and ``Key``.
        head: What HEAD said of the source. Another version is not copied.
        part_size: Bytes of a part, more where there would be too many.

    Raises:
        ObjectChanged: The source was overwritten meanwhile.
        S3Error: It could not be copied; nothing is left of the copy.
    """
    uri = f"s3://{target['Bucket']}/{target['Key']}"
    size = head["ContentLength"]
    kept = {name: head[name] for name in OBJECT_HEADERS if name in head}
    upload = Multipart(client, target["Bucket"], target["Key"], **kept)
    condition = {"CopySourceIfMatch": head["ETag"]} if "ETag" in head else {}

    def copy(part: tuple[int, tuple[int, int]]) -> dict[str, Any]:
        number, (start, stop) = part
        try:
            answer = client.call(
                "upload_part_copy",
                uri,
                **upload.request,
                **condition,
                CopySource=source,
                CopySourceRange=f"bytes={start}-{stop - 1}",
                PartNumber=number,
            )
        except errors.AlreadyExists:  # what a condition that fails is otherwise
            name = f"s3://{source['Bucket']}/{source['Key']}"
            raise errors.ObjectChanged("it was overwritten while it was copied: copy it again", uri=name) from None
        said = answer["CopyPartResult"]
        return {"PartNumber": number} | {name: said[name] for name in said if name.startswith(("ETag", "Checksum"))}

    try:
        executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="torch_s3-copy")
        try:
            parts = list(executor.map(copy, enumerate(split(0, size, part_size=max(part_size, -(-size // _PARTS))), 1)))
        finally:
            executor.shutdown(cancel_futures=True)
        upload.complete(parts)
    except BaseException:
        upload.abort()
        raise
