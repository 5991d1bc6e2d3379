"""Estimators: scikit-learn's and others', from and to .skops, .joblib and .pkl."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import fsspec

from torch_s3 import errors
from torch_s3.artifacts import pickles
from torch_s3.artifacts.archive import Artifact, Zip, is_tar, is_zip, reader_of, shown, tar_in
from torch_s3.artifacts.extras import needed
from torch_s3.artifacts.members import Caps
from torch_s3.artifacts.source import MAX_BYTES, MemoryFile, receive, resolve_object
from torch_s3.artifacts.trust import Trust
from torch_s3.artifacts.unpack import COMPRESSIONS, MAX_RATIO, Limits, compression, unpacked
from torch_s3.publish import Stored, publishing, read_back
from torch_s3.source import opened
from torch_s3.uris import resolve
from torch_s3.watched import WatchedFile
from torch_s3.wording import brief

_SUFFIXES = {".skops": "skops", ".joblib": "joblib", ".pkl": "pickle", ".pickle": "pickle"}
_FORMATS = ("skops", "joblib", "pickle")
_PACKED = (".gz", ".z", ".bz2", ".xz", ".lzma", ".lz4")  # that joblib appends
_TORCHS = ("/data.pkl", "/version")  # members of torch.save's files
_SCHEMA = "schema.json"  # of every .skops
_PROTOCOL = b"\x80"  # how pickles start


def load_estimator(
    uri: str,
    *,
    format: str | None = None,
    trusted: Iterable[str | type | ModuleType] = (),
    member: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_ratio: float = MAX_RATIO,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Any:
    """Load an estimator that skops, joblib, pickle or :func:`save_estimator` saved, or one in a ``model.tar.gz``.

    ``.skops`` runs no code, and knows most of scikit-learn's types by itself. A pickle, and joblib's file, which is
    one, can ask for anything: it is refused unless all of that is ``trusted``. What it asks for is listed in the
    refusal, and found without running or building anything of it. This is no sandbox: trust what you would install.

    Nothing is written to a disk. The object is received by parallel ranges into one piece of memory, in which the
    large arrays of joblib's files stay.

    Args:
        uri: ``s3://bucket/key``, or a file of any filesystem that fsspec knows.
        format: ``"skops"``, ``"joblib"`` or ``"pickle"``; ``None`` for what the name ends in, and the content agrees
            with. joblib's compression is known by its content.
        trusted: Names of types (``"sklearn.linear_model._base.LinearRegression"``), or of modules, which stand for the
            types that are defined in them and below (``"sklearn"``); or types. Functions, and all of Python's own
            library, only by their own full names. skops' own list comes on top of these for ``.skops``.
        member: Of an archive; ``None`` for the only one that may be an estimator.
        max_bytes: Most bytes of the object, and of what it unpacks to.
        max_ratio: Most bytes that may be unpacked from one.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for the uri.

    Returns:
        The estimator. scikit-learn's ``InconsistentVersionWarning`` names the uri.

    Raises:
        NotFound: There is no such object.
        UnsafeArtifact: It asks for what isn't trusted: ``asks_for`` lists that.
        ArtifactError: It is no whole estimator of a known format; or several are in the archive.
        IntegrityError: A member of a zip is damaged.
        ObjectChanged: It was overwritten while it was read.
        ImportError: A package is missing; the message says which extra brings it.
    """
    uri = os.fspath(uri)
    _check_known(format)
    fs, path = resolve_object(uri, storage_options=storage_options, filesystem=filesystem)
    trust, caps = Trust(trusted), Caps(member_bytes=max_bytes, bytes=max_bytes, ratio=max_ratio)
    with opened(fs, path, uri) as source:
        content = None if is_zip(source.head) else receive(source, max_bytes=max_bytes)
        file = reader_of(fs, path, source) if content is None else MemoryFile(content)
    del content
    with _warnings_that_name(uri), file:
        return _loaded(file, path, format, member, trust, caps, uri=uri)


def _loaded(file: Any, name: str, format: str | None, member: str | None, trust: Trust, caps: Caps, *, uri: str) -> Any:
    """What a file holds, of which a zip is at its start, and all others are in memory."""
    if not isinstance(file, MemoryFile) or is_zip(file.memory):
        archive: Artifact = Zip(file, caps, uri=uri)
        if _SCHEMA in archive:
            _check_format("skops", name, format, member, uri=uri)
            return _from_skops(file, archive, trust, caps, uri=uri)
    else:
        content = file.memory
        kind = None if is_tar(content) else compression(content, COMPRESSIONS)
        if kind is not None:
            content = unpacked(content, kind, Limits(caps.bytes, caps.ratio), what="it", uri=uri)
            file.close()  # which gives up what was packed
        if not is_tar(content):
            if len(content):  # or that is what to say
                _check_format("pickle" if bytes(content[:1]) == _PROTOCOL else "", name, format, member, uri=uri)
            return pickles.load(content, trust, uri=uri)
        archive = tar_in(content, caps, uri=uri)
        del content
    chosen = _chosen(archive, member, uri=uri)
    inner = archive.open(chosen)
    archive.close()
    return _loaded(inner, chosen, format, None, trust, caps, uri=f"{uri}#{chosen}")


def _chosen(archive: Artifact, member: str | None, *, uri: str) -> str:
    if member is not None:
        if (name := member.removeprefix("./")) in archive:  # as tar lists them
            return name
        raise errors.ArtifactError(f"it has no member {member!r}; it has {shown(archive)}", uri=uri)
    if all(any(name.endswith(part) for name in archive) for part in _TORCHS):
        raise errors.ArtifactError("it is a file of torch.save: torch_s3.load_checkpoint loads it", uri=uri)
    candidates = [name for name in archive if _format_of(name) and not name.rpartition("/")[2].startswith(".")]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise errors.ArtifactError(f"it has several estimators, choose one by member=: {shown(candidates)}", uri=uri)
    raise errors.ArtifactError(f"none of its members is named as an estimator is; it has {shown(archive)}", uri=uri)


def _format_of(name: str) -> str | None:
    name = name.lower()
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return next((format for suffix, format in _SUFFIXES.items() if name.endswith(suffix)), None)


def _check_known(format: str | None) -> None:
    if format is not None and format not in _FORMATS:
        raise ValueError(f"format={format!r}: use one of {', '.join(_FORMATS)}, or leave it out")


def _check_format(found: str, name: str, format: str | None, member: str | None, *, uri: str) -> None:
    """See that content, name and what the caller says agree: a pickle is nothing to take for a .skops."""
    if member is not None:
        raise errors.ArtifactError(f"member={member!r}, but it is no archive", uri=uri)
    said = format or _format_of(name)
    if said is not None and (said == "skops") != (found == "skops"):
        who = "format=" if format else "its name"
        what = f"a {found} file" if found else "no zip"
        raise errors.ArtifactError(f"it is {what}, and {who} says {said}", uri=uri)


# ---------------------------------------------------------------------- skops


def _from_skops(file: Any, archive: Artifact, trust: Trust, caps: Caps, *, uri: str) -> Any:
    skops = needed("skops.io", extra="sklearn", by=uri)
    untrusted_types = importlib.import_module("skops.io.exceptions").UntrustedTypesFoundException
    try:
        _check_files(archive, caps, packed=file.seek(0, os.SEEK_END), uri=uri)
        try:
            return skops.load(file, trusted=trust.names)
        except untrusted_types:
            unknown = set(skops.get_untrusted_types(file=file))
        asked = unknown - set(trust.names)
        allowed = {name for name in asked if trust.allows_type(name, uri=uri)}
        if asked - allowed:
            raise trust.refusal(asked - allowed, unknown | _types(archive), uri=uri)
        return skops.load(file, trusted=[*trust.names, *allowed])
    except (errors.S3Error, Warning):
        raise
    except MemoryError as error:  # too little, or an array that claims too much
        error.add_note(f"while loading {uri}")
        raise
    except zipfile.BadZipFile as error:
        raise errors.IntegrityError(f"damaged: {error}", uri=uri) from None
    except Exception as error:
        reason = brief(f"{type(error).__name__}: {error}", 300)
        raise errors.ArtifactError(
            f"damaged, or of another version: skops cannot load it ({reason})", uri=uri
        ) from error


def _types(archive: Artifact) -> set[str]:
    """The types that a .skops has, those that skops knows too."""
    found: set[str] = set()

    def note(node: dict[str, Any]) -> None:
        found.add(f"{node.get('__module__')}.{node.get('__class__')}")

    json.loads(archive[_SCHEMA], object_hook=note)
    return found


def _check_files(archive: Artifact, caps: Caps, *, packed: int, uri: str) -> None:
    """Add up the members that skops reads, once for each mention, and what is in the .npz files of sparse matrices.

    Raises:
        ArtifactError: It is more than what an object of ``packed`` bytes may hold.
    """
    files: list[tuple[str, bool]] = []

    def note(node: dict[str, Any]) -> None:
        if isinstance(node.get("file"), str):
            files.append((node["file"], node.get("__loader__") == "SparseMatrixNode"))

    json.loads(archive[_SCHEMA], object_hook=note)
    size = 0
    for (name, is_sparse), times in Counter(files).items():
        read = Zip(archive.open(name), Caps(), uri=f"{uri}#{name}") if is_sparse else archive
        size += times * sum(map(read.size, read if is_sparse else [name]))
        Limits(caps.bytes, caps.ratio).check(size, packed, what="what its arrays are in", uri=uri)


# ---------------------------------------------------------------------- warnings


@contextmanager
def _warnings_that_name(uri: str) -> Iterator[None]:
    """Have scikit-learn's warning of another version say which object it is about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for each in caught:
        message: Any = each.message
        if type(message).__name__ == "InconsistentVersionWarning":
            kind = type(message)
            named = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__str__": lambda self: self.said})
            said, message = f"{uri}: {message}", named(**vars(message))
            message.said = said
            warnings.warn(message, stacklevel=4)
        else:
            warnings.warn_explicit(message, each.category, each.filename, each.lineno)


