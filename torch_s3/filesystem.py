"""S3FileSystem: fsspec over the transport."""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import fsspec
from fsspec.compression import compr
from fsspec.config import apply_config
from fsspec.core import get_compression
from fsspec.utils import tokenize

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.copying import tagging
from torch_s3.metadata import Metadata, kept
from torch_s3.reader import BlockFile, S3Reader, flat
from torch_s3.transport.answer import bare_etag
from torch_s3.transport.batch import Fetch
from torch_s3.transport.client import Client
from torch_s3.transport.transfer import Transfer
from torch_s3.upkeep import Upkeep
from torch_s3.upload import S3TextWriter, S3Writer
from torch_s3.writers import CompressingWriter, KnownWriter

_FSSPEC_OPTIONS = (
    "asynchronous",
    "loop",
    "skip_instance_cache",
    "use_listings_cache",
    "listings_expiry_time",
    "max_paths",
)


class _AwsEnvironment:
    """The settings that botocore takes from the environment, as they are now."""

    def __get__(self, instance: object, owner: type) -> list[tuple[str, str]]:
        return sorted(item for item in os.environ.items() if re.match("AWS_|.*_proxy$", item[0], re.IGNORECASE))


class _OnePerProcess(type(fsspec.AbstractFileSystem)):  # type: ignore[misc]  # fsspec has no types
    """fsspec's cache of instances, but for all threads: fsspec has one a thread of what isn't written for asyncio."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        options = apply_config(cls, dict(kwargs))
        token = tokenize(cls, os.getpid(), cls._environment, *args, **options)
        skip = options.get("skip_instance_cache")
        with cls._instantiation_lock:  # fsspec makes a new one after fork, and forgets the instances
            made = None if skip else cls._cache.get(token)
            if made is None:
                made = super().__call__(*args, **kwargs | {"skip_instance_cache": True})
                made._fs_token_ = token
            if not skip:
                cls._cache[token], cls._latest = made, token
        return made


class S3FileSystem(Upkeep, Metadata, metaclass=_OnePerProcess):
    """S3 as an fsspec filesystem, on torch_s3's transport.

    Safe to use from any thread and after ``fork``; pickles as its options, and is one and the same for equal options
    and environment in all threads of a process. A transaction is its thread's own. What a call returns is whole and of
    one version of the object, or it raises a typed :class:`~torch_s3.S3Error`.

    Args:
        version_aware: As in s3fs: a path may end in ``?versionId=…``, ``info`` tells the VersionId, and a file that
            was opened goes on being read although the object is overwritten.
        **storage_options: As in s3fs: ``key secret token profile anon endpoint_url client_kwargs use_ssl``, and
            ``use_listings_cache listings_expiry_time max_paths``; and every field of :class:`~torch_s3.S3Config`, such
            as ``region`` or ``max_connections``. What is left out comes from the environment and the shared AWS
            configuration.

    Raises:
        ValueError: An unknown option, named with the nearest known one.
    """

    protocol = ("s3", "s3a")
    root_marker = ""
    _environment = _AwsEnvironment()

    def __init__(self, *, version_aware: bool = False, **storage_options: Any) -> None:
        self._own = threading.local()
        super().__init__(**{name: storage_options[name] for name in _FSSPEC_OPTIONS if name in storage_options})
        settings = {name: value for name, value in storage_options.items() if name not in _FSSPEC_OPTIONS}
        self.config = S3Config.from_storage_options(settings)
        self.client = Client(self.config)
        self.version_aware = version_aware

    @property
    def _intrans(self) -> bool:
        """Whether this thread is in a transaction; fsspec sets it."""
        return getattr(self._own, "intrans", False)

    @_intrans.setter
    def _intrans(self, value: bool) -> None:
        self._own.intrans = value

    @property
    def _transaction(self) -> Any:
        """The one that this thread is in; fsspec sets it."""
        return getattr(self._own, "transaction", None)

    @_transaction.setter
    def _transaction(self, value: Any) -> None:
        self._own.transaction = value

    def stats(self) -> dict[str, Any]:
        """What this filesystem has done in this process: always counted, and cheap.

        Returns:
            ``requests`` (attempts), ``failed`` (given up), ``bytes_received`` and ``bytes_sent`` of objects,
            ``retries`` by cause (``connection timeout server throttle integrity credentials clock place``),
            ``throttles``, ``slow`` (GETs sent again because no answer came), ``connections`` made, and
            ``first_byte_ms``: percentiles of the time from a request to its answer, to 25 %; ``None`` before the first.
        """
        return self.client.stats()

    # ------------------------------------------------------------------ reading

    def read_into(self, path: str, start: int, buffer: Any) -> None:
        """Receive ``len(buffer)`` bytes from ``start`` into ``buffer`` itself, by parallel ranges.

        Args:
            path: The object.
            start: First byte.
            buffer: Writable, C-contiguous memory: ``bytearray``, ``memoryview``, numpy array, ``tensor.numpy()``.
                Filled in place; after an error its content is undefined, and nothing writes to it any more.

        Raises:
            IntegrityError: The object doesn't reach that far.
            ObjectChanged: It was overwritten meanwhile.
        """
        if memoryview(buffer).readonly:
            raise TypeError(f"read_into needs writable memory, this {type(buffer).__name__} is read-only")
        view = flat(buffer)
        bucket, key, version = self.locate(path)
        if view:
            with self.client.batch() as batch:
                batch.wait_whole(batch.get_into(bucket, key, start, view, version_id=version))

    def cat_file(
        self,
        path: str,
        start: int | None = None,
        end: int | None = None,
        version_id: str | None = None,
        **kwargs: Any,
    ) -> bytes:
        """The object's bytes, or those of ``[start, end)``, clipped and counted from the end as slices are.

        Args:
            path: The object.
            start: First byte.
            end: One past the last byte.
            version_id: The version to read; ``None`` for the latest.
        """
        content: bytes = self.cat_ranges([path], [start], [end], on_error="raise", version_id=version_id)[0]
        return content

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        version_id: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """The bytes of many ranges, in order, read concurrently; see :meth:`cat_file` for one range.

        Args:
            paths: The objects; the same one may occur often.
            starts: First byte of each, or one for all; ``None`` for 0.
            ends: One past the last byte of each, or one for all; ``None`` for the object's end.
            max_gap: Accepted for fsspec's sake.
            on_error: ``"return"`` puts the exception in the range's place, ``"raise"`` raises the first one.
            version_id: The version to read of all; ``None`` for the latest.
        """
        starts = [starts] * len(paths) if starts is None or isinstance(starts, int) else list(starts)
        ends = [ends] * len(paths) if ends is None or isinstance(ends, int) else list(ends)
        if not len(paths) == len(starts) == len(ends):
            raise ValueError(f"{len(paths)} paths, {len(starts)} starts and {len(ends)} ends: give as many of each")
        results: list[Any] = []

        def take(fetch: Fetch | errors.S3Error | None) -> None:
            outcome = fetch.outcome() if isinstance(fetch, Fetch) else fetch or b""
            if on_error == "raise" and isinstance(outcome, errors.S3Error):
                raise outcome
            results.append(outcome if isinstance(outcome, errors.S3Error) else bytes(outcome))

        with self.client.batch() as batch:
            flying: deque[Fetch | errors.S3Error | None] = deque()
            for path, start, end in zip(paths, starts, ends, strict=True):
                first, stop = start or 0, end
                try:
                    bucket, key, version = self.locate(path)
                    version, etag = version_id or version, None
                    if first < 0 or (stop or 0) < 0:
                        info = self._object(path, version_id=version)
                        first, stop, _ = slice(start, end).indices(info["size"])
                        etag = info["ETag"]
                    empty = stop is not None and stop <= first
                    which = {"start": first, "stop": stop, "etag": etag, "version_id": version}
                    flying.append(None if empty else batch.fetch(bucket, key, **which))
                except errors.S3Error as error:
                    flying.append(error)
                if len(flying) % 8 == 0:
                    batch.start()
                if len(flying) > 2 * self.config.max_connections:  # not all at once: each holds its memory twice
                    take(flying.popleft())
            for fetch in flying:
                take(fetch)
        return results

    def cat(self, path: Any, recursive: bool = False, on_error: str = "raise", **kwargs: Any) -> Any:
        """The bytes of one object, or ``{path: bytes}`` of several (a list, a glob, a prefix), read concurrently.

        Args:
            path: Object, list of objects, or pattern.
            recursive: Read all objects under ``path``.
            on_error: ``"raise"``, ``"omit"`` or ``"return"`` the exception in the value's place.
            **kwargs: ``start``, ``end`` and ``version_id``, as in :meth:`cat_file`.
        """
        given = [self._whole(name) for name in (path if isinstance(path, list) else [path])]
        which = {"starts": kwargs.get("start"), "ends": kwargs.get("end"), "version_id": kwargs.get("version_id")}
        one = not isinstance(path, list) and not recursive
        if one and (not self._is_pattern(given[0]) or self._is_one(given[0])):
            return self.cat_ranges(given, on_error="raise", **which)[0]
        paths: list[str] = []
        for name in given:
            if recursive or (self._is_pattern(name) and not self._is_one(name)):
                matches = self.expand(name, recursive, refresh=True)
                paths += [found for found, info in sorted(matches.items()) if info and info["type"] == "file"]
            else:
                paths.append(name)
        if not paths:
            raise errors.NotFound("nothing is there", uri=f"s3://{given[0] if given else ''}")
        contents = self.cat_ranges(paths, on_error="raise" if on_error == "raise" else "return", **which)
        pairs = zip(paths, contents, strict=True)
        return {name: content for name, content in pairs if on_error != "omit" or isinstance(content, bytes)}

    # ------------------------------------------------------------------ writing

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        """A file object: ``rb r`` read, ``wb w`` write, ``xb x`` write a new object only, ``ab a`` write after what is
        there, which S3 has written anew for it, with its metadata, storage class and tags.

        Read files are seekable and read one version. A written object appears whole when its file is closed cleanly; an
        exception in the ``with`` block or garbage collection leaves what was there before. In a transaction
        (``with fs.transaction:``) all appear at its end, and none after an exception.

        Args:
            path: The object.
            mode: See above.
            **kwargs: ``compression`` (fsspec's names, or ``"infer"``); ``encoding errors newline`` of text;
                ``version_id`` to read; ``expected``, about how many bytes will be written, for the size of parts.

        Raises:
            ObjectChanged: At the end of ``ab``, where somebody else has overwritten the object meanwhile.
        """
        if unknown := [name for name in kwargs if name[:1].isupper()]:
            raise TypeError(f"s3://{path}: {unknown[0]} is not an option of open; see S3Config for encryption")
        if "b" not in mode:
            settings = {name: kwargs.pop(name) for name in ("encoding", "errors", "newline") if name in kwargs}
            inner = self.open(path, mode.replace("t", "") + "b", **kwargs)
            return io.TextIOWrapper(inner, **settings) if "r" in mode else S3TextWriter(inner, **settings)
        compression = get_compression(self._strip_protocol(path), kwargs.pop("compression", None))
        autocommit = kwargs.pop("autocommit", not self._intrans)
        file: Any = self._open(path, mode, autocommit=autocommit, **kwargs)
        if "r" in mode:
            return file if compression is None else compr[compression](file, mode="r")
        if not autocommit:
            self.transaction.files.append(file)
        return file if compression is None else CompressingWriter(file, compression)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Any = None,
        version_id: str | None = None,
        cache_type: str | None = None,
        expected: int = 0,
        **kwargs: Any,
    ) -> S3Reader | S3Writer | BlockFile:
        if mode == "rb":
            bucket, key, version = self.locate(path)
            info = self._object(path, version_id=version_id)
            version = version_id or version or info.get("VersionId")
            which = {"size": info["size"], "etag": info["ETag"], "version_id": version}
            reader = S3Reader(self.client, bucket, key, fs=self, **which)
            # fsspec's blockcache asks for "none": it brings a cache of its own.
            return BlockFile(reader, block_size, cache_options) if cache_type == "none" else reader
        bucket, key = self.bucket_and_key(path)
        if mode not in ("wb", "xb", "ab"):
            raise ValueError(f"mode {mode!r}: an object is read ('rb'), written whole ('wb', 'xb'), or added to ('ab')")
        if mode == "xb":
            self.check_new(path)
        settings: dict[str, Any] = {"autocommit": autocommit, "done": self._changed, "expected": expected}
        if mode == "ab":
            with contextlib.suppress(errors.NotFound):
                return self._appending(bucket, key, self._head(bucket, key, None), settings)
        return KnownWriter(self.client, bucket, key, mode=mode, **settings)

    def _appending(self, bucket: str, key: str, head: dict[str, Any], settings: dict[str, Any]) -> S3Writer:
        """A writer of an object anew, with all that it has by now."""
        etag = bare_etag(head["ETag"]) if "ETag" in head else None
        same = kept(head) | tagging(self.client, {"Bucket": bucket, "Key": key}, head)
        writer = KnownWriter(self.client, bucket, key, mode="ab", replaces=etag, same=same, **settings)
        old = S3Reader(self.client, bucket, key, size=head["ContentLength"], etag=etag)
        with writer.dropped_on_error(), old:
            while chunk := old.read(self.config.part_size):
                writer.write(chunk)
        return writer

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **kwargs: Any) -> None:
        """Write ``value`` as the object; ``mode="create"`` only where there is none.

        Raises:
            AlreadyExists: With ``"create"``, where there is one.
        """
        with self.open(path, "xb" if mode == "create" else "wb") as file:
            file.write(value)

    def pipe(self, path: str | dict[str, Any], value: Any = None, **kwargs: Any) -> None:
        """Write one object, or all of ``{path: value}``, concurrently."""
        values = path if isinstance(path, dict) else {path: value}
        try:
            with self.client.batch() as batch:
                flying: deque[Transfer] = deque()
                for name, content in values.items():
                    view = flat(content)
                    if self._intrans or len(view) > self.config.part_size:
                        self.pipe_file(name, view, **kwargs)
                        continue
                    if kwargs.get("mode") == "create":
                        self.check_new(name)
                    flying.append(batch.put(*self.bucket_and_key(name), view, only_new=kwargs.get("mode") == "create"))
                    batch.start()
                    if len(flying) > self.config.max_connections:
                        batch.wait(flying.popleft())
                batch.wait(*flying)
        finally:
            for name in values:
                self._changed(self._strip_protocol(name))

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:
        """Write an empty object; with ``truncate=False``, only where there is none.

        Raises:
            AlreadyExists: With ``truncate=False``, where there is one: S3 cannot change its date.
        """
        self.pipe_file(path, b"", mode="overwrite" if truncate else "create")


def register() -> None:
    """Make ``s3://`` and ``s3a://`` mean :class:`S3FileSystem` to fsspec in this process.

    And so to what opens uris by it: ``fsspec.open``, pandas, pyarrow, zarr, dask. Nothing does so by merely importing
    the package.
    """
    for name in S3FileSystem.protocol:
        fsspec.register_implementation(name, S3FileSystem, clobber=True)
