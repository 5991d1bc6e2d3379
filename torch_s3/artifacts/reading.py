"""The arguments of a pickle's opcodes, read from memory. Pure.

Format: CPython's ``Lib/pickletools.py``. Where the unpicklers in C and in Python differ in what they accept, this
accepts what both do.
"""

from __future__ import annotations

import codecs
import struct
from typing import Any


class Reader:
    """Reads from ``at`` on.

    Attributes:
        buffer: What is read.
        at: The next byte.
        frame_stop: Where the current frame ends.
        protocol: What the pickle says that it is.

    Raises:
        EOFError: It is truncated; so in all methods.
        ValueError: It is damaged; so in all methods.
    """

    def __init__(self, buffer: memoryview, at: int) -> None:
        self.buffer, self.at = buffer, at
        self.frame_stop = self.protocol = 0

    def take(self, size: int) -> memoryview:
        """The next bytes."""
        found = self.buffer[self.at : self.at + size]
        if len(found) < size:
            raise EOFError
        self.at += size
        return found

    def number(self, layout: str) -> Any:
        """The next number."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def raw_line(self) -> bytes:
        """The next line, without its end."""
        at = self.at
        while (piece := bytes(self.buffer[at : at + 256])) and b"\n" not in piece:
            at += len(piece)
        if not piece:
            raise EOFError
        return bytes(self.take(at + piece.index(b"\n") + 1 - self.at)[:-1])

    def line(self) -> str:
        """The next line as text."""
        return str(self.raw_line(), "utf-8")

    def text(self, layout: str) -> str:
        """Text in UTF-8, after its length."""
        return str(self.take(self.number(layout)), "utf-8", "surrogatepass")

    def content(self, layout: str) -> memoryview:
        """Bytes, after their length."""
        return self.take(self.number(layout))

    def old_text(self, layout: str) -> str:
        """Text of Python 2, after its length."""
        size = self.number(layout)
        if size < 0:
            raise ValueError("a string of negative length")
        return str(self.take(size), "ascii")

    def quoted(self) -> str:
        """Text of Python 2, as its repr."""
        said = self.raw_line()
        if len(said) < 2 or said[0] != said[-1] or said[:1] not in (b"'", b'"'):
            raise ValueError("a string without quotes")
        return str(codecs.escape_decode(said[1:-1])[0], "ascii")

    def whole(self) -> int:
        """A number, or a truth value, as a line."""
        said = self.line()
        return said == "01" if said in ("00", "01") else int(said.removesuffix("L"), 0)

    def long(self, layout: str) -> int:
        """A number of any length, after that."""
        size = self.number(layout)
        if size < 0:
            raise ValueError("a number of negative length")
        return int.from_bytes(self.take(size), "little", signed=True)

    def read_protocol(self) -> None:
        """What it is said to be."""
        self.protocol = self.number("<B")
        if self.protocol > 5:
            raise ValueError(f"protocol {self.protocol}")

    def read_frame(self) -> None:
        """Where the frame that begins here ends."""
        size = self.number("<Q")
        self.check_frame_is_over()
        self.frame_stop = self.at + size
        if self.frame_stop > len(self.buffer):
            raise EOFError

    def check_frame_is_over(self) -> None:
        """What reads frames whole and what reads through them must not come to different ends."""
        if self.at < self.frame_stop:
            raise ValueError("a frame goes on after what it is for")
