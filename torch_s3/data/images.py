"""Datasets of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from torch_s3 import errors
from torch_s3.data.decode import MAX_PIXELS, MODES, SUFFIXES, decode_image
from torch_s3.data.labels import is_missing
from torch_s3.data.manifest import Manifest
from torch_s3.data.objects import manifest_of
from torch_s3.data.stream import Body, S3Stream


class S3ImageDataset(S3Stream):
    """Images streamed from a bucket into a plain ``DataLoader``.

    Each epoch yields every image exactly once over all ranks and workers, in an order that follows from ``seed`` and
    the epoch alone. Many reads are in flight in each worker along that order, so latency is hidden. The listing is made
    once, here; workers get it packed. Works under fork, forkserver and spawn. One loader at a time reads it:
    :meth:`state_dict` and :meth:`stats` tell of the latest one.

    Args:
        source: ``s3://bucket/prefix/`` (or any uri that fsspec lists), a list of uris, or a :class:`Manifest`.
        transform: Called with the uint8 (3, H, W) RGB tensor; with ``mode="GRAY"`` it is (1, H, W), with
            ``decode=False`` the file's ``bytes``.
        target_transform: Called with the label.
        labels: ``"auto"``: the manifest's where it has some, else ``"folder"``: an index into ``classes``, the sorted
            folder names, as torchvision's ``ImageFolder`` does; images outside any folder are left out. A sequence: the
            label of each image, in order of the source. A callable: the label of a uri. ``None``: images alone are
            yielded, not pairs.
        shuffle: A new permutation each epoch; call :meth:`set_epoch` before each.
        seed: Of the shuffling, the same on every rank.
        batch_size: The ``DataLoader``'s, which a dataset cannot see for itself. With it, batches are the same for any
            number of workers, ``len(loader)`` is right, and :meth:`state_dict` can count batches; without it, samples
            are dealt to workers one by one, and each may end with a smaller batch.
        drop_last: Leave out what fills no batch of all ranks together. Without it, where the ranks don't divide the
            samples, those of the epoch's beginning come again, at most ``world_size - 1`` of them. Either way, all
            ranks have the same number of samples and of batches.
        rank: Of this process, with ``world_size``. By default they come from ``torch.distributed`` once it is
            initialized, else from ``RANK`` and ``WORLD_SIZE`` as torchrun sets them.
        world_size: Number of ranks.
        on_error: What becomes of an image that is missing, changed or broken: ``"raise"``; ``"skip"``; or ``"replace"``
            by the one before it in its worker, or another of its rank, so that ranks stay in step. :attr:`errors` tells
            which, and a warning at the epoch's end how many. Errors that aren't about one object, like refused
            credentials, are always raised, and so is what your functions raise.
        max_errors: How many of them a rank may have in an epoch, or which share of its samples (a float below 1),
            before :class:`~torch_s3.TooManyErrors` is raised. ``None``: any number, but not a worker's first ten.
        decode: ``False`` for the files' bytes.
        mode: ``"RGB"`` or ``"GRAY"``.
        max_pixels: An image that says that it has more is broken.
        decode_threads: Threads of each worker that decode; 1: the one that also transforms. ``None``: 1 in a worker, 2
            without workers, where decoding then goes on while training computes.
        lookahead: Most requests on their way or read ahead per worker. ``None``: twice as many as the filesystem may
            have connections, so that the transport, which finds how many are of use, never runs out.
        lookahead_bytes: Most bytes on their way or read ahead per worker, unless it is a single image.
        cache_dir: A local folder to keep objects in, see :class:`~torch_s3.data.cache.Cache`; any number of processes
            and jobs may share one.
        cache_size: The most bytes to keep there, ``None`` for as much as there is room for.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Any fsspec filesystem to use instead.

    Yields:
        ``(image after transform, label after target_transform)``

    Raises:
        NotFound, EmptyDataset, AccessDenied, CacheError, …: The source can't be listed, or has nothing for some rank;
            here, before training starts. While iterating, in any worker: what went wrong with an object, naming its
            uri.

    Attributes:
        classes: Sorted class names, where labels are folders or the manifest's strings.
        class_to_idx: Their indices.
        manifest: What is read.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str] | Manifest,
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        labels: str | Sequence[Any] | Callable[[str], Any] | None = "auto",
        shuffle: bool = False,
        seed: int = 0,
        batch_size: int | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        on_error: str = "raise",
        max_errors: float | None = None,
        decode: bool = True,
        mode: str = "RGB",
        max_pixels: int = MAX_PIXELS,
        decode_threads: int | None = None,
        lookahead: int | None = None,
        lookahead_bytes: int = 256 << 20,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        if isinstance(labels, str) and labels not in ("auto", "folder"):
            raise ValueError(f"labels={labels!r}: use 'auto', 'folder', a sequence, a callable or None")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: use 'RGB' or 'GRAY'")
        storage: dict[str, Any] = {"storage_options": storage_options, "filesystem": filesystem}
        manifest = manifest_of(source, suffixes=SUFFIXES, **storage)
        self.transform, self.target_transform = transform, target_transform
        self._as_pixels, self._mode, self._max_pixels = decode, mode, max_pixels
        self.classes: list[str] = []
        self.class_to_idx: dict[str, int] = {}
        own = manifest.labels if isinstance(labels, str) and labels == "auto" else None
        samples = None
        if own is not None:
            self._labels: Any = own if isinstance(own, np.ndarray) else self._number(own)
        elif isinstance(labels, str):
            self._labels = self._number(manifest.folders())
            if not self.classes:
                message = "no class folders here: images must lie in one, or pass labels="
                raise errors.EmptyDataset(message, uri=manifest.root)
            if (self._labels < 0).any():
                samples = np.flatnonzero(self._labels >= 0)  # an image outside any folder is no sample
        else:
            self._labels = labels
            if labels is not None and not callable(labels):
                _check_labels(labels, manifest)
        super().__init__(
            manifest,
            samples=samples,
            shuffle=shuffle,
            seed=seed,
            batch_size=batch_size,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            on_error=on_error,
            max_errors=max_errors,
            lookahead=lookahead,
            lookahead_bytes=lookahead_bytes,
            cache_dir=cache_dir,
            cache_size=cache_size,
            decode_threads=decode_threads,
            **storage,
        )

    def _number(self, names: Iterable[str]) -> NDArray[np.int64]:
        """The class of each name, ``classes`` being those there are; -1 for ""."""
        seen: dict[str, int] = {}  # name → its number, in order of appearance
        numbers = np.fromiter((seen.setdefault(name, len(seen)) for name in names), dtype=np.int64)
        self.classes = sorted(name for name in seen if name)
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        found: NDArray[np.int64] = np.array([self.class_to_idx.get(name, -1) for name in seen])[numbers]
        return found

    def _decode(self, index: int, body: Body) -> Any:
        if not self._as_pixels:
            return bytes(body)
        return decode_image(body, self.manifest.uri(index), mode=self._mode, max_pixels=self._max_pixels)

    def _sample(self, index: int, decoded: Any) -> Any:
        try:
            image = decoded if self.transform is None else self.transform(decoded)
            if self._labels is None:
                return image
            label = self._labels(self.manifest.uri(index)) if callable(self._labels) else self._labels[index]
            if isinstance(label, np.integer):
                label = int(label)
            return image, label if self.target_transform is None else self.target_transform(label)
        except Exception as error:
            error.add_note(f"while transforming {self.manifest.uri(index)}")
            raise


def _check_labels(labels: Any, manifest: Manifest) -> None:
    if len(labels) != len(manifest):
        raise ValueError(f"{len(labels)} labels for {len(manifest)} images: give one each")
    if missing := [index for index, label in enumerate(labels) if is_missing(label)]:
        raise ValueError(f"{manifest.uri(missing[0])}: no label, as {len(missing)} of {len(manifest)} have none")
