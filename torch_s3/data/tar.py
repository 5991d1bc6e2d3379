"""Tar files of samples, as WebDataset lays them out. Pure: no I/O.

A sample is consecutive members whose names are alike up to the first dot of the file name; what follows the dot is the
member's extension, and its name in the sample.

Sources: "ustar Interchange Format" and "pax Interchange Format", POSIX.1-2017, ``pax``; "Basic Tar Format", GNU tar
manual; "The WebDataset Format", WebDataset documentation.
"""

from __future__ import annotations

import re
import struct
import zlib
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_s3 import errors
from torch_s3.data.tar_decode import check, decode

__all__ = ["END", "Member", "TarScan", "check", "decode", "member", "members", "sample", "split"]

BLOCK = 512
END = bytes(2 * BLOCK)
"""What a tar ends with."""

_ZEROS = bytes(BLOCK)
_LARGEST_TEXT = 1 << 20  # bytes of names and PAX records
_LARGEST = 1 << 48  # bytes of a member
_FILES, _FOLDER = "0\x007", "5"  # kinds of member
_REFUSED = {"1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a pipe", "S": "sparse"}
_OWN = re.compile(r"__[^/]*__(?:$|/)")  # names of WebDataset's own members
_PAX = re.compile(rb"([1-9][0-9]{0,7}) ([^=]+)=")


class Member(NamedTuple):
    """A file of a tar.

    Attributes:
        name: With its folders.
        head: Where its first header starts, in bytes.
        start: Where its data starts.
        size: Of its data, in bytes.
    """

    name: str
    head: int
    start: int
    size: int

    @property
    def stop(self) -> int:
        """Where the next header starts."""
        return self.start + _padded(self.size)


def split(name: str) -> tuple[str, str] | None:
    """A member's key and extension, ``None`` where it belongs to no sample: WebDataset's rule, in lower case."""
    if name.startswith("__") and _OWN.match(name):
        return None
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


class _Heads:
    """Goes from header to header. Says which bytes it has to see next, and is given them.

    Attributes:
        at: Where they start.
        want: How many.
        whole: Whether a tar may end before them.
        ended: Whether it has come to the end mark.
    """

    def __init__(self) -> None:
        self.at, self.want, self.whole, self.ended = 0, BLOCK, True, False
        self._head = 0  # where the headers of the next member start
        self._text, self._text_size = "", 0  # the kind of text to come, and its bytes
        self._name: str | None = None  # what such texts said of the next member
        self._size: int | None = None
        self._zeros = 0

    def take(self, data: memoryview | bytearray) -> Member | None:
        """The bytes wanted; returns the member whose header they are.

        Raises:
            ValueError: They are no header, or one that is refused.
        """
        block = bytes(data)  # whose slices cost less than a view's
        if self._text:
            self._take_text(block)
            return None
        self.at += BLOCK
        if block == _ZEROS:
            self._zeros += 1
            self.ended = self._zeros == 2
            if not self.whole:
                raise ValueError("a header is missing after the long name or PAX header before it")
            return None
        if self._zeros:
            raise ValueError("a header follows an empty one, which is half an end mark: something was overwritten")
        kind = chr(block[156])
        _check(block)
        size = _number(block[124:136])
        if kind in "xgLK":
            if size > _LARGEST_TEXT:
                raise ValueError(f"a name or PAX header says that it has {size} bytes")
            if size:
                self._text, self.want, self.whole = kind, _padded(size), kind == "g" and self.whole
            self._text_size = size
            return None
        name = self._name if self._name is not None else _header_name(block)
        size = self._size if self._size is not None else size
        if kind == "\0" and name.endswith("/"):
            kind = _FOLDER
        found = Member(name, self._head, self.at, 0 if kind == _FOLDER else size)
        if kind not in _FILES + _FOLDER:
            raise ValueError(f"{name!r} is {_REFUSED.get(kind, f'of the unknown kind {kind!r}')}: samples are files")
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} leads out of its folder")
        self.at = self._head = found.stop
        self._name = self._size = None
        self.whole = True
        return None if kind == _FOLDER else found

    def _take_text(self, text: bytes) -> None:
        kind, self._text = self._text, ""
        self.at, self.want = self.at + len(text), BLOCK
        text = text[: self._text_size]
        if kind == "L":
            self._name = _text(text)
        elif kind in "xg":
            for name, value in _pax(text):
                if kind == "g" and name in ("path", "size"):  # who reads one sample by its bounds wouldn't see it
                    raise ValueError(f"a global PAX header sets the {name} of all members: pack them anew")
                if name == "path":
                    self._name = value.decode(errors="surrogateescape")
                elif name == "size":
                    self._size = _decimal(value)
                elif name.startswith("GNU.sparse."):
                    raise ValueError("a sparse file: pack it whole")


