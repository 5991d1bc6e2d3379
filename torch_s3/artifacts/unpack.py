"""Decompression in memory, with an eye on how much comes out."""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from zlib_ng import zlib_ng

from torch_s3 import errors
from torch_s3.wording import brief

_PIECE = 1 << 20  # bytes of output at a time
_FREE = 1 << 20  # bytes that may come out of however few
_LZMA_MEMORY = 512 << 20  # bytes that xz's dictionary may take

COMPRESSIONS = ("gzip", "bz2", "xz", "zstd", "lz4", "lzma", "zlib")
"""Those that a file's first bytes tell."""

MAX_RATIO = 1100
"""Bytes that may come out of one: deflate reaches 1032 where all is zero. zstd, xz and bz2 go much further."""


class Limits(NamedTuple):
    """What may come out.

    Attributes:
        size: Most bytes.
        ratio: Most bytes for each that went in, beyond the first MiB.
    """

    size: int
    ratio: float

    def check(self, size: int, packed: int, *, what: str, uri: str) -> None:
        """Refuse a size.

        Raises:
            ArtifactError: It is larger than allowed.
        """
        if size > self.size:
            raise errors.ArtifactError(f"{what} has more than the {self.size} bytes that are allowed", uri=uri)
        if size > _FREE and size > self.ratio * packed:
            message = f"{what} unpacks to more than {self.ratio:g} times its {packed} bytes: a bomb, or raise max_ratio"
            raise errors.ArtifactError(message, uri=uri)


class _Inflater:
    """zlib's decompressor with the interface of bz2's."""

    def __init__(self, window: int) -> None:
        self._inner: Any = zlib_ng.decompressobj(window)

    def decompress(self, data: Any, most: int) -> bytes:
        found: bytes = self._inner.decompress(data or self._inner.unconsumed_tail, most)
        return found

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        unused: bytes = self._inner.unused_data
        return unused


class _Zstd:
    """The same of zstandard's, which bounds no output: it is fed little at a time, of which 44 MB can come at most."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        self._inner = zstandard.ZstdDecompressor().decompressobj()

    def decompress(self, data: Any, most: int) -> bytes:
        return self._inner.decompress(data)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


def _lz4() -> Any:
    import lz4.frame

    return lz4.frame.LZ4FrameDecompressor()


class _Kind(NamedTuple):
    magic: bytes | tuple[bytes, ...]
    make: Callable[[], Any]
    chunk: int = 64 * 1024  # bytes that go in at a time
    extra: str = ""  # of ours that brings the package


_SKIPPED = tuple(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))  # frames that pzstd begins with
_KINDS = {
    "gzip": _Kind(b"\x1f\x8b", lambda: _Inflater(31)),
    "bz2": _Kind(b"BZh", bz2.BZ2Decompressor),
    "xz": _Kind(b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)),
    "lzma": _Kind(b"\x5d\0", lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)),
    "zstd": _Kind((b"\x28\xb5\x2f\xfd", *_SKIPPED), _Zstd, 1024, "zstd"),
    "lz4": _Kind(b"\x04\x22\x4d\x18", _lz4, extra="sklearn"),
    "zlib": _Kind(b"\x78", lambda: _Inflater(15)),
    "deflate": _Kind(b"", lambda: _Inflater(-15)),
}


def compression(head: memoryview | bytes, among: Iterable[str]) -> str | None:
    """How bytes that begin so are compressed, ``None`` where they don't look it."""
    first = bytes(head[:8])
    return next((name for name in among if first.startswith(_KINDS[name].magic)), None)


def unpacked(packed: memoryview, kind: str, limits: Limits, *, what: str, uri: str) -> memoryview:
    """What comes out, in memory of its own, writable.

    Raises:
        ArtifactError: It is truncated or damaged, or more than allowed.
        ImportError: A package is missing; the message says which extra brings it.
    """
    out = bytearray()
    try:
        for piece in _pieces(packed, _KINDS[kind]):
            limits.check(len(out) + len(piece), len(packed), what=what, uri=uri)
            out += piece
    except ImportError:
        extra = _KINDS[kind].extra
        raise ImportError(f"{uri}: {what} is compressed by {kind}: pip install 'torch-s3[{extra}]'") from None
    except EOFError:
        raise errors.ArtifactError(f"truncated: the {kind} stream of {what} has no end", uri=uri) from None
    except Exception as error:
        if isinstance(error, errors.S3Error | MemoryError) and not isinstance(error, lzma.LZMAError):
            raise
        reason = brief(error)
        raise errors.ArtifactError(f"damaged: {what} is no {kind} stream ({reason})", uri=uri) from None
    return memoryview(out)


def _pieces(packed: memoryview, kind: _Kind) -> Iterator[bytes]:
    at = 0
    while at < len(packed):
        stream = kind.make()
        while not stream.eof:
            wanting = stream.needs_input
            data = packed[at : at + kind.chunk] if wanting else b""
            at += len(data)
            piece = stream.decompress(data, _PIECE)
            if wanting and not data and not piece and not stream.eof:
                raise EOFError
            yield piece
        at -= len(stream.unused_data or b"")
        while at < len(packed) and packed[at] == 0:  # padding of xz, and of gzip on tapes
            at += 1
