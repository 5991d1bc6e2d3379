"""From the network onto a GPU: through a fixed ring of pinned buffers, copies beside receiving."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from torch_s3.memory import Buffers, Copy, bytes_of, view_of


class PinnedRing(Buffers):
    """Pinned buffers, whose bytes are copied by the devices' own streams while others are being received.

    A buffer is free again when its copies are done, which is asked for, and not waited for unless nothing else is left
    to do. Copies wait for the work that the current stream had when they were ordered: the memory that torch gives out
    may have been freed by tensors that it still reads.

    Args:
        uses: How many times a buffer will be taken.
        size: Bytes of each.
        most: How many there may be: the bound of the host's memory.
    """

    def __init__(self, uses: int, *, size: int, most: int) -> None:
        super().__init__(uses, size=size, most=most)
        self._idle: list[torch.Tensor] = []
        self._copying: deque[tuple[torch.Tensor, Sequence[torch.cuda.Event]]] = deque()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def take(self) -> Any:
        while self._copying and all(map(torch.cuda.Event.query, self._copying[0][1])):
            self._idle.append(self._copying.popleft()[0])
        if self._idle:
            return self._idle.pop()
        if self._made == self._most:
            return None
        self._made += 1
        return torch.empty(self._size, dtype=torch.uint8, pin_memory=True)

    def view(self, buffer: Any) -> memoryview:
        return view_of(buffer.untyped_storage())

    def empty(self, buffer: Any, copies: list[Copy]) -> None:
        events = []
        for device in {copy.storage.device for copy in copies}:
            if device.type == "cpu":
                for begin, nbytes, storage, at in copies:
                    if storage.device == device:
                        bytes_of(storage, at, at + nbytes).copy_(buffer[begin : begin + nbytes])
                continue
            stream = self._stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for begin, nbytes, storage, at in copies:
                    if storage.device == device:
                        bytes_of(storage, at, at + nbytes).copy_(buffer[begin : begin + nbytes], non_blocking=True)
            events.append(stream.record_event())
        self._copying.append((buffer, events))

    def wait_for_one(self) -> None:
        """Wait until the copies of the oldest buffer are done."""
        if self._copying:
            for event in self._copying[0][1]:
                event.synchronize()

    def wait(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]