# ---------------------------------------------------------------------- saving


def save_estimator(
    estimator: Any,
    uri: str,
    *,
    format: str | None = None,
    compress: Any = None,
    overwrite: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Stored:
    """Save an estimator as ``.skops`` (recommended: others can load it without trusting you), ``.joblib`` or ``.pkl``.

    The object appears whole, or not at all: after any exception, what was there before is still there. joblib and
    pickle are streamed: parts are uploaded while they still write. skops makes its file in memory first.

    Args:
        estimator: scikit-learn's, or another.
        uri: ``s3://bucket/key``, or a file of any filesystem that fsspec knows.
        format: ``"skops"``, ``"joblib"`` or ``"pickle"``; ``None`` for what the name ends in.
        compress: For joblib as in ``joblib.dump``: a level, a method, or both: ``3``, ``"lz4"``, ``("xz", 6)``. For
            skops a level from 1 to 9. Not for pickle.
        overwrite: Whether an existing object may be replaced.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for the uri.

    Returns:
        Its ETag and checksum, as they were read back.

    Raises:
        AlreadyExists: With ``overwrite=False``, where there is something.
        S3Error: It could not be stored.
        ImportError: A package is missing; the message says which extra brings it.
        Exception: What pickling it raised, and skops of types that it doesn't know.
    """
    uri = os.fspath(uri)
    _check_known(format)
    fs, path = resolve(uri, storage_options=storage_options, filesystem=filesystem)
    write = _writer(estimator, format or _format_of(path), compress, uri)
    with (
        publishing(fs, path, uri, only_new=not overwrite) as file,
        WatchedFile(file, progress=False, description="") as watched,
    ):
        write(watched)
    return read_back(fs, path, uri, file, watched.bytes)


def _writer(estimator: Any, format: str | None, compress: Any, uri: str) -> Callable[[Any], Any]:
    if format == "pickle":
        if compress is not None:
            raise ValueError("compress= is for .joblib and .skops")
        return lambda file: pickle.dump(estimator, file, protocol=pickle.HIGHEST_PROTOCOL)
    if format == "joblib":
        joblib = needed("joblib", extra="sklearn", by=uri)
        return lambda file: joblib.dump(estimator, file, compress=compress or 0)
    if format == "skops":
        if compress is not None and compress not in range(1, 10):
            raise ValueError(f"compress={compress!r}: skops takes a level from 1 to 9")
        method = zipfile.ZIP_STORED if compress is None else zipfile.ZIP_DEFLATED
        skops = needed("skops.io", extra="sklearn", by=uri)
        return lambda file: skops.dump(estimator, file, compression=method, compresslevel=compress)
    raise ValueError(f"{uri}: name it .skops, .joblib or .pkl, or say which by format=")
