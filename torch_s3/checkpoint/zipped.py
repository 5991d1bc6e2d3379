"""Loading torch zip files: torch unpickles, the receiver fills.

torch.load reads a :class:`~torch_s3.checkpoint.archive.StandIn` of the file, and is given storages of ours in place of
those that it makes. Where nothing can look at a tensor's values while the rest is unpickled, they are filled while
that goes on and after; else each storage is whole and checked before torch gets it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from torch_s3.checkpoint.allowed import Unusual
from torch_s3.checkpoint.archive import PICKLE, STORAGES, StandIn, has_sums, read_archive, unpacked
from torch_s3.checkpoint.checkpoint import Checkpoint, Held, Options
from torch_s3.checkpoint.nesting import check_nesting
from torch_s3.checkpoint.progress import Progress
from torch_s3.checkpoint.receive import UNMADE, Want
from torch_s3.checkpoint.torch_load import torch_load
from torch_s3.checkpoint.torch_zip import STORED, Record
from torch_s3.checkpoint.unpickler import FindStorage, unpickle
from torch_s3.errors import CheckpointError
from torch_s3.memory import new_storage, no_collection, view_of
from torch_s3.source import Source

# Every GLOBAL of a pickle of protocol 2 is here, and some that are none. Overlapping: any byte may come before one.
_GLOBAL = re.compile(rb"(?=c([\w.\x80-\xff]{1,300})\n([\w.\x80-\xff]{1,300})\n)")
_PUMPED = 256  # storages are found between looks at what has come
_VERSIONS = 10  # caffe2/serialize/versions.h, kMaxSupportedFileFormatVersion
_PROTOCOL_2 = b"\x80\x02"
_PLAIN = {
    b"torch._utils._rebuild_tensor_v2",
    b"torch._utils._rebuild_tensor_v3",
    b"torch._utils._rebuild_parameter",
    b"collections.OrderedDict",
    b"torch.Size",
    b"torch.device",
    b"torch.storage.UntypedStorage",
    b"__builtin__.set",
}  # and storages and dtypes: what looks at no tensor's values
# Where all is that torch itself allows, under the names of Python 2 too.
_TORCHS = (b"torch.", b"collections.", b"builtins.", b"_codecs.", b"__builtin__.", b"UserDict.", b"UserList.")


class ZippedCheckpoint(Checkpoint):
    """A torch zip file that is being loaded."""

    def __init__(self, source: Source, options: Options, progress: Progress, records: dict[str, Record]) -> None:
        super().__init__(source, options, progress)
        with progress.timing("reading_layout"), no_collection():
            self.archive = archive = read_archive(source, records, verify=options.verify)
        self.verify = options.verify and has_sums(records)
        self.progress.verified = self.verify
        self._storages = {name: each for name, each in archive.records.items() if name.startswith(STORAGES)}
        self.plain = options.weights_only and _is_plain(archive.small[PICKLE], options.safe_globals)
        order = archive.small.get("byteorder")
        assumed = torch.serialization.get_default_load_endianness() is not None
        self.native = order == sys.byteorder.encode() or (order is None and sys.byteorder == "little" and not assumed)
        stored = all(record.method == STORED for record in self._storages.values())
        faked = torch._guards.detect_fake_mode(None) is not None  # noqa: SLF001 - as torch.load asks
        self.selective = self.plain and self.native and stored and not faked
        self.is_bare = faked or options.placement.is_meta  # torch makes storages that have no content
        own = self.selective and not (options.placement.is_call or self.is_bare)
        self.own = own and _has_known_version(archive.small)

    def load(self, only: Collection[str] | None = None) -> Any:
        placement = self.options.placement
        storages = self._storages.values() if only is None else [self._storages[name] for name in only]
        if self.is_bare:
            return _Unpickling(self, [], late=True).run(placement.given)
        late = self.plain and self.native and placement.names_cuda(self.archive.small[PICKLE])
        with no_collection():
            unpickling = _Unpickling(self, storages, late=late)
            found = unpickling.run(unpickling.place, unpickling.find)
        unpickling.finish()
        return found

    def outline(self) -> tuple[Any, dict[int, Held]]:
        if not self.selective:
            return super().outline()
        held: dict[int, Held] = {}
        unpickling = _Unpickling(self, [], late=True)

        def hold(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
            record = unpickling.asked_for(storage)
            if record is not None:
                held[storage.data_ptr()] = self._held(record, storage, location)
            return storage

        def find(key: str, location: str, nbytes: int) -> torch.UntypedStorage:
            record, storage = unpickling.named(key, nbytes), new_storage(nbytes)
            if nbytes:
                held[storage.data_ptr()] = self._held(record, storage, location)
            return storage

        with no_collection():
            return unpickling.run(hold, find), held

    def _held(self, record: Record, storage: torch.UntypedStorage, location: str) -> Held:
        return Held(
            record.name, storage, location, self.archive.starts[record.name], record.crc if self.verify else None
        )

    def want(self, record: Record, storage: torch.UntypedStorage) -> Want:
        """That a record belongs into a storage."""
        crc = record.crc if self.verify else None
        return Want(record.name, self.archive.starts[record.name], record.size, storage, crc=crc)


class _Unpickling:
    """One run of torch.load over the archive's stand-in."""

    def __init__(self, checkpoint: ZippedCheckpoint, storages: Collection[Record], *, late: bool) -> None:
        self._checkpoint, self._late = checkpoint, late
        self._source, self._archive, self._options = checkpoint.source, checkpoint.archive, checkpoint.options
        self._only = {record.name for record in storages}
        self._record: Record | None = None
        self._filled = False
        self._found = 0
        self.wants: dict[str, Want] = {}
        if not late:
            stored = [record for record in storages if record.method == STORED and record.size]
            self.wants = {record.name: checkpoint.want(record, UNMADE) for record in stored}
        self._receiver = checkpoint.start(list(self.wants.values()))

    def run(self, map_location: Any, find: FindStorage | None = None) -> Any:
        """The object.

        Args:
            map_location: For torch.load.
            find: For our own unpickler, which is tried first where it can be.
        """
        options = self._options
        with self._checkpoint.progress.timing("unpickling"):
            if find is not None and self._checkpoint.own:
                with suppress(Unusual):
                    return unpickle(self._archive.small[PICKLE], find)
                if self._late:
                    self.wants = {}
            check_nesting(self._archive.small[PICKLE], uri=self._source.uri)
            return torch_load(
                StandIn(self._archive, self._deliver),
                options.placement,
                map_location,
                weights_only=options.weights_only,
                safe_globals=options.safe_globals,
                size=self._source.size,
                uri=self._source.uri,
            )

    def finish(self) -> None:
        """Wait until all is filled."""
        with self._checkpoint.progress.timing("receiving"):
            if self._late:
                self._receiver = self._checkpoint.start(list(self.wants.values()))
            self._receiver.finish()

    def named(self, key: str, nbytes: int) -> Record:
        """The record of a storage of a size.

        Raises:
            Unusual: There is none.
        """
        record = self._archive.records.get(STORAGES + key)
        if record is None or record.size != nbytes:
            raise Unusual
        return record

    def find(self, key: str, location: str, nbytes: int) -> torch.UntypedStorage:
        """The storage of a record where it goes, which is filled meanwhile."""
        record = self.named(key, nbytes)
        device = self._options.placement.device(location)
        on_cpu = device.type == "cpu"
        if not on_cpu and not (self._late and device.type == "cuda"):
            raise Unusual
        if not self._late and record.name in self.wants:
            self._found += 1
            if self._found % _PUMPED == 1:
                self._receiver.pump()
            return self.wants[record.name].storage
        storage = new_storage(nbytes, None if on_cpu else device)
        if self._late and nbytes and record.name in self._only:
            self.wants[record.name] = self._checkpoint.want(record, storage)
        return storage

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
            self.wants[record.name] = self._checkpoint.want(record, own)
            return own
        if self._late:
            if device is not None and device.type == "meta":
                return placement.restore(storage, location)
            want = self._checkpoint.want(record, storage)
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


def _has_known_version(small: Mapping[str, bytes]) -> bool:
    """Whether the version of the file's format is one that torch here reads."""
    said = small.get("version", small.get(".data/version", b"")).strip()
    return said.isdigit() and len(said) < 3 and 1 <= int(said) <= _VERSIONS


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
