"""The state of one keep-alive HTTP/1.1 connection, TCP or TLS, non-blocking.

A connection carries one transfer at a time. The loop calls :meth:`Connection.advance` when its socket is ready; nothing
here waits.
"""

from __future__ import annotations

import enum
import errno
import functools
import os
import re
import selectors
import socket
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch_s3.transport.answer import Head
from torch_s3.transport.target import Origin
from torch_s3.transport.transfer import Transfer

if TYPE_CHECKING:
    from torch_s3.transport.pool import Pool

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
Address = tuple[int, tuple[str, int] | tuple[str, int, int, int]]  # family, what connect() takes

_HEAD_LIMIT = 64 * 1024
_HEAD_READ = 4 * 1024  # a small first read leaves the body to be received where it belongs
_PROGRESS = 64 * 1024  # bytes that count as progress: fewer are a connection that drips
_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,8}")
_IN_PROGRESS = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)
_NOTHING = memoryview(b"")


class State(enum.IntEnum):
    CONNECTING = enum.auto()
    HANDSHAKE = enum.auto()
    IDLE = enum.auto()
    HEAD = enum.auto()  # sending the request, or waiting for the answer's head
    BODY = enum.auto()  # receiving into the transfer's memory
    COLLECT = enum.auto()  # receiving a small body of no fixed place: errors, answers to PUT


