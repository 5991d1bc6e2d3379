"""What is done within S3: copies, deletions, buckets."""

from __future__ import annotations

from typing import Any

import fsspec

from torch_s3 import errors
from torch_s3.copying import ONE_REQUEST, copy_by_parts
from torch_s3.local import LocalFiles, Pairs
from torch_s3.paths import prefix_of
from torch_s3.transport.failures import denied
from torch_s3.transport.listing import list_objects

_DELETE_LIMIT = 1000  # keys in one DeleteObjects request


class Upkeep(LocalFiles):
    """The part of :class:`~torch_s3.S3FileSystem` that changes what is there without moving an object's bytes here."""

    def copy(
        self,
        path1: Any,
        path2: Any,
        recursive: bool = False,
        maxdepth: int | None = None,
        on_error: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Copy objects within S3, many at once; see :meth:`cp_file`.

        Args:
            path1: Object, prefix, pattern, or list of them.
            path2: Object or prefix, or as many objects as there are in ``path1``.
            recursive: With all that lies under prefixes.
            maxdepth: Levels to descend.
            on_error: ``"ignore"`` passes over what is gone meanwhile, which is what ``recursive`` does unless told
                ``"raise"``.
            **kwargs: None.

        Raises:
            NotFound: Nothing is there.
            S3Error: Two would take the same place; none is copied.
        """
        lenient = on_error == "ignore" or (on_error is None and recursive)

        def copy(pair: tuple[str, str]) -> None:
            try:
                self._copy(*pair)
            except errors.NotFound as error:
                if not lenient or error.key is None:  # the bucket is missing
                    raise

        self.client.side_by_side(copy, self._pairs(path1, path2, recursive, maxdepth))

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> None:
        """Copy objects within S3, many at once, then delete exactly those that were copied.

        Raises:
            NotFound: Nothing is there.
            S3Error: One would take the place of another that is to be moved; none is.
        """
        pairs = self._pairs(path1, path2, recursive, maxdepth)
        found = [(self._whole(source), self._whole(target)) for source, target in pairs]
        sources = {source for source, _ in found}
        for _, target in found:
            if target in sources:
                raise errors.S3Error("this is to be moved itself: nothing was moved", uri=f"s3://{target}")
        copied = self.client.side_by_side(lambda pair: self._copy(*pair), found)
        self._delete([source for (source, _), was_there in zip(found, copied, strict=True) if was_there])

    def _pairs(self, path1: Any, path2: Any, recursive: bool, maxdepth: int | None) -> list[tuple[str, str]]:
        """What is to be copied where, as fsspec has it.

        Raises:
            S3Error: Two would be copied to one place.
            ValueError: As many places as objects were promised, and there are more or fewer.
        """
        pairs = Pairs(self, path1, path2)
        fsspec.AbstractFileSystem.copy(pairs, path1, path2, recursive=recursive, maxdepth=maxdepth, refresh=True)
        pairs.check_apart(self._uri, self._uri, "nothing was copied")
        return pairs.found

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy an object within S3, without moving its bytes through this machine.

        Its metadata, tags and storage class are copied too; its access control list isn't.

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
            same = {"StorageClass": head["StorageClass"]} if "StorageClass" in head else {}  # the rest is by itself
            self.client.call("copy_object", f"s3://{'/'.join(target)}", CopySource=source, **place, **same)
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

        Of a list, objects that aren't there are no error, as they are none to S3: so a deletion that broke off can be
        done again, and nobody is asked about each.

        Args:
            path: Object, pattern, or list of them; with ``recursive``, also prefix or bucket.
            recursive: With all that lies under prefixes. Without, a pattern means the objects that it matches.
            maxdepth: Levels to descend.

        Raises:
            NotFound: Nothing is there.
            S3Error: A prefix is named, or prefixes alone match, without ``recursive``. Nothing is deleted.
            AccessDenied: Some could not be deleted; the message names the first one.
        """
        everything = recursive and maxdepth is None  # directory markers too, which find() doesn't show
        found = self.expand(path, recursive and not everything, maxdepth, refresh=True)
        for name, info in found.items():
            bucket, key, version = self.split_path(name)
            if version:
                message = "versions are not deleted one by one: leave ?versionId= out"
                raise errors.InvalidUri(message, uri=f"s3://{name}")
            if not recursive and not key and info is None:
                raise errors.S3Error("this is a bucket: pass recursive=True to delete it", uri=f"s3://{bucket}")
        if everything:
            self._delete([name for names in self.client.side_by_side(self._all_of, found.items()) for name in names])
            for name in found:
                if not self.split_path(name)[1]:
                    self.rmdir(name)
            return
        if len(found) == 1:  # deleting what isn't there is no error in S3, but it is a mistake here
            found = {name: info or self.info(name, refresh=True) for name, info in found.items()}
        names = [name for name, info in found.items() if info is None or info["type"] == "file"]
        if not names and not recursive:
            some, message = next(iter(found)), "this is a prefix: pass recursive=True to delete all under it"
            raise errors.S3Error(message, uri=f"s3://{some}")
        self._delete(names)

    def _all_of(self, found: tuple[str, dict[str, Any] | None]) -> list[str]:
        """An object, everything under a prefix or in a bucket, or both."""
        name, info = found
        bucket, key, _ = self.split_path(name)
        info = info or self.info(name, refresh=True)
        pages = list_objects(self.client, bucket, prefix_of(key))
        below = [f"{bucket}/{each[0]}" for page in pages for each in page.objects]
        return below + ([name] if info["type"] == "file" else [])

    def _delete(self, names: list[str]) -> None:
        """Delete objects, without a question."""
        by_bucket: dict[str, list[str]] = {}
        for name in names:
            bucket, key = self.bucket_and_key(name)
            by_bucket.setdefault(bucket, []).append(key)
        batches = [
            (bucket, keys[at : at + _DELETE_LIMIT])
            for bucket, keys in by_bucket.items()
            for at in range(0, len(keys), _DELETE_LIMIT)
        ]
        self.client.side_by_side(lambda batch: self._delete_some(*batch), batches)

    def _delete_some(self, bucket: str, keys: list[str]) -> None:
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        try:
            answer = self.client.call("delete_objects", f"s3://{bucket}", Bucket=bucket, Delete=request)
        finally:
            for key in keys:
                self._changed(f"{bucket}/{key}")
        for refused in answer.get("Errors", ()):
            uri, code = f"s3://{bucket}/{refused.get('Key')}", refused.get("Code")
            words = f"not deleted: {code}: {refused.get('Message')}"
            if code == "AccessDenied":
                raise errors.AccessDenied(denied(code, words, operation="DeleteObjects"), uri=uri)
            raise errors.S3Error(words, uri=uri)

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
