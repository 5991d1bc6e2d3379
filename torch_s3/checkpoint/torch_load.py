"""torch.load, and what its errors mean."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from torch_s3 import errors
from torch_s3.uris import translated
from torch_s3.wording import brief, listed

_UNSAFE = re.compile(
    r"(Unsupported (?!operand)|Trying to (?!resize)|Can only )[^\n]*?(?= was not | is not in |\. Please |$)",
    re.MULTILINE,
)
_ALLOW = "(weights_only=True runs no code; allow types that you trust with safe_globals=[…])"
_DAMAGED = re.compile(
    r"PytorchStreamReader|inline_container|hasRecord|magic number|protocol version|corrupt|unexpected E?e?nd|EOF"
    r"|storage has wrong|does not match expected size"
)
_MACHINE = re.compile(r"Attempting to deserialize object on|restore data location|llocat|out of memory")
_ASKED = re.compile(r"[Tt]ried to allocate (\d+) bytes")
_LISTED = 20  # names in a message
_restore: Any = torch.serialization.default_restore_location  # it has no types


class Placement:
    """Where storages go: torch.load's ``map_location``."""

    def __init__(self, map_location: Any) -> None:
        self.given = map_location
        self.failed = False
        self._devices: dict[str, torch.device] = {}

    @property
    def is_call(self) -> bool:
        """It is the caller's function."""
        return callable(self.given)

    @property
    def is_meta(self) -> bool:
        """Nothing goes anywhere."""
        return isinstance(self.given, str | torch.device) and self._name("") == "meta"

    def names_cuda(self, pickled: bytes) -> bool:
        """Whether storages go to a GPU, as far as can be told before unpickling."""
        if isinstance(self.given, str | bytes | torch.device):
            return self._name("").startswith("cuda")
        said = b"".join(str(name).encode() for name in self.given.values()) if isinstance(self.given, dict) else b""
        return not self.is_call and b"cuda" in pickled + said

    def device(self, location: str) -> torch.device:
        """The device of what was saved from ``location``.

        Raises:
            RuntimeError: torch's, where there is no such device.
        """
        name = self._name(location)
        if name not in self._devices:
            empty = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
            self._devices[name] = _restore(empty, name).device
        return self._devices[name]

    def is_cpu(self, location: str) -> bool:
        """Whether what was saved from ``location`` stays on the CPU."""
        with suppress(RuntimeError):  # there is no such device, which torch says when it loads
            return self.device(location).type == "cpu"
        return False

    def restore(self, storage: torch.UntypedStorage, location: str) -> Any:
        """A storage with its content, moved to where it goes."""
        result = None
        if self.is_call:
            try:
                result = self.given(storage, location)
            except BaseException:
                self.failed = True
                raise
        return _restore(storage, self._name(location)) if result is None else result

    def _name(self, location: str) -> str:
        given = self.given
        if isinstance(given, dict):
            return str(given.get(location, location))
        if isinstance(given, bytes):
            return given.decode("ascii")
        return location if given is None or self.is_call else str(given)


def torch_load(
    file: Any,
    placement: Placement,
    map_location: Any,
    *,
    weights_only: bool,
    safe_globals: Sequence[Any],
    size: int,
    uri: str,
) -> Any:
    """torch.load, with its errors translated.

    Args:
        file: What it reads. Its ``error`` is the first that happened in it, ``truncated`` whether it ended early.
        placement: Whose failures are its caller's.
        map_location: For torch.load.
        weights_only: As in torch.load.
        safe_globals: Types that it may make, in addition to those that it always may.
        size: Bytes of the file: no tensor in it needs more.
        uri: For errors.

    Raises:
        CheckpointError: It is damaged, or torch.save wrote no such file.
        UnsafeCheckpoint: It asks for what ``weights_only=True`` refuses; the message lists that.
        S3Error: The file's own error.
    """
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            return torch.load(file, map_location=map_location, weights_only=weights_only, mmap=False)
    except Exception as error:
        if file.error is not None:  # torch may have made another error of it
            with translated(uri):
                raise file.error from None
        if placement.failed or isinstance(error, errors.S3Error):
            raise
        if file.truncated:
            raise errors.CheckpointError("truncated: its content goes on after its end", uri=uri) from None
        if weights_only and _asks_too_much(error, size):
            raise errors.CheckpointError("damaged: it asks for more memory than it has use for", uri=uri) from None
        if unsafe := _UNSAFE.search(str(error)):
            asked = _unsafe_globals(file, safe_globals)
            words = f"{unsafe[0]}; it asks for {listed(asked, _LISTED)}" if asked else unsafe[0]
            raise errors.UnsafeCheckpoint(f"{words} {_ALLOW}", uri=uri) from None
        if _is_about_the_file(error, weights_only=weights_only) or (
            placement.given is None and "restore data location" in str(error)
        ):
            reason = _reason(error)
            raise errors.CheckpointError(f"not a checkpoint that torch can load ({reason})", uri=uri) from error
        error.add_note(f"while loading {uri}")
        raise


def _reason(error: Exception) -> str:
    """What torch says, in short, without its advice to load it with ``weights_only=False``."""
    said = str(error)
    if said.startswith("Weights only load failed"):
        return "its pickle is none of torch.save's; torch_s3.artifacts.load_estimator loads others'"
    return brief(said)


def _unsafe_globals(file: Any, safe_globals: Sequence[Any]) -> list[str]:
    """What a zip file asks for that is not allowed."""
    if not isinstance(file, io.RawIOBase):
        return []
    file.seek(0)
    with torch.serialization.safe_globals(list(safe_globals)):
        return unsafe_globals(file)


def unsafe_globals(file: Any) -> list[str]:
    """The names that a zip file's pickle asks for and ``weights_only=True`` refuses. Runs and imports nothing."""
    try:
        return sorted(name[:200] for name in torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # noqa: BLE001 - a pickle that is damaged where it was not read yet
        return []


def _asks_too_much(error: Exception, size: int) -> bool:
    """Whether memory was refused for what no file of so many bytes has in it.

    A pickle may ask for storages, tensors and bytes of any size that have no content. torch's allocator says how much
    that was; Python's, which no tensor's content comes from, doesn't.
    """
    asked = _ASKED.search(str(error)) if isinstance(error, RuntimeError) else None
    return isinstance(error, MemoryError) or (asked is not None and int(asked[1]) > size)


def _is_about_the_file(error: Exception, *, weights_only: bool) -> bool:
    """Whether torch's error means that the file is damaged, and not, say, that ``map_location`` names no device."""
    if isinstance(error, (pickle.UnpicklingError, EOFError, ValueError)):
        return True
    if not weights_only:
        return isinstance(error, RuntimeError) and bool(_DAMAGED.search(str(error)))
    # No code but torch's own has run: unless it is about this machine, it is about the file.
    if isinstance(error, (OSError, MemoryError, Warning)):
        return False
    return not _MACHINE.search(str(error))
