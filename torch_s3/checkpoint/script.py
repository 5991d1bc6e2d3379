"""Loading TorchScript archives: programs, that torch reads from memory."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch

from torch_s3.checkpoint.archive import has_sums, payloads, unpacked
from torch_s3.checkpoint.checkpoint import Checkpoint, Options
from torch_s3.checkpoint.progress import Progress
from torch_s3.checkpoint.torch_zip import Record
from torch_s3.errors import CheckpointError, UnsafeCheckpoint
from torch_s3.source import Source
from torch_s3.wording import brief


class ScriptCheckpoint(Checkpoint):
    """A file of torch.jit.save. ``weights_only=True`` refuses it, as torch.load does."""

    def __init__(self, source: Source, options: Options, progress: Progress, records: Mapping[str, Record]) -> None:
        super().__init__(source, options, progress)
        if options.weights_only:
            words = "it is a TorchScript archive, a program: load it with weights_only=False if you trust it, or a file"
            raise UnsafeCheckpoint(f"{words} of it with torch.jit.load", uri=source.uri)
        self._records = dict(records)
        self._verify = options.verify and has_sums(records)
        progress.verified = self._verify

    def load(self, only: Collection[str] | None = None) -> Any:
        source, placement = self.source, self.options.placement
        if not isinstance(placement.given, str | torch.device | None):
            raise CheckpointError("it is a TorchScript archive: give one device as map_location=", uri=source.uri)
        self.progress.expect(source.size)
        with self.progress.timing("receiving"):
            [content] = source.read([(0, source.size)])
            source.check_unchanged()
        self.progress(source.size)
        if self._verify:  # torch.jit.load doesn't
            starts = payloads(source, self._records)
            for record in self._records.values():
                start = starts[record.name]
                unpacked(record, content[start : start + record.length], source=source, verify=True)
        with self.progress.timing("unpickling"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)  # the caller has no say in it
            try:
                return torch.jit.load(io.BytesIO(content), map_location=placement.given)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                reason = brief(error)
                words = f"not a TorchScript archive that torch can load ({reason})"
                raise CheckpointError(words, uri=source.uri) from error
