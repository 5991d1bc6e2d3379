"""Reads and writes against a server that misbehaves: exact bytes or the right error, and nothing left behind."""

import gc
import os
import pickle
import socket
import threading
from contextlib import suppress
from itertools import repeat
from pathlib import Path

import pytest
from faults import Answer, Faults, answer, cut, edit, hold, refusal, reset, say, serve, serve_then_close, stall
from processes import in_child

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.transport import addresses as addresses_of
from torch_s3.transport.client import Client
from torch_s3.transport.objects import Get

MIB = 1024 * 1024
CONTENT = os.urandom(300_000)
OBJECTS = {"/bucket/key": CONTENT}


def _client(server, **settings):
    return Client(S3Config.from_storage_options(server.storage_options | settings))


def _fetch(client, start=0, stop=None, key="key", **pins):
    with client.batch() as batch:
        return bytes(batch.fetch("bucket", key, start=start, stop=stop, **pins).result())


def _read(server, *args, **settings):
    return _fetch(_client(server, **settings), *args)


def _read_into(server, start=0, length=300_000, part_size=None, **settings):
    buffer = bytearray(length)
    with _client(server, **settings).batch() as batch:
        batch.wait_whole(batch.get_into("bucket", "key", start, memoryview(buffer), part_size=part_size))
    return bytes(buffer)


def _write(server, body, **settings):
    with _client(server, **settings).batch() as batch:
        batch.wait(batch.put("bucket", "new", memoryview(body)))


def _sockets():
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one of the listing itself
            found += str(descriptor.readlink()).startswith("socket:")
    return found


@pytest.fixture(scope="module")
def bystander():
    """Read from a healthy server, over a connection that stays open."""
    with Faults(objects=OBJECTS) as server:
        client = _client(server, max_connections=1)
        yield lambda: _fetch(client)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(bystander):
    """After each test's server is gone, others are still served, and no connection is left.

    The bystander's second read also waits for the loop to have seen that the test's connections are closed.
    """
    assert bystander() == CONTENT
    before = _sockets()
    yield
    assert bystander() == CONTENT
    assert _sockets() <= before


# ---------------------------------------------------------------------- what passes


