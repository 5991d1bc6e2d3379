"""Which of its formats a checkpoint has."""

from __future__ import annotations

import fsspec

from torch_s3 import errors
from torch_s3.checkpoint.archive import is_script, is_zip, read_records
from torch_s3.checkpoint.checkpoint import Checkpoint, Options
from torch_s3.checkpoint.legacy import LegacyCheckpoint
from torch_s3.checkpoint.progress import Progress
from torch_s3.checkpoint.script import ScriptCheckpoint
from torch_s3.checkpoint.tensors import SafetensorsCheckpoint, is_safetensors
from torch_s3.checkpoint.zipped import ZippedCheckpoint
from torch_s3.memory import no_collection
from torch_s3.source import Source


def recognized(
    source: Source, options: Options, progress: Progress, fs: fsspec.AbstractFileSystem, path: str
) -> Checkpoint:
    """The checkpoint that a file is, by its first bytes.

    Raises:
        CheckpointError: It is none.
    """
    head = source.head
    if is_safetensors(head):
        return SafetensorsCheckpoint(source, options, progress)
    if is_zip(head):
        with progress.timing("reading_layout"), no_collection():
            records = read_records(source)
        return (ScriptCheckpoint if is_script(records) else ZippedCheckpoint)(source, options, progress, records)
    if bytes(head[:1]) == b"\x80":  # every pickle of protocol 2 or later, torch's old format among them
        return LegacyCheckpoint(source, options, progress, fs, path)
    start = bytes(head[:4])
    raise errors.CheckpointError(
        f"not a checkpoint: neither torch.save nor safetensors wrote a file that starts with {start!r}", uri=source.uri
    )