class Connection:
    """One connection to one of ``addresses``.

    Attributes:
        wants: The selector events it waits for.
        deadline: When it is given up, in the loop's time, set by the loop.
        transfer: What it carries; ``None`` while it connects or idles.
        reused: It has carried a transfer before, so that a reset may just mean that the server had closed it.
        answered: A byte of the answer has come.
        whole: The answer has come whole; where it is an error, the connection is still good.
        pool: Whose it is.
        watched: The socket that the loop's selector knows.
        watched_for: The events that it knows of it.
    """

    def __init__(self, origin: Origin, addresses: Sequence[Address]) -> None:
        self.origin = origin
        self.sock: socket.socket
        self.pool: Pool
        self.watched: socket.socket
        self.watched_for = 0
        self.wants = WRITE
        self.deadline = 0.0
        self.transfer: Transfer | None = None
        self.reused = False
        self.answered = False
        self.whole = False
        self.keep = True
        self._moved = 0  # bytes since the last progress
        self._seen = State.IDLE
        self._addresses = list(addresses)
        self._unsent: list[memoryview] = []
        self._torn = False  # the server stopped receiving before all was sent
        self._buffer = bytearray(_HEAD_LIMIT)
        self._view = memoryview(self._buffer)
        self._have = 0
        self._head: Head
        self._body = _NOTHING
        self._length: int | None = None  # of a collected body; None: chunked, or until the server closes
        self._chunked = False
        self._collected = bytearray()
        self._raw = bytearray()  # of a chunked body, what is not yet taken apart
        self._connect()

    def fileno(self) -> int:
        """The socket, for the selector."""
        return self.sock.fileno()

    def _connect(self) -> None:
        """Start connecting to the next address that takes it."""
        while True:
            family, address = self._addresses.pop(0)
            self.sock = socket.socket(family, socket.SOCK_STREAM)
            self.sock.setblocking(False)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = self.sock.connect_ex(address)
            if code in _IN_PROGRESS:
                self.state = State.CONNECTING
                return
            self.sock.close()
            if not self._addresses:
                raise OSError(code, os.strerror(code))

    def connected(self) -> bool:
        """Finish connecting as far as possible without waiting.

        Returns:
            Whether the connection can carry a transfer now. Where not, ``wants`` and perhaps ``sock`` have changed.

        Raises:
            OSError: No address can be reached, or the TLS handshake failed.
        """
        if self.state is State.CONNECTING:
            if code := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.sock.close()
                if not self._addresses:
                    raise OSError(code, os.strerror(code))
                self._connect()
                return False
            if self.origin.scheme == "https":
                context = _tls_context(self.origin.verify)
                self.sock = context.wrap_socket(
                    self.sock, server_hostname=self.origin.host, do_handshake_on_connect=False
                )
                self.state = State.HANDSHAKE
        if self.state is State.HANDSHAKE:
            try:
                self.sock.do_handshake()  # type: ignore[attr-defined]  # an SSLSocket in this state
            except ssl.SSLWantReadError:
                self.wants = READ
                return False
            except ssl.SSLWantWriteError:
                self.wants = WRITE
                return False
        self.state = State.IDLE
        self.wants = READ
        return True

    def start(self, transfer: Transfer, clock: float) -> None:
        """Send a transfer's request; the connection must be idle.

        Args:
            transfer: Whose request.
            clock: Seconds since the epoch, by the server.
        """
        self.transfer = transfer
        self.state = State.HEAD
        self.answered = self.whole = self._torn = False
        self._have = self._moved = 0
        self._unsent = [memoryview(transfer.request(clock))]
        if transfer.body:
            self._unsent.append(transfer.body)
        self._send()

    @property
    def sending(self) -> bool:
        """Whether some of the request has yet to be sent."""
        return bool(self._unsent)

    @property
    def missing(self) -> int:
        """Bytes of the body that have not come into the transfer's memory; 0 where none is being received."""
        return len(self._body) if self.state is State.BODY else 0

    def progressed(self) -> bool:
        """Whether enough has been sent or received since this last said so, or another part of the answer begun."""
        # While S3 copies or completes, it sends a space now and then after the XML's declaration.
        silent = self.state is State.COLLECT and bytes(self._collected.rstrip()[-2:]) in (b"", b"?>")
        enough = 1 if silent else _PROGRESS
        if self._moved < enough and self.state is self._seen:
            return False
        self._moved, self._seen = 0, self.state
        return True

    def advance(self, events: int) -> bool:
        """Go on with the transfer as far as the socket allows.

        Returns:
            Whether the answer is complete and as asked. Then ``keep`` says whether another transfer may follow.

        Raises:
            Retry, S3Error: What the answer means, where it isn't the one asked for.
            OSError: The connection failed.
        """
        if events & READ or not self._unsent:
            try:
                if self._receive():
                    return True
            except (BlockingIOError, ssl.SSLWantReadError):
                self.wants = READ | (WRITE if self._unsent else 0)
            except ssl.SSLWantWriteError:
                self.wants = READ | WRITE
        if self._unsent and events & WRITE:
            self._send()
        return False

    def idle(self) -> None:
        """Take leave of a transfer that is done."""
        self.transfer = None
        self.reused = True
        self.state = State.IDLE
        self.wants = READ
        self._body = _NOTHING
        self._collected, self._raw = bytearray(), bytearray()
        self.keep = self.keep and not self._has_more()

    def _has_more(self) -> bool:
        """Whether the server has said more than its answer, which must not be taken for the next one, or hung up."""
        if isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            return True
        try:
            socket.socket.recv(self.sock, 1, socket.MSG_PEEK)  # not SSLSocket's: a record is more, whatever is in it
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Close the socket, whatever it is doing, and let go of the transfer's memory."""
        self.transfer = None
        self._body = _NOTHING
        self._unsent = []
        self.sock.close()

    def _send(self) -> None:
        self.wants = READ | WRITE
        try:
            while self._unsent:
                piece = self._unsent[0]
                sent = self.sock.send(piece)
                self._moved += sent
                if sent < len(piece):
                    self._unsent[0] = piece[sent:]
                else:
                    del self._unsent[0]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return
        except (BrokenPipeError, ConnectionResetError):
            self._unsent = []  # the server may have answered, and closed, before it had read all: read what it said
            self._torn = True
            self.keep = False
        self.wants = READ

    def _receive(self) -> bool:
        assert self.transfer is not None
        if self.state is State.HEAD and not self._receive_head():
            return False
        if self.state is State.BODY:
            if not self._receive_body():
                return False
            self.whole = True
            self.transfer.received()
        else:
            if not self._collect():
                return False
            self.whole = True
            self.transfer.collected(self._head, bytes(self._collected))
            if self._head.status in (200, 206) and (self._unsent or self._torn):
                raise ConnectionError("the server reported success before it had received all")
        return True

    def _receive_head(self) -> bool:
        """Receive up to the end of the answer's head and decide where the body goes."""
        while True:
            end = self._buffer.find(b"\r\n\r\n", 0, self._have)
            if end < 0:
                if self._have + _HEAD_READ > _HEAD_LIMIT:
                    raise ConnectionError(f"the answer's head is longer than {_HEAD_LIMIT} bytes")
                count = self.sock.recv_into(self._view[self._have : self._have + _HEAD_READ])
                if count == 0:
                    raise ConnectionResetError("the server closed the connection before it answered")
                self.answered = True
                self._have += count
                continue
            head = Head(bytes(self._view[: end + 2]))
            rest = self._view[end + 4 : self._have]
            if head.status >= 200:
                self._begin_body(head, rest)
                return True
            self._have = len(rest)  # interim: the answer itself follows
            self._view[: self._have] = bytes(rest)

    def _begin_body(self, head: Head, rest: memoryview) -> None:
        assert self.transfer is not None
        self._head = head
        self.keep = self.keep and head.keeps_alive() and not self._unsent
        place = self.transfer.receive(head) if head.status in (200, 206) else None
        if place is None:
            self.state = State.COLLECT
            self._chunked = "chunked" in (head.get("transfer-encoding") or "").lower()
            empty = head.status in (204, 304) or self.transfer.method == "HEAD"
            self._chunked = self._chunked and not empty
            self._length = 0 if empty else None if self._chunked else head.length()
            self._collected, self._raw = bytearray(), bytearray()
            (self._raw if self._chunked else self._collected).extend(rest)
        else:
            self.state = State.BODY
            if len(rest) > len(place):
                if len(rest) > (head.length() or 0):
                    raise ConnectionError("the answer is longer than its Content-Length")
                rest = rest[: len(place)]
            self.keep = self.keep and not self.transfer.partial
            place[: len(rest)] = rest
            self._body = place[len(rest) :]

    def _receive_body(self) -> bool:
        while self._body:
            count = self.sock.recv_into(self._body)
            if count == 0:
                raise ConnectionResetError(f"the connection closed {len(self._body)} bytes before the answer's end")
            self._moved += count
            self._body = self._body[count:]
            if self._body and self.origin.scheme == "http":
                return False  # a short read has emptied the socket; TLS may hold bytes that the selector can't see
        return True

    def _collect(self) -> bool:
        assert self.transfer is not None
        limit = self.transfer.collect_limit
        while not self._collected_all():
            if len(self._collected) + len(self._raw) > limit:
                raise ConnectionError(f"an answer without data is longer than {limit} bytes")
            count = self.sock.recv_into(self._view)
            self._moved += count
            (self._raw if self._chunked else self._collected).extend(self._view[:count])
            if count == 0:
                if self._length is not None or self._chunked:
                    raise ConnectionResetError("the connection closed within the answer")
                self.keep = False
                break
        if self._length is not None and len(self._collected) > self._length:
            self.keep = False  # whatever that is, it must not be taken for the next answer
            del self._collected[self._length :]
        return True

    def _collected_all(self) -> bool:
        if self._chunked:
            return _take_chunks(self._raw, self._collected)
        return self._length is not None and len(self._collected) >= self._length


def _take_chunks(raw: bytearray, body: bytearray) -> bool:
    """Move the chunks that are all there (RFC 9112, 7.1) from ``raw`` to ``body``.

    Returns:
        Whether the last one has come.

    Raises:
        ConnectionError: These are no chunks.
    """
    at, last = 0, False
    while (end := raw.find(b"\r\n", at)) >= 0:
        digits = raw[at:end].partition(b";")[0].rstrip()
        if not _CHUNK_SIZE.fullmatch(digits):
            raise ConnectionError(f"the answer's chunk has the size {bytes(digits[:20])!r}")
        size, start = int(digits, 16), end + 2
        if size == 0:  # trailer fields, if any, end with an empty line
            last = raw.startswith(b"\r\n", start) or b"\r\n\r\n" in raw[start:]
            break
        if len(raw) < start + size + 2:
            break
        body += raw[start : start + size]
        at = start + size + 2
    del raw[:at]
    return last


@functools.lru_cache(maxsize=16)
def _tls_context(verify: bool | str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
