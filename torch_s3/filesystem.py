"""S3FileSystem: fsspec over the transport."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import fsspec
from fsspec.core import has_magic

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.files import S3Reader, S3TextWriter, S3Writer, flat
from torch_s3.transport.answer import bare_etag
from torch_s3.transport.batch import Fetch
from torch_s3.transport.client import Client
from torch_s3.transport.transfer import Transfer

_FSSPEC_OPTIONS = (
    "asynchronous",
    "loop",
    "skip_instance_cache",
    "use_listings_cache",
    "listings_expiry_time",
    "max_paths",
)
_DELETE_LIMIT = 1000  # keys in one DeleteObjects request
_COPY_LIMIT = 5 * 1024**3  # bytes that one CopyObject request copies


class _AwsEnvironment:
    """The settings that botocore takes from the environment, as they are now."""

    def __get__(self, instance: object, owner: type) -> list[tuple[str, str]]:
        return sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))


class S3FileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """S3 as an fsspec filesystem, on torch_s3's transport.

    Safe to use from any thread and after ``fork``; pickles as its options. What a call returns is whole and of one
    version of the object, or it raises a typed :class:`~torch_s3.S3Error`.

    Args:
        **storage_options: As in s3fs: ``key secret token profile anon endpoint_url client_kwargs use_ssl``; and every
            field of :class:`~torch_s3.S3Config`, such as ``region`` or ``max_connections``. What is left out comes from
            the environment and the shared AWS configuration.

    Raises:
        ValueError: An unknown option, named with the nearest known one.
    """

    protocol = ("s3", "s3a")
    root_marker = ""
    _environment = _AwsEnvironment()
    _extra_tokenize_attributes = ("_environment",)  # fsspec: one instance for equal options in an equal environment

    def __init__(self, **storage_options: Any) -> None:
        super().__init__(**{name: storage_options[name] for name in _FSSPEC_OPTIONS if name in storage_options})
        settings = {name: value for name, value in storage_options.items() if name not in _FSSPEC_OPTIONS}
        self.config = S3Config.from_storage_options(settings)
        self.client = Client(self.config)

    def stats(self) -> dict[str, Any]:
        """What this filesystem has done in this process: always counted, and cheap.

        Returns:
            ``requests`` (attempts), ``failed`` (given up), ``bytes_received`` and ``bytes_sent`` of objects,
            ``retries`` by cause (``connection timeout server throttle integrity credentials clock place``),
            ``throttles``, ``slow`` (GETs sent again because no answer came), ``connections`` made, and
            ``first_byte_ms``: percentiles of the time from a request to its answer, to 25 %; ``None`` before the first.
        """
        return self.client.stats()

    # ------------------------------------------------------------------ what is there

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size (bytes), type (``"file"`` or ``"directory"``), ETag (unquoted) and LastModified of an object or
        prefix.

        Raises:
            NotFound: There is neither an object nor anything under it as a prefix.
        """
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        if not key:
            if bucket:
                self.client.call("head_bucket", f"s3://{bucket}", Bucket=bucket)
            return _directory(path)
        try:
            head = self.client.call("head_object", f"s3://{path}", Bucket=bucket, Key=key)
        except errors.NotFound:
            below = self.client.call("list_objects_v2", f"s3://{path}", Bucket=bucket, Prefix=f"{key}/", MaxKeys=1)
            if below.get("KeyCount") or below.get("Contents"):
                return _directory(path)
            raise
        return _file(path, head["ContentLength"], head)

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether there is such an object, prefix or bucket. Raises where S3 doesn't tell, e.g. ``AccessDenied``."""
        try:
            self.info(path)
        except errors.NotFound:
            return False
        return True

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """What lies directly under a prefix, sorted by name: dicts as from :meth:`info`, or names.

        Raises:
            NotFound: Nothing is there.
        """
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        if not bucket:
            found = [_directory(entry["Name"]) for entry in self.client.call("list_buckets", "s3://")["Buckets"]]
        else:
            found = []
            for page in self._pages(bucket, f"{key}/" if key else "", Delimiter="/"):
                found += [
                    _directory(f"{bucket}/{entry['Prefix'].rstrip('/')}") for entry in page.get("CommonPrefixes", ())
                ]
                found += _files(bucket, page)
            if not found and key:
                found = [self.info(path)]
                if found[0]["type"] == "directory":
                    return []  # just a directory marker
        found.sort(key=lambda entry: str(entry["name"]))
        return found if detail else [entry["name"] for entry in found]

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> list[str] | dict[str, dict[str, Any]]:
        """All objects under a prefix, in one flat listing; the object itself where ``path`` is one."""
        if maxdepth is not None or withdirs:
            return super().find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail, **kwargs)  # type: ignore[no-any-return]
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        found: dict[str, dict[str, Any]] = {}
        for page in self._pages(bucket, f"{key}/" if key else ""):
            found.update((entry["name"], entry) for entry in _files(bucket, page))
        if not found and key:
            with contextlib.suppress(errors.NotFound):
                entry = self.info(path)
                if entry["type"] == "file":
                    found[path] = entry
        names = sorted(found)
        return {name: found[name] for name in names} if detail else names

    def expand_path(self, path: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> list[str]:
        """The names that a name, pattern or list of them stands for.

        Raises:
            NotFound: It stands for none.
        """
        try:
            return super().expand_path(path, recursive=recursive, maxdepth=maxdepth, **kwargs)  # type: ignore[no-any-return]
        except errors.S3Error:
            raise
        except FileNotFoundError:
            raise errors.NotFound("nothing is there", uri=f"s3://{self._strip_protocol(path)}") from None

    def modified(self, path: str) -> Any:
        """When the object was last written, as an aware datetime."""
        return self.info(path)["LastModified"]

    def _pages(self, bucket: str, prefix: str, **parameters: Any) -> Iterable[dict[str, Any]]:
        return self.client.pages(
            "list_objects_v2", f"s3://{bucket}/{prefix}", Bucket=bucket, Prefix=prefix, **parameters
        )

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
        bucket, key = self.bucket_and_key(path)
        if view:
            with self.client.batch() as batch:
                batch.wait_whole(batch.get_into(bucket, key, start, view))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """The object's bytes, or those of ``[start, end)``, clipped and counted from the end as slices are."""
        content: bytes = self.cat_ranges([path], [start], [end], on_error="raise")[0]
        return content

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[Any]:
        """The bytes of many ranges, in order, read concurrently; see :meth:`cat_file` for one range.

        Args:
            paths: The objects; the same one may occur often.
            starts: First byte of each, or one for all; ``None`` for 0.
            ends: One past the last byte of each, or one for all; ``None`` for the object's end.
            max_gap: Accepted for fsspec's sake.
            on_error: ``"return"`` puts the exception in the range's place, ``"raise"`` raises the first one.
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
                    bucket, key = self.bucket_and_key(path)
                    if first < 0 or (stop or 0) < 0:
                        first, stop, _ = slice(start, end).indices(self.info(path)["size"])
                    empty = stop is not None and stop <= first
                    flying.append(None if empty else batch.fetch(bucket, key, start=first, stop=stop))
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
        """
        given = [self._strip_protocol(name) for name in (path if isinstance(path, list) else [path])]
        if not isinstance(path, list) and not recursive and not has_magic(given[0]):
            return self.cat_file(given[0])
        paths: list[str] = []
        for name in given:
            if recursive:
                paths += [found for start in self.expand_path(name) for found in self.find(start)]
            elif has_magic(name):
                paths += [found for found, entry in self.glob(name, detail=True).items() if entry["type"] == "file"]
            else:
                paths.append(name)
        if not paths:
            raise errors.NotFound("nothing is there", uri=f"s3://{given[0] if given else ''}")
        contents = self.cat_ranges(paths, None, None, on_error="raise" if on_error == "raise" else "return")
        pairs = zip(paths, contents, strict=True)
        return {name: content for name, content in pairs if on_error != "omit" or isinstance(content, bytes)}

    # ------------------------------------------------------------------ writing

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        """A file object: ``rb r`` read, ``wb w`` write, ``xb x`` write a new object only.

        Read files are seekable and read one version. A written object appears whole when its file is closed cleanly; an
        exception in the ``with`` block or garbage collection leaves what was there before.
        """
        if "r" not in mode and kwargs.get("compression") is not None:
            # fsspec's compressors don't close the file below them, so that it would never be published.
            raise ValueError(
                f"s3://{path}: to write compressed data, open it with fsspec.open, or wrap the file yourself"
            )
        if "b" not in mode and "r" not in mode:
            settings = {name: kwargs.pop(name) for name in ("encoding", "errors", "newline") if name in kwargs}
            return S3TextWriter(self.open(path, mode.replace("t", "") + "b", **kwargs), **settings)
        return super().open(path, mode, **kwargs)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Any = None,
        **kwargs: Any,
    ) -> S3Reader | S3Writer:
        bucket, key = self.bucket_and_key(path)
        if mode == "rb":
            info = self.info(path)
            if info["type"] != "file":
                raise errors.NotFound("this is a prefix, not an object", uri=f"s3://{path}")
            return S3Reader(self.client, bucket, key, size=info["size"], etag=info["ETag"])
        if mode not in ("wb", "xb"):
            raise ValueError(f"mode {mode!r}: an object is read ('rb') or written whole ('wb', or 'xb' for a new one)")
        return S3Writer(self.client, bucket, key, only_new=mode == "xb", autocommit=autocommit)

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
        with self.client.batch() as batch:
            flying: deque[Transfer] = deque()
            for name, content in values.items():
                view = flat(content)
                if len(view) > self.config.part_size:
                    self.pipe_file(name, view, **kwargs)
                    continue
                flying.append(batch.put(*self.bucket_and_key(name), view, only_new=kwargs.get("mode") == "create"))
                batch.start()
                if len(flying) > self.config.max_connections:
                    batch.wait(flying.popleft())
            batch.wait(*flying)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy an object within S3, without moving its bytes through this machine."""
        source, target = self.bucket_and_key(path1), self.bucket_and_key(path2)
        uri = f"s3://{'/'.join(target)}"
        where = {"CopySource": {"Bucket": source[0], "Key": source[1]}, "Bucket": target[0], "Key": target[1]}
        small = self.info(path1)["size"] <= _COPY_LIMIT
        self.client.call("copy_object" if small else "copy", uri, **where)

    def rm_file(self, path: str) -> None:
        """Delete an object.

        Raises:
            NotFound: There is none.
        """
        bucket, key = self.bucket_and_key(path)
        self.info(path)
        self.client.call("delete_object", f"s3://{bucket}/{key}", Bucket=bucket, Key=key)

    def rm(self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        """Delete objects, a thousand a request; with ``recursive``, everything under a prefix.

        Raises:
            NotFound: Nothing is there.
            AccessDenied: Some could not be deleted; the message names the first one.
        """
        by_bucket: dict[str, list[str]] = {}
        given = {self._strip_protocol(name) for name in (path if isinstance(path, list) else [path])}
        everything = recursive and maxdepth is None  # directory markers too, which find() doesn't show
        for name in self.expand_path(path, recursive=recursive and not everything, maxdepth=maxdepth):
            bucket, key = _split(name)
            keys = [key] if key else []
            if everything:
                pages = self._pages(bucket, f"{key}/" if key else "")
                keys += [entry["Key"] for page in pages for entry in page.get("Contents", ())]
            # Deleting what isn't there is no error in S3, but it is a mistake here.
            if keys == [key] and name in given and self.info(name)["type"] == "directory" and not recursive:
                raise errors.S3Error("this is a prefix: pass recursive=True to delete all under it", uri=f"s3://{name}")
            by_bucket.setdefault(bucket, []).extend(keys)
        for bucket, keys in by_bucket.items():
            for at in range(0, len(keys), _DELETE_LIMIT):
                some = [{"Key": key} for key in keys[at : at + _DELETE_LIMIT]]
                answer = self.client.call(
                    "delete_objects", f"s3://{bucket}", Bucket=bucket, Delete={"Objects": some, "Quiet": True}
                )
                for refused in answer.get("Errors", ()):
                    words = f"not deleted: {refused.get('Code')}: {refused.get('Message')}"
                    kind = errors.AccessDenied if refused.get("Code") == "AccessDenied" else errors.S3Error
                    raise kind(words, uri=f"s3://{bucket}/{refused.get('Key')}")

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Create a bucket. Prefixes need no creating."""
        bucket, key = _split(self._strip_protocol(path))
        if not key:
            region = self.client.region(f"s3://{bucket}")
            elsewhere = region != "us-east-1"
            place = {"CreateBucketConfiguration": {"LocationConstraint": region}} if elsewhere else {}
            self.client.call("create_bucket", f"s3://{bucket}", Bucket=bucket, **place)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a bucket; with ``exist_ok``, only where there is none."""
        if not (exist_ok and self.exists(_split(self._strip_protocol(path))[0])):
            self.mkdir(path)

    def rmdir(self, path: str) -> None:
        """Delete an empty bucket. Prefixes go with their last object."""
        bucket, key = _split(self._strip_protocol(path))
        if not key:
            self.client.call("delete_bucket", f"s3://{bucket}", Bucket=bucket)

    def bucket_and_key(self, path: str) -> tuple[str, str]:
        """The bucket and key of an object's path or uri.

        Raises:
            InvalidUri: It names no object.
        """
        path = self._strip_protocol(path)
        bucket, key = _split(path)
        if not bucket or not key:
            raise errors.InvalidUri("this names no object: write s3://bucket/key", uri=f"s3://{path}")
        if not key.isascii() and any("\ud800" <= character <= "\udfff" for character in key):
            raise errors.InvalidUri("S3's keys are UTF-8, which has no code for a lone surrogate", uri=f"s3://{path}")
        return bucket, key


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key


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


def _files(bucket: str, page: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of a page of a listing, without directory markers."""
    entries = (entry for entry in page.get("Contents", ()) if not (entry["Key"].endswith("/") and entry["Size"] == 0))
    return [_file(f"{bucket}/{entry['Key']}", entry["Size"], entry) for entry in entries]
