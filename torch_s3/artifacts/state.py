"""Pickled state_dicts: tensors and containers, and nothing else."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import fsspec
import torch

from torch_s3 import errors
from torch_s3.artifacts.archive import Zip, check_zip, is_tar, is_zip
from torch_s3.artifacts.members import Caps
from torch_s3.artifacts.pickles import built, checked, looked_up
from torch_s3.artifacts.placement import check_map_location
from torch_s3.artifacts.source import MAX_BYTES, MemoryFile, read_whole
from torch_s3.artifacts.trust import Trust
from torch_s3.artifacts.unpack import COMPRESSIONS, compression

_BRACE = ord("{")  # with which the header of .safetensors starts
_ADVICE = (
    "Tensors, arrays, numbers and containers are all that it may hold: of a whole module, save its state_dict(); an "
    "estimator is for load_estimator"
)
_LARGE = 64 * 1024  # bytes that are not copied
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def load_state_dict(
    uri: str,
    *,
    map_location: Any = None,
    max_bytes: int = MAX_BYTES,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Mapping[str, Any]:
    """Load a state_dict that pickle wrote: ``pickle.dump(model.state_dict(), file)``.

    What :func:`torch.save` wrote is for :func:`~torch_s3.load_checkpoint`. Nothing is written to a disk.

    Args:
        uri: ``s3://bucket/key``, or a file of any filesystem that fsspec knows.
        map_location: As in :func:`torch.load`.
        max_bytes: Most bytes of the object.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for the uri.

    Raises:
        ValueError: ``map_location`` is no device of this machine.
        NotFound: There is no such object.
        UnsafeArtifact: It asks for something else than tensors, numpy's arrays, numbers and containers: ``asks_for``
            lists that. Nothing was built.
        ArtifactError: It is no whole pickle of a state_dict.
        ObjectChanged: It was overwritten while it was read.
    """
    uri = os.fspath(uri)
    check_map_location(map_location, uri=uri, one=False)
    where: dict[str, Any] = {"storage_options": storage_options, "filesystem": filesystem}
    content = read_whole(uri, max_bytes=max_bytes, **where)
    if words := _other_format(content, uri):
        raise errors.ArtifactError(f"no pickle of a state_dict: {words}", uri=uri)
    storages = _Storages(map_location, len(content), uri=uri)
    _, found = checked(content, Trust((), _instead(storages), advice=_ADVICE), uri=uri)
    with built(uri):
        state = _Unpickler(content, found).load()
    if not isinstance(state, Mapping):
        words = f"it holds no state_dict: {type(state).__name__} (for what torch.save wrote, use load_checkpoint)"
        raise errors.ArtifactError(words, uri=uri)
    return state


def _other_format(content: memoryview, uri: str) -> str | None:
    """What it is that is no pickle, and what loads that."""
    if is_zip(content):
        with suppress(errors.S3Error):
            names = set(Zip(MemoryFile(content), Caps(), uri=uri))
            if "schema.json" in names:
                return "a .skops file, for load_estimator"
            if not any(name.endswith("/data.pkl") for name in names):
                return "a zip, for open_artifact"
        return "a zip: torch.save writes such files, for load_checkpoint"
    header = 8 + int.from_bytes(content[:8], "little")
    if 8 < header <= len(content) and content[8] == _BRACE:
        return "it looks like .safetensors, for load_checkpoint"
    if is_tar(content):
        return "a tar, for load_estimator or open_artifact"
    kind = compression(content, COMPRESSIONS)
    return kind and f"it is compressed by {kind}, for load_estimator or open_artifact, or unpack it"


class _Views(MemoryFile):
    """Gives large pieces as memory, which is not copied: the bytes in which a storage is saved once more."""

    def read(self, size: int | None = -1, /) -> Any:
        found = self.view(size)
        return found if len(found) >= _LARGE else bytes(found)


class _Unpickler(pickle._Unpickler):  # noqa: SLF001 - the one in Python, which takes what read() gives
    def __init__(self, content: memoryview, found: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(_Views(content))
        self._found = found

    def find_class(self, module: str, name: str) -> Any:
        return looked_up(self._found, module, name)


def _instead(storages: _Storages) -> dict[str, Any]:
    """What the names in pickles of tensors stand for here."""
    return {
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.storage._load_from_bytes": storages.load,
        "torch.Size": _shape,
        "torch.device": torch.device,
        **_DTYPES,
    }


class _Storages:
    """Loads those of one pickle, which together have no more bytes than it: each is saved once."""

    def __init__(self, map_location: Any, most: int, *, uri: str) -> None:
        self._map_location, self._most, self._uri = map_location, most, uri
        self._bytes = 0

    def load(self, content: Any) -> Any:
        """torch's own calls torch.load without ``weights_only``."""
        file: Any = MemoryFile(memoryview(content))
        if is_zip(file.memory):
            archive = Zip(file, Caps(), uri=self._uri)
            self._add(sum(map(archive.size, archive)))
            check_zip(file.memory, uri=self._uri)
            file.seek(0)
        else:
            self._add(len(file.memory))
        storage = torch.load(file, map_location=self._map_location, weights_only=True)
        if not isinstance(storage, torch.TypedStorage | torch.UntypedStorage):
            raise TypeError(f"{type(storage).__name__} where a storage should be")
        return storage

    def _add(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._most:
            raise errors.ArtifactError(f"a bomb: its tensors have more than its {self._most} bytes", uri=self._uri)


def _tensor(
    storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], requires_grad: bool, *_: Any
) -> torch.Tensor:
    """A tensor that lies in its storage: torch would make the storage larger."""
    if not isinstance(storage, torch.TypedStorage) or len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
        raise ValueError("a tensor of no such shape or storage")
    memory = storage._untyped_storage  # noqa: SLF001 - the public way to it warns
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    tensor = torch.empty(0, dtype=storage.dtype, device=memory.device)
    if 0 not in shape and (offset + last + 1) * tensor.itemsize > memory.nbytes():
        raise ValueError(f"a tensor goes beyond the {memory.nbytes()} bytes of its storage")
    return tensor.set_(memory, offset, tuple(shape), tuple(strides)).requires_grad_(bool(requires_grad))


def _shape(sizes: Any) -> torch.Size:
    if not isinstance(sizes, tuple | list):
        raise TypeError("a shape of no sizes")
    return torch.Size(sizes)


def _parameter(tensor: Any, requires_grad: bool, *_: Any) -> torch.nn.Parameter:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError("a parameter of no tensor")
    return torch.nn.Parameter(tensor.detach(), bool(requires_grad))
