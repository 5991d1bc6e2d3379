"""The checksums that S3 keeps with objects and checks on uploads.

Source: "Checking object integrity in Amazon S3", Amazon S3 User Guide. On one core, awscrt computes CRC64NVME and
CRC32C at about 27 GB/s, zlib-ng CRC32 at about 25.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import reduce

from awscrt import checksums
from zlib_ng import zlib_ng


def _crc(function: Callable[[memoryview], int], nbytes: int) -> Callable[[memoryview], bytes]:
    return lambda data: function(data).to_bytes(nbytes, "big")


_FUNCTIONS: dict[str, Callable[[memoryview], bytes]] = {
    "crc64nvme": _crc(checksums.crc64nvme, 8),
    "crc32c": _crc(checksums.crc32c, 4),
    "crc32": _crc(zlib_ng.crc32, 4),
    "sha1": lambda data: hashlib.sha1(data, usedforsecurity=False).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}
ALGORITHMS = tuple(_FUNCTIONS)
"""Names, the fastest first, as in the header ``x-amz-checksum-NAME``."""


def checksum(algorithm: str, data: memoryview) -> str:
    """The checksum of ``data`` in base64, as S3 writes it.

    Args:
        algorithm: One of ``ALGORITHMS``.
        data: C-contiguous bytes.
    """
    return base64.b64encode(_FUNCTIONS[algorithm](data)).decode()


def joined(parts: Sequence[str], sizes: Sequence[int]) -> str:
    """The CRC64NVME of all parts together, in base64, from theirs.

    Args:
        parts: Theirs, in base64 and in order; at least one.
        sizes: Bytes of each.
    """
    crcs = [int.from_bytes(base64.b64decode(part), "big") for part in parts]
    pairs = zip(crcs[1:], sizes[1:], strict=True)
    crc = reduce(lambda before, pair: checksums.combine_crc64nvme(before, *pair), pairs, crcs[0])
    return base64.b64encode(crc.to_bytes(8, "big")).decode()
