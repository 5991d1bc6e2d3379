"""Copies of a state as it is now, on the host: what an asynchronous save saves."""

from __future__ import annotations

import copy
import ctypes
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from torch_s3.checkpoint.staging import tensors_in
from torch_s3.memory import ALIGNMENT, bytes_of, new_storage, no_collection

_SMALL = 1024 * 1024  # bytes that one core copies sooner than several agree to
_CHUNK = 64 * 1024 * 1024  # bytes of the memory that small tensors share
_COPIED = (torch.Tensor, torch.nn.Parameter)  # other types know best how to copy themselves
_ATOMS = frozenset({str, int, float, bool, type(None), bytes, complex})  # which copy.deepcopy leaves as they are


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
        self._hosts: list[_Host] = []

    def take(self, obj: Any) -> Snapshot:
        """Copy ``obj`` as copy.deepcopy does, with tensors of GPUs copied to the CPU.

        Shared memory stays shared. Copies from GPUs go to pinned memory, in the order of what their current streams
        compute: nothing waits for them here, and what is computed later in these streams doesn't show in the snapshot.

        The snapshot before is overwritten.

        Raises:
            Exception: Something in ``obj`` cannot be copied.
        """
        copies = _Copies(self._hosts)
        self._hosts = copies.hosts
        with torch.no_grad(), no_collection():
            state = copies.of(obj)
            copies.move()
            return Snapshot(state, [torch.cuda.current_stream(each).record_event() for each in copies.gpus])


class _Host(NamedTuple):
    """A tensor of a snapshot that has a storage for itself.

    Attributes:
        like: Type, dtype, shape and whether a gradient is required, of what is copied there.
        pinned: Whether GPUs copy to it by themselves.
        tensor: It.
        address: Where its bytes are.
    """

    like: tuple[Any, ...]
    pinned: bool
    tensor: torch.Tensor
    address: int


class _Copies:
    """One copy of a state.

    Args:
        before: The last one's hosts: each is taken again where what is copied to it is alike, as from step to step.
    """

    def __init__(self, before: list[_Host]) -> None:
        self._before = before
        self.hosts: list[_Host] = []
        self.gpus: set[torch.device] = set()
        self._on_cpu: dict[int, torch.UntypedStorage] = {}
        self._on_gpu: dict[int, torch.UntypedStorage] = {}
        self._memo: dict[Any, Any] = {"torch": self._on_cpu}  # where torch's own deepcopy looks for storages
        self._moves: list[tuple[int, int, int]] = []  # to, from, bytes
        self._met: list[Any] = []  # what may exist for this once, and is known by its address
        self._chunk, self._used = torch.UntypedStorage(0), 0  # type: ignore[no-untyped-call]

    def of(self, node: Any) -> Any:
        """A copy of something in the state."""
        kind = type(node)
        if kind in _ATOMS:
            return node
        found = self._memo.get(id(node))
        if found is not None:
            return found
        made: Any
        if kind in _COPIED:
            made = self._memo[id(node)] = self._tensor(node)
            if node.__dict__:  # which torch.save saves, and a Parameter's own deepcopy forgets
                vars(made).update(self.of(vars(node)))
        elif kind is dict or kind is OrderedDict:
            made = self._memo[id(node)] = kind()
            for key, value in node.items():
                made[key if type(key) in _ATOMS else copy.deepcopy(key, self._memo)] = self.of(value)
            if kind is OrderedDict:
                vars(made).update(self.of(vars(node)))  # the _metadata of a state_dict
        elif kind is list:
            made = self._memo[id(node)] = []
            made.extend(map(self.of, node))
        elif kind is tuple:
            made = self._memo[id(node)] = tuple(map(self.of, node))
        else:
            tensors = list(tensors_in(node))
            self._met.append(tensors)
            for tensor in tensors:
                if _is_plain(tensor):
                    self.of(tensor)
            self.move()  # whatever its own way to be copied looks at is there
            made = copy.deepcopy(node, self._memo)
        return made

    def move(self) -> None:
        """Copy the bytes of small tensors that were met since the last time.

        One after another, by one core: torch would have its threads wait for each other each time, milliseconds where
        other work has their cores. And after all were met: between copies, which fill the cache, that takes longer.
        """
        for move in self._moves:
            ctypes.memmove(*move)
        self._moves.clear()

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not _is_plain(tensor):
            leaf = tensor if tensor.is_leaf else tensor.detach().requires_grad_()  # as torch.load will give it
            copied: torch.Tensor = copy.deepcopy(leaf, self._memo)
            return copied
        storage, nbytes = tensor.untyped_storage(), tensor.nbytes
        known = self._on_cpu if tensor.is_cpu else self._on_gpu
        mark = storage._cdata
        host = known.get(mark)
        if host is not None:
            return _over(host, tensor)
        if not tensor.is_cpu:
            self.gpus.add(tensor.device)
        if storage.nbytes() != nbytes or not tensor.is_contiguous():
            flat = bytes_of(storage)
            host = known[mark] = self._host(flat, len(flat)).untyped_storage()
            return _over(host, tensor)
        made = self._host(tensor, nbytes)
        known[mark] = made.untyped_storage()
        return made

    def _host(self, tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
        """A copy of a contiguous tensor, in memory of its own."""
        like, pinned, at = (
            (type(tensor), tensor.dtype, tensor.shape, tensor.requires_grad),
            not tensor.is_cpu,
            len(self.hosts),
        )
        old = self._before[at] if at < len(self._before) else None
        if old is None or old.like != like or old.pinned is not pinned:
            storage = self._memory(nbytes, pinned=pinned)
            old = _Host(like, pinned, _over(storage, tensor), storage.data_ptr())
        old.tensor.__dict__.clear()
        self.hosts.append(old)
        if nbytes < _SMALL and not pinned:
            self._moves.append((old.address, tensor.data_ptr(), nbytes))
        else:
            old.tensor.copy_(tensor, non_blocking=True)
        return old.tensor

    def _memory(self, nbytes: int, *, pinned: bool) -> torch.UntypedStorage:
        if pinned:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).untyped_storage()
        if not 0 < nbytes < _SMALL:
            return new_storage(nbytes)
        if self._used + nbytes > self._chunk.nbytes():
            self._chunk, self._used = new_storage(_CHUNK), 0
        start = self._used
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        storage: torch.UntypedStorage = self._chunk[start : start + nbytes]
        return storage


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is no more than memory with a dtype and a shape, on the CPU or a GPU of CUDA's."""
    return (
        type(tensor) in _COPIED
        and (tensor.is_cpu or tensor.is_cuda)  # device.type takes five times as long
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _over(storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    """A tensor over ``storage`` that is in all else like ``like``."""
    tensor = torch.empty(0, dtype=like.dtype)
    tensor.set_(storage, like.storage_offset(), like.size(), like.stride())
    if type(like) is not torch.Tensor:  # isinstance takes ten times as long
        return torch.nn.Parameter(tensor, requires_grad=like.requires_grad)
    return tensor.requires_grad_(like.requires_grad)
