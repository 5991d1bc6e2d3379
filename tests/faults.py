"""A small S3 on loopback, or a proxy before a real one, that misbehaves as it is told, one request at a time.

    with Faults([reset, answer(503)], objects={"/bucket/key": b"content"}) as server:
        fs = S3FileSystem(**server.storage_options)

The first request is answered by a reset, the second with status 503, and those after the script's end as S3 would.
``itertools.repeat`` scripts a fault for ever, and ``aim`` one for a kind of request:

    with Faults(repeat(aim("complete", in_turn(lose, serve))), upstream=s3.endpoint_url) as proxy:
"""

import hashlib
import http.client
import itertools
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

_REASONS = {200: "OK", 206: "Partial Content"}
_BLOCK = 64 * 1024
_HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding")


class Answer(NamedTuple):
    """An answer to send."""

    status: int
    fields: dict[str, str]
    body: bytes = b""
    version: str = "1.1"

    @property
    def head(self):
        lines = [f"HTTP/{self.version} {self.status} {_REASONS.get(self.status, 'Reason')}"]
        lines += [f"{name}: {value}" for name, value in self.fields.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


@dataclass
class Exchange:
    """One request, and the connection to answer it on."""

    server: "Faults"
    sock: socket.socket
    method: str
    target: str
    """Path and query, as sent."""
    fields: dict[str, str]
    """By lower-case name."""
    unread: int
    """Bytes of its body still to read."""
    number: int
    """Of this request on its connection, from 0."""
    body: bytearray = field(default_factory=bytearray)

    @property
    def path(self):
        return urlsplit(self.target).path

    @property
    def kind(self):
        """get, head, put, part, list, create, complete, abort, …"""
        query = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        if "uploads" in query:
            return "create" if self.method == "POST" else "uploads"
        if "uploadId" in query:
            return {"PUT": "part", "POST": "complete", "DELETE": "abort"}.get(self.method, "parts")
        return "list" if "list-type" in query else self.method.lower()

    def read_body(self):
        """Receive the request's body, unless that is done."""
        while self.unread:
            piece = self.sock.recv(min(self.unread, _BLOCK))
            if not piece:
                raise ConnectionResetError
            self.unread -= len(piece)
            self.body += piece

    def answer(self):
        """What S3 would answer. From here on, what the request asks for is done."""
        self.read_body()
        if self.server.upstream is not None:
            return self._forward()
        if self.method == "PUT":
            self.server.objects[unquote(self.path)] = bytes(self.body)
            return Answer(200, {"Content-Length": "0", "ETag": _etag(self.body)})
        content = self.server.objects.get(unquote(self.path))
        if content is None:
            return refusal(404, "NoSuchKey")
        fields = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": _etag(content)}
        status, whole = 200, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.fields.get("range", "")):
            first, last = int(asked[1]), min(int(asked[2]), whole - 1)
            if first >= whole:
                return refusal(416, "InvalidRange")
            status, content = 206, content[first : last + 1]
            fields["Content-Range"] = f"bytes {first}-{last}/{whole}"
        fields["Content-Length"] = str(len(content))
        return Answer(status, fields, b"" if self.method == "HEAD" else content)

    def _forward(self):
        with closing(http.client.HTTPConnection(self.server.upstream, timeout=60)) as upstream:
            upstream.putrequest(self.method, self.target, skip_host=True, skip_accept_encoding=True)
            for name, value in self.fields.items():
                upstream.putheader(name, value)
            upstream.endheaders(bytes(self.body))
            said = upstream.getresponse()
            body = said.read()
        fields = {
            "ETag" if name.lower() == "etag" else name.title(): value
            for name, value in said.headers.items()
            if name.lower() not in _HOP_BY_HOP
        }
        if self.method != "HEAD":
            fields["Content-Length"] = str(len(body))
        return Answer(said.status, fields, body)

    def send(self, *pieces):
        for piece in pieces:
            self.sock.sendall(piece)

    def close(self, *, reset=False):
        """Close the connection in an orderly way, or with a reset, which drops what the client has not read."""
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def wait_for_client_to_leave(self, seconds=None):
        """Whether it left, within so many seconds."""
        self.sock.settimeout(seconds)
        try:
            while self.sock.recv(_BLOCK):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True


Behaviour = Callable[[Exchange], None]


