"""The memory that bytes are received into: storages themselves, and buffers that are used again and again."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

ALIGNMENT = 64
"""Bytes, of the memory that torch gives out on the CPU."""
_POPULATE_WRITE = 23  # madvise's, since Linux 5.14; mmap doesn't name it yet


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the search for cyclic garbage, which each time looks at all that Python holds, and finds nothing: for
    20,000 tensors it takes as long as to receive them.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def new_storage(nbytes: int, device: torch.device | None = None) -> torch.UntypedStorage:
    """A storage with undefined content, on the CPU unless told otherwise.

    As those that torch.load makes it cannot be resized: a tensor larger than its storage, which a damaged file may ask
    for, would move the memory from under the sockets that write to it.
    """
    if device is not None:
        return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]
    storage: torch.UntypedStorage = torch.UntypedStorage(nbytes)  # type: ignore[no-untyped-call]
    part: torch.UntypedStorage = storage[:nbytes]  # empty ones too: they would grow to any size
    return part


def slices(spans: Sequence[tuple[int, int]]) -> tuple[torch.UntypedStorage, int, list[torch.UntypedStorage]]:
    """Memory for a range of a file, and storages that are parts of it: one piece of memory takes no longer to get than
    one of thousands of them does. It is freed with the last of them. Each is aligned as it is in the file.

    Args:
        spans: Half-open ranges of the file, in order; the range is from the first's start to the last's end.

    Returns:
        The memory, where in it the range starts, and a storage for each span, as :func:`new_storage` makes them.
    """
    start, stop = spans[0][0], spans[-1][1]
    pad = start % ALIGNMENT
    whole: torch.UntypedStorage = torch.UntypedStorage(pad + stop - start)  # type: ignore[no-untyped-call]
    before = pad - start
    return whole, pad, [whole[before + a : before + b] for a, b in spans]


def populate(storage: torch.UntypedStorage, start: int, stop: int) -> None:
    """Have the kernel give out the pages of a part of a storage now, in this thread, which does so without the GIL.

    It takes longer than to receive the bytes from a fast network: the I/O thread need not do that too. (Large pages
    would be quicker, or slower by far where memory is fragmented and must be moved first: measured 0.3 to 2.7 s for
    1.2 GB, against 0.65 to 0.8.) Where the kernel refuses, nothing is lost.
    """
    if _madvise is not None:
        first = -(-(storage.data_ptr() + start) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (storage.data_ptr() + stop) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            _madvise(first, length, _POPULATE_WRITE)


def _found() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return advise


_madvise = _found()


def view_of(storage: torch.UntypedStorage, start: int = 0, stop: int | None = None) -> memoryview:
    """Bytes of a storage on the CPU, as writable memory, which keeps it alive."""
    found = bytes_of(storage, start, stop)
    return found.numpy().data if len(found) else memoryview(b"")


def bytes_of(storage: torch.UntypedStorage, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Bytes of a storage as a uint8 tensor of one dimension, which shares its memory."""
    stop = storage.nbytes() if stop is None else stop
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, start, (stop - start,), (1,))


class Copy(NamedTuple):
    """Bytes of a buffer that belong into a storage.

    Attributes:
        begin: The first, in the buffer.
        nbytes: How many.
        storage: Where they go.
        at: From which of its bytes on.
    """

    begin: int
    nbytes: int
    storage: torch.UntypedStorage
    at: int


class Buffers:
    """Memory for ranges that belong into several storages, or into one that no socket can write to.

    No more than ``most`` exist at once. Once those that are to come need no more, they are given back to the system: so
    that the buffers and what has been copied out of them are together never much larger than what is received.

    Args:
        uses: How many times one will be taken.
        size: Bytes of each.
        most: How many there may be.
    """

    def __init__(self, uses: int, *, size: int, most: int) -> None:
        self._uses, self._size, self._most = uses, size, most
        self._made = 0
        self._free: list[mmap.mmap] = []

    def take(self) -> Any:
        """A buffer, ``None`` while there is none to have."""
        if not self._free:
            if self._made == self._most:
                return None
            self._made += 1
            self._free.append(mmap.mmap(-1, self._size))  # not malloc's, which seldom gives memory back
        self._uses -= 1
        return self._free.pop()

    def view(self, buffer: Any) -> memoryview:
        """A buffer's memory."""
        return memoryview(buffer)

    def empty(self, buffer: Any, copies: list[Copy]) -> None:
        """Copy out of a buffer, and take it back."""
        base = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        for copy in copies:
            ctypes.memmove(copy.storage.data_ptr() + copy.at, base + copy.begin, copy.nbytes)
        if len(self._free) < self._uses:
            self._free.append(buffer)

    def wait(self) -> None:
        """Wait until all that was copied has arrived."""
