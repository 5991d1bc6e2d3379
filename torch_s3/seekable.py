"""The position of a file that is read."""

from __future__ import annotations

import io


class Seekable(io.IOBase):
    """What files that are read from anywhere share. Not thread-safe, as files aren't.

    Attributes:
        size: In bytes.
        name: For errors, and for those who look for one.
    """

    size = 0
    name = ""
    _at = 0

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """The position, in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; past the end is allowed, as in files, and reads nothing there."""
        self._checkClosed()  # io's own, in every io class
        bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}
        if whence not in bases:
            raise ValueError(f"{self.name}: whence={whence}: use 0 (start), 1 (position) or 2 (end)")
        at = offset + bases[whence]
        if at < 0:
            raise ValueError(f"{self.name}: cannot seek to byte {at}")
        self._at = at
        return at
