"""What can go wrong, as types.

::

    S3Error                      anything this package raises about stored objects
    ├── InvalidUri               not a uri that can be used (ValueError)
    ├── NotFound                 no such bucket or key (FileNotFoundError)
    ├── AlreadyExists            something is there, and was not to be overwritten (FileExistsError)
    ├── AccessDenied             the credentials were refused (PermissionError)
    │   ├── NoCredentials        there are none to try
    │   └── CredentialsExpired   they were good once
    ├── Throttled                still told to slow down after the retries
    ├── TransferFailed           the connection or server failed, more often than retried (ConnectionError)
    │   └── DeadlineExceeded     nothing came in time (TimeoutError)
    ├── ObjectChanged            the ETag is not the one pinned
    ├── IntegrityError           wrong length, range or checksum
    ├── EmptyDataset             nothing to read under a prefix (ValueError)
    ├── CacheError               the folder for a local cache can't be used
    ├── DecodeError              the bytes are not an image that can be decoded (ValueError)
    ├── TooManyErrors            more objects failed than ``max_errors`` allows
    ├── InvalidManifest          the file is not a whole manifest of this version (ValueError)
    ├── StateMismatch            the state is not one of this dataset (ValueError)
    ├── ArtifactError            the bytes are not a whole archive, estimator or model of a known kind (ValueError)
    │   ├── ArtifactMismatch     it is whole, but hasn't the tensors that were asked for, or they don't fit
    │   └── UnsafeArtifact       it asks for types that are not trusted; ``asks_for`` lists them
    └── CheckpointError          the bytes are not a whole checkpoint (ValueError)
        ├── CheckpointMismatch   it is whole, but not of the keys, shapes or dtypes that it should be
        └── UnsafeCheckpoint     it asks for code that ``weights_only=True`` does not run
"""

from __future__ import annotations

import ast
import errno
import os
import re
from collections.abc import Iterable
from typing import Any

from torch_s3.paths import split_path

_IN_WORKER = re.compile(r"Caught \w+ in (DataLoader worker process \d+)\.\nOriginal ")  # a cause may have no traceback
_SUBJECT = re.compile(r"(?P<uri>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S+?)(?: bytes (?P<first>\d+)-(?P<last>\d+))?: ")
_MISSING = re.compile(r" is not authorized to perform: ([\w-]+:\w+)")
_ATTEMPT = re.compile(r" \(attempt (\d+) of \d+, [\d.]+ s\)$")


class S3Error(OSError):
    """An operation on a stored object failed.

    ``str(error)`` starts with the object it is about, so that a log line is enough to find it:
    ``s3://b/k bytes 0-8388607: connection reset (attempt 3 of 5, 12.4 s)``.

    ``errno`` and ``strerror`` are those of the nearest failure of a local file, where there is one, and ``filename`` is
    the uri, for those who look there.

    Errors survive pickling. One raised inside a DataLoader worker arrives in the main process with the same type,
    message and attributes, the worker named at the message's end, and the worker's own traceback in
    ``worker_traceback``.

    Args:
        message: What went wrong and what to do about it.
        uri: The object or bucket, as the user would write it.
        range: The bytes asked for, half-open ``(start, stop)``.
        attempts: How many times it was tried.
    """

    uri: str | None
    range: tuple[int, int] | None
    attempts: int | None
    worker_traceback: str | None = None
    _number: int | None = None  # the class's errno

    def __init__(
        self,
        message: str,
        *,
        uri: str | None = None,
        range: tuple[int, int] | None = None,
        attempts: int | None = None,
    ) -> None:
        uri = uri or None
        if worker := _IN_WORKER.match(message):
            # DataLoader rebuilds a worker's exception as type(text of its traceback); the message is in the last lines.
            start = message.rfind(f"\n{type(self).__module__}.{type(self).__qualname__}: ")
            if start >= 0:
                self.worker_traceback = message
                said = message[start:].partition(": ")[2].splitlines()[0]
                uri, range, attempts = _parse(said)
                message = f"{said} [{worker[1]}]"
        elif uri is not None:
            message = f"{_subject(uri, range)}: {' '.join(message.splitlines())}"
        super().__init__(message)
        self.uri, self.range, self.attempts = uri, range, attempts
        self._name_as_a_file()

    def _name_as_a_file(self) -> None:
        self.errno, self.filename = self._number, self.uri
        self.strerror = None if self._number is None else os.strerror(self._number)

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args[0], self.__dict__)

    @property
    def bucket(self) -> str | None:
        """The bucket's name, when the error is about an ``s3://`` uri."""
        return split_path(self.uri[5:])[0] if self.uri and self.uri.startswith("s3://") else None

    @property
    def key(self) -> str | None:
        """The object's key, when the error is about an ``s3://`` uri that has one."""
        return split_path(self.uri[5:])[1] or None if self.uri and self.uri.startswith("s3://") else None


