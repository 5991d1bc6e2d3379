"""Tar shards of samples, as WebDataset has them, streamed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fsspec

from torch_s3.data import index_file, tar, tar_decode
from torch_s3.data.shards import Shards, Source

_NAMES = re.compile(r"\.(tar|tar\.gz|tgz|tar\.zst)$")


class S3TarDataset(Shards):
    """Tar shards as WebDataset has them, streamed from a bucket into a plain ``DataLoader``.

    Members that follow each other, and whose names are alike up to the first dot of the file name, are a sample:
    ``0001.jpg`` and ``0001.cls`` become ``{"__key__": "0001", "__url__": …, "jpg": …, "cls": …}``. For order, index and
    what may go wrong, see :class:`~torch_s3.S3TFRecordDataset`, whose other arguments these are too.

    Args:
        source: A uri with braces, ``s3://bucket/train-{000000..000127}.tar``; that of one shard, or of a prefix, under
            which are taken the names that end in ``.tar``, ``.tar.gz``, ``.tgz`` or ``.tar.zst``; a list of uris; or a
            :class:`~torch_s3.Manifest`.
        decode: ``True`` or ``"rgb"``: by extension: images → uint8 tensors (3, H, W), ``cls`` → int, ``txt`` → str,
            ``json npy npz pt`` → what they hold, others stay ``bytes``. ``"l"``: images are gray, ``"pil"``: they are
            Pillow's. ``False``: all are ``bytes``. A mapping from extensions to callables of bytes says more, and a
            callable is given the sample of bytes. Pickles are refused, unless a mapping has a callable for them.
        transform: Called with what was decoded; what it returns is the sample.
        shuffle: As there, and so are all others.

    Yields:
        A dict, or what ``transform`` makes of it.

    Raises:
        DecodeError: A member is not what its extension says.
        IntegrityError: A shard is damaged, or has members that are no files.

    Attributes:
        manifest: The shards.
    """

    kind = "tar"

    def __init__(
        self,
        source: Source,
        *,
        decode: Any = True,
        transform: Callable[[Any], Any] | None = None,
        shuffle: bool = False,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        batch_size: int | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        on_error: str = "raise",
        max_errors: float | None = None,
        lookahead_bytes: int = 96 << 20,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | None = None,
        decode_threads: int | None = None,
        index_dir: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        tar_decode.check(decode)
        self._how = decode
        super().__init__(
            source,
            names=_NAMES,
            transform=transform,
            shuffle=shuffle,
            shuffle_buffer=shuffle_buffer,
            seed=seed,
            batch_size=batch_size,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            on_error=on_error,
            max_errors=max_errors,
            lookahead_bytes=lookahead_bytes,
            cache_dir=cache_dir,
            cache_size=cache_size,
            decode_threads=decode_threads if decode is not False else 1,
            index_dir=index_dir,
            storage_options=storage_options,
            filesystem=filesystem,
        )

    def scan(self, uri: str) -> tar.TarScan:
        """What finds the samples of a shard."""
        return tar.TarScan(uri)

    def _text(self, shard: int, records: Iterator[memoryview]) -> str:
        uri, bounds = self.manifest.uri(shard), self._index.of(shard)
        samples = []
        for number, (start, data) in enumerate(zip(bounds.tolist(), records, strict=False)):
            members = [found for found in tar.members(data, uri, number, start) if tar.split(found.name) is not None]
            samples.append([each._replace(head=each.head + start, start=each.start + start) for each in members])
        return index_file.text(bounds, self.kind, samples)

    def _value(self, data: memoryview, uri: str, number: int, offset: int) -> Any:
        return tar.decode(tar.sample(data, uri, number, offset), self._how)
