"""Loading files that torch.save wrote before it wrote zip files: torch reads them from end to end."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import fsspec

from torch_s3.checkpoint.checkpoint import Checkpoint, Options
from torch_s3.checkpoint.nesting import check_nesting
from torch_s3.checkpoint.progress import Progress
from torch_s3.checkpoint.torch_load import torch_load
from torch_s3.source import Source
from torch_s3.uris import translated

_PICKLES = 5  # magic number, version, machine, object, and the storages' keys


class LegacyCheckpoint(Checkpoint):
    """One pickle after another, and the storages after those. There are no checksums, and no directory."""

    def __init__(
        self, source: Source, options: Options, progress: Progress, fs: fsspec.AbstractFileSystem, path: str
    ) -> None:
        super().__init__(source, options, progress)
        self._fs, self._path = fs, path

    def load(self, only: Collection[str] | None = None) -> Any:
        uri, options, map_location = self.source.uri, self.options, self.options.placement.given
        if options.placement.is_call:
            map_location = options.placement.restore
        self.progress.expect(self.source.size)
        with translated(uri):
            opened = self._fs.open(self._path, "rb")
        with opened, self.progress.timing("unpickling"):
            for _ in range(_PICKLES):
                check_nesting(opened, uri=uri)
            opened.seek(0)
            file = _Watched(opened, self.source.size, self.progress)
            return torch_load(
                file,
                options.placement,
                map_location,
                weights_only=options.weights_only,
                safe_globals=options.safe_globals,
                size=self.source.size,
                uri=uri,
            )


class _Watched:
    """Passes reads on, tells how far they have come, and keeps the first error, of which torch may make another one."""

    def __init__(self, file: Any, size: int, progress: Progress) -> None:
        self._file, self._size, self._progress = file, size, progress
        self._furthest = 0
        self.error: BaseException | None = None
        self.truncated = False  # a read came to the file's end before it had what was asked for

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)  # tell …

    def seek(self, *where: int) -> int:
        """As the file's. Whoever begins anew, as torch does after it has looked for a tar file, has missed nothing."""
        self.truncated = False
        at: int = self._file.seek(*where)
        return at

    def read(self, *size: int) -> bytes:
        """As the file's."""
        data: bytes = self._kept(self._file.read, *size)
        self.truncated = self.truncated or bool(size and len(data) < size[0])
        return data

    def readinto(self, buffer: Any) -> int:
        """As the file's."""
        count: int = self._kept(self._file.readinto, buffer)
        self.truncated = self.truncated or count < memoryview(buffer).nbytes
        return count

    def readline(self, *size: int) -> bytes:
        """As the file's."""
        line: bytes = self._kept(self._file.readline, *size)
        self.truncated = self.truncated or not line.endswith(b"\n")
        return line

    def _kept(self, call: Any, *arguments: Any) -> Any:
        try:
            result = call(*arguments)
            at = min(self._file.tell(), self._size)
        except BaseException as error:
            self.error = self.error or error
            raise
        if at > self._furthest:
            self._progress(at - self._furthest)
            self._furthest = at
        return result
