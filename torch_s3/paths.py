"""Paths of objects: the bucket, then the key. Pure, no I/O."""

from __future__ import annotations

import re

# "Resource ARN" in the S3 User Guide's chapters on access points, Object Lambda and Outposts. botocore takes a colon
# for each of its slashes too.
_ARN = re.compile(r"arn:[^/:]+:s3[^/:]*:[^/:]*:[^/:]*:(?:outpost[/:][^/:]+[/:])?accesspoint[/:][^/:]+")


def split_path(path: str) -> tuple[str, str]:
    """The bucket and key of ``bucket/key``, the key "" where there is none.

    The bucket may be the ARN of an access point, which has a slash in it, as in
    ``arn:aws:s3:eu-west-1:123456789012:accesspoint/name/key``. The key is as it stands: its slashes and dots mean
    nothing to S3.
    """
    arn = _ARN.match(path) if path.startswith("arn:") else None
    end = path.find("/", arn.end() if arn else 0)
    return (path, "") if end < 0 else (path[:end], path[end + 1 :])


def trimmed(path: str) -> str:
    """The path of a directory, without the slash that may end it.

    Two or more slashes stay as they are: they end the path of a directory that has no name, such as what lies between
    the slashes of ``bucket/a//b``. So each directory has one path, and trimming that again changes nothing.
    """
    return path if path.endswith("//") else path.removesuffix("/")


def prefix_of(path: str) -> str:
    """What the paths of all that lies in a directory start with."""
    return path if not path or path.endswith("/") else f"{path}/"


def parent(path: str) -> str:
    """The directory that something lies in, "" for a bucket's."""
    return trimmed(path[: path.rfind("/", 0, len(path) - 1) + 1])
