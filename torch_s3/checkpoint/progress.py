"""How far a load has come, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tqdm.auto import tqdm


class Loaded(NamedTuple):
    """What a load did.

    Attributes:
        uri: Of what was loaded.
        bytes: Its size.
        received: Bytes of tensors that were received for it.
        requests: Ranges that were asked for, for those.
        etag: Its version, ``None`` where the filesystem has none.
        verified: Its bytes were compared with the checksums that were saved with them. False with ``verify=False``,
            and where there are none: in safetensors, torch's old format, files saved without.
        seconds: How long it took.
        reading_layout: Seconds of it until it was known which bytes are which tensor.
        unpickling: Seconds in which objects were made.
        receiving: Seconds of waiting for bytes, checking those that had come.
        checking: Seconds spent on checksums, most of them while others were received.
    """

    uri: str
    bytes: int
    received: int
    requests: int
    etag: str | None
    verified: bool
    seconds: float
    reading_layout: float
    unpickling: float
    receiving: float
    checking: float


class Progress:
    """Counts bytes and seconds, and shows them to who wants to see.

    Args:
        wanted: Show a bar; or call this with the bytes that have come and the bytes that there are to come.
        description: For the bar.
    """

    def __init__(self, wanted: bool | Callable[[int, int], Any], description: str) -> None:
        self._call = wanted if callable(wanted) else None
        shown = bool(wanted) and self._call is None
        self._bar = tqdm(desc=description, unit="B", unit_scale=True, unit_divisor=1024, total=0, disable=not shown)
        self.total = self.received = self.requests = 0
        self.verified = False
        self.checking = 0.0
        self.seconds: dict[str, float] = {}

    def expect(self, nbytes: int) -> None:
        """So many more are going to come."""
        self.total += nbytes
        self._bar.total = self.total
        self._bar.refresh()

    def __call__(self, nbytes: int) -> None:
        """So many more have come."""
        self.received += nbytes
        self._bar.update(nbytes)
        if self._call is not None:
            self._call(self.received, self.total)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the block's time to that of a part."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - before

    def loaded(self, uri: str, size: int, etag: str | None, seconds: float) -> Loaded:
        """What it took."""
        layout, unpickling, receiving = (
            self.seconds.get(part, 0.0) for part in ("reading_layout", "unpickling", "receiving")
        )
        return Loaded(
            uri, size, self.received, self.requests, etag, self.verified, seconds, layout, unpickling, receiving,
            self.checking,
        )  # fmt: skip

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
