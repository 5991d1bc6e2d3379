"""TFRecord shards, streamed, without TensorFlow."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fsspec

from torch_s3.data import index_file, tfrecord
from torch_s3.data.example import Features
from torch_s3.data.shards import Shards, Source

_NAMES = re.compile(r"(\.tfrecords?|\.tfrec|-\d+-of-\d+)(\.gz|\.zst)?$")


class S3TFRecordDataset(Shards):
    """TFRecord shards, streamed from a bucket into a plain ``DataLoader``. TensorFlow isn't needed.

    As :class:`~torch_s3.S3ImageDataset`, which see for ranks, resuming and errors; but each worker has a stretch of the
    epoch, so that it reads its own bytes, also of a single shard. With ``shuffle``, the shards are permuted, and then
    the records within each ``shuffle_buffer`` of them.

    Lengths and data are verified by their checksums. Where records lie is known before the first one is read: from
    index files, or from one pass over the shards; see ``index_dir`` and :meth:`write_index`.

    Args:
        source: A uri with braces, ``s3://bucket/train-{000..127}.tfrecord``; that of one shard, or of a prefix, under
            which are taken the names that end in ``.tfrecord``, ``.tfrecords``, ``.tfrec`` or ``-00000-of-00128``, each
            also with ``.gz`` or ``.zst``; a list of uris; or a :class:`~torch_s3.Manifest`.
        features: Name → :class:`~torch_s3.FixedFeature`, ``VarFeature`` or ``SequenceFeature``: records are
            ``tf.train.Example`` or ``SequenceExample``, of which these are decoded. ``None``: samples are ``bytes``.
        transform: Called with what was decoded; what it returns is the sample.
        shuffle: A new order each epoch.
        shuffle_buffer: Records that are permuted among each other. A worker holds as many in memory, encoded.
        seed: Of the shuffling.
        batch_size: That of the ``DataLoader``, for batches that don't depend on the workers, and for states.
        drop_last: Leave out what fills no batch of all ranks together.
        rank: Of this process, with ``world_size``; ``None``: as ``torch.distributed`` or the environment says.
        world_size: Number of ranks.
        on_error: What to do about a record that can't be used: ``"raise"``, ``"skip"`` or ``"replace"``. With the
            latter two, a shard that is cut off, or whose lengths are damaged, is read as far as it goes.
        max_errors: Fail when more records than this count, or share, of an epoch failed.
        lookahead_bytes: Most bytes on their way or read ahead per worker, beside the shuffle buffer.
        cache_dir: A local folder to keep what was read in, see :class:`~torch_s3.data.cache.Cache`.
        cache_size: The most bytes to keep there, ``None`` for as much as there is room for.
        decode_threads: Threads that decode in a worker; ``None``: two where there are no workers.
        index_dir: A folder or uri to keep indexes in for the next time, of shards that have none beside them.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Any fsspec filesystem to use instead.

    Yields:
        ``bytes``, or a dict of what ``features`` says; or what ``transform`` makes of it.

    Raises:
        NotFound, EmptyDataset, AccessDenied, CacheError, …: The shards can't be found, or have nothing for some rank.
        InvalidManifest: An index file beside a shard is that of another one.
        IntegrityError: A shard is damaged; names the shard, the record and its first byte. Here, and while iterating.

    Attributes:
        manifest: The shards.
    """

    kind = "tfrecord"

    def __init__(
        self,
        source: Source,
        *,
        features: Mapping[str, Any] | None = None,
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
        self._features = None if features is None else Features(features)
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
            decode_threads=decode_threads if features is not None else 1,  # bytes are no work for threads
            index_dir=index_dir,
            storage_options=storage_options,
            filesystem=filesystem,
        )

    def scan(self, uri: str) -> tfrecord.TFRecordScan:
        """What finds the records of a shard."""
        return tfrecord.TFRecordScan(uri)

    def _text(self, shard: int, records: Iterator[memoryview]) -> str:
        return index_file.text(self._index.of(shard), self.kind)

    def _value(self, data: memoryview, uri: str, number: int, offset: int) -> Any:
        found = tfrecord.record(data, uri, number, offset)
        return bytes(found) if self._features is None else self._features(found, uri, number)
