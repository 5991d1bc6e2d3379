"""Index files, which say where the records of a shard lie, in NVIDIA DALI's formats. Pure: no I/O.

``tfrecord2idx`` writes a line ``OFFSET SIZE`` for each record, with its frame; ``wds2idx`` writes ``v1.2 COUNT``, and
for each sample a line of ``EXTENSION OFFSET SIZE NAME`` for each member, where the offset is that of its data.

Source: "tfrecord2idx" and "wds2idx", NVIDIA DALI documentation and tools.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from torch_s3 import errors
from torch_s3.data.tar import BLOCK, Member, split

KINDS = ("tar", "tfrecord")


def text(bounds: NDArray[np.int64], kind: str, samples: Sequence[Iterable[Member]] = ()) -> str:
    """The index of a shard.

    Args:
        bounds: int64 (n + 1,): where each record of a TFRecord file starts, and the last one ends.
        kind: ``"tar"`` or ``"tfrecord"``.
        samples: The members of each sample of a tar, counted from the tar's start. White space in their names, for
            which the format has no room, becomes ``_``.
    """
    _check(kind)
    if kind == "tfrecord":
        pairs = zip(bounds[:-1].tolist(), np.diff(bounds).tolist(), strict=True)
        return "".join(f"{start} {size}\n" for start, size in pairs)
    lines = [f"v1.2 {len(samples)}"]
    for members in samples:
        words: list[str] = []
        for each in members:
            _, extension = split(each.name) or ("", "")
            name, extension = (re.sub(r"\s", "_", word) for word in (each.name, extension))
            words += [extension or "_", str(each.start), str(each.size), name]
        lines.append(" ".join(words))
    return "\n".join([*lines, ""])


def parse(text: bytes | str, kind: str, uri: str = "") -> NDArray[np.int64]:
    """Where each record or sample starts, and the last one ends: int64 (n + 1,).

    Between two bounds of a tar may lie members that belong to no sample. The first bound is 0.

    Args:
        text: Of the index.
        kind: ``"tar"`` or ``"tfrecord"``.
        uri: Of the index, for errors.

    Raises:
        IntegrityError: It is no such index, or cut off.
    """
    _check(kind)
    lines = (text if isinstance(text, bytes) else text.encode(errors="surrogateescape")).splitlines()
    try:
        bounds = _of_tar(lines) if kind == "tar" else _of_tfrecord(lines)
        if bounds[0] or (np.diff(bounds) <= 0).any():
            raise ValueError("what it lists does not follow each other")
    except (ValueError, IndexError, OverflowError) as error:
        made = "wds2idx" if kind == "tar" else "tfrecord2idx"
        raise errors.IntegrityError(f"not a whole index as {made} writes it: {error}", uri=uri) from None
    return bounds


def _of_tfrecord(lines: list[bytes]) -> NDArray[np.int64]:
    numbers = np.array([line.split() for line in lines], np.int64).reshape(-1, 2)
    ends = numbers.sum(axis=1)
    if (numbers[1:, 0] != ends[:-1]).any():
        raise ValueError("its records do not follow each other")
    return np.concatenate([numbers[:1, 0] if len(numbers) else [0], ends])


def _of_tar(lines: list[bytes]) -> NDArray[np.int64]:
    version, count = lines[0].split()
    if version not in (b"v1.1", b"v1.2") or int(count) != len(lines) - 1:
        raise ValueError(f"its first line is {lines[0][:40]!r}, and {len(lines) - 1} follow")
    width = 4 if version == b"v1.2" else 3
    bounds = np.zeros(len(lines), np.int64)
    for number, line in enumerate(lines[1:], start=1):
        words = line.split()
        if not words or len(words) % width:
            raise ValueError(f"line {number + 1} has {len(words)} words")
        stop = int(words[1 - width]) + int(words[2 - width])  # of the last member's data
        bounds[number] = -(-stop // BLOCK) * BLOCK
    return bounds


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: use 'tar' or 'tfrecord'")
