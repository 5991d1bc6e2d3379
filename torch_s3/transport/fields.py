"""What the configuration adds to requests."""

from __future__ import annotations

import base64
import hashlib
from typing import Any, NamedTuple

from torch_s3.config import S3Config


class Fields(tuple[tuple[str, str], ...]):
    """Header fields, by lower-case name. They may hold a secret, so ``repr`` shows just the names."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Fields({', '.join([name for name, _ in self])})"


class DataFields(NamedTuple):
    """What the configuration adds to the calls that carry data."""

    get: Fields
    put: Fields
    part: Fields


def headers_for(config: S3Config) -> DataFields:
    """What the configuration adds to the requests that the transport makes itself.

    Source: "Specifying server-side encryption with customer-provided keys", Amazon S3 User Guide. Of an upload by
    parts, encryption by S3's own keys is asked for where it begins.
    """
    every = [("x-amz-request-payer", "requester")] if config.requester_pays else []
    if config.customer_key is not None:
        digest = hashlib.md5(config.customer_key, usedforsecurity=False).digest()
        every += [
            ("x-amz-server-side-encryption-customer-algorithm", "AES256"),
            ("x-amz-server-side-encryption-customer-key", base64.b64encode(config.customer_key).decode()),
            ("x-amz-server-side-encryption-customer-key-md5", base64.b64encode(digest).decode()),
        ]
    put = list(every)
    if config.server_side_encryption is not None:
        put.append(("x-amz-server-side-encryption", config.server_side_encryption))
    if config.kms_key_id is not None:
        put.append(("x-amz-server-side-encryption-aws-kms-key-id", config.kms_key_id))
    return DataFields(Fields(every), Fields(put), Fields(every))


def parameters_of(config: S3Config) -> dict[str, Any]:
    """What the configuration adds to boto3's calls, each of which takes some of it. boto3 adds the keys' digests."""
    every: dict[str, Any] = {
        "ServerSideEncryption": config.server_side_encryption,
        "SSEKMSKeyId": config.kms_key_id,
        "RequestPayer": "requester" if config.requester_pays else None,
    }
    if config.customer_key is not None:
        for whose in ("", "CopySource"):
            every |= {f"{whose}SSECustomerKey": config.customer_key, f"{whose}SSECustomerAlgorithm": "AES256"}
    return {name: value for name, value in every.items() if value is not None}
