"""What becomes of objects that can't be used: the rules, and the record."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torch_s3 import errors

POLICIES = ("raise", "skip", "replace")
OF_ONE_OBJECT = (errors.DecodeError, errors.IntegrityError, errors.NotFound, errors.ObjectChanged)
"""What is the matter of an object. Anything else, like refused credentials, is one of all, and is always raised."""

HOPELESS = 10
"""Objects that fail in a row at the start: then none will be read."""


class Failure(NamedTuple):
    """An object that could not be used.

    Attributes:
        uri: Its name.
        error: The error's type, such as ``NotFound``.
        message: What went wrong.
        worker: Which worker met it; ``None`` for the process itself.
        epoch: When.
        position: Its position in the epoch.
    """

    uri: str
    error: str
    message: str
    worker: int | None
    epoch: int
    position: int


class Entry(NamedTuple):
    """A line of the record: the failure, and at which place of which worker's share of which iteration it was."""

    group: int
    slot: int
    place: int
    failure: Failure


class Record:
    """Failures of all workers: a file that each appends whole lines to, which outlives any of them.

    Lies in the machine's folder for temporary files, and goes with the dataset that made it. The path is what workers
    get.
    """

    def __init__(self) -> None:
        handle, self.path = tempfile.mkstemp(prefix="torch_s3-failures-", suffix=".jsonl")
        os.close(handle)
        self._read: list[Entry] = []
        self._offset = 0
        self._finalizer = weakref.finalize(self, _remove, self.path, os.getpid())

    def append(self, entry: Entry) -> None:
        """Add one, in one write, so that lines of several processes don't mix. Anew where somebody has tidied up."""
        line = json.dumps([*entry[:-1], *entry.failure]) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def entries(self) -> list[Entry]:
        """All until now, in the order of writing."""
        try:
            file = Path(self.path).open("rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            self._offset = 0
            return self._read
        with file:
            if os.fstat(file.fileno()).st_size < self._offset:  # it is another one by now
                self._offset = 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                group, slot, place, *failure = json.loads(line)
                self._read.append(Entry(group, slot, place, Failure(*failure)))
        return self._read

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._read, self._offset = state["path"], [], 0


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:
        with contextlib.suppress(FileNotFoundError):  # somebody has tidied up
            Path(path).unlink()


def check(on_error: str, max_errors: float | None) -> None:
    """Refuse what can't be meant.

    Raises:
        ValueError: It is none of the policies, or no limit.
    """
    if on_error not in POLICIES:
        raise ValueError(f"on_error={on_error!r}: use 'raise', 'skip' or 'replace'")
    if max_errors is None:
        return
    if on_error == "raise":
        raise ValueError("max_errors is for on_error='skip' or 'replace'; with 'raise', the first one ends it")
    given: Any = max_errors
    if isinstance(given, str) or not (given >= 0 if _is_count(max_errors) else 0 <= max_errors < 1):
        raise ValueError(f"max_errors={max_errors!r}: a count from 0, or a share of the samples from 0.0 to below 1.0")


def limit(max_errors: float | None, samples: int) -> float:
    """How many failures a rank may have in an epoch of so many samples."""
    if max_errors is None:
        return float("inf")
    return max_errors if _is_count(max_errors) else max_errors * samples


def _is_count(max_errors: Any) -> bool:
    return isinstance(max_errors, (int, np.integer)) and not isinstance(max_errors, bool)


def hopeless(failed: int, yielded: int) -> bool:
    """Whether nothing at all can be read here, which is no matter of single objects."""
    return failed >= HOPELESS and not yielded


def summary(on_error: str, failures: Sequence[Failure]) -> str:
    """What to warn of at an epoch's end."""
    counts = Counter(failure.error for failure in failures)
    first = failures[0]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
    done = "skipped" if on_error == "skip" else "replaced"
    return f"epoch {first.epoch}: {done} {len(failures):,} ({kinds}), the first: {first.message}"
