"""boto3 in the I/O thread's place: the same promise, and the same answers, also through a proxy."""

import base64
import contextlib
import gc
import hashlib
import http.client
import http.server
import os
import socket
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import repeat
from queue import SimpleQueue
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from faults import Faults, answer, clock, cut, drip, edit, hold, reset, serve, stall
from processes import in_child
from servers import running

from torch_s3 import S3FileSystem, errors
from torch_s3.config import S3Config
from torch_s3.transport.client import Client
from torch_s3.transport.fallback import Fallback
from torch_s3.transport.fields import headers_for
from torch_s3.transport.objects import Get, Put

CONTENT = os.urandom(300_000)
PART = 5 * 1024 * 1024
OBJECTS = {"/bucket/key": CONTENT}


class Carrier:
    """A fallback and the transfers that are submitted to it."""

    def __init__(self, server, **settings):
        self.config = S3Config.from_storage_options(server.storage_options | settings)
        self.client = Client(self.config)
        self.fallback = Fallback(self.config)
        self.sink = SimpleQueue()

    def submit(self, kind, bucket, key, *args, **settings):
        fields = headers_for(self.config)
        target = self.client.target(bucket, f"s3://{bucket}/{key}")
        target = target._replace(get_fields=fields.get, put_fields=fields.put, part_fields=fields.part)
        transfer = kind(target, bucket, key, self.sink, *args, **settings)
        self.fallback.submit([transfer])
        return transfer

    def carry(self, *args, **settings):
        transfer = self.submit(*args, **settings)
        assert self.sink.get(timeout=60) == [transfer]
        assert transfer.finished
        assert self.sink.empty()
        if transfer.error is not None:
            raise transfer.error
        return transfer

    def get(self, bucket="bucket", key="key", **settings):
        return self.carry(Get, bucket, key, **settings)

    def put(self, bucket, key, content, **settings):
        return self.carry(Put, bucket, key, memoryview(content), algorithm="crc32", **settings)


class Proxy(http.server.BaseHTTPRequestHandler):
    """An HTTP forward proxy (RFC 9112, 3.2.2)."""

    protocol_version = "HTTP/1.1"

    def forward(self):
        self.server.forwarded.append((self.command, self.path))
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        fields = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        left = http.client.HTTPException, OSError  # either end, when a transfer is cancelled
        with (
            contextlib.closing(http.client.HTTPConnection(url.hostname, url.port)) as upstream,
            contextlib.suppress(*left),
        ):
            upstream.request(self.command, url._replace(scheme="", netloc="").geturl(), body, fields)
            said = upstream.getresponse()
            content = said.read()
            self.send_response_only(said.status, said.reason)
            for name, value in said.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815 - the names that the base class calls

    def log_message(self, *_):
        pass


@pytest.fixture
def proxy(monkeypatch):
    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)) as server:
        server.forwarded = []
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
        yield server


@pytest.fixture
def name(bucket):
    return bucket.removeprefix("s3://")


# ---------------------------------------------------------------------- through a proxy


def test_objects_go_through_the_proxy(s3, name, proxy):
    carrier = Carrier(s3)
    assert carrier.client.own("s3://bucket").account.needs_boto3(name) == "HTTP_PROXY is set"
    carrier.put(name, "folder/a key", CONTENT)
    buffer = bytearray(1000)

    part = carrier.get(name, "folder/a key", start=500, stop=1500, into=memoryview(buffer))
    whole = carrier.get(name, "folder/a key")

    assert buffer == CONTENT[500:1500]
    assert whole.buffer == CONTENT
    assert part.size == whole.size == len(CONTENT)
    assert part.answer_etag == whole.answer_etag
    url = f"{s3.endpoint_url}/{name}/folder/a%20key"
    assert proxy.forwarded == [("PUT", url), ("GET", url), ("GET", url)]


