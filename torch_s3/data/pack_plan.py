"""Which objects go into which shard, and under which names. Pure: no I/O."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_s3 import errors
from torch_s3.data import tar, tfrecord
from torch_s3.data.example import example
from torch_s3.data.folder import folder_labels
from torch_s3.data.labels import is_missing
from torch_s3.data.manifest import Manifest
from torch_s3.data.order import permute

FORMATS = ("tar", "tfrecord")
_VERSION = 1  # of what is written for a plan


class Labels(NamedTuple):
    """A number for each object.

    Attributes:
        numbers: int64 (n,).
        classes: What they stand for, ``None`` where they stand for themselves.
    """

    numbers: NDArray[np.int64]
    classes: list[str] | None


class Plan(NamedTuple):
    """Which objects go into which shard.

    Attributes:
        id: The same for the same objects, versions and options, and for no others.
        order: int64 (n,): the objects in the order in which they are written.
        starts: int64 (m + 1,): where in ``order`` each of the m shards starts, and the last one ends.
        sizes: int64 (m,): bytes of each shard, if nothing is left out.
    """

    id: str
    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


def labels_of(manifest: Manifest, labels: str | Sequence[Any] | Callable[[str], Any] | None) -> Labels | None:
    """Numbers for an argument ``labels``, see :func:`~torch_s3.pack`.

    Raises:
        ValueError: It is none of what it may be, or a label is missing.
        EmptyDataset: ``"folder"``, and there are none.
    """
    if isinstance(labels, str):
        if labels == "folder":
            classes, numbers = folder_labels(manifest)
            if (numbers < 0).any():
                uri = manifest.uri(int(np.flatnonzero(numbers < 0)[0]))
                raise errors.InvalidUri("it lies in no class folder, so that it has no label", uri=uri)
            return Labels(numbers, classes)
        if labels != "auto":
            raise ValueError(f"labels={labels!r}: use 'auto', 'folder', a sequence, a callable or None")
        if manifest.labels is None:
            return None
        labels = list(manifest.labels)
    if labels is None:
        return None
    if isinstance(labels, (Mapping, set, frozenset)):
        raise TypeError(f"labels is a {type(labels).__name__}: give a list in the order of the objects, or labels.get")
    values = [labels(uri) for uri in manifest] if callable(labels) else list(labels)
    if len(values) != len(manifest):
        raise ValueError(f"{len(values)} labels for {len(manifest)} objects: give one each")
    for index, value in enumerate(values):
        if is_missing(value):
            raise ValueError(f"{manifest.uri(index)}: no label")
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        places = {name: number for number, name in enumerate(names)}
        return Labels(np.array([places[value] for value in values], np.int64), names)
    if not all(isinstance(value, (int, np.integer)) for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise TypeError(f"labels of shards are all ints or all strings, not {kinds}")
    return Labels(np.array(values, np.int64), None)


def make(manifest: Manifest, labels: Labels | None, *, format: str, shard_size: int, shuffle: bool, seed: int) -> Plan:
    """Divide the objects among shards, each as full as it gets without a sample more than ``shard_size``.

    Objects that are one sample of a tar stay together, where the first one of them is.

    Args:
        manifest: Of which every size is known.
        labels: A number for each.
        format: ``"tar"`` or ``"tfrecord"``.
        shard_size: Most bytes of a shard, unless it is a single sample.
        shuffle: Change the order of samples.
        seed: For that.

    Raises:
        InvalidUri: An object can't be in such a shard under its name.
    """
    names = [uri[len(manifest.root) :] for uri in manifest]
    groups, sizes = (_tar if format == "tar" else _tfrecord)(manifest, names, labels)
    count = int(groups.max()) + 1
    weights = np.bincount(groups, sizes, count).astype(np.int64)
    if shuffle:
        at = permute(np.arange(count, dtype=np.int64), count, seed=seed, epoch=0)
        place = np.empty(count, np.int64)
        place[at] = np.arange(count)
    else:
        at = place = np.arange(count, dtype=np.int64)
    order = np.argsort(place[groups], kind="stable")
    overhead = len(tar.END) if format == "tar" else 0
    objects = np.bincount(groups, minlength=count)[at].tolist()
    starts, filled, done, total = array("q"), array("q"), 0, 0
    for weight, members in zip(weights[at].tolist(), objects, strict=True):
        if not starts or total + weight > shard_size:
            starts.append(done)
            filled.append(overhead)
        filled[-1] += weight
        total = filled[-1]
        done += members
    starts.append(done)
    options = [_VERSION, format, shard_size, seed if shuffle else None, labels and labels.classes]
    found = hashlib.blake2b(json.dumps(options).encode(), digest_size=16)
    found.update(manifest.fingerprint.encode())
    if labels is not None:
        found.update(labels.numbers.astype("<i8").tobytes())
    return Plan(found.hexdigest(), order, np.array(starts, np.int64), np.array(filled, np.int64))


def _tar(
    manifest: Manifest, names: Sequence[str], labels: Labels | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sample of each object, numbered in order of appearance, and its bytes in a tar."""
    numbers: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    groups, sizes = array("q"), array("q")
    for index, (name, size) in enumerate(zip(names, manifest.sizes.tolist(), strict=True)):
        parts = tar.split(name)
        if parts is None:
            what = "without an extension, or that begin with '.' or '__'"
            message = f"readers of tars pass over names {what}: leave it out, or use tfrecord"
            raise errors.InvalidUri(message, uri=manifest.uri(index))
        key, extension = parts
        new = key not in numbers
        if parts in seen or extension in ("__key__", "__url__") or (labels is not None and extension == "cls"):
            message = f"its sample {key!r} has {extension!r} already: a sample is what is alike up to the first dot"
            raise errors.InvalidUri(message, uri=manifest.uri(index))
        seen.add(parts)
        groups.append(numbers.setdefault(key, len(numbers)))
        try:
            stored = member_size(name, size)
        except ValueError as error:
            raise errors.InvalidUri(str(error), uri=manifest.uri(index)) from None
        if new and labels is not None:
            stored += member_size(f"{key}.cls", len(str(labels.numbers[index])))
        sizes.append(stored)
    return np.array(groups, np.int64), np.array(sizes, np.int64)


def member_size(name: str, size: int) -> int:
    """Bytes of a member in a tar, with its headers and padding."""
    before, after = tar.member(name, size)
    return len(before) + size + len(after)


def _tfrecord(
    manifest: Manifest, names: Sequence[str], labels: Labels | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As :func:`_tar`: every object is a sample."""
    sizes = array("q")
    for index, (name, size) in enumerate(zip(names, manifest.sizes.tolist(), strict=True)):
        label = None if labels is None else int(labels.numbers[index])
        sizes.append(sum(map(len, record_of(name, label, _Sized(size)))) + tfrecord.FRAME)
        if sizes[-1] >= 1 << 31:
            raise errors.InvalidUri("TensorFlow reads no Example of 2 GiB and more: use tar", uri=manifest.uri(index))
    return np.arange(len(names), dtype=np.int64), np.array(sizes, np.int64)


class _Sized:
    """Stands for so many bytes."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def record_of(name: str, label: int | None, data: Any) -> list[Any]:
    """The buffers of an object's Example: ``key``, ``label`` where there is one, and ``data``."""
    labelled = {} if label is None else {"label": label}
    return example({"key": name.encode(errors="surrogateescape"), **labelled, "data": data})
