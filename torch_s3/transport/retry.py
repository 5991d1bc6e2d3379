"""What is tried again, and when. Pure, no I/O.

Sources: "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), full jitter; the retry quota of the AWS SDKs'
standard mode ("Retry behavior", AWS SDKs and Tools Reference Guide).
"""

from __future__ import annotations

import enum
import random

from torch_s3 import errors


class Cause(enum.Enum):
    """Why an attempt failed in a way that another attempt may mend."""

    CONNECTION = "connection"
    TIMEOUT = "timeout"
    SERVER = "server"
    THROTTLE = "throttle"
    INTEGRITY = "integrity"


class Retry(Exception):
    """An attempt failed; the transfer may be tried again.

    Args:
        cause: Why.
        message: What the error says if no attempt succeeds.
        after: Seconds that the server wants to be left alone.
    """

    def __init__(self, cause: Cause, message: str, *, after: float = 0.0) -> None:
        super().__init__(message)
        self.cause = cause
        self.after = after


class Renewal(enum.Enum):
    """What to find out anew before the next attempt."""

    CREDENTIALS = "credentials"
    CLOCK = "clock"
    PLACE = "place"


class Renew(Exception):
    """An attempt was refused for what was assumed; with that found anew, another may succeed. Once for each renewal.

    Args:
        renewal: What to find anew.
        error: To raise where that doesn't help.
        hint: What the server said of it: its time, the bucket's region, or the URL to go to.
    """

    def __init__(self, renewal: Renewal, error: errors.S3Error, hint: str = "") -> None:
        super().__init__(str(error))
        self.renewal = renewal
        self.error = error
        self.hint = hint


_CAP = 20.0
_BASE = dict.fromkeys(Cause, 0.1) | {Cause.SERVER: 0.25, Cause.THROTTLE: 0.5}
_STATUS = {429: Cause.THROTTLE, 500: Cause.SERVER, 502: Cause.SERVER, 503: Cause.THROTTLE, 504: Cause.SERVER}
_CODE = {
    "BadDigest": Cause.INTEGRITY,
    "ConditionalRequestConflict": Cause.SERVER,
    "InternalError": Cause.SERVER,
    "OperationAborted": Cause.SERVER,
    "RequestLimitExceeded": Cause.THROTTLE,
    "RequestTimeout": Cause.TIMEOUT,
    "ServiceUnavailable": Cause.THROTTLE,
    "SlowDown": Cause.THROTTLE,
    "Throttling": Cause.THROTTLE,
    "ThrottlingException": Cause.THROTTLE,
    "XAmzContentChecksumMismatch": Cause.INTEGRITY,
}


def cause_of(status: int, code: str) -> Cause | None:
    """The cause to retry for an answer's HTTP status and S3 error code; ``None`` where trying again can't help."""
    return _CODE.get(code) or _STATUS.get(status)


def delay(cause: Cause, attempt: int, rng: random.Random) -> float:
    """Seconds to wait after failed attempt number ``attempt`` (from 1): uniform in [0, min(20, base * 2**attempt)]."""
    return rng.uniform(0.0, min(_CAP, _BASE[cause] * 2.0 ** min(attempt, 10)))


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After field asks for, at most 20; 0 where it says nothing, or a date."""
    return min(_CAP, float(value)) if value and value.isascii() and value.isdigit() else 0.0


class Quota:
    """Retries that one origin may still cost: so that a server in trouble isn't kept there by everyone's retries.

    A retry takes 5 tokens of 500, after a time-out 10; a success gives back what its last retry took, or 1.
    """

    def __init__(self) -> None:
        self.left = 500

    def take(self, cause: Cause) -> int:
        """Pay for a retry: the tokens that it took, 0 where there are too few left."""
        price = 10 if cause is Cause.TIMEOUT else 5
        if self.left < price:
            return 0
        self.left -= price
        return price

    def give_back(self, paid: int) -> None:
        """Note a success whose last retry took ``paid``."""
        if self.left < 500:
            self.left = min(500, self.left + (paid or 1))
