"""What is tried again, and when. Pure, no I/O.

Source: "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015): full jitter.
"""

from __future__ import annotations

import enum
import random


class Cause(enum.Enum):
    """Why an attempt failed in a way that another attempt may mend."""

    CONNECTION = enum.auto()
    TIMEOUT = enum.auto()
    SERVER = enum.auto()
    THROTTLE = enum.auto()


class Retry(Exception):
    """An attempt failed; the transfer may be tried again."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


_CAP = 20.0
_BASE = {Cause.CONNECTION: 0.1, Cause.TIMEOUT: 0.1, Cause.SERVER: 0.25, Cause.THROTTLE: 0.5}
_STATUS = {429: Cause.THROTTLE, 500: Cause.SERVER, 502: Cause.SERVER, 503: Cause.THROTTLE, 504: Cause.SERVER}
_CODE = {
    "ConditionalRequestConflict": Cause.SERVER,
    "InternalError": Cause.SERVER,
    "OperationAborted": Cause.SERVER,
    "RequestLimitExceeded": Cause.THROTTLE,
    "RequestTimeout": Cause.TIMEOUT,
    "ServiceUnavailable": Cause.THROTTLE,
    "SlowDown": Cause.THROTTLE,
    "Throttling": Cause.THROTTLE,
    "ThrottlingException": Cause.THROTTLE,
}


def cause_of(status: int, code: str) -> Cause | None:
    """The cause to retry for an answer's HTTP status and S3 error code; ``None`` where trying again can't help."""
    return _CODE.get(code) or _STATUS.get(status)


def delay(cause: Cause, attempt: int, rng: random.Random) -> float:
    """Seconds to wait after failed attempt number ``attempt`` (from 1): uniform in [0, min(20, base * 2**attempt)]."""
    return rng.uniform(0.0, min(_CAP, _BASE[cause] * 2.0 ** min(attempt, 10)))
