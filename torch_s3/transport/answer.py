"""The head of an HTTP answer."""

from __future__ import annotations

import re

# The fields that the transport itself looks at, so that one search finds all of them.
_FIELD = re.compile(
    r"\r\n(connection|content-length|content-range|date|etag|last-modified|location|retry-after|transfer-encoding|x-amz-[^:\r]+)"
    r":[ \t]*([^\r]*)",
    re.IGNORECASE,
)
_ANY_FIELD = re.compile(r"\r\n([^:\r]+):[ \t]*([^\r]*)")


class Head:
    """Status line and header fields of an answer.

    Args:
        raw: Up to the last field's line end, that included.

    Attributes:
        status: Of the status line.
        get: The value of the field called by this name in lower case, ``None`` if there is none.

    Raises:
        ConnectionError: It isn't HTTP/1.x.
    """

    __slots__ = ("_text", "get", "status")

    def __init__(self, raw: bytes) -> None:
        if not raw.startswith(b"HTTP/1.") or not raw[9:12].isdigit():
            raise ConnectionError("the server's answer is not HTTP/1.1")
        self._text = raw.decode("latin-1")
        self.get = {name.lower(): value.rstrip() for name, value in _FIELD.findall(self._text)}.get
        self.status = int(raw[9:12])

    def all(self) -> dict[str, str]:
        """Every field, by its name as sent."""
        return {name: value.rstrip() for name, value in _ANY_FIELD.findall(self._text)}

    def stored_checksums(self) -> bool:
        """Whether there may be any ``x-amz-checksum-…`` field."""
        return "x-amz-checksum" in self._text.lower()

    def length(self) -> int | None:
        """Content-Length, ``None`` if the server doesn't say."""
        value = self.get("content-length")
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) < 20):
            raise ConnectionError(f"Content-Length {value[:20]!r} is not a number of bytes")
        return int(value)

    def etag(self) -> str | None:
        """The ETag without quotes and weakness mark: servers differ in both."""
        value = self.get("etag")
        return bare_etag(value) if value else None

    def keeps_alive(self) -> bool:
        """Whether another request may follow on the same connection."""
        connection = self.get("connection", "").lower()
        return "close" not in connection and (self._text[7] != "0" or "keep-alive" in connection)


def bare_etag(etag: str) -> str:
    """An ETag as it is compared: without quotes and weakness mark."""
    return etag.removeprefix("W/").strip('"')