@pytest.mark.parametrize(
    "fault",
    [
        reset,
        cut(0.5),
        cut(1, 0),
        cut(1, 0.5),
        cut(1, 0.5, then=lambda exchange: exchange.close()),
        cut(0.5, then=lambda exchange: exchange.close()),
        say(),
        say(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
        say(b"HTTP/1.1 what\r\n\r\n"),
        answer(500, "InternalError"),
        answer(502),
        answer(503, "SlowDown"),
        answer(504),
        answer(429),
        answer(400, "RequestTimeout"),
    ],
    ids=[
        "reset before the head",
        "reset within the head",
        "reset after the head",
        "reset within the body",
        "closed within the body",
        "closed within the head",
        "closed before the head",
        "not HTTP",
        "no status",
        "500",
        "502",
        "503",
        "504",
        "429",
        "RequestTimeout",
    ],
)
def test_failure_that_passes_is_not_noticed(fault):
    with Faults([fault], objects=OBJECTS) as server:
        assert _read_into(server, attempts=2) == CONTENT
        assert len(server.requests) == 2


def test_failed_write_is_sent_again_whole():
    with Faults([cut(0), answer(500)]) as server:
        _write(server, CONTENT, attempts=3)

        assert server.objects == {"/bucket/new": CONTENT}


def test_only_the_failed_range_is_asked_for_again():
    with Faults([serve, reset, serve], objects=OBJECTS) as server:
        assert _read_into(server, part_size=100_000, attempts=2) == CONTENT
        assert len(server.requests) == 4


def test_stalled_read_is_tried_again():
    with Faults([stall, cut(1, 0.5, then=stall)], objects=OBJECTS) as server:
        assert _read_into(server, attempts=20, first_byte_timeout=0.3, read_timeout=0.3) == CONTENT


# ---------------------------------------------------------------------- what doesn't


def _closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_refused_connection_is_transfer_failed():
    client = Client(S3Config(key="id", secret="secret", endpoint_url=f"http://127.0.0.1:{_closed_port()}", attempts=2))

    with pytest.raises(errors.TransferFailed, match=r"^s3://bucket/key: .*refused \(attempt 2 of 2, ") as caught:
        _fetch(client)

    assert (caught.value.uri, caught.value.attempts) == ("s3://bucket/key", 2)


def test_each_address_of_a_host_is_tried(monkeypatch):
    with Faults(repeat(edit(Connection="close")), objects=OBJECTS) as server:
        addresses = [(socket.AF_INET, ("127.0.0.1", port)) for port in (_closed_port(), server.port)]
        monkeypatch.setattr(addresses_of, "lookup", lambda *_: list(addresses))
        client = _client(server, attempts=1)
        for _ in range(3):  # they take turns to come first
            assert _fetch(client) == CONTENT


def test_names_are_looked_up():
    with Faults(objects=OBJECTS) as server:
        assert _read(server, endpoint_url=server.endpoint_url.replace("127.0.0.1", "localhost")) == CONTENT


def test_unknown_host_is_transfer_failed_and_named():
    client = Client(S3Config(key="id", secret="secret", endpoint_url="http://nowhere.invalid", attempts=1))

    with pytest.raises(errors.TransferFailed, match=r"nowhere\.invalid"):
        _fetch(client)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (reset, errors.TransferFailed, "reset"),
        (cut(0.5), errors.TransferFailed, "reset"),
        (
            cut(1, 0.5, then=lambda exchange: exchange.close()),
            errors.TransferFailed,
            "75000 bytes before the answer's end",
        ),
        (say(), errors.TransferFailed, "closed the connection before it answered"),
        (say(os.urandom(100) + b"\r\n\r\n"), errors.TransferFailed, "not HTTP"),
        (say(b"HTTP/1.1 200 OK\r\n" + b"x-long: long\r\n" * (MIB // 14)), errors.TransferFailed, "head is longer"),
        (answer(500, "InternalError"), errors.TransferFailed, "InternalError: because"),
        (answer(502), errors.TransferFailed, "HTTP 502"),
        (answer(503, "SlowDown"), errors.Throttled, "SlowDown: because"),
        (answer(503), errors.Throttled, "HTTP 503"),
    ],
    ids=[
        "reset",
        "reset within the head",
        "closed within the body",
        "closed before the head",
        "not HTTP",
        "endless head",
        "500",
        "502",
        "SlowDown",
        "503",
    ],
)
def test_failure_that_lasts_is_a_typed_error_with_its_attempts(fault, kind, words):
    with (
        Faults(repeat(fault), objects=OBJECTS) as server,
        pytest.raises(kind, match=rf"^s3://bucket/key bytes 0-299999: .*{words}.* \(attempt 2 of 2, ") as caught,
    ):
        _read_into(server, attempts=2)

    assert type(caught.value) is kind
    assert (caught.value.range, caught.value.attempts) == ((0, 300_000), 2)
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", [stall, cut(1, 0.5, then=stall)], ids=["before the head", "within the body"])
def test_stall_that_lasts_is_deadline_exceeded(fault):
    with (
        Faults(repeat(fault), objects=OBJECTS) as server,
        pytest.raises(errors.DeadlineExceeded, match=r"no progress for 0.3 s \(attempt 2 of 2, ") as caught,
    ):
        _read_into(server, attempts=2, first_byte_timeout=0.3, read_timeout=0.3)

    assert (caught.value.range, caught.value.attempts) == ((0, 300_000), 2)


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (404, "NoSuchKey", errors.NotFound, "^s3://bucket/key: no such key"),
        (404, "NoSuchBucket", errors.NotFound, "^s3://bucket: no such bucket"),
        (404, "", errors.NotFound, "^s3://bucket/key: no such key"),
        (403, "AccessDenied", errors.AccessDenied, "because: check the credentials"),
        (403, "SignatureDoesNotMatch", errors.AccessDenied, "because: check the credentials"),
        (403, "InvalidAccessKeyId", errors.AccessDenied, "because: check the credentials"),
        (400, "ExpiredToken", errors.CredentialsExpired, "renew the credentials"),
        (416, "InvalidRange", errors.IntegrityError, "past the object's end"),
        (301, "PermanentRedirect", errors.S3Error, "set endpoint_url or AWS_REGION"),
        (501, "NotImplemented", errors.S3Error, "501 NotImplemented: because"),
        (418, "", errors.S3Error, "418 HTTP 418: because"),
    ],
)
def test_refusal_is_a_typed_error_at_once(status, code, kind, words):
    with (
        Faults(repeat(answer(status, code)), objects=OBJECTS) as server,
        pytest.raises(kind, match=words) as caught,
    ):
        _read_into(server)

    assert type(caught.value) is kind
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["region", "other endpoint"])
def test_bucket_elsewhere_is_followed(fault):
    with Faults(objects=OBJECTS) as other:
        where = {
            "region": answer(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1"),
            "other endpoint": answer(307, "TemporaryRedirect", location=f"{other.endpoint_url}/bucket/key"),
        }
        with Faults([where[fault]], objects=OBJECTS) as server:
            client = _client(server)
            assert _fetch(client) == CONTENT
            assert _fetch(client) == CONTENT

            elsewhere = fault != "region"
            assert len(server.requests) == (1 if elsewhere else 3)
            assert client.target("bucket", "s3://bucket").region == ("us-east-1" if elsewhere else "eu-west-1")


def test_bucket_that_is_always_elsewhere_is_an_error_that_names_the_region_to_set():
    fault = answer(307, "TemporaryRedirect", x_amz_bucket_region="eu-west-1")

    with Faults(repeat(fault)) as server, pytest.raises(errors.S3Error, match="AWS_REGION=eu-west-1"):
        _read(server)


def test_connection_goes_on_after_a_refusal():
    with Faults([answer(404, "NoSuchKey"), answer(403), answer(503)], objects=OBJECTS) as server:
        client = _client(server)
        for kind in (errors.NotFound, errors.AccessDenied):
            with pytest.raises(kind):
                _fetch(client)

        assert _fetch(client) == CONTENT


def test_write_refused_before_it_was_received_is_a_typed_error():
    def refuse_then_read(exchange):  # a server that closed here instead might reset its own answer away
        said = refusal(403, "AccessDenied")
        exchange.send(said.head, said.body)
        exchange.wait_for_client_to_leave()

    with Faults([refuse_then_read]) as server, pytest.raises(errors.AccessDenied):
        _write(server, bytes(32 * MIB))


def test_write_that_succeeds_before_it_was_received_is_an_error():  # it may be a page that greets whoever comes
    def greet(exchange):
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        exchange.wait_for_client_to_leave()

    with Faults([greet]) as server, pytest.raises((errors.TransferFailed, errors.IntegrityError)):
        _write(server, bytes(32 * MIB), attempts=1)


def test_plain_http_where_tls_was_expected_is_transfer_failed():
    with Faults() as server, pytest.raises(errors.TransferFailed):
        _read(server, endpoint_url=server.endpoint_url.replace("http:", "https:"), attempts=2)


# ---------------------------------------------------------------------- answers that are not what was asked for


@pytest.mark.parametrize(
    "fault",
    [
        edit(Content_Length="299999"),
        edit(Content_Length="300001", body=lambda body: body + b"?"),
        edit(Content_Length=None),
        edit(Content_Length="many"),
        edit(Content_Length="-1"),
        edit(Content_Length="²"),
        edit(Content_Length="9" * 5000),
        edit(Content_Range=None),
        edit(Content_Range="bytes 1-300000/400000"),
        edit(Content_Range="bytes 0-299998/300000"),
        edit(Content_Range="bytes 0-300000/400000"),
        edit(Content_Range="bytes */300000"),
        edit(Content_Range="bytes 0-299999/*"),
        edit(Content_Range="all of it"),
    ],
    ids=[
        "shorter",
        "longer",
        "of no length",
        "of a length that is no number",
        "of negative length",
        "of a length in odd digits",
        "of absurd length",
        "206 without Content-Range",
        "shifted",
        "less than the range",
        "more than the range",
        "no range",
        "of an object of unknown size",
        "of an unreadable range",
    ],
)
def test_answer_that_is_not_the_range_is_an_error(fault):
    with (
        Faults(repeat(fault), objects={"/bucket/key": CONTENT + CONTENT}) as server,
        pytest.raises((errors.IntegrityError, errors.TransferFailed), match=r"^s3://bucket/key bytes 0-299999: "),
    ):
        _read_into(server, attempts=1)


def _whole_object(exchange):
    """Ignore the range, which HTTP allows."""
    right = exchange.answer()
    content = exchange.server.objects["/bucket/key"]
    whole = Answer(200, {"ETag": right.fields["ETag"], "Content-Length": str(len(content))}, content)
    exchange.send(whole.head, whole.body)


def test_ignored_range_is_never_returned_as_the_range():
    with Faults(repeat(_whole_object), objects=OBJECTS) as server, pytest.raises(errors.IntegrityError):
        _read_into(server, length=10)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (5, 10), (5, None), (299_999, 300_001)])
