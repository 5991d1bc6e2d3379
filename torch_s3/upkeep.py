"""What is done within S3: copies, deletions, buckets."""

from __future__ import annotations

from typing import Any

import fsspec

from torch_s3 import errors
from torch_s3.copying import ONE_REQUEST, copy_by_parts
from torch_s3.local import LocalFiles, Pairs
from torch_s3.transport.listing import list_objects

_DELETE_LIMIT = 1000  # keys in one DeleteObjects request


class Upkeep(LocalFiles):
    """The part of :class:`~torch_s3.S3FileSystem` that changes what is there without moving an object's bytes here."""

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> None:
        """Copy objects within S3, then delete exactly those that were copied.

        Raises:
            NotFound: Nothing is there.
            S3Error: One would take the place of another that is to be moved; none is.
        """
        pairs = Pairs(self)
        fsspec.AbstractFileSystem.copy(pairs, path1, path2, recursive=recursive, maxdepth=maxdepth, refresh=True)
        found = [(self._strip_protocol(source), self._strip_protocol(target)) for source, target in pairs.found]
        for _, target in found:
            if any(target == source for source, _ in found):
                raise errors.S3Error("this is to be moved itself: nothing was moved", uri=f"s3://{target}")
        copied: dict[str, list[str]] = {}
        for source, target in found:
            if self._copy(source, target):
                bucket, key = self.bucket_and_key(source)
                copied.setdefault(bucket, []).append(key)
        for bucket, keys in copied.items():
            for at in range(0, len(keys), _DELETE_LIMIT):
                self._delete(bucket, keys[at : at + _DELETE_LIMIT])

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy an object within S3, with its metadata and without moving its bytes through this machine.

        A prefix is nothing to copy: what lies under it is, see ``copy``.

        Raises:
            ObjectChanged: The source was overwritten meanwhile.
        """
        self._copy(path1, path2)

    def _copy(self, path1: str, path2: str) -> bool:
        """Whether there was an object to copy."""
        (bucket, key, version), target = self.locate(path1), self.bucket_and_key(path2)
        source, place = {"Bucket": bucket, "Key": key}, {"Bucket": target[0], "Key": target[1]}
        try:
            head = self._head(bucket, key, version)
        except errors.NotFound:
            if not self.isdir(path1):
                raise
            return False
        if version:
            source["VersionId"] = version
        if head["ContentLength"] > ONE_REQUEST:
            copy_by_parts(self.client, source, place, head)
        else:
            self.client.call("copy_object", f"s3://{'/'.join(target)}", CopySource=source, **place)
        self._changed("/".join(target))
        return True

    def rm_file(self, path: str) -> None:
        """Delete an object.

        Raises:
            NotFound: There is none.
        """
        bucket, key = self.bucket_and_key(path)
        self._object(path)
        self.client.call("delete_object", f"s3://{bucket}/{key}", Bucket=bucket, Key=key)
        self._changed(f"{bucket}/{key}")

    def rm(self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete objects, a thousand a request; with ``recursive``, everything under a prefix, or in a bucket and it.

        Raises:
            NotFound: Nothing is there.
            AccessDenied: Some could not be deleted; the message names the first one.
        """
        by_bucket: dict[str, list[str]] = {}
        buckets: list[str] = []
        given = {self._strip_protocol(name) for name in (path if isinstance(path, list) else [path])}
        everything = recursive and maxdepth is None  # directory markers too, which find() doesn't show
        for name in self.expand_path(path, recursive=recursive and not everything, maxdepth=maxdepth, refresh=True):
            bucket, key, version = self.split_path(name)
            if version:
                raise errors.InvalidUri(
                    "versions are not deleted one by one: leave ?versionId= out", uri=f"s3://{name}"
                )
            keys = [key] if key else []
            # Deleting what isn't there is no error in S3, but it is a mistake here.
            if (everything or name in given) and self.info(name, refresh=True)["type"] == "directory":
                if not recursive:
                    message = "this is a prefix: pass recursive=True to delete all under it"
                    raise errors.S3Error(message, uri=f"s3://{name}")
                keys = []
            if everything:
                pages = list_objects(self.client, bucket, f"{key}/" if key else "")
                keys += [found[0] for page in pages for found in page.objects]
                buckets += [] if key else [bucket]
            by_bucket.setdefault(bucket, []).extend(keys)
        for bucket, keys in by_bucket.items():
            for at in range(0, len(keys), _DELETE_LIMIT):
                self._delete(bucket, keys[at : at + _DELETE_LIMIT])
        for bucket in buckets:
            self.rmdir(bucket)

    def _delete(self, bucket: str, keys: list[str]) -> None:
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        try:
            answer = self.client.call("delete_objects", f"s3://{bucket}", Bucket=bucket, Delete=request)
        finally:
            for key in keys:
                self._changed(f"{bucket}/{key}".rstrip("/"))
        for refused in answer.get("Errors", ()):
            words = f"not deleted: {refused.get('Code')}: {refused.get('Message')}"
            kind = errors.AccessDenied if refused.get("Code") == "AccessDenied" else errors.S3Error
            raise kind(words, uri=f"s3://{bucket}/{refused.get('Key')}")

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Create a bucket. Prefixes need no creating, but for their bucket with ``create_parents``.

        Raises:
            AlreadyExists: There is such a bucket.
            NotFound: The prefix's bucket is missing, without ``create_parents``.
        """
        bucket, key, _ = self.split_path(path)
        try:
            self.info(bucket, refresh=True)
        except (errors.NoCredentials, errors.CredentialsExpired):
            raise
        except errors.AccessDenied:  # there is one
            pass
        except errors.NotFound:
            if key and not create_parents:
                raise
            region = self.client.region(f"s3://{bucket}")
            elsewhere = region != "us-east-1"
            place = {"CreateBucketConfiguration": {"LocationConstraint": region}} if elsewhere else {}
            self.client.call("create_bucket", f"s3://{bucket}", Bucket=bucket, **place)
            self._changed(bucket)
            return
        if not key:
            raise errors.AlreadyExists("there is such a bucket already", uri=f"s3://{bucket}")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """As :meth:`mkdir`; with ``exist_ok``, also where there is such a bucket."""
        try:
            self.mkdir(path)
        except errors.AlreadyExists:
            if not exist_ok:
                raise

    def rmdir(self, path: str) -> None:
        """Delete an empty bucket. Prefixes go with their last object.

        Raises:
            S3Error: Something is in it.
        """
        bucket, key, _ = self.split_path(path)
        if not key:
            self.client.call("delete_bucket", f"s3://{bucket}", Bucket=bucket)
            self._changed(bucket)
        elif self.exists(path, refresh=True):
            raise errors.S3Error(
                "this is not empty: rm with recursive=True deletes all under it", uri=f"s3://{bucket}/{key}"
            )
