"""What checkpoints of every format can do: be loaded whole, in part, or into tensors that exist."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torch_s3.checkpoint import tree
from torch_s3.checkpoint.progress import Progress
from torch_s3.checkpoint.receive import Receiver, Want
from torch_s3.checkpoint.torch_load import Placement
from torch_s3.checkpoint.tree import Keys
from torch_s3.errors import CheckpointMismatch
from torch_s3.source import Source
from torch_s3.wording import brief


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a load was asked for; see :func:`~torch_s3.load_checkpoint`."""

    placement: Placement
    weights_only: bool
    safe_globals: Sequence[Any]
    verify: bool


class Held(NamedTuple):
    """A storage of undefined content.

    Attributes:
        name: Of what belongs into it.
        storage: On the CPU.
        location: Where it was saved from, by torch's name.
        start: Where in the file that is.
        crc: CRC32 that it must have, ``None`` to believe it.
    """

    name: str
    storage: torch.UntypedStorage
    location: str
    start: int
    crc: int | None = None

    def want(self, storage: torch.UntypedStorage | None = None, at: int = 0) -> Want:
        """That its content belongs into it, or into another storage from a byte on."""
        into = self.storage if storage is None else storage
        return Want(self.name, self.start, self.storage.nbytes(), into, at, self.crc)


class Checkpoint(ABC):
    """A checkpoint that is being loaded.

    Attributes:
        source: The file.
        options: What was asked for.
        progress: Told of what has come.
        selective: Whether its tensors can be known before their bytes are.
    """

    selective = False

    def __init__(self, source: Source, options: Options, progress: Progress) -> None:
        self.source, self.options, self.progress = source, options, progress

    @abstractmethod
    def load(self, only: Collection[str] | None = None) -> Any:
        """The object, its tensors filled.

        Args:
            only: Names of those whose bytes are wanted, ``None`` for all. The content of others is undefined.
        """

    def outline(self) -> tuple[Any, dict[int, Held]]:
        """The object with tensors of undefined content, on the CPU, and what belongs into their storages, by the
        addresses of those. Of what is not ``selective``, the object, loaded, and nothing.
        """
        return self.load(), {}

    def start(self, wants: Sequence[Want]) -> Receiver:
        """Begin to fill storages."""
        self.progress.expect(sum(want.nbytes for want in wants))
        return Receiver(self.source, wants, self.progress)

    def receive(self, wants: Sequence[Want]) -> None:
        """Fill storages."""
        with self.progress.timing("receiving"):
            self.start(wants).finish()

    def selected(self, keys: Keys) -> Any:
        """Just what is wanted of it.

        Raises:
            CheckpointMismatch: Nothing in it matches a key.
        """
        uri, placement = self.source.uri, self.options.placement
        if not self.selective or placement.is_meta:
            return keys.select(self.load(), uri=uri)
        outline, held = self.outline()
        selected = keys.select(outline, uri=uri)
        storages = tree.storages(selected)
        wanted = held.keys() & {storage.data_ptr() for storage in storages}
        if not placement.is_call and all(placement.is_cpu(held[at].location) for at in wanted):
            self.receive([held[at].want() for at in wanted])
            return selected
        names = {held[at].name for at in wanted}
        del outline, held, selected, storages
        return keys.select(self.load(names), uri=uri)

    def outlined(self, keys: Keys | None) -> tuple[Any, dict[int, Held]]:
        """As :meth:`outline`, of what is wanted."""
        found, held = self.outline()
        return (found if keys is None else keys.select(found, uri=self.source.uri)), held

    def fill(self, outline: Any, held: dict[int, Held], into: dict[str, torch.Tensor]) -> Any:
        """Write what :meth:`outlined` gave into tensors that exist.

        Args:
            outline: The object.
            held: What belongs into its storages.
            into: Tensors by path, of the same dtypes and shapes.

        Returns:
            The object with those tensors.
        """
        direct: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        copied = []
        for path, source in tree.tensors(outline, uri=self.source.uri).items():
            target, at = into[path], _address(source) if held else 0
            if at in held and _is_all(source) and _is_plain(target):
                if at not in direct:
                    direct[at] = source, target
                    continue
                if direct[at][1].data_ptr() == target.data_ptr():  # weights that are tied there too
                    continue
            copied.append((source, target))
        wants: dict[int, Want] = {}
        reached = 0
        for at, (source, target) in sorted(direct.items(), key=lambda item: int(item[1][1].data_ptr())):
            if target.data_ptr() < reached:  # two tensors, that are one there: not at once into the same memory
                copied.append((source, target))
                continue
            reached = target.data_ptr() + target.nbytes
            begin = int(target.storage_offset()) * target.itemsize
            wants[at] = held[at].want(target.untyped_storage(), begin)
        hidden = [storage.data_ptr() for storage in tree.storages(outline, beyond_paths=True)] if held else []
        for at in [*hidden, *(_address(source) for source, _ in copied if held)]:
            if at in held:
                wants[-at] = held[at].want()
        self.receive(list(wants.values()))
        with torch.no_grad():
            for source, target in copied:
                try:
                    target.copy_(source)
                except RuntimeError as error:  # of sparse tensors, whose numbers of elements differ
                    reason = brief(error)
                    raise CheckpointMismatch(f"it cannot fill a tensor ({reason})", uri=self.source.uri) from None
        return tree.replaced(outline, into)


def _address(tensor: torch.Tensor) -> int:
    """Of a dense tensor's storage."""
    return int(tensor.untyped_storage().data_ptr())


def _is_all(tensor: torch.Tensor) -> bool:
    """Whether the bytes of its storage are its elements, in order."""
    nbytes = tensor.numel() * tensor.itemsize
    begins_it = int(tensor.storage_offset()) == 0
    return _is_plain(tensor) and begins_it and tensor.untyped_storage().nbytes() == nbytes


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its elements lie in order, in memory that can be received into."""
    dense = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type in ("cpu", "cuda")
    return bool(dense and tensor.is_contiguous()) and not tensor.is_conj() and not tensor.is_neg()