def test_ignored_range_is_never_fetched_as_the_range(start, stop):
    with Faults(repeat(_whole_object), objects=OBJECTS) as server, suppress(errors.IntegrityError):
        assert _read(server, start, stop) == CONTENT[start:stop]


def test_ignored_range_of_a_whole_object_is_the_object():
    with Faults(repeat(_whole_object), objects=OBJECTS) as server:
        assert _read(server) == CONTENT
        assert _read(server, 0, 10**6) == CONTENT


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 10), (5, 10), (5, None), (299_999, 300_001), (300_000, 9**9)]
)
def test_range_answered_with_status_200_and_content_range_is_accepted(start, stop):
    with Faults(repeat(edit(status=200)), objects=OBJECTS) as server:
        if start < len(CONTENT):
            assert _read(server, start, stop) == CONTENT[start:stop]


def test_object_replaced_between_ranges_is_an_error():
    def replace(exchange):
        exchange.server.objects["/bucket/key"] = CONTENT[::-1]
        serve(exchange)

    with Faults([serve, replace], objects=dict(OBJECTS)) as server, pytest.raises(errors.ObjectChanged):
        _read_into(server, part_size=150_000, max_connections=1)


def test_object_replaced_within_a_fetch_is_an_error():
    content = os.urandom(6 * MIB)

    def replace(exchange):
        exchange.server.objects["/bucket/key"] = content[::-1]
        serve(exchange)

    with Faults([serve, replace], objects={"/bucket/key": content}) as server, pytest.raises(errors.ObjectChanged):
        _read(server, part_size=5 * MIB)


