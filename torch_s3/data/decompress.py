"""A compressed shard's bytes, as a stream that is read in order."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from zlib_ng import zlib_ng

from torch_s3 import errors

SUFFIXES = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
_BITES = {"gzip": 64 << 10, "zstd": 8 << 10}  # bytes decompressed at a time: of a bomb, they become 64 and 256 MiB
_GZIP = 31  # zlib's wbits: a gzip header, and the largest window


def compression(uri: str) -> str | None:
    """How a shard is compressed, by its name: ``"gzip"``, ``"zstd"`` or ``None``."""
    return next((kind for suffix, kind in SUFFIXES.items() if uri.endswith(suffix)), None)


def check_installed(uri: str) -> None:
    """Refuse a shard that can't be decompressed here.

    Raises:
        ImportError: zstandard is not installed.
    """
    if kind := compression(uri):
        _Stream(kind)


def decompressed(pieces: Iterable[Any], kind: str, uri: str) -> Iterator[memoryview]:
    """A shard's bytes, in pieces of some megabytes at most.

    Args:
        pieces: The file's bytes in order, or an error in place of some.
        kind: ``"gzip"``, of any number of members, or ``"zstd"``, of any number of frames.
        uri: The shard, for errors.

    Raises:
        IntegrityError: It is damaged or cut off.
        ImportError: zstandard is not installed.
        S3Error: The error among the pieces.
    """
    stream = _Stream(kind)
    fed, bite = 0, _BITES[kind]
    for piece in pieces:
        if isinstance(piece, errors.S3Error):
            raise piece
        view = memoryview(piece)
        for start in range(0, len(view), bite):
            try:
                for some in stream.feed(view[start : start + bite]):
                    yield memoryview(some)
            except stream.errors as error:
                raise errors.IntegrityError(
                    f"its {kind} is damaged near byte {fed + start} ({error})", uri=uri
                ) from None
        fed += len(view)
    if not stream.whole:
        raise errors.IntegrityError(f"its {kind} is cut off after {fed} bytes", uri=uri)


class _Stream:
    """Members or frames one after the other."""

    def __init__(self, kind: str) -> None:
        self.errors: Any = (zlib.error, zlib_ng.error)
        if kind == "gzip":
            self._new: Any = lambda: zlib_ng.decompressobj(_GZIP)
        else:
            try:
                import zstandard
            except ImportError:
                raise ImportError("a .zst shard needs zstandard: pip install torch-s3[zstd]") from None
            self.errors = (zstandard.ZstdError,)
            self._new = zstandard.ZstdDecompressor().decompressobj
        self._one: Any = None

    def feed(self, data: Any) -> Iterator[bytes]:
        """What comes of the next bytes."""
        while len(data):
            if self._one is None:
                data = bytes(data).lstrip(b"\0")  # gzip files may be padded
                if not data:
                    return
                self._one = self._new()
            if some := self._one.decompress(data):
                yield some
            if not self._one.eof:
                return
            data = self._one.unused_data
            self._one = None

    @property
    def whole(self) -> bool:
        """Whether nothing has begun that isn't ended."""
        return self._one is None
