"""The list of a dataset's objects, packed: no Python object is kept per key."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from torch_s3 import errors
from torch_s3.data import tables
from torch_s3.data.chosen import Choice, listed
from torch_s3.data.labels import Labels, pack_labels
from torch_s3.data.strings import PackedETags, PackedStrings, StringsBuilder
from torch_s3.filesystem import S3FileSystem
from torch_s3.publish import publishing
from torch_s3.uris import Read, resolve, translated

_FORMAT = 1
_ASKING = 16  # objects at a time whose size and ETag is asked for
_STRANGER = "not a manifest that Manifest.save of this version has written"


class Manifest:
    """Uris, sizes, ETags and labels of a dataset's objects, in a fixed order.

    Made by :meth:`from_prefix`, :meth:`from_uris`, :meth:`from_csv`, :meth:`from_parquet` or :meth:`load`. Reads pin
    what it says: an object that has changed since is :class:`~torch_s3.ObjectChanged`. It is packed in numpy arrays:
    36 bytes an object beyond the text of its key (16 without ETags), 8 more with a label. Pickles compactly, and is
    shared with forked workers without copying. ``manifest[100:200]``, ``manifest[indices]`` and ``manifest[mask]`` are
    manifests too, with their ETags and labels.

    Attributes:
        root: The uri that all others start with, ending in ``/``.
        sizes: int64 (n,), bytes of each object, -1 where unknown.
        labels: int64 (n,), or a sequence of n strings; ``None`` where it has none.
    """

    def __init__(
        self,
        root: str,
        names: PackedStrings,
        sizes: NDArray[np.int64],
        etags: PackedETags | None,
        labels: Labels | None = None,
        *,
        listed: bool,
    ) -> None:
        self.root, self.sizes, self.labels = root, sizes, labels
        self._names, self._etags, self._listed = names, etags, listed
        self._fingerprint: str | None = None

    @classmethod
    def from_prefix(
        cls,
        uri: str,
        *,
        suffixes: str | Sequence[str] | None = None,
        pattern: str | None = None,
        keep: Callable[[str, int], bool] | None = None,
        hidden: bool = False,
        empty: bool = False,
        progress: bool | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> Manifest:
        """List everything under a prefix, sorted by key. The prefixes under it are listed side by side.

        Args:
            uri: ``s3://bucket/prefix/``, or a folder of another filesystem.
            suffixes: Keep only keys that end in this, or one of these, in upper or lower case.
            pattern: Keep only keys whose part after the prefix matches this glob, such as ``*/2024-*.jpg``: ``*`` is
                anything but ``/``, ``**`` any folders.
            keep: Called with each uri and size in bytes that is left (-1 if unknown); says whether to keep it.
            hidden: Keep keys of which a part begins with ``.``.
            empty: Keep objects of no bytes.
            progress: Show a bar. ``None``: on a terminal, where it takes longer than two seconds.
            storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
            filesystem: Used instead of one made for the uri.

        Raises:
            NotFound: There is no such bucket or folder.
            EmptyDataset: Nothing is left to read; says what was left out and why.
        """
        fs, path = resolve(uri, storage_options=storage_options, filesystem=filesystem)
        root = fs.unstrip_protocol(path)
        root += "" if root.endswith("/") else "/"
        choice = Choice(suffixes=suffixes, pattern=pattern, keep=keep, hidden=hidden, empty=empty)
        names, sizes, etags, count = StringsBuilder(), array("q"), StringsBuilder(), 0
        last, ascending = "", True
        bar = tqdm(desc=f"listing {root}", unit=" objects", delay=2, disable=None if progress is None else not progress)
        with translated(root), bar:
            for name, size, etag in listed(fs, path, bar):
                count += 1
                if not choice.takes(root, name, size):
                    continue
                names.append(name)
                sizes.append(size)
                etags.append(etag)
                ascending, last = ascending and last <= name, name
            if not sizes and fs.isfile(path):
                raise errors.EmptyDataset("this is one object: give a prefix, or a list of uris", uri=root[:-1])
        if not sizes:
            what = f"none of the {count} objects here {choice}"
            raise errors.EmptyDataset(f"{what if count else 'nothing is stored here'}: check the prefix", uri=root)
        packed = PackedETags.pack(etags.packed())
        found = cls(root, names.packed(), np.frombuffer(sizes, np.int64), packed, listed=True)
        if ascending:
            return found
        keys = list(found._names)  # not every server sorts
        return found[np.array(sorted(range(len(keys)), key=keys.__getitem__))]

    @classmethod
    def from_uris(
        cls, uris: Sequence[str], labels: Sequence[Any] | None = None, *, allow_duplicates: bool = False
    ) -> Manifest:
        """These objects, in this order; sizes and ETags are unknown, so that reads take what is there.

        They may lie in several buckets, if the same credentials and endpoint are good for all.

        Args:
            uris: Each with its scheme.
            labels: An int or a string for each.
            allow_duplicates: Take a uri that is there twice as two samples.

        Raises:
            EmptyDataset: There are none.
            InvalidUri: One is missing or has no scheme, they differ in it, or one is there twice.
            ValueError: Labels are missing.
        """
        if isinstance(uris, str):
            raise TypeError(f"{uris!r} is one uri: give a list of them, or use from_prefix")
        uris = list(uris)
        if not uris:
            raise errors.EmptyDataset("the list of uris is empty")
        for index, uri in enumerate(uris):
            if not uri or not isinstance(uri, (str, os.PathLike)):
                raise errors.InvalidUri(f"number {index} of the list, counted from 0, is no uri: {uri!r}")
        uris = [os.fspath(uri) for uri in uris]
        scheme, mark, _ = uris[0].partition("://")
        if not mark:
            raise errors.InvalidUri("no scheme: write s3://bucket/key", uri=uris[0])
        for uri in uris:
            if not uri.startswith(f"{scheme}://"):
                raise errors.InvalidUri(
                    f"all uris of one dataset start alike, with s3:// for instance; others start with {scheme}", uri=uri
                )
        if not allow_duplicates and len(set(uris)) < len(uris):
            seen: set[str] = set()
            twice = next(uri for uri in uris if uri in seen or seen.add(uri))  # type: ignore[func-returns-value]
            raise errors.InvalidUri(
                "it is in the list twice, and each sample comes once an epoch: leave one out, or make the manifest by "
                "from_uris(…, allow_duplicates=True)",
                uri=twice,
            )
        shared = os.path.commonprefix([min(uris), max(uris)])  # noqa: RUF071 - characters, of which the whole folders count
        root = shared[: shared.rindex("/") + 1]
        names = StringsBuilder(uri[len(root) :] for uri in uris).packed()
        packed = None if labels is None else pack_labels(labels, uris)
        unknown = np.full(len(uris), -1, np.int64)
        return cls(root, names, unknown, None, packed, listed=False)

    @classmethod
    def from_csv(
        cls,
        uri: str,
        *,
        uri_column: str = "uri",
        label_column: str | None = None,
        allow_duplicates: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> Manifest:
        """The objects that a CSV file with a header lists, as :meth:`from_uris`.

        Args:
            uri: Of the file.
            uri_column: Of the objects' uris.
            label_column: Of their labels: ints if all are, else strings.
            allow_duplicates: See :meth:`from_uris`.
            storage_options: For the filesystem of the file.
            filesystem: Used instead.

        Raises:
            ValueError: It is no UTF-8, or a column, a uri or a label is missing.
        """
        content = _content(uri, storage_options, filesystem)
        uris, labels = tables.read_csv(content, uri, uri_column, label_column)
        return cls.from_uris(uris, labels, allow_duplicates=allow_duplicates)

    @classmethod
    def from_parquet(
        cls,
        uri: str,
        *,
        uri_column: str = "uri",
        label_column: str | None = None,
        allow_duplicates: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> Manifest:
        """The objects that a Parquet file lists, see :meth:`from_csv`. Needs pyarrow.

        Raises:
            ImportError: pyarrow is not installed.
            ValueError: It is no Parquet file, or a column, a uri or a label is missing.
        """
        content = _content(uri, storage_options, filesystem)
        uris, labels = tables.read_parquet(content, uri, uri_column, label_column)
        return cls.from_uris(uris, labels, allow_duplicates=allow_duplicates)

    def save(
        self,
        uri: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        """Write it as one file, to S3 or any filesystem, or to a path on disk, whose folders are made; whole or not at
        all.

        The file is numpy's ``.npz`` of plain arrays, without pickles.
        """
        arrays: dict[str, Any] = {
            "format": np.array([_FORMAT]),
            "root": np.frombuffer(self.root.encode(errors="surrogateescape"), np.uint8),
            "listed": np.array([self._listed]),
            "sizes": self.sizes,
            **self._names.arrays("names"),
            **(self._etags.arrays() if self._etags is not None else {}),
        }
        if isinstance(self.labels, PackedStrings):
            arrays |= self.labels.arrays("labels")
        elif self.labels is not None:
            arrays["labels"] = self.labels
        fs, path = _file(uri, storage_options, filesystem)
        where = fs.unstrip_protocol(path)
        with translated(where), publishing(fs, path, where, only_new=False) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(
        cls,
        uri: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> Manifest:
        """Read what :meth:`save` has written.

        Raises:
            InvalidManifest: It is another file, a damaged one, or that of another version.
        """
        fs, path = _file(uri, storage_options, filesystem)
        where = fs.unstrip_protocol(path)
        with translated(where):
            content = fs.cat_file(path)
        try:
            if not content.startswith(b"PK"):
                raise errors.InvalidManifest(_STRANGER, uri=where)
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if arrays["format"].tolist() != [_FORMAT]:
                raise errors.InvalidManifest(f"{_STRANGER}: its format is {arrays['format'].tolist()}", uri=where)
            labels = arrays.get("labels")
            loaded = cls(
                arrays["root"].tobytes().decode(errors="surrogateescape"),
                PackedStrings.of(arrays, "names"),
                arrays["sizes"],
                PackedETags.of(arrays) if "etag_parts" in arrays else None,
                PackedStrings.of(arrays, "labels") if "labels_text" in arrays else labels,
                listed=bool(arrays["listed"][0]),
            )
            if {len(loaded._names), len(loaded.sizes)} != {len(loaded if labels is None else labels)}:
                raise ValueError("its parts are of different lengths")
        except (ValueError, KeyError, EOFError, IndexError, AttributeError, zipfile.BadZipFile) as error:
            if isinstance(error, errors.S3Error):
                raise
            raise errors.InvalidManifest(f"{_STRANGER} ({error})", uri=where) from None
        return loaded

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, which: slice | Sequence[int] | NDArray[Any]) -> Manifest:
        indices = np.arange(len(self))[which if isinstance(which, slice) else np.asarray(which)]
        if indices.ndim != 1:
            raise TypeError("manifest[…] takes a slice, indices or a mask; manifest.uri(index) gives one uri")
        labels = self.labels
        if labels is not None:
            labels = labels.take(indices)
        names = self._names.take(indices)
        etags = None if self._etags is None else self._etags.take(indices)
        return Manifest(self.root, names, self.sizes[indices], etags, labels, listed=self._listed)

    def __iter__(self) -> Iterator[str]:
        """The uris, in order."""
        return (self.root + name for name in self._names)

    def __repr__(self) -> str:
        return f"Manifest({len(self):,} objects under {self.root})"

    def uri(self, index: int) -> str:
        """The uri of object ``index``."""
        return self.root + str(self._names[index])

    def read(self, index: int, fs: fsspec.AbstractFileSystem) -> Read:
        """What to read for object ``index``, in ``fs``."""
        size = int(self.sizes[index])
        etag = None if self._etags is None else self._etags[index]
        return Read(fs._strip_protocol(self.uri(index)), size if size >= 0 else None, etag)

    def known(self, fs: fsspec.AbstractFileSystem) -> Manifest:
        """The same with the size and ETag of every object: asked for where they are not known.

        Raises:
            NotFound, …: One can't be asked for.
        """
        unknown = np.flatnonzero(self.sizes < 0).tolist()
        if not unknown:
            return self

        def ask(index: int) -> tuple[int, str]:
            uri = self.uri(index)
            fresh = {"refresh": True} if isinstance(fs, S3FileSystem) else {}
            with translated(uri):
                found = fs.info(fs._strip_protocol(uri), **fresh)
            return int(found["size"]), (found.get("ETag") or "").strip('"')

        with ThreadPoolExecutor(_ASKING, thread_name_prefix="torch_s3-info") as pool:
            answers = dict(zip(unknown, pool.map(ask, unknown), strict=True))
        sizes = self.sizes.copy()
        sizes[unknown] = [size for size, _ in answers.values()]
        known = (self._etags[index] if self._etags is not None else None for index in range(len(self)))
        etags = StringsBuilder(answers[i][1] if i in answers else etag or "" for i, etag in enumerate(known))
        packed = PackedETags.pack(etags.packed())
        return Manifest(self.root, self._names, sizes, packed, self.labels, listed=self._listed)

    def folders(self) -> Iterator[str]:
        """The class folder of each object: the first one under a listed prefix, as in torchvision's ``ImageFolder``;
        for a list of uris, the one that the object lies in. "" where there is none.
        """
        for name in self._names:
            if self._listed:
                folder, _, rest = name.partition("/")
                yield folder if rest else ""
            else:
                yield (self.root + name).rpartition("/")[0].rpartition("/")[2]

    @property
    def fingerprint(self) -> str:
        """Says whether two are of the same data: a hash of names, sizes and ETags in their order, 32 hex digits.

        The root counts only where no sizes are known: a copy in another bucket is the same data.
        """
        if self._fingerprint is None:
            found = hashlib.blake2b(digest_size=16)
            if not (self.sizes >= 0).all():
                found.update(self.root.encode(errors="surrogateescape"))
            arrays = self._names.arrays("names") | {"sizes": self.sizes}
            arrays |= self._etags.arrays() if self._etags is not None else {}
            for name, values in sorted(arrays.items()):
                found.update(name.encode())
                found.update(values.nbytes.to_bytes(8, "little"))
                found.update(np.ascontiguousarray(values).view(np.uint8).data)
            self._fingerprint = found.hexdigest()
        return self._fingerprint


def _file(
    uri: str | os.PathLike[str], storage_options: Mapping[str, Any] | None, filesystem: fsspec.AbstractFileSystem | None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """As :func:`resolve`, and a path without scheme is one on disk."""
    uri = os.fspath(uri)
    if filesystem is None and "://" not in uri:
        uri = f"file://{Path(uri).absolute()}"
    return resolve(uri, storage_options=storage_options, filesystem=filesystem)


def _content(
    uri: str, storage_options: Mapping[str, Any] | None, filesystem: fsspec.AbstractFileSystem | None
) -> bytes:
    fs, path = _file(uri, storage_options, filesystem)
    with translated(fs.unstrip_protocol(path)):
        return bytes(fs.cat_file(path))
