"""What S3 keeps of an object beside its bytes: versions, metadata, and urls by which others get at it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fsspec.utils import tokenize

from torch_s3 import errors
from torch_s3.listings import Listings
from torch_s3.transport.endpoint import translated
from torch_s3.transport.objects import WRITE_ID


class Metadata(Listings):
    """The part of :class:`~torch_s3.S3FileSystem` that is about what goes with an object."""

    def modified(self, path: str, version_id: str | None = None, refresh: bool = False) -> datetime:
        """When the object was last written, as an aware datetime.

        Raises:
            NotFound: There is no such object; a prefix has no date.
        """
        return self._object(path, version_id=version_id, refresh=refresh)["LastModified"]  # type: ignore[no-any-return]

    def checksum(self, path: str, refresh: bool = True) -> int:
        """A number that is another when the object, or what is known of a prefix, is."""
        info = self.info(path, refresh=refresh)
        return int(tokenize(info.get("ETag") or info), 16)

    def ukey(self, path: str) -> str:
        """As :meth:`checksum`, as text, for fsspec's caching filesystems."""
        return f"{self.checksum(path):x}"

    def object_version_info(self, path: str, **kwargs: Any) -> list[dict[str, Any]]:
        """The versions of an object, the latest first, as S3 says: VersionId, IsLatest, Size, LastModified, ETag."""
        bucket, key, _ = self.locate(path)
        pages = self.client.pages("list_object_versions", f"s3://{bucket}/{key}", Bucket=bucket, Prefix=key)
        return [entry for page in pages for entry in page.get("Versions", ()) if entry["Key"] == key]

    def metadata(self, path: str, refresh: bool = False, **kwargs: Any) -> dict[str, str]:
        """The user's metadata of an object."""
        return dict(kept(self._head(*self.locate(path)))["Metadata"])

    def getxattr(self, path: str, attr_name: str, **kwargs: Any) -> str | None:
        """One value of :meth:`metadata`, ``None`` where there is none."""
        return self.metadata(path).get(attr_name)

    def setxattr(self, path: str, copy_kwargs: Mapping[str, Any] | None = None, **kw_args: str | None) -> None:
        """Set values of an object's metadata, or remove those that are ``None``; S3 writes the object anew for it.

        Raises:
            ObjectChanged: The object was overwritten meanwhile; nothing is changed.
        """
        bucket, key = self.bucket_and_key(path)
        head = self._head(bucket, key, None)
        said = kept(head)
        metadata = {name: value for name, value in (said["Metadata"] | kw_args).items() if value is not None}
        request = {"Bucket": bucket, "Key": key, "CopySource": {"Bucket": bucket, "Key": key}} | said
        request |= {"Metadata": metadata, "MetadataDirective": "REPLACE", "CopySourceIfMatch": head.get("ETag", "*")}
        try:
            self.client.call("copy_object", f"s3://{bucket}/{key}", **request | dict(copy_kwargs or {}))
        except errors.AlreadyExists:  # what a condition that fails is otherwise
            message = "it was overwritten meanwhile: look at it, and set its metadata again"
            raise errors.ObjectChanged(message, uri=f"s3://{bucket}/{key}") from None
        self._changed(f"{bucket}/{key}")

    def url(self, path: str, expires: int = 3600, client_method: str = "get_object", **kwargs: Any) -> str:
        """A URL by which anybody reads the object for ``expires`` seconds; unsigned and lasting under ``anon``.

        Args:
            path: The object.
            expires: Seconds.
            client_method: boto3's name of what may be done, such as ``put_object``.
            **kwargs: More of that method's parameters.
        """
        bucket, key, version = self.locate(path)
        parameters = {"Bucket": bucket, "Key": key} | kwargs | ({"VersionId": version} if version else {})
        uri = f"s3://{bucket}/{key}"
        with translated(uri):
            signer = self.client.own(uri).account.signer
            return str(signer.generate_presigned_url(client_method, Params=parameters, ExpiresIn=expires))

    def sign(self, path: str, expiration: int = 100, **kwargs: Any) -> str:
        """As :meth:`url`, by fsspec's name."""
        return self.url(path, expires=expiration, **kwargs)


_KEPT = (
    "CacheControl",
    "ContentDisposition",
    "ContentEncoding",
    "ContentLanguage",
    "ContentType",
    "Expires",
    "StorageClass",
    "WebsiteRedirectLocation",
)


def kept(head: Mapping[str, Any]) -> dict[str, Any]:
    """What an object carries beside its bytes, out of the answer to HEAD, for one that is to carry the same."""
    said = {name: head[name] for name in _KEPT if name in head}
    metadata = {name: value for name, value in head.get("Metadata", {}).items() if name.lower() != WRITE_ID}
    return said | {"Metadata": metadata}
