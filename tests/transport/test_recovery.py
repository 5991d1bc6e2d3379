"""What a second attempt does differently: resume, ask again elsewhere, with another clock, or not at all."""

import hashlib
import os
import threading
import time
from email.utils import formatdate
from itertools import repeat

import pytest
from faults import Faults, answer, cut, edit, reset, serve, stall
from processes import in_child

from torch_s3 import S3FileSystem, errors
from torch_s3.transport.checksum import ALGORITHMS, checksum
from torch_s3.transport.client import Client
from torch_s3.transport.retry import Cause, Quota, retry_after
from torch_s3.transport.stats import Stats, summary
from torch_s3.transport.width import Width

CONTENT = os.urandom(300_000)
OBJECTS = {"/bucket/key": CONTENT}
BROKEN_OFF = cut(1, 0.5, then=lambda exchange: exchange.close())
ETAG = f'"{hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()}"'


@pytest.fixture
def asked():
    """The header fields of the requests that :func:`noted` behaviours have answered."""
    return []


@pytest.fixture
def noted(asked):
    def note(behaviour):
        def behave(exchange):
            asked.append(exchange.fields)
            behaviour(exchange)

        return behave

    return note


def _fs(server, **settings):
    return S3FileSystem(**server.storage_options, **settings, skip_instance_cache=True)


# ---------------------------------------------------------------------- resuming


def test_body_that_breaks_off_is_resumed_where_it_did_and_of_the_same_version(asked, noted):
    with Faults([noted(BROKEN_OFF), noted(BROKEN_OFF), noted(serve)], objects=OBJECTS) as server:
        assert _fs(server).cat_file("bucket/key") == CONTENT

    assert [(fields.get("range"), fields.get("if-match")) for fields in asked] == [
        (None, None),
        ("bytes=150000-299999", ETAG),
        ("bytes=225000-299999", ETAG),
    ]


def test_range_that_breaks_off_is_resumed_within_it(asked, noted):
    with Faults([noted(BROKEN_OFF), noted(serve)], objects=OBJECTS) as server:
        assert _fs(server).cat_file("bucket/key", 1000, 2000) == CONTENT[1000:2000]

    assert asked[1]["range"] == "bytes=1500-1999"


def test_object_overwritten_between_attempts_is_read_anew():
    def overwrite(exchange):
        BROKEN_OFF(exchange)
        exchange.server.objects["/bucket/key"] = CONTENT[::-1]

    with Faults([overwrite], objects=dict(OBJECTS)) as server:
        assert _fs(server).cat_file("bucket/key") == CONTENT[::-1]


def test_body_without_an_etag_is_not_resumed(asked, noted):
    with Faults([noted(edit(ETag=None, body=lambda body: body[:9])), noted(serve)], objects=OBJECTS) as server:
        assert _fs(server, read_timeout=0.3).cat_file("bucket/key") == CONTENT

    assert "range" not in asked[1]


# ---------------------------------------------------------------------- checksums


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stored_checksum_is_compared(algorithm):
    field = {f"x_amz_checksum_{algorithm}": checksum(algorithm, memoryview(CONTENT))}
    flipped = edit(**field, body=lambda body: b"?" + body[1:])
    with Faults([flipped, edit(**field)], objects=OBJECTS) as server:
        fs = _fs(server)

        assert fs.cat_file("bucket/key") == CONTENT
        assert fs.stats()["retries"] == {"integrity": 1}


def test_checksum_that_never_fits_is_an_integrity_error():
    with Faults(repeat(edit(x_amz_checksum_crc32="AAAAAA==")), objects=OBJECTS) as server:
        with pytest.raises(errors.IntegrityError, match=r"don't have the stored CRC32 \(attempt 2 of 2"):
            _fs(server, attempts=2).cat_file("bucket/key")

        assert _fs(server, checksums=False).cat_file("bucket/key") == CONTENT


def test_checksum_of_parts_is_not_taken_for_one_of_the_object():
    with Faults([edit(x_amz_checksum_crc32="AAAAAA==-2")], objects=OBJECTS) as server:
        assert _fs(server).cat_file("bucket/key") == CONTENT


@pytest.mark.parametrize("settings", [{}, {"checksums": False}], ids=["on", "off"])
def test_what_is_written_carries_a_checksum_unless_switched_off(asked, noted, settings):
    with Faults([noted(serve)]) as server:
        _fs(server, **settings).pipe_file("bucket/new", CONTENT)

    assert asked[0].get("x-amz-checksum-crc64nvme") == (
        None if settings else checksum("crc64nvme", memoryview(CONTENT))
    )


# ---------------------------------------------------------------------- what was assumed of the server


def test_clock_is_corrected_by_the_server(asked, noted):
    server_time = time.time() + 3600
    skewed = answer(403, "RequestTimeTooSkewed", date=formatdate(server_time, usegmt=True))
    with Faults([noted(skewed), noted(serve), noted(serve)], objects=OBJECTS) as server:
        fs = _fs(server)
        assert fs.cat_file("bucket/key") == CONTENT
        assert fs.info("bucket/key")["size"] == len(CONTENT)

    hours = [fields["x-amz-date"][9:11] for fields in asked]
    assert hours == [time.strftime("%H", time.gmtime(server_time + seconds)) for seconds in (-3600, 0, 0)]