def test_upload_by_parts_goes_through_the_proxy(s3, name, proxy):
    carrier, where = Carrier(s3), {"Bucket": name, "Key": "key"}
    boto3 = carrier.client.own("s3://bucket").account.client
    upload = boto3.create_multipart_upload(**where, ChecksumAlgorithm="CRC32")["UploadId"]
    pieces = [os.urandom(5 * 1024 * 1024), b"the end"]
    parts = [carrier.put(name, "key", piece, part=(upload, number)) for number, piece in enumerate(pieces, start=1)]
    listed = [
        {"PartNumber": number, "ETag": part.answer_etag, "ChecksumCRC32": part.checksum}
        for number, part in enumerate(parts, start=1)
    ]
    boto3.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": listed})

    assert carrier.get(name, "key").buffer == b"".join(pieces)
    assert len(proxy.forwarded) == 5


def test_errors_come_through_the_proxy(s3, name, proxy):
    with pytest.raises(errors.NotFound, match=f"^s3://{name}/nothing: no such key"):
        Carrier(s3).get(name, "nothing")


def test_unreachable_proxy_is_an_error_that_names_it_without_its_password(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://user:CANARY@127.0.0.1:9")
    with Faults(objects=OBJECTS) as server, pytest.raises(errors.TransferFailed, match=r"127\.0\.0\.1:9") as caught:
        Carrier(server, attempts=1).get()

    assert "CANARY" not in str(caught.value)


def test_cancelled_transfer_leaves_the_proxy(s3, name, proxy):
    go_on = threading.Event()
    with Faults([hold(go_on)], objects=OBJECTS) as server:
        carrier = Carrier(server)
        transfer = carrier.submit(Get, "bucket", "key")
        server.wait_for_requests(1)
        carrier.fallback.cancel([transfer])
        go_on.set()

        assert carrier.sink.get(timeout=60) == [transfer]
    assert "cancelled" in str(transfer.error)


class Tunnels(http.server.BaseHTTPRequestHandler):
    """A proxy that connects (RFC 9110, 9.3.6), and sees nothing of what is said."""

    def do_CONNECT(self):
        self.server.asked.append((self.path, self.headers.get("proxy-authorization")))
        if self.server.refuses:
            self.send_error(407)
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self.send_response_only(200)
            self.end_headers()
            back = threading.Thread(target=self.pass_on, args=[upstream, self.connection])
            back.start()
            self.pass_on(self.connection, upstream)
            back.join()

    def pass_on(self, source, target):
        with contextlib.suppress(OSError):
            while piece := source.recv(64 * 1024):
                target.sendall(piece)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def log_message(self, *_):
        pass


@pytest.fixture
def tunnels(monkeypatch):
    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tunnels)) as server:
        server.asked, server.refuses = [], False
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:CANARY@127.0.0.1:{server.server_port}")
        yield server


