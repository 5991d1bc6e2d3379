"""The list of a dataset's objects, packed: no Python object is kept per key."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np

from torch_s3 import errors
from torch_s3.filesystem import S3FileSystem
from torch_s3.transport.listing import list_objects
from torch_s3.uris import Read, resolve, translated


class Manifest:
    """Uris, sizes and ETags of a dataset's objects, in a fixed order.

    Made by :meth:`from_prefix` or :meth:`from_uris`. Reads pin what it says: an object that has changed since is
    :class:`~torch_s3.ObjectChanged`. Pickles compactly, and is shared with forked workers without copying.

    Attributes:
        root: The uri that all others start with, ending in ``/``.
        sizes: int64 (n,), bytes of each object, -1 where unknown.
    """

    def __init__(self, root: str, names: _Strings, sizes: Sequence[int], etags: _Strings, *, listed: bool) -> None:
        self.root = root
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self._names = names
        self._etags = etags
        self._listed = listed

    @classmethod
    def from_prefix(
        cls,
        uri: str,
        *,
        suffixes: Sequence[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> Manifest:
        """List everything under a prefix, sorted by key; hidden (``.…``) and empty objects are left out.

        Args:
            uri: ``s3://bucket/prefix/``, or a folder of another filesystem.
            suffixes: Keep only keys that end in one of these, in upper or lower case.
            storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
            filesystem: Used instead of one made for the uri.

        Raises:
            NotFound: There is no such bucket or folder.
            EmptyDataset: Nothing is left to read.
        """
        fs, path = resolve(uri, storage_options=storage_options, filesystem=filesystem)
        root = fs.unstrip_protocol(path)
        root += "" if root.endswith("/") else "/"
        suffix = tuple(s.lower() for s in suffixes) if suffixes is not None else ("",)
        names, sizes, etags, count = _Strings(), array("q"), _Strings(), 0
        last, ascending = "", True
        with translated(root):
            for name, size, etag in _listed(fs, path):
                count += 1
                hidden = name.startswith(".") or "/." in name
                if name and size != 0 and name.lower().endswith(suffix) and not hidden:
                    names.append(name)
                    sizes.append(-1 if size is None else size)
                    etags.append(etag)
                    ascending, last = ascending and last <= name, name
            if not names and fs.isfile(path):
                raise errors.EmptyDataset("this is one object: give a prefix, or a list of uris", uri=root)
        if not names:
            wanted = f" and ends in {', '.join(suffix)}" if suffixes is not None else ""
            what = f"none of the {count} objects here has bytes, is visible{wanted}"
            raise errors.EmptyDataset(f"{what if count else 'nothing is stored here'}: check the prefix", uri=root)
        if not ascending:  # not every server sorts
            order = sorted(range(len(names)), key=names.__getitem__)
            names, etags = (_Strings(strings[index] for index in order) for strings in (names, etags))
            sizes = array("q", [sizes[index] for index in order])
        return cls(root, names, sizes, etags, listed=True)

    @classmethod
    def from_uris(cls, uris: Sequence[str]) -> Manifest:
        """These objects, in this order; sizes and ETags are unknown.

        Raises:
            EmptyDataset: There are none.
            InvalidUri: One has no scheme, or they differ in it.
        """
        if isinstance(uris, str):
            raise TypeError(f"{uris!r} is one uri: give a list of them, or use from_prefix")
        uris = [os.fspath(uri) for uri in uris]
        if not uris:
            raise errors.EmptyDataset("the list of uris is empty")
        scheme, mark, _ = uris[0].partition("://")
        if not mark:
            raise errors.InvalidUri("no scheme: write s3://bucket/key", uri=uris[0])
        for uri in uris:
            if not uri.startswith(f"{scheme}://"):
                raise errors.InvalidUri(
                    f"all uris of one dataset start alike, with s3:// for instance; others start with {scheme}", uri=uri
                )
        shared = os.path.commonprefix(uris)  # noqa: RUF071 - characters, of which the whole folders count
        root = shared[: shared.rindex("/") + 1]
        names, unknown = _Strings(uri[len(root) :] for uri in uris), _Strings("" for _ in uris)
        return cls(root, names, [-1] * len(uris), unknown, listed=False)

    def __len__(self) -> int:
        return len(self.sizes)

    def uri(self, index: int) -> str:
        """The uri of object ``index``."""
        return self.root + self._names[index]

    def read(self, index: int, fs: fsspec.AbstractFileSystem) -> Read:
        """What to read for object ``index``, in ``fs``."""
        size = int(self.sizes[index])
        return Read(fs._strip_protocol(self.uri(index)), size if size >= 0 else None, self._etags[index] or None)

    def folders(self) -> Iterator[str]:
        """The class folder of each object: the first one under a listed prefix, as in torchvision's ``ImageFolder``;
        for a list of uris, the one that the object lies in. "" where there is none.
        """
        for index in range(len(self)):
            name = self._names[index]
            if self._listed:
                folder, _, rest = name.partition("/")
                yield folder if rest else ""
            else:
                yield (self.root + name).rpartition("/")[0].rpartition("/")[2]


def _listed(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[tuple[str, int | None, str]]:
    """Name under ``path``, size and ETag of everything there."""
    if isinstance(fs, S3FileSystem):
        bucket, _, key = path.partition("/")
        prefix = f"{key}/" if key else ""
        for page in list_objects(fs.client, bucket, prefix):
            for found, size, etag, _ in page.objects:
                yield found[len(prefix) :], size, etag
    else:
        for full, entry in fs.find(path, detail=True).items():
            yield full[len(path) :].removeprefix("/"), entry["size"], (entry.get("ETag") or "").strip('"')


class _Strings:
    """Strings in one buffer: 8 bytes each beyond their UTF-8 text."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("q")
        for string in strings:
            self.append(string)

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, string: str) -> None:
        """Add one at the end."""
        self._text += string.encode(errors="surrogateescape")
        self._ends.append(len(self._text))

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].decode(errors="surrogateescape")
