"""The addresses of one origin's host. Only the I/O thread is in here."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

from torch_s3.transport.connection import Address
from torch_s3.transport.target import Origin

_FRESH = 30.0  # seconds that they are used before they are looked up again, in the background


class Addresses:
    """What a host's name stands for, looked up when it is needed and again now and then.

    Args:
        origin: Whose host.
        in_background: Runs what blocks, see :meth:`~torch_s3.transport.loop.Loop.in_background`.
        changed: Called when a look-up in the background has ended.
        unreachable: Called with what went wrong, where there is no address to go on with.
    """

    def __init__(
        self,
        origin: Origin,
        in_background: Callable[[str, Callable[[], Any], Callable[[Any], None]], None],
        *,
        changed: Callable[[], None],
        unreachable: Callable[[Exception], None],
    ) -> None:
        self._origin, self._in_background = origin, in_background
        self._changed, self._unreachable = changed, unreachable
        self._known: list[Address] = []
        self._resolved_at = float("-inf")
        self._resolving_since: float | None = None

    def next(self, now: float) -> list[Address]:
        """All that are known, another one first each time; none where they are being looked up, or can't be."""
        if now - self._resolved_at > _FRESH and self._resolving_since is None:
            self._resolve(now)
        self._known = self._known[1:] + self._known[:1]  # spread over them
        return self._known

    def distrust(self) -> None:
        """Look them up again before they are used."""
        self._resolved_at = float("-inf")

    def look(self, now: float) -> None:
        """Don't wait for the system's resolver any longer than for a connection."""
        if self._resolving_since is not None and now - self._resolving_since > self._origin.connect_timeout:
            if not self._known:
                self._unreachable(TimeoutError(f"no address of {self._origin.host!r} was found in time"))
            self._resolving_since = now

    def _resolve(self, now: float) -> None:
        """Look the host up: at once where it is a number, else in a thread, for the system's resolver blocks."""
        host, port = self._origin.host, self._origin.port
        try:
            self._resolved(lookup(host, port, socket.AI_NUMERICHOST))
        except (OSError, UnicodeError):
            self._resolving_since = now

            def done(answer: list[Address] | Exception) -> None:
                self._resolving_since = None
                self._resolved(answer)
                self._changed()

            self._in_background("dns", lambda: lookup(host, port), done)

    def _resolved(self, answer: list[Address] | Exception) -> None:
        if isinstance(answer, list):
            self._known, self._resolved_at = answer, time.monotonic()
        elif not self._known:
            why = getattr(answer, "strerror", None) or answer
            self._unreachable(ConnectionError(f"cannot resolve {self._origin.host!r}: {why}"))


def lookup(host: str, port: int, flags: int = 0) -> list[Address]:
    """The addresses of a host, by the system's resolver, which blocks unless ``flags`` is ``AI_NUMERICHOST``."""
    if host.endswith(".localhost"):
        host = "localhost"  # RFC 6761, which not every resolver follows
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]  # type: ignore[misc]  # (int, bytes): without IPv6
