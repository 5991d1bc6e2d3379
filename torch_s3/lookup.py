"""What is there: names, sizes and versions of objects, and the listings that are known already."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
from fsspec.core import has_magic
from fsspec.utils import stringify_path

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.paths import parent, prefix_of, split_path, trimmed
from torch_s3.transport.answer import bare_etag
from torch_s3.transport.client import Client
from torch_s3.transport.listing import Object, entry, list_objects, list_pages


class Lookup(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The part of :class:`~torch_s3.S3FileSystem` that asks and moves no object's bytes.

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
            return _directory("")
        if not (refresh or version or self.version_aware) and (known := self._known(path)):
            return known
        if not key:
            self.client.call("head_bucket", f"s3://{bucket}", Bucket=bucket)
            return _directory(path)
        try:
            head = self._head(bucket, key, version)
        except errors.NotFound:
            if version or self._below(bucket, prefix_of(key)) is None:
                raise
            return _directory(path)
        found = _file(path, head["ContentLength"], head)
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
            return _file(f"{bucket}/{prefix}", found[0]["Size"], found[0])
        return _directory(trimmed(f"{bucket}/{prefix}"))

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

    def walk(
        self,
        path: str,
        maxdepth: int | None = None,
        topdown: bool = True,
        on_error: Any = "omit",
        detail: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[str, Any, Any]]:
        """As in fsspec: ``(path, names of directories, names of objects)`` of a directory and all below.

        A directory without a name, which a key with ``//`` has, is called ``/``.

        Args:
            path: Prefix or bucket.
            maxdepth: Levels to descend.
            topdown: A directory comes before those in it, and the list of these may be changed; or after.
            on_error: What to call with each error, or ``"raise"``; by default, that nothing is there is omitted, and
                all else is raised.
            detail: Give dicts by name.
            **kwargs: ``refresh``, as in :meth:`ls`.
        """
        if maxdepth is not None and maxdepth < 1:
            raise ValueError(f"maxdepth={maxdepth}: must be at least 1")
        path = self._strip_protocol(path)
        try:
            listing = self.ls(path, detail=True, **kwargs)
        except OSError as error:
            if callable(on_error):
                on_error(error)
            elif on_error == "raise" or not isinstance(error, errors.NotFound):
                raise
            return
        start = prefix_of(path)
        directories, files = (
            {each["name"][len(start) :]: each for each in listing if (each["type"] == "directory") == wanted}
            for wanted in (True, False)
        )
        here: tuple[str, Any, Any] = (path, directories, files) if detail else (path, [*directories], [*files])
        if topdown:
            yield here
        if maxdepth != 1:
            left = None if maxdepth is None else maxdepth - 1
            for name in here[1]:
                yield from self.walk(start + name, left, topdown, on_error, detail, **kwargs)
        if not topdown:
            yield here

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

    def ls(self, path: str, detail: bool = False, refresh: bool = False, **kwargs: Any) -> list[Any]:
        """What lies directly under a prefix, sorted by name: names, as s3fs gives, or dicts as from :meth:`info`.

        Args:
            path: Prefix, bucket, object, or ``""`` for the buckets.
            detail: Give dicts.
            refresh: Ask the server, whatever is known.

        Raises:
            NotFound: Nothing is there.
        """
        path = self._strip_protocol(path)
        found = None if refresh else self.dircache.get(path)
        if found is None:
            changes = self._changes
            found = self._ls(path)
            if found and found[0]["name"] != path:
                self.dircache[path] = found
            if changes != self._changes:  # it may be old already
                self._forget(path)
        return list(found) if detail else [entry["name"] for entry in found]

    def _ls(self, path: str) -> list[dict[str, Any]]:
        bucket, key, _ = self.split_path(path)
        found: list[dict[str, Any]]
        if not bucket:
            found = [_directory(entry["Name"]) for entry in self.client.call("list_buckets", "s3://")["Buckets"]]
        else:
            found = []
            for page in list_pages(self.client, bucket, prefix_of(key), delimiter="/"):
                found += [_directory(trimmed(f"{bucket}/{prefix}")) for prefix in page.prefixes]
                found += [entry(bucket, each) for each in page.objects if not _marker(each)]
            if not found and key:
                info = self.info(path, refresh=True)
                found = [info] if info["type"] == "file" else []  # just a directory marker
        found.sort(key=lambda each: (each["name"], each["type"] == "directory"))
        return found

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        refresh: bool = False,
        prefix: str = "",
        **kwargs: Any,
    ) -> list[str] | dict[str, dict[str, Any]]:
        """All objects under a prefix, in one flat listing by the server; the object itself where ``path`` is one.

        Args:
            path: Prefix, bucket or object.
            maxdepth: Levels to descend, listed one by one; ``None`` for all.
            withdirs: Include the prefixes, and ``path`` itself. Where there is an object of a prefix's name, that is
                what the name stands for.
            detail: Give a dict by name, of dicts as from :meth:`info`.
            refresh: With ``maxdepth``: ask the server, whatever is known.
            prefix: What their names under ``path`` start with.
        """
        if maxdepth is not None and prefix:
            raise ValueError("find takes prefix or maxdepth, not both")
        path = self._strip_protocol(path)
        if maxdepth is not None:
            files, directories = self._find_by_level(path, maxdepth, refresh)
        else:
            files, directories = self._find(path, prefix, withdirs)
        found = directories | files if withdirs else files
        names = sorted(found)
        return {name: found[name] for name in names} if detail else names

    def _find(self, path: str, prefix: str, withdirs: bool) -> tuple[dict[str, dict[str, Any]], ...]:
        """Objects and, where wanted, directories at any depth."""
        bucket, key, _ = self.split_path(path)
        if not bucket:
            raise errors.InvalidUri("not all buckets are listed at once: name one, or give maxdepth", uri="s3://")
        files: dict[str, dict[str, Any]] = {}
        directories: dict[str, dict[str, Any]] = {}
        for page in list_objects(self.client, bucket, prefix_of(key) + prefix):
            for each in page.objects:
                name = f"{bucket}/{each[0]}"
                if not _marker(each):
                    files[name] = entry(bucket, each)
                above = trimmed(name) if name.endswith("/") else parent(name)
                while withdirs and len(above) >= len(path) and above not in directories:
                    directories[above] = _directory(above)
                    above = parent(above)
        if not files and key and not prefix:
            with contextlib.suppress(errors.NotFound):
                info = self.info(path, refresh=True)
                if info["type"] == "file":
                    files[path] = info
        return files, directories

    def _find_by_level(self, path: str, maxdepth: int, refresh: bool) -> tuple[dict[str, dict[str, Any]], ...]:
        """Objects and directories down to a depth."""
        files: dict[str, dict[str, Any]] = {}
        directories: dict[str, dict[str, Any]] = {}
        for above, below, here in self.walk(path, maxdepth, detail=True, refresh=refresh):
            files.update((each["name"], each) for each in here.values())
            directories.update((each["name"], each) for each in below.values())
            if above and [each["name"] for each in here.values()] != [above]:  # not an object
                directories[above] = _directory(above)
        return files, directories

    def du(
        self, path: str, total: bool = True, maxdepth: int | None = None, withdirs: bool = False, **kwargs: Any
    ) -> int | dict[str, int]:
        """Bytes of all objects under a prefix; with ``total=False``, ``{name: bytes}``."""
        found = self.find(path, maxdepth=maxdepth, withdirs=withdirs, detail=True, **kwargs)
        sizes = {name: entry["size"] for name, entry in found.items()}  # type: ignore[union-attr]  # detail
        return sum(sizes.values()) if total else sizes

    def expand_path(self, path: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> list[str]:
        """The names that a name, pattern or list of them stands for.

        A name that looks like a pattern is meant where there is such an object.

        Raises:
            NotFound: It stands for none.
        """
        return sorted(self.expand(path, recursive, maxdepth, **kwargs))

    def expand(
        self, path: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any
    ) -> dict[str, dict[str, Any] | None]:
        """As :meth:`expand_path`, with the info of each name; ``None`` where nobody was asked."""
        if maxdepth is not None and maxdepth < 1:
            raise ValueError(f"maxdepth={maxdepth}: must be at least 1")
        given = [path] if isinstance(path, str | os.PathLike) else [*path]
        found: dict[str, dict[str, Any] | None] = {}
        for name in map(self._whole, given):
            if self._is_pattern(name) and not self._is_one(name):
                matches = self.glob(trimmed(name), detail=True, maxdepth=maxdepth, **kwargs)
                found |= matches
                if recursive and maxdepth != 1:
                    left = None if maxdepth is None else maxdepth - 1
                    for match in matches:
                        found = self._below_and(match, left, **kwargs) | found
            elif recursive:
                found = self._below_and(name, maxdepth, **kwargs) | found
            else:
                info = self._maybe(name) if name.endswith("/") else None  # either may be meant
                found[info["name"] if info else trimmed(name)] = info
        if not found:
            first, *others = given or [""]
            words = f"nothing is there, nor at the {len(others)} others" if others else "nothing is there"
            raise errors.NotFound(words, uri=f"s3://{self._strip_protocol(first)}")
        return found

    def _below_and(self, path: str, maxdepth: int | None, **kwargs: Any) -> dict[str, dict[str, Any] | None]:
        """What there is of a name and under it: an object may have the name of a prefix."""
        found: Any = self.find(path, maxdepth, withdirs=True, detail=True, **kwargs)
        path = self._strip_protocol(path)
        if found.get(path, _directory(path))["type"] == "directory" and (info := self._maybe(path)):
            found[path] = info
        return found  # type: ignore[no-any-return]

    def _maybe(self, path: str) -> dict[str, Any] | None:
        """The info of what may not be there."""
        try:
            return self.info(path, refresh=True)
        except errors.NotFound:
            return None

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

    def _is_one(self, path: str) -> bool:
        """Whether a path that might be a pattern is the name of an object."""
        with contextlib.suppress(errors.S3Error):
            return bool(self.info(path)["type"] == "file")
        return False

    def _is_pattern(self, path: str) -> bool:
        """Whether a path may stand for several objects; the question mark of ``?versionId=`` makes none."""
        return bool(has_magic("/".join(self.split_path(path)[:2])))

    def _known(self, path: str) -> dict[str, Any] | None:
        """What the kept listing of its parent says of a path."""
        entries = self.dircache.get(self._parent(path), [])
        at = bisect_left(entries, path, key=lambda entry: str(entry["name"]))
        return dict(entries[at]) if at < len(entries) and entries[at]["name"] == path else None


_SECRET = ("key", "secret", "token", "customer_key", "client_kwargs", "s3_additional_kwargs")


def _directory(path: str) -> dict[str, Any]:
    return {"name": path, "size": 0, "type": "directory"}


def _file(path: str, size: int, said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": path,
        "size": size,
        "type": "file",
        "ETag": bare_etag(said["ETag"]) if "ETag" in said else None,
        "LastModified": said.get("LastModified"),
    }


def _marker(listed: Object) -> bool:
    """Whether an object is just what other tools make of an empty folder."""
    return listed[0].endswith("/") and listed[1] == 0
