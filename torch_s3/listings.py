"""What lies under a prefix, or is meant by a pattern."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from fsspec.core import has_magic

from torch_s3 import errors
from torch_s3.lookup import Lookup, directory
from torch_s3.paths import parent, prefix_of, trimmed
from torch_s3.transport.listing import Object, entry, list_objects, list_pages


class Listings(Lookup):
    """The part of :class:`~torch_s3.S3FileSystem` that lists."""

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
            found = [directory(entry["Name"]) for entry in self.client.call("list_buckets", "s3://")["Buckets"]]
        else:
            found = []
            for page in list_pages(self.client, bucket, prefix_of(key), delimiter="/"):
                found += [directory(trimmed(f"{bucket}/{prefix}")) for prefix in page.prefixes]
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
                    directories[above] = directory(above)
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
                directories[above] = directory(above)
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
        if found.get(path, directory(path))["type"] == "directory" and (info := self._maybe(path)):
            found[path] = info
        return found  # type: ignore[no-any-return]

    def _maybe(self, path: str) -> dict[str, Any] | None:
        """The info of what may not be there."""
        try:
            return self.info(path, refresh=True)
        except errors.NotFound:
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

    def _is_one(self, path: str) -> bool:
        """Whether a path that might be a pattern is the name of an object."""
        with contextlib.suppress(errors.S3Error):
            return bool(self.info(path)["type"] == "file")
        return False

    def _is_pattern(self, path: str) -> bool:
        """Whether a path may stand for several objects; the question mark of ``?versionId=`` makes none."""
        return bool(has_magic("/".join(self.split_path(path)[:2])))


def _marker(listed: Object) -> bool:
    """Whether an object is just what other tools make of an empty folder."""
    return listed[0].endswith("/") and listed[1] == 0