def test_other_etag_than_the_pinned_one_is_an_error():  # from a server that ignores If-Match
    with Faults(objects=OBJECTS) as server, pytest.raises(errors.ObjectChanged, match="expected other"):
        _fetch(_client(server), etag="other")


def test_failed_if_match_is_an_error():
    with Faults([answer(412, "PreconditionFailed")]) as server, pytest.raises(errors.ObjectChanged, match="other"):
        _fetch(_client(server), etag="other")


@pytest.mark.parametrize("size", [299_999, 300_001])
def test_other_size_than_the_listed_one_is_an_error(size):
    with Faults(objects=OBJECTS) as server, pytest.raises(errors.ObjectChanged):
        _fetch(_client(server), size=size)


def test_chunked_answer_is_never_data():
    chunks = b"5\r\nhello\r\n0\r\n\r\n"
    fault = say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunks)

    with Faults(repeat(fault)) as server, pytest.raises((errors.IntegrityError, errors.TransferFailed)):
        _read(server, attempts=1)


def test_chunks_are_never_data_when_there_is_a_length_too():
    chunks = b"5\r\nhello\r\n0\r\n\r\n"
    fault = say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 15\r\n\r\n", chunks)

    with Faults(repeat(fault)) as server, pytest.raises((errors.IntegrityError, errors.TransferFailed)):
        _read(server, attempts=1)


def test_bytes_after_an_answer_are_not_the_next_answer():
    forged = Answer(200, {"Content-Length": str(len(CONTENT))}, bytes(len(CONTENT)))

    def say_too_much(exchange):
        right = exchange.answer()
        exchange.send(right.head, right.body[:-10], right.body[-10:] + forged.head, forged.body)

    def serve_on_a_fresh_connection(exchange):
        (stall if exchange.number else serve)(exchange)

    with (
        Faults([say_too_much, serve_on_a_fresh_connection], objects=OBJECTS) as server,
        _client(server, max_connections=1, attempts=2).batch() as batch,
    ):
        fetches = [batch.fetch("bucket", "key", size=len(CONTENT)) for _ in range(2)]

        assert [bytes(fetch.result()) == CONTENT for fetch in fetches] == [True, True]


# ---------------------------------------------------------------------- HTTP, as servers write it


def test_interim_answers_are_passed_over():
    def continue_first(exchange):
        exchange.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n")
        serve(exchange)

    with Faults([continue_first] * 2, objects=dict(OBJECTS)) as server:
        assert _read(server, attempts=1) == CONTENT
        _write(server, b"body", attempts=1)

        assert server.objects["/bucket/new"] == b"body"