def test_clock_that_cannot_be_right_is_a_clear_error():
    skewed = answer(403, "RequestTimeTooSkewed", date=formatdate(usegmt=True))
    with Faults(repeat(skewed)) as server, pytest.raises(errors.AccessDenied, match="set this machine's clock"):
        _fs(server).cat_file("bucket/key")


def test_expired_credentials_are_found_anew(tmp_path, monkeypatch, asked, noted):
    credentials = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))

    def rotate(exchange):
        credentials.write_text("[default]\naws_access_key_id = new\naws_secret_access_key = secret\n")
        answer(400, "ExpiredToken")(exchange)

    for operation in ("cat_file", "info"):
        credentials.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = secret\n")
        with Faults([noted(rotate), noted(serve)], objects=OBJECTS) as server:
            fs = S3FileSystem(endpoint_url=server.endpoint_url, region="us-east-1", skip_instance_cache=True)
            getattr(fs, operation)("bucket/key")
        assert asked[-1]["authorization"].startswith("AWS4-HMAC-SHA256 Credential=new/")


def test_credentials_that_stay_expired_are_a_typed_error_after_one_look():
    with Faults(repeat(answer(400, "ExpiredToken")), objects=OBJECTS) as server:
        with pytest.raises(errors.CredentialsExpired, match="s3://bucket/key"):
            _fs(server).cat_file("bucket/key")

        assert len(server.requests) == 1


def test_each_of_many_with_expired_credentials_is_named():
    with Faults(repeat(answer(400, "ExpiredToken")), objects=OBJECTS) as server:
        results = _fs(server).cat_ranges([f"bucket/{number}" for number in range(40)], None, None)

    assert [(type(error), error.key) for error in results] == [(errors.CredentialsExpired, str(n)) for n in range(40)]


