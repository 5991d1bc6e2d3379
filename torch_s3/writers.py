"""What S3FileSystem opens for writing: writers that it hears of, and that a ``with`` block of others can't publish."""

from __future__ import annotations

import inspect
import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from fsspec.compression import compr

from torch_s3.transport.client import Client
from torch_s3.upload import S3Writer

log = logging.getLogger("torch_s3")


class KnownWriter(S3Writer):
    """An :class:`S3Writer` that tells when it may have published.

    Args:
        client: Whose transport is used.
        bucket: The object's bucket.
        key: The object's key.
        done: Called with ``bucket/key``.
        **settings: See :class:`S3Writer`.
    """

    def __init__(self, client: Client, bucket: str, key: str, *, done: Callable[[str], None], **settings: Any) -> None:
        super().__init__(client, bucket, key, **settings)
        self._done = done
        self._handling = sys.exception()

    def close(self) -> None:
        """Publish the object, unless an exception closes it; does nothing the second time."""
        handling, self._handling = self._handling, None
        if (error := sys.exception()) is not None and error is not handling and _leaves_a_block(error):
            log.warning("%s is dropped, for an exception closes it: %r", self.name, error)
            self.discard()
        super().close()

    def commit(self) -> None:
        """Publish what was written as the object."""
        try:
            super().commit()
        finally:
            self._done(f"{self._bucket}/{self._key}")

    @contextmanager
    def dropped_on_error(self) -> Iterator[None]:
        """Discard when the block fails."""
        try:
            yield
        except BaseException:
            self.discard()
            raise


def _leaves_a_block(error: BaseException) -> bool:
    """Whether the ``__exit__`` that is running was called for ``error``.

    ``fsspec.open`` and pandas close their files in ``__exit__`` without a word of why.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "__exit__":
        frame = frame.f_back
    given = frame.f_locals.values() if frame is not None else ()
    return any(error is one for each in given for one in (each if isinstance(each, tuple) else (each,)))


class CompressingWriter(io.BufferedIOBase):
    """Compresses into an :class:`S3Writer`, with its promise: an exception or garbage collection publishes nothing.

    Args:
        file: Where to; closed with this.
        compression: fsspec's name for it, such as ``"gzip"``.
    """

    def __init__(self, file: S3Writer, compression: str) -> None:
        self._file = file
        self._compressor = compr[compression](file, mode="w")

    def writable(self) -> bool:
        """Always true."""
        return True

    def write(self, data: Any, /) -> int:
        """Take ``data``."""
        self._checkClosed()  # io's own, in every io class
        return self._compressor.write(data)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Publish the object; does nothing the second time."""
        if self.closed:
            return
        try:
            self._compressor.close()
            self._file.close()
        except BaseException:
            self._file.discard()
            raise
        finally:
            super().close()

    def discard(self) -> None:
        """Drop what was written."""
        self._file.discard()
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        """Never publishes."""
        with suppress(AttributeError):  # it was not even opened
            self._file.discard()