def test_answer_may_come_byte_by_byte():
    def dribble(exchange):
        right = exchange.answer()
        for byte in right.head + right.body:
            exchange.send(bytes([byte]))

    with Faults([dribble], objects={"/bucket/key": b"content"}) as server:
        assert _read(server, attempts=1) == b"content"


@pytest.mark.parametrize(
    "fields",
    [
        b"content-length:7\r\nETAG:w\r\n",
        b'CONTENT-LENGTH:    7   \r\nEtAg: W/"w"\r\n',
        b'X-Content-Length: 9\r\nContent-Length: 7\r\nEtag: "w"\r\n',
    ],
)
def test_header_fields_are_read_as_http_has_them(fields):
    with Faults([say(b"HTTP/1.1 200 \r\n" + fields + b"\r\ncontent")], objects=OBJECTS) as server:
        assert _fetch(_client(server, attempts=1), etag="w") == b"content"


@pytest.mark.parametrize(
    "chunks",
    [
        [b"<Error><Code>ExpiredToken</Code></Error>"],
        [b"<Error><Code>Expired", b"Token</Code></Error>"],
        [bytes([byte]) for byte in b"<Error><Code>ExpiredToken</Code></Error>"],
    ],
    ids=["one chunk", "two", "many"],
)
@pytest.mark.parametrize("trailer", [b"", b"x-amz-trailer: some\r\n"], ids=["", "with trailer"])
def test_chunked_error_is_understood(chunks, trailer):
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)

    def refuse(exchange):
        exchange.send(
            b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n", body, b"0\r\n", trailer, b"\r\n"
        )

    with Faults([refuse], objects=OBJECTS) as server:
        client = _client(server, attempts=1, read_timeout=3)
        with pytest.raises(errors.CredentialsExpired):
            _fetch(client)

        assert _fetch(client) == CONTENT


