"""A file that others read or write, watched: progress, and the first error."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm


class WatchedFile:
    """Passes reads and writes on, reports progress, and keeps the first error.

    torch calls from C++ and may turn an error into another one on its way out; ``error`` is the one that happened, and
    ``short`` says whether a read got less than it asked for. ``seconds`` counts those in the file's own calls.
    ``progress`` is whether to show a bar, or what to call with the bytes so far and those that there will be, about.
    """

    def __init__(
        self,
        file: Any,
        *,
        progress: bool | Callable[[int, int], object],
        description: str,
        total: int = 0,
    ) -> None:
        self._file = file
        self._report = progress if callable(progress) else None
        self._bar = tqdm(
            total=total, desc=description, unit="B", unit_scale=True, unit_divisor=1024, disable=progress is not True
        )
        self.bytes, self._total = 0, total
        self.seconds = 0.0
        self.error: BaseException | None = None
        self.short = False  # a read came to the file's end before it had what was asked for

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)  # seek, tell, flush, readline …

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        size = memoryview(data).nbytes
        self._kept(self._file.write, data)
        self._moved(size)
        return size

    def read(self, *size: int) -> bytes:
        """As the file's."""
        data: bytes = self._kept(self._file.read, *size)
        self._moved(len(data))
        self.short = self.short or bool(size and len(data) < size[0])
        return data

    def readinto(self, buffer: Any) -> int:
        """As the file's."""
        count: int = self._kept(self._file.readinto, buffer)
        self._moved(count)
        self.short = self.short or count < memoryview(buffer).nbytes
        return count

    def readline(self, *size: int) -> bytes:
        """As the file's."""
        line: bytes = self._kept(self._file.readline, *size)
        self.short = self.short or not line.endswith(b"\n")
        return line

    def _kept(self, call: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments)
        except BaseException as error:
            self.error = self.error or error
            raise
        finally:
            self.seconds += time.perf_counter() - began

    def _moved(self, count: int) -> None:
        self.bytes += count
        if self.bytes > self._total:
            self._bar.total = self._total = self.bytes
        self._bar.update(count)
        if self._report is not None:
            self._report(self.bytes, self._total)
