"""Where the bucket is, whose credentials are used, and how patient the transport is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from botocore import UNSIGNED
from fsspec.utils import stringify_path

_MIB = 1024 * 1024
_POSITIVE = (
    "max_connections",
    "loops",
    "connect_timeout",
    "first_byte_timeout",
    "read_timeout",
    "completion_timeout",
    "total_timeout",
    "slow_after",
    "attempts",
)
_ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")
_DICTIONARIES = ("client_kwargs", "config_kwargs", "s3_additional_kwargs")
_WORDS = {  # s3fs's, and so boto3's, by the option that holds them: the field of each, "" where there is nothing to set
    "client_kwargs": {
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "aws_session_token": "token",
        "endpoint_url": "endpoint_url",
        "region_name": "region",
        "use_ssl": "use_ssl",
        "verify": "verify",
    },
    "config_kwargs": {
        "connect_timeout": "connect_timeout",
        "max_pool_connections": "max_connections",
        "read_timeout": "read_timeout",
        "region_name": "region",
        "signature_version": "anon",
        "use_dualstack_endpoint": "use_dualstack",
        "use_fips_endpoint": "use_fips",
    },
    "config_kwargs['retries']": {"max_attempts": "attempts", "mode": "", "total_max_attempts": "attempts"},
    "config_kwargs['s3']": {
        "addressing_style": "addressing_style",
        "use_accelerate_endpoint": "use_accelerate",
        "use_dualstack_endpoint": "use_dualstack",
    },
    "s3_additional_kwargs": {
        "RequestPayer": "requester_pays",
        "SSECustomerAlgorithm": "",
        "SSECustomerKey": "customer_key",
        "SSEKMSKeyId": "kms_key_id",
        "ServerSideEncryption": "server_side_encryption",
    },
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
        addressing_style: ``"path"``, ``"virtual"`` or ``"auto"``: the profile's, else botocore's choice.
        use_dualstack: Use AWS's endpoints that have IPv6 addresses too; ``None`` for ``AWS_USE_DUALSTACK_ENDPOINT``.
        use_fips: Use AWS's FIPS 140 endpoints; ``None`` for ``AWS_USE_FIPS_ENDPOINT``.
        use_accelerate: Use S3 Transfer Acceleration; ``None`` for the profile's setting.
        requester_pays: Agree to pay for requests to buckets whose owners don't.
        server_side_encryption: How S3 encrypts what is written: ``"AES256"``, ``"aws:kms"`` or ``"aws:kms:dsse"``;
            ``None`` for the bucket's default.
        kms_key_id: Id or ARN of the KMS key to encrypt with.
        customer_key: 32 bytes that S3 encrypts what is written with and doesn't keep (SSE-C): what was written with
            them can be read with them alone. Sent over HTTPS only.
        part_size: Bytes of one range of a large read and of one part of a large write. S3 wants at least 5 MiB for
            parts.
        max_connections: Most connections of one process to one endpoint, and so most requests in flight. It starts with
            16, and goes on to more while they bring more bytes a second.
        loops: I/O threads of one process. One fills a core's worth of connections; more help where TLS is the limit.
        connect_timeout: Seconds to connect, TLS included.
        first_byte_timeout: Seconds from a request to its answer before it is tried again.
        read_timeout: Seconds without progress (64 KiB, or the rest) before a request is tried again.
        completion_timeout: As the two before, where it is longer, for what S3 does before it answers: to copy, to put a
            large object together from its parts, to delete many.
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
    use_dualstack: bool | None = None
    use_fips: bool | None = None
    use_accelerate: bool | None = None
    requester_pays: bool = False
    server_side_encryption: str | None = None
    kms_key_id: str | None = None
    customer_key: bytes | None = field(default=None, repr=False)
    part_size: int = 8 * _MIB
    max_connections: int = 64
    loops: int = 1
    connect_timeout: float = 5.0
    first_byte_timeout: float = 20.0
    read_timeout: float = 20.0
    completion_timeout: float = 200.0
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
        for name in ("use_accelerate", "use_dualstack", "use_fips"):
            if getattr(self, name) and self.endpoint_url is not None:
                raise ValueError(f"{name} chooses among AWS's own endpoints: leave it out, or endpoint_url")
        if self.requester_pays and self.anon:
            raise ValueError("requester_pays needs credentials, for the bill: leave out anon")
        if self.server_side_encryption not in (None, *_ENCRYPTIONS):
            raise ValueError(f"server_side_encryption={self.server_side_encryption!r}: use one of {_ENCRYPTIONS}")
        if self.kms_key_id is not None and self.server_side_encryption not in _ENCRYPTIONS[1:]:
            raise ValueError("kms_key_id goes with server_side_encryption='aws:kms' or 'aws:kms:dsse'")
        if self.customer_key is not None:
            if len(self.customer_key) != 32:
                raise ValueError("customer_key is not of 32 bytes, as AES-256 wants them: os.urandom(32) makes some")
            if self.server_side_encryption is not None:
                raise ValueError("customer_key encrypts by itself: leave it out, or server_side_encryption")
        if not 5 * _MIB <= self.part_size <= 5 * 1024 * _MIB:
            raise ValueError(f"part_size={self.part_size}: S3 takes parts of 5 MiB to 5 GiB")
        if not f"{self.key or ''}{self.secret or ''}{self.token or ''}".isprintable():
            raise ValueError(
                "key, secret or token has a line break in it, or the like: strip what was read from a file"
            )
        if "@" in (self.endpoint_url or "").partition("://")[2].partition("/")[0]:
            raise ValueError("endpoint_url has a user or password in it, which S3 has no use for: leave them out")
        for name in _POSITIVE:
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name}={getattr(self, name)!r}: give a number")
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")

    @classmethod
    def from_storage_options(cls, options: Mapping[str, Any], base: S3Config | None = None) -> Self:
        """The configuration that s3fs's ``storage_options`` describe.

        Args:
            options: ``key secret token profile anon endpoint_url use_ssl requester_pays default_block_size
                client_kwargs config_kwargs s3_additional_kwargs`` as in s3fs, and any field of this class. ``None``
                means unset. Of the last three, what has a field here is taken, by boto3's names: ``region_name``,
                ``max_pool_connections``, ``ServerSideEncryption`` and so on.
            base: Settings for what ``options`` doesn't name.

        Raises:
            ValueError: An unknown option; the message names the nearest known one, never its value.
        """
        given = {name: stringify_path(value) for name, value in options.items() if value is not None}
        block_size = given.pop("default_block_size", None)
        settings = {} if block_size is None else {"part_size": block_size}
        config_kwargs = dict(given.pop("config_kwargs", None) or {})
        for where, words in (
            ("client_kwargs", given.pop("client_kwargs", None)),
            ("config_kwargs['retries']", config_kwargs.pop("retries", None)),
            ("config_kwargs['s3']", config_kwargs.pop("s3", None)),
            ("config_kwargs", config_kwargs),
            ("s3_additional_kwargs", given.pop("s3_additional_kwargs", None)),
        ):
            settings |= _from_words(where, words or {})
        names = [f.name for f in fields(cls)]
        known = [*names, "default_block_size", *_DICTIONARIES]
        settings |= {_known(name, known, "storage_options"): value for name, value in given.items()}
        if isinstance(settings.get("customer_key"), str):
            settings["customer_key"] = settings["customer_key"].encode()  # as boto3 does
        return cls(**settings) if base is None else replace(base, **settings)  # type: ignore[return-value]


def _from_words(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that one of s3fs's dictionaries sets."""
    settings: dict[str, Any] = {}
    for word, value in given.items():
        name = _WORDS[where][_known(word, _WORDS[where], where)]
        if value is None or not name:
            continue
        settings[name] = stringify_path(value)
        if word == "max_attempts":
            settings[name] = value + 1  # boto3 counts the retries alone
        elif word == "signature_version":
            if value is not UNSIGNED and value != "s3v4":
                raise ValueError(f"{where} has signature_version={value!r}: requests are signed by 's3v4', or UNSIGNED")
            settings[name] = value is UNSIGNED
        elif word == "RequestPayer":
            settings[name] = value == "requester"
    return settings


def _known(name: str, names: Iterable[str], where: str) -> str:
    names = list(names)
    if name in names:
        return name
    ours = _WORDS["client_kwargs"].get(name)  # boto3's word for it
    near = [ours] if ours in names else difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(names))}"
    raise ValueError(f"{where} has no {name!r}: {hint}")
