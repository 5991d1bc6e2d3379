"""From where tensors are to where their bytes can be sent from: the host's memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch

_CHUNK = 32 * 1024 * 1024  # bytes of one copy from a GPU
_SMALL = 1024 * 1024  # bytes that one core copies sooner than several agree to
_COPIED = (torch.Tensor, torch.nn.Parameter)  # other types know best how to copy themselves


def tensors_in(obj: Any) -> Iterator[torch.Tensor]:
    """The tensors in dicts, lists and tuples of any depth, in the order in which pickle meets them; each once."""
    seen: set[int] = set()
    waiting = [obj]
    while waiting:
        each = waiting.pop()
        if not isinstance(each, torch.Tensor | dict | list | tuple) or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            yield each
        else:
            waiting.extend(reversed(each.values() if isinstance(each, dict) else each))


def storages_in(obj: Any) -> list[torch.UntypedStorage]:
    """The storages of :func:`tensors_in`, each once; those of sparse and other composite tensors are left out."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors_in(obj):
        with suppress(NotImplementedError, RuntimeError):  # it has none of its own
            storage = tensor.untyped_storage()
            found.setdefault(storage._cdata, storage)
    return list(found.values())


class Staging:
    """Copies what is saved from GPUs to pinned memory, while what was copied before is sent. For one save, one thread.

    What is not on a GPU is taken from where it is.

    Attributes:
        seconds: Spent in waiting for copies.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def of_storages(self, obj: Any) -> Iterator[None]:
        """Within the block, torch.save finds storages of GPUs copied when their turn comes.

        It asks each for its ``cpu()``, in the order of :func:`storages_in`. The file is as it would be, the storages'
        devices included. Host memory: twice the largest storage, or 64 MiB where that is more.
        """
        storages = [each for each in storages_in(obj) if each.device.type == "cuda" and each.nbytes()]
        ahead = StoragesAhead(storages)
        try:
            for storage in storages:
                storage.cpu = partial(self._timed, ahead.take, storage)  # type: ignore[method-assign]
            yield
        finally:
            for storage in storages:
                storage.__dict__.pop("cpu", None)
            ahead.close()

    def chunks(self, tensor: torch.Tensor) -> Iterator[memoryview]:
        """The bytes of a tensor in C order. Each chunk is good until the next is asked for. Host memory: 64 MiB."""
        content = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        if content.device.type != "cuda":
            yield content.cpu().numpy().data
            return
        ahead = Ahead([[piece] for piece in torch.split(content, _CHUNK)])
        try:
            for number in range(ahead.count):
                yield self._timed(ahead.load, number).numpy().data
        finally:
            ahead.close()

    def _timed(self, call: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.seconds += time.perf_counter() - began


class Ahead:
    """Loads of bytes, the next one being copied while one is used: two buffers, in turn.

    Args:
        loads: uint8 tensors of one dimension that are copied together; in the order in which they will be asked for.
    """

    def __init__(self, loads: Sequence[Sequence[torch.Tensor]]) -> None:
        self.count = len(loads)
        self._loads = loads
        self._sizes = [sum(map(len, load)) for load in loads]
        cuda = {tensor.device for load in loads for tensor in load if tensor.device.type == "cuda"}
        largest = max(self._sizes, default=0)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=bool(cuda)) for _ in loads[:2]]
        self._streams = {device: torch.cuda.Stream(device) for device in cuda}  # type: ignore[no-untyped-call]
        for device, stream in self._streams.items():  # what is still to be computed comes first
            stream.wait_stream(torch.cuda.current_stream(device))
        self._copied: list[list[torch.cuda.Event]] = []  # of the loads started

    def load(self, number: int) -> torch.Tensor:
        """The bytes of a load, which take the place of the one before. Not of one before those already asked for."""
        while len(self._copied) <= number:
            self._start()
        for event in self._copied[number]:
            event.synchronize()
        if len(self._copied) == number + 1 < self.count:
            self._start()
        return self._buffers[number % 2][: self._sizes[number]]

    def _start(self) -> None:
        number = len(self._copied)
        buffer = self._buffers[number % 2]
        for tensor in self._loads[number]:
            stream = self._streams.get(tensor.device)
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                buffer[: len(tensor)].copy_(tensor, non_blocking=True)
            buffer = buffer[len(tensor) :]
        self._copied.append([stream.record_event() for stream in self._streams.values()])

    def close(self) -> None:
        """Wait until nothing is copied any more."""
        for stream in self._streams.values():
            stream.synchronize()


class StoragesAhead(Ahead):
    """Storages, small ones together, in the order in which they will be asked for."""

    def __init__(self, storages: Sequence[torch.UntypedStorage]) -> None:
        self._places: dict[int, tuple[int, int]] = {}
        loads: list[list[torch.Tensor]] = []
        at = 0  # bytes in the last load
        for storage in storages:
            if not loads or at + storage.nbytes() > _CHUNK:
                loads.append([])
                at = 0
            self._places[storage._cdata] = len(loads) - 1, at
            loads[-1].append(bytes_of(storage))
            at += storage.nbytes()
        self._at = 0
        super().__init__(loads)

    def take(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """A storage on the CPU with the same bytes, good until one of another load is taken."""
        number, start = self._places[storage._cdata]
        if number < self._at:  # asked for in another order: torch's own way
            return bytes_of(storage).cpu().untyped_storage()
        self._at = number
        content = self.load(number)[start : start + storage.nbytes()]
        return torch.from_numpy(content.numpy()).untyped_storage()


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage's memory as uint8, one dimension."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Snapshot(NamedTuple):
    """A state as it was, on the host.

    Attributes:
        state: The copy, its tensors on the CPU.
        copied: Recorded after the copies from GPUs: wait for these before reading.
    """

    state: Any
    copied: list[torch.cuda.Event]


class Snapshots:
    """Copies states to the host's memory, which the next snapshot uses again: at most one is needed at a time."""

    def __init__(self) -> None:
        self._hosts: list[torch.Tensor] = []

    def take(self, obj: Any) -> Snapshot:
        """Copy ``obj`` as copy.deepcopy does, with tensors of GPUs copied to the CPU.

        Shared memory stays shared. Copies from GPUs go to pinned memory, in the order of what their current streams
        compute: nothing waits for them here, and what is computed later in these streams doesn't show in the snapshot.

        The snapshot before is overwritten.

        Raises:
            Exception: Something in ``obj`` cannot be copied.
        """
        before, self._hosts = self._hosts, []
        devices: set[torch.device] = set()
        hosts: dict[int, torch.UntypedStorage] = {}
        memo: dict[Any, Any] = {"torch": hosts}  # where torch's own deepcopy looks for storages
        away: dict[int, torch.UntypedStorage] = {}
        with torch.no_grad():
            for tensor in tensors_in(obj):
                if not _is_plain(tensor):
                    continue
                storage = tensor.untyped_storage()
                known = away if tensor.device.type == "cuda" else hosts
                host = known.get(storage._cdata)
                if host is None:
                    buffer = self._buffer(before, storage)
                    _copy(buffer, bytes_of(storage))
                    host = known[storage._cdata] = buffer.untyped_storage()
                    devices.add(tensor.device)
                memo[id(tensor)] = _over(host, tensor)
            copied = [torch.cuda.current_stream(each).record_event() for each in devices if each.type == "cuda"]
            return Snapshot(copy.deepcopy(obj, memo), copied)

    def _buffer(self, before: list[torch.Tensor], storage: torch.UntypedStorage) -> torch.Tensor:
        """Memory for a storage: the next of the last snapshot's where that fits, as it does from step to step."""
        pinned = storage.device.type == "cuda"
        at = len(self._hosts)
        old = before[at] if at < len(before) else None
        if old is None or len(old) != storage.nbytes() or old.is_pinned() != pinned:
            old = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        self._hosts.append(old)
        return old


def _copy(to: torch.Tensor, content: torch.Tensor) -> None:
    """Copy bytes to the host."""
    if content.device.type == "cpu" and len(content) < _SMALL:
        # torch would have its threads wait for each other each time: milliseconds where other work has their cores.
        to.numpy()[:] = content.numpy()
    else:
        to.copy_(content, non_blocking=True)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is no more than memory with a dtype and a shape, on the CPU or a GPU of CUDA's."""
    return (
        type(tensor) in _COPIED
        and tensor.device.type in ("cpu", "cuda")
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.__dict__)
    )


def _over(storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    """A tensor over ``storage`` that is in all else like ``like``."""
    tensor = torch.empty(0, dtype=like.dtype)
    tensor.set_(storage, like.storage_offset(), like.size(), like.stride())
    if type(like) is not torch.Tensor:  # isinstance takes ten times as long
        return torch.nn.Parameter(tensor, requires_grad=like.requires_grad)
    return tensor.requires_grad_(like.requires_grad)
