"""From where tensors are to where their bytes can be sent from: the host's memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch

from torch_s3.memory import bytes_of

_CHUNK = 32 * 1024 * 1024  # bytes of one copy from a GPU


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
            waiting.extend(reversed(list(each.values() if isinstance(each, dict) else each)))


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
    def of_storages(self, all_of_them: Iterable[torch.UntypedStorage]) -> Iterator[None]:
        """Within the block, torch.save finds storages of GPUs copied when their turn comes.

        It asks each for its ``cpu()``, in the order of :func:`storages_in`, which gives them. The file is as it would
        be, the storages' devices included. Host memory: twice the largest storage, or 64 MiB where that is more.
        """
        storages = [each for each in all_of_them if each.is_cuda and each.nbytes()]
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