def test_all_goes_over_tls_through_a_proxy_that_connects(rclone_tls, tunnels, tmp_path):
    fs = S3FileSystem(**rclone_tls.storage_options, part_size=PART)
    bucket = rclone_tls.create_bucket(os.urandom(8).hex())
    content = os.urandom(2 * PART + 1)
    fs.pipe({f"{bucket}/small": b"content", f"{bucket}/large": content})

    assert fs.cat(f"{bucket}/*") == {f"{bucket[5:]}/small": b"content", f"{bucket[5:]}/large": content}
    fs.get(f"{bucket}/large", str(tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == content
    fs.cp(f"{bucket}/large", f"{bucket}/copy")
    assert fs.du(bucket) == 2 * len(content) + 7
    fs.rm([f"{bucket}/large", f"{bucket}/small"])
    assert fs.find(bucket) == [f"{bucket[5:]}/copy"]
    where = rclone_tls.endpoint_url.removeprefix("https://")
    assert set(tunnels.asked) == {(where, f"Basic {base64.b64encode(b'user:CANARY').decode()}")}
    assert fs.stats()["bytes_received"] >= 2 * len(content)


def test_certificate_is_checked_through_a_proxy_that_connects(rclone_tls, tunnels):
    fs = S3FileSystem(**rclone_tls.storage_options | {"client_kwargs": {}}, attempts=1)
    for use in (fs.cat_file, fs.info, fs.ls):
        with pytest.raises(errors.TransferFailed, match="AWS_CA_BUNDLE"):
            use("s3://bucket/key")


def test_proxy_that_refuses_is_an_error_without_its_password(rclone_tls, tunnels, caplog):
    caplog.set_level("DEBUG", "torch_s3")
    tunnels.refuses = True
    fs = S3FileSystem(**rclone_tls.storage_options, attempts=2)
    for use in (fs.cat_file, fs.info, lambda path: fs.pipe_file(path, b"")):
        with pytest.raises(errors.TransferFailed, match=r"^s3://bucket/key: .*proxy") as caught:
            use("s3://bucket/key")
        assert "CANARY" not in str(caught.value) + repr(caught.value) + caplog.text


# ---------------------------------------------------------------------- as the transport itself


def test_objects_go_over_tls(rclone_tls):
    rclone_tls.create_bucket("fallback")
    carrier = Carrier(rclone_tls)
    carrier.put("fallback", "key", CONTENT)

    assert carrier.get("fallback", "key").buffer == CONTENT


def test_open_end_is_clipped():
    with Faults(objects=OBJECTS) as server:
        get = Carrier(server).get(start=299_000, stop=400_000, open_end=True)

    assert (get.buffer, get.size) == (CONTENT[299_000:], 300_000)


def test_nothing_is_read_of_an_empty_object():
    with Faults(objects={"/bucket/key": b""}) as server:
        get = Carrier(server).get(start=0, stop=10, open_end=True)

    assert get.buffer == b""


def test_empty_object_is_written_and_read(s3, name):
    carrier = Carrier(s3)
    carrier.put(name, "key", b"")

    assert carrier.get(name, "key").buffer == b""


def test_existing_object_is_not_overwritten(s3, name):
    carrier = Carrier(s3)
    carrier.put(name, "key", b"first", write_id="mine")

    with pytest.raises(errors.AlreadyExists):
        carrier.put(name, "key", b"second", write_id="other")

    assert carrier.client.wrote(name, "key", "mine") is not None


def test_another_version_is_an_error(s3, name):
    carrier = Carrier(s3)
    carrier.put(name, "key", b"content")

    with pytest.raises(errors.ObjectChanged):
        carrier.get(name, "key", etag="0" * 32)


@pytest.mark.parametrize(
    "fault",
    [reset, cut(head=0.5), cut(body=0.5), cut(body=0.5, then=lambda exchange: exchange.close()), answer(503)],
    ids=["reset", "cut head", "cut body", "short body", "503"],
)
def test_broken_answer_is_mended(fault):
    with Faults([fault], objects=OBJECTS) as server:
        get = Carrier(server).get()

    assert get.buffer == CONTENT
    assert get.attempt == 2


def test_broken_body_is_resumed_where_it_broke_off():
    asked = []
    with Faults([cut(body=0.5), _note_fields(asked)], objects=OBJECTS) as server:
        assert Carrier(server).get().buffer == CONTENT

    first = int(asked[0]["range"].removeprefix("bytes=").partition("-")[0])
    assert 0 < first <= len(CONTENT) // 2


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (answer(503), errors.Throttled, r"attempt 2 of 2"),
        (answer(500), errors.TransferFailed, r"attempt 2 of 2"),
        (reset, errors.TransferFailed, r"attempt 2 of 2"),
        (stall, errors.DeadlineExceeded, r"attempt 2 of 2"),
        (answer(403, "AccessDenied"), errors.AccessDenied, "AccessDenied: because"),
        (answer(400, "ExpiredToken"), errors.CredentialsExpired, "renew the credentials"),
        (edit(Content_Range="bytes 1-10/300000"), errors.IntegrityError, "Content-Range|bytes 1-10"),
    ],
    ids=["503", "500", "reset", "stall", "403", "expired", "wrong range"],
)
def test_fault_that_stays_is_the_right_error(fault, kind, words):
    with Faults(repeat(fault), objects=OBJECTS) as server, pytest.raises(kind, match=words):
        Carrier(server, attempts=2, read_timeout=0.2).get(start=0, stop=10)