class Faults:
    """The server. Each request is answered by the script's next behaviour, in order of arrival over all connections.

    Args:
        script: The behaviours.
        objects: By path, ``/bucket/key``. PUT adds to it.
        upstream: URL of the S3 that answers instead of ``objects``.
        tls: The certificate to show, as a server's context; ``None`` for plain HTTP.

    Attributes:
        requests: What arrived, as ``(method, path)``.
        connections: How many were made.
    """

    def __init__(
        self,
        script: Iterable[Behaviour] = (),
        *,
        objects: dict[str, bytes] | None = None,
        upstream: str | None = None,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.objects = objects or {}
        self.upstream = urlsplit(upstream).netloc if upstream else None
        self.requests: list[tuple[str, str]] = []
        self.connections = 0
        self._script = iter(script)
        self._tls = tls
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port = self._listening.getsockname()[1]
        self.endpoint_url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def storage_options(self):
        return {"key": "id", "secret": "secret", "region": "us-east-1", "endpoint_url": self.endpoint_url}

    def wait_for_requests(self, count):
        """Wait until so many have arrived."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.requests) >= count, timeout=60), self.requests

    def abandon(self):
        """In a forked child: close what it inherited, or no connection of the parent's would ever end."""
        for sock in [self._listening, *self._open]:
            sock.close()

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join()
        for sock in list(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
        thread.start()

    def _accept(self):
        with suppress(OSError):  # the end
            while True:
                sock, _ = self._listening.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:  # the first recv shakes hands
                    sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                self.connections += 1
                self._open.add(sock)
                self._start(self._serve, sock)

    def _serve(self, sock):
        number = 0
        with sock, suppress(OSError):  # either side hung up
            while (exchange := self._receive(sock, number)) is not None:
                with self._changed:
                    self.requests.append((exchange.method, exchange.path))
                    behaviour = next(self._script, serve)
                    self._changed.notify_all()
                behaviour(exchange)
                exchange.read_body()
                number += 1
        self._open.discard(sock)

    def _receive(self, sock, number):
        """The next request, ``None`` where there is none any more."""
        head = bytearray()
        while not head.endswith(b"\r\n\r\n"):
            byte = sock.recv(1)
            if not byte or not (head or byte.isalpha()):  # the end, or TLS
                return None
            head += byte
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Exchange(self, sock, method, target, fields, int(fields.get("content-length", 0)), number)


def refusal(status, code, message="because"):
    """S3's way of saying no."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return Answer(status, {"Content-Type": "application/xml", "Content-Length": str(len(body))}, body)


# ---------------------------------------------------------------------- behaviours


def serve(exchange):
    """Answer as S3 would."""
    right = exchange.answer()
    exchange.send(right.head, right.body)


def serve_then_close(exchange):
    """Answer as S3 would, and hang up without having said so."""
    serve(exchange)
    exchange.close()


def reset(exchange):
    """Break the connection before an answer."""
    exchange.close(reset=True)


def lose(exchange):
    """Do what is asked, and break the connection instead of saying so."""
    exchange.answer()
    exchange.close(reset=True)


def stall(exchange):
    """Never answer."""
    exchange.wait_for_client_to_leave()


def answer(status, code="", **fields):
    """Answer with a status and S3's error code."""

    def behave(exchange):
        exchange.read_body()
        said = refusal(status, code)
        said.fields.update((name.replace("_", "-"), value) for name, value in fields.items())
        exchange.send(said.head, b"" if exchange.method == "HEAD" else said.body)

    return behave


def edit(*, status=None, version="1.1", body=None, **fields):
    """Answer as S3 would, but for status, HTTP version, body (a function of the right one) or fields (``None``: left
    out; an underscore stands for a hyphen).
    """

    def behave(exchange):
        right = exchange.answer()
        said = dict(right.fields)
        said |= {name.replace("_", "-"): value for name, value in fields.items()}
        said = {name: value for name, value in said.items() if value is not None}
        wrong = Answer(status or right.status, said, body(right.body) if body else right.body, version)
        exchange.send(wrong.head + wrong.body)

    return behave


def cut(head=1.0, body=0.0, *, then=lambda exchange: exchange.close(reset=True)):
    """Send these shares of the right answer's head and body, then break the connection, or do something else."""

    def behave(exchange):
        right = exchange.answer()
        exchange.send(right.head[: int(head * len(right.head))], right.body[: int(body * len(right.body))])
        then(exchange)

    return behave


def say(*pieces):
    """Send exactly these bytes, and hang up."""

    def behave(exchange):
        exchange.read_body()
        exchange.send(*pieces)
        exchange.close()

    return behave


def hold(event, then=serve):
    """Do nothing until ``event`` is set."""

    def behave(exchange):
        assert event.wait(60)
        then(exchange)

    return behave


def drip(seconds, head=0.0):
    """Send this share of the right answer's head, then a byte every so many seconds."""

    def behave(exchange):
        right = exchange.answer()
        at_once = int(head * len(right.head))
        exchange.send(right.head[:at_once])
        for byte in right.head[at_once:] + right.body:
            exchange.send(bytes([byte]))
            if exchange.wait_for_client_to_leave(seconds):
                return

    return behave


def ignore_range(exchange):
    """Answer with the whole object, which HTTP allows."""
    exchange.fields.pop("range", None)
    serve(exchange)


def clock(ahead):
    """Refuse requests that are more than 15 minutes from a clock which is so many seconds ahead."""

    def behave(exchange):
        now = datetime.now(UTC) + timedelta(seconds=ahead)
        signed = datetime.strptime(exchange.fields["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if abs(now - signed) < timedelta(minutes=15):
            serve(exchange)
        else:
            answer(403, "RequestTimeTooSkewed", Date=format_datetime(now, usegmt=True))(exchange)

    return behave


def in_turn(*behaviours):
    """These in turn, and the last one from then on: for one kind of request, see `aim`."""
    numbers = itertools.count()

    def behave(exchange):
        behaviours[min(next(numbers), len(behaviours) - 1)](exchange)

    return behave


def aim(kind, behaviour):
    """Meet requests of one kind with ``behaviour``, and serve the others."""

    def behave(exchange):
        (behaviour if exchange.kind == kind else serve)(exchange)

    return behave


def _etag(content):
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'
