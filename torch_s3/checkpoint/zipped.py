"""Loading torch zip files: torch unpickles, the receiver fills.

torch.load reads a :class:`~torch_s3.checkpoint.archive.StandIn` of the file, and is given storages of ours in place of
those that it makes. Where nothing can look at a tensor's values while the rest is unpickled, they are filled while
that goes on and after; else each storage is whole and checked before torch gets it.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from torch_s3.checkpoint.archive import PICKLE, STORAGES, StandIn, read_archive, unpacked
from torch_s3.checkpoint.checkpoint import Checkpoint, Held, Options
from torch_s3.checkpoint.memory import new_storage, view_of
from torch_s3.checkpoint.progress import Progress
from torch_s3.checkpoint.receive import Want
from torch_s3.checkpoint.source import Source
from torch_s3.checkpoint.torch_load import torch_load
from torch_s3.checkpoint.torch_zip import STORED, Record
from torch_s3.errors import CheckpointError

# Every GLOBAL of a pickle of protocol 2 is here, and some that are none. Overlapping: any byte may come before one.
_GLOBAL = re.compile(rb"(?=c([\w.\x80-\xff]{1,300})\n([\w.\x80-\xff]{1,300})\n)")
_PROTOCOL_2 = b"\x80\x02"
_PLAIN = {
    b"torch._utils._rebuild_tensor_v2",
    b"torch._utils._rebuild_tensor_v3",
    b"torch._utils._rebuild_parameter",
    b"collections.OrderedDict",
    b"torch.Size",
    b"torch.device",
    b"torch.storage.UntypedStorage",
}  # and storages and dtypes: what looks at no tensor's values
_TORCHS = (b"torch.", b"collections.", b"builtins.", b"_codecs.")  # where all is that torch itself allows


@contextmanager
def _no_collection() -> Iterator[None]:
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


class ZippedCheckpoint(Checkpoint):
    """A torch zip file that is being loaded."""

    def __init__(self, source: Source, options: Options, progress: Progress) -> None:
        super().__init__(source, options, progress)
        with progress.timing("reading_layout"):
            self.archive = archive = read_archive(source, verify=options.verify)
        self.verify = options.verify and archive.has_sums
        self.progress.verified = self.verify
        self._storages = {name: each for name, each in archive.records.items() if name.startswith(STORAGES)}
        self.plain = options.weights_only and _is_plain(archive.small[PICKLE], options.safe_globals)
        order = archive.small.get("byteorder")
        assumed = torch.serialization.get_default_load_endianness() is not None
        self.native = order == sys.byteorder.encode() or (order is None and sys.byteorder == "little" and not assumed)
        stored = all(record.method == STORED for record in self._storages.values())
        self.selective = self.plain and self.native and stored

    def load(self, only: Collection[str] | None = None) -> Any:
        placement = self.options.placement
        storages = self._storages.values() if only is None else [self._storages[name] for name in only]
        if placement.is_meta:
            return _Unpickling(self, [], late=True).run(torch.device("meta"))
        late = self.plain and self.native and placement.names_cuda(self.archive.small[PICKLE])
        with _no_collection():
            unpickling = _Unpickling(self, storages, late=late)
            found = unpickling.run(unpickling.place)
        unpickling.finish()
        return found

    def outline(self) -> tuple[Any, dict[int, Held]]:
        held: dict[int, Held] = {}
        unpickling = _Unpickling(self, [], late=True)

        def hold(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
            record = unpickling.asked_for(storage)
            if record is not None:
                held[storage.data_ptr()] = Held(record.name, storage, location)
            return storage

        return unpickling.run(hold), held

    def want(self, name: str, storage: torch.UntypedStorage, at: int = 0) -> Want:
        record = self.archive.records[name]
        return Want(name, self.archive.starts[name], record.size, storage, at, record.crc if self.verify else None)


class _Unpickling:
    """One run of torch.load over the archive's stand-in."""

    def __init__(self, checkpoint: ZippedCheckpoint, storages: Collection[Record], *, late: bool) -> None:
        self._checkpoint, self._late = checkpoint, late
        self._source, self._archive, self._options = checkpoint.source, checkpoint.archive, checkpoint.options
        self._only = {record.name for record in storages}
        self._record: Record | None = None
        self._filled = False
        self.wants: dict[str, Want] = {}
        if not late:
            stored = [record for record in storages if record.method == STORED and record.size]
            self.wants = {record.name: checkpoint.want(record.name, new_storage(record.size)) for record in stored}
        self._receiver = checkpoint.start(list(self.wants.values()))

    def run(self, map_location: Any) -> Any:
        """The object."""
        options = self._options
        with self._checkpoint.progress.timing("unpickling"):
            return torch_load(
                StandIn(self._archive, self._deliver),
                options.placement,
                map_location,
                weights_only=options.weights_only,
                safe_globals=options.safe_globals,
                uri=self._source.uri,
            )

    def finish(self) -> None:
        """Wait until all is filled."""
        with self._checkpoint.progress.timing("receiving"):
            if self._late:
                self._receiver = self._checkpoint.start(list(self.wants.values()))
            self._receiver.finish()

    def asked_for(self, storage: torch.UntypedStorage) -> Record | None:
        """The record whose storage torch has just made; ``None`` of an empty one."""
        record, self._record = self._record, None
        if not storage.nbytes():
            return None
        if record is None or record.size != storage.nbytes():
            words = "its pickle and its storages don't agree on their sizes"
            raise CheckpointError(f"damaged: {words}", uri=self._source.uri)
        return record

    def place(self, storage: torch.UntypedStorage, location: str) -> Any:
        """What torch is to take for the storage that it has made: torch.load's ``map_location``."""
        record, placement = self.asked_for(storage), self._options.placement
        if record is None or self._filled:
            return placement.restore(storage, location)
        if record.name not in self._only:
            return storage
        device = None if placement.is_call else placement.device(location)
        if self._late and device is not None and device.type in ("cpu", "cuda"):
            own = new_storage(record.size, None if device.type == "cpu" else device)
            self.wants[record.name] = self._checkpoint.want(record.name, own)
            return own
        if self._late:
            if device is not None and device.type == "meta":
                return placement.restore(storage, location)
            want = self._checkpoint.want(record.name, storage)
            self._checkpoint.receive([want])
        else:
            want = self.wants[record.name]
            if self._checkpoint.plain and device is not None and device.type == "cpu":
                return want.storage
            self._receiver.finish(want)
        result = placement.restore(want.storage, location)
        if result.data_ptr():  # or torch will ask for it again
            want.storage = storage
        return result

    def _deliver(self, record: Record, memory: memoryview) -> None:
        """Note which storage torch reads; where it looks at the bytes itself, give them."""
        self._record, self._filled = record, False
        if record.method != STORED:
            start = self._archive.starts[record.name]
            [content] = self._source.read([(start, start + record.length)])
            memory[:] = unpacked(record, content, source=self._source, verify=self._checkpoint.verify)
            self._filled = True
        elif not self._checkpoint.native and record.name in self.wants:
            want = self.wants[record.name]
            self._receiver.finish(want)
            memory[:] = view_of(want.storage)
            self._filled = True
        else:
            self._receiver.pump()


def _is_plain(pickled: bytes, safe_globals: Sequence[Any]) -> bool:
    """Whether a pickle makes nothing but containers, numbers and dense tensors, or fails."""
    if not pickled.startswith(_PROTOCOL_2):
        return False
    given = [*safe_globals, *torch.serialization.get_safe_globals()]
    allowed = {each[1] if isinstance(each, tuple) else f"{each.__module__}.{each.__qualname__}" for each in given}
    found = {b".".join(pair) for pair in _GLOBAL.findall(pickled)}
    # What is neither torch's to allow nor its user's, it refuses, or it is none: just bytes that look so.
    known = {name for name in found if name.startswith(_TORCHS) or name.decode("utf-8", "replace") in allowed}
    return all(name in _PLAIN or _is_kind(name) for name in known)


def _is_kind(name: bytes) -> bool:
    """Whether it is a storage class or a dtype."""
    module, _, kind = name.rpartition(b".")
    is_dtype = isinstance(getattr(torch, kind.decode("ascii", "replace"), None), torch.dtype)
    return module == b"torch" and (is_dtype or kind.endswith(b"Storage"))
