"""What the transport has done: counters that only the I/O thread writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

_PERCENTILES = (50, 90, 99)


class Stats:
    """Counters of one client in one I/O thread: cheap enough to be always on."""

    def __init__(self) -> None:
        self.requests = 0
        self.received = 0
        self.sent = 0
        self.connections = 0
        self.failed = 0
        self.slow = 0
        self.retries: Counter[str] = Counter()
        self.first_byte = [0] * 160  # answers by their microseconds to the first byte, in quarters of powers of two

    def answered(self, seconds: float) -> None:
        """Note the time from a request to its answer's first byte."""
        micros = int(seconds * 1e6) | 4
        bits = micros.bit_length()
        self.first_byte[min(159, bits * 4 + (micros >> bits - 3 & 3))] += 1


def summary(parts: Iterable[Stats]) -> dict[str, Any]:
    """The counters of several I/O threads together, see :meth:`torch_s3.S3FileSystem.stats`."""
    parts = list(parts)
    retries: Counter[str] = sum((part.retries for part in parts), Counter())
    counts = [sum(column) for column in zip(*(part.first_byte for part in parts), strict=True)]
    return {
        "requests": sum(part.requests for part in parts),
        "failed": sum(part.failed for part in parts),
        "bytes_received": sum(part.received for part in parts),
        "bytes_sent": sum(part.sent for part in parts),
        "retries": dict(sorted(retries.items())),
        "throttles": retries["throttle"],
        "slow": sum(part.slow for part in parts),
        "connections": sum(part.connections for part in parts),
        "first_byte_ms": {f"p{percent}": _percentile(counts, percent) for percent in _PERCENTILES},
    }


def _percentile(counts: list[int], percent: int) -> float | None:
    """The upper bound in milliseconds of the bucket that the percentile lies in; ``None`` of nothing."""
    wanted, seen = sum(counts) * percent / 100, 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= wanted:
            return (5 + bucket % 4) * 2.0 ** (bucket // 4 - 3) / 1000
    return None
