"""Loading safetensors files."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch

from torch_s3.checkpoint import safetensors
from torch_s3.checkpoint.checkpoint import Checkpoint, Held, Options
from torch_s3.checkpoint.progress import Progress
from torch_s3.checkpoint.receive import UNMADE, Want
from torch_s3.checkpoint.safetensors import PREFIX, Layout, TensorBytes
from torch_s3.errors import CheckpointError
from torch_s3.memory import new_storage, no_collection
from torch_s3.source import Source
from torch_s3.wording import brief


def is_safetensors(head: memoryview) -> bool:
    """Whether a file that starts so is, or was once, a safetensors file."""
    length = int.from_bytes(head[:PREFIX], "little")
    return bytes(head[PREFIX : PREFIX + 1]) == b"{" and length <= safetensors.MAX_HEADER


def read_layout(source: Source) -> Layout:
    """What a safetensors file's header says.

    Raises:
        CheckpointError: It breaks the format's rules, or the file is truncated.
    """
    length = safetensors.header_size(bytes(source.head[:PREFIX]), size=source.size, uri=source.uri)
    [header] = source.read([(PREFIX, PREFIX + length)])
    return safetensors.parse(bytes(header), size=source.size, uri=source.uri)


class SafetensorsCheckpoint(Checkpoint):
    """A safetensors file that is being loaded: a dict of tensors by name. The format keeps no checksums."""

    selective = True

    def __init__(self, source: Source, options: Options, progress: Progress) -> None:
        super().__init__(source, options, progress)
        with progress.timing("reading_layout"), no_collection():
            self.tensors = {tensor.name: tensor for tensor in read_layout(source).tensors}

    def load(self, only: Collection[str] | None = None) -> Any:
        tensors = [tensor for tensor in self.tensors.values() if only is None or tensor.name in only]
        placement = self.options.placement
        if placement.is_meta:
            return {each.name: self._tensor(each, None) for each in tensors}
        device = None if placement.is_call else placement.device("cpu")
        in_place = device is not None and device.type in ("cpu", "cuda")
        with no_collection():
            wants = {each.name: _want(each, _storage(each, device if in_place else None)) for each in tensors}
            receiver = self.start([want for want in wants.values() if want.nbytes])
            made = {each.name: self._tensor(each, wants[each.name].storage) for each in tensors}
        with self.progress.timing("receiving"):
            receiver.finish()
        self._swap(made)
        if not in_place:
            for name, tensor in made.items():
                storage = placement.restore(tensor.untyped_storage(), "cpu")
                made[name] = torch.empty(0, dtype=tensor.dtype, device=storage.device)
                made[name].set_(storage, 0, tensor.shape, tensor.stride())
        return made

    def outline(self) -> tuple[Any, dict[int, Held]]:
        with no_collection():
            storages = {name: new_storage(each.stop - each.start) for name, each in self.tensors.items()}
            made = {name: self._tensor(each, storages[name]) for name, each in self.tensors.items()}
            held = {
                storage.data_ptr(): Held(name, storage, "cpu", self.tensors[name].start)
                for name, storage in storages.items()
                if storage.nbytes()
            }
        return made, held

    def _tensor(self, tensor: TensorBytes, storage: torch.UntypedStorage | None) -> torch.Tensor:
        """It over a storage, on the meta device if there is none."""
        try:
            if storage is None:
                return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            made = torch.empty(0, dtype=tensor.dtype, device=storage.device)
            return made.set_(storage, 0, tensor.shape, _strides(tensor.shape))
        except (RuntimeError, OverflowError, TypeError) as error:
            if 0 not in tensor.shape:
                raise
            reason = brief(error)
            raise CheckpointError(f"{tensor.name[:200]!r} is of no shape ({reason})", uri=self.source.uri) from None

    def _swap(self, made: dict[str, torch.Tensor]) -> None:
        """To this machine's byte order."""
        if sys.byteorder == "big":
            for tensor in made.values():
                tensor.untyped_storage().byteswap(tensor.dtype)  # type: ignore[no-untyped-call]


def _want(tensor: TensorBytes, storage: torch.UntypedStorage) -> Want:
    return Want(tensor.name, tensor.start, tensor.stop - tensor.start, storage)


def _storage(tensor: TensorBytes, device: torch.device | None) -> torch.UntypedStorage:
    """For its bytes, on the CPU unless told otherwise; there, the receiver makes it."""
    nbytes = tensor.stop - tensor.start
    on_cpu = device is None or device.type == "cpu"
    return UNMADE if on_cpu and nbytes else new_storage(nbytes, None if on_cpu else device)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor, as torch counts them: a size of 0 as 1."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