class TarScan:
    """Finds where samples lie. Fed a shard's bytes in order, of which only the headers are looked at, and verified.

    Args:
        uri: The shard, for errors.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._fed = 0
        self._heads = _Heads()
        self._held = bytearray()  # the beginning of what is wanted
        self._starts = array("q")
        self._key: str | None = None
        self._end = 0  # of the last member

    def feed(self, data: memoryview) -> None:
        """Take the next bytes; of any number, cut anywhere.

        Raises:
            IntegrityError: A header is damaged, or one of what is refused, such as links.
        """
        heads, base = self._heads, self._fed
        self._fed += len(data)
        while not heads.ended:
            first = heads.at + len(self._held)
            piece = data[first - base : heads.at + heads.want - base] if first < self._fed else data[:0]
            if len(self._held) + len(piece) < heads.want:
                self._held += piece
                return
            block: memoryview | bytearray = piece
            if self._held:
                self._held += piece
                block, self._held = self._held, bytearray()
            at = heads.at
            try:
                found = heads.take(block)
            except ValueError as error:
                raise _damaged(self._uri, max(0, len(self._starts) - 1), at, str(error)) from None
            if found is not None and (parts := split(found.name)) is not None:
                if parts[0] != self._key:
                    self._key = parts[0]
                    self._starts.append(found.head)
                self._end = found.stop
        if data[max(0, heads.at - base) :].tobytes().strip(b"\0"):
            message = "something follows the end mark, perhaps another tar: repack them as one"
            raise _damaged(self._uri, len(self._starts), heads.at, message)

    def bounds(self) -> NDArray[np.int64]:
        """int64: where each sample so far starts; the last one of them may go on."""
        return np.array(self._starts or [0], np.int64)

    def finish(self) -> NDArray[np.int64]:
        """Where each of the n samples starts, and the last one ends: int64 (n + 1,).

        Raises:
            IntegrityError: The shard is cut off.
        """
        heads = self._heads
        if self._fed == 0:
            raise errors.IntegrityError("not a tar: it is empty", uri=self._uri)
        if not heads.ended and (heads.at != self._fed or not heads.whole):
            message = f"the shard is cut off after {self._fed} bytes"
            raise _damaged(self._uri, max(0, len(self._starts) - 1), int(self.bounds()[-1]), message)
        return np.array([*self._starts, self._end], np.int64)


def members(data: memoryview, uri: str, number: int, offset: int) -> Iterator[Member]:
    """The files in a slice of a shard, whose bounds are those of samples. Positions count from the slice's start.

    Args:
        data: The slice.
        uri: The shard, for errors.
        number: Of the slice's first sample in the shard, from 0.
        offset: Where the slice starts in the shard, in bytes.

    Raises:
        IntegrityError: See :class:`TarScan`.
    """
    heads = _Heads()
    while not heads.ended and heads.at < len(data):
        block, at = data[heads.at : heads.at + heads.want], heads.at
        try:
            if len(block) < heads.want:
                raise ValueError("it ends within a header")
            found = heads.take(block)
            if heads.at > len(data):
                raise ValueError(f"it ends {heads.at - len(data)} bytes before its last member does")
        except ValueError as error:
            raise _damaged(uri, number, offset + at, str(error)) from None
        if found is not None:
            yield found


def sample(data: memoryview, uri: str, number: int, offset: int) -> dict[str, memoryview | str]:
    """One sample: ``__key__``, ``__url__``, and the data of its members by extension. Nothing is copied.

    Args:
        data: Its members, with their headers: ``[bounds[i], bounds[i + 1])`` of the shard.
        uri: The shard, for ``__url__`` and errors.
        number: Of the sample in the shard, from 0.
        offset: Where it starts in the shard, in bytes.

    Raises:
        IntegrityError: A header is damaged, an extension is there twice, or they are members of no sample or several.
    """
    found: dict[str, memoryview | str] = {}
    for each in members(data, uri, number, offset):
        parts = split(each.name)
        if parts is None:
            continue
        key, extension = parts
        if found.setdefault("__key__", key) != key:
            message = f"{each.name!r} is of another sample than {found['__key__']!r}"
            raise _damaged(uri, number, offset + each.head, message)
        if extension in found or extension == "__url__":
            message = f"sample {key!r} has {extension!r} twice"
            raise _damaged(uri, number, offset + each.head, message)
        found[extension] = data[each.start : each.start + each.size]
    if not found:
        raise _damaged(uri, number, offset, "no sample is there")
    return {"__key__": found.pop("__key__"), "__url__": uri, **found}


def _damaged(uri: str, number: int, offset: int, message: str) -> errors.IntegrityError:
    return errors.IntegrityError(f"record {number}, at byte {offset}: {message}", uri=uri)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check(block: bytes) -> None:
    """Verify a header's checksum: the sum of its bytes, its own place counting as spaces.

    Adler-32 is that sum modulo 65521, plus 1, in its lower half: 20 times as fast as adding in Python.
    """
    field = block[148:156]
    try:
        total = _number(field) - 8 * 0x20 + sum(field)
    except ValueError:
        total = -1
    if total < 0 or (1 + total) % 65521 != zlib.adler32(block) & 0xFFFF:
        raise ValueError("not a tar header: its checksum is wrong")


def _number(field: bytes) -> int:
    """A number in octal, or in binary where its first bit is set, as GNU tar writes large ones."""
    number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    if field[0] < 0x80:
        digits = field.partition(b"\0")[0].strip(b" ") or b"0"
        if not digits.strip(b"01234567"):
            number = int(digits, 8)
    if not 0 <= number <= _LARGEST:
        raise ValueError(f"a header holds no number where one should be: {field!r}")
    return number


def _decimal(text: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,15}", text):
        raise ValueError(f"a PAX header says that the size is {text[:40]!r}")
    return int(text)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _header_name(block: bytes) -> str:
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""  # GNU keeps other things there
    return f"{prefix}/{name}" if prefix else name


def _pax(text: bytes) -> Iterator[tuple[str, bytes]]:
    """The records of a PAX header: ``"LENGTH NAME=VALUE\\n"``, the length of all of it."""
    at = 0
    while at < len(text):
        found = _PAX.match(text, at)
        last = at + int(found[1]) - 1 if found is not None else -1
        if found is None or last < found.end() or text[last : last + 1] != b"\n":
            raise ValueError("a PAX header is damaged")
        yield found[2].decode(errors="replace"), text[found.end() : last]
        at = last + 1


def member(name: str, size: int) -> tuple[bytes, bytes]:
    """What goes before and after a file's data: the headers, ustar's where they hold the name and size, else with a
    PAX header; and the padding.

    The same for the same arguments: no times and owners.

    Raises:
        ValueError: A name that :class:`TarScan` refuses.
    """
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{name!r} is no name for a member of a tar")
    encoded = name.encode(errors="surrogateescape")
    prefix, short = _ustar_name(encoded)
    before, records, stored = b"", b"", size
    if short is None:
        records += _pax_record(b"path", encoded)
        prefix, short = b"", encoded[:100]
    if size >= 8**11:
        records += _pax_record(b"size", b"%d" % size)
        stored = 0
    if records:
        before = _header(b"pax", b"", len(records), b"x") + records + bytes(_padded(len(records)) - len(records))
    return before + _header(short, prefix, stored, b"0"), bytes(_padded(size) - size)


def _ustar_name(name: bytes) -> tuple[bytes, bytes | None]:
    """Prefix and name, ``None`` where ustar has no room for it; only ASCII, whose meaning nobody doubts."""
    if not name.isascii():
        return b"", None
    if len(name) <= 100:
        return b"", name
    cut = name.rfind(b"/", 0, 156)
    if cut <= 0 or len(name) - cut - 1 > 100 or cut == len(name) - 1:
        return b"", None
    return name[:cut], name[cut + 1 :]


def _pax_record(name: bytes, value: bytes) -> bytes:
    body = b" " + name + b"=" + value + b"\n"
    size = len(body) + 1
    while len(b"%d" % size) + len(body) != size:
        size = len(b"%d" % size) + len(body)
    return b"%d" % size + body


def _header(name: bytes, prefix: bytes, size: int, kind: bytes) -> bytes:
    fields: list[Any] = [name, b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size, b"%011o\0" % 0, b" " * 8]
    fields += [kind, b"", b"ustar\0", b"00", b"", b"", b"0000000\0", b"0000000\0", prefix]
    packed = struct.pack("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x", *fields)
    return packed[:148] + b"%06o\0 " % sum(packed) + packed[156:]
