"""Loading safetensors files."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch

from torch_s3.checkpoint import safetensors
from torch_s3.checkpoint.checkpoint import Checkpoint, Held, Options
from torch_s3.checkpoint.memory import new_storage
from torch_s3.checkpoint.progress import Progress
from torch_s3.checkpoint.receive import Want
from torch_s3.checkpoint.safetensors import PREFIX, Layout, TensorBytes
from torch_s3.checkpoint.source import Source
from torch_s3.errors import CheckpointError


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
        with progress.timing("reading_layout"):
            self.tensors = {tensor.name: tensor for tensor in read_layout(source).tensors}

    def load(self, only: Collection[str] | None = None) -> Any:
        tensors = [tensor for tensor in self.tensors.values() if only is None or tensor.name in only]
        placement = self.options.placement
        if placement.is_meta:
            return {tensor.name: self._tensor(tensor, torch.device("meta")) for tensor in tensors}
        device = None if placement.is_call else placement.device("cpu")
        in_place = device is not None and device.type in ("cpu", "cuda")
        made = {tensor.name: self._tensor(tensor, device if in_place else None) for tensor in tensors}
        receiver = self.start([self.want(name, each.untyped_storage()) for name, each in made.items() if each.nbytes])
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
        made = {name: self._tensor(tensor, None) for name, tensor in self.tensors.items()}
        storages = {name: tensor.untyped_storage() for name, tensor in made.items() if tensor.nbytes}
        return made, {storage.data_ptr(): Held(name, storage, "cpu") for name, storage in storages.items()}

    def want(self, name: str, storage: torch.UntypedStorage, at: int = 0) -> Want:
        tensor = self.tensors[name]
        return Want(name, tensor.start, tensor.stop - tensor.start, storage, at)

    def _tensor(self, tensor: TensorBytes, device: torch.device | None) -> torch.Tensor:
        try:
            if device is not None and device.type == "meta":
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            made = torch.empty(0, dtype=tensor.dtype, device=device)
            strides = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").stride()
            storage = new_storage(tensor.stop - tensor.start, None if device == _CPU else device)
            return made.set_(storage, 0, tensor.shape, strides)
        except (RuntimeError, OverflowError) as error:
            if 0 not in tensor.shape:
                raise
            reason = str(error).split("\n")[0][:200]
            raise CheckpointError(f"{tensor.name[:200]!r} is of no shape ({reason})", uri=self.source.uri) from None

    def _swap(self, made: dict[str, torch.Tensor]) -> None:
        """To this machine's byte order."""
        if sys.byteorder == "big":
            for tensor in made.values():
                tensor.untyped_storage().byteswap(tensor.dtype)  # type: ignore[no-untyped-call]


_CPU = torch.device("cpu")
