"""Copies within S3 of objects that are too large for one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from torch_s3 import errors
from torch_s3.metadata import kept
from torch_s3.transport.client import Client
from torch_s3.transport.multipart import Multipart
from torch_s3.transport.ranges import split

ONE_REQUEST = 5 * 1024**3
"""Bytes that one CopyObject request copies at most."""
_PART = 512 * 1024**2
_PARTS = 10_000  # of one object


def copy_by_parts(
    client: Client,
    source: Mapping[str, str],
    target: Mapping[str, str],
    head: Mapping[str, Any],
    part_size: int = _PART,
) -> None:
    """Copy an object of any size by a multipart upload, with its metadata, storage class and tags.

    Args:
        client: Whose calls are used.
        source: ``CopySource``: ``Bucket``, ``Key`` and maybe ``VersionId``.
        target: ``Bucket`` and ``Key``.
        head: What HEAD said of the source. Another version is not copied.
        part_size: Bytes of a part, more where there would be too many.

    Raises:
        AccessDenied: Among others, its tags may not be read, which CopyObject refuses too.
        ObjectChanged: The source was overwritten meanwhile.
        S3Error: It could not be copied; nothing is left of the copy.
    """
    uri = f"s3://{target['Bucket']}/{target['Key']}"
    size = head["ContentLength"]
    upload = Multipart(client, target["Bucket"], target["Key"], **kept(head), **tagging(client, source, head))
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
        parts = split(0, size, part_size=max(part_size, -(-size // _PARTS)))
        upload.complete(client.side_by_side(copy, enumerate(parts, 1)))
    except BaseException:
        upload.abort()
        raise


def tagging(client: Client, source: Mapping[str, str], head: Mapping[str, Any]) -> dict[str, str]:
    """The parameter that gives a new object the tags of another.

    Args:
        client: Whose calls are used.
        source: ``Bucket``, ``Key`` and maybe ``VersionId``.
        head: What HEAD said of it. Servers that have no tags say nothing of them, nor does S3 to those who may not read
            them.
    """
    if not head.get("TagCount"):
        return {}
    uri = f"s3://{source['Bucket']}/{source['Key']}"
    tags = client.call("get_object_tagging", uri, **source)["TagSet"]
    return {"Tagging": urlencode({tag["Key"]: tag["Value"] for tag in tags})}
