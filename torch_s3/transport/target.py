"""Where transfers go, and how: plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch_s3.transport import sigv4
from torch_s3.transport.retry import Renew
from torch_s3.transport.stats import Stats

if TYPE_CHECKING:
    from torch_s3.transport.fallback import Fallback

Fields = Sequence[tuple[str, str]]


class Origin(NamedTuple):
    """Where connections go and how they behave; connections are shared by equal origins."""

    scheme: str
    host: str
    port: int
    verify: bool | str
    max_connections: int
    connect_timeout: float


class Patience(NamedTuple):
    """How long and how often one request is tried; see :class:`torch_s3.S3Config`."""

    attempts: int
    first_byte_timeout: float
    read_timeout: float
    total_timeout: float
    slow_after: float
    completion_timeout: float


class Stamped(NamedTuple):
    """What requests of one second have in common: the signature, but for path and query, and the header's lines."""

    second: int
    stamp: sigv4.Stamp | None  # None: unsigned
    lines: str


class Target(NamedTuple):
    """A bucket as the transport sees it.

    Attributes:
        host: The Host header.
        base: Encoded path before the key, ending in "/".
        credentials: ``None``: unsigned.
        get_fields: Header fields that every GET carries; likewise of PUTs and parts.
        verify_checksums: Ask for the checksums that S3 keeps, and compare.
        renew: Finds a target anew, for a transfer that was refused; it blocks, and raises S3Error.
        stats: Counters, one for each I/O thread.
        stamps: What the requests of one second have in common, by what they are alike in.
        fallback: What carries its data instead of the I/O threads, made when it is called; ``None``: they do.
    """

    origin: Origin
    host: str
    base: str
    region: str
    credentials: sigv4.Credentials | None
    patience: Patience
    get_fields: Fields
    put_fields: Fields
    part_fields: Fields
    verify_checksums: bool
    renew: Callable[[Target, str, Renew], Target]
    stats: Sequence[Stats]
    stamps: dict[str, Stamped]
    fallback: Callable[[], Fallback] | None

    def __repr__(self) -> str:
        """Without credentials, and what is made of them."""
        return f"Target({self.origin.scheme}://{self.host}{self.base})"