@pytest.mark.parametrize("size", [b"-6", b"-7", b"zz", b"", b"f" * 20])
def test_unreadable_chunks_are_transfer_failed(size):
    chunked = say(b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n", size, b"\r\nhello\r\n0\r\n\r\n")

    def read():
        with Faults(repeat(chunked)) as server, pytest.raises(errors.TransferFailed):
            _read(server, attempts=1)

    assert in_child(read) == 0  # where a thread that spins stops nobody else


def test_error_that_ends_with_its_connection_is_understood():
    fault = say(b"HTTP/1.1 403 Forbidden\r\n\r\n<Error><Code>AccessDenied</Code></Error>")

    with Faults([fault]) as server, pytest.raises(errors.AccessDenied):
        _read(server, attempts=1)


def test_error_of_another_makers_page_is_understood():
    page = b"<html>" + b"<p>Forbidden</p>" * 5000
    fault = say(b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(page), page)

    with Faults([fault]) as server, pytest.raises(errors.AccessDenied, match="HTTP 403"):
        _read(server, attempts=1)


def test_connections_are_kept_for_the_next_request():
    with Faults(objects=dict(OBJECTS)) as server:
        client = _client(server, max_connections=1)
        for _ in range(5):
            assert _fetch(client) == CONTENT
        with client.batch() as batch:
            batch.wait(batch.put("bucket", "new", memoryview(b"body")))

        assert server.connections == 1


def test_connections_are_no_more_than_the_limit():
    with Faults(objects=OBJECTS) as server:
        assert _read_into(server, part_size=5_000, max_connections=3) == CONTENT
        assert len(server.requests) == 60
        assert server.connections <= 3


@pytest.mark.parametrize(
    "fault", [edit(Connection="close"), edit(version="1.0")], ids=["Connection: close", "HTTP/1.0"]
)
def test_connection_is_not_used_again_where_the_server_says_so(fault):
    def and_close(exchange):
        fault(exchange)
        exchange.close()

    with Faults(repeat(and_close), objects=OBJECTS) as server:
        client = _client(server, attempts=1, max_connections=1)
        for _ in range(3):
            assert _fetch(client) == CONTENT

        assert server.connections == 3


def test_http_1_0_connection_is_kept_where_the_server_says_so():
    with Faults(repeat(edit(version="1.0", Connection="keep-alive")), objects=OBJECTS) as server:
        client = _client(server, attempts=1)
        for _ in range(3):
            assert _fetch(client) == CONTENT

        assert server.connections == 1


def test_idle_connection_closed_by_the_server_counts_as_no_attempt():
    with Faults([serve_then_close] * 3, objects=OBJECTS) as server:
        client = _client(server, attempts=1)
        for _ in range(4):
            assert _fetch(client) == CONTENT


def test_idle_connection_reset_at_the_next_request_counts_as_no_attempt():
    with Faults([serve, reset, serve, reset], objects=dict(OBJECTS)) as server:
        client = _client(server, attempts=1)
        assert _fetch(client) == CONTENT
        assert _fetch(client) == CONTENT
        with client.batch() as batch:
            batch.wait(batch.put("bucket", "new", memoryview(CONTENT)))

        assert server.objects["/bucket/new"] == CONTENT


@pytest.mark.parametrize("ending", ["closed", "told"])
def test_idle_connection_over_tls_that_the_server_ended_counts_as_no_attempt(certificate, ending):
    def end(exchange):
        serve(exchange)
        if ending == "told":
            with suppress(OSError, ValueError):  # the latter where the server has ended meanwhile
                exchange.sock.settimeout(0)
                exchange.sock.unwrap()  # tells the client, which never answers
            with suppress(OSError):
                exchange.sock.settimeout(None)
        exchange.close()

    with Faults([end] * 20, objects=OBJECTS, tls=certificate[0]) as server:
        client = _client(server, attempts=1, verify=certificate[1], max_connections=1)
        with client.batch() as batch:
            fetches = [batch.fetch("bucket", "key") for _ in range(20)]

            assert all(fetch.result() == CONTENT for fetch in fetches)


@pytest.mark.parametrize("ending", ["closed", "reset"])
def test_connection_over_tls_that_ends_at_the_next_write_counts_as_no_attempt(certificate, ending):
    def end(exchange):
        exchange.close(reset=ending == "reset")

    body = memoryview(CONTENT * 20)
    with Faults([serve, end] * 3, objects=dict(OBJECTS), tls=certificate[0]) as server:
        client = _client(server, attempts=1, verify=certificate[1])
        for _ in range(3):
            assert _fetch(client) == CONTENT
            with client.batch() as batch:
                batch.wait(batch.put("bucket", "new", body))

        assert server.objects["/bucket/new"] == body


def test_fresh_connection_that_is_reset_does_count():
    with Faults(repeat(reset), objects=OBJECTS) as server, pytest.raises(errors.TransferFailed, match="attempt 3 of 3"):
        _read(server, attempts=3)

    assert len(server.requests) == 3


# ---------------------------------------------------------------------- many at once


def test_failed_transfer_leaves_the_others_of_its_batch_alone():
    with Faults(objects=OBJECTS) as server, _client(server).batch() as batch:
        fetches = [batch.fetch("bucket", key) for key in ("key", "missing", "key")]

        assert fetches[0].result() == CONTENT
        with pytest.raises(errors.NotFound, match="s3://bucket/missing"):
            fetches[1].result()
        assert fetches[2].result() == CONTENT


def test_results_may_be_taken_in_any_order_and_twice():
    with Faults(objects={f"/bucket/{i}": b"%d" % i for i in range(20)}) as server, _client(server).batch() as batch:
        fetches = [batch.fetch("bucket", str(i)) for i in range(20)]

        for i in [*reversed(range(20)), *range(20)]:
            assert fetches[i].result() == b"%d" % i


def test_results_that_were_taken_are_not_kept():
    def kept():
        return sum(type(thing) is Get for thing in gc.get_objects())

    with Faults(objects=OBJECTS) as server:
        client = _client(server, max_connections=1)
        gc.collect()
        before = kept()  # other tests' own
        with client.batch() as batch:
            for _ in range(50):
                fetch = batch.fetch("bucket", "key")
                batch.start()
                _fetch(client)  # over the same connection, so that the fetch is finished before it is asked for
                assert fetch.result() == CONTENT
            del fetch

            assert kept() < before + 20


def test_threads_share_a_client():
    objects = {f"/bucket/{i}": os.urandom(50_000) for i in range(8)}
    wrong = []

    def read(i):
        wrong.extend(i for _ in range(10) if _fetch(client, key=str(i)) != objects[f"/bucket/{i}"])

    with Faults(objects=objects) as server:
        client = _client(server, max_connections=4)
        threads = [threading.Thread(target=read, args=[i]) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert wrong == []
    assert len(server.requests) == 80


def test_client_pickles_without_what_it_found(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDCANARY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRETCANARY")
    with Faults(objects=OBJECTS) as server:
        client = Client(S3Config(endpoint_url=server.endpoint_url))
        assert _fetch(client) == CONTENT
        pickled = pickle.dumps(client)

        assert b"CANARY" not in pickled
        assert _fetch(pickle.loads(pickled)) == CONTENT


def test_new_credentials_are_used_as_soon_as_they_are_there(monkeypatch):
    seen = []

    def look(exchange):
        seen.append(exchange.fields["authorization"].split("/")[0])
        serve(exchange)

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with Faults([look, look], objects=OBJECTS) as server:
        for name in ("first", "second"):
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", name)
            _fetch(Client(S3Config(endpoint_url=server.endpoint_url)))

    assert seen == ["AWS4-HMAC-SHA256 Credential=first", "AWS4-HMAC-SHA256 Credential=second"]


# ---------------------------------------------------------------------- writing


@pytest.mark.parametrize("size", [0, 1, 70_000, 20 * MIB])
def test_written_bytes_arrive(size):
    body = os.urandom(size)
    with Faults() as server:
        _write(server, body)

        assert server.objects == {"/bucket/new": body}


def test_refused_condition_is_already_exists():
    with Faults([answer(412, "PreconditionFailed")]) as server, _client(server).batch() as batch:
        put = batch.put("bucket", "key", memoryview(b"body"), only_new=True)
        with pytest.raises(errors.AlreadyExists):
            batch.wait(put)


def test_write_answered_with_less_than_success_is_an_error():
    with Faults([answer(202)]) as server, pytest.raises(errors.S3Error, match="202"):
        _write(server, b"body")


# ---------------------------------------------------------------------- leaving early


@pytest.mark.parametrize(
    "fault",
    [
        hold,
        lambda event: cut(1, 0.5, then=hold(event, then=lambda exchange: exchange.send(CONTENT))),
    ],
    ids=["before the head", "within the body"],
)
def test_nothing_writes_to_the_buffer_after_its_batch_is_left(fault, bystander):
    go_on = threading.Event()
    buffer = bytearray(len(CONTENT))
    with Faults([fault(go_on)], objects=OBJECTS) as server:
        client = _client(server)
        client.target("bucket", "s3://bucket")  # what botocore leaves behind at first would hold the frames below
        with client.batch() as batch:
            batch.get_into("bucket", "key", 0, memoryview(buffer))
            batch.start()
            server.wait_for_requests(1)
        then = bytes(buffer)
        go_on.set()
        bystander()

    assert bytes(buffer) == then
    del buffer[:]  # no view of it is left: this would be a BufferError


def test_leaving_a_batch_cancels_what_waits_for_a_connection():
    with Faults(repeat(stall), objects=OBJECTS) as server:
        with _client(server, max_connections=2).batch() as batch:
            for _ in range(50):
                batch.fetch("bucket", "key")
            batch.start()
            server.wait_for_requests(2)

        assert len(server.requests) == 2


def test_leaving_a_batch_cancels_what_waits_to_be_tried_again():
    with Faults(repeat(answer(503)), objects=OBJECTS) as server:
        with _client(server, attempts=1000).batch() as batch:
            waiting = batch.get("bucket", "key")
            batch.start()
            server.wait_for_requests(2)

        before = len(server.requests)
        assert waiting.finished  # so that nobody tries it again
        assert "cancelled" in str(waiting.error)
        assert len(server.requests) == before


def test_batch_that_was_never_started_sends_nothing():
    with Faults(objects=OBJECTS) as server:
        with _client(server).batch() as batch:
            batch.fetch("bucket", "key")

        assert server.requests == []


def test_exception_in_the_block_cancels_and_passes():
    with Faults([stall], objects=OBJECTS) as server, pytest.raises(ZeroDivisionError), _client(server).batch() as batch:
        batch.fetch("bucket", "key")
        batch.start()
        server.wait_for_requests(1)
        raise ZeroDivisionError


def test_transfers_of_other_batches_survive_a_cancel():
    go_on = threading.Event()
    with Faults([stall, hold(go_on)], objects=OBJECTS) as server:
        client = _client(server)
        with client.batch() as left:
            left.fetch("bucket", "key")
            left.start()
            server.wait_for_requests(1)
            with client.batch() as stays:
                fetch = stays.fetch("bucket", "key")
                stays.start()
                server.wait_for_requests(2)
                left.close()
                go_on.set()

                assert fetch.result() == CONTENT
