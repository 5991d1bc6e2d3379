"""A file that others write, watched: progress, and the first error."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm


class WatchedFile:
    """Passes writes on, reports progress, and keeps the first error.

    torch calls from C++ and may turn an error into another one on its way out; ``error`` is the one that happened.
    ``seconds`` counts those in the file's own calls. ``progress`` is whether to show a bar, or what to call with the
    bytes so far and those that there will be, about.
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)  # seek, tell, flush …

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        size = memoryview(data).nbytes
        began = time.perf_counter()
        try:
            self._file.write(data)
        except BaseException as error:
            self.error = self.error or error
            raise
        finally:
            self.seconds += time.perf_counter() - began
        self._moved(size)
        return size

    def _moved(self, count: int) -> None:
        self.bytes += count
        if self.bytes > self._total:
            self._bar.total = self._total = self.bytes
        self._bar.update(count)
        if self._report is not None:
            self._report(self.bytes, self._total)
