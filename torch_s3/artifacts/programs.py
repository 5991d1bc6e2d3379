"""Models that PyTorch has compiled or exported: from S3 into memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import fsspec
import torch

from torch_s3 import errors
from torch_s3.artifacts.exported_check import refusals
from torch_s3.artifacts.source import MemoryFile, read_whole

_LISTED = 10  # of refusals in a message


class _ReadOnce:
    """A file for torch.jit.load, which reads it in one go; our copy goes before torch makes its own."""

    def __init__(self, content: memoryview) -> None:
        self._content: memoryview | None = content

    def read(self) -> bytes:
        content, self._content = self._content, None
        assert content is not None
        return bytes(content)


def load_torchscript(
    uri: str | os.PathLike[str],
    *,
    map_location: str | torch.device | None = "cpu",
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Any:
    """Load what ``torch.jit.save`` wrote. Nothing touches a disk; PyTorch copies it twice in memory meanwhile.

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
        NotFound: There is no such object.
        ArtifactError: It is no TorchScript, or damaged.
    """
    uri = os.fspath(uri)
    content = read_whole(uri, storage_options=storage_options, filesystem=filesystem)
    if bytes(content[:2]) != b"PK":
        raise errors.ArtifactError("not a TorchScript file: it is no zip", uri=uri)
    file = _ReadOnce(content)
    del content
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
            return torch.jit.load(file, map_location=map_location)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        words = str(error).split("\n")[0][:300]
        if "constants.pkl" in words:
            words = "it has no constants.pkl; what torch.save wrote is for load_checkpoint"
        elif not any(sign in words for sign in ("PytorchStreamReader", "archive", "Unknown", "zip")):
            raise  # about this machine, or what its code does
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
        UnsafeArtifact: It would run something else. The message lists what.
    """
    from torch.export.pt2_archive import PT2ArchiveReader
    from torch.export.pt2_archive._package import load_pt2  # torch.export.load may fall back to reading pickles

    uri = os.fspath(uri)
    file: Any = MemoryFile(read_whole(uri, storage_options=storage_options, filesystem=filesystem), uri)
    try:
        if not trusted:
            with PT2ArchiveReader(file) as archive:  # the one that PyTorch reads it with
                refused = list(refusals(archive.get_file_names(), archive.read_bytes))
            if refused:
                some = "; ".join(refused[:_LISTED])
                more = f"; and {len(refused) - _LISTED} more" if len(refused) > _LISTED else ""
                message = f"it would run more than a model does: {some}{more} (trusted=True, if you made it yourself)"
                raise errors.UnsafeArtifact(message, asks_for=refused, uri=uri)
            file.seek(0)
        return load_pt2(file).exported_programs["model"]
    except errors.S3Error:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AssertionError, OSError, AttributeError) as error:
        words = str(error).split("\n")[0][:300] or type(error).__name__
        message = f"not an ExportedProgram that PyTorch {torch.__version__} can load ({words})"
        raise errors.ArtifactError(message, uri=uri) from None
