"""Models that PyTorch has compiled or exported: from S3 into memory."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
import torch

from torch_s3 import errors
from torch_s3.artifacts.archive import check_zip, is_zip
from torch_s3.artifacts.exported_check import refusals
from torch_s3.artifacts.placement import check_map_location
from torch_s3.artifacts.source import MemoryFile, read_whole
from torch_s3.wording import brief, listed

_LISTED = 10  # of refusals in a message
_KINDS = {  # a member of each, and what else it may be
    "/archive_format": "load_exported",
    "/constants.pkl": "load_torchscript",
    "/data.pkl": "load_checkpoint",
    "schema.json": "load_estimator",
}


def _loader(names: Collection[str]) -> str | None:
    """What loads a zip that has such members."""
    return next((load for part, load in _KINDS.items() if any(name.endswith(part) for name in names)), None)


@contextmanager
def _file_of(memory: list[memoryview]) -> Iterator[Any]:
    """What torch.jit.load reads best: a file, which it copies from into tensors; from other objects it copies twice.

    Args:
        memory: The content, taken out of the list, so that it can go before torch makes its own of it.
    """
    try:
        descriptor = os.memfd_create("torch_s3")  # a file in memory, that has no name and goes when it is closed
    except (AttributeError, OSError):  # not on macOS
        yield io.BytesIO(memory.pop())
        return
    try:
        if _written(descriptor, memory[0]):
            memory.clear()
            yield f"/proc/self/fd/{descriptor}"
        else:
            yield io.BytesIO(memory.pop())
    finally:
        os.close(descriptor)


def _written(descriptor: int, content: memoryview) -> bool:
    """Whether a file took it all: its size may be limited."""
    with suppress(OSError):
        while content:
            content = content[os.write(descriptor, content) :]
    return not content


def load_torchscript(
    uri: str | os.PathLike[str],
    *,
    map_location: str | torch.device | None = "cpu",
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Any:
    """Load what ``torch.jit.save`` wrote. Nothing touches a disk.

    A TorchScript file is a program: it can do what TorchScript can, which includes reading and writing files. Load only
    what you trust. PyTorch has deprecated the format in favour of ``torch.export``, see :func:`load_exported`; that it
    warns of each load is left out here.

    Args:
        uri: The object, or file of any filesystem.
        map_location: The device to put it on; ``None`` for the one that it was saved from.
        storage_options: For the filesystem that the uri asks for.
        filesystem: Any fsspec filesystem to read from instead.

    Returns:
        A ``torch.jit.ScriptModule``.

    Raises:
        ValueError: ``map_location`` is no device of this machine.
        NotFound: There is no such object.
        ArtifactError: It is no TorchScript, or damaged.
        IntegrityError: A part of it has another CRC32 than it says; PyTorch doesn't look.
    """
    uri = os.fspath(uri)
    check_map_location(map_location, uri=uri, one=True)
    memory = [read_whole(uri, storage_options=storage_options, filesystem=filesystem)]
    if bytes(memory[0][:2]) != b"PK":
        raise errors.ArtifactError("not a TorchScript file: it is no zip", uri=uri)
    loader = _loader(check_zip(memory[0], uri=uri))
    if loader not in (None, "load_torchscript"):
        raise errors.ArtifactError(f"not a TorchScript file: {loader} loads such", uri=uri)
    try:
        with _file_of(memory) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
            return torch.jit.load(file, map_location=map_location)  # type: ignore[no-untyped-call]
    except (errors.S3Error, MemoryError, torch.OutOfMemoryError, Warning):
        raise
    except Exception as error:  # of damaged members, PyTorch raises what it happens upon
        words = brief(error, 300)
        if not any(sign in words for sign in ("PytorchStreamReader", "archive", "Unknown", "zip")):
            message = f"damaged, or not for this machine: PyTorch {torch.__version__} cannot load it ({words})"
            raise errors.ArtifactError(message, uri=uri) from error
        raise errors.ArtifactError(f"not a TorchScript file, or damaged ({words})", uri=uri) from None


def load_exported(
    uri: str | os.PathLike[str],
    *,
    trusted: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> torch.export.ExportedProgram:
    """Load what ``torch.export.save`` wrote (``.pt2``). Nothing touches a disk.

    ``torch.export.load`` runs what a file brings: pickles, Python in sizes and guards, compiled libraries. So the file
    is looked at first, and only what models of plain tensors and PyTorch's own operations need is let through.

    Args:
        uri: The object, or file of any filesystem.
        trusted: Load it whatever it has: for those that you made yourself.
        storage_options: For the filesystem that the uri asks for.
        filesystem: Any fsspec filesystem to read from instead.

    Returns:
        The program; its ``module()`` is what is called.

    Raises:
        NotFound: There is no such object.
        ArtifactError: It is no ``.pt2`` file, or of a version that this PyTorch doesn't read, or damaged.
        IntegrityError: A part of it has another CRC32 than it says; PyTorch doesn't look.
        UnsafeArtifact: It would run something else. The message lists what.
    """
    if not isinstance(trusted, bool):
        raise TypeError(f"trusted={trusted!r:.100}: True or False, for a program is trusted as a whole")
    from torch.export.pt2_archive import PT2ArchiveReader
    from torch.export.pt2_archive._package import load_pt2  # torch.export.load may fall back to reading pickles

    uri = os.fspath(uri)
    file: Any = MemoryFile(read_whole(uri, storage_options=storage_options, filesystem=filesystem), uri)
    if is_zip(file.memory):
        loader = _loader(check_zip(file.memory, uri=uri))
        if loader not in (None, "load_exported"):
            raise errors.ArtifactError(f"not an ExportedProgram: {loader} loads such", uri=uri)
    try:
        if not trusted:
            with PT2ArchiveReader(file) as archive:  # the one that PyTorch reads it with
                refused = list(refusals(archive.get_file_names(), archive.read_bytes))
            if refused:
                some = listed(refused, _LISTED, "; ")
                message = f"it would run more than a model does: {some} (trusted=True, if you made it yourself)"
                raise errors.UnsafeArtifact(message, asks_for=refused, uri=uri)
            file.seek(0)
        return load_pt2(file).exported_programs["model"]
    except (errors.S3Error, MemoryError):
        raise
    except Exception as error:  # some are of torch's own, of no common base
        words = brief(error, 300) or type(error).__name__
        message = f"not an ExportedProgram that PyTorch {torch.__version__} can load ({words})"
        raise errors.ArtifactError(message, uri=uri) from error