class InvalidUri(S3Error, ValueError):
    """Not a uri that can be used; the message shows one that can."""

    _number = errno.EINVAL


class NotFound(S3Error, FileNotFoundError):
    """No such bucket or key."""

    _number = errno.ENOENT


class AlreadyExists(S3Error, FileExistsError):
    """Something is there already, and was not to be overwritten."""

    _number = errno.EEXIST


class AccessDenied(S3Error, PermissionError):
    """The credentials were refused."""

    _number = errno.EACCES

    @property
    def action(self) -> str | None:
        """The permission that was missing, such as ``s3:GetObject`` or ``kms:Decrypt``; ``None`` where S3 doesn't say.

        S3 does so in the body of its answer, to callers of the bucket's own organization (answers to HEAD have none).
        """
        subject = 0 if self.uri is None else len(_subject(self.uri, self.range))
        missing = _MISSING.search(str(self), subject)
        return missing[1] if missing else None


class NoCredentials(AccessDenied):
    """No credentials were found; the message lists where to put them."""


class CredentialsExpired(AccessDenied):
    """The credentials were good once; renew them."""


class Throttled(S3Error):
    """The server still said to slow down after the last retry."""

    _number = errno.EBUSY


class TransferFailed(S3Error, ConnectionError):
    """The connection or the server failed more often than the retries allow."""

    _number = errno.ECONNRESET


class DeadlineExceeded(TransferFailed, TimeoutError):
    """Nothing came in time."""

    _number = errno.ETIMEDOUT


class ObjectChanged(S3Error):
    """The object is not the one that was listed or opened: its ETag differs."""

    _number = errno.ESTALE


class IntegrityError(S3Error):
    """The answer is not what was asked for: wrong length, range or checksum. No byte of it was returned."""

    _number = errno.EIO


class EmptyDataset(S3Error, ValueError):
    """There is nothing to read."""


class CacheError(S3Error):
    """The folder for a local cache can't be used."""


class DecodeError(S3Error, ValueError):
    """The object's bytes are not an image that can be decoded."""


class TooManyErrors(S3Error):
    """More objects of an epoch could not be used than ``max_errors`` allows."""


class InvalidManifest(S3Error, ValueError):
    """The file is not a whole manifest of this version."""


class StateMismatch(S3Error, ValueError):
    """The state is not one that this dataset can go on from: of other data, order or version."""


class ArtifactError(S3Error, ValueError):
    """The object is not a whole archive, estimator or model of a kind that is known here."""


class ArtifactMismatch(ArtifactError):
    """The artifact is whole, but hasn't the tensors that were asked for, or they don't fit."""


class UnsafeArtifact(ArtifactError):
    """The artifact asks for types or functions that are not trusted: nothing of it was built.

    Args:
        message: As of all errors.
        asks_for: Their names.
        **where: As of all errors.
    """

    asks_for: tuple[str, ...] = ()

    def __init__(self, message: str, *, asks_for: Iterable[str] = (), **where: Any) -> None:
        super().__init__(message, **where)
        self.asks_for = tuple(asks_for)


class CheckpointError(S3Error, ValueError):
    """The object is not a whole checkpoint."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint is whole, but hasn't the keys, shapes or dtypes that were asked for."""


class UnsafeCheckpoint(CheckpointError):
    """The checkpoint asks for code that ``weights_only=True`` does not run."""


def _subject(uri: str, range: tuple[int, int] | None) -> str:
    """The object as it stands in messages; quoted where a bare uri could be misread or break the line."""
    shown = uri if uri.isprintable() and not re.search(r"[\s'\"]|:$", uri) else repr(uri)
    return shown if range is None else f"{shown} bytes {range[0]}-{range[1] - 1}"


def _parse(said: str) -> tuple[str | None, tuple[int, int] | None, int | None]:
    """The attributes that a message was made from."""
    subject = _SUBJECT.match(said)
    if subject is None:
        return None, None, None
    attempt = _ATTEMPT.search(said, subject.end() - 1)
    uri = subject["uri"]
    return (
        ast.literal_eval(uri) if uri[0] in "'\"" else uri,
        (int(subject["first"]), int(subject["last"]) + 1) if subject["first"] else None,
        int(attempt[1]) if attempt else None,
    )


def _rebuild(cls: type[S3Error], message: str, state: dict[str, Any]) -> S3Error:
    error = cls(message)
    error.__dict__.update(state)
    error._name_as_a_file()
    return error
