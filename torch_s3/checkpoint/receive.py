"""Receiving: from what is wanted to requests, and from their bytes to checked storages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from zlib_ng import zlib_ng

from torch_s3.checkpoint.cuda import PinnedRing
from torch_s3.checkpoint.progress import Progress
from torch_s3.errors import IntegrityError
from torch_s3.memory import ALIGNMENT, Buffers, Copy, new_storage, populate, slices, view_of
from torch_s3.source import Source
from torch_s3.transport.ranges import coalesce, split

MERGED = 1024 * 1024
"""Wanted ranges of fewer bytes share requests."""
_GAP = 32 * 1024  # unwanted bytes that are cheaper to receive than another request is
_PINNED = 32  # buffers of the ring
_DENSE = 7 / 8  # of a range's bytes, if storages are to share its memory
UNMADE: torch.UntypedStorage = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
"""In the place of a storage that the receiver is to make, on the CPU."""


@dataclass(slots=True, eq=False)
class Want:
    """Bytes of a file that belong into a storage.

    Attributes:
        name: What errors call it.
        start: The first byte, in the file.
        nbytes: How many, at least one.
        storage: Where they go, on the CPU or a GPU; ``UNMADE`` to have the receiver make it, on the CPU, of their size.
        at: From which of its bytes on.
        crc: CRC32 that they must have, ``None`` to believe them.
        missing: Bytes that have not come yet.
    """

    name: str
    start: int
    nbytes: int
    storage: torch.UntypedStorage
    at: int = 0
    crc: int | None = None
    missing: int = field(init=False)
    sums: list[tuple[int, int, int]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.missing = self.nbytes


class Piece(NamedTuple):
    """Where bytes of a request belong.

    Attributes:
        want: Its number among those wanted.
        begin: Its first byte, in what is wanted.
        at: Where in the request it is.
        nbytes: Its length.
    """

    want: int
    begin: int
    at: int
    nbytes: int


class Request(NamedTuple):
    """One range to ask for.

    Attributes:
        start: Its first byte, in the file.
        stop: One past its last.
        direct: It is received into the storage itself.
        pieces: What is wanted of it.
    """

    start: int
    stop: int
    direct: bool
    pieces: list[Piece]


def plan(wanted: Sequence[tuple[int, int, bool]], *, part_size: int) -> list[Request]:
    """The requests for what is wanted, in the file's order: small ones merged, large ones cut. Pure.

    Args:
        wanted: First byte, length (at least 1), and whether it can be received in place.
        part_size: Bytes of the longest request.

    Returns:
        Requests in which every wanted byte is exactly once.
    """
    requests: list[Request] = []
    small = []
    for number, (start, nbytes, in_place) in enumerate(wanted):
        if nbytes < min(MERGED, part_size):
            small.append(number)
            continue
        for a, b in split(start, start + nbytes, part_size=part_size):
            requests.append(Request(a, b, in_place, [Piece(number, a - start, 0, b - a)]))
    ranges = [(wanted[number][0], wanted[number][0] + wanted[number][1]) for number in small]
    for a, b, members in coalesce(ranges, max_gap=_GAP, max_span=part_size):
        pieces = [Piece(small[member], 0, ranges[member][0] - a, wanted[small[member]][1]) for member in members]
        requests.append(Request(a, b, False, pieces))
    requests.sort(key=lambda request: request.start)
    return requests


class Receiver:
    """Receives what is wanted, and checks it. For the thread that made it; only the I/O threads work beside it.

    Args:
        source: Whose bytes.
        wants: Which of them. No two may share memory.
        progress: Told of what has come, and of the requests and seconds that it takes.
    """

    def __init__(self, source: Source, wants: Iterable[Want], progress: Progress) -> None:
        self._source, self._progress = source, progress
        self._wants = list(wants)
        requests = plan(
            [(want.start, want.nbytes, want.storage.device.type == "cpu") for want in self._wants],
            part_size=source.part_size,
        )
        self._wholes: dict[int, tuple[torch.UntypedStorage, int]] = {}
        requests = [request if request.direct else self._shared(request) for request in requests]
        for want in self._wants:
            if want.storage is UNMADE:
                want.storage = new_storage(want.nbytes)
        self._requests = iter(requests)
        self._next: Request | None = next(self._requests, None)
        self._under_way = 0
        self._left = len(requests)
        indirect = [request for request in requests if not request.direct]
        on_gpu = any(want.storage.device.type != "cpu" for want in self._wants)
        kind, most = (PinnedRing, _PINNED) if on_gpu else (Buffers, source.in_flight + 8)
        size = max((request.stop - request.start for request in indirect), default=0)
        self._buffers = kind(len(indirect), size=size, most=most)
        progress.requests += len(requests)

    def _shared(self, request: Request) -> Request:
        """Have storages that are still to be made be slices of the memory that a request is received into, if it has
        little else in it.
        """
        wants = [self._wants[piece.want] for piece in request.pieces]
        if not all(want.storage is UNMADE and want.start % ALIGNMENT == 0 for want in wants) or sum(
            want.nbytes for want in wants
        ) < _DENSE * (request.stop - request.start):
            return request
        whole, at, storages = slices([(want.start, want.start + want.nbytes) for want in wants])
        for want, storage in zip(wants, storages, strict=True):
            want.storage = storage
        self._wholes[request.start] = whole, at
        return request._replace(direct=True)

    def pump(self) -> None:
        """Go on with what can be done without waiting."""
        self._ask()
        if self._under_way:
            self._take(self._source.finished(wait=False))

    def finish(self, want: Want | None = None) -> None:
        """Wait until all that is wanted, or one of it, has come and been checked.

        Raises:
            IntegrityError: It is damaged.
            S3Error: It could not be read.
        """
        try:
            while self._left if want is None else want.missing:
                self._ask()
                if self._under_way:
                    self._take(self._source.finished(wait=True))
                elif isinstance(self._buffers, PinnedRing):
                    self._buffers.wait_for_one()
        finally:  # after an error too: nothing may be written to memory that others get
            if want is None:
                self._buffers.wait()
        if want is None:
            self._source.check_unchanged()

    def _ask(self) -> None:
        while self._next is not None and self._under_way < 2 * self._source.in_flight:
            start, stop, direct, pieces = self._next
            if direct:
                want = self._wants[pieces[0].want]
                own = want.storage, want.at + pieces[0].begin
                storage, at = self._wholes.pop(start, own)
                populate(storage, at, at + stop - start)
                view, buffer = view_of(storage, at, at + stop - start), None
            else:
                buffer = self._buffers.take()
                if buffer is None:
                    return
                view = self._buffers.view(buffer)[: stop - start]
            self._source.ask(start, view, (self._next, view, buffer))
            self._source.begin()
            self._under_way += 1
            self._next = next(self._requests, None)

    def _take(self, done: Sequence[tuple[Request, memoryview, Any]]) -> None:
        for request, view, buffer in done:
            self._under_way -= 1
            self._left -= 1
            began = time.perf_counter()
            came = 0
            for number, begin, at, nbytes in request.pieces:
                want = self._wants[number]
                want.missing -= nbytes
                came += nbytes
                if want.crc is None:
                    continue
                want.sums.append((begin, zlib_ng.crc32(view[at : at + nbytes]), nbytes))
                if not want.missing:
                    self._check(want, want.crc)
            self._progress.checking += time.perf_counter() - began
            view.release()
            if buffer is not None:
                copies = []
                for number, begin, at, nbytes in request.pieces:
                    want = self._wants[number]
                    copies.append(Copy(at, nbytes, want.storage, want.at + begin))
                self._buffers.empty(buffer, copies)
            self._progress(came)

    def _check(self, want: Want, wanted: int) -> None:
        crc = 0
        for _, part, nbytes in sorted(want.sums):
            crc = zlib_ng.crc32_combine(crc, part, nbytes) if crc else part
        if crc != wanted:
            self._source.check_unchanged()
            raise IntegrityError(
                f"{want.name} is damaged: its bytes don't have the CRC32 that was saved with them",
                uri=self._source.uri,
                range=(want.start, want.start + want.nbytes),
            )
