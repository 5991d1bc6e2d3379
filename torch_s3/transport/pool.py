"""The connections to one origin, and its addresses."""

from __future__ import annotations

import socket
from collections import deque

from torch_s3.transport.connection import Address, Connection
from torch_s3.transport.transfer import Origin, Transfer


class Pool:
    """The connections to one origin and the transfers that wait for one."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.queue: deque[Transfer] = deque()
        self.idle: list[Connection] = []
        self.open: set[Connection] = set()
        self.connecting = 0
        self.addresses: list[Address] = []
        self.resolved_at = float("-inf")
        self.resolving = False


def lookup(host: str, port: int, flags: int = 0) -> list[Address]:
    """The addresses of a host, by the system's resolver, which blocks unless ``flags`` is ``AI_NUMERICHOST``."""
    if host.endswith(".localhost"):
        host = "localhost"  # RFC 6761, which not every resolver follows
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]  # type: ignore[misc]  # (int, bytes): without IPv6