def test_expired_credentials_are_found_again():
    with Faults([answer(400, "ExpiredToken")], objects=OBJECTS) as server:
        assert Carrier(server).get().buffer == CONTENT


def test_whole_transfer_has_its_deadline():
    with (
        Faults(repeat(answer(503)), objects=OBJECTS) as server,
        pytest.raises(errors.DeadlineExceeded, match="not done within"),
    ):
        Carrier(server, attempts=1000, total_timeout=0.5).get()


@pytest.mark.parametrize("head", [0.0, 0.5, 1.0])
def test_answer_that_drips_ends_when_the_time_is_up(head):
    with Faults(repeat(drip(0.1, head)), objects=OBJECTS) as server:
        carrier = Carrier(server, attempts=1000, total_timeout=1.0, read_timeout=60.0)
        with pytest.raises(errors.DeadlineExceeded, match="not done within 1 s"):
            carrier.get()


def test_body_that_drips_is_tried_again():
    with Faults([drip(0.1, 1.0)], objects=OBJECTS) as server:
        get = Carrier(server, read_timeout=0.5).get()

    assert get.buffer == CONTENT
    assert get.attempt == 2


def test_cancelled_transfer_whose_body_stalls_comes_back_at_once():
    sent = threading.Event()

    def stop(exchange):
        sent.set()
        stall(exchange)

    with Faults([cut(body=0.5, then=stop)], objects=OBJECTS) as server:
        carrier = Carrier(server, read_timeout=600.0)
        transfer = carrier.submit(Get, "bucket", "key")
        sent.wait()
        carrier.fallback.cancel([transfer])

        assert carrier.sink.get(timeout=60) == [transfer]
        assert "cancelled" in str(transfer.error)


def test_cancelled_transfer_that_waits_for_an_answer_comes_back_at_once():
    with Faults([stall, stall], objects=dict(OBJECTS)) as server:
        carrier = Carrier(server, read_timeout=600.0)
        get = carrier.submit(Get, "bucket", "key")
        put = carrier.submit(Put, "bucket", "new", memoryview(CONTENT), algorithm=None)
        server.wait_for_requests(2)
        carrier.fallback.cancel([get, put])

        assert {carrier.sink.get(timeout=60)[0] for _ in "12"} == {get, put}
        assert all("cancelled" in str(transfer.error) for transfer in (get, put))


def test_clock_is_corrected_by_the_server():
    with Faults(repeat(clock(3600)), objects=dict(OBJECTS)) as server:
        carrier = Carrier(server)
        assert carrier.get().buffer == CONTENT
        carrier.get()
        carrier.put("bucket", "new", b"content")

        assert len(server.requests) == 4  # it was told once


def test_clock_that_cannot_be_right_is_a_clear_error():
    with (
        Faults(repeat(answer(403, "RequestTimeTooSkewed")), objects=OBJECTS) as server,
        pytest.raises(errors.AccessDenied, match="set this machine's clock"),
    ):
        Carrier(server).get()


def test_corrected_clock_is_signed(rclone):  # by a server that looks
    bucket, key = rclone.create_bucket(os.urandom(8).hex())[5:], "ä key+/=&"
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    with Faults([answer(403, "RequestTimeTooSkewed", Date=date)], upstream=rclone.endpoint_url) as proxy:
        options = rclone.storage_options | {"endpoint_url": proxy.endpoint_url}
        carrier = Carrier(SimpleNamespace(storage_options=options))
        carrier.put(bucket, key, CONTENT)

        assert carrier.get(bucket, key, start=5, stop=10).buffer == CONTENT[5:10]
        assert len(proxy.requests) == 3


def _note_fields(asked):
    def behave(exchange):
        asked.append(exchange.fields)
        right = exchange.answer()
        exchange.send(right.head, right.body)

    return behave


