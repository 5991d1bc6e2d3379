"""Every fault x every operation: exact bytes or the right error, in time, and nothing left behind.

The operations go through a proxy, which misbehaves, to a real server, which is asked afterwards what it holds. The
tables here are those of docs/reliability.md.
"""

import gc
import os
import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import boto3
import botocore.config
import pytest
from faults import (
    Faults,
    aim,
    answer,
    clock,
    cut,
    drip,
    edit,
    ignore_range,
    in_turn,
    lose,
    reset,
    say,
    serve,
    serve_then_close,
    stall,
)

from torch_s3 import S3FileSystem
from torch_s3.errors import (
    AccessDenied,
    CredentialsExpired,
    DeadlineExceeded,
    IntegrityError,
    ObjectChanged,
    S3Error,
    Throttled,
    TransferFailed,
)

pytestmark = pytest.mark.timeout(60)

MIB = 1024 * 1024
BUCKET = "fault-matrix"
SMALL = bytes(range(256)) * 4
LARGE = b"".join(number.to_bytes(8, "little") for number in range(MIB // 8))
WRITTEN = LARGE[:100_000]
PARTS = LARGE * 6  # two parts: the smallest that S3 allows, and the rest
NAMES = [f"{BUCKET}/names/{number}" for number in range(3)]
PATIENT = {
    "first_byte_timeout": 20,
    "read_timeout": 20,
    "completion_timeout": 20,
    "slow_after": 20,
    "total_timeout": 40,
    "attempts": 2,
    "part_size": 5 * MIB,
}
IMPATIENT = PATIENT | {"first_byte_timeout": 1, "read_timeout": 1, "completion_timeout": 1}

# ---------------------------------------------------------------------- operations


def _get(fs, key):
    return fs.cat_file(f"{BUCKET}/small")


def _get_large(fs, key):
    buffer = bytearray(len(LARGE))
    with fs.client.batch() as batch:
        batch.wait_whole(batch.get_into(BUCKET, "large", 0, memoryview(buffer), part_size=MIB // 4))
    return bytes(buffer)


def _list(fs, key):
    return fs.find(f"{BUCKET}/names")


def _info(fs, key):
    return fs.info(f"{BUCKET}/small")["size"]


def _put(fs, key):
    fs.pipe_file(f"{BUCKET}/{key}", WRITTEN)


def _put_new(fs, key):
    fs.pipe_file(f"{BUCKET}/{key}", WRITTEN, mode="create")


def _put_parts(fs, key):
    with fs.open(f"{BUCKET}/{key}", "wb") as file:
        file.write(PARTS)


class Operation(NamedTuple):
    """What is done, the kind of request that meets the fault, what a read returns or a write leaves."""

    run: object
    kind: str
    read: object = None
    written: bytes | None = None


OPERATIONS = {
    "small get": Operation(_get, "get", read=SMALL),
    "large get": Operation(_get_large, "get", read=LARGE),
    "list": Operation(_list, "list", read=NAMES),
    "info": Operation(_info, "head", read=len(SMALL)),
    "put": Operation(_put, "put", written=WRITTEN),
    "put if new": Operation(_put_new, "put", written=WRITTEN),
    "part": Operation(_put_parts, "part", written=PARTS),
    "complete": Operation(_put_parts, "complete", written=PARTS),
}

# ---------------------------------------------------------------------- faults

EXACT = "exact"  # as if nothing had happened
NONE = "-"  # there is no such fault of this operation
SETTLED = {"put if new": EXACT, "complete": EXACT}  # what was done is found by reading back, though no answer says so
NO_BODY = {"info": NONE, "put": NONE, "put if new": NONE, "part": NONE}  # of the answer
GETS = {"list": NONE, "info": NONE, "put": NONE, "put if new": NONE, "part": NONE, "complete": NONE}
RANGES = GETS | {"small get": NONE}
SAYS_LESS = {"info": AccessDenied}  # answers to HEAD have a status, but no code
NOT_A_RANGE = {"large get": IntegrityError}


def _flip(body):
    return body[:-1] + bytes([body[-1] ^ 1])


def _close(exchange):
    exchange.close()


def _change(exchange):
    """From the second range on, serve another version."""
    other = edit(ETag='"other"', body=lambda body: body[::-1])
    (serve if exchange.fields["range"].startswith("bytes=0-") else other)(exchange)


def _expire(status):
    """Let the credentials expire; new ones can be found."""

    def behave(exchange):
        os.environ["AWS_SESSION_TOKEN"] += "+"
        answer(status, "ExpiredToken")(exchange)

    return behave


def _move(exchange):
    """Redirect to this server's other name."""
    answer(307, "TemporaryRedirect", Location=f"http://localhost:{exchange.server.port}{exchange.target}")(exchange)


HUGE_HEAD = b"HTTP/1.1 200 OK\r\n" + b"x-long: long\r\n" * (MIB // 14)


class Fault(NamedTuple):
    """How requests are met, and what comes of it: by default, and by operation where that differs.

    ``once``: the first request only. ``always``: every one, so that another attempt cannot help. ``timing``: only a
    time-out ends it.
    """

    behaviour: object
    always: object
    once: object = EXACT
    but: dict = {}  # noqa: RUF012 - never changed
    but_once: dict = {}  # noqa: RUF012 - never changed
    timing: bool = False

    def outcome(self, often, operation):
        if often == "once":
            none = NONE if self.but.get(operation) == NONE else self.once
            return self.but_once.get(operation, none)
        return self.but.get(operation, self.always)


FAULTS = {
    "reset before the head": Fault(reset, TransferFailed),
    "answer lost": Fault(lose, TransferFailed, but=SETTLED),
    "reset within the head": Fault(cut(0.5), TransferFailed, but=SETTLED),
    "reset within the body": Fault(cut(1, 0.5), TransferFailed, but=SETTLED | NO_BODY),
    "closed before the head": Fault(say(), TransferFailed),
    "closed within the body": Fault(cut(1, 0.5, then=_close), TransferFailed, but=SETTLED | NO_BODY),
    "stall before the head": Fault(stall, DeadlineExceeded, timing=True),
    "stall within the body": Fault(cut(1, 0.5, then=stall), DeadlineExceeded, but=SETTLED | NO_BODY, timing=True),
    "head a byte at a time": Fault(drip(0.1), DeadlineExceeded, but=SETTLED, timing=True),
    "body a byte at a time": Fault(drip(0.1, head=1), DeadlineExceeded, but=SETTLED | NO_BODY, timing=True),
    "garbage instead of HTTP": Fault(say(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"), TransferFailed),
    "head of 1 MiB": Fault(say(HUGE_HEAD), TransferFailed),
    "closed between requests": Fault(serve_then_close, EXACT),
    "500": Fault(answer(500, "InternalError"), TransferFailed),
    "500, although done": Fault(edit(status=500), TransferFailed, but=SETTLED),
    "502": Fault(answer(502), TransferFailed),
    "503 SlowDown": Fault(answer(503, "SlowDown"), Throttled),
    "503 with Retry-After": Fault(answer(503, "SlowDown", Retry_After="0"), Throttled),
    "429": Fault(answer(429), Throttled),
    "200 with an error in the body": Fault(
        answer(200, "InternalError"), TransferFailed, but=NOT_A_RANGE, but_once=NOT_A_RANGE
    ),
    "Content-Length too small": Fault(
        edit(Content_Length="5"),
        TransferFailed,
        but=SETTLED | NO_BODY | NOT_A_RANGE,
        but_once=NOT_A_RANGE,
    ),
    "Content-Length too large": Fault(
        edit(Content_Length="9999999"),
        DeadlineExceeded,
        but=SETTLED | NOT_A_RANGE | {"info": NONE},
        but_once=NOT_A_RANGE,
        timing=True,
    ),
    "no Content-Range": Fault(edit(Content_Range=None), IntegrityError, IntegrityError, but=RANGES),
    "shifted Content-Range": Fault(edit(Content_Range="bytes 1-1024/4096"), IntegrityError, IntegrityError, but=GETS),
    "wrong Content-Range": Fault(edit(Content_Range="all of it"), IntegrityError, IntegrityError, but=GETS),
    "range ignored": Fault(ignore_range, IntegrityError, IntegrityError, but=RANGES),
    "range with status 200": Fault(edit(status=200), EXACT, but=RANGES),
    "changed between two ranges": Fault(_change, ObjectChanged, once=NONE, but=RANGES),
    "flipped byte": Fault(edit(body=_flip), IntegrityError, but=GETS | {"large get": NONE}),
    "301 to another region": Fault(answer(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1"), S3Error),
    "307 to another host": Fault(_move, S3Error),
    "400 wrong region": Fault(answer(400, "AuthorizationHeaderMalformed", x_amz_bucket_region="eu-west-1"), S3Error),
    "clock an hour off": Fault(clock(3600), EXACT),
    "RequestTimeTooSkewed": Fault(
        answer(403, "RequestTimeTooSkewed", Date="Thu, 01 Jan 2026 00:00:00 GMT"), AccessDenied
    ),
    "400 ExpiredToken": Fault(_expire(400), CredentialsExpired, but={"info": S3Error}),
    "403 ExpiredToken": Fault(_expire(403), CredentialsExpired, but=SAYS_LESS, but_once=SAYS_LESS),
}


def table():
    """The outcomes, as Markdown: always, and with a star where they are the same once."""
    rows = [["fault", *OPERATIONS], ["---"] * (len(OPERATIONS) + 1)]
    rows += [[name, *(_cell(fault, operation) for operation in OPERATIONS)] for name, fault in FAULTS.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(fault, operation):
    once, always = (fault.outcome(often, operation) for often in ("once", "always"))
    if isinstance(always, str):
        return always
    return f"`{always.__name__}`" + {EXACT: "", NONE: "", always: "*"}[once]


# ---------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def upstream(s3):
    """boto3's client of the real server, which holds what is read here."""
    s3.create_bucket(BUCKET)
    session = boto3.Session("testing", "testing", region_name="us-east-1")
    settings = botocore.config.Config(max_pool_connections=1)  # kept open, however many threads ask
    client = session.client("s3", endpoint_url=s3.endpoint_url, config=settings)
    for key, body in {"small": SMALL, "large": LARGE, **{f"names/{number}": b"" for number in range(3)}}.items():
        client.put_object(Bucket=BUCKET, Key=key, Body=body, ChecksumAlgorithm="CRC32")
    return client


@pytest.fixture(autouse=True)
def _temporary_credentials(monkeypatch):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", "testing")


@pytest.fixture(autouse=True)
def _hardly_any_back_off(monkeypatch):
    monkeypatch.setattr("torch_s3.transport.retry._CAP", 0.01)


@pytest.fixture(scope="module")
def bystander():
    """Read from a healthy server, over a connection that stays open."""
    gc.collect()
    gc.freeze()  # what is left to collect after each test is that test's, and soon done
    with Faults(objects={"/bucket/key": b"content"}) as server:
        fs = _filesystem(server, key="id", secret="secret", max_connections=1)
        yield lambda: fs.cat_file("bucket/key")
    gc.unfreeze()


def _filesystem(server, **settings):
    place = {"endpoint_url": server.endpoint_url, "region": "us-east-1"}
    return S3FileSystem(skip_instance_cache=True, **place | PATIENT | settings)


def _sockets():
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one of the listing itself
            found += str(descriptor.readlink()).startswith("socket:")
    return found


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(upstream, bystander):
    """After each test's server is gone, no connection and no thread is left, and others are still served.

    The bystander's second read also waits for the loop to have seen that the test's connections are closed.
    """
    bystander()
    sockets, threads = _sockets(), set(threading.enumerate())
    yield
    gc.collect()  # boto3's clients are cycles
    for _ in range(2):
        assert bystander() == b"content"
    assert _sockets() <= sockets
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
        assert not thread.is_alive(), thread


def _check(fs, upstream, operation, expected):
    """Run an operation: its outcome, and what it leaves on the server, must be as expected."""
    key = str(uuid.uuid4())
    run, _, read, written = OPERATIONS[operation]
    if expected == EXACT:
        assert run(fs, key) == read
    else:
        with pytest.raises(expected) as caught:
            run(fs, key)
        assert type(caught.value) is expected
    assert "Uploads" not in upstream.list_multipart_uploads(Bucket=BUCKET, Prefix=key)
    if written is not None:
        there = [entry["Key"] for entry in upstream.list_objects_v2(Bucket=BUCKET, Prefix=key).get("Contents", ())]
        assert there == [key] if expected == EXACT else there in ([], [key])
        for name in there:
            assert upstream.get_object(Bucket=BUCKET, Key=name)["Body"].read() == written


def _check_all(s3, upstream, fault, often, *, tls=None, **settings):
    """Let every operation meet a fault. They share no server or connection, so they can do it at once."""
    if fault.timing:  # even a busy server answers in time once in 20
        settings |= IMPATIENT | ({"attempts": 20} if often == "once" else {})

    def meet(operation, expected):
        struck = []

        def strike(exchange):
            struck.append(exchange)
            fault.behaviour(exchange)

        script = repeat(aim(OPERATIONS[operation].kind, in_turn(strike, serve) if often == "once" else strike))
        with Faults(script, upstream=s3.endpoint_url, tls=tls) as proxy:
            _check(_filesystem(proxy, **settings), upstream, operation, expected)
        assert struck

    outcomes = {operation: fault.outcome(often, operation) for operation in OPERATIONS}
    with ThreadPoolExecutor(len(outcomes)) as pool:
        met = {operation: pool.submit(meet, operation, what) for operation, what in outcomes.items() if what != NONE}
    failures = [failure for operation, future in met.items() if (failure := _noted(future.exception(), operation))]
    if failures:
        raise BaseExceptionGroup("not as expected", failures)


def _noted(failure, operation):
    if failure is not None:
        failure.add_note(f"operation: {operation}")
    return failure


@pytest.mark.parametrize("often", ["once", "always"])
@pytest.mark.parametrize("name", FAULTS)
def test_exact_or_the_right_error(s3, upstream, name, often):
    _check_all(s3, upstream, FAULTS[name], often)


def test_lost_answer_on_a_kept_connection_is_settled(s3, upstream):
    with Faults([serve, lose], upstream=s3.endpoint_url) as proxy:
        fs = _filesystem(proxy)
        fs.cat_file(f"{BUCKET}/small")

        _check(fs, upstream, "put if new", EXACT)


@pytest.mark.parametrize("fault", [reset, lose, answer(500)], ids=["reset", "lost", "500"])
def test_abort_that_fails_once_leaves_no_upload(s3, upstream, fault):
    behaviours = {"part": answer(403, "AccessDenied"), "abort": in_turn(fault, serve)}

    with Faults(
        repeat(lambda exchange: behaviours.get(exchange.kind, serve)(exchange)), upstream=s3.endpoint_url
    ) as proxy:
        _check(_filesystem(proxy), upstream, "part", AccessDenied)

        assert [method for method, _ in proxy.requests].count("DELETE") == 2


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("where", ["refused", "unknown", "tls cut"])
def test_unreachable_is_transfer_failed(upstream, where, operation):
    with Faults() as plain, socket.create_server(("127.0.0.1", 0)) as closed:
        endpoints = {
            "refused": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "unknown": "http://nowhere.invalid",
            "tls cut": f"https://127.0.0.1:{plain.port}",  # it hangs up on what is not HTTP
        }
        closed.close()
        _check(_filesystem(plain, endpoint_url=endpoints[where]), upstream, operation, TransferFailed)


@pytest.mark.parametrize("often", ["once", "always"])
@pytest.mark.parametrize("name", ["closed within the body", "stall within the body"])
def test_exact_or_the_right_error_over_tls(s3, upstream, certificate, name, often):
    _check_all(s3, upstream, FAULTS[name], often, tls=certificate[0], verify=certificate[1])


@pytest.mark.parametrize(
    "name", ["301 to another region", "307 to another host", "400 wrong region", "reset before the head"]
)
def test_what_is_sent_anew_is_signed_anew(rclone, name):  # by a server that looks
    bucket = rclone.create_bucket(str(uuid.uuid4()))
    with Faults([FAULTS[name].behaviour], upstream=rclone.endpoint_url) as proxy:
        fs = S3FileSystem(skip_instance_cache=True, **rclone.storage_options | {"endpoint_url": proxy.endpoint_url})
        fs.pipe_file(f"{bucket}/key", WRITTEN)

        assert fs.cat_file(f"{bucket}/key") == WRITTEN
        assert len(proxy.requests) == 3


def test_docs_have_the_tables_of_these_tests():
    docs = Path(__file__).parents[2] / "docs" / "reliability.md"

    assert table() in docs.read_text()
