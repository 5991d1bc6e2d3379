"""What processes that died have left under a manager's root: open uploads, and checkpoints that no manifest lists."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import fsspec

from torch_s3 import errors
from torch_s3.checkpoint.owner import is_alive
from torch_s3.checkpoint.steps import owner_of_data
from torch_s3.filesystem import S3FileSystem
from torch_s3.paths import split_path

log = logging.getLogger("torch_s3")

_SETTLED = 60.0  # seconds after which nothing that a dead process has sent can still come true


def remove_abandoned(
    fs: fsspec.AbstractFileSystem, root: str, unlisted: Mapping[str, Mapping[str, Any]], *, after: float
) -> None:
    """Abort the uploads and delete the checkpoints that their writers will not finish.

    The names of both tell their writer: whoever is alive on this machine is left alone, whoever is dead is cleaned up
    after, and what processes of other machines began goes when it is ``after`` seconds old, by the server's clock.
    Whatever else is under the root stays.

    Args:
        fs: Where.
        root: In it.
        unlisted: What lies under the root and is in no manifest: names from there, and what ``fs`` says of each; the
            newest of them, or of the uploads, tells the time.
        after: Seconds.
    """
    ages = {key: _time(info) for key, info in unlisted.items()}
    now = max((time for time in ages.values() if time is not None), default=0.0)
    for key, time in ages.items():
        owner = owner_of_data(key)
        if owner is None or time is None:
            continue
        alive = is_alive(owner)
        if (alive is False and now - time > _SETTLED) or (alive is None and now - time > after):
            log.info("deleting %s/%s, which nobody will finish", root, key)
            fs.rm_file(f"{root}/{key}")
    if isinstance(fs, S3FileSystem):
        _abort_uploads(fs, root, now, after)


def _abort_uploads(fs: S3FileSystem, root: str, now: float, after: float) -> None:
    bucket, key = split_path(root)
    prefix = f"{key}/" if key else ""
    uri = f"s3://{root}"
    for page in fs.client.pages("list_multipart_uploads", uri, Bucket=bucket, Prefix=prefix):
        for upload in page.get("Uploads", ()):
            owner = owner_of_data(upload["Key"][len(prefix) :])
            alive = None if owner is None else is_alive(owner)
            if owner is None or alive or (alive is None and now - upload["Initiated"].timestamp() <= after):
                continue
            log.info("aborting the upload of s3://%s/%s, which nobody will finish", bucket, upload["Key"])
            with_id = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            with suppress(errors.NotFound):  # somebody else was faster
                fs.client.call("abort_multipart_upload", uri, **with_id)


def _time(info: Mapping[str, Any]) -> float | None:
    """When it was written, in seconds of Unix time, by any filesystem's words."""
    for name in ("LastModified", "last_modified", "mtime", "modified", "created"):
        if isinstance(found := info.get(name), datetime):
            return found.timestamp()
        if isinstance(found, int | float):
            return float(found)
    return None
