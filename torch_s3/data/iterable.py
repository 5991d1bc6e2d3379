"""Any objects, streamed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from torch_s3.data.manifest import Manifest
from torch_s3.data.objects import S3Object, manifest_of, transformed
from torch_s3.data.resumable import Run
from torch_s3.data.stats import Row
from torch_s3.data.stream import Body, S3Stream


class S3IterableDataset(S3Stream):
    """Any objects, streamed from a bucket into a plain ``DataLoader``: audio, tensors, text, your own format.

    As :class:`~torch_s3.S3ImageDataset`, which see for order, ranks, resuming and errors; but what a sample is made of
    is an :class:`~torch_s3.S3Object`, with ``uri``, ``size``, ``read()`` and ``open()``.

    Args:
        source: ``s3://bucket/prefix/`` (or any uri that fsspec lists), a list of uris, or a :class:`Manifest`.
        transform: Called with the object; what it returns is the sample. ``None``: the object itself is.
        prefetch: Read objects whole, ahead of the transform. ``False``: it reads what it needs, by
            ``read(start, stop)`` or ``open()``; for objects of which that is little. What goes wrong is then raised in
            the transform, and not for ``on_error``.
        shuffle: As there, and so are all others.

    Yields:
        What ``transform`` returns.

    Raises:
        NotFound, EmptyDataset, AccessDenied, …: The source can't be listed, or has nothing for some rank; here, before
            training starts. While iterating, in any worker: what went wrong with an object, naming its uri.

    Attributes:
        manifest: What is read.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str] | Manifest,
        *,
        transform: Callable[[S3Object], Any] | None = None,
        prefetch: bool = True,
        shuffle: bool = False,
        seed: int = 0,
        batch_size: int | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        on_error: str = "raise",
        max_errors: float | None = None,
        lookahead: int | None = None,
        lookahead_bytes: int = 256 << 20,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        storage: dict[str, Any] = {"storage_options": storage_options, "filesystem": filesystem}
        self.transform = transform
        self._prefetch = prefetch
        super().__init__(
            manifest_of(source, **storage),
            shuffle=shuffle,
            seed=seed,
            batch_size=batch_size,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            on_error=on_error,
            max_errors=max_errors,
            lookahead=lookahead,
            lookahead_bytes=lookahead_bytes,
            cache_dir=cache_dir,
            cache_size=cache_size,
            **storage,
        )

    def _bodies(
        self, run: Run, fs: fsspec.AbstractFileSystem, indices: Iterable[NDArray[np.int64]], row: Row
    ) -> Iterator[Body]:
        if self._prefetch:
            return super()._bodies(run, fs, indices, row)
        return (None for _ in itertools.repeat(None))

    def _decode(self, index: int, body: Body) -> S3Object:
        fs = self._filesystem()
        read = self.manifest.read(index, fs)
        return S3Object(self.manifest.uri(index), fs, size=read.size, etag=read.etag, data=body)

    def _sample(self, index: int, decoded: Any) -> Any:
        return decoded if self.transform is None else transformed(self.transform, decoded, self.manifest.uri(index))
