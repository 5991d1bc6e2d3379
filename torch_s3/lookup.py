"""What a name is: sizes and versions of objects, how paths are read, and the listings that are known already."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.utils import stringify_path

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.paths import parent, prefix_of, split_path, trimmed
from torch_s3.transport.answer import bare_etag
from torch_s3.transport.client import Client


class Lookup(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The part of :class:`~torch_s3.S3FileSystem` that asks about single names.

    ``ls`` keeps what it was told, as in s3fs: ``info`` and ``exists`` find it there, until this filesystem writes
    below, ``listings_expiry_time`` (seconds) has passed, or :meth:`invalidate_cache` is called. What other writers do
    meanwhile shows with ``refresh=True``. Nothing is taken for missing, opened, read, copied or deleted on the word of
    a kept listing.
    """

    config: S3Config
    client: Client
    version_aware: bool
    _changes = 0  # made through this filesystem

    def info(self, path: str, refresh: bool = False, version_id: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Name, size (bytes), type (``"file"`` or ``"directory"``), ETag (unquoted) and LastModified of an object or
        prefix; with ``version_aware`` or a version asked for, its VersionId too.

        Args:
            path: Object, prefix or bucket.
            refresh: Ask the server, whatever is known.
            version_id: The version of the object; ``None`` for the latest.

        Raises:
            NotFound: There is neither an object nor anything under it as a prefix.
        """
        bucket, key, version = self.split_path(path)
        version = version_id or version
        if key.endswith("/") and not version:
            if (found := self._below(bucket, key)) is not None:
                return found
            key = trimmed(key)
        path = f"{bucket}/{key}" if key else bucket
        if not bucket:
            return directory("")
        if not (refresh or version or self.version_aware) and (known := self._known(path)):
            return known
        if not key:
            self.client.call("head_bucket", f"s3://{bucket}", Bucket=bucket)
            return directory(path)
        try:
            head = self._head(bucket, key, version)
        except errors.NotFound:
            if version or self._below(bucket, prefix_of(key)) is None:
                raise
            return directory(path)
        found = file(path, head["ContentLength"], head)
        if version or self.version_aware:
            found["VersionId"] = head.get("VersionId")
        return found

    def _below(self, bucket: str, prefix: str) -> dict[str, Any] | None:
        """What a name that ends in a slash is: a directory, or an object of just this name, with content."""
        which = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": 1}
        found = self.client.call("list_objects_v2", f"s3://{bucket}/{prefix}", **which).get("Contents")
        if not found:
            return None
        if found[0]["Key"] == prefix and found[0]["Size"]:
            return file(f"{bucket}/{prefix}", found[0]["Size"], found[0])
        return directory(trimmed(f"{bucket}/{prefix}"))

    def check_new(self, path: str) -> None:
        """See that there is no such object, for servers that don't heed the condition of a write.

        Who may write but not look is told nothing.

        Raises:
            AlreadyExists: There is one.
        """
        with contextlib.suppress(errors.NotFound, errors.AccessDenied):
            self._object(path)
            raise errors.AlreadyExists(
                "the object exists already, and overwriting was not allowed", uri=f"s3://{self._strip_protocol(path)}"
            )

    def isdir(self, path: str) -> bool:
        """Whether it is a prefix or bucket. Raises where S3 doesn't answer; False where it may not be looked at."""
        return self._type(path) == "directory"

    def isfile(self, path: str) -> bool:
        """Whether it is an object, as :meth:`isdir`."""
        return self._type(path) == "file"

    def _type(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except (errors.NoCredentials, errors.CredentialsExpired):
            raise
        except (errors.NotFound, errors.AccessDenied, errors.InvalidUri):
            return None

    def to_dict(self, *, include_password: bool = True) -> dict[str, Any]:
        """As in fsspec; without ``include_password``, without anything secret."""
        said: dict[str, Any] = super().to_dict(include_password=include_password)
        return said if include_password else {name: value for name, value in said.items() if name not in _SECRET}

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether there is such an object, prefix or bucket. Raises where S3 doesn't tell, e.g. ``AccessDenied``."""
        try:
            self.info(path, **kwargs)
        except errors.NotFound:
            return False
        return True

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget what was listed: all, or ``path``, what is below it, and the prefixes that it is in."""
        if path is None:
            self._changes += 1
            self.dircache.clear()
            return
        path = self._strip_protocol(path)
        self._changed(path)
        for known in list(self.dircache):
            if known.startswith(prefix_of(path)):
                self._forget(known)

    def _changed(self, path: str) -> None:
        """Forget the listings in which a new or deleted object, or bucket, shows."""
        self._changes += 1
        path = trimmed(path)
        if "/" not in path:
            self._forget("")
        while path:
            self._forget(path)
            path = parent(path)

    def _forget(self, path: str) -> None:
        with contextlib.suppress(KeyError):  # DirCache.pop looks first, and then takes
            del self.dircache[path]

    # ------------------------------------------------------------------ paths

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return [*map(cls._strip_protocol, path)] if isinstance(path, list) else trimmed(cls._whole(path))

    @classmethod
    def _whole(cls, path: Any) -> str:
        """A path without its protocol, but with the slashes that end it: an object's key may end so."""
        if isinstance(path, str) and not path.startswith(("s3", "/")):
            return path  # most have been stripped before
        path = stringify_path(path)
        for mark in (f"{protocol}{colons}" for protocol in cls.protocol for colons in ("://", "::")):
            path = path.removeprefix(mark)
        return str(path).lstrip("/")

    @classmethod
    def _uri(cls, path: Any) -> str:
        return f"s3://{cls._whole(path)}"

    @classmethod
    def _parent(cls, path: str) -> str:
        return parent(cls._strip_protocol(path))

    def split_path(self, path: str) -> tuple[str, str, str | None]:
        """Bucket, key, and the version that ``?versionId=`` names where the filesystem is ``version_aware``."""
        bucket, key = split_path(self._whole(path))
        if not self.version_aware:
            return bucket, key, None
        key, _, version = key.partition("?versionId=")
        return bucket, key, version or None

    def locate(self, path: str) -> tuple[str, str, str | None]:
        """As :meth:`split_path`, of an object.

        Raises:
            InvalidUri: It names none.
        """
        bucket, key, version = self.split_path(path)
        if not bucket or not key:
            raise errors.InvalidUri(
                "this names no object: write s3://bucket/key", uri=f"s3://{self._strip_protocol(path)}"
            )
        if not key.isascii() and any("\ud800" <= character <= "\udfff" for character in key):
            message = "S3's keys are UTF-8, which has no code for a lone surrogate"
            raise errors.InvalidUri(message, uri=f"s3://{bucket}/{key}")
        return bucket, key, version

    def bucket_and_key(self, path: str) -> tuple[str, str]:
        """The bucket and key of an object to write.

        Raises:
            InvalidUri: It names none, or one version of one.
        """
        bucket, key, version = self.locate(path)
        if version:
            raise errors.InvalidUri("a version is only read: leave ?versionId= out", uri=f"s3://{bucket}/{key}")
        return bucket, key

    # ------------------------------------------------------------------ inside

    def _object(self, path: str, *, version_id: str | None = None, refresh: bool = True) -> dict[str, Any]:
        """The info of an object.

        Raises:
            NotFound: It is none.
        """
        info = self.info(path, refresh=refresh, version_id=version_id)
        if info["type"] != "file":
            raise errors.NotFound("this is a prefix, not an object", uri=f"s3://{info['name']}")
        return info

    def _head(self, bucket: str, key: str, version: str | None) -> dict[str, Any]:
        which = {"VersionId": version} if version else {}
        return self.client.call("head_object", f"s3://{bucket}/{key}", Bucket=bucket, Key=key, **which)  # type: ignore[no-any-return]

    def _known(self, path: str) -> dict[str, Any] | None:
        """What the kept listing of its parent says of a path."""
        entries = self.dircache.get(self._parent(path), [])
        at = bisect_left(entries, path, key=lambda entry: str(entry["name"]))
        return dict(entries[at]) if at < len(entries) and entries[at]["name"] == path else None


_SECRET = ("key", "secret", "token", "customer_key", "client_kwargs", "s3_additional_kwargs")


def directory(path: str) -> dict[str, Any]:
    return {"name": path, "size": 0, "type": "directory"}


def file(path: str, size: int, said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": path,
        "size": size,
        "type": "file",
        "ETag": bare_etag(said["ETag"]) if "ETag" in said else None,
        "LastModified": said.get("LastModified"),
    }
