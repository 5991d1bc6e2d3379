import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_s3.transport.retry import Cause, Retry, cause_of, delay

BASES = dict.fromkeys(Cause, 0.1) | {Cause.SERVER: 0.25, Cause.THROTTLE: 0.5}


@pytest.mark.parametrize(
    ("status", "code", "cause"),
    [
        (500, "", Cause.SERVER),
        (500, "InternalError", Cause.SERVER),
        (502, "", Cause.SERVER),
        (503, "", Cause.THROTTLE),
        (503, "SlowDown", Cause.THROTTLE),
        (504, "", Cause.SERVER),
        (429, "", Cause.THROTTLE),
        (400, "RequestTimeout", Cause.TIMEOUT),
        (409, "OperationAborted", Cause.SERVER),
        (200, "SlowDown", Cause.THROTTLE),
    ],
)
def test_passing_failures_are_tried_again(status, code, cause):
    assert cause_of(status, code) is cause


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (301, "PermanentRedirect"),
        (400, "InvalidArgument"),
        (400, "ExpiredToken"),
        (403, "AccessDenied"),
        (404, "NoSuchKey"),
        (412, "PreconditionFailed"),
        (416, "InvalidRange"),
        (501, "NotImplemented"),
    ],
)
def test_lasting_failures_are_not_tried_again(status, code):
    assert cause_of(status, code) is None


@given(st.sampled_from(Cause), st.integers(1, 2000), st.randoms(use_true_random=False))
def test_delay_is_within_the_bounds_of_its_attempt(cause, attempt, rng):
    assert 0 <= delay(cause, attempt, rng) <= min(20.0, BASES[cause] * 2.0 ** min(attempt, 10))


def test_delay_is_spread_over_all_of_its_bounds():
    rng = random.Random(0)
    delays = [delay(Cause.SERVER, 2, rng) for _ in range(1000)]

    assert min(delays) < 0.05
    assert max(delays) > 0.95


def test_retry_says_why():
    retry = Retry(Cause.THROTTLE, "SlowDown: reduce your request rate")

    assert (retry.cause, str(retry)) == (Cause.THROTTLE, "SlowDown: reduce your request rate")