def test_get_is_sent_as_the_transfer_says():
    asked = []
    with Faults([_note_fields(asked)], objects=OBJECTS) as server:
        carrier = Carrier(server, customer_key=bytes(range(32)), requester_pays=True)
        carrier.get(start=5, stop=10, etag=hashlib.md5(CONTENT).hexdigest(), version_id="a/+ b")

    etag = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    wanted = dict(headers_for(carrier.config).get) | {"range": "bytes=5-9", "if-match": etag}
    assert wanted.items() <= asked[0].items()


@pytest.mark.parametrize("part", [None, ("an/upload +id", 7)])
def test_put_is_sent_as_the_transfer_says(part):
    asked = []
    with Faults([_note_fields(asked)]) as server:
        carrier = Carrier(server, server_side_encryption="aws:kms", kms_key_id="id")
        put = carrier.put("bucket", "key", CONTENT, part=part, write_id=None if part else "mine")
        assert server.objects == OBJECTS

    fields = headers_for(carrier.config)
    wanted = dict(fields.put if part is None else fields.part) | {"x-amz-checksum-crc32": put.checksum}
    if part is None:
        wanted |= {"if-none-match": "*", "x-amz-meta-torch-s3-write-id": "mine"}
    assert wanted.items() <= asked[0].items()


def test_bug_in_a_transfer_is_its_error():
    class Buggy(Get):
        def receive(self, head):
            raise ZeroDivisionError

    with Faults(objects=OBJECTS) as server:
        carrier = Carrier(server)
        with pytest.raises(errors.S3Error, match="ZeroDivisionError"):
            carrier.carry(Buggy, "bucket", "key")

        assert carrier.get().buffer == CONTENT


SESSION = (
    b"<CreateSessionResult><Credentials><SessionToken>the-session</SessionToken><SecretAccessKey>s</SecretAccessKey>"
    b"<AccessKeyId>k</AccessKeyId><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></CreateSessionResult>"
)


def open_session(exchange):
    exchange.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(SESSION)}\r\n\r\n".encode(), SESSION)


def test_express_buckets_are_spoken_to_in_sessions():
    asked = []
    bucket = "bucket--usw2-az1--x-s3"
    with Faults([open_session, _note_fields(asked)], objects={f"/{bucket}/key": CONTENT}) as server:
        carrier = Carrier(server)
        assert "s3express" in carrier.client.own("s3://bucket").account.needs_boto3(bucket)
        assert carrier.get(bucket).buffer == CONTENT

    assert asked[0]["x-amz-s3session-token"] == "the-session"
    assert "/s3express/aws4_request" in asked[0]["authorization"]


def test_express_bucket_is_written_listed_and_read():
    listed = (
        b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>1</KeyCount><Contents><Key>key</Key>"
        b"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;e&quot;</ETag><Size>300000</Size></Contents>"
        b"</ListBucketResult>"
    )
    operations, bucket = [], "bucket--usw2-az1--x-s3"

    def serve_express(exchange):
        if exchange.target.endswith("?session"):
            return open_session(exchange)
        assert exchange.fields["x-amz-s3session-token"] == "the-session"
        operations.append((exchange.kind, urlsplit(exchange.target).path))
        if exchange.kind == "list":
            return exchange.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(listed)}\r\n\r\n".encode(), listed)
        return serve(exchange)

    with Faults(repeat(serve_express)) as server:
        fs = S3FileSystem(**server.storage_options)
        fs.pipe_file(f"{bucket}/key", CONTENT)

        assert fs.find(bucket) == [f"{bucket}/key"]
        assert fs.cat(f"{bucket}/key") == CONTENT
        with fs.open(f"{bucket}/key") as file:
            file.seek(-3, 2)
            assert file.read() == CONTENT[-3:]
    assert {kind for kind, _ in operations} == {"put", "list", "get", "head"}
    assert {path.split("/")[1] for _, path in operations} == {bucket}


