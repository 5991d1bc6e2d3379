"""Saving: torch.save, streamed, whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import fsspec
import torch

from torch_s3 import errors
from torch_s3.checkpoint.safetensors import build
from torch_s3.checkpoint.staging import Staging, storages_in
from torch_s3.publish import publishing, read_back
from torch_s3.uris import resolve, translated
from torch_s3.watched import WatchedFile

SAFETENSORS = ".safetensors"


class Timings(NamedTuple):
    """Where the time of a save went, in seconds of the thread that saved.

    Attributes:
        pickling: In torch.save: pickling, and its checksums.
        staging: Waiting for copies from GPUs.
        sending: Filling parts, with their checksums, and waiting until they are sent.
        verifying: Reading back.
    """

    pickling: float
    staging: float
    sending: float
    verifying: float


class Saved(NamedTuple):
    """What was saved.

    Attributes:
        uri: Where.
        bytes: Size of the object.
        etag: Its version, ``None`` where the filesystem has none.
        seconds: How long it took.
        checksum: Of all its bytes, as ``(algorithm, value in base64)``; ``None`` where none was computed.
        timings: What took how long.
    """

    uri: str
    bytes: int
    etag: str | None
    seconds: float
    checksum: tuple[str, str] | None
    timings: Timings


def save_checkpoint(
    obj: Any,
    uri: str | os.PathLike[str],
    *,
    overwrite: bool = True,
    metadata: Mapping[str, str] | None = None,
    progress: bool | Callable[[int, int], object] = False,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Saved:
    """Save ``obj`` as :func:`torch.save` does, streaming: parts are uploaded while it still writes, so memory is
    bounded. A uri that ends in ``.safetensors`` gets that format.

    The object appears whole when all of it is stored, or not at all: after any exception, what was there before is
    still there, and no upload stays open. It is then read back: its size, and on S3 its ETag and the checksum that S3
    keeps of all of it.

    Tensors on GPUs are copied through pinned memory, the next while one is sent. Beside them, at most 128 MiB are held
    of objects up to 600 GB; of larger ones, two of 9,000 parts.

    Args:
        obj: What torch.save takes: a state_dict, or a dict of several. For safetensors, a dict of tensors.
        uri: ``s3://bucket/key``, or a file of any filesystem that fsspec knows.
        overwrite: Whether an existing object may be replaced. On S3 the condition is part of the final request, so of
            two writers one wins; so it is with local files; elsewhere it depends on the filesystem.
        metadata: Strings by strings, kept in a safetensors file.
        progress: Show a progress bar; or what to call, in this thread, with the bytes written so far and those that
            there will be, as far as is known.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for the uri.

    Raises:
        AlreadyExists: With ``overwrite=False``, where there is something; before anything is pickled if it was there
            then.
        NotFound: No such bucket.
        IntegrityError: What is there is not what was sent.
        ObjectChanged: Somebody else has overwritten it at once.
        S3Error: It could not be stored.
        ValueError: safetensors has no place for something in ``obj``.
        Exception: What pickling ``obj`` raised.
    """
    began = time.perf_counter()
    if not isinstance(uri, (str, os.PathLike)):
        raise TypeError(f"the uri is a {type(uri).__name__}: save_checkpoint(what, uri)")
    uri = os.fspath(uri)
    fs, path = resolve(uri, storage_options=storage_options, filesystem=filesystem)
    if uri.endswith("/"):
        raise errors.InvalidUri("this names a folder: give the checkpoint a name in it", uri=uri)
    write, expected = _plan(obj, path, metadata)
    if not overwrite:
        # Who may write but not list is told nothing here; on S3 the condition of the last request decides.
        with suppress(FileNotFoundError, errors.AccessDenied), translated(uri):
            if fs.info(path, refresh=True)["type"] == "file":
                raise errors.AlreadyExists("there is something already, and overwrite=False", uri=uri)
    staging, name = Staging(), path.rpartition("/")[2]
    file_to_be = publishing(fs, path, uri, only_new=not overwrite, expected=expected)
    watching: dict[str, Any] = {"progress": progress, "description": f"saving {name}", "total": expected}
    with file_to_be as file, WatchedFile(file, **watching) as watched:
        try:
            write(watched, staging)
        except BaseException:
            if watched.error is not None:  # torch may have made another error of it
                with translated(uri):
                    raise watched.error from None
            raise
        written = time.perf_counter()
    published = time.perf_counter()
    stored = read_back(fs, path, uri, file, watched.bytes)
    ended = time.perf_counter()
    timings = Timings(
        pickling=written - began - watched.seconds - staging.seconds,
        staging=staging.seconds,
        sending=watched.seconds + published - written,
        verifying=ended - published,
    )
    return Saved(uri, watched.bytes, stored.etag, ended - began, stored.checksum, timings)


def _plan(
    obj: Any, path: str, metadata: Mapping[str, str] | None
) -> tuple[Callable[[WatchedFile, Staging], None], int]:
    """What writes ``obj``, and about how many bytes that will be.

    Raises:
        ValueError: The format has no place for something.
    """
    if path.endswith(SAFETENSORS):
        first, tensors, size = _tensor_file(obj, metadata)
        return partial(_write_tensors, first, tensors), size
    if metadata is not None:
        raise ValueError("metadata are kept in .safetensors files: put them into the object that is saved")
    storages = storages_in(obj)
    return partial(_write_object, obj, storages), sum(storage.nbytes() for storage in storages)


def _write_object(obj: Any, storages: list[torch.UntypedStorage], file: WatchedFile, staging: Staging) -> None:
    with staging.of_storages(storages):
        torch.save(obj, file)


def _tensor_file(obj: Any, metadata: Mapping[str, str] | None) -> tuple[bytes, list[torch.Tensor], int]:
    """The first bytes of a safetensors file, the tensors whose bytes follow, in order, and the size of it all."""
    if not isinstance(obj, Mapping):
        raise ValueError(f"safetensors keeps a dict of tensors by names, not {type(obj).__name__}: save as .pt")  # noqa: TRY004 one error for all that the format lacks
    for name, each in obj.items():
        if not isinstance(each, torch.Tensor):
            message = f"safetensors keeps tensors alone, and {name!r} is {type(each).__name__}: save as .pt"
            raise ValueError(message + (", or flatten it" if isinstance(each, Mapping) else ""))  # noqa: TRY004
        if each.layout is not torch.strided or each.is_quantized or each.device.type == "meta":
            kind = "quantized" if each.is_quantized else "on no device" if each.device.type == "meta" else "sparse"
            raise ValueError(f"safetensors keeps dense tensors, and {name!r} is {kind}: save as .pt")
    _check_apart(obj)
    first, placed = build({name: (each.dtype, each.shape) for name, each in obj.items()}, metadata)
    return first, [obj[each.name] for each in placed], placed[-1].stop if placed else len(first)


def _check_apart(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that share memory, as the safetensors package does: they would come back apart, and larger.

    Raises:
        ValueError: Two do.
    """
    spans = sorted(
        (each.untyped_storage()._cdata, start, stop, name)
        for name, each in tensors.items()
        for start, stop in [_span(each)]
        if start < stop
    )
    reached = (0, 0, "")  # storage, byte, name
    for storage, start, stop, name in spans:
        if storage == reached[0] and start < reached[1]:
            message = f"safetensors keeps no shared memory, and {reached[2]!r} and {name!r} share theirs"
            raise ValueError(f"{message}: save one of them, or a clone() of each, or as .pt")
        if storage != reached[0] or stop > reached[1]:
            reached = storage, stop, name


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0, 0
    first = tensor.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(first) * tensor.itemsize, (int(last) + 1) * tensor.itemsize


def _write_tensors(first: bytes, tensors: list[torch.Tensor], file: WatchedFile, staging: Staging) -> None:
    file.write(first)
    for tensor in tensors:
        if tensor.numel():
            for chunk in staging.chunks(tensor):
                file.write(chunk)
