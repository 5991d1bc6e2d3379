"""Where the bucket is, whose credentials are used, and how patient the transport is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from fsspec.utils import stringify_path

_MIB = 1024 * 1024
_POSITIVE = (
    "max_connections",
    "loops",
    "connect_timeout",
    "first_byte_timeout",
    "read_timeout",
    "total_timeout",
    "slow_after",
    "attempts",
)
_CLIENT_KWARGS = {
    "aws_access_key_id": "key",
    "aws_secret_access_key": "secret",
    "aws_session_token": "token",
    "endpoint_url": "endpoint_url",
    "region_name": "region",
    "use_ssl": "use_ssl",
    "verify": "verify",
}


@dataclass(frozen=True, kw_only=True)
class S3Config:
    """All settings of one connection to S3. Immutable, hashable and picklable.

    What is left at ``None`` is found as botocore finds it: environment (``AWS_*``), profiles, SSO, web identity,
    container and instance roles. Credentials given here are pickled to DataLoader workers and never shown by ``repr``;
    those that botocore finds are found again in each process and never leave it.

    Args:
        key: Access key id. With ``secret``, used instead of what botocore would find.
        secret: Secret access key.
        token: Session token of temporary credentials.
        profile: Profile of the shared AWS configuration to use.
        anon: Send unsigned requests, for public buckets.
        endpoint_url: Base URL of an S3-compatible service; ``None`` for ``AWS_ENDPOINT_URL(_S3)``, else AWS itself.
        region: Region of the buckets; ``None`` for ``AWS_REGION``, ``AWS_DEFAULT_REGION``, the profile's, else
            ``us-east-1``.
        use_ssl: Use HTTPS where ``endpoint_url`` doesn't say.
        verify: ``True``, a file of CA certificates, or ``False`` to accept any certificate; ``None`` for
            ``AWS_CA_BUNDLE``, else ``True``.
        addressing_style: ``"path"``, ``"virtual"`` or ``"auto"`` (botocore's choice for the endpoint).
        part_size: Bytes of one range of a large read and of one part of a large write. S3 wants at least 5 MiB for
            parts.
        max_connections: Most connections of one process to one endpoint, and so most requests in flight. It starts with
            16, and goes on to more while they bring more bytes a second.
        loops: I/O threads of one process. One fills a core's worth of connections; more help where TLS is the limit.
        connect_timeout: Seconds to connect, TLS included.
        first_byte_timeout: Seconds from a request to its answer before it is tried again.
        read_timeout: Seconds without progress (64 KiB, or the rest) before a request is tried again.
        total_timeout: Seconds for one request with all its retries. A large object takes many.
        slow_after: Seconds after which a small GET without an answer is sent once more, on a fresh connection; later
            where answers usually take longer than a quarter of that.
        attempts: How often a request is tried before its error is raised.
        checksums: Send checksums with what is written, for S3 to check, and check those that S3 has stored for objects
            that are read whole by one request.
    """

    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    profile: str | None = None
    anon: bool = False
    endpoint_url: str | None = None
    region: str | None = None
    use_ssl: bool = True
    verify: bool | str | None = None
    addressing_style: str = "auto"
    part_size: int = 8 * _MIB
    max_connections: int = 64
    loops: int = 1
    connect_timeout: float = 5.0
    first_byte_timeout: float = 20.0
    read_timeout: float = 20.0
    total_timeout: float = 600.0
    slow_after: float = 2.0
    attempts: int = 5
    checksums: bool = True

    def __post_init__(self) -> None:
        if (self.key is None) != (self.secret is None):
            raise ValueError("key and secret go together: give both, or neither to let botocore find them")
        if self.token is not None and self.key is None:
            raise ValueError("token goes with key and secret: give all three")
        if self.anon and self.key is not None:
            raise ValueError("anon=True sends unsigned requests: leave out key and secret, or anon")
        if self.addressing_style not in ("auto", "path", "virtual"):
            raise ValueError(f"addressing_style={self.addressing_style!r}: use 'auto', 'path' or 'virtual'")
        if not 5 * _MIB <= self.part_size <= 5 * 1024 * _MIB:
            raise ValueError(f"part_size={self.part_size}: S3 takes parts of 5 MiB to 5 GiB")
        if not f"{self.key or ''}{self.secret or ''}{self.token or ''}".isprintable():
            raise ValueError(
                "key, secret or token has a line break in it, or the like: strip what was read from a file"
            )
        if "@" in (self.endpoint_url or "").partition("://")[2].partition("/")[0]:
            raise ValueError("endpoint_url has a user or password in it, which S3 has no use for: leave them out")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")

    @classmethod
    def from_storage_options(cls, options: Mapping[str, Any], base: S3Config | None = None) -> Self:
        """The configuration that s3fs's ``storage_options`` describe.

        Args:
            options: ``key secret token profile anon endpoint_url client_kwargs use_ssl`` as in s3fs, and any field of
                this class. ``None`` means unset. ``client_kwargs`` takes ``region_name``, ``endpoint_url``, ``verify``,
                ``use_ssl`` and the ``aws_*`` credentials.
            base: Settings for what ``options`` doesn't name.

        Raises:
            ValueError: An unknown option; the message names the nearest known one, never its value.
        """
        given = {name: stringify_path(value) for name, value in options.items() if value is not None}
        settings = {}
        for name, value in (given.pop("client_kwargs", None) or {}).items():
            settings[_CLIENT_KWARGS[_known(name, _CLIENT_KWARGS, "client_kwargs")]] = stringify_path(value)
        names = [f.name for f in fields(cls)]
        settings |= {_known(name, names, "storage_options"): value for name, value in given.items()}
        return cls(**settings) if base is None else replace(base, **settings)  # type: ignore[return-value]


def _known(name: str, names: Mapping[str, str] | list[str], where: str) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(names))}"
    raise ValueError(f"{where} has no {name!r}: {hint}")
