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