def test_express_bucket_is_at_its_zone():
    account = Client(S3Config(key="id", secret="secret", region="us-west-2")).own("s3://bucket").account
    place = account.place("bucket--usw2-az1--x-s3")

    assert place.host == "bucket--usw2-az1--x-s3.s3express-usw2-az1.us-west-2.amazonaws.com"
    assert account.needs_boto3("bucket--usw2-az1--x-s3") == "requests are signed by sigv4-s3express for s3express"


def test_what_was_done_is_counted():
    with Faults([answer(503)], objects=OBJECTS) as server:
        carrier = Carrier(server)
        carrier.get()

    stats = carrier.fallback.stats
    assert sum(part.requests for part in stats) == 2
    assert sum(part.received for part in stats) == len(CONTENT)
    assert sum((part.retries["throttle"] for part in stats), 0) == 1


# ---------------------------------------------------------------------- the promise


def test_each_of_many_comes_back_once():
    with Faults(objects=OBJECTS) as server:
        carrier = Carrier(server, max_connections=4)
        transfers = [carrier.submit(Get, "bucket", "key", start=at, stop=at + 100) for at in range(100)]
        back = [carrier.sink.get(timeout=60)[0] for _ in transfers]

        assert set(back) == set(transfers)
        assert carrier.sink.empty()
        assert all(transfer.buffer == CONTENT[transfer.start : transfer.stop] for transfer in transfers)
        assert server.connections <= 4


def test_cancelled_transfers_come_back_and_leave_room():
    with Faults([stall], objects=OBJECTS) as server:
        carrier = Carrier(server, max_connections=1, read_timeout=1.0)
        running, waiting = (carrier.submit(Get, "bucket", "key", into=memoryview(bytearray(300_000))) for _ in "12")
        server.wait_for_requests(1)
        carrier.fallback.cancel([running, waiting])

        assert waiting.finished  # nobody had begun with it
        assert {carrier.sink.get(timeout=60)[0] for _ in "12"} == {running, waiting}
        assert "cancelled" in str(running.error) or isinstance(running.error, errors.DeadlineExceeded)
        assert running.into is waiting.into is None
        assert carrier.get().buffer == CONTENT


def test_cancelled_transfer_does_not_wait_for_its_retry():
    with Faults(repeat(answer(503, Retry_After="20")), objects=OBJECTS) as server:
        carrier = Carrier(server)
        transfer = carrier.submit(Get, "bucket", "key")
        server.wait_for_requests(1)
        carrier.fallback.cancel([transfer])

        assert carrier.sink.get(timeout=15) == [transfer]
        assert len(server.requests) == 1


def test_cancelling_what_is_finished_does_nothing():
    with Faults(objects=OBJECTS) as server:
        carrier = Carrier(server)
        carrier.fallback.cancel([carrier.get()])

        assert carrier.sink.empty()


def test_threads_end_with_the_work():
    with Faults(objects=OBJECTS) as server:
        carrier = Carrier(server)
        carrier.get()
        for thread in threading.enumerate():
            if thread.name == "torch_s3-io-boto3":
                thread.join(60)

        assert not [thread for thread in threading.enumerate() if thread.name == "torch_s3-io-boto3"]
        assert carrier.get().buffer == CONTENT


def test_failed_transfer_holds_no_memory():
    gc.disable()
    try:
        with Faults([answer(404)], objects=OBJECTS) as server:
            carrier, memory = Carrier(server), bytearray(10)
            transfer = carrier.submit(Get, "bucket", "key", start=0, stop=10, into=memoryview(memory))
            assert carrier.sink.get(timeout=60) == [transfer]
            memory.append(0)  # nobody has a view of it
    finally:
        gc.enable()


def test_child_of_a_process_amid_a_transfer_has_its_own():
    go_on = threading.Event()
    with Faults([hold(go_on)], objects=OBJECTS) as server:
        carrier = Carrier(server)
        transfer = carrier.submit(Get, "bucket", "key")
        server.wait_for_requests(1)

        def read_in_child():
            assert Carrier(server).get().buffer == CONTENT

        assert in_child(read_in_child) == 0
        go_on.set()
        assert carrier.sink.get(timeout=60) == [transfer]
        assert transfer.buffer == CONTENT