def test_credentials_that_are_never_found_anew_do_not_hold_up_for_ever(monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(Client, "_renewed", lambda *_: go_on.wait(60))
    with Faults([answer(400, "ExpiredToken")], objects=OBJECTS) as server:
        with pytest.raises(errors.DeadlineExceeded, match=r"not done within 0.3 s"):
            _fs(server, total_timeout=0.3).cat_file("bucket/key")
        go_on.set()


# ---------------------------------------------------------------------- time


def test_slow_small_get_is_sent_again_on_a_fresh_connection():
    with Faults([serve, stall], objects=OBJECTS) as server:
        fs = _fs(server, slow_after=0.2, attempts=1)

        assert fs.cat_file("bucket/key") == CONTENT
        assert fs.cat_file("bucket/key") == CONTENT
        assert (fs.stats()["slow"], server.connections) == (1, 2)


def test_operation_ends_when_its_time_is_up_though_there_are_attempts_left():
    with (
        Faults(repeat(answer(503, "SlowDown", retry_after="1")), objects=OBJECTS) as server,
        pytest.raises(errors.DeadlineExceeded, match=r"not done within 0.5 s; at last: SlowDown"),
    ):
        _fs(server, total_timeout=0.5, attempts=1000).cat_file("bucket/key")


def test_body_that_comes_in_drops_is_given_up():
    left = threading.Event()

    def drip(exchange):
        right = exchange.answer()
        exchange.send(right.head)
        for at in range(len(right.body)):
            if left.wait(0.05):
                return
            exchange.send(right.body[at : at + 1])

    with Faults(repeat(drip), objects=OBJECTS) as server:
        with pytest.raises(errors.DeadlineExceeded, match=r"no progress for 0.3 s \(attempt 2 of 2"):
            _fs(server, read_timeout=0.3, attempts=2).cat_file("bucket/key")
        left.set()


@pytest.mark.parametrize(
    ("value", "seconds"), [(None, 0), ("", 0), ("3", 3), ("9999", 20), ("-1", 0), ("Fri, 20 Nov 2026 12:00:00 GMT", 0)]
)
def test_retry_after_is_seconds_up_to_the_longest_delay(value, seconds):
    assert retry_after(value) == seconds


# ---------------------------------------------------------------------- quota, width, counters


def test_quota_pays_for_a_hundred_retries_and_is_given_back_by_success():
    quota = Quota()

    assert [quota.take(Cause.CONNECTION) for _ in range(101)] == [5] * 100 + [0]
    quota.give_back(5)
    assert quota.take(Cause.TIMEOUT) == 0
    quota.give_back(0)
    assert quota.take(Cause.CONNECTION) == 5


def test_used_up_quota_fails_at_once_and_says_why():
    with Faults(repeat(reset), objects=OBJECTS) as server:
        results = _fs(server, attempts=1000).cat_ranges(["bucket/key"] * 120, None, None)

    assert all("too many requests to this server have failed" in str(error) for error in results)
    assert len(server.requests) == 120 + 100


def _run(width, rate_of, seconds=30.0):
    """Let ``width`` rule a server of which so many requests in flight make ``rate_of(n)`` requests a second."""
    now = 0.0
    while now < seconds:
        now += 1 / rate_of(width.limit)
        width.done(90_000, width.limit / rate_of(width.limit), now, waiting=True)
    return width.limit


def test_width_grows_while_that_brings_more():
    assert _run(Width(256), lambda n: n / 0.03) == 256


def test_width_stays_where_more_bring_nothing():
    assert _run(Width(256), lambda n: min(n, 40) / 0.03) in (32, 64)


def test_width_grows_through_pauses_and_changes_of_work():
    width = Width(64)
    for number in range(3000):
        size, seconds = (90_000, 0.03) if number // 300 % 2 else (8_000_000, 0.12)
        width.done(size, seconds, 60.0 * number, waiting=number % 100 < 70)

    assert width.limit == 64


def test_width_is_never_more_than_allowed():
    assert _run(Width(10), lambda n: n / 0.03) == 10


def test_width_is_halved_once_a_second_when_throttled_and_grows_again():
    width = Width(64)
    for now in (1.0, 1.1, 1.2, 2.5):
        width.throttled(now)
    assert width.limit == 8

    assert _run(width, lambda n: n / 0.03) == 64


def test_stats_count_what_was_done():
    with Faults([reset, answer(503, "SlowDown")], objects=OBJECTS) as server:
        fs = _fs(server)
        fs.cat_file("bucket/key")
        fs.pipe_file("bucket/new", b"123")
        with pytest.raises(errors.NotFound):
            fs.cat_file("bucket/none")
        stats = fs.stats()

    assert stats.pop("first_byte_ms").keys() == {"p50", "p90", "p99"}
    assert stats == {
        "requests": 5,
        "failed": 1,
        "bytes_received": 300_000,
        "bytes_sent": 3,
        "retries": {"connection": 1, "throttle": 1},
        "throttles": 1,
        "slow": 0,
        "connections": 2,
    }


def test_percentiles_are_within_a_quarter():
    stats = Stats()
    for milliseconds in range(1, 101):
        stats.answered(milliseconds / 1000)

    for name, exact in {"p50": 50, "p90": 90, "p99": 99}.items():
        assert exact <= summary([stats])["first_byte_ms"][name] <= 1.25 * exact
    assert summary([Stats()])["first_byte_ms"] == {"p50": None, "p90": None, "p99": None}


def test_several_loops_share_the_work():
    def read():
        fs = _fs(server, loops=3, max_connections=6)
        with fs.client.batch() as batch:
            gets = [batch.get("bucket", "key") for _ in range(12)]
            batch.wait(*gets)
        assert all(bytes(get.buffer) == CONTENT for get in gets)
        assert len({id(get.carrier) for get in gets}) == 3

    with Faults(objects=OBJECTS) as server:
        assert in_child(read) == 0  # which takes its threads with it


# ---------------------------------------------------------------------- found by reading


def test_break_in_the_first_answer_of_a_large_object_is_resumed():
    content = os.urandom(6 * 1024 * 1024)
    with Faults([BROKEN_OFF], objects={"/bucket/key": content}) as server:
        assert _fs(server, part_size=5 * 1024 * 1024).cat_file("bucket/key") == content


def test_short_outage_fails_nobody_however_many_wait():
    with Faults(objects=OBJECTS) as server:
        port = server.port
    fs = S3FileSystem(**server.storage_options, skip_instance_cache=True)

    results = []
    reading = threading.Thread(target=lambda: results.extend(fs.cat_ranges(["bucket/key"] * 300, 0, 10)))
    reading.start()
    while not fs.stats()["retries"]:
        pass  # until the outage is seen
    with Faults(objects=OBJECTS, port=port):
        reading.join()

    assert results == [CONTENT[:10]] * 300


def test_line_break_in_metadata_is_refused():
    with Faults(objects=OBJECTS) as server:
        fs = _fs(server)
        with pytest.raises(errors.S3Error, match="line break"):
            fs.client.call(
                "create_multipart_upload", "s3://bucket/key", Bucket="bucket", Key="key", Metadata={"a": "1\r\nx-b: 2"}
            )

    assert server.requests == []


def test_success_of_a_write_that_no_s3_has_given_is_not_believed():
    with Faults([edit(ETag=None)]) as server:
        fs = _fs(server)
        fs.pipe_file("bucket/new", CONTENT)

        assert fs.stats()["retries"] == {"server": 1}


def test_calls_keep_their_keys_after_a_redirect():
    with Faults(objects=dict(OBJECTS)) as other:
        moved = answer(307, "TemporaryRedirect", location=f"http://localhost:{other.port}/bucket/key")
        with Faults(repeat(moved)) as server:
            assert _fs(server).info("bucket/key")["size"] == len(CONTENT)

        assert other.requests == [("HEAD", "/bucket/key")]
