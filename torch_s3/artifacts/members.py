"""What an archive may hold: how many members, how large, of what names. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch_s3 import errors
from torch_s3.artifacts.source import MAX_BYTES
from torch_s3.artifacts.unpack import MAX_RATIO, Limits


class Caps(NamedTuple):
    """What an archive may hold.

    Attributes:
        members: Most regular files and folders.
        member_bytes: Most bytes of each.
        bytes: Most bytes of all together.
        ratio: Most bytes for each byte that they take in S3.
    """

    members: int = 100_000
    member_bytes: int = MAX_BYTES
    bytes: int = MAX_BYTES
    ratio: float = MAX_RATIO


class Names:
    """Judges members by name and size as they come.

    Args:
        caps: What there may be of them.
        uri: For errors.
    """

    def __init__(self, caps: Caps, uri: str) -> None:
        self._caps, self._uri = caps, uri
        self._seen: set[str] = set()
        self._members = self._bytes = 0

    def count(self) -> None:
        """Take note of a member, or a folder.

        Raises:
            ArtifactError: There are too many.
        """
        self._members += 1
        if self._members > self._caps.members:
            raise errors.ArtifactError(f"it has more than max_members={self._caps.members} members", uri=self._uri)

    def add(self, name: str, size: int, packed: int | None = None) -> str:
        """A member's name, as it is known from here on.

        Raises:
            ArtifactError: It is none that a member may have, or there is too much.
        """
        caps = self._caps
        parts = re.split(r"[/\\]", name)
        if not name or "\0" in name or not parts[0] or parts[0].endswith(":") or ".." in parts:
            raise self.refused(name, "has a name that leaves the archive: absolute, or with ..")
        name = "/".join(part for part in name.split("/") if part not in ("", "."))
        if name in self._seen or not name:
            raise self.refused(name, "is there twice")
        self._bytes += size
        if self._bytes > caps.bytes:
            raise errors.ArtifactError(f"its members have more than max_bytes={caps.bytes} together", uri=self._uri)
        if size < 0 or size > caps.member_bytes:
            raise self.refused(name, f"has {size} bytes, and max_member_bytes={caps.member_bytes}")
        if packed is not None:
            Limits(caps.member_bytes, caps.ratio).check(size, packed, what=quoted(name), uri=self._uri)
        self._seen.add(name)
        return name

    def refused(self, name: str, why: str) -> errors.ArtifactError:
        """An error that names the member."""
        return errors.ArtifactError(f"its member {quoted(name)} {why}", uri=self._uri)


def quoted(name: str) -> str:
    """A member's name, in a message."""
    return repr(name[:200])
