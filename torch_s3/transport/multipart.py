"""Multipart uploads: what begins, ends and aborts them, for whoever brings the parts."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from contextvars import Context
from typing import TYPE_CHECKING, Any

from torch_s3 import errors
from torch_s3.transport.answer import bare_etag
from torch_s3.transport.objects import WRITE_ID

if TYPE_CHECKING:
    from torch_s3.transport.client import Client

log = logging.getLogger("torch_s3")


class Multipart:
    """An upload that is open from here on, until :meth:`complete` or :meth:`abort`.

    Args:
        client: Whose calls are used.
        bucket: Where.
        key: Of the object to be.
        **settings: Of ``create_multipart_upload``, such as ``Metadata``, to which an id is added.

    Attributes:
        id: S3's name of it.
        write_id: What the object's metadata will say in ``WRITE_ID``.
        request: What each call about it says: ``Bucket``, ``Key`` and ``UploadId``.

    Raises:
        S3Error: It could not be begun.
    """

    def __init__(self, client: Client, bucket: str, key: str, **settings: Any) -> None:
        self._client, self._bucket, self._key = client, bucket, key
        self._uri = f"s3://{bucket}/{key}"
        self.write_id = uuid.uuid4().hex
        settings["Metadata"] = settings.get("Metadata", {}) | {WRITE_ID: self.write_id}
        answer = client.call("create_multipart_upload", self._uri, Bucket=bucket, Key=key, **settings)
        self.id: str = answer["UploadId"]
        self.request = {"Bucket": bucket, "Key": key, "UploadId": self.id}

    def complete(self, parts: Sequence[dict[str, Any]], **condition: str) -> str:
        """Publish the object.

        Args:
            parts: ``PartNumber``, ``ETag`` and checksum of each, as S3 wants them.
            **condition: ``IfNoneMatch`` or ``IfMatch``.

        Returns:
            The object's ETag, without quotes.

        Raises:
            S3Error: It could not be published.
        """
        try:
            answer = self._client.call(
                "complete_multipart_upload", self._uri, **self.request, MultipartUpload={"Parts": parts}, **condition
            )
        except (errors.NotFound, errors.AlreadyExists, errors.TransferFailed):
            # Perhaps it is done, and only the answer was lost: then the upload is gone, or the object there.
            etag = self._client.wrote(self._bucket, self._key, self.write_id)
            if etag is None:
                raise
            return etag
        if "ETag" not in answer:
            raise errors.IntegrityError("the server did not confirm the upload", uri=self._uri)
        return bare_etag(answer["ETag"])

    def abort(self) -> None:
        """Drop it, with its parts. Where that fails, a log says what is left."""
        try:
            # Not in the context of what has just been cancelled.
            Context().run(self._client.call, "abort_multipart_upload", self._uri, **self.request)
        except errors.S3Error as error:
            log.warning("could not abort upload %s, which still takes up space: %s", self.id, error)
