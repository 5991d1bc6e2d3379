"""Many strings in few numpy arrays: no Python object is kept per string, forks share the pages, pickles are flat."""

from __future__ import annotations

import operator
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

_MD5 = re.compile(r"([0-9a-f]{32})(?:-([1-9][0-9]{0,8}))?")
_NONE, _OTHER = -1, -2
_CHUNK = 1 << 16  # strings gathered at a time


class StringsBuilder:
    """Collects strings for :class:`PackedStrings`."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("q")
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        """Add one at the end."""
        self._text += string.encode(errors="surrogateescape")
        self._ends.append(len(self._text))

    def packed(self) -> PackedStrings:
        """All of them. Shares this builder's memory, which then takes no more."""
        return PackedStrings(np.frombuffer(self._text, np.uint8), np.frombuffer(self._ends, np.int64))


class PackedStrings(Sequence[str]):
    """Strings in one buffer: 8 bytes each beyond their UTF-8 text.

    Attributes:
        text: uint8, all of it.
        ends: int64 (n,), where each one ends.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[operator.index(index)]  # from the end, where it is negative
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for at in range(0, len(self), _CHUNK):
            ends = self.ends[at : at + _CHUNK].tolist()
            text, base = self.text[start : ends[-1]].tobytes(), start
            for end in ends:
                yield text[start - base : end - base].decode(errors="surrogateescape")
                start = end

    def take(self, indices: NDArray[np.int64]) -> PackedStrings:
        """Those at ``indices``, in that order."""
        starts = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])[indices]
        ends = np.cumsum(self.ends[indices] - starts)
        text = np.empty(ends[-1] if len(ends) else 0, np.uint8)
        for at in range(0, len(indices), _CHUNK):
            some = slice(at, at + _CHUNK)
            first = ends[at - 1] if at else 0
            before = np.concatenate([[first], ends[some][:-1]])
            shifts = np.repeat(starts[some] - before, ends[some] - before)
            text[first : ends[some][-1]] = self.text[np.arange(first, ends[some][-1]) + shifts]
        return PackedStrings(text, ends)

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """What :meth:`of` makes the same from."""
        return {f"{name}_text": self.text, f"{name}_ends": self.ends}

    @classmethod
    def of(cls, arrays: Any, name: str) -> Self:
        """From :meth:`arrays`."""
        return cls(arrays[f"{name}_text"], arrays[f"{name}_ends"])


class PackedETags:
    """ETags in 20 bytes each where they are S3's own, an MD5 with or without a number of parts; others as text.

    Attributes:
        digests: uint8 (n, 16).
        parts: int32 (n,): parts of a multipart upload, 0 of none, -1 where the ETag is unknown, -2 for one of
            ``others``, whose number the digest then begins with.
        others: Those of other forms.
    """

    def __init__(self, digests: NDArray[np.uint8], parts: NDArray[np.int32], others: PackedStrings) -> None:
        self.digests, self.parts, self.others = digests, parts, others

    @classmethod
    def pack(cls, etags: PackedStrings) -> PackedETags:
        """From texts without quotes; "" where unknown."""
        count = len(etags)
        if count and (np.diff(etags.ends, prepend=0) == 32).all():
            text = etags.text.tobytes()
            if re.fullmatch(rb"[0-9a-f]*", text):
                digests = np.frombuffer(bytearray.fromhex(text.decode()), np.uint8).reshape(count, 16)
                return cls(digests, np.zeros(count, np.int32), StringsBuilder().packed())
        digests, parts, others = np.zeros((count, 16), np.uint8), np.full(count, _NONE, np.int32), StringsBuilder()
        found = 0
        for index, etag in enumerate(etags):
            if match := _MD5.fullmatch(etag):
                digests[index] = np.frombuffer(bytes.fromhex(match[1]), np.uint8)
                parts[index] = int(match[2] or 0)
            elif etag:
                digests[index, :8] = np.frombuffer(found.to_bytes(8, "little"), np.uint8)
                parts[index] = _OTHER
                others.append(etag)
                found += 1
        return cls(digests, parts, others.packed())

    def __getitem__(self, index: int) -> str | None:
        parts = int(self.parts[index])
        if parts == _NONE:
            return None
        digest = self.digests[index].tobytes()
        if parts == _OTHER:
            return str(self.others[int.from_bytes(digest[:8], "little")])
        return f"{digest.hex()}-{parts}" if parts else digest.hex()

    def take(self, indices: NDArray[np.int64]) -> PackedETags:
        """Those at ``indices``, in that order."""
        return PackedETags(self.digests[indices], self.parts[indices], self.others)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What :meth:`of` makes the same from."""
        return {"etag_digests": self.digests, "etag_parts": self.parts, **self.others.arrays("etag_others")}

    @classmethod
    def of(cls, arrays: Any) -> Self:
        """From :meth:`arrays`."""
        return cls(arrays["etag_digests"], arrays["etag_parts"], PackedStrings.of(arrays, "etag_others"))
