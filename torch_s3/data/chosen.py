"""What there is under a prefix, and which of it is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
from fsspec.utils import glob_translate
from tqdm import tqdm

from torch_s3.filesystem import S3FileSystem
from torch_s3.transport.listing import list_objects


class Choice:
    """Which objects are wanted; the arguments are those of :meth:`~torch_s3.Manifest.from_prefix`."""

    def __init__(
        self,
        *,
        suffixes: str | Sequence[str] | None,
        pattern: str | None,
        keep: Callable[[str, int], bool] | None,
        hidden: bool,
        empty: bool,
    ) -> None:
        given = [suffixes] if isinstance(suffixes, str) else suffixes
        self._suffixes = None if given is None else tuple(suffix.lower() for suffix in given)
        self._pattern, self._keep, self._hidden, self._empty = pattern, keep, hidden, empty
        self._matches = None if pattern is None else re.compile(glob_translate(pattern)).match

    def takes(self, root: str, name: str, size: int) -> bool:
        """Whether an object of so many bytes is wanted."""
        return not (
            not name
            or name.endswith("/")
            or (size == 0 and not self._empty)
            or (self._suffixes is not None and not name.lower().endswith(self._suffixes))
            or (not self._hidden and (name.startswith(".") or "/." in name))
            or (self._matches is not None and not self._matches(name))
            or (self._keep is not None and not self._keep(root + name, size))
        )

    def __str__(self) -> str:
        wanted = [] if self._empty else ["has bytes"]
        wanted += [] if self._hidden else ["is visible"]
        wanted += [] if self._suffixes is None else [f"ends in {', '.join(self._suffixes)}"]
        wanted += [] if self._pattern is None else [f"matches {self._pattern}"]
        wanted += [] if self._keep is None else ["is kept by keep="]
        return " and ".join(wanted) or "is a file"


def listed(fs: fsspec.AbstractFileSystem, path: str, bar: tqdm[Any]) -> Iterator[tuple[str, int, str]]:
    """Name under ``path``, size (-1 if unknown) and ETag of everything there."""
    if isinstance(fs, S3FileSystem):
        bucket, _, key = path.partition("/")
        prefix = f"{key}/" if key else ""
        for page in list_objects(fs.client, bucket, prefix):
            for found, size, etag, _ in page.objects:
                yield found[len(prefix) :], size, etag
            bar.update(len(page.objects))
        return
    for full, entry in fs.find(path, detail=True).items():
        size, etag = entry["size"], (entry.get("ETag") or "").strip('"')
        yield full[len(path) :].removeprefix("/"), -1 if size is None else size, etag
